"""Each form of log that `sdnb import` reads, in small logs made here, and what is wrong with some."""

import json
import math
import random
import shutil
import struct

import pytest
from test_importing import HEADER, trained
from torch.utils.tensorboard import SummaryWriter

import sdnb
from sdnb.__main__ import main
from sdnb.errors import RunError
from sdnb.logs import importing
from sdnb.metrics.results import PAGE_MIME, measure

FACTS = dict(examples=80, num_processes=2, train_batch_size=4, gradient_accumulation_steps=1)


def header(examples=833, ranks=8, batch=8, accumulation=4, steps=101):
    together = ranks * batch * accumulation
    values = {
        "Num processes: 8": f"Num processes: {ranks}", "= 833": f"= {examples}", "device = 8": f"device = {batch}",
        "= 256": f"= {together}", "steps = 4": f"steps = {accumulation}", "= 101": f"= {steps}",
    }  # fmt: skip
    text = HEADER
    for old, new in values.items():
        text = text.replace(old, new)
    return text


def bar(steps, seconds, initial=0, total=None, loss=0.1, elapsed=0.0):
    """States of a bar, one for each step, with tqdm's average of the seconds per step."""
    total = total or steps
    printed = [f"Steps:  50%|█████     | {initial}/{total} [00:00<?, ?it/s]"] if not elapsed else []
    average = 0.0
    for count, step in enumerate(range(initial + 1, steps + 1), 1):
        elapsed += seconds(step)
        average = 0.3 * seconds(step) + 0.7 * average
        shown = average / (1 - 0.7**count)
        rate = f"{shown:5.2f}s/it" if shown > 1 else f"{1 / shown:5.2f}it/s"
        clock = f"{int(elapsed) // 60:02d}:{int(elapsed) % 60:02d}"
        printed.append(f"Steps:  50%|█████     | {step}/{total} [{clock}<00:10, {rate}, lr=1e-5, step_loss={loss}]")
    return printed


def imported(tmp_path, text, run=None, name="console.log", **facts):
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else "\n".join(text))
    return importing.read(path, run, **facts)


def rate(log, name=None):
    measured = measure(log)
    return measured.throughput.value if name is None else measured[name].value


# ---- the chip-evaluation suite's form: the first bars, one near the end, the last; times of all ranks in between

SUITE = """\
Steps:   0%|          | 0/101 [00:00<?, ?it/s]a warning
Steps:   1%|          | 1/101 [00:09<15:51,  9.52s/it, lr=1e-5, step_loss=0.0413]06/20/2024 20:22:59 - INFO - a remark
Steps: elapsed_time:{}| 100/101 [11:31<00:06,  6.21s/it, lr=1e-5, step_loss=0.0379]
 693.5912295281887
elapsed_time:{}
 693.5907026845962693.6elapsed_time:{}
 693.6219155732542
Steps: 100%|██████████| 101/101 [11:33<00:00,  6.75s/it, lr=1e-5, step_loss=0.0111]{'x'} was not found in config.
Steps: 100%|██████████| 101/101 [11:52<00:00,  7.06s/it, lr=1e-5, step_loss=0.0111]
"""


def test_the_suite_on_eight_gpus(tmp_path):
    log = imported(tmp_path, HEADER + SUITE)
    assert rate(log) == pytest.approx(8 / (6.21 / 3.2104), abs=0.01), "near the end, not of step 1"
    assert rate(log, "images/s per GPU, whole training") == pytest.approx(22656 / 693.59 / 8, abs=1e-3)
    assert rate(log, "images/s per GPU, whole log") == pytest.approx(22656 / 712 / 8)
    assert rate(log, "unique images/s per GPU") == pytest.approx(rate(log) * 833 / 896, rel=0.01)
    assert log.trained_seconds == pytest.approx(693.6, abs=0.05) and log.total_seconds == 712
    assert measure(log)["total time"].text == "712 s", "the pipeline was saved in it"


