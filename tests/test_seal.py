"""A sealed run: what anyone can verify of it, and that those who change it are found out."""

import itertools
import json
import math
import random
import re
import shutil
import zipfile
from functools import partial
from pathlib import Path

import pytest
import yaml
from training import small_data, small_model, train

import sdnb
from sdnb.__main__ import main
from sdnb.auditing.case import FAILS, UNKNOWN
from sdnb.errors import RunError
from sdnb.launch.replay import replay_findings
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.run.baselines import PUBLISHED
from sdnb.run.folder import RunFolder
from sdnb.sealing.seal import SEAL, seal
from sdnb.sealing.verify import folder_beside, verify
from sdnb.training import loop
from sdnb.training.checkpoint_folder import records_digest

STEPS = 30


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A run with checkpoints, and another of other settings, whose checkpoints do not belong to the first."""
    folder = tmp_path_factory.mktemp("sealed")
    settings = dict(
        pretrained_model_name_or_path=small_model(), dataset_name=small_data(), resolution=64, center_crop=True,
        train_batch_size=2, gradient_accumulation_steps=2, lr_warmup_steps=10, learning_rate=1e-3, steps=STEPS, seed=7,
        report_to="none", checkpointing_steps=7, validation_loss_steps=7, use_ema=True, num_processes=1,
        lr_scheduler="cosine", max_grad_norm=0.5,
    )  # fmt: skip
    for name, seed in (("run", 7), ("other", 8)):
        train(settings, output_dir=str(folder / name), seed=seed)
    return folder


@pytest.fixture
def copied(honest, tmp_path):
    shutil.copytree(honest / "run", tmp_path / "run")
    return tmp_path / "run"


def failed(verified):
    return {finding.check for finding in verified.findings if finding.verdict == FAILS}


def unknown(verified):
    """The tests run beside each other, so the machine is nobody's own."""
    return {finding.check for finding in verified.findings if finding.verdict == UNKNOWN} - {"machine"}


def test_an_honest_run(honest, capsys):
    main(["seal", str(honest / "run")])
    printed = capsys.readouterr().out
    verified = verify(honest / "run.sdnb.zip", RunFolder(folder_beside(honest / "run.sdnb.zip")))
    assert verified.holds and not failed(verified), verified
    checks = {finding.check: finding for finding in verified.findings}
    assert "1.000000 times" in checks["gradients"].why and "as 4 checkpoints say" in checks["checkpoints: records"].why
    assert "nothing contradicts; cannot be known: " in repr(verified)
    assert "images/s per CPU rank" in verified.headline and "run.sdnb.zip" in printed
    head = printed.strip().rpartition("head: ")[2]
    assert len(head) == 64 and checks["chain"].why.endswith(head)
    assert unknown(verified) == {"certificate"}, verified


def overflowed(patch):
    """A step whose gradients overflow, as in float16: it is recorded, and it changes nothing."""
    real, count = loop.train_step, itertools.count(1)

    def step(training):
        record = real(training)
        return {**record, "grad_norm": float("nan")} if next(count) == 29 else record

    patch.setattr(loop, "train_step", step)


@pytest.mark.parametrize(("settings", "expected"), [
    (dict(steps=3), {"checkpoints"}),
    (dict(whole_steps=True, checkpointing_steps=5), set()),
    (dict(steps=None, num_train_epochs=3, lr_scheduler="linear", checkpointing_steps=5), set()),
    (dict(validation_prompts=("a cat",), validation_epochs=2, report_to="tensorboard"), {"checkpoints"}),
    (dict(learning_rate=1e9, max_grad_norm=1e9, steps=12), {"checkpoints", "gradients"}),
])  # fmt: skip
def test_honest_runs_of_other_kinds(settings, expected, settings_of_a_run):
    run = train({**settings_of_a_run, **settings})
    verified = verify(seal(run), run)
    assert verified.holds, verified
    assert unknown(verified) == {"certificate", *expected}, verified


@pytest.fixture
def settings_of_a_run(tmp_path):
    return dict(
        pretrained_model_name_or_path=small_model(), dataset_name=small_data(), resolution=64, center_crop=True,
        train_batch_size=2, gradient_accumulation_steps=2, lr_warmup_steps=2, learning_rate=1e-3, steps=12, seed=7,
        report_to="none", num_processes=1, output_dir=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"learning_rate": 1e-4, "resume_with_changes": True}])
