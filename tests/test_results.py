import io
import math
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from made_runs import FakeRun, config, published_run, records
from tqdm import tqdm

from sdnb.metrics import throughput
from sdnb.metrics.results import measure
from sdnb.metrics.step_clock import PHASES
from sdnb.metrics.steps import mark, time_by_phase, warmup_steps


def test_the_published_number_and_the_true_one():
    steps = published_run()
    assert throughput.smoothed_seconds_per_step(steps.seconds[:100]) == pytest.approx(1.79, abs=0.005)
    assert throughput.nominal_ips(steps, config()) == pytest.approx(17.88, abs=0.05)
    together = throughput.images_per_second(steps.images, steps.seconds)
    assert together.value / 8 == pytest.approx(14.3, abs=0.05)
    assert together.high - together.low < 1e-6, "every image takes as long as every other"


def test_smoothing_is_what_a_real_progress_bar_shows():
    bar, seconds = tqdm(total=9, file=io.StringIO(), mininterval=0.02), []
    last = bar.last_print_t
    for pause in (0.05, 0.03, 0.06, 0.03, 0.08, 0.04):
        time.sleep(pause)
        bar.update(1)
        seconds.append(bar.last_print_t - last)
        last = bar.last_print_t
    # The bar under test has tqdm's own interval of 0.1 s, so it is given times ten times as long.
    assert throughput.smoothed_seconds_per_step(np.array(seconds) * 10) == pytest.approx(
        10 / bar.format_dict["rate"], 1e-3
    )
    bar.close()


def test_the_environment_does_not_change_the_smoothing():
    """tqdm takes its defaults from there, when it is loaded."""
    program = (
        "import numpy as np; from sdnb.metrics.throughput import smoothed_seconds_per_step as smoothed; "
        "print(smoothed(np.array([1.0, 2, 4, 3])))"
    )
    own = {"TQDM_DISABLE": "1", "TQDM_SMOOTHING": "0.9", "TQDM_MININTERVAL": "9", "TQDM_MINITERS": "3"}
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **own}, capture_output=True, text=True)
    assert float(done.stdout) == throughput.smoothed_seconds_per_step(np.array([1.0, 2, 4, 3]))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        seconds = generator.normal(1, 0.1, 90)
        estimate = throughput.images_per_second(np.full(90, 32), seconds)
        covered += estimate.low < 32 < estimate.high
    assert 0.90 < covered / 400 < 0.98


def test_slow_drift_widens_the_interval():
    seconds = 1 + 0.1 * np.sin(np.arange(90) / 8)
    drifting = throughput.images_per_second(np.full(90, 32), seconds)
    shuffled = throughput.images_per_second(np.full(90, 32), np.random.default_rng(0).permutation(seconds))
    assert drifting.high - drifting.low > 1.5 * (shuffled.high - shuffled.low)


def test_two_steps_give_no_interval():
    estimate = throughput.images_per_second([32, 32], [1, 1])
    assert estimate.value == 32 and math.isnan(estimate.low)


def test_warm_up():
    assert [warmup_steps(steps) for steps in (1, 2, 5, 101)] == [0, 1, 1, 10]


def test_marks():
    steps = mark(published_run(), config())
    assert steps.short.sum() == 25 and steps[steps.short].micro_batches.eq(2).all()
    assert not steps.steady[:10].any() and steps.steady[10:].all()


def test_the_running_mean_weighs_images():
    steps = mark(records([4, 2], 1, loss=[0.1, 0.4]), config())
    assert steps.running_loss.iloc[1] == pytest.approx((0.1 * 4 + 0.4 * 2) / 6)
    long = mark(records([4] * 30, 1, loss=np.arange(30)), config())
    assert long.running_loss.iloc[-1] == pytest.approx(np.arange(20, 30).mean())


def test_the_results_of_the_published_run():
    ranks = [{"peak_memory_gib": 20.0 + rank} for rank in range(8)]
    measured = measure(FakeRun(published_run(), summary={"ranks": ranks, "ended": 250.0}))
    assert measured["images/s per GPU"].value == pytest.approx(14.3, abs=0.05)
    assert measured["MFU"].value == pytest.approx(14.3 * 3.537 / 312, rel=0.01)
    assert measured["MFU"].how.startswith("of 312 TFLOP/s peak, by NVIDIA A100 data sheet: ")
    assert measured["peak memory"].text == "27.00 GiB"
    assert measured["short steps"].text == "25 of 101"
    assert measured["target"].text == "not met: 0.1000 (0.1000 to 0.1000) against 0.0456"
    assert "mean loss of the last 25 steps" in measured["target"].how
    assert measured["total time"].text == "250 s"
    assert measured["seconds per step"].value == pytest.approx(4 * 0.558)


def test_what_the_encoders_were_spared_counts_for_no_flop():
    steps = published_run().assign(encoded_images=0, encoded_captions=0)
    measured = measure(FakeRun(steps))
    assert measured["MFU"].value == pytest.approx(14.3 * 2.407 / 312, rel=0.01)
    assert "VAE" not in measured["MFU"].how
    assert measured["encodings kept"].text == "100 %"
    with pytest.raises(KeyError):
        measure(FakeRun(published_run()))["encodings kept"]