def test_the_suite_on_32_gpus_has_only_the_whole(tmp_path, recwarn):
    bars = """\
Steps:   0%|          | 0/101 [00:00<?, ?it/s]
Steps:   1%|          | 1/101 [00:33<15:51, 33.68s/it, lr=1e-5, step_loss=0.0413]
Steps:  98%|████████elapsed_time:{}4<00:16,  8.29s/it, lr=1e-5, step_loss=0.0361]]oss=0.0232]405]
 866.6380344219797
Steps: 100%|██████████| 101/101 [14:27<00:00,  8.59s/it, lr=1e-5, step_loss=0.0482]
Steps: 100%|██████████| 101/101 [14:26<00:00,  8.58s/it, lr=1e-5, step_loss=0.0422]
"""
    log = imported(tmp_path, header(ranks=32).replace("Num Epochs = 26", "Num Epochs = 101") + bars)
    measured = measure(log)
    first = measured.results[0]
    assert first.name == "images/s per GPU, whole training" and first.text == "3.73"
    assert "warm-up" in first.how and not any(row.name == "nominal IPS" for row in measured.results)
    assert measured["unique images/s per GPU"].value == pytest.approx(first.value * 833 / 1024)
    assert "18.7%" in measured["unique images/s per GPU"].how
    assert any("several machines" in remark for remark in log.remarks)
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_literal_carriage_returns_and_no_losses(tmp_path):
    states = [line.split(", lr=")[0].rstrip("]") + "]" for line in bar(40, lambda step: 11.0)]
    log = imported(tmp_path, header(steps=40) + "^M".join(states))
    assert len(log.records) == 40 and rate(log) == pytest.approx(log.steps.images[4:39].sum() / 35 / 11 / 8, rel=2e-3)
    assert log.steps.loss.isna().all()


def test_the_clock_between_two_states_is_a_stretch(tmp_path):
    states = bar(100, lambda step: 30.0 if step == 1 else 2.0, total=101)
    kept = [*states[:3], *states[30:32], *states[80:82]]
    log = imported(tmp_path, header(examples=800, ranks=1, batch=8, accumulation=1, steps=101) + "\n".join(kept))
    assert rate(log) == pytest.approx(8 / 2, rel=0.02)
    assert "on the log's clock from step 31 to step 81" in measure(log).results[0].how


# ---- which run


def test_two_runs_in_one_log(tmp_path, capsys):
    one = header(800, 1, 16, 1, 20) + "\n".join(bar(20, lambda step: 1.0)) + "\n"
    two = header(800, 1, 8, 1, 30) + "\n".join(bar(30, lambda step: 2.0))
    (tmp_path / "console.log").write_text(one + two)
    assert main(["import", str(tmp_path / "console.log"), "--output_dir", str(tmp_path / "run")]) is None
    shown = capsys.readouterr().out
    assert "run 2 of 2" in shown and "--run chooses the other" in shown
    assert shown.index("global batch") < shown.index("images/s per GPU"), "what was read comes first"
    assert rate(importing.read(tmp_path / "console.log")) == pytest.approx(4.0, rel=0.01)
    assert rate(importing.read(tmp_path / "console.log", 1)) == pytest.approx(16.0, rel=0.01)
    with pytest.raises(RunError, match="--run 3: the log has 2 runs"):
        importing.read(tmp_path / "console.log", 3)


def test_a_first_try_without_memory(tmp_path):
    failed = header(batch=16, steps=101) + bar(0, lambda step: 1.0, total=101)[0] + "\nCUDA out of memory\n"
    log = imported(tmp_path, failed + header(800, 1, 8, 1, 30) + "\n".join(bar(30, lambda step: 2.0)))
    assert (log.run, log.runs) == (2, 2) and rate(log) == pytest.approx(4.0, rel=0.01)
    later = header(800, 1, 8, 1, 30) + "\n".join(bar(30, lambda step: 2.0)) + "\n" + failed
    assert imported(tmp_path, later).run == 1, "the last complete one"


def test_bars_without_a_second_header(tmp_path):
    states = [*bar(20, lambda step: 1.0), *bar(20, lambda step: 3.0)]
    log = imported(tmp_path, header(800, 1, 8, 1, 20) + "\n".join(states))
    assert (log.run, log.runs) == (2, 2) and rate(log) == pytest.approx(8 / 3, rel=0.01)


