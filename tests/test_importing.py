"""A training that sdnb did not run becomes a run folder, from what the reference's progress bar says."""

import io
import math
import random
import re

import pytest
from processes import ROOT
from tqdm import tqdm

from sdnb.__main__ import main
from sdnb.errors import RunError
from sdnb.logs import console, importing
from sdnb.metrics.results import measure
from sdnb.run import folder as run_folder
from sdnb.run.baselines import PUBLISHED

HEADER = """\
03/06/2024 17:32:04 - INFO - __main__ - Distributed environment: MULTI_GPU  Backend: nccl
Num processes: 8
Process index: 1
Device: cuda:1

Mixed precision type: fp16

03/06/2024 17:32:14 - INFO - __main__ - ***** Running training *****
03/06/2024 17:32:14 - INFO - __main__ -   Num examples = 833
03/06/2024 17:32:14 - INFO - __main__ -   Num Epochs = 26
03/06/2024 17:32:14 - INFO - __main__ -   Instantaneous batch size per device = 8
03/06/2024 17:32:14 - INFO - __main__ -   Total train batch size (w. parallel, distributed & accumulation) = 256
03/06/2024 17:32:14 - INFO - __main__ -   Gradient Accumulation steps = 4
03/06/2024 17:32:14 - INFO - __main__ -   Total optimization steps = 101
"""

# The end of a log of which the middle was left out, as logs are published.
WITH_A_GAP = (
    HEADER
    + """\
Steps:   0%|          | 0/101 [00:00<?, ?it/s]
Steps:   0%|          | 0/101 [00:03<?, ?it/s, lr=1e-5, step_loss=0.08]
Steps:   0%|          | 0/101 [00:03<?, ?it/s, lr=1e-5, step_loss=0.02]
Steps:   0%|          | 0/101 [00:04<?, ?it/s, lr=1e-5, step_loss=0.06]
Steps:   1%|          | 1/101 [00:04<08:00,  4.80s/it, lr=1e-5, step_loss=0.06]
Steps:   1%|          | 1/101 [00:04<08:00,  4.80s/it, lr=1e-5, step_loss=0.04]
…
Steps:  99%|█████████▉| 100/101 [03:22<00:01,  1.79s/it, lr=1e-5, step_loss=0.09]
Steps:  99%|█████████▉| 100/101 [03:22<00:01,  1.79s/it, lr=1e-5, step_loss=0.05]
debug: a rank says something
Steps:  99%|█████████▉| 100/101 [03:23<00:01,  1.79s/it, lr=1e-5, step_loss=0.03]
Steps: 100%|██████████| 101/101 [03:23<00:00,  1.98s/it, lr=1e-5, step_loss=0.03]
Steps: 100%|██████████| 101/101 [03:23<00:00,  1.98s/it, lr=1e-5, step_loss=0.0456]{'requires_safety_checker'} was not
Loaded scheduler as PNDMScheduler from `scheduler` subfolder of /home/someone/models/stable-diffusion-v1-4.

Steps: 100%|██████████| 101/101 [03:32<00:00,  2.11s/it, lr=1e-5, step_loss=0.0456]
"""
)


def read(text, **settings):
    return console.read(text.splitlines(), "a log", settings)


def trained(steps, sizes, seconds_of, losses):
    """What the reference prints: the bar moves on with a step's last micro-batch, and shows each one's loss."""
    printed, now = io.StringIO(), 0.0
    bar = tqdm(total=steps, desc="Steps", file=printed, mininterval=0)
    bar._time = lambda: now
    bar.start_t = bar.last_print_t = now
    truth = []
    for step in range(steps):
        began, own = now, []
        for micro_batch in range(sizes[step]):
            now += seconds_of(step)
            own.append(next(losses))
            if micro_batch == sizes[step] - 1:
                bar.update(1)
            bar.set_postfix(step_loss=own[-1], lr=1e-5)
        truth.append((now - began, own))
    bar.close()
    return printed.getvalue(), truth


def test_a_log_with_a_gap(tmp_path):
    run = importing.write(read(WITH_A_GAP), tmp_path / "run", "its.log")
    config, log = run.config, run.environment["imported"]
    assert (config.num_processes, config.global_batch, config.max_train_steps) == (8, 256, 101)
    assert (config.mixed_precision, config.learning_rate, log["examples"]) == ("fp16", 1e-5, 833)
    assert (log["at_step"], log["shown_seconds_per_step"], run.steps.micro_batches[99]) == (100, 1.79, 2)
    assert len(run.steps) == 101
    assert run.steps.step_loss.iloc[-1] == 0.0456
    assert run.steps.loss.iloc[0] == pytest.approx((0.08 + 0.02 + 0.06 + 0.04) / 4)
    assert run.steps.loss.iloc[-1] == pytest.approx((0.09 + 0.05 + 0.03 + 0.0456) / 4)
    assert run.steps.loss.iloc[1:-1].isna().all() and math.isnan(run.steps.step_loss[99])
    measured = measure(run)
    assert measured["nominal IPS"].text == "17.88"
    assert "step 100 was a short one, 2 of 4 micro-batches" in measured["nominal IPS"].how
    assert measured["seconds per micro-batch"].value == pytest.approx(0.558, abs=0.002)
    assert measured["images/s per GPU"].value == pytest.approx(14.3, abs=0.05)
    assert measured["images/s, all GPUs"].value == pytest.approx(8 * 14.3, abs=0.5)
    assert measured["images/s per GPU, whole log"].value == pytest.approx((25 * (3 * 256 + 128) + 256) / 212 / 8)
    assert measured["images/s per GPU, whole training"].value == pytest.approx((25 * (3 * 256 + 128) + 256) / 203 / 8)
    assert measured["short steps"].text == "25 of 101"
    assert measured["total time"].text == "212 s"
    assert not any(row.text == "nan" for row in measured.results)


