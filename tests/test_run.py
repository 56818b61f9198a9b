"""A run to look at, and the table of all."""

import shlex

import pandas as pd
import pytest
from made_runs import make_run

import sdnb
from sdnb.errors import RunError
from sdnb.metrics.results import PAGE_MIME
from sdnb.metrics.step_clock import PHASES
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.run.comparison import compare
from sdnb.settings.flags import parse


@pytest.fixture
def run(tmp_path):
    return sdnb.Run(make_run(tmp_path / "runs" / "a"))


def test_its_results_and_figures(run):
    assert run.results["images/s per CPU rank"].value == run.results.throughput.value
    assert run.plot_loss().alt.startswith("Loss of each optimizer step")
    assert run.plot_step_times().alt.startswith("Wall time")
    assert run.plot_phases().alt.startswith("Where the time")
    assert run.samples().alt.startswith("Images drawn")


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
    """tests/test_command_line.py runs such a command."""
    program, command, *flags = shlex.split(run.reproduce()[-1])
    assert (program, command) == ("sdnb", "train") and "--num_processes=8" in flags
    assert parse(flags).trajectory() == run.config.trajectory()


def test_every_setting_can_be_repeated_on_the_command_line(tmp_path):
    settings = dict(
        fused_optimizer=False, validation_prompts=["a sun", "b"], use_ema=True, learning_rate=1e-5, snr_gamma=5.0,
        mixed_precision="no", num_processes=1,
    )  # fmt: skip
    run = sdnb.Run(make_run(tmp_path / "run", **settings))
    command = shlex.split(run.reproduce()[-1])
    assert command[:2] == ["sdnb", "train"]
    assert parse(command[2:]).updated(output_dir=None) == run.config.updated(output_dir=None)


def test_a_run_without_a_step_yet(run):
    (run.folder / "metrics.jsonl").unlink()
    assert run.frame.empty
    with pytest.raises(RunError, match="no step has been recorded yet"):
        _ = run.results
    assert "interrupted" in run._repr_mimebundle_()["text/html"]


def test_all_runs_in_a_table(tmp_path):
    for name in ("one", "sweep/two", "three"):
        make_run(tmp_path / name)
    (tmp_path / "three" / "metrics.jsonl").unlink()
    table = sdnb.runs(tmp_path)
    assert set(table.index) == {"one", "sweep/two", "three"}
    assert table.loc["one", "model"] == "tiny" and table.loc["one", "images/s per device"] > 0
    assert table.loc["three", "steps"] == 0 and pd.isna(table.loc["three", "final loss"])
    assert sdnb.runs(tmp_path / "nothing").empty


def damaged(folder):
    """Two good runs, and one of each kind of damage. Returns the file that is damaged, by the run's name."""
    damages = {
        "newer": ("config.yaml", "pretrained_model_name_or_path: tiny\ndataset_name: openmoji\nsetting_of_2030: 1\n"),
        "no yaml": ("config.yaml", "a: ["),
        "no environment": ("environment.json", ""),
        "no summary": ("summary.json", ""),
        "torn": ("metrics.jsonl", '{"step": 1, "loss": 1, "lo{"step": 2}\n{"step": 3}\n'),
    }
    for name in ("a", "b", *damages):
        make_run(folder / name)
    for name, (file, content) in damages.items():
        (folder / name / file).write_text(content)
    return {name: file for name, (file, _) in damages.items()}


def test_a_bad_run_is_named_in_the_table_and_hides_no_other(tmp_path, recwarn):
    files_of = damaged(tmp_path)
    table = sdnb.runs(tmp_path)
    assert set(table.index) == {"a", "b", *files_of} and table.loc[["a", "b"], "problem"].isna().all()
    for name, file in files_of.items():
        assert str(tmp_path / name / file) in table.loc[name, "problem"]
    shown = table.index[table["images/s per device"] > 0]
    assert set(shown) == {"a", "b", "no environment", "no summary"}
    assert not recwarn.list, "the table says it"


def test_a_bad_run_is_named_in_a_comparison_and_hides_no_other(tmp_path):
    files_of = damaged(tmp_path)
    compared = compare(tmp_path)
    assert set(compared.runs) == {"a", "b", "no environment", "no summary"}
    said = "\n".join(compared.statements)
    for name, file in files_of.items():
        left_out = "" if name in compared.runs else "Left out: "
        assert f"{left_out}{tmp_path / name / file}: " in said
        if left_out:
            with pytest.raises(RunError, match=file):
                compare([tmp_path / "a", tmp_path / name])


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
        files.write(
            run.folder / run_folder.SUMMARY, {"threads": ended, "ranks": [{"peak_memory_gib": 1.0}], "ended": 9.0}
        )
        return run._repr_mimebundle_()[PAGE_MIME]["machine"]["threads"]

    watched = dict(threads=2, waiting="asleep", cores_used_by_others=0.9)
    assert said(watched) == (
        "2 threads per rank, asleep while waiting at the start, when other processes used 0.90 cores"
    )
    assert said(watched, asleep_share=0.37).endswith("; asleep 37% of the time")
    fixed = dict(threads=1, waiting="a single thread never waits")
    assert said(fixed) == "1 thread per rank; a single thread never waits"