def test_a_resumed_log_begins_at_its_own_step(tmp_path):
    first = header(800, 1, 8, 1, 40) + "\n".join(bar(12, lambda step: 1.0, total=40)) + "\nKilled\n"
    rest = header(800, 1, 8, 1, 40) + "\n".join(bar(40, lambda step: 6.0 if step == 11 else 2.0, initial=10))
    log = imported(tmp_path, first + rest)
    assert [*log.steps.step] == list(range(11, 41)) and log.steps.seconds.iloc[0] == pytest.approx(6.0, abs=0.02)
    assert rate(log) == pytest.approx(4.0, rel=0.01)
    assert rate(log, "images/s per GPU, whole training") == pytest.approx(30 * 8 / 64, rel=0.01)


def test_bars_of_two_machines_alternate(tmp_path):
    first, second = bar(40, lambda step: 3.0, loss=0.1), bar(40, lambda step: 3.0, loss=0.9)
    second = [line.replace("[00:", "[99:") for line in second]  # its clock began earlier
    mixed = [line for pair in zip(first, second) for line in pair]
    log = imported(tmp_path, header(800, 2, 8, 1, 40) + "\n".join(mixed))
    assert log.runs == 1 and len(log.records) == 40 and rate(log) == pytest.approx(8 / 3, rel=0.02)
    assert log.steps.loss.isna().all(), "which loss is whose?"


# ---- what tqdm and terminals do


@pytest.mark.parametrize("change", [
    lambda text: text.replace("|█████     |", ""),  # Colab
    lambda text: text.replace("Steps:", "\x1b[32mSteps:\x1b[0m").replace("[0", "\x1b[1m[\x1b[0m0"),
    lambda text: text.replace("Steps:", "Loading: 57%|█▋ | 4/7 [00:03<00:02, 1.3it/s]\x1b[ASteps:"),
    lambda text: text.replace("\n", "\r\n"),
], ids=["no bar", "colours", "nested bars", "Windows"])  # fmt: skip
def test_terminals(tmp_path, change):
    plain = header(800, 1, 8, 1, 30) + "\n".join(bar(30, lambda step: 2.0))
    assert change(plain) != plain
    log = imported(tmp_path, change(plain))
    assert len(log.records) == 30 and rate(log) == pytest.approx(4.0, rel=0.01)
    assert log.steps.step_loss.tolist() == [0.1] * 30


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_encodings_with_a_mark(tmp_path, encoding):
    text = header(800, 1, 8, 1, 30) + "\n".join(bar(30, lambda step: 2.0))
    (tmp_path / "log").write_bytes(text.encode(encoding))
    assert rate(importing.read(tmp_path / "log")) == pytest.approx(4.0, rel=0.01)


def test_the_first_loss_without_accumulation(tmp_path):
    losses = [0.5, 0.25, 0.125, 0.0625]
    bars, truth = trained(4, [1] * 4, lambda step: 1.5, iter(losses))
    log = imported(tmp_path, header(32, 1, 8, 1, 4) + bars)
    assert log.steps.loss.tolist() == losses == [own[0] for _, own in truth]


def test_one_rank_has_a_smaller_last_micro_batch(tmp_path):
    log = imported(tmp_path, header(833, 1, 8, 1, 210) + "\n".join(bar(210, lambda step: 1.0)))
    assert log.steps.images.sum() == 2 * 833 and log.steps.images[104] == 1


def test_a_wrong_average_gives_way_to_the_clock(tmp_path):
    """tqdm asks the time at most ten times a second, and `TQDM_SMOOTHING` may be anything."""
    states = [line.replace("2.00s/it", "9.00s/it") for line in bar(60, lambda step: 2.0)]
    log = imported(tmp_path, header(800, 1, 8, 1, 60) + "\n".join(states))
    assert rate(log) == pytest.approx(4.0, rel=0.02) and log.steps.seconds.isna().all()
    assert any("not of single steps" in remark for remark in log.remarks)


def test_fast_steps_are_too_fast_for_the_bar(tmp_path):
    """tqdm draws a bar at most ten times a second: its average is of several steps, and 5 s are few on its clock."""
    bars, _ = trained(100, [1] * 100, lambda step: 3.0 if step == 0 else 0.02, iter(lambda: 0.5, 2))
    log = imported(tmp_path, header(800, 1, 8, 1, 100) + bars)
    measured = measure(log)
    assert measured.results[0].name == "images/s per GPU, whole training" and log.steps.seconds.isna().all()
    assert measured.throughput.low <= 800 / 4.98 <= measured.throughput.high, "between 4 and 5 seconds"


