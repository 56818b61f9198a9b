"""Simulated trainings whose true pace is known: what the intervals cover, and which changes of pace are found."""

import numpy as np
import pytest
from made_runs import FakeRun, make_run, records

from sdnb.metrics.results import PAGE_MIME, measure
from sdnb.metrics.steady import steady_from
from sdnb.metrics.throughput import images_per_second
from sdnb.report.run import Run
from sdnb.run.comparison import compare

SEEDS, STEPS, SECONDS = 200, 101, 0.5  # of a micro-batch of 64 images
SIZES = ([4, 4, 4, 2] * STEPS)[:STEPS]


def noise(draw, size, correlation=0.0):
    values = draw.standard_normal(STEPS)
    for step in range(1, STEPS):
        values[step] = correlation * values[step - 1] + np.sqrt(1 - correlation**2) * values[step]
    return size * values


AT = np.arange(STEPS) / STEPS
# The time of a step, as a share of the usual one. From step 41 on, the second in each pair is the true one.
PACES = {
    "flat": lambda draw: 1 + noise(draw, 0.03),
    "autocorrelated": lambda draw: 1 + noise(draw, 0.03, 0.5),
    "step": lambda draw: np.where(AT < 0.4, 1 / 1.05, 1) + noise(draw, 0.02),
    "ramp": lambda draw: 1 + 0.05 * (AT - 0.5) + noise(draw, 0.02),
    "steep ramp": lambda draw: 1 + 0.3 * (AT - 0.5) + noise(draw, 0.03),
    "slow at the end": lambda draw: np.where(AT < 0.85, 1, 1.3) + noise(draw, 0.03),
    "long warm-up": lambda draw: np.where(AT < 0.25, 1.4 - 1.6 * AT, 1) + noise(draw, 0.02),
}
TRUE_RATE = 64 / SECONDS / 8


def simulated(pace, seed, sizes=SIZES):
    """The results of a simulated run of eight GPUs. `sizes`: micro-batches of each step."""
    steps = records(sizes, SECONDS)
    steps["seconds"] *= PACES[pace](np.random.default_rng(seed))
    return measure(FakeRun(steps))


def outcomes(pace, sizes=SIZES):
    """Of all seeds, the shares that are steady at once, steady later, and never steady; and of those that are, the
    share whose interval covers the true rate."""
    at_once = later = covers = 0
    for seed in range(SEEDS):
        measured = simulated(pace, seed, sizes)
        state = measured.value_of("steady state")
        at_once += np.isnan(state)
        later += state == 1
        covers += state != 0 and measured.throughput.low <= TRUE_RATE <= measured.throughput.high
    steady = at_once + later
    return at_once / SEEDS, later / SEEDS, 1 - steady / SEEDS, covers / max(1, steady)


@pytest.mark.parametrize("sizes", [SIZES, [4] * STEPS], ids=["periodic", "equal"])
@pytest.mark.parametrize("pace", ["flat", "autocorrelated", "step"])
def test_intervals_cover_the_truth(pace, sizes):
    at_once, later, never, covered = outcomes(pace, sizes)
    assert 0.92 <= covered <= 0.985, "95 %, within what 200 seeds tell"
    assert never <= 0.05
    assert (later if pace == "step" else at_once) >= 0.95, "a change by 5 % is found, and none where there is none"


@pytest.mark.parametrize("pace", ["ramp", "steep ramp", "slow at the end", "long warm-up"])
def test_what_is_not_steady_is_found(pace):
    at_once, later, never, covered = outcomes(pace)
    assert at_once <= 0.05, "a drift by 5 % is found in 95 % of the runs"
    if pace in ("steep ramp", "slow at the end"):
        assert never >= 0.9, "it never becomes steady for long"
    if pace == "long warm-up":
        assert later >= 0.95 and covered >= 0.85


def test_the_results_say_where_it_is_steady():
    measured = simulated("step", 0)
    state, before = measured["steady state"], measured["before the steady state, images/s per GPU"]
    assert state.text.startswith("from step 4") and "the pace changed at step 4" in state.how
    assert before.value == pytest.approx(1.05 * TRUE_RATE, rel=0.02)
    assert f"steps {state.text.split()[-1]} to 101" in measured["images/s per GPU"].how


def test_a_run_without_a_steady_state_has_no_narrow_interval(tmp_path):
    measured = simulated("steep ramp", 0)
    assert measured["steady state"].text == "not reached"
    assert measured.throughput.high / measured.throughput.low > 1.15, "the range of its quarters"
    assert "never became steady" in measured["images/s per GPU"].how


def test_the_page_and_a_comparison_of_such_a_run(tmp_path):
    """Of a run whose pace changed in the middle, from two to four seconds a step to 0.35."""
    slow_first = make_run(tmp_path / "changed", noise=0.3, num_processes=1)
    path = slow_first / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(
        line.replace('"seconds": 0.', '"seconds": 3.') + "\n" if number in range(4, 30) else line + "\n"
        for number, line in enumerate(lines)
    ))  # fmt: skip
    make_run(tmp_path / "even", noise=0.02, num_processes=1)
    badges = Run(slow_first)._repr_mimebundle_()[PAGE_MIME]["badges"]
    assert {"text": "no steady state", "kind": "bad"} in badges
    (said,) = [said for said in compare([tmp_path / "even", slow_first]).statements if "times as many" in said]
    assert "significant difference. Two runs" not in said


def test_encoding_some_steps_is_no_change_of_pace():
    """The first epochs encode the images, the others find them in the cache."""
    steps = records([4] * STEPS, SECONDS).assign(encoded_images=[256] * 40 + [0] * 61)
    steps["seconds"] *= np.where(np.arange(STEPS) < 40, 1.3, 1) * PACES["flat"](np.random.default_rng(0))
    measured = measure(FakeRun(steps))
    assert np.isnan(measured.value_of("steady state")) and "steps 11 to 101" in measured["images/s per GPU"].how


def test_few_steps_tell_nothing():
    assert steady_from(np.linspace(1, 2, 15), 1) == (1, None)
    assert steady_from(np.ones(60), 6) == (6, None)
    assert steady_from(np.r_[np.ones(30), 2 * np.ones(40)], 7) == (32, 30)


def test_strong_autocorrelation_widens_the_interval():
    """Before, the interval of such steps covered the truth in 72 % of the runs."""
    covered = 0
    for seed in range(SEEDS):
        seconds = 1 + noise(np.random.default_rng(seed), 0.03, 0.8)
        rate = images_per_second(np.ones(STEPS), seconds)
        covered += rate.low <= 1 <= rate.high
    assert 0.9 <= covered / SEEDS <= 0.98


def test_a_rate_is_never_negative():
    """Of eleven steps that become faster and faster."""
    rate = images_per_second(np.full(11, 64.0), np.r_[3.0, 2.0, 1.5, 1.2, np.linspace(1.0, 0.5, 7)])
    assert 0 <= rate.low < rate.value < rate.high < 3 * rate.value
