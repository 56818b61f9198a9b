"""Low-rank adaptation (LoRA, arXiv 2106.09685) of the UNet, as in diffusers' `train_text_to_image_lora.py`: its weights
are frozen, and beside each projection of its attention two small matrices are trained. PEFT makes and runs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

SCALES = (0.0, 0.5, 1.0)  # of the adapter, in the images of a complete run
_PROJECTIONS = ["to_k", "to_q", "to_v", "to_out.0"]
_FORMER_NAMES = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}  # of diffusers' files; PEFT's are on the right


def add_adapter(unet: UNet2DConditionModel, rank: int) -> None:
    """Freeze the UNet, and add an adapter of this rank, in float32. It draws random numbers: the first matrix starts
    normally distributed, with a standard deviation of 1/rank, and the second is zero."""
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=_PROJECTIONS)
    unet.add_adapter(config)
    cast_training_params(unet, torch.float32)


def save_adapter(unet: UNet2DConditionModel, file: Path) -> None:
    """Write the adapter's weights to a file that `load_lora_weights` of a pipeline reads."""
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(str(file.parent), unet_lora_layers=weights, weight_name=file.name)


def load_adapter(unet: UNet2DConditionModel, file: Path) -> None:
    """Give the UNet's adapter the weights that `save_adapter`, or the reference, has written. Raises ValueError if they
    are those of another one."""
    weights = _read(file)
    expected = {name: values.shape for name, values in get_peft_model_state_dict(unet).items()}
    if {name: values.shape for name, values in weights.items()} != expected:
        raise ValueError(f"{file} is of another adapter: another rank, or another model")
    set_peft_model_state_dict(unet, weights)


def merge_adapter(unet: UNet2DConditionModel, file: Path) -> set[str]:
    """Add what an adapter has learnt to the UNet's own weights: the product of its two matrices. Returns the names of
    these weights. Raises OSError, ValueError or AttributeError if the file is not that of an adapter of this UNet."""
    weights, merged = _read(file), set()
    for name, first in weights.items():
        if ".lora_A." in name:
            own = name.replace(".lora_A.", ".")
            unet.get_parameter(own).data += weights[name.replace(".lora_A.", ".lora_B.")] @ first
            merged.add(own)
    return merged


@contextmanager
def scaled(unet: UNet2DConditionModel, scale: float) -> Iterator[None]:
    """Within a `with`, the UNet's adapter counts by so much. Without an adapter, nothing changes."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.scale_layer(scale)
    try:
        yield
    finally:
        for layer in layers:
            layer.unscale_layer()


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter, with PEFT's names."""
    weights = {}
    for name, values in load_file(file).items():
        for former, now in _FORMER_NAMES.items():
            name = name.replace(former, now)
        weights[name.removeprefix("unet.")] = values
    return weights