def test_near_the_end_with_a_small_last_micro_batch(tmp_path):
    """One rank's epoch of 49 images has micro-batches of 16, 16, 16 and 1."""
    states = bar(300, lambda step: 2.0)
    log = imported(tmp_path, header(49, 1, 16, 4, 300) + "\n".join([*states[:3], *states[-3:]]))
    assert rate(log) == pytest.approx(49 / 2.0, rel=0.01) and "smoothing undone" in measure(log).results[0].how


def test_the_bar_near_the_end_of_a_short_log_still_has_the_warm_up_in_it(tmp_path):
    states = bar(8, lambda step: 60.0 if step == 1 else 2.0)
    log = imported(tmp_path, header(800, 1, 8, 1, 8) + "\n".join([states[0], *states[-2:]]))
    assert measure(log).results[0].name.endswith("whole training")


@pytest.mark.parametrize("lost", range(2, 7))
def test_a_lost_line_makes_no_loss_wrong(tmp_path, lost):
    draw = random.Random(lost)
    bars, truth = trained(12, [3] * 12, lambda step: 2.0, iter(lambda: round(draw.uniform(0.1, 0.9), 3), 2))
    states = bars.split("\r")
    kept = [state for number, state in enumerate(states) if number % 17 != lost]
    log = imported(tmp_path, header(36, 1, 1, 3, 12) + "\r".join(kept))
    own = {step: losses for step, (_, losses) in enumerate(truth, 1)}
    for row in log.steps.itertuples():
        assert math.isnan(row.step_loss) or row.step_loss == pytest.approx(own[row.step][-1], rel=5e-3)
        assert math.isnan(row.loss) or row.loss == pytest.approx(sum(own[row.step]) / 3, rel=5e-3)
    assert log.steps.loss.notna().sum() >= 3, "the others are known"


def test_a_global_batch_that_does_not_add_up(tmp_path):
    text = header(800, 2, 8, 1, 30) + "\n".join(bar(30, lambda step: 2.0))
    with pytest.raises(RunError, match="global batch of 16 is no multiple of 7 images × 1 micro-batches"):
        imported(tmp_path, text, train_batch_size=7)
    log = imported(tmp_path, text.replace("accumulation) = 16", "accumulation) = 32"))
    assert log.config.num_processes == 4 and "it says 2 processes" in log.remarks[0]


# ---- limits


@pytest.mark.parametrize(("text", "said"), [
    (header(examples=10**12) + "\n".join(bar(3, lambda step: 2.0, total=101)), "examples = 1,000,000,000,000"),
    (header(steps=3_000_000) + "\n".join(bar(3, lambda step: 2.0, total=3_000_000)), "max_train_steps = 3,000,000"),
    (header(batch=0) + "\n".join(bar(3, lambda step: 2.0, total=101)), "train_batch_size = 0"),
    (header() + "x" * 5_000_000 + "\n".join(bar(3, lambda step: 2.0, total=101)), "line 15 has more than"),
    (header() + bar(0, lambda step: 1.0, total=101)[0], "not completed a step"),
    ("", "no progress bar"),
], ids=["examples", "steps", "batch", "line", "no step", "empty"])  # fmt: skip
def test_absurd_logs(tmp_path, text, said):
    with pytest.raises(RunError, match=said):
        imported(tmp_path, text)


def events(folder, times, began=1.7e9, value=0.1):
    with SummaryWriter(str(folder)) as writer:
        for step, time in times:
            writer.add_scalar("train_loss", value, step, walltime=began + time)


def test_an_event_at_an_absurd_step(tmp_path):
    events(tmp_path, [(1, 0), (10**9, 2)])
    with pytest.raises(RunError, match=r"step = 1,000,000,000, and sdnb reads logs with 1 to 200,000"):
        importing.read(tmp_path, **FACTS)


def test_an_event_file_that_is_cut_off(tmp_path):
    events(tmp_path, [(step, 2 * step) for step in range(1, 21)])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    log = importing.read(tmp_path, **FACTS)
    assert len(log.records) == 19 and rate(log) == pytest.approx(2.0)
    assert any("is cut off: 20 records" in remark for remark in log.what_was_read()), "the version is a record, too"
    path.write_bytes(struct.pack("<Q", 1 << 62) + bytes(20))
    with pytest.raises(RunError, match="no TensorBoard events with a train_loss; .* is cut off: 0 records"):
        importing.read(tmp_path, **FACTS)


