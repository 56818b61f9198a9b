"""What the figures of a run need to know about its model: parameters, and floating-point operations per image."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from sdnb.cache import computed_once
from sdnb.models.lora import add_adapter
from sdnb.models.pipeline import Parts, has_random_weights
from sdnb.settings.config import TrainConfig


def describe_model(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    """Parameters, FLOP per image, and whether the model started from random weights: the content of model.json."""
    configurations = [repr(part.config) for part in (parts.unet, parts.vae, parts.text_encoder)]
    architecture = [configurations, parts.tokenizer.model_max_length, torch.__version__, diffusers.__version__]
    key = [architecture, config.resolution, config.adapter_rank]
    return {
        "random_weights": has_random_weights(config),
        "parameters": parameter_counts(parts),
        "flop_per_image": computed_once(
            "flop", key, lambda: flop_per_image(parts, config.resolution, config.adapter_rank), config.cache_dir
        ),
    }


def parameter_counts(parts: Parts) -> dict[str, int]:
    """The parameters of the UNet, the VAE and the text encoder; those of the UNet's adapter apart, as `lora`."""
    counts = {part: getattr(parts, part).num_parameters() for part in ("unet", "vae", "text_encoder")}
    trained = parts.unet.num_parameters(only_trainable=True)
    return counts if trained == counts["unet"] else {**counts, "unet": counts["unet"] - trained, "lora": trained}


def flop_per_image(parts: Parts, resolution: int, adapter_rank: int | None = None) -> dict[str, float]:
    """Floating-point operations per training image, counted on the meta device, which needs no memory. `unet_training`
    is forward and backward. With an adapter, the backward pass computes no gradients of the frozen weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(parts.unet.config)
        if adapter_rank:
            add_adapter(unet, adapter_rank)
        vae = AutoencoderKL.from_config(parts.vae.config)
        text_encoder = CLIPTextModel(parts.text_encoder.config)
        image = torch.empty(1, 3, resolution, resolution)
        token_ids = torch.empty(1, parts.tokenizer.model_max_length, dtype=torch.long)

        with torch.no_grad():
            vae_encoder, latents = _flop(lambda: vae.encode(image).latent_dist.mean)
            text, encoder_hidden_states = _flop(lambda: text_encoder(token_ids)[0])
        timesteps = torch.empty(1, dtype=torch.long)
        forward, prediction = _flop(lambda: unet(latents, timesteps, encoder_hidden_states, return_dict=False)[0])
        backward, _ = _flop(prediction.sum().backward)
    return dict(unet_forward=forward, unet_training=forward + backward, vae_encoder=vae_encoder, text_encoder=text)


def _flop(function: Callable[[], Any]) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return float(counter.get_total_flops()), result
