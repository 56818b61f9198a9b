"""Checkpoints: a training that is killed and resumed goes on bit for bit, whatever happened to its folder."""

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from launching import at_step
from processes import Forked, processes_of
from training import small_data, small_model, train

from sdnb.data.loading import load_data
from sdnb.errors import RunError
from sdnb.launch import command_line, notebook
from sdnb.launch.notebook import launch
from sdnb.launch.plan import prepare
from sdnb.machine import environment
from sdnb.machine.device_kind import kind_of
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.training import checkpoint_folder, setup

# 13 images, 2 × 2 a step: on one rank 7 micro-batches, so epochs of 4 steps, the last of them short.
STEPS = 9


@pytest.fixture
def settings(settings, image_folder):
    """Everything random there is: crop and mirroring of wide images, noise, a schedule; and an average."""
    return {
        **settings, "dataset_name": None, "train_data_dir": str(image_folder(13, (90, 70))), "center_crop": False,
        "random_flip": True, "use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "noise_offset": 0.1,
        "steps": STEPS,
    }  # fmt: skip


def records(run):
    """What was recorded, times aside, and what was found encoded already."""
    lines = [json.loads(line) for line in (run.folder / run_folder.STEPS).read_text().splitlines()]
    aside = (
        "seconds", "phase_seconds", "peak_memory_gib", "encoded_images", "encoded_captions", "cpu_seconds",
        "others_share",
    )  # fmt: skip
    return [{name: value for name, value in line.items() if name not in aside} for line in lines]