# ---- events and tables


def test_events_of_a_run_resumed_a_day_later(tmp_path):
    events(tmp_path / "a", [(step, 2 * step) for step in range(1, 26)])
    events(tmp_path / "b", [(step, 86400 + 2 * step) for step in range(21, 41)])
    log = importing.read(tmp_path, **FACTS)
    assert [*log.steps.step] == list(range(1, 41)) and log.runs == 1
    assert log.steps.seconds.max() == pytest.approx(2.0) and math.isnan(log.steps.seconds[20])
    assert rate(log) == pytest.approx(2.0)
    events(tmp_path / "c", [(step, 200000 + 4 * step) for step in range(1, 41)])
    assert rate(importing.read(tmp_path, **FACTS)) == pytest.approx(1.0), "the last run"
    assert rate(importing.read(tmp_path, 1, **FACTS)) == pytest.approx(2.0)


def test_events_whose_clock_was_set_back(tmp_path):
    events(tmp_path, [(step, 2 * step - (3600 if step > 20 else 0)) for step in range(1, 41)])
    log = importing.read(tmp_path, **FACTS)
    assert log.steps.seconds.min() > 0 and log.steps.seconds.isna().sum() == 2, "that of step 1, too"
    assert rate(log) == pytest.approx(2.0)


def simpletuner(step, seconds, **metrics):
    at = f"2026-11-30T11:{int(seconds) // 60:02d}:{seconds % 60:09.6f}+00:00"
    return json.dumps({"metrics": {"train_loss": 0.5, **metrics}, "schema_version": 1, "step": step, "timestamp": at})


TABLES = {
    "training_metrics.jsonl": [simpletuner(step, 2 * step) for step in range(1, 21)] + ['{"metrics": {"tra'],
    "loss.csv": ["Wall time,Step,Value", *(f"{1.7e9 + 2 * step},{step},0.5" for step in range(1, 21))],
    "history.csv": [",_step,_runtime,_timestamp,train_loss",
                    *(f"{step},{step},{2 * step},{1.7e9 + 2 * step},0.5" for step in range(1, 21))],
    "train_loss": [f"{1700000000000 + 2000 * step} 0.5 {step}" for step in range(1, 21)],
    "1000.log": [json.dumps({"index": step, "data": 0.5, "create_time": f"2026-11-30T11:59:{2 * step:02d}+00:00"})
                 for step in range(1, 21)],
    "train_loss.tsv": ["timestamp\tstep\ttrain_loss",
                       *(f"{1700000000000 + 2000 * step}\t{step}\t0.5" for step in range(1, 21))],
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_trackers(tmp_path, name):
    log = imported(tmp_path, TABLES[name], name=name, **FACTS)
    assert len(log.records) == 20 and rate(log) == pytest.approx(8 / 2 / 2, rel=1e-6)
    assert log.steps.loss.tolist() == [0.5] * 20 and math.isnan(log.steps.seconds[0])


def test_a_table_of_each_tenth_step(tmp_path):
    lines = [json.dumps({"step": step, "timestamp": 1.7e9 + 2 * step, "loss": 0.5}) for step in range(10, 500, 10)]
    log = imported(tmp_path, lines, name="a.jsonl", **FACTS)
    assert len(log.records) == 481 and rate(log) == pytest.approx(8 / 2 / 2)
    assert "it logged each 10th step" in log.remarks[0]


def test_times_in_other_units(tmp_path):
    for scale in (1e6, 1e9):
        times = [int(scale * (1.7e9 + 2 * step)) for step in range(1, 21)]
        lines = [json.dumps({"step": step, "time": time, "loss": 0.5}) for step, time in enumerate(times, 1)]
        assert rate(imported(tmp_path, lines, name="a.jsonl", **FACTS)) == pytest.approx(2.0)
    lines = [json.dumps({"step": step, "time": 1e6 * 60 * step, "loss": 0.5}) for step in range(1, 21)]
    with pytest.raises(RunError, match="a step takes 6e.07 s: the times are not in seconds"):
        imported(tmp_path, lines, name="a.jsonl", **FACTS)


def test_only_the_settings_of_the_work_are_imported(tmp_path):
    events(tmp_path / "logs", [(step, 2 * step) for step in range(1, 21)])
    known = tmp_path / "logs" / "1.0" / "hparams.yml"
    known.parent.mkdir()
    known.write_text("resume_from_checkpoint: latest\nnum_machines: 3\nresolution: 256\n")
    log = importing.read(tmp_path / "logs", **FACTS)
    assert log.config.resolution == 256 and log.config.resume_from_checkpoint is None
    importing.write(log, tmp_path / "run", "a")
    with pytest.raises(RunError, match="there is a run in it already"):
        importing.write(log, tmp_path / "run", "a")


def test_simpletuner_says_its_settings_beside(tmp_path):
    known = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "max_train_steps": 30, "resolution": 0.5}
    (tmp_path / "training_metrics.json").write_text(json.dumps({"config": known, "status": "running"}))
    facts, name = dict(examples=80, num_processes=1), "training_metrics.jsonl"
    log = imported(tmp_path, TABLES[name], name=name, **facts)
    assert log.config.global_batch == 8 and "incomplete: it ends at step 20 of 30" in log.remarks
    assert importing.read(tmp_path, **facts).form == log.form, "its folder will do"


