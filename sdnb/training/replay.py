"""Runs single steps of a run again, from its checkpoints: what a stranger can check of a training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdnb.errors import RunError
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import IDENTIFIED_BY_DIGEST
from sdnb.training.checkpoint_folder import Checkpoint, manifest_of
from sdnb.training.checkpoints import Checkpoints, load
from sdnb.training.evaluation import HeldOutLoss
from sdnb.training.loop import train_step
from sdnb.training.setup import Training, build, start

RESTORED = "restored.jsonl"  # in the scratch folder: what each checkpoint's optimizer remembers


def replay(config: TrainConfig, source: str, intervals: Sequence[tuple[int, int]], measured_at: Sequence[int]) -> None:
    """Run steps of the run in `source` again, on all its ranks: for each interval, from the checkpoint of its first
    number to the step of its second; from 0, from the beginning. Rank 0 records them in the run folder of `config`, and
    the held-out losses of the steps in `measured_at`. Raises RunError if a checkpoint cannot be read."""
    accelerator = start(config)
    training = build(config, accelerator)
    Checkpoints(training)  # loads the models with the rest of the state
    held_out = _held_out_loss(training)

    def measure() -> None:
        if held_out is not None and training.step in measured_at:
            with accelerator.autocast():
                measured = held_out(accelerator.unwrap_model(training.unet))
            files.append(training.folder / run_folder.VALIDATION, dict(step=training.step, **measured))
        accelerator.wait_for_everyone()

    for begin, end in sorted(intervals):
        if begin:
            if problem := load(training, _checkpoint(config, Path(source) / f"checkpoint-{begin}", begin)):
                raise RunError(problem)
            if accelerator.is_main_process:
                counts = {int(state["step"]) for state in training.optimizer.state.values() if "step" in state}
                restored = dict(step=begin, optimizer_steps=max(counts, default=0), moment=training.second_moment)
                files.append(training.folder / RESTORED, restored)
        training.step = begin
        measure()
        while training.step < end:
            training.clock.restart()
            training.stats.restart()
            record: dict[str, Any] = train_step(training)
            if accelerator.is_main_process:
                files.append(training.folder / run_folder.STEPS, record)
            measure()


def _checkpoint(config: TrainConfig, folder: Path, step: int) -> Checkpoint:
    """A checkpoint, as if it had been made where the model and the data lie here."""
    manifest = manifest_of(folder)
    if manifest is not None:
        here = {name: value for name, value in config.trajectory().items() if name in IDENTIFIED_BY_DIGEST}
        manifest = {**manifest, "settings": {**manifest["settings"], **here}}
    return Checkpoint(folder, step, manifest)


def _held_out_loss(training: Training) -> HeldOutLoss | None:
    config, examples = training.config, training.splits.held_out
    if not config.validation_loss_steps or examples is None or not training.accelerator.is_main_process:
        return None
    return HeldOutLoss(examples, training.parts, config.train_batch_size, training.accelerator.device)
