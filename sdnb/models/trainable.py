"""Refuses a model that the training step cannot use, before anything is loaded or made."""

import json
from pathlib import Path
from typing import Any

from sdnb.errors import ModelError

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # the latter has the same parts
_CLASSES = {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
_PARTS = ("tokenizer", "scheduler", *_CLASSES)
_SINGLE_FILES = (".safetensors", ".ckpt")
# The UNet's inputs besides latents, timesteps and the caption. SDXL, unCLIP and others have them.
_ADDED_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim")


def require_folder(name: str) -> None:
    """Raise ModelError if `name` is a file, such as a checkpoint of another program."""
    file = Path(name).expanduser()
    if not file.is_file():
        return
    if file.suffix not in _SINGLE_FILES:
        raise ModelError(f"model {name}: is a file; give the folder of a pipeline")
    raise ModelError(
        f"model {name}: is a single file; make it a folder once, and give that: python -c 'from diffusers import "
        f'StableDiffusionPipeline as P; P.from_single_file("{file}").save_pretrained("{file.stem}")\''
    )


def require_trainable_class(name: str, index: dict[str, Any]) -> None:
    """Raise ModelError if model_index.json is not that of a pipeline which the reference trains."""
    made_for = index.get("_class_name")
    if made_for not in _PIPELINES:
        raise ModelError(f"model {name}: is a {made_for}; only models of StableDiffusionPipeline can be trained here")
    for part, wanted in _CLASSES.items():
        _, found = index.get(part) or (None, wanted)
        if found != wanted:
            raise ModelError(f"model {name}: its {part} is a {found}; only {wanted} can be trained here")


def require_trainable(name: str, folder: Path, variant: str | None) -> None:
    """Raise ModelError if a pipeline's folder lacks a part that it names, or its UNet needs other inputs than noisy
    latents, timesteps and captions."""
    index = _read(name, folder / "model_index.json")
    require_trainable_class(name, index)
    named = [part for part, value in index.items() if isinstance(value, list) and value[0] is not None]
    if missing := [part for part in dict.fromkeys([*_PARTS, *named]) if not (folder / part).is_dir()]:
        there = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise ModelError(
            f"model {name}: the folder has no {', '.join(f'{part}/' for part in missing)}, which its model_index.json "
            f"names; it contains: {there}. Give the whole folder, as StableDiffusionPipeline.save_pretrained writes it."
        )
    unet, vae, text_encoder = (_read(name, folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    if added := [f"{key} = {unet[key]}" for key in _ADDED_INPUTS if unet.get(key)]:
        raise ModelError(f"model {name}: its UNet needs inputs that the training does not have: {', '.join(added)}")
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        raise ModelError(
            f"model {name}: its UNet has {channels} input channels, but the VAE's latents have {latents}: a model for "
            "inpainting, or another task, cannot be trained here"
        )
    width, needed = text_encoder.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
    if isinstance(needed, int) and width != needed:
        raise ModelError(f"model {name}: its UNet takes captions {needed} wide, but its text_encoder gives {width}")
    if variant is None:
        _require_plain_weights(name, folder)


def _require_plain_weights(name: str, folder: Path) -> None:
    # `text_encoder/model.fp16.safetensors` is of the variant fp16. The UNet to train may be of any.
    for part in ("vae", "text_encoder"):
        files = [path.name.split(".") for path in (folder / part).glob("*.safetensors")]
        variants = sorted({middle for _, *middles, _ in files for middle in middles if not middle.isdigit()})
        if variants and all(len(file) > 2 for file in files):
            raise ModelError(f"model {name}: its {part} has only weights of a variant: set variant = {variants[0]}")


def _read(name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"model {name}: the folder has no {path.parent.name}/{path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name}: {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"model {name}: {path} is not a JSON object")
    return content