def test_a_table_to_which_a_resumed_run_was_appended(tmp_path):
    first = [simpletuner(step, 2 * step) for step in range(1, 13)]
    later = [simpletuner(step, 1500 + 3 * step) for step in range(11, 41)]
    log = imported(tmp_path, first + later, name="training_metrics.jsonl", **FACTS)
    assert len(log.records) == 40 and log.steps.seconds.max() == pytest.approx(3.0)
    pause = [simpletuner(step, 1500 + 3 * step) for step in range(13, 41)]
    log = imported(tmp_path, first + pause, name="training_metrics.jsonl", **FACTS)
    assert log.steps.seconds.max() == pytest.approx(3.0), "the gap between the sessions is no step's time"


@pytest.mark.parametrize(("name", "lines", "said"), [
    ("train_loss.tsv", ["step\ttrain_loss", "1\t0.5"], "line 2 has no time, only step, train_loss"),
    ("panel.csv", ['"Step","a run - train_loss"', '"1","0.5"'], "line 2 has no time"),
    ("a.jsonl", ['{"loss": 1}'], "line 1 has no step"),
    ("a.jsonl", ['{"step": 1, "timestamp": "yesterday", "loss": 1}'], "that is no number"),
    ("a.jsonl", ['{"step": 1, "timestamp": 1, "lr": 1}'], "no line with a step, a time and a loss"),
])  # fmt: skip
def test_tables_that_say_too_little(tmp_path, name, lines, said):
    with pytest.raises(RunError, match=said):
        imported(tmp_path, lines, name=name, **FACTS)


# ---- kohya

KOHYA = """\
INFO     loading model for process 0/2                                train_util.py:5574
running training / 学習開始
  num train images * repeats / 学習画像の数×繰り返し回数: 1200
  num reg images / 正則化画像の数: 0
  num batches per epoch / 1epochのバッチ数: 150
  num epochs / epoch数: 2
  batch size per device / バッチサイズ: 4
  gradient accumulation steps / 勾配を合計するステップ数 = 2
  total optimization steps / 学習ステップ数: 60
"""


def kohya_bar(steps=60, seconds=2.0):
    for step in range(steps + 1):
        done = f"{step}/{steps} [{int(step * seconds) // 60:02d}:{int(step * seconds) % 60:02d}<00:10, "
        yield f"steps:   3%|▎         | {done}" + (f" {seconds:.2f}s/it, avr_loss=0.123]" if step else "?it/s]")
        if step == 5:
            yield "validation steps:  50%|█████     | 30/60 [00:02<00:02,  9.00it/s, val_avg_loss=0.1]"


def test_kohya(tmp_path):
    log = imported(tmp_path, KOHYA + "\n".join(kohya_bar()))
    assert "kohya" in log.form and log.config.global_batch == 16 and log.examples == 1200
    assert rate(log) == pytest.approx(4 * 2 / 2.0, rel=0.02), "on the clock: its s/it is a mean from the start"
    assert log.steps.seconds.isna().all() and log.steps.loss.isna().all(), "avr_loss is no step's"
    buckets = imported(tmp_path, KOHYA.replace(": 150", ": 163") + "\n".join(kohya_bar()))
    assert buckets.examples is None and any("upper bound" in remark for remark in buckets.remarks)
    with pytest.raises(RunError, match="give --num_processes"):
        imported(tmp_path, KOHYA.partition("\n")[2] + "\n".join(kohya_bar()))


