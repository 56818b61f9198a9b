"""Checkpoints: the whole state of a run in a folder, complete or absent.

A checkpoint has the reference's layout (`unet`, `unet_ema`, or the weights of an adapter, and accelerate's files) and
two more things: each rank's
position among the micro-batches with its RNG states, and `checkpoint.json`, with its files and its settings. With these
a run resumes bit for bit.
"""

import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import SCALER_NAME
from diffusers import UNet2DConditionModel

from sdnb.errors import RunError
from sdnb.machine.device_kind import HOST
from sdnb.models.lora import load_adapter, save_adapter
from sdnb.models.pipeline import model_folder
from sdnb.run import folder as run_folder
from sdnb.run.files import read, write
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import DataSettings
from sdnb.training.checkpoint_folder import (
    MANIFEST,
    Checkpoint,
    FoundCheckpoints,
    changed_files,
    differences,
    digest_of,
    identity,
    machine_and_software,
    numbered,
    records_digest,
)  # fmt: skip
from sdnb.training.setup import Training, settle_buckets

logger = logging.getLogger("sdnb")

_POSITION_FILE = "place_{}.pt"  # a rank's position among the micro-batches
# If one of these has changed, a position among the micro-batches is meaningless.
_DECIDE_ORDER = {
    *DataSettings.model_fields, "train_batch_size", "gradient_accumulation_steps", "whole_steps", "num_processes",
    "the data",
}  # fmt: skip


class Checkpoints:
    """Saves the checkpoints of a run, removes old ones, and loads the models from one for `accelerator.load_state`."""

    def __init__(self, training: Training) -> None:
        self.training, self.accelerator, self.folder = training, training.accelerator, training.folder
        self.accelerator.register_save_state_pre_hook(self._save_models)
        self.accelerator.register_load_state_pre_hook(self._load_models)

    def save(self, step: int) -> None:
        """Make `checkpoint-<step>`, then remove the oldest beyond `checkpoints_total_limit`. All ranks call it. Raises
        RunError if it cannot be written, such as on a full disk; earlier checkpoints stay as they were."""
        final = self.folder / f"checkpoint-{step}"
        aside = self.folder / f".{final.name}.incomplete"
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            self._remove_oldest(step)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(aside))
            place = aside / _POSITION_FILE.format(self.accelerator.process_index)
            torch.save(self.training.batches.state_dict(), place)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._complete(aside, final, step)
        except Exception as error:  # torch and safetensors do not raise OSError when the disk is full
            raise self._not_written(final, aside, error) from error
        self.accelerator.wait_for_everyone()
        logger.info("saved %s", final.name)

    def _complete(self, aside: Path, final: Path, step: int) -> None:
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {
            "step": step,
            "total_steps": self.training.total_steps,
            "device": self.accelerator.device.type,
            "machine": machine_and_software(self.folder),
            "model": read(self.folder / run_folder.MODEL).get("unet_digest"),
            "settings": identity(self.training.config, self.training.splits.train),
            "records": records_digest(self.folder, step),
            "saved": time.time(),
            "files": {str(path.relative_to(aside)): path.stat().st_size for path in files},
            "digests": {str(path.relative_to(aside)): digest_of(path) for path in files},
        }
        write(aside / MANIFEST, manifest)
        for path in (*aside.rglob("*"), aside, *run_folder.records(self.folder)):
            _fsync(path)
        abandoned = final.with_name(f".{final.name}.given-up")
        if final.exists():
            final.rename(abandoned)
        aside.rename(final)
        _fsync(self.folder)
        shutil.rmtree(abandoned, ignore_errors=True)
        self._remove_oldest(step)

    def _remove_oldest(self, step: int) -> None:
        # Checkpoints of later steps were abandoned, and are removed first.
        best_first = sorted(numbered(self.folder), key=lambda one: (one[0] > step, -one[0]))
        limit = self.training.config.checkpoints_total_limit
        for _, folder in best_first[limit:] if limit else ():
            removed = folder.with_name(f".{folder.name}.removed")
            folder.rename(removed)  # a partly removed one must not look like a checkpoint
            shutil.rmtree(removed, ignore_errors=True)

    def _not_written(self, final: Path, aside: Path, error: Exception) -> RunError:
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free / 2**30
        copies = 4 if self.training.ema is not None else 3  # weights, Adam's two averages, and the EMA
        needed = copies * sum(weight.nbytes for weight in self.training.trained) / 2**30
        earlier = [folder.name for _, folder in sorted(numbered(self.folder))]
        kept = f"the one before it, {earlier[-1]}, is complete" if earlier else "there is none before it"
        return RunError(
            f"{final} could not be written: {error}\n"
            f"It takes up to {needed:.2f} GiB, and {free:.2f} GiB are free; {kept}. "
            "Free some space, or set checkpoints_total_limit, and resume with resume_from_checkpoint = latest."
        )

    def _save_models(self, models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()  # so that accelerate does not write them a second time
        if self.accelerator.is_main_process:
            if self.training.ema is not None:
                self.training.ema.save(Path(folder) / "unet_ema")
            for model in models:
                unet = self.accelerator.unwrap_model(model)
                if self.training.config.lora:
                    save_adapter(unet, Path(folder) / run_folder.ADAPTER)
                else:
                    unet.save_pretrained(Path(folder) / "unet")

    def _load_models(self, models: list[torch.nn.Module], folder: str) -> None:
        if self.training.ema is not None:
            self.training.ema.load(Path(folder) / "unet_ema")
        while models:  # removed, so that accelerate does not look for their weights
            unet = self.accelerator.unwrap_model(models.pop())
            if self.training.config.lora:
                load_adapter(unet, Path(folder) / run_folder.ADAPTER)
            else:
                unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict())