def weights(run):
    return (run.folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def assert_same(resumed, uninterrupted):
    assert records(resumed) == records(uninterrupted)
    assert len(records(resumed)) == STEPS
    assert weights(resumed) == weights(uninterrupted)


def power_off_after(run, step, to):
    """The run folder as it is when the power goes a moment after a checkpoint: the latest, with records beyond it."""
    to.mkdir()
    for name in (run_folder.CONFIG, run_folder.ENVIRONMENT):
        shutil.copy(run.folder / name, to)
    shutil.copytree(run.folder / f"checkpoint-{step}", to / f"checkpoint-{step}")
    lines = (run.folder / run_folder.STEPS).read_text().splitlines()[: step + 1]
    (to / run_folder.STEPS).write_text("\n".join(lines) + '\n{"step": 7, "lo')
    return to


# Where views are kept, the training that goes on finds more of them kept than the one that was never interrupted.
KEPT = dict(center_crop=True, fold_micro_batches=2)


@pytest.mark.parametrize(
    "how",
    [
        dict(dataloader_num_workers=0),
        dict(dataloader_num_workers=3),
        dict(dataloader_num_workers=0, **KEPT),
        dict(dataloader_num_workers=2, **KEPT, whole_steps=True),
    ],
)
def test_resuming_anywhere_is_exact(settings, tmp_path, how):
    """From the first step of an epoch, its middle, its end, and the second epoch's middle."""
    settings = {**settings, **how}
    whole = train(settings, output_dir=str(tmp_path / "whole"), cache_dir=str(tmp_path / "cache"))
    kept = train(settings, output_dir=str(tmp_path / "kept"), checkpointing_steps=1)
    assert_same(kept, whole)  # making checkpoints changes nothing
    for step in (1, 2, 4, 6):
        folder = power_off_after(kept, step, tmp_path / f"from-{step}")
        resumed = train(settings, output_dir=str(folder), resume_from_checkpoint="latest")
        assert_same(resumed, whole)
        assert f"resuming after step {step}" in resumed.log


def command(settings, **changes):
    flags = []
    for name, value in {**settings, **changes}.items():
        name = "max_train_steps" if name == "steps" else name
        if value is not None and value is not False:
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [sys.executable, "-m", "sdnb.train", *flags]


def test_killed_again_and_again_with_eight_loading_processes(settings, tmp_path):
    """At any moment: while it trains, and while it writes a checkpoint."""
    settings = {**settings, "dataloader_num_workers": 8, "checkpointing_steps": 1}
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    folder = tmp_path / "killed"
    for moment in ("metrics.jsonl", ".checkpoint-4.incomplete", "checkpoint-6/checkpoint.json", None):
        process = Forked(
            command(settings, output_dir=folder, resume_from_checkpoint="latest"), stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                if moment and (folder / moment).exists():
                    with contextlib.suppress(ProcessLookupError):  # it has been killed already
                        os.killpg(process.pid, signal.SIGKILL)
                time.sleep(0.001)
        finally:
            process.kill()
        assert process.returncode == (-signal.SIGKILL if moment else 0)
    assert_same(run_folder.RunFolder(folder), whole)
    assert not list(folder.glob(".checkpoint-*"))
    assert [one["step"] for one in records(run_folder.RunFolder(folder))] == list(range(1, STEPS + 1))


def test_three_ranks_one_of_them_killed(settings, tmp_path, forked_ranks, monkeypatch):
    """More than two add up a number in an order of their own."""
    monkeypatch.setattr(notebook, "POLL_SECONDS", 0.05)  # a fast machine takes several steps in half a second
    settings = {**settings, "num_processes": 3, "validation_loss_steps": 0}
    whole = launch(prepare(TrainConfig(**settings)), show=lambda *_: None)
    folder = tmp_path / "killed"

    def kill_a_rank():
        max(processes_of(folder), key=lambda process: process.pid).kill()

    killed = TrainConfig(**{**settings, "output_dir": str(folder), "checkpointing_steps": 1})
    with pytest.raises(RunError, match="it was killed by SIGKILL"):
        launch(prepare(killed), show=at_step(4, kill_a_rank))
    plan = prepare(killed.updated(resume_from_checkpoint="latest"))
    assert plan.resumes_after >= 3
    assert plan.facts["resumes"] == f"after step {plan.resumes_after}"
    resumed = launch(plan, show=lambda *_: None)
    assert_same(resumed, whole)
    assert resumed.summary["world_size"] == 3 and not resumed.failure
    assert len(resumed.environment["resumed"]) == 1


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two steps with a checkpoint after each, and its settings."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = dict(
        pretrained_model_name_or_path=small_model(), dataset_name=small_data(), resolution=64, center_crop=True,
        train_batch_size=2, steps=2, seed=7, report_to="none", lr_warmup_steps=0, use_ema=True, checkpointing_steps=1,
        output_dir=str(folder / "run"),
    )  # fmt: skip
    return train(settings), settings


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of it to do things to, and the settings that go on with it."""
    run, settings = stopped
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    return folder, {**settings, "output_dir": str(folder), "resume_from_checkpoint": "latest", "steps": 3}


def found(settings):
    config = environment.resolved(TrainConfig(**settings), environment.devices())
    return checkpoint_folder.find_checkpoints(config, load_data(config).train)


def cut_short(folder):
    os.truncate(folder / "optimizer.bin", 1000)


def overwritten(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


def lost(folder):
    (folder / "place_0.pt").unlink()


def garbled(folder):
    (folder / "checkpoint.json").write_text('{"step": 2, ')


def flipped_bit(*name):
    """One bit in the middle of a file, as a bad disk leaves it: the file still loads."""

    def flip(folder):
        path = folder.joinpath(*name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    flip.__name__ = f"a bit in {'/'.join(name)}"
    return flip


FLIPPED = [
    flipped_bit("unet", "diffusion_pytorch_model.safetensors"),
    flipped_bit("unet_ema", "diffusion_pytorch_model.safetensors"),
    flipped_bit("optimizer.bin"),
    flipped_bit("place_0.pt"),
]


@pytest.mark.parametrize("damage", [cut_short, overwritten, lost, garbled, *FLIPPED])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, damage):
    folder, settings = copy
    damage(folder / "checkpoint-2")
    run = train(settings)
    assert "WARNING skipped" in run.log and "checkpoint-2: " in run.log
    assert "resuming after step 1" in run.log
    assert list(run.steps.step) == [1, 2, 3]


@pytest.mark.parametrize("damage", [cut_short, overwritten, *FLIPPED[:2]])
def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(copy, damage):
    folder, settings = copy
    damage(folder / "checkpoint-2")
    with pytest.raises(RunError, match=r"checkpoint-2: (incomplete: optimizer.bin has 1000|unreadable|damaged, the)"):
        train({**settings, "resume_from_checkpoint": "checkpoint-2"})


def test_no_whole_checkpoint_left_is_an_error_and_not_a_new_training(copy):
    folder, settings = copy
    for step in (1, 2):
        cut_short(folder / f"checkpoint-{step}")
    with pytest.raises(RunError, match="no checkpoint can be used(.|\n)*checkpoint-2: incomplete(.|\n)*checkpoint-1"):
        found(settings)
    assert len(run_folder.RunFolder(folder).steps) == 2, "and the records are still there"


def test_what_is_asked_for_and_not_there(copy, tmp_path):
    folder, settings = copy
    with pytest.raises(RunError, match="checkpoint-9: no such checkpoint in .*found: checkpoint-2, checkpoint-1"):
        found({**settings, "resume_from_checkpoint": "checkpoint-9"})
    assert found({**settings, "output_dir": str(tmp_path / "new")}).usable == ()
    with pytest.raises(RunError, match="set output_dir"):
        found({**settings, "output_dir": None})
    assert found({**settings, "resume_from_checkpoint": f"{folder}/checkpoint-1"}).usable[0].step == 1


def test_a_run_killed_before_its_first_checkpoint_begins_again(copy):
    folder, settings = copy
    for step in (1, 2):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run = train({**settings, "checkpointing_steps": 100})
    assert list(run.steps.step) == [1, 2, 3]
    assert run.steps.loss[0] == pytest.approx(1.0, abs=0.3), "from the model's weights"


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(train_batch_size=4), "train_batch_size: 2 in the checkpoint, 4 now"),
        (dict(seed=8), "seed: 7 in the checkpoint, 8 now"),
        (dict(num_processes=2), "num_processes: 1 in the checkpoint, 2 now"),
        (dict(max_train_samples=5), "the data: 13 examples.* in the checkpoint, 5 examples"),
        (dict(learning_rate=0.5), "learning_rate: 0.0001 in the checkpoint, 0.5 now"),
        (dict(lr_scheduler="linear"), "lr_scheduler: constant in the checkpoint, linear now"),
        (dict(snr_gamma=5.0), "snr_gamma: None in the checkpoint, 5.0 now"),
    ],
)
def test_other_settings_are_refused(copy, change, said):
    _, settings = copy
    with pytest.raises(RunError, match=said):
        found({**settings, **change})
    assert found({**settings, **change, "resume_with_changes": True}).usable[0].step == 2


def test_what_does_not_change_the_training_may_change(copy, tmp_path):
    _, settings = copy
    harmless = dict(
        validation_prompts=["sun"], checkpoints_total_limit=1, steps=50, target_loss=0.1, cache_dir=str(tmp_path / "c")
    )
    assert [one.step for one in found({**settings, **harmless}).usable] == [2, 1]


def test_averages_in_another_memory_order_give_the_same_training(copy, tmp_path):
    """As version 0.1 could save them, without digests."""
    folder, settings = copy
    shutil.copytree(folder, tmp_path / "other")
    for manifest in (tmp_path / "other").glob("checkpoint-*/checkpoint.json"):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "digests": {}}))
    for file in (tmp_path / "other").glob("checkpoint-*/optimizer.bin"):
        saved, size = torch.load(file, weights_only=True), file.stat().st_size
        for state in saved["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].dim() == 4:
                    state[name] = state[name].to(memory_format=torch.channels_last)
        torch.save(saved, file)
        assert file.stat().st_size == size, "the manifest has its size"
    plain = train(settings, steps=5)
    other = train(settings, steps=5, output_dir=str(tmp_path / "other"))
    assert "resuming after step 2" in other.log
    assert list(other.steps.loss) == pytest.approx(list(plain.steps.loss), rel=1e-4)


def test_changes_that_are_asked_for_hold(copy):
    _, settings = copy
    run = train(settings, learning_rate=0.5, adam_beta1=0.5, resume_with_changes=True)
    assert list(run.steps.lr) == [1e-4, 1e-4, 0.5]
    assert "resuming with changes: learning_rate: 0.0001 in the checkpoint, 0.5 now" in run.log
    assert "the epoch starts again" not in run.log, "the order is what it was"


def test_another_batch_that_is_asked_for(copy):
    _, settings = copy
    run = train(settings, train_batch_size=4, resume_with_changes=True)
    assert list(run.steps.images) == [2, 2, 4]
    assert "the epoch starts again, in another order" in run.log


def test_the_references_own_checkpoint(copy):
    """It has what accelerate keeps, and no place among the micro-batches."""
    folder, settings = copy
    for name in ("checkpoint.json", "place_0.pt"):
        (folder / "checkpoint-2" / name).unlink()
    trained = (folder / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    run = train({**settings, "steps": 2})
    assert "resuming after step 2" in run.log and "does not contain its position" in run.log
    (folder / "checkpoint-1").rename(folder / "kept-1")
    averaged = json.loads((folder / "checkpoint-2" / "unet_ema" / "config.json").read_text())
    assert averaged["optimization_step"] == 2
    assert weights(run) != trained, "what is saved is the average"
    assert list(train(settings).steps.step) == [1, 2, 3]


def test_going_on_on_another_device_is_said(copy):
    folder, settings = copy
    manifest = folder / "checkpoint-2" / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "device": "cuda"}))
    assert "checkpoint-2 was made on cuda, this is cpu" in train(settings).log


def test_the_newest_are_kept(copy):
    folder, settings = copy
    train(settings, steps=5, checkpoints_total_limit=2)
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_an_earlier_checkpoint_gives_up_those_after_it(copy):
    folder, settings = copy
    train(settings, steps=6, checkpointing_steps=3)  # 1, 2, 3, 6
    going_back = {**settings, "resume_from_checkpoint": "checkpoint-2", "steps": 4}
    train(going_back, checkpointing_steps=4, checkpoints_total_limit=2)
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    (folder / "checkpoint-4").rename(folder / "checkpoint-6")
    assert found(settings).usable[0].step == 3, "a checkpoint beyond the records is of the training given up"


def test_a_disk_that_takes_no_more(copy):
    """A limit on a file's size fails in the same way: in the middle of writing."""
    folder, settings = copy
    before = {path.name: path.stat().st_mtime for path in (folder / "checkpoint-2").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(RunError, match="checkpoint-3 could not be written: ") as error:
            train(settings, steps=9, checkpoints_total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = str(error.value)
    assert "File too large" in said and "the one before it, checkpoint-2, is complete" in said
    assert {path.name: path.stat().st_mtime for path in (folder / "checkpoint-2").iterdir()} == before
    assert not list(folder.glob(".checkpoint-*"))
    assert list(train({**settings, "steps": 4}).steps.step) == [1, 2, 3, 4]


class Quantised(torch.optim.SGD):
    """Keeps a number that is no tensor, as bitsandbytes' 8-bit Adam does, which cannot be had here."""

    def __init__(self, parameters, lr, betas, weight_decay, eps):
        super().__init__(parameters, lr)

    def step(self, *_):
        super().step()
        for weights in self.param_groups[0]["params"]:
            self.state[weights]["step"] = self.state[weights].get("step", 0) + 1


def test_a_quantised_optimizer_goes_on_too(stopped, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Quantised)))
    monkeypatch.setattr(environment, "require", lambda config: None)
    settings = {**stopped[1], "use_8bit_adam": True, "output_dir": str(tmp_path / "run")}
    train(settings)
    resumed = train(settings, steps=3, resume_from_checkpoint="latest", checkpointing_steps=3)
    assert list(resumed.steps.step) == [1, 2, 3]
    kept = torch.load(resumed.folder / "checkpoint-3" / "optimizer.bin", weights_only=True)["state"]
    assert all(one["step"] == 3 for one in kept.values())


@pytest.mark.skipif(not kind_of("cpu").has_fused_adam, reason="no fused AdamW on the CPU before torch 2.4")
def test_a_fused_optimizer_with_scaled_losses_takes_up_one_without(stopped, tmp_path, monkeypatch):
    """As a training in float16 does that goes on from a checkpoint of the reference's, or of another precision."""
    plain, scaler = setup.make_accelerator, torch.amp.GradScaler("cpu", init_scale=4.0)

    def with_scaled_losses(config):
        accelerator = plain(config)
        accelerator.scaler = scaler
        return accelerator

    settings = {**stopped[1], "fused_optimizer": False, "output_dir": str(tmp_path / "run")}
    train(settings)
    monkeypatch.setattr(setup, "make_accelerator", with_scaled_losses)
    resumed = train(settings, fused_optimizer=True, steps=3, resume_from_checkpoint="latest", checkpointing_steps=3)
    kept = torch.load(resumed.folder / "checkpoint-3" / "optimizer.bin", weights_only=True)
    assert list(resumed.steps.step) == [1, 2, 3] and kept["param_groups"][0]["fused"]
    assert all(one["step"] == 3 for one in kept["state"].values())
    assert torch.load(resumed.folder / "checkpoint-3" / "scaler.pt")["scale"] == 4


def test_one_training_at_a_time(copy):
    folder, settings = copy
    with run_folder.lock(folder), pytest.raises(RunError, match="another run is using this folder"):
        train(settings)
    assert list(train(settings).steps.step) == [1, 2, 3]


@pytest.mark.parametrize("change", [dict(seed=8), dict(resume_from_checkpoint=None)])
def test_a_refusal_leaves_the_run_as_it_is(copy, change, monkeypatch):
    folder, settings = copy
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", command(settings, **change)[2:])
    monkeypatch.setattr(command_line, "_end", lambda message, status: sys.exit(f"{status} {message}"))
    with pytest.raises(SystemExit, match="1 error: "):
        command_line.main()
    gc.enable()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_complete_run_has_nothing_left_to_train(copy):
    folder, settings = copy
    before = records(run_folder.RunFolder(folder))
    run = train({**settings, "steps": 2})
    assert records(run) == before and run.summary["world_size"] == 1


def test_a_checkpoint_without_digests_is_resumed(copy):
    """As version 0.1 saved it."""
    folder, settings = copy
    for manifest in folder.glob("checkpoint-*/checkpoint.json"):
        content = json.loads(manifest.read_text())
        assert set(content.pop("digests")) == set(content["files"])
        manifest.write_text(json.dumps(content))
    assert "resuming after step 2" in train(settings).log