def test_no_path_of_who_made_it_is_kept(tmp_path):
    run = importing.write(read(WITH_A_GAP), tmp_path / "run", "its.log")
    assert run.config.pretrained_model_name_or_path == "stable-diffusion-v1-4"
    assert not any("someone" in path.read_text() for path in run.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("separator", ["\r", "\n"])
def test_the_times_and_losses_of_a_whole_log(tmp_path, separator):
    draw = random.Random(0)
    sizes = ([4, 4, 4, 2] * 26)[:101]
    bars, truth = trained(
        101, sizes, lambda step: 0.4 + 0.2 * draw.random() + 3 * (step == 0), iter(lambda: round(draw.random(), 4), 2)
    )
    run = importing.write(read(HEADER + bars.replace("\r", separator)), tmp_path / "run", "its.log")
    assert list(run.steps.seconds) == pytest.approx([seconds for seconds, _ in truth], abs=0.035)
    assert list(run.steps.step_loss) == pytest.approx([losses[-1] for _, losses in truth], rel=5e-3), (
        "three digits are shown"
    )
    assert list(run.steps.loss) == pytest.approx([sum(losses) / len(losses) for _, losses in truth], rel=5e-3), (
        "three digits are shown"
    )
    measured = measure(run)
    images = 8 * sum(sizes[10:])
    assert measured["images/s per GPU"].value == pytest.approx(images / sum(time for time, _ in truth[10:]), rel=0.01)
    assert measured["final loss"].value == pytest.approx(
        sum(sum(losses) for _, losses in truth[-10:]) / sum(sizes[-10:]), rel=2e-3
    )


def test_fast_steps_are_shown_as_steps_per_second(tmp_path):
    bars, _ = trained(20, [1] * 20, lambda step: 0.12, iter(lambda: 0.5, 2))
    log = console.read(bars.splitlines(), "a log", dict(
        examples=100, train_batch_size=4, gradient_accumulation_steps=1, num_processes=1))  # fmt: skip
    run = importing.write(log, tmp_path / "run", "its.log")
    assert list(run.steps.seconds) == pytest.approx([0.12] * 20, rel=0.01)
    assert list(run.steps.images) == [4] * 20


def test_what_is_wrong_with_a_log(tmp_path):
    with pytest.raises(RunError, match="no progress bar"):
        read("hello")
    with pytest.raises(RunError, match="no header.*--examples, --train_batch_size, --gradient_accumulation_steps"):
        read("Steps:  50%|█| 1/2 [00:01<00:01,  1.00s/it, lr=1e-5, step_loss=0.1]")
    with pytest.raises(RunError, match="no such file"):
        importing.read(tmp_path / "missing.log")
    with pytest.raises(RunError, match="no TensorBoard events"):
        importing.read(tmp_path)
    importing.write(read(WITH_A_GAP), tmp_path / "run", "its.log")
    with pytest.raises(RunError, match="there is a run in it already"):
        importing.write(read(WITH_A_GAP), tmp_path / "run", "its.log")


def test_the_command(tmp_path, capsys):
    path = tmp_path / "its.log"
    path.write_text(WITH_A_GAP)
    main(["import", str(path), "--output_dir", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "17.88" in shown and str(tmp_path / "run") in shown
    assert len(run_folder.RunFolder(tmp_path / "run").steps) == 101
    with pytest.raises(SystemExit, match="1"):
        main(["import", str(tmp_path / "missing")])
    assert re.match("error: .*no such file", capsys.readouterr().err)


def test_the_published_run_comes_with_the_package():
    measured = measure(run_folder.RunFolder(PUBLISHED))
    assert measured["nominal IPS"].text == "17.88"
    assert measured["images/s per GPU"].value == pytest.approx(14.35, abs=0.01)
    assert measured["final step_loss"].text == "0.0456"
    assert measured.config.global_batch == 256 and measured.config.resolution == 512


REFERENCE = ROOT / "tests" / "data" / "reference"


@pytest.mark.parametrize("separator", ["\r", "\n"])
def test_what_the_reference_printed_and_what_it_filed_agree(tmp_path, separator):
    """One training, told by its console and by its TensorBoard events, which have the times to the microsecond."""
    printed = tmp_path / "console.txt"
    printed.write_text((REFERENCE / "console.txt").read_text().replace("\r", separator))
    told = importing.write(importing.read(printed), tmp_path / "told", "console")
    known = dict(examples=72, num_processes=2, train_batch_size=4, gradient_accumulation_steps=4)
    filed = importing.write(importing.read(REFERENCE, **known), tmp_path / "filed", "events")
    assert list(told.steps.images) == list(filed.steps.images) == ([32, 32, 8] * 5)[:14]
    assert list(told.steps.seconds[1:]) == pytest.approx(list(filed.steps.seconds[1:]), abs=0.01)
    assert list(told.steps.loss) == pytest.approx(list(filed.steps.loss), rel=5e-3), "of which three digits are shown"
    assert math.isnan(filed.steps.seconds[0]), "the events do not say when the training began"
    speeds = [measure(run).throughput.value for run in (told, filed)]
    assert speeds[0] == pytest.approx(speeds[1], rel=2e-3)