def resume(training: Training, found: FoundCheckpoints) -> int:
    """Load the first checkpoint that all ranks can read, and return its step; 0 if there are no checkpoints. Raises
    RunError if there are some, but none can be read."""
    problems = list(found.rejected)
    for problem in problems:
        logger.warning("skipped: %s", problem)
    for checkpoint in found.usable:
        if (problem := load(training, checkpoint)) is None:
            logger.info("resuming after step %d, from %s", checkpoint.step, checkpoint.folder)
            return checkpoint.step
        logger.warning("skipped: %s", problem)
        problems.append(problem)
    if problems:
        raise RunError("\n".join(["no checkpoint can be used", *problems]))
    return 0


def fingerprint(config: TrainConfig) -> dict[str, str]:
    """A digest of the UNet's weights that the run starts from, and the revision if they come from the hub."""
    folder = Path(model_folder(config))
    weights = sorted(path for path in (folder / "unet").iterdir() if path.suffix in (".safetensors", ".bin"))
    digest = xxhash.xxh3_128("".join(map(digest_of, weights)).encode()).hexdigest()
    from_hub = {"revision": folder.name} if folder.parent.name == "snapshots" else {}
    return {"unet_digest": digest, **from_hub}


def remove_leftovers(folder: Path) -> None:
    """Remove checkpoints in a run folder that a killed run was writing or removing."""
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def load(training: Training, checkpoint: Checkpoint) -> str | None:
    """The problem with the checkpoint, on this rank or another; None if it is loaded. One rank checks the content of
    the files meanwhile."""
    settle_buckets(training)
    accelerator, scaler, problem = training.accelerator, training.accelerator.scaler, None
    if not (checkpoint.folder / SCALER_NAME).exists():  # made in another precision: accelerate would look for it
        accelerator.scaler = None
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(changed_files, checkpoint) if accelerator.is_main_process else None
        try:
            accelerator.load_state(str(checkpoint.folder))
            _compute_as_now(training.optimizer)
            _restore_position(training, checkpoint)
            if checked is not None and (changed := checked.result()):
                problem = f"{checkpoint.folder}: damaged, the content of {', '.join(changed)} has changed"
        except Exception as error:  # torch, safetensors, pickle and json each raise their own for a damaged file
            problem = f"{checkpoint.folder}: unreadable: {type(error).__name__}: {error}"
    accelerator.scaler = scaler
    failed = torch.tensor(problem is not None, device=accelerator.device, dtype=torch.int32)
    if int(accelerator.reduce(failed, reduction="sum")):
        return problem or f"{checkpoint.folder}: unreadable for another rank"
    return None


def _compute_as_now(optimizer: AcceleratedOptimizer) -> None:
    """Make the optimizer compute as the settings say, not as the saved one did. A fused AdamW counts its steps on the
    device, and reads weights and averages in memory order: earlier versions could save averages in another one."""
    defaults = optimizer.defaults
    for group in optimizer.param_groups:
        group.update({name: defaults[name] for name in ("fused", "foreach", "capturable") if name in defaults})
    for weights, state in optimizer.state.items():
        for name, values in state.items():
            if not isinstance(values, torch.Tensor) or not values.is_floating_point():
                continue
            if name == "step":
                state[name] = values.to(weights.device if defaults.get("fused") else HOST)
            elif values.shape == weights.shape and values.stride() != weights.stride():
                state[name] = torch.empty_like(weights, dtype=values.dtype).copy_(values)


def _restore_position(training: Training, checkpoint: Checkpoint) -> None:
    examples, batches = training.splits.train, training.batches
    if checkpoint.manifest is None:
        count = examples.count
        batches.epoch = int(checkpoint.step // training.config.epoch(count).steps) if count else 0
        logger.warning("the epoch starts again, in another order: %s does not contain its position", checkpoint.folder)
        _record_changes(training, ["the reference made the checkpoint"])
        return
    made_on, device = checkpoint.manifest.get("device"), training.accelerator.device.type
    if made_on not in (None, device):
        logger.warning(
            "random numbers differ from here on: %s was made on %s, this is %s", checkpoint.folder, made_on, device
        )
    changed = differences(checkpoint, training.config, examples)
    for difference in changed.values():
        logger.warning("resuming with changes: %s", difference)
    if changed:
        _apply_settings(training)
        _record_changes(training, [*changed])
    reordered = changed.keys() & _DECIDE_ORDER
    place = checkpoint.folder / _POSITION_FILE.format(0 if reordered else training.accelerator.process_index)
    position = torch.load(place, map_location=HOST, weights_only=True)
    if reordered:
        batches.epoch = position["epoch"]
        logger.warning("the epoch starts again, in another order: a changed setting affects the order")
    else:
        batches.load_state_dict(position)


def _record_changes(training: Training, changes: list[str]) -> None:
    """Of the run's records it is no longer true that one set of settings explains them."""
    if training.accelerator.is_main_process:
        run_folder.add_to_environment(training.folder, changed_on_resume=changes)


def _apply_settings(training: Training) -> None:
    """Set the optimizer and the schedule to the current settings again: loading has replaced them by earlier ones."""
    optimizer, schedule = training.optimizer, training.schedule.scheduler
    schedule.base_lrs = [training.config.peak_learning_rate]
    for group in optimizer.param_groups:
        group.update({name: optimizer.defaults[name] for name in ("betas", "eps", "weight_decay")})
        group["lr"] = training.config.peak_learning_rate * schedule.lr_lambdas[0](schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