def test_an_honest_run_that_was_resumed(settings_of_a_run, changes):
    train(settings_of_a_run, steps=14, checkpointing_steps=4)
    run = train(settings_of_a_run, steps=16, checkpointing_steps=4, resume_from_checkpoint="checkpoint-8", **changes)
    verified = verify(seal(run), run)
    assert verified.holds, verified
    expected = {"learning rate", "checkpoints: settings and data"} if changes else set()
    assert unknown(verified) == {"certificate", *expected}, verified


def test_a_step_whose_gradients_overflowed(monkeypatch, settings_of_a_run, forked_ranks):
    """JSON has no NaN, so its norm is recorded as null."""
    overflowed(monkeypatch)
    run = train(settings_of_a_run, steps=30, checkpointing_steps=28)
    monkeypatch.undo()
    steps = run.steps
    assert math.isnan(steps.grad_norm[28]) and math.isfinite(steps.grad_norm[27])
    verified = verify(seal(run), run)
    assert {one.check for one in verified.findings if one.verdict == FAILS} <= {"gradients"}, verified


def test_the_file_is_safe_to_share(honest, copied, tmp_path):
    other_setting(copied, "cache_dir", f"{Path.home()}/cache")
    edit(copied, run_folder.ENVIRONMENT, HF_TOKEN="hf_abcdefghijklmnopqrstuvwxyz")
    file = seal(RunFolder(copied), tmp_path / "shared.sdnb.zip")
    with zipfile.ZipFile(file) as archive:
        text = b"".join(archive.read(name) for name in archive.namelist()).decode()
    assert "cache_dir: ~/cache" in text and "hf_abc" not in text and f"{Path.home()}/" not in text
    assert seal(RunFolder(copied), tmp_path / "again.sdnb.zip").read_bytes() == file.read_bytes(), "to the byte"


def test_data_that_lies_elsewhere(settings_of_a_run, tmp_path, forked_ranks):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(small_data(), first)
    run = train({**settings_of_a_run, "dataset_name": str(first)}, checkpointing_steps=5)
    file = seal(run)
    first.rename(second)
    other_setting(run.folder, "dataset_name", str(second))
    verified = verify(file, run, replay_findings(file, run, 3))
    found = {finding.check: finding for finding in verified.findings}
    assert verified.holds and "the same to the bit" in found["replay"].why, verified
    captions = second / "train" / "metadata.jsonl"
    captions.write_text(captions.read_text().replace('"text": "', '"text": "a '))
    (found,) = replay_findings(file, run, 3)
    assert found.verdict == UNKNOWN and "the data here is" in found.why


# Who seals a changed run has hashes that agree. What betrays the change is what else the run has recorded.


def rewrite(folder, change):
    path = folder / run_folder.STEPS
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in change(records)))


def each(change):
    def changed(records):
        for record in records:
            change(record)
        return records

    return changed


def edit(folder, name, **values):
    files.write(folder / name, {**files.read(folder / name), **values})


def scaled(folder, factor, *, phases=False, processor=False, summary=False):
    def faster(record):
        record["seconds"] *= factor
        if phases:
            record["phase_seconds"] = {name: factor * value for name, value in record["phase_seconds"].items()}
        if processor:
            record["cpu_seconds"] *= factor

    rewrite(folder, each(faster))
    if summary:
        times = files.read(folder / run_folder.SUMMARY)
        spent = {name: factor * value for name, value in times["spent_seconds"].items()}
        started = files.read(folder / run_folder.ENVIRONMENT)["started"]
        edit(
            folder, run_folder.SUMMARY, spent_seconds=spent, ended=started + factor * (times["ended"] - started),
            **{name: factor * times[name] for name in ("training_seconds", "saving_seconds", "total_seconds")},
        )  # fmt: skip


def equal_times(folder):
    def equal(record):
        record["seconds"], record["phase_seconds"] = 0.0712345678, {"forward": 0.0712345678}

    rewrite(folder, each(equal))


def without_a_step(folder):
    rewrite(folder, lambda records: records[:11] + records[12:])


