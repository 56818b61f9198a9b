"""A run to look at, and the table of all."""

import json
import re
import shlex

import pandas as pd
import pytest
from made_runs import make_run
from processes import ROOT

import sdnb
from sdnb.errors import RunError
from sdnb.metrics.results import PAGE_MIME
from sdnb.metrics.step_clock import PHASES
from sdnb.report.run import _IN_THE_NOTEBOOK
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig


@pytest.fixture
def run(tmp_path):
    return sdnb.Run(make_run(tmp_path / "runs" / "a"))


def test_its_results_and_figures(run):
    assert run.results["images/s per CPU rank"].value == run.results.throughput.value
    assert run.plot_loss().alt.startswith("Loss of each optimizer step")
    assert run.plot_step_times().alt.startswith("Wall time")
    assert run.plot_phases().alt.startswith("Where the time")
    assert run.samples().alt.startswith("Pictures drawn")


def test_its_frame_is_numbers_only(run):
    frame = run.frame
    assert frame.index.name == "step" and len(frame) == len(run.steps)
    assert {f"{phase}_seconds" for phase in PHASES} <= set(frame.columns)
    assert all(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes)
    assert {"short", "steady", "running_loss"} <= set(frame.columns)


def test_it_shows_itself_as_a_card(run):
    shown = run._repr_mimebundle_()
    card = shown["text/html"]
    assert run.title in card and "images/s per CPU rank" in card and "data:image/png;base64," in card
    about = shown[PAGE_MIME]
    assert about["name"] == "a" and about["settings"]["learning_rate"] == 1e-4
    assert not {"output_dir", "hub_token", "cache_dir"} & set(about["settings"])


def test_prompts_and_names_are_data_on_the_card(tmp_path):
    run = sdnb.Run(make_run(tmp_path / "<b>a", prompts=("<script>",)))
    card = run._repr_mimebundle_()["text/html"]
    assert "<script>" not in card and "<b>a" not in card and "&lt;script&gt;" in card


def test_the_command_makes_the_same_run(run):
    (command,) = [line for line in run.reproduce() if line.startswith("papermill")]
    *_, given = shlex.split(command)
    assert TrainConfig(**json.loads(given)).trajectory() == run.config.trajectory()


def test_what_the_notebook_sets_is_said_in_the_command():
    """A setting of its parameter cell that is not said would have the notebook's value instead of the run's."""
    assigned = set()
    for name in ("notebooks/train", "pretraining/pretrain"):
        cells = json.loads((ROOT / f"{name}.ipynb").read_text())["cells"]
        (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
        assigned |= set(re.findall(r"^(\w+) = ", "".join(cell["source"]), re.M))
    the_vaes = {"vae_steps", "vae_batch_size", "vae_learning_rate"}
    assert assigned - the_vaes - {"steps", "output_dir"} == _IN_THE_NOTEBOOK


def test_a_run_without_a_step_yet(run):
    (run.folder / "metrics.jsonl").unlink()
    assert run.frame.empty
    with pytest.raises(RunError, match="no step has been recorded yet"):
        _ = run.results
    assert "did not reach its end" in run._repr_mimebundle_()["text/html"]


def test_all_runs_in_a_table(tmp_path):
    for name in ("one", "sweep/two", "three"):
        make_run(tmp_path / name)
    (tmp_path / "three" / "metrics.jsonl").unlink()
    table = sdnb.runs(tmp_path)
    assert set(table.index) == {"one", "sweep/two", "three"}
    assert table.loc["one", "model"] == "tiny" and table.loc["one", "images/s per device"] > 0
    assert table.loc["three", "steps"] == 0 and pd.isna(table.loc["three", "final loss"])
    assert sdnb.runs(tmp_path / "nothing").empty


def test_they_are_there_to_be_completed():
    assert {"Run", "runs"} <= set(dir(sdnb))
    assert all(
        getattr(sdnb.Run, name).__doc__ for name in ("results", "frame", "plot_loss", "samples", "drawn", "steps")
    )
    with pytest.raises(AttributeError, match="no attribute 'rnus'"):
        _ = sdnb.rnus


def test_its_page_says_how_its_threads_waited(run):
    def said(begun, **ended):
        run_folder.add_to_environment(run.folder, threads=begun)
        run_folder.write(
            run.folder / run_folder.SUMMARY, {"threads": ended, "ranks": [{"peak_memory_gib": 1.0}], "ended": 9.0}
        )
        return run._repr_mimebundle_()[PAGE_MIME]["machine"]["threads"]

    watched = dict(threads=2, waiting="asleep", cores_used_by_others=0.9)
    assert said(watched) == (
        "2 threads a rank, asleep while they waited for each other when the training began, as 0.90 of the cores were "
        "used by other processes"
    )
    assert said(watched, asleep_share=0.37).endswith("; asleep 37% of the time")
    fixed = dict(threads=1, waiting="one thread has none to wait for")
    assert said(fixed) == "1 thread a rank; one thread has none to wait for"
