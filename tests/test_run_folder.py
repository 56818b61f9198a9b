import errno
import json
import math
import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest
from made_runs import make_run

from sdnb.errors import RunError
from sdnb.metrics.results import measure
from sdnb.report.run import Run, runs
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.run.comparison import compare
from sdnb.settings.config import TrainConfig

RECORD = dict(images=4, loss=0.5, seconds=1.0)


def config(**settings):
    return TrainConfig(pretrained_model_name_or_path="tiny", dataset_name="openmoji", **settings)


@pytest.fixture
def folder(tmp_path):
    return begun(config(output_dir=str(tmp_path / "run")), environment={})


def begun(config, environment):
    folder, held = run_folder.begin(config, environment)
    held.close()
    return folder


def test_a_new_folder_each_time(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (first, _), (second, _) = run_folder.create(config(output_dir=None)), run_folder.create(config(output_dir=None))
    assert first != second and first.is_dir() and second.is_dir()
    assert first.parent == tmp_path / "runs"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}-tiny-openmoji", first.name)


def test_a_run_is_never_written_over(folder):
    with pytest.raises(RunError, match="there is a run in it already"):
        run_folder.create(config(output_dir=str(folder)))


def test_a_start_that_failed_before_its_first_step_can_be_corrected(folder):
    run_folder.fail(folder, 0, "ModelError", "no such model")
    again = begun(config(output_dir=str(folder)), environment={"host": "a"})
    assert again == folder and run_folder.RunFolder(folder).failure == {}
    run_folder.fail(folder, 0, "RunError", "the disk is full")
    files.append(folder / run_folder.STEPS, {"step": 1})
    with pytest.raises(RunError, match="there is a run in it already"):
        run_folder.create(config(output_dir=str(folder)))


def test_a_folder_with_other_things_in_it_may_be_used(tmp_path):
    (tmp_path / "train.ipynb").touch()
    folder, held = run_folder.create(config(output_dir=str(tmp_path)))
    assert folder == tmp_path and not held.closed


@pytest.mark.parametrize("name", ["file/run", "nul\0", "n" * 300])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").touch()
    for make in (run_folder.create, run_folder.join):
        with pytest.raises(RunError, match="cannot be written"):
            make(config(output_dir=str(tmp_path / name)))


def test_the_folder_of_a_user_who_does_not_exist():
    with pytest.raises(RunError, match="output_dir ~nobody-at-all/run: cannot be written: "):
        run_folder.create(config(output_dir="~nobody-at-all/run"))


def test_records_can_be_read_while_they_are_written(folder):
    run = run_folder.RunFolder(folder)
    assert run.steps.empty and run.summary == {} and run.failure == {} and run.log == ""
    files.append(folder / run_folder.STEPS, {**RECORD, "step": 1, "grad_norm": float("inf")})
    files.append(folder / run_folder.STEPS, {**RECORD, "step": 2, "grad_norm": 1.0})
    with (folder / run_folder.STEPS).open("a") as file:
        file.write('{"step": 3, "lo')  # as a crash leaves it
    assert list(run.steps.step) == [1, 2]
    assert math.isnan(run.steps.grad_norm[0]) and run.steps.grad_norm[1] == 1
    assert json.loads((folder / run_folder.STEPS).read_text().splitlines()[0])["grad_norm"] is None


def test_the_lines_that_a_file_has_gained(tmp_path):
    tail = files.Tail(tmp_path / "log")
    assert tail.new() == []
    with (tmp_path / "log").open("w") as file:
        for text, gained in (("a\nb", ["a"]), ("c\n", ["bc"]), ("", []), ("\nd\ne\n", ["", "d", "e"])):
            file.write(text)
            file.flush()
            assert tail.new() == gained


def test_a_damaged_record_is_an_error_and_not_dropped(folder):
    (folder / run_folder.STEPS).write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2 is not JSON"):
        _ = run_folder.RunFolder(folder).steps


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(RunError, match="there is no run here"):
        run_folder.RunFolder(tmp_path)


