"""Resumes a run from a checkpoint: bit for bit from sdnb's own, from the start of the epoch from the reference's."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import SCALER_NAME
from diffusers import UNet2DConditionModel

from sdnb.errors import RunError
from sdnb.settings.fields import DataSettings
from sdnb.train.checkpoint_folder import Checkpoint, FoundCheckpoints, differences
from sdnb.train.checkpoints import position_file
from sdnb.train.setup import Training

logger = logging.getLogger("sdnb")

# If one of these has changed, a position among the micro-batches is meaningless.
_DECIDE_ORDER = {
    *DataSettings.model_fields, "train_batch_size", "gradient_accumulation_steps", "whole_steps", "num_processes",
    "the data",
}  # fmt: skip


def resume(training: Training, found: FoundCheckpoints) -> int:
    """Load the first checkpoint that all ranks can read.

    Returns:
        Its step; 0 if there are no checkpoints.

    Raises:
        RunError: if there are checkpoints, but none can be read.
    """
    problems = list(found.rejected)
    for problem in problems:
        logger.warning("skipped: %s", problem)
    for checkpoint in found.usable:
        problem = _load(training, checkpoint)
        if problem is None:
            logger.info("resuming after step %d, from %s", checkpoint.step, checkpoint.folder)
            return checkpoint.step
        logger.warning("skipped: %s", problem)
        problems.append(problem)
    if problems:
        raise RunError("\n".join(["no checkpoint can be used", *problems]))
    return 0


def _load(training: Training, checkpoint: Checkpoint) -> str | None:
    """The problem with the checkpoint, on this rank or another; None if it is loaded."""
    problem, accelerator = None, training.accelerator
    try:
        _load_state(training, checkpoint.folder)
        _compute_as_now(training.optimizer)
        _restore_position(training, checkpoint)
    except Exception as error:  # torch, safetensors, pickle and json each raise their own for a damaged file
        problem = f"{checkpoint.folder}: unreadable: {type(error).__name__}: {error}"
    failed = torch.tensor(problem is not None, device=accelerator.device, dtype=torch.int32)
    if int(accelerator.reduce(failed, reduction="sum")):
        return problem or f"{checkpoint.folder}: unreadable for another rank"
    return None


def _load_state(training: Training, folder: Path) -> None:
    accelerator = training.accelerator
    scaler = accelerator.scaler
    if not (folder / SCALER_NAME).exists():  # made in another precision: accelerate would look for it
        accelerator.scaler = None

    def load_models(models: list[torch.nn.Module], folder: str) -> None:
        if training.ema is not None:
            training.ema.load(Path(folder) / "unet_ema")
        while models:  # removed, so that accelerate does not look for their weights
            model = accelerator.unwrap_model(models.pop())
            model.load_state_dict(UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict())

    hook = accelerator.register_load_state_pre_hook(load_models)
    try:
        accelerator.load_state(str(folder))
    finally:
        hook.remove()
        accelerator.scaler = scaler


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
                state[name] = values.to(weights.device if defaults.get("fused") else "cpu")
            elif values.shape == weights.shape and values.stride() != weights.stride():
                state[name] = torch.empty_like(weights, dtype=values.dtype).copy_(values)


def _restore_position(training: Training, checkpoint: Checkpoint) -> None:
    examples, batches = training.splits.train, training.batches
    if checkpoint.manifest is None:
        batches.epoch = int(checkpoint.step // training.config.epoch(len(examples)).steps)
        logger.warning("the epoch starts again, in another order: %s does not contain its position", checkpoint.folder)
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
    if changed.keys() & _DECIDE_ORDER:
        batches.epoch = _read_position(checkpoint, 0)["epoch"]
        logger.warning("the epoch starts again, in another order: a changed setting affects the order")
    else:
        batches.load_state_dict(_read_position(checkpoint, training.accelerator.process_index))


def _apply_settings(training: Training) -> None:
    """Set the optimizer and the schedule to the current settings again: loading has replaced them by earlier ones."""
    optimizer, schedule = training.optimizer, training.schedule.scheduler
    schedule.base_lrs = [training.config.peak_learning_rate]
    for group in optimizer.param_groups:
        group.update({name: optimizer.defaults[name] for name in ("betas", "eps", "weight_decay")})
        group["lr"] = training.config.peak_learning_rate * schedule.lr_lambdas[0](schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def _read_position(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    return torch.load(checkpoint.folder / position_file(rank), map_location="cpu", weights_only=True)
