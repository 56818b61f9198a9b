"""The five parts of a Stable Diffusion pipeline: loaded, counted, and saved again."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTokenizer

from sdnb.cache import computed_once
from sdnb.errors import ModelError
from sdnb.models import embedded
from sdnb.settings.config import TrainConfig

# The log and the notebook have one progress bar: the training's.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

FOLDERS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


@dataclass
class Parts:
    """The parts that a training works with."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler


def has_random_weights(config: TrainConfig) -> bool:
    """Whether the model starts from random weights, so that its pictures and its loss say nothing about quality."""
    name = config.pretrained_model_name_or_path
    return name in embedded.ARCHITECTURES and name not in embedded.TRAINED


def source(config: TrainConfig) -> str:
    """The folder to load from: an embedded model is built into one, and a model of the hub is downloaded, once.

    Raises:
        ModelError: if a folder lacks a part, or a name is neither a folder nor a model of the hub.
    """
    name = config.pretrained_model_name_or_path
    if name in embedded.ARCHITECTURES:
        return str(embedded.folder(name, config.cache_dir))
    folder = Path(name).expanduser()
    if folder.is_dir():
        missing = [part for part in FOLDERS if not (folder / part).is_dir()]
        if missing:
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise ModelError(
                f"model {name}: the folder has no {', '.join(f'{part}/' for part in missing)}; there is: {there}. "
                "It must be a pipeline as StableDiffusionPipeline.save_pretrained writes it."
            )
        return str(folder)
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        near = difflib.get_close_matches(name, embedded.ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"embedded are: {', '.join(embedded.ARCHITECTURES)}"
        raise ModelError(f"model {name}: there is no such folder, and it is no hub id (owner/name); {hint}")
    try:
        return StableDiffusionPipeline.download(
            name, revision=config.revision, cache_dir=config.cache_dir, **_weights(config)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_be_loaded(config, "pipeline", error) from error


def load(config: TrainConfig) -> Parts:
    """The model's parts on the CPU in float32; VAE and text encoder frozen, the UNet in training mode.

    Raises:
        ModelError: if the model, or a part of it, cannot be had.
    """
    where = source(config)
    text_encoder = _load(CLIPTextModel, "text_encoder", where, config, **_weights(config)).requires_grad_(False)
    tokenizer = _load(CLIPTokenizer, "tokenizer", where, config)
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise ModelError(f"model {config.pretrained_model_name_or_path}: its tokenizer has no vocabulary files")
    return Parts(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=_load(AutoencoderKL, "vae", where, config, **_weights(config)).requires_grad_(False),
        unet=_unet(where, config).train(),
        noise_scheduler=_load(DDPMScheduler, "scheduler", where, config),
    )


def _unet(where: str, config: TrainConfig) -> UNet2DConditionModel:
    """The UNet to train: as in the reference, `variant` does not apply to it, and `non_ema_revision` applies only to
    it. A folder that has the variant alone gives that."""
    if config.variant is None and config.non_ema_revision in (None, config.revision):
        return _load(UNet2DConditionModel, "unet", where, config, use_safetensors=True)
    name = config.pretrained_model_name_or_path
    if name in embedded.ARCHITECTURES or Path(name).expanduser().is_dir():
        plain = (Path(where) / "unet" / SAFETENSORS_WEIGHTS_NAME).exists()
        weights = dict(use_safetensors=True) if plain else _weights(config)
        return _load(UNet2DConditionModel, "unet", where, config, **weights)
    revision = config.non_ema_revision or config.revision
    hub = dict(revision=revision, cache_dir=config.cache_dir, use_safetensors=True)
    return _load(UNet2DConditionModel, "unet", name, config, **hub)


def start_of_average(config: TrainConfig, parts: Parts) -> UNet2DConditionModel:
    """What the average of the UNet's weights begins with: the UNet of `revision` and `variant`, as in the reference.

    Raises:
        ModelError: if that cannot be had.
    """
    if config.variant is None and config.non_ema_revision in (None, config.revision):
        return parts.unet
    return _load(UNet2DConditionModel, "unet", source(config), config, **_weights(config))


def _weights(config: TrainConfig) -> dict[str, Any]:
    return dict(variant=config.variant, use_safetensors=True)


def _load(cls: type, part: str, where: str, config: TrainConfig, **arguments: Any) -> Any:
    try:
        loaded = cls.from_pretrained(where, subfolder=part, **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_be_loaded(config, part, error) from error
    return loaded.float() if isinstance(loaded, torch.nn.Module) else loaded


def _cannot_be_loaded(config: TrainConfig, part: str, error: Exception) -> ModelError:
    return ModelError(
        f"model {config.pretrained_model_name_or_path}: its {part} cannot be loaded: {_first_line(error)}\n"
        "Weights must be safetensors files. Without a network, give the folder of a downloaded model, "
        f"or an embedded one: {', '.join(embedded.ARCHITECTURES)}."
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def pipeline(config: TrainConfig, parts: Parts) -> StableDiffusionPipeline:
    """The base model's pipeline around these parts, as the reference puts it together to save it.

    Raises:
        ModelError: if something else that the base model's pipeline names, such as a safety checker, cannot be had.
    """
    own = dict(tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, vae=parts.vae, unet=parts.unet)
    try:
        return StableDiffusionPipeline.from_pretrained(source(config), **own, **_weights(config))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_be_loaded(config, "pipeline", error) from error


def flop_per_image(parts: Parts, resolution: int) -> dict[str, float]:
    """Floating-point operations per training picture, counted on the meta device, so that no memory is needed.

    Returns:
        `unet_forward`, `unet_training` (forward and backward), `vae_encoder` and `text_encoder`, in FLOP.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(parts.unet.config)
        vae = AutoencoderKL.from_config(parts.vae.config)
        text_encoder = CLIPTextModel(parts.text_encoder.config)
        picture = torch.empty(1, 3, resolution, resolution)
        token_ids = torch.empty(1, parts.tokenizer.model_max_length, dtype=torch.long)

        with torch.no_grad():
            vae_encoder, latents = _flop(lambda: vae.encode(picture).latent_dist.mean)
            text, encoder_hidden_states = _flop(lambda: text_encoder(token_ids)[0])
        timesteps = torch.empty(1, dtype=torch.long)
        forward, prediction = _flop(lambda: unet(latents, timesteps, encoder_hidden_states, return_dict=False)[0])
        backward, _ = _flop(prediction.sum().backward)
    return dict(unet_forward=forward, unet_training=forward + backward, vae_encoder=vae_encoder, text_encoder=text)


def _flop(function: Callable[[], Any]) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return float(counter.get_total_flops()), result


def parameter_counts(parts: Parts) -> dict[str, int]:
    """The parameters of the UNet, the VAE and the text encoder."""
    return {
        part: sum(parameter.numel() for parameter in getattr(parts, part).parameters())
        for part in ("unet", "vae", "text_encoder")
    }


def describe(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    """What the figures of a run need to know about its model: parameters, FLOP per picture, and whether its weights
    were random to begin with."""
    configurations = [repr(part.config) for part in (parts.unet, parts.vae, parts.text_encoder)]
    architecture = [configurations, parts.tokenizer.model_max_length, torch.__version__, diffusers.__version__]
    return {
        "random_weights": has_random_weights(config),
        "parameters": parameter_counts(parts),
        "flop_per_image": computed_once(
            "flop",
            [architecture, config.resolution],
            lambda: flop_per_image(parts, config.resolution),
            config.cache_dir,
        ),
    }
