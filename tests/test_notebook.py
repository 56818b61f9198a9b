"""The main notebook, executed: by papermill from a shell, and in a kernel as JupyterLab does it."""

import copy
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import nbformat
import pytest
from conftest import ROOT
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from test_launch import none_left, processes_of

from sdnb import report, run_folder

SMALL = ["-p", "train_batch_size", "2", "-p", "gradient_accumulation_steps", "2", "-p", "validation_loss_steps", "0"]


def papermill(out, *arguments, cwd=ROOT, notebook="notebooks/train.ipynb"):
    command = [sys.executable, "-m", "papermill", notebook, str(out), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=250)


def outputs(notebook, kind):
    every = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return [output.data[kind] for output in every if kind in output.get("data", {})]


def test_papermill_from_the_projects_root(tmp_path):
    out = tmp_path / "run" / "train.ipynb"
    out.parent.mkdir()
    done = papermill(out, *SMALL, "-p", "steps", "4", "-p", "output_dir", str(out.parent), "-p", "num_processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    run = run_folder.RunFolder(out.parent)
    assert len(run.steps) == 4 and run.summary["world_size"] == 2 and run.config.max_train_steps == 4
    assert list(run.drawn.step) == [0] * 3 + [4] * 3

    notebook = nbformat.read(out, 4)
    said = outputs(notebook, "text/plain")
    assert len([text for text in said if "step 4/4" in text]) == 1, "one progress line, in its last state"
    assert not [text for text in said if "step 1/4" in text]
    assert len(outputs(notebook, "image/png")) == 5, "training pictures, loss, step times, phases, samples"
    streams = [output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output]
    assert streams == [], "no warnings and no chatter"
    names = [row["name"] for row in report.results(notebook)]
    assert names[:2] == ["images/s per CPU rank", "nominal IPS"] and "peak memory" in names and "total time" in names
    page, headline = report.write(out)
    assert headline and page.stat().st_size < 3e6


@pytest.fixture
def runs_alone():
    """The project's runs/, which tests of other workers must not fill meanwhile."""
    with open(f"{tempfile.gettempdir()}/sdnb-tests-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_papermill_from_the_notebooks_folder_with_a_settings_file(tmp_path, runs_alone):
    """Into a new folder under runs/ in the project's root; `mixed_precision: no` is a boolean in YAML."""
    (tmp_path / "settings.yaml").write_text(
        "mixed_precision: no\nmax_train_steps: 2\ntrain_batch_size: 2\nvalidation_prompts: null\nlearning_rate: 1e-4\n"
    )
    before = set((ROOT / "runs").glob("*"))
    done = papermill(
        tmp_path / "out.ipynb", "-f", str(tmp_path / "settings.yaml"), cwd=ROOT / "notebooks", notebook="train.ipynb"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (new,) = set((ROOT / "runs").glob("*")) - before
    try:
        config = run_folder.RunFolder(new).config
        assert (config.mixed_precision, config.max_train_steps, config.learning_rate) == ("no", 2, 1e-4)
        assert len(run_folder.RunFolder(new).steps) == 2 and run_folder.RunFolder(new).drawn.empty
        again = papermill(
            tmp_path / "again.ipynb", "-f", str(new / "config.yaml"), "-p", "output_dir", str(tmp_path / "2")
        )
        assert again.returncode == 0, again.stderr[-3000:]
        assert list(run_folder.RunFolder(tmp_path / "2").steps.loss) == list(run_folder.RunFolder(new).steps.loss), (
            "enough to run it again"
        )
    finally:
        shutil.rmtree(new)


@pytest.mark.parametrize(
    "given, said",
    [
        (["-p", "stpes", "3"], "stpes: there is no such setting; did you mean steps?"),
        (["-f", "params/demo.yaml", "-p", "train_data_dir", "."], "exclude each other"),
    ],
)
def test_a_wrong_parameter_fails_before_anything_runs(tmp_path, runs_alone, given, said):
    fails_before_anything_runs(tmp_path, given, said)


def test_the_vanished_data_set_fails_before_anything_runs(tmp_path, runs_alone):
    tiny = ["-p", "pretrained_model_name_or_path", "tiny", "-p", "mixed_precision", "no", "-p", "num_processes", "1"]
    fails_before_anything_runs(tmp_path, ["-f", "params/reference.yaml", *tiny], "taken down from the hub")


def fails_before_anything_runs(tmp_path, given, said):
    before = set((ROOT / "runs").glob("*"))
    done = papermill(tmp_path / "out.ipynb", *given)
    assert done.returncode == 1
    assert said in done.stderr
    assert "pydantic" not in done.stderr
    assert set((ROOT / "runs").glob("*")) == before and not (ROOT / "sd-pokemon-model").exists()


def small_cells(folder, steps):
    """The notebook's cells with small settings, as a user would edit them."""
    cells = nbformat.read(ROOT / "notebooks" / "train.ipynb", 4).cells
    small = dict(steps=steps, train_batch_size=2, validation_loss_steps=0, validation_prompts=None, output_dir=folder)
    for cell in cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    return cells


def executed(cells):
    notebook = nbformat.v4.new_notebook(
        cells=[*map(copy.copy, cells)], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"c{index}"
    return NotebookClient(notebook, timeout=200, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()


def test_run_all_twice_in_a_kernel_that_has_computed(tmp_path):
    """Also with variables of the user's own, which are no settings."""
    torch_first = nbformat.v4.new_code_cell(
        "import torch\nfrom accelerate import Accelerator\nAccelerator()\n"
        "total = (torch.ones(500, 500) @ torch.ones(500, 500)).sum().item()"
    )
    once, again = small_cells(str(tmp_path / "once"), 2), small_cells(str(tmp_path / "again"), 3)
    executed([torch_first, *once, *again])
    assert [len(run_folder.RunFolder(tmp_path / name).steps) for name in ("once", "again")] == [2, 3]


def test_a_rank_that_fails_shows_in_the_notebook(tmp_path, image_folder):
    folder = image_folder(9)
    (folder / "005.png").write_bytes(b"no picture")  # not one of those that the notebook shows
    done = papermill(
        tmp_path / "out.ipynb", *SMALL, "-p", "steps", "9", "-p", "num_processes", "2",
        "-p", "train_data_dir", str(folder), "-p", "output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 1
    shown = [output for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for output in cell.get("outputs", ())]
    (error,) = [output for output in shown if output.output_type == "error"]
    assert error.ename == "RunError" and "failed: DataError" in error.evalue and "005.png" in error.evalue
    assert len(error.traceback) < 4, "the message, and not where in sdnb it was raised"


def wait_for(condition, within=120):
    end = time.time() + within
    while not condition():
        assert time.time() < end, "it did not come"
        time.sleep(0.2)


def test_interrupting_the_cell_ends_every_rank(tmp_path):
    cells = [cell for cell in small_cells(str(tmp_path / "run"), 5000) if cell.cell_type == "code"]
    launching = next(index for index, cell in enumerate(cells) if "launch.launch(" in cell.source)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT / "notebooks"))
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        for cell in cells[:launching]:
            client.execute_interactive(cell.source, timeout=120, output_hook=lambda message: None)
        # Otherwise the kernel might pass over the next cell, as it does with those that wait behind one that fails.
        client.execute(cells[launching].source, stop_on_error=False)
        wait_for((tmp_path / "run" / run_folder.STEPS).exists)
        manager.interrupt_kernel()
        assert none_left(tmp_path / "run", within=8)
        reply = client.get_shell_msg(timeout=10)["content"]
        assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
        shown = []
        client.execute_interactive(
            "1 + 1",
            timeout=30,
            output_hook=lambda message: shown.append(message["content"].get("data", {}).get("text/plain")),
        )
        assert "2" in shown, "the kernel goes on"
        assert len(run_folder.RunFolder(tmp_path / "run").steps) >= 1
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def end_with_the_tests():
    """A group of its own, as a shell gives to a job; and no longer than the tests."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killing_papermill_ends_every_rank(tmp_path, number):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "papermill", "notebooks/train.ipynb", str(tmp_path / "out.ipynb")]
    given = [*SMALL, "-p", "steps", "5000", "-p", "num_processes", "2", "-p", "output_dir", str(folder)]
    process = subprocess.Popen(
        [*command, *given],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=end_with_the_tests,
    )
    try:
        wait_for((folder / run_folder.STEPS).exists)
        assert len(processes_of(folder)) >= 3
        os.kill(process.pid, number)
        assert none_left(folder, within=15)
    finally:
        process.kill()
        process.wait()
