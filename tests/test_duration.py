"""How long a run is said to take, before it begins."""

import re

import pytest
from made_runs import make_run

from sdnb.launch import duration
from sdnb.run import files
from sdnb.run import folder as run_folder


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A run of 40 steps of half a second, that took 50 s."""
    monkeypatch.setenv("SDNB_RUNS", str(tmp_path / "runs"))
    folder = make_run(tmp_path / "runs" / "one", noise=0.0, resolution=64, mixed_precision="no", num_processes=1)
    files.write(folder / run_folder.SUMMARY, dict(ranks=[], total_seconds=50.0))
    return run_folder.RunFolder(folder)


def test_as_long_as_an_earlier_run_of_its_kind(earlier):
    said = duration.expected(earlier.config, earlier.environment, steps=400)
    assert said == "about 3:50, as one did", "30 s besides the steps, and 400 steps of half a second"


@pytest.mark.parametrize("change", [dict(train_batch_size=4), dict(resolution=128)])
def test_no_run_of_its_kind(earlier, monkeypatch, change):
    """tiny at 64 pixels, for an image: UNet 2.47, VAE 0.6 GFLOP, and a text encoder with CLIP's vocabulary."""
    monkeypatch.setattr(duration, "measured_matmul_tflops", lambda *_: 1.0)
    config = earlier.config.updated(**change)
    said = re.match(r"about (\d+):(\d\d), roughly", duration.expected(config, earlier.environment, steps=1000))
    seconds = 60 * int(said[1]) + int(said[2]) - duration._START_SECONDS
    per_image = seconds * 0.5e12 / 1000 / config.global_batch
    assert per_image == pytest.approx(3.08e9 if config.resolution == 64 else 4 * 3.08e9, rel=0.1)


def test_a_damaged_run_says_nothing(earlier, monkeypatch):
    config, environment = earlier.config, earlier.environment
    (earlier.folder / run_folder.CONFIG).write_text("{")
    monkeypatch.setattr(duration, "_roughly", lambda *_: None)
    assert duration.expected(config, environment, 10) == ""
