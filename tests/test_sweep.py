"""A grid of settings: executed one after the other, past failures, and taken up where it stopped."""

import subprocess
import sys

import nbformat
import psutil
import pytest
import yaml
from made_runs import make_run
from processes import ROOT, wait_for
from training import small_data, small_model, train

from sdnb.errors import ConfigError, RunError
from sdnb.figures import comparison_plots
from sdnb.launch import sweep
from sdnb.run import folder as run_folder
from sdnb.run.comparison import compare

SLEEPS = "import time; from pathlib import Path; Path('began').touch(); time.sleep(200)"
BASE = dict(
    dataset_name="openmoji", resolution=64, center_crop=True, gradient_accumulation_steps=1, steps=3, lr_warmup_steps=0,
    validation_loss_steps=0, validation_prompts=None,
)  # fmt: skip


def grid_file(tmp_path, **content):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_past_a_failure_and_taken_up_again(tmp_path, monkeypatch):
    small = {**BASE, "pretrained_model_name_or_path": small_model(), "dataset_name": small_data()}
    path = grid_file(tmp_path, **small, grid=dict(max_train_samples=[8, 5000, 12]))
    said, runs = [], tmp_path / "runs"
    before_it_stopped = {**small, "max_train_samples": 12, "output_dir": str(runs / "max_train_samples=12")}
    train(before_it_stopped)
    executed = nbformat.v4.new_notebook(metadata={"papermill": {"parameters": before_it_stopped}})
    nbformat.write(executed, runs / "max_train_samples=12" / "train.ipynb")
    page, failed = sweep.run(sweep.load(path), runs, said.append)
    assert [line for line in said if "complete already" in line] == ["3 of 3: max_train_samples=12: complete already"]
    assert set(failed) == {"max_train_samples=5000"} and "has 13" in failed["max_train_samples=5000"]
    text = page.read_text()
    assert "Over max_train_samples" in text
    assert f'<pre class="command">sdnb sweep {path}' in text
    first = runs / "max_train_samples=8"
    assert len(run_folder.RunFolder(first).steps) == 3 and (first / "train.ipynb").exists()

    executed = []

    def execute(notebook, out, parameters):
        executed.append(str(out.relative_to(runs)))
        return "it broke" if notebook.name == "train.ipynb" else None

    monkeypatch.setattr(sweep, "_execute", execute)
    said.clear()
    assert sweep.run(sweep.load(path), runs, said.append)[1] == {"max_train_samples=5000": "it broke"}
    assert sum("complete already" in line for line in said) == 2
    assert executed == ["max_train_samples=5000/train.ipynb", "comparison.ipynb"]

    executed.clear()
    path = grid_file(tmp_path, **small, learning_rate=1e-6, grid=dict(max_train_samples=[8, 12]))
    with pytest.raises(RunError, match="0 of 2 runs succeeded"):
        sweep.run(sweep.load(path), runs, said.append)
    assert len(executed) == 2, "what was complete was another training"
    assert len(run_folder.RunFolder(runs / "max_train_samples=8.before-1").steps) == 3, "and is kept"


def test_a_training_that_did_not_reach_its_end_is_begun_again(tmp_path, monkeypatch):
    path = grid_file(tmp_path, pretrained_model_name_or_path="tiny", **BASE, grid=dict(train_batch_size=[1, 2]))
    make_run(tmp_path / "runs" / "train_batch_size=1")  # no summary
    executed = []

    def execute(notebook, out, parameters):
        executed.append(out.parent.name)
        assert not (out.parent / run_folder.CONFIG).exists()
        return "it broke"

    monkeypatch.setattr(sweep, "_execute", execute)
    with pytest.raises(RunError, match="0 of 2 runs succeeded"):
        sweep.run(sweep.load(path), tmp_path / "runs", lambda line: None)
    assert executed == ["train_batch_size=1", "train_batch_size=2"]
    assert len(run_folder.RunFolder(tmp_path / "runs" / "train_batch_size=1.before-1").steps) == 40


@pytest.mark.parametrize(
    "content, said",
    [
        (dict(steps=3), "has no grid"),
        (dict(grid=dict(train_batch_size=4)), "a list of values"),
        (dict(grid=dict(train_batch_sise=[4])), "did you mean train_batch_size"),
        (dict(grid=dict(train_batch_size=[4, -1])), r"train_batch_size': -1"),
        (dict(train_batch_size=1, grid=dict(train_batch_size=[4])), "both in the grid and beside it"),
    ],
)
def test_mistakes_show_before_anything_runs(tmp_path, content, said):
    settings = dict(pretrained_model_name_or_path="tiny", dataset_name="openmoji")
    with pytest.raises(ConfigError, match=said):
        sweep.load(grid_file(tmp_path, **settings, **content))
    with pytest.raises(ConfigError, match="there is no such file"):
        sweep.load(tmp_path / "missing.yaml")


def test_the_grids_that_come_along_are_right():
    for path in (ROOT / "params").glob("sweep-*.yaml"):
        assert len(sweep.load(path).runs) > 1


def test_the_short_form_of_max_train_steps_can_be_swept(tmp_path):
    settings = dict(pretrained_model_name_or_path="tiny", dataset_name="openmoji")
    assert sweep.load(grid_file(tmp_path, **settings, grid=dict(steps=[3, 4]))).swept == ("max_train_steps",)


def test_the_figure_of_a_sweep(tmp_path):
    for ranks, seconds in ((1, 0.5), (2, 0.6)):
        for batch in (4, 8):
            make_run(
                tmp_path / f"{ranks}-{batch}", seconds * batch / 8, noise=0, num_processes=ranks, train_batch_size=batch
            )
    compared = compare(tmp_path)
    figure = comparison_plots.swept(compared, ["num_processes", "train_batch_size"])
    said = figure.get_supxlabel().replace("\n", " ")
    assert "The most is 106.67 images/s with num_processes = 2" in said
    assert "Scaling efficiency from 1 to 2 ranks (train_batch_size = 4): 83%" in said
    upper, lower = figure.axes
    assert [label.get_text() for label in upper.get_xticklabels()] == ["1", "2"]
    assert lower.get_ylabel() == "peak memory of a rank, GiB"
    figure.canvas.draw()


def test_repeats_of_other_settings_are_kept_aside(tmp_path, monkeypatch):
    settings = {"one": {"learning_rate": 1e-5, "repeats": 2}}
    (tmp_path / "one" / "repeat-1").mkdir(parents=True)
    (tmp_path / "one" / "repeat-1" / run_folder.STEPS).touch()
    monkeypatch.setattr(sweep, "_execute", lambda *_: None)
    assert sweep.run_each(settings, tmp_path) == {}
    assert (tmp_path / "one.before-1" / "repeat-1" / run_folder.STEPS).exists()
    assert not [*(tmp_path / "one").iterdir()]


def test_when_a_sweep_is_killed_its_notebook_ends(tmp_path):
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLEEPS)], metadata=about)
    nbformat.write(notebook, tmp_path / "sleeps.ipynb")
    program = "from pathlib import Path; from sdnb.launch.sweep import _execute; "
    program += "_execute(Path('sleeps.ipynb'), Path('out.ipynb'), {})"
    sweeping = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    try:
        wait_for((tmp_path / "began").exists)
        started = psutil.Process(sweeping.pid).children(recursive=True)
    finally:
        sweeping.kill()
        sweeping.wait()
    assert len(started) >= 2 and not psutil.wait_procs(started, timeout=60)[1]
