"""Saves checkpoints: the whole state of a run in a folder, complete or absent.

A checkpoint has the reference's layout (`unet`, `unet_ema`, and accelerate's files) and two more things: each rank's
position among the micro-batches with its RNG states, and `checkpoint.json`, with its files and its settings. With these
a run resumes bit for bit.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from sdnb.errors import RunError
from sdnb.run import folder as run_folder
from sdnb.train.checkpoint_folder import MANIFEST, identity, numbered
from sdnb.train.setup import Training

logger = logging.getLogger("sdnb")


class Checkpoints:
    """Saves the checkpoints of a run, and removes old ones."""

    def __init__(self, training: Training) -> None:
        self.training, self.accelerator, self.folder = training, training.accelerator, training.folder
        self.accelerator.register_save_state_pre_hook(self._save_models)

    def save(self, step: int) -> None:
        """Make `checkpoint-<step>`, then remove the oldest beyond `checkpoints_total_limit`. All ranks call it.

        Raises:
            RunError: if it cannot be written, such as on a full disk. Earlier checkpoints stay as they were.
        """
        final = self.folder / f"checkpoint-{step}"
        aside = self.folder / f".{final.name}.incomplete"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(aside, ignore_errors=True)
            self._remove_oldest(step)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(aside))
            torch.save(self.training.batches.state_dict(), aside / position_file(self.accelerator.process_index))
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
            "settings": identity(self.training.config, self.training.splits.train),
            "files": {str(path.relative_to(aside)): path.stat().st_size for path in files},
        }
        run_folder.write(aside / MANIFEST, manifest)
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
        weights = self.training.optimizer.param_groups[0]["params"]
        needed = copies * sum(weight.nbytes for weight in weights) / 2**30
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
                self.accelerator.unwrap_model(model).save_pretrained(Path(folder) / "unet")


def remove_incomplete(folder: Path) -> None:
    """Remove checkpoints in a run folder that were being written or removed when the run was killed."""
    for pattern in (".checkpoint-*.incomplete", ".checkpoint-*.given-up", ".checkpoint-*.removed"):
        for incomplete in folder.glob(pattern):
            shutil.rmtree(incomplete, ignore_errors=True)


def position_file(rank: int) -> str:
    """The file in a checkpoint with a rank's position among the micro-batches."""
    return f"place_{rank}.pt"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
