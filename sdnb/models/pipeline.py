"""The five parts of a Stable Diffusion pipeline: loaded, and assembled again to be saved."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from sdnb.errors import ModelError
from sdnb.machine.vendors import geglu_by_device
from sdnb.models import embedded
from sdnb.models.trainable import require_folder, require_trainable, require_trainable_class
from sdnb.settings.config import TrainConfig

# The log and the notebook have one progress bar only: that of the steps.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
geglu_by_device()


@dataclass
class Parts:
    """The parts that a run works with."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler


def has_random_weights(config: TrainConfig) -> bool:
    """Whether the model starts from random weights. Its images and its loss then say nothing about quality."""
    name = config.pretrained_model_name_or_path
    return name in embedded.ARCHITECTURES and name not in embedded.TRAINED


def model_folder(config: TrainConfig) -> str:
    """The folder to load from. An embedded model is built, and a model of the hub is downloaded, once. Raises
    ModelError if the model cannot be trained here, or the name is neither a folder nor a model of the hub."""
    name = config.pretrained_model_name_or_path
    if name in embedded.ARCHITECTURES:
        return str(embedded.folder(name, config.cache_dir))
    require_folder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        require_trainable(name, folder, config.variant)
        return str(folder)
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        near = difflib.get_close_matches(name, embedded.ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"embedded models: {', '.join(embedded.ARCHITECTURES)}"
        raise ModelError(f"model {name}: there is no such folder, and it is not a hub id (owner/name); {hint}")
    with _loading("pipeline", config):
        hub = dict(revision=config.revision, cache_dir=config.cache_dir)
        require_trainable_class(name, StableDiffusionPipeline.load_config(name, **hub))  # before all is downloaded
        downloaded = StableDiffusionPipeline.download(name, **hub, **_weights(config))
    require_trainable(name, Path(downloaded), config.variant)
    return downloaded


def load_parts(config: TrainConfig) -> Parts:
    """The model's parts on the CPU in float32. VAE and text encoder are frozen, the UNet is in training mode. Raises
    ModelError if a part is missing or cannot be loaded."""
    where = model_folder(config)
    text_encoder = _load(CLIPTextModel, "text_encoder", where, config, **_weights(config)).requires_grad_(False)
    tokenizer = _load(CLIPTokenizer, "tokenizer", where, config)
    # transformers makes an empty tokenizer of no files.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ModelError(f"model {config.pretrained_model_name_or_path}: its tokenizer has no vocabulary files")
    vae = _load(AutoencoderKL, "vae", where, config, **_weights(config)).requires_grad_(False)
    unet = _unet(where, config).train()
    return Parts(tokenizer, text_encoder, vae, unet, _load(DDPMScheduler, "scheduler", where, config))


def _unet(where: str, config: TrainConfig) -> UNet2DConditionModel:
    """The UNet to train. As in the reference, `variant` does not apply to it, and `non_ema_revision` applies only to
    it. If a folder has only the variant, that is loaded."""
    name = config.pretrained_model_name_or_path
    in_folder = name in embedded.ARCHITECTURES or Path(name).expanduser().is_dir()
    if in_folder or _ema_starts_with_unet(config):
        plain = (Path(where) / "unet" / SAFETENSORS_WEIGHTS_NAME).exists()
        weights = dict(use_safetensors=True) if plain else _weights(config)
        return _load(UNet2DConditionModel, "unet", where, config, **weights)
    hub = dict(revision=config.non_ema_revision or config.revision, cache_dir=config.cache_dir, use_safetensors=True)
    return _load(UNet2DConditionModel, "unet", name, config, **hub)


def start_of_ema(config: TrainConfig, parts: Parts) -> UNet2DConditionModel:
    """The UNet whose weights the EMA starts with: that of `revision` and `variant`, as in the reference. Raises
    ModelError if it cannot be loaded."""
    if _ema_starts_with_unet(config):
        return parts.unet
    return _load(UNet2DConditionModel, "unet", model_folder(config), config, **_weights(config))


def _ema_starts_with_unet(config: TrainConfig) -> bool:
    return config.variant is None and config.non_ema_revision in (None, config.revision)


def _weights(config: TrainConfig) -> dict[str, Any]:
    return dict(variant=config.variant, use_safetensors=True)


def _load(cls: type, part: str, where: str, config: TrainConfig, **arguments: Any) -> Any:
    with _loading(part, config):
        loaded = cls.from_pretrained(where, subfolder=part, **arguments)
    return loaded.float() if isinstance(loaded, torch.nn.Module) else loaded


@contextmanager
def _loading(part: str, config: TrainConfig) -> Iterator[None]:
    """Says as a ModelError what the libraries raise."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"model {config.pretrained_model_name_or_path}: its {part} cannot be loaded: {first_line}\n"
            "Weights must be safetensors files. Without a network, give the folder of a downloaded model, "
            f"or an embedded model: {', '.join(embedded.ARCHITECTURES)}."
        ) from error


def assemble(config: TrainConfig, parts: Parts) -> StableDiffusionPipeline:
    """The base model's pipeline with these parts, as the reference saves it. Raises ModelError if another part of it,
    such as a safety checker, cannot be loaded."""
    own = dict(tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, vae=parts.vae, unet=parts.unet)
    with _loading("pipeline", config):
        return StableDiffusionPipeline.from_pretrained(model_folder(config), **own, **_weights(config))
