"""The main notebook, executed: by papermill from a shell, and in a kernel as JupyterLab does it."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import nbformat
import pytest
from executed import outputs, papermill
from jupyter_client.manager import KernelManager
from processes import ROOT, end_with_parent, none_left, processes_of, wait_for
from training import small_data, small_model, train

from sdnb.report.page import results, write_page
from sdnb.run import folder as run_folder


@pytest.fixture(scope="module")
def small():
    """Parameters of a notebook that executes in seconds."""
    return dict(
        pretrained_model_name_or_path=small_model(), dataset_name=small_data(), train_batch_size=2,
        gradient_accumulation_steps=2, validation_loss_steps=0, validation_prompts=None,
    )  # fmt: skip


def given(parameters):
    return [text for name, value in parameters.items() for text in ("-p", name, str(value))]


def test_papermill_from_the_projects_root(tmp_path):
    out = tmp_path / "run" / "train.ipynb"
    out.parent.mkdir()
    done = papermill(
        out, "-p", "steps", "4", "-p", "output_dir", str(out.parent), "-p", "num_processes", "2", "-p",
        "train_batch_size", "2", "-p", "gradient_accumulation_steps", "2", "-p", "validation_loss_steps", "0",
        "-y", '{"validation_prompts": ["sun, night style"]}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = run_folder.RunFolder(out.parent)
    assert len(run.steps) == 4 and run.summary["world_size"] == 2 and run.config.max_train_steps == 4
    assert list(run.drawn.step) == [0, 4]

    notebook = nbformat.read(out, 4)
    said = outputs(notebook, "text/plain")
    assert len([text for text in said if "step 4/4" in text]) == 1, "one progress line, in its last state"
    assert not [text for text in said if "step 1/4" in text]
    assert len(outputs(notebook, "image/png")) == 5, "training images, loss, step times, phases, samples"
    streams = [output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output]
    assert streams == [], "no warnings and no chatter"
    names = [row["name"] for row in results(notebook)]
    assert names[:2] == ["images/s per CPU rank", "nominal IPS"] and "peak memory" in names and "total time" in names
    page, headline, _ = write_page(out)
    assert headline and page.stat().st_size < 3e6


@pytest.fixture
def runs_alone():
    """The project's runs/, which tests of other workers must not fill meanwhile."""
    with open(f"{tempfile.gettempdir()}/sdnb-tests-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_papermill_from_the_notebooks_folder_with_the_settings_of_a_run(tmp_path, settings, runs_alone):
    """Into a new folder under runs/ in the project's root, the same training again; `mixed_precision: no` is a boolean
    in YAML."""
    run = train(settings)
    text = (run.folder / run_folder.CONFIG).read_text()
    (tmp_path / "settings.yaml").write_text(text.replace("mixed_precision: 'no'", "mixed_precision: no"))
    before = set((ROOT / "runs").glob("*"))
    done = papermill(
        tmp_path / "out.ipynb", "-f", str(tmp_path / "settings.yaml"), cwd=ROOT / "notebooks", notebook="train.ipynb"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (new,) = set((ROOT / "runs").glob("*")) - before
    try:
        again = run_folder.RunFolder(new)
        assert again.config.mixed_precision == "no" and again.drawn.empty
        assert list(again.steps.loss) == list(run.steps.loss), "enough to run it again"
    finally:
        shutil.rmtree(new)


@pytest.mark.parametrize(
    "parameters, said",
    [
        (["-p", "stpes", "3"], "stpes: there is no such setting; did you mean steps?"),
        (["-f", "params/demo.yaml", "-p", "train_data_dir", "."], "exclude each other"),
    ],
)
def test_a_wrong_parameter_fails_before_anything_runs(tmp_path, runs_alone, parameters, said):
    fails_before_anything_runs(tmp_path, parameters, said)


def test_the_vanished_data_set_fails_before_anything_runs(tmp_path, runs_alone):
    tiny = ["-p", "pretrained_model_name_or_path", "tiny", "-p", "mixed_precision", "no", "-p", "num_processes", "1"]
    fails_before_anything_runs(tmp_path, ["-f", "params/reference.yaml", *tiny], "taken down from the hub")


def fails_before_anything_runs(tmp_path, parameters, said):
    before = set((ROOT / "runs").glob("*"))
    done = papermill(tmp_path / "out.ipynb", *parameters)
    assert done.returncode == 1
    assert said in done.stderr
    assert "pydantic" not in done.stderr
    assert set((ROOT / "runs").glob("*")) == before and not (ROOT / "sd-pokemon-model").exists()


def small_cells(parameters):
    """The notebook's cells with other parameters, as a user would edit them."""
    cells = nbformat.read(ROOT / "notebooks" / "train.ipynb", 4).cells
    for cell in cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return cells


@pytest.fixture
def kernel():
    """Executes notebooks in a kernel that has computed; with the means to interrupt it."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT / "notebooks"))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute(client, code):
    """What a cell shows as text; an error in it is one of the test."""
    shown = []

    def show(message):
        assert message["msg_type"] != "error", message["content"]
        shown.append(message["content"].get("data", {}).get("text/plain"))

    client.execute_interactive(code, timeout=120, output_hook=show)
    return shown


def test_run_all_again_and_again_in_a_kernel_that_has_computed(tmp_path, small, kernel):
    """Also with variables of the user's own, which are no settings. The second time the cell that trains is
    interrupted, and every rank ends."""
    manager, client = kernel
    execute(client, "import torch\nfrom accelerate import Accelerator\nAccelerator()")
    execute(client, "total = (torch.ones(500, 500) @ torch.ones(500, 500)).sum().item()")

    def cells(name, steps):
        edited = small_cells({**small, "steps": steps, "output_dir": str(tmp_path / name)})
        return [cell.source for cell in edited if cell.cell_type == "code"]

    for code in cells("once", 2):
        execute(client, code)
    interrupted = cells("interrupted", 5000)
    launching = next(index for index, code in enumerate(interrupted) if "launch(" in code)
    for code in interrupted[:launching]:
        execute(client, code)
    # Otherwise the kernel might pass over the next cell, as it does with those that wait behind one that fails.
    client.execute(interrupted[launching], stop_on_error=False)
    wait_for((tmp_path / "interrupted" / run_folder.STEPS).exists)
    manager.interrupt_kernel()
    assert none_left(tmp_path / "interrupted", within=8)
    reply = client.get_shell_msg(timeout=10)["content"]
    assert reply["status"] == "ok", "one line, and no traceback"
    assert len(run_folder.RunFolder(tmp_path / "interrupted").steps) >= 1
    for code in interrupted[launching + 1 :]:  # the cells below work on the run so far
        execute(client, code)
    assert "'interrupted'" in execute(client, "run.state")
    for code in cells("again", 3):
        execute(client, code)
    assert [len(run_folder.RunFolder(tmp_path / name).steps) for name in ("once", "again")] == [2, 3]


def test_a_rank_that_fails_shows_in_the_notebook(tmp_path, small, image_folder):
    folder = image_folder(9)
    (folder / "005.png").write_bytes(b"no image")  # not one of those that the notebook shows
    done = papermill(
        tmp_path / "out.ipynb",
        *given({**small, "dataset_name": None, "train_data_dir": folder, "steps": 9, "num_processes": 2}),
        *given({"output_dir": tmp_path / "run"}),
    )
    assert done.returncode == 1
    shown = [output for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for output in cell.get("outputs", ())]
    (error,) = [output for output in shown if output.output_type == "error"]
    assert error.ename == "RunError" and "failed: DataError" in error.evalue and "005.png" in error.evalue
    assert len(error.traceback) < 4, "the message, and not where in sdnb it was raised"


def test_papermill_with_the_engine_that_shows_the_steps(tmp_path, small):
    done = papermill(
        tmp_path / "out.ipynb", "--engine", "sdnb", *given({**small, "steps": 3, "output_dir": tmp_path / "run"})
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "runs on:" in done.stderr and re.search(r"will take: +about \d+:\d\d, ", done.stderr)
    lines = [line for line in done.stderr.splitlines() if " · " in line]
    assert lines[0].startswith("step 0/3 · ") and re.search(r"step 3/3 · complete · loss .* images/s", lines[-1])
    assert "without encryption" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killing_papermill_ends_every_rank(tmp_path, small, number):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "papermill", "notebooks/train.ipynb", str(tmp_path / "out.ipynb")]
    process = subprocess.Popen(
        [*command, *given({**small, "steps": 5000, "num_processes": 2, "output_dir": folder})],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=end_with_parent,
        start_new_session=True,  # as a shell gives to a job
    )
    try:
        wait_for((folder / run_folder.STEPS).exists)
        assert len(processes_of(folder)) >= 4, "papermill, the launcher and two ranks"
        os.kill(process.pid, number)
        assert none_left(folder, within=40)
    finally:
        process.kill()
        process.wait()