def test_going_back(tmp_path):
    """Records after the step are recorded again; a line that a loss of power tore is gone."""
    made = begun(config(output_dir=str(tmp_path / "run"), num_processes=1), {"host": "a"})
    for step in (1, 2, 3, 4):
        files.append(made / run_folder.STEPS, {**RECORD, "step": step})
        files.append(made / run_folder.VALIDATION, {"step": step, "loss": 0.5})
    with (made / run_folder.STEPS).open("a") as file:
        file.write('\0\0\0\n{"step": 6}\n{"st')
    with pytest.warns(files.DamagedFile, match=r"metrics\.jsonl: line 5 is damaged"):
        assert run_folder.last_step(made) == 6
    files.write(made / run_folder.FAILURE, {"rank": 0})
    with pytest.warns(files.DamagedFile):
        again = begun(config(output_dir=str(made), num_processes=1, resume_from_checkpoint="latest"), {"host": "b"})
        run_folder.go_back(again, 2)
    run = run_folder.RunFolder(again)
    assert run.config.resume_from_checkpoint is None, "the settings make another run elsewhere"
    assert list(run.steps.step) == list(run.validation.step) == [1, 2]
    assert not run.failure and run.environment["host"] == "b"
    assert [(one["host"], one["after_step"]) for one in run.environment["resumed"]] == [("a", 2)]
    files.append(made / run_folder.VALIDATION, {"step": 0, "loss": 0.5})
    run_folder.go_back(again, 0)
    assert run.steps.empty and run.environment["resumed"] == []
    assert run.validation.empty, "what comes before the first step comes again"


def test_a_watched_file_that_is_cut(tmp_path):
    path = tmp_path / "lines"
    path.write_text("1\n2\n3\n")
    tail = files.Tail(path)
    assert tail.new() == ["1", "2", "3"]
    path.write_text("1\n")
    assert tail.new() == ["1"]
    (tmp_path / "longer").write_text("1\n2\n3\n4\n")
    (tmp_path / "longer").replace(path)
    assert tail.new() == ["1", "2", "3", "4"]


def test_what_was_measured_after_a_torn_line_is_kept(folder):
    (folder / run_folder.STEPS).write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n')
    with pytest.warns(files.DamagedFile, match="line 2 is damaged"):
        run_folder.go_back(folder, 4)
    assert [json.loads(line)["step"] for line in (folder / run_folder.STEPS).read_text().splitlines()] == [1, 4]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\xff"])
@pytest.mark.parametrize("name", [run_folder.ENVIRONMENT, run_folder.SUMMARY, run_folder.FAILURE, run_folder.MODEL])
def test_a_damaged_file_is_named_and_the_rest_can_be_read(folder, name, content):
    (folder / name).write_bytes(content.encode("latin1"))
    run = run_folder.RunFolder(folder)
    attribute = name.removesuffix(".json")
    with pytest.warns(files.DamagedFile, match=f"{name}: is damaged, so what it said is unknown"):
        assert getattr(run, attribute) == {}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (run_folder.CONFIG, "pretrained_model_name_or_path: tiny\ndataset_name: openmoji\n", "config.yaml: is cut off"),
        (run_folder.STEPS, "[1, 2]\n", "metrics.jsonl: line 1 is not a record"),
        (run_folder.STEPS, "{}\n{}\n", "metrics.jsonl: is damaged: step is not a number in each line"),
        (run_folder.STEPS, '{"step": 1, "loss": 1, "seconds": 1}\n', "metrics.jsonl: is damaged: images"),
        (run_folder.VALIDATION, '{"step": "a", "loss": 1}\n', "validation.jsonl: is damaged: step"),
        (run_folder.ENVIRONMENT, '{"devices": 5, "started": 1e308}', "values that sdnb did not write"),
        (run_folder.SUMMARY, '{"total_seconds": "long", "ranks": 5, "ended": []}', "values that sdnb did not write"),
    ],
)
def test_values_that_nobody_wrote_do_not_hide_the_other_runs(tmp_path, name, content, said):
    for run in "abc":
        make_run(tmp_path / run)
    (tmp_path / "b" / name).write_text(content)
    listed = runs(tmp_path)
    assert sorted(listed.index) == ["a", "b", "c"] and listed.problem.isna().sum() == 2
    assert said in listed.problem["b"]
    compared = compare(tmp_path)
    assert [*compared.runs] == ["a", "c"] and said in " ".join(compared.problems)


def test_what_a_killed_write_has_left_is_removed(tmp_path):
    settings = dict(output_dir=str(tmp_path / "run"))
    folder = begun(config(**settings, num_processes=1), {})
    (folder / ".summary.json.0123abcd").write_text("{")
    again = dict(**settings, resume_from_checkpoint="latest")
    begun(config(**again, num_processes=2, num_machines=2, main_process_ip="a"), {})
    assert len([*folder.glob(".*")]) == 2, "another machine may be writing it"
    begun(config(**again, num_processes=1), {})
    assert sorted(path.name for path in folder.glob(".*")) == [run_folder.LOCK]