def without_a_step_renumbered(folder):
    without_a_step(folder)

    def renumbered(records):
        for number, record in enumerate(records, 1):
            record["step"] = number
        return records

    rewrite(folder, renumbered)


def with_a_step_twice(folder):
    rewrite(folder, lambda records: [*records[:12], records[11], *records[12:]])


def other_data(folder):
    data = files.read(folder / run_folder.ENVIRONMENT)["data"]
    edit(folder, run_folder.ENVIRONMENT, data={**data, "digest": "0" * 32})


def other_setting(folder, name, value):
    path = folder / run_folder.CONFIG
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), name: value}))


def other_device(folder):
    edit(folder, run_folder.ENVIRONMENT, cpu="Another CPU", devices={"type": "cpu", "names": ["Another CPU"]})


def better_losses(folder):
    def better(record):
        record.update(loss=record["loss"] / 2, train_loss=record["train_loss"] / 2, step_loss=record["step_loss"] / 2)

    rewrite(folder, each(better))


def smaller_norms(folder):
    def smaller(record):
        record["grad_norm"] *= 0.9

    rewrite(folder, each(smaller))


def checkpoints_of_another_run(folder):
    shutil.rmtree(folder / "checkpoint-14")
    shutil.copytree(folder.parent / "other-checkpoint", folder / "checkpoint-14")


def a_better_rate(folder):
    results = files.read(folder / run_folder.RESULTS)
    results["results"][0]["value"] *= 1.1
    edit(folder, run_folder.RESULTS, **results)


def cut_after_step_25(folder):
    rewrite(folder, lambda records: records[:25])
    other_setting(folder, "max_train_steps", 25)
    shutil.rmtree(folder / "checkpoint-28")


def without_processor_time(folder):
    rewrite(folder, each(lambda record: record.pop("cpu_seconds")))


def a_certificate_of_nothing(folder):
    files.write(folder / run_folder.CERTIFICATE, {"verdict": "certified", "reasons": [], "quantities": []})


