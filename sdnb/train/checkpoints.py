"""Checkpoints: the whole state of a training in a folder, complete or absent, and the way back into it.

A checkpoint is laid out as the reference's (`unet`, `unet_ema`, and what accelerate keeps), with two things more: each
rank's place among the micro-batches with its generators, and `checkpoint.json`, which says what is in it and which
settings it belongs to. With these a training goes on bit for bit; the reference's own checkpoints can be resumed as
well, but their epoch begins again.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import SCALER_NAME
from diffusers import UNet2DConditionModel

from sdnb.data.image_captions import ImageCaptions
from sdnb.data.micro_batches import Batches
from sdnb.errors import RunError
from sdnb.models.ema import EMA
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import Data
from sdnb.train.checkpoint_folder import MANIFEST, Checkpoint, Found, differences, identity, numbered

logger = logging.getLogger("sdnb")

# Where one of these differs, a place among the micro-batches means nothing any more.
_DECIDE_ORDER = {
    *Data.model_fields, "train_batch_size", "gradient_accumulation_steps", "whole_steps", "num_processes", "the data"
}  # fmt: skip


class Checkpoints:
    """Writes a run's checkpoints, and loads the one to go on from."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        examples: ImageCaptions,
        batches: Batches,
        optimizer: AcceleratedOptimizer,
        lr_scheduler: AcceleratedScheduler,
        ema: EMA | None,
    ) -> None:
        self.accelerator, self.config, self.examples = accelerator, config, examples
        self.batches, self.optimizer, self.lr_scheduler, self.ema = batches, optimizer, lr_scheduler, ema
        self.folder = Path(config.output_dir)
        accelerator.register_save_state_pre_hook(self._save_models)
        accelerator.register_load_state_pre_hook(self._load_models)

    def resume(self, found: Found) -> int:
        """Load what was found, on every rank.

        Returns:
            The step that it was made after; 0 where there is nothing to go on from.

        Raises:
            RunError: if there is something, and no rank can read it.
        """
        for reason in found.passed_over:
            logger.warning("passed over: %s", reason)
        problems = list(found.passed_over)
        for checkpoint in found.usable:
            problem = self._load(checkpoint)
            if problem is None:
                logger.info("resuming after step %d, from %s", checkpoint.step, checkpoint.folder)
                return checkpoint.step
            logger.warning("passed over: %s", problem)
            problems.append(problem)
        if problems:
            raise RunError("\n".join(["nothing to resume from", *problems]))
        return 0

    def _load(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with it, on this rank or another."""
        problem = None
        try:
            self._load_state(checkpoint.folder)
            self._compute_as_now()
            self._take_up_place(checkpoint)
        except Exception as error:  # torch, safetensors, pickle and json each have their own for a damaged file
            problem = f"{checkpoint.folder}: unreadable: {type(error).__name__}: {error}"
        failed = torch.tensor(problem is not None, device=self.accelerator.device, dtype=torch.int32)
        if int(self.accelerator.reduce(failed, reduction="sum")):
            return problem or f"{checkpoint.folder}: unreadable for another rank"
        return None

    def _load_state(self, folder: Path) -> None:
        scaler = self.accelerator.scaler
        if not (folder / SCALER_NAME).exists():  # made in another precision: accelerate would look for it
            self.accelerator.scaler = None
        try:
            self.accelerator.load_state(str(folder))
        finally:
            self.accelerator.scaler = scaler

    def _compute_as_now(self) -> None:
        """Have the optimizer compute as it does now, not as the saved one did. A fused AdamW counts its steps on the
        device, and goes through weights and averages as they lie, so that these need the order in memory that the
        weights have now (`channels_last`). Not what has been quantised, whose scales go by the order it had."""
        defaults = self.optimizer.defaults
        for group in self.optimizer.param_groups:
            group.update({name: defaults[name] for name in ("fused", "foreach", "capturable") if name in defaults})
        for weights, state in self.optimizer.state.items():
            for name, values in state.items():
                if not isinstance(values, torch.Tensor) or not values.is_floating_point():
                    continue
                if name == "step":
                    state[name] = values.to(weights.device if defaults.get("fused") else "cpu")
                elif values.shape == weights.shape and values.stride() != weights.stride():
                    state[name] = torch.empty_like(weights, dtype=values.dtype).copy_(values)

    def _take_up_place(self, checkpoint: Checkpoint) -> None:
        if checkpoint.manifest is None:
            self.batches.epoch = int(checkpoint.step // self.config.steps_per_epoch(len(self.examples)))
            logger.warning("the epoch begins again, in another order: %s does not say where it was", checkpoint.folder)
            return
        made_on, device = checkpoint.manifest.get("device"), self.accelerator.device.type
        if made_on not in (None, device):
            logger.warning(
                "the draws are others from here on: %s was made on %s, this is %s", checkpoint.folder, made_on, device
            )
        differ = differences(checkpoint, self.config, self.examples)
        for difference in differ.values():
            logger.warning("resuming with changes: %s", difference)
        if differ:
            self._apply_settings()
        if differ.keys() & _DECIDE_ORDER:
            self.batches.epoch = _read_place(checkpoint, 0)["epoch"]
            logger.warning("the epoch begins again, in another order: what has changed decides the order")
        else:
            self.batches.take_up(_read_place(checkpoint, self.accelerator.process_index))

    def _apply_settings(self) -> None:
        """Put the settings of now back, in whose place loading has put those of then."""
        schedule = self.lr_scheduler.scheduler
        schedule.base_lrs = [self.config.peak_learning_rate]
        for group in self.optimizer.param_groups:
            group.update({name: self.optimizer.defaults[name] for name in ("betas", "eps", "weight_decay")})
            group["lr"] = self.config.peak_learning_rate * schedule.lr_lambdas[0](schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def save(self, step: int) -> None:
        """Make `checkpoint-<step>`, and then remove the oldest beyond `checkpoints_total_limit`. All ranks call it.

        Raises:
            RunError: if it cannot be written, such as on a full disk; the checkpoints before it are as they were.
        """
        final = self.folder / f"checkpoint-{step}"
        aside = self.folder / f".{final.name}.incomplete"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(aside, ignore_errors=True)
            self._remove_oldest(keep=self.config.checkpoints_total_limit, step=step)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(aside))
            torch.save(self.batches.place(), aside / _place(self.accelerator.process_index))
            self.accelerator.wait_for_everyone()
            if main:
                self._complete(aside, final, step)
        except Exception as error:  # torch and safetensors do not raise OSError when the disk is full
            raise self._not_written(final, aside, error) from error
        self.accelerator.wait_for_everyone()
        logger.info("saved %s", final.name)

    def _complete(self, aside: Path, final: Path, step: int) -> None:
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {
            "step": step,
            "device": self.accelerator.device.type,
            "settings": identity(self.config, self.examples),
            "files": {str(path.relative_to(aside)): path.stat().st_size for path in files},
        }
        run_folder.write(aside / MANIFEST, manifest)
        for path in (*aside.rglob("*"), aside, *run_folder.records(self.folder)):
            _to_disk(path)
        given_up = final.with_name(f".{final.name}.given-up")
        if final.exists():
            final.rename(given_up)
        aside.rename(final)
        _to_disk(self.folder)
        shutil.rmtree(given_up, ignore_errors=True)
        self._remove_oldest(keep=self.config.checkpoints_total_limit, step=step)

    def _remove_oldest(self, keep: int | None, step: int) -> None:
        # What lies ahead is of a training that was given up, and goes first.
        best_first = sorted(numbered(self.folder), key=lambda one: (one[0] > step, -one[0]))
        for _, folder in best_first[keep:] if keep else ():
            removed = folder.with_name(f".{folder.name}.removed")
            folder.rename(removed)  # so that one half removed is not taken for a checkpoint
            shutil.rmtree(removed, ignore_errors=True)

    def _not_written(self, final: Path, aside: Path, error: Exception) -> RunError:
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free / 2**30
        copies = 4 if self.ema is not None else 3  # the weights, Adam's two averages, and the weights' own
        needed = copies * sum(weight.nbytes for weight in self.optimizer.param_groups[0]["params"]) / 2**30
        before = [folder.name for _, folder in sorted(numbered(self.folder))]
        kept = f"the one before it, {before[-1]}, is whole" if before else "there is none before it"
        return RunError(
            f"{final} could not be written: {error}\n"
            f"It takes up to {needed:.2f} GiB, and {free:.2f} GiB are free there; {kept}. "
            "Make room, or set checkpoints_total_limit, and go on with resume_from_checkpoint = latest."
        )

    def _save_models(self, models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()  # accelerate is not to write them a second time
        if self.accelerator.is_main_process:
            if self.ema is not None:
                self.ema.save(Path(folder) / "unet_ema")
            for model in models:
                self.accelerator.unwrap_model(model).save_pretrained(Path(folder) / "unet")

    def _load_models(self, models: list[torch.nn.Module], folder: str) -> None:
        if self.ema is not None:
            self.ema.load(Path(folder) / "unet_ema")
        while models:  # popped, so that accelerate does not look for their weights
            model = self.accelerator.unwrap_model(models.pop())
            model.load_state_dict(UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict())


def clean_up(run_folder: Path) -> None:
    """Remove what a checkpoint that was being written or removed has left, when the run was killed."""
    for pattern in (".checkpoint-*.incomplete", ".checkpoint-*.given-up", ".checkpoint-*.removed"):
        for folder in run_folder.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _place(rank: int) -> str:
    return f"place_{rank}.pt"


def _read_place(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    return torch.load(checkpoint.folder / _place(rank), map_location="cpu", weights_only=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
