"""What the saved weights of a run tell of its training: how good they are, and where they went."""

import math
from collections import Counter
from copy import deepcopy

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError

from sdnb.certifying.quantities import AVERAGED, ROUNDED, SAVED, UNMOVED, recorded_quantities
from sdnb.data.loading import load_data
from sdnb.errors import RunError
from sdnb.machine.device_kind import HOST
from sdnb.models.lora import merge_adapter
from sdnb.models.pipeline import load_parts
from sdnb.run.folder import ADAPTER, RunFolder
from sdnb.training.evaluation import HeldOutLoss

_SAME_WEIGHTS = 5e-5  # relative, of their held-out losses


def quantities_of(run: RunFolder, steps: int) -> dict[str, float]:
    """What was recorded in the first steps of a run, and what its saved weights show if it ended there. A quantity that
    the run did not record is absent."""
    found = recorded_quantities(run, steps)
    if len(run.steps) != steps or not run.summary:
        return found
    found |= _saved(run)
    last = found.get(f"held-out loss after step {steps}")
    if run.config.use_ema and last and SAVED in found:
        found[AVERAGED] = float(abs(found[SAVED] / last - 1) > _SAME_WEIGHTS)
    return found


def _saved(run: RunFolder) -> dict[str, float]:
    """Of the saved UNet, in float32 on the CPU: its held-out loss, how far each block is from where it began, and how
    its weights are rounded. Raises SdnbError if the model or the data that it began with is not here."""
    parts, data = load_parts(run.config), load_data(run.config)
    if run.config.prediction_type is not None:
        parts.noise_scheduler.register_to_config(prediction_type=run.config.prediction_type)
    saved, trained = _saved_unet(run, parts.unet)
    moved, squares, unmoved, rounded = 0, Counter[str](), 0, Counter[torch.dtype]()
    ends = dict(saved.named_parameters())
    for name, begin in parts.unet.named_parameters():
        if name not in trained:
            continue
        end = ends[name].detach()
        change = end - begin.detach()
        squares[_block_of(name)] += change.double().square().sum().item()
        has_moved = change != 0
        moved += int(has_moved.sum())
        unmoved += not has_moved.any()
        for dtype in (torch.float16, torch.bfloat16):
            rounded[dtype] += int((has_moved & (end == end.to(dtype))).sum())
    found = {f"distance of {block}": math.sqrt(square) for block, square in squares.items()}
    found[UNMOVED] = float(unmoved)
    found[ROUNDED] = max(rounded.values()) / max(1, moved)
    if data.held_out is not None:
        held_out = HeldOutLoss(data.held_out, parts, run.config.train_batch_size, torch.device(HOST))
        found[SAVED] = held_out(saved)["loss"]
    return found


def _saved_unet(run: RunFolder, begun: UNet2DConditionModel) -> tuple[UNet2DConditionModel, set[str]]:
    """The UNet as the run saved it, and the names of the weights that were trained. Raises RunError if it cannot be
    loaded."""
    try:
        if run.config.lora:
            saved = deepcopy(begun)
            return saved, merge_adapter(saved, run.folder / ADAPTER)
        saved = UNet2DConditionModel.from_pretrained(run.folder, subfolder="unet", use_safetensors=True)
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, SafetensorError) as error:
        raise RunError(f"{run.folder}: its saved weights cannot be loaded: {str(error).splitlines()[0]}") from None
    return saved, {name for name, _ in saved.named_parameters()}


def _block_of(parameter: str) -> str:
    """The block of the UNet that a parameter belongs to, such as `down_blocks.1`, `mid_block` or `conv_in`."""
    first, second, *_ = parameter.split(".")
    return f"{first}.{second}" if first.endswith("_blocks") else first