def test_kohya_with_its_total(tmp_path):
    total = "  total train batch size (with parallel & distributed & accumulation) / 総バッチサイズ: 32\n"
    text = KOHYA.partition("\n")[2].replace("  gradient accumulation", f"{total}  gradient ccumulation")
    log = imported(tmp_path, text.replace(": 150", ": 75") + "\n".join(kohya_bar()))
    assert log.config.num_processes == 4 and log.config.global_batch == 32


# ---- MLPerf


def mllog(key, time, value=None, prefix="0: ", **metadata):
    event = {"namespace": "", "time_ms": time, "event_type": "POINT_IN_TIME", "key": key, "value": value}
    return f"{prefix}:::MLLOG {json.dumps({**event, 'metadata': {'file': 'a.py', 'lineno': 1, **metadata}})}"


def mlperf(blocks=20, seconds=20.0):
    yield from (f"Initializing distributed: GLOBAL_RANK: {rank}, MEMBER: {rank + 1}/8" for rank in range(8))
    yield mllog("gradient_accumulation_steps", 0, 1)
    yield mllog("global_batch_size", 0, 256)
    yield mllog("submission_benchmark", 0, "stable_diffusion")
    yield mllog("run_start", 1000)
    now = 1000
    for block in range(blocks):
        yield mllog("block_start", now, "training_step", samples_count=block * 25600)
        now += int(1000 * (seconds if block else 2 * seconds))
        yield mllog("block_stop", now, "training_step", samples_count=(block + 1) * 25600)
        now += 1500  # a checkpoint
    yield mllog("block_start", now, "validation_step", samples_count=0)
    yield mllog("block_stop", now + 10, "validation_step", samples_count=99999)
    yield mllog("run_stop", 5000, status="success")  # dated back to the checkpoint that met the target


def test_mlperf(tmp_path):
    log = imported(tmp_path, [*mlperf(), "noise", ":::MLLOG {broken"])
    assert (log.config.num_processes, log.config.global_batch, log.config.train_batch_size) == (8, 256, 32)
    assert rate(log) == pytest.approx(25600 / 20 / 8) and len(log.records) == 20
    assert (
        "it has 20 blocks of 100 steps, read as if each was a step" in log.remarks
        and log.trained_seconds == pytest.approx(21 * 20)
    )


@pytest.mark.parametrize(("keep", "said"), [
    (lambda line: "block" not in line, "no block_start and block_stop"),
    (lambda line: "global_batch" not in line, "no global_batch_size"),
    (lambda line: "MEMBER" not in line, "give --num_processes"),
])  # fmt: skip
def test_mlperf_that_says_too_little(tmp_path, keep, said):
    with pytest.raises(RunError, match=said):
        imported(tmp_path, [line for line in mlperf() if keep(line)])


def test_every_import_can_be_written_and_read_again(tmp_path):
    for number, text in enumerate([HEADER + SUITE, KOHYA + "\n".join(kohya_bar()), "\n".join(mlperf())]):
        log = imported(tmp_path, text)
        run = importing.write(log, tmp_path / str(number), "its.log")
        assert [row.text for row in measure(run).results] == [row.text for row in measure(log).results]
        shutil.rmtree(run.folder)


def test_a_page_says_only_what_the_log_says(tmp_path):
    """The defaults of settings that a log does not contain are no facts."""
    log = imported(tmp_path, [line for line in mlperf()])
    run = sdnb.Run(importing.write(log, tmp_path / "run", "its.log").folder)
    assert run.title.startswith("its.log: MLPerf stable_diffusion on unknown, 20 steps, 8 × GPU, kind unknown")
    facts = run._repr_mimebundle_()[PAGE_MIME]
    assert "512×512" not in str(facts) and "float32" not in str(facts)
    assert {*facts["settings"]} == {*run.known_settings} == {*log.settings}
    with pytest.raises(RunError, match="no loss was recorded"):
        run.plot_loss()
    assert run.plot_step_times() and sdnb.runs(tmp_path).loc["run", "images/s per device"] == pytest.approx(160)