@pytest.mark.parametrize("name", [run_folder.ENVIRONMENT, run_folder.STEPS])
def test_what_is_no_file(tmp_path, name):
    make_run(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    os.mkfifo(tmp_path / "a" / name)
    assert f"{name}: " in runs(tmp_path).problem["a"]


def test_a_damaged_image_is_left_out(tmp_path):
    run = Run(make_run(tmp_path / "a", prompts=("sun",)))
    for image in (run.folder / run_folder.SAMPLES).glob("*.png"):
        image.write_bytes(image.read_bytes()[:40])
    with pytest.warns(files.DamagedFile, match=r"samples/.*\.png: is damaged, and is not shown"):
        run.samples()
    with pytest.warns(files.DamagedFile):
        assert "<img" not in run._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("")])
@pytest.mark.filterwarnings("ignore::sdnb.run.files.DamagedFile")
def test_a_run_without_its_environment_is_resumed_and_measured(tmp_path, damage):
    folder = make_run(tmp_path / "run", train_batch_size=2, num_processes=1)
    damage(folder / run_folder.ENVIRONMENT)
    assert measure(run_folder.RunFolder(folder))["images/s per rank"].value > 0
    again = begun(config(output_dir=str(folder), resume_from_checkpoint="latest"), {"host": "b"})
    run_folder.go_back(again, 30)
    resumed = run_folder.RunFolder(again).environment["resumed"]
    assert [one["after_step"] for one in resumed] == [30], "the step after it was the first of a start"


def test_nothing_stays_of_a_file_that_cannot_be_written(folder, monkeypatch):
    before = (folder / run_folder.ENVIRONMENT).read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(RunError, match=r"environment\.json: cannot be written: No space left"):
        run_folder.add_to_environment(folder, threads={})
    assert (folder / run_folder.ENVIRONMENT).read_text() == before
    assert not [path for path in folder.iterdir() if re.match(r"\..*\.[0-9a-f]{8}$", path.name)]


def test_a_clock_that_is_set_back_changes_no_time(tmp_path, monkeypatch):
    wall = time.time()
    folder = begun(config(output_dir=str(tmp_path / "run")), environment={})
    monkeypatch.setattr(time, "time", lambda: wall - 86_400)
    assert 0 <= run_folder.seconds_since_start(folder) < 60


def _start(folder, barrier, results):
    wanted = config(output_dir=str(folder))
    barrier.wait()
    try:
        held = run_folder.begin(wanted, {"host": str(os.getpid())})
        barrier.wait(20)  # the training
        results.put(("began", held[0]))
    except RunError as error:
        barrier.wait(20)
        results.put(("refused", str(error)))


def test_of_two_starts_at_the_same_instant_one_wins(tmp_path):
    forked = multiprocessing.get_context("fork")
    for number in range(20):
        barrier, results = forked.Barrier(2), forked.Queue()
        both = [forked.Process(target=_start, args=(tmp_path / str(number), barrier, results)) for _ in range(2)]
        for process in both:
            process.start()
        (_, folder), (_, refusal) = sorted(results.get(timeout=60) for _ in both)
        for process in both:
            process.join(60)
        assert folder == tmp_path / str(number) and "another run is using this folder" in refusal


def test_the_lock_is_one_trainings(tmp_path):
    with run_folder.lock(tmp_path), pytest.raises(RunError, match="another run is using"):
        run_folder.lock(tmp_path)
    run_folder.lock(tmp_path).close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with run_folder.lock(tmp_path), run_folder.lock(tmp_path):
        assert f"{tmp_path} cannot be locked ({os.strerror(code)})" in caplog.text


def test_another_error_of_a_lock_is_named(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(run_folder.fcntl, "flock", broken)
    with pytest.raises(RunError, match="cannot be locked: Input/output error"):
        run_folder.lock(tmp_path)


def test_held_out_losses_of_version_0_1_and_of_a_resume_since(tmp_path):
    folder = make_run(tmp_path / "run")
    old = dict(step=0, loss=0.5, standard_error=0.1, pictures=6)
    files.append(folder / run_folder.VALIDATION, old)
    assert run_folder.RunFolder(folder).validation.images.tolist() == [6]
    files.append(folder / run_folder.VALIDATION, dict(step=10, loss=0.4, standard_error=0.1, images=7))
    assert run_folder.RunFolder(folder).validation.images.tolist() == [6, 7]
    assert list(run_folder.RunFolder(folder).validation) == ["step", "loss", "standard_error", "images"]


def test_settings_of_version_0_1_are_read(tmp_path):
    folder = make_run(tmp_path / "run")
    before = run_folder.RunFolder(folder).config
    with (folder / run_folder.CONFIG).open("a") as file:
        file.write("onednn_linear: false\nkeep_freed_memory: true\nchannels_last: false\ncuda_graphs: false\n")
    assert run_folder.RunFolder(folder).config == before