def test_a_peak_that_is_given_goes_before_the_known_one():
    run = FakeRun(published_run())
    run.config = run.config.updated(device_peak_tflops=624.0)
    run.model["reachable_tflops"] = 250.0
    measured = measure(run)
    assert measured["MFU"].value == pytest.approx(14.3 * 3.537 / 624, rel=0.01)
    assert measured["MFU"].how.startswith("of 624 TFLOP/s peak, by device_peak_tflops: ")
    assert "20% of the 250 TFLOP/s that a plain matrix product reaches" in measured["MFU"].how


def test_images_per_joule():
    steps = published_run()
    measured = measure(FakeRun(steps.assign(joules=8 * 400.0 * steps.seconds)))
    assert measured["images per joule"].value == pytest.approx(14.3 / 400, rel=0.01)
    assert "400 W per GPU" in measured["images per joule"].how


def test_a_run_that_was_cut_short_still_has_results():
    measured = measure(FakeRun(published_run()[:1]))
    assert measured["images/s per GPU"].value == pytest.approx(14.3, abs=0.05)
    assert "run is incomplete" in measured["peak memory"].text
    assert measured["nominal IPS"].value is None


def test_the_total_time_is_that_of_a_clock_that_nobody_sets():
    run = FakeRun(published_run(), summary=dict(ranks=[{"peak_memory_gib": 1.0}], ended=-86_398.0))
    run.environment["started"] = 0.0
    total = measure(run)["total time"]
    assert total.text == "198 s in steps" and "the clock was set" in total.how, "a run of version 0.1"
    run.summary["total_seconds"] = 230.0
    assert measure(run)["total time"].value == 230


def test_a_target_is_met_or_not_or_that_cannot_be_told():
    cannot = "cannot be told from 25 steps: "
    for loss, verdict, value in ((0.04, "met: ", 1), (0.051, "not met: ", 0), (0.0456, cannot, None)):
        noisy = loss * (1 + 0.1 * (-1.0) ** np.arange(100))
        result = measure(FakeRun(records([4] * 100, 1, loss=noisy)))["target"]
        assert result.text.startswith(verdict) and result.value == value
    six = measure(FakeRun(records([4] * 6, 1, loss=[0.2, 0.02, 0.05, 0.01, 0.06, 0.03])))["target"]
    assert six.value is None, "six noisy steps are a coin toss"


def test_a_target_is_rarely_met_by_chance():
    """The test's own error rate, in losses whose mean is the target, with noise that is correlated as in a training."""
    draw, verdicts = np.random.default_rng(0), []
    for _ in range(300):
        noise = draw.standard_normal(100)
        loss = 0.0456 * (1 + 0.2 * (noise + 0.3 * np.roll(noise, 1)))
        verdicts.append(measure(FakeRun(records([4] * 100, 1, loss=loss)))["target"].value)
    assert verdicts.count(1.0) / 300 < 0.09 and verdicts.count(0.0) / 300 < 0.09, "5 % each, and some for 25 steps"


def test_a_loss_that_is_not_finite_meets_no_target():
    steps = records([4] * 20, 1, loss=[0.01] * 12 + [math.nan] + [0.01] * 7)
    result = measure(FakeRun(steps))["target"]
    assert result.value == 0 and "not finite" in result.text
    assert measure(FakeRun(steps))["final loss"].text == "not finite"


def test_where_the_time_goes():
    phases = time_by_phase(mark(published_run(), config()))
    assert dict(phases) == pytest.approx(dict.fromkeys(PHASES, 0.1))


def test_the_first_step_after_a_resume_is_no_steady_one():
    steps = published_run()
    marked = mark(steps, config(), resumed_after=[50])
    assert list(marked.step[~marked.steady]) == [*range(1, 11), 51]
    run = FakeRun(steps, summary={"ranks": [{"peak_memory_gib": 20.0}], "ended": 250.0})
    run.environment |= {"host": "b", "resumed": [{"started": 0.0, "host": "a", "after_step": 50}]}
    measured = measure(run)
    assert "without 10 of warm-up and 1 directly after a resume" in measured["images/s per GPU"].how
    assert measured["resumed"].text == "after step 50" and "on another machine" in measured["resumed"].how
    assert "from the last resume" in measured["total time"].how


def test_slow_steps_and_why():
    steps = records([4] * 60, 0.5)
    steps["encoded_images"] = [256] * 20 + [0] * 40
    steps.loc[:19, "seconds"] = 3.0  # encoding is slow, but no wonder
    steps.loc[[30, 40, 50], "seconds"] = [4.0, 5.0, 2.3]
    steps.at[50, "phase_seconds"] = {**dict.fromkeys(PHASES, 0.1), "backward": 0.4}
    run = FakeRun(steps, checkpointing_steps=40)
    run.validation = pd.DataFrame(dict(step=[0, 30], loss=0.1, standard_error=0.01, images=64))
    slow = measure(run).slow_steps
    assert list(slow.step) == [31, 41, 51]
    assert list(slow.extra_seconds) == pytest.approx([2.0, 3.0, 0.3])
    assert list(slow.because) == ["after a held-out measurement", "after a checkpoint", "backward took longer"]


def test_without_much_to_compare_no_step_is_slow():
    assert measure(FakeRun(records([4] * 4, 0.5))).slow_steps.empty


def test_a_resumed_run_that_does_not_say_where_it_was():
    """As of a checkpoint of the reference, whose folder has no environment.json."""
    run = FakeRun(published_run())
    run.environment |= {"host": "b", "resumed": [{"after_step": 50}]}
    assert measure(run)["resumed"].text == "after step 50"