TAMPERINGS = {
    "step times halved": (partial(scaled, factor=0.5), "phases"),
    "step times and phases halved": (partial(scaled, factor=0.5, phases=True), "checkpoints: records"),
    "all times a hundredth": (
        partial(scaled, factor=0.01, phases=True, processor=True, summary=True), "speed"),
    "step times equal": (equal_times, "step times"),
    "a step dropped": (without_a_step, "records"),
    "a step dropped, and renumbered": (without_a_step_renumbered, "records"),
    "a step doubled": (with_a_step_twice, "records"),
    "other data": (other_data, "checkpoints: settings and data"),
    "another seed": (partial(other_setting, name="seed", value=9), "checkpoints: settings and data"),
    "another learning rate": (partial(other_setting, name="learning_rate", value=1e-2), "learning rate"),
    "a larger batch": (partial(other_setting, name="train_batch_size", value=4), "work of each step"),
    "fewer ranks": (partial(other_setting, name="num_processes", value=2), "ranks"),
    "another device": (other_device, "checkpoints: machine"),
    "better losses": (better_losses, "checkpoints: records"),
    "smaller gradients": (smaller_norms, "gradients"),
    "checkpoints of another run": (checkpoints_of_another_run, "checkpoints: records"),
    "a better rate": (a_better_rate, "figures"),
    "a run that went on": (cut_after_step_25, "records"),
    "no memory of gradients": (partial(edit, name=run_folder.SUMMARY, second_moment=None), "gradients"),
    "no processor time": (without_processor_time, "processor time"),
    "a time that is no number": (partial(edit, name=run_folder.SUMMARY, training_seconds=math.nan), "total time"),
    "less memory": (partial(edit, name=run_folder.SUMMARY, ranks=[{"peak_memory_gib": 0.01}]), "memory"),
    "a certificate without quantities": (a_certificate_of_nothing, "certificate"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_changed_run_that_is_sealed_again(honest, copied, name):
    tamper, check = TAMPERINGS[name]
    shutil.copytree(honest / "other" / "checkpoint-14", copied.parent / "other-checkpoint")
    tamper(copied)
    if name != "a better rate":  # the forger has the figures computed again
        run_folder.write_results(copied)
    verified = verify(seal(RunFolder(copied)))
    assert check in failed(verified), verified


def test_times_that_nothing_explains(copied):
    """In a run that is long enough, the time that is left betrays who made steps faster; no checkpoint is needed."""
    for checkpoint in copied.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    more = 19 * RunFolder(copied).steps.seconds.sum()
    scaled(copied, 20, phases=True, processor=True)
    times = RunFolder(copied).summary
    longer = {name: times[name] + more for name in ("training_seconds", "total_seconds", "ended")}
    edit(copied, run_folder.SUMMARY, **longer)
    run_folder.write_results(copied)
    assert verify(seal(RunFolder(copied))).holds, "steps that are twenty times slower"
    scaled(copied, 0.5, phases=True, processor=True)
    run_folder.write_results(copied)
    assert {"total time"} <= failed(verify(seal(RunFolder(copied))))


def rewritten(file, change):
    """The sealed file with changed entries; its chain is as it was."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    change(contents)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl", "summary.json", "digests.json"])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_a_changed_file_betrays_itself(copied, name, how):
    def change(contents):
        if how == "removed":
            del contents[name]
        else:
            contents[name] = contents[name].replace(b"1", b"2", 1)

    file = rewritten(seal(RunFolder(copied)), change)
    if (name, how) == ("config.yaml", "removed"):
        with pytest.raises(RunError, match="config.yaml"):
            verify(file)
    else:
        verified = verify(file)
        assert "chain" in failed(verified)
        assert name in {finding.check: finding.why for finding in verified.findings}["chain"]


def test_a_chain_that_does_not_follow(copied):
    def change(contents):
        told = json.loads(contents[SEAL])
        told["entries"][3]["chain"] = "0" * 64
        contents[SEAL] = json.dumps(told).encode()

    assert failed(verify(rewritten(seal(RunFolder(copied)), change))) == {"chain"}


def test_changed_weights(copied):
    file = seal(RunFolder(copied))
    path = copied / "checkpoint-21" / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert failed(verify(file, RunFolder(copied))) == {"weights"}


@pytest.mark.parametrize(("content", "why"), [
    (b"", "is not a zip file"), (b"no zip", "is not a zip file"), (None, "there is no such file"),
])  # fmt: skip
def test_what_is_no_sealed_run(tmp_path, content, why):
    if content is not None:
        (tmp_path / "x.sdnb.zip").write_bytes(content)
    with pytest.raises(RunError, match=why):
        verify(tmp_path / "x.sdnb.zip")


def test_a_damaged_file(honest, tmp_path):
    """Any byte may be another one: that is an error or a finding, unless all entries are still the same."""
    file = seal(RunFolder(honest / "run"), tmp_path / "x.sdnb.zip")
    content, entries, draw = file.read_bytes(), entries_of(file), random.Random(0)
    found = 0
    for place in draw.sample(range(len(content)), 60):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            is_found = bool(failed(verify(file)))
            assert is_found or entries_of(file) == entries, place
        except RunError:
            is_found = True
        found += is_found
    assert found > 50


def entries_of(file):
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(("name", "content", "why"), [
    ("config.yaml", b"a: &a [x]\nb: *a\n", "refers to itself"),
    ("other.txt", b"x", "has an entry 'other.txt'"),
    ("environment.json", b"[]", "a file has values that sdnb did not write|is damaged|chain"),
])  # fmt: skip
def test_entries_that_no_run_has(copied, name, content, why):
    file = rewritten(seal(RunFolder(copied)), lambda contents: contents.update({name: content}))
    try:
        assert re.search(why, repr(verify(file)))
    except RunError as error:
        assert re.search(why, str(error)), error


def test_what_is_printed_has_no_control_characters(copied):
    edit(copied, run_folder.ENVIRONMENT, git_commit="abc\n\nall holds\x1b[8m", code="another")
    assert "\x1b" not in repr(verify(seal(RunFolder(copied)))) and "abc  all holds" in repr(
        verify(seal(RunFolder(copied)))
    )


def test_a_damaged_run_is_not_sealed(copied):
    seal(RunFolder(copied))
    before = copied.with_name("run.sdnb.zip").read_bytes()
    (copied / run_folder.MODEL).write_text("{")
    with pytest.raises(RunError, match="cannot be sealed: .*model.json"):
        seal(RunFolder(copied))
    assert copied.with_name("run.sdnb.zip").read_bytes() == before


@pytest.mark.parametrize("command", [["seal", "~nobody-of-this-name"], ["verify", "~nobody-of-this-name/x"],
                                     ["certify", "x" * 300], ["verify", "/tmp"]])  # fmt: skip
def test_names_that_nothing_has(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("error: ")


def test_what_cannot_be_sealed(tmp_path, copied, capsys):
    file = seal(RunFolder(copied), tmp_path / "elsewhere.sdnb.zip")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(file), "--replay", "3"])
    assert ended.value.code == 1 and "there is no run folder beside it" in capsys.readouterr().err
    (copied / run_folder.SUMMARY).unlink()
    with pytest.raises(RunError, match="is interrupted; a run is sealed when it is complete"):
        seal(RunFolder(copied))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path / "nothing.sdnb.zip"), "--replay", "3"])
    assert ended.value.code == 1 and "there is no such file" in capsys.readouterr().err
    with pytest.raises(RunError, match="was imported"):
        seal(RunFolder(PUBLISHED))


def replay(folder, count=3):
    file = seal(RunFolder(folder))
    return verify(file, RunFolder(folder), replay_findings(file, RunFolder(folder), count))


def test_steps_run_again(copied, forked_ranks):
    verified = replay(copied, STEPS)
    found = {finding.check: finding for finding in verified.findings}
    assert verified.holds, verified
    every = ", ".join(map(str, range(1, STEPS + 1)))
    assert f"steps {every}: the same to the bit; they took" in found["replay"].why
    assert "steps 0, 7, 14, 21, 28, 30: the same to the bit" in found["replay: held-out loss"].why
    assert "of 4 checkpoints" in found["replay: optimizer"].why


def test_only_the_steps_up_to_those_drawn_run_again(copied, forked_ranks, monkeypatch):
    monkeypatch.setattr(random.SystemRandom, "sample", lambda self, possible, count: [9, 16])
    found = {finding.check: finding for finding in replay(copied, 2).findings}
    assert "steps 8, 9, 15, 16: the same to the bit" in found["replay"].why


@pytest.mark.parametrize(("what", "check"), [
    ("losses", "replay"), ("held-out", "replay: held-out loss"), ("weights", "replay"), ("noise", "replay"),
    ("optimizer", "replay: optimizer"),
])  # fmt: skip
def test_who_makes_everything_agree_is_found_by_a_replay(copied, forked_ranks, what, check):
    """The forger also changes what the checkpoints say."""
    if what == "losses":
        better_losses(copied)
    elif what == "held-out":
        path = copied / run_folder.VALIDATION
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**line, "loss": line["loss"] * 0.99}) + "\n" for line in lines))
    elif what == "weights":  # of an earlier step
        for number in (14, 21, 28):
            shutil.copy(
                copied / "checkpoint-7/unet/diffusion_pytorch_model.safetensors", copied / f"checkpoint-{number}/unet"
            )
    elif what == "optimizer":  # as if the steps before a checkpoint had been left out of the records
        shutil.copy(copied / "checkpoint-21" / "optimizer.bin", copied / "checkpoint-14")
    elif what == "noise":
        other_setting(copied, "noise_offset", 0.1)
    for manifest in copied.glob("checkpoint-*/checkpoint.json"):
        told = json.loads(manifest.read_text())
        told["records"] = records_digest(copied, told["step"])
        told["settings"]["noise_offset"] = RunFolder(copied).config.noise_offset
        del told["digests"]
        files.write(manifest, told)
    run_folder.write_results(copied)
    verified = replay(copied, STEPS)
    assert check in failed(verified), verified
    if what != "held-out":
        assert "checkpoints: records" not in failed(verified), verified


def test_two_ranks_run_again(tmp_path, forked_ranks):
    run = sdnb.train(
        pretrained_model_name_or_path=small_model(), dataset_name=small_data(), resolution=64, center_crop=True,
        train_batch_size=2, lr_warmup_steps=0, steps=5, seed=7, report_to="none", checkpointing_steps=2,
        num_processes=2, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    verified = replay(run.folder, 5)
    found = {finding.check: finding for finding in verified.findings}
    assert verified.holds, verified
    assert "1, 2, 3, 4, 5: the same" in found["replay"].why
