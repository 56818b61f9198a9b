"""The embedded models, which need no download: a small trained one, and others with random weights from a fixed seed.
Each is built into a folder in the cache, which is then read like any other model."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from sdnb.cache import cache_root, made_once
from sdnb.compat import MERGES, VOCABULARY, clip_tokenizer, read_vocabulary, write_vocabulary

SEED = 0
TRAINED_WEIGHTS = Path(__file__).parent / "tiny"  # with the vocabulary, which all embedded models share
FORMAT = 3  # of the folder: increased when its content changes

_SCHEDULER, TINY, SD_V1_4, SD_V2_1 = yaml.safe_load(Path(__file__).with_name("architectures.yaml").read_text()).values()
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": TINY, "tiny-random": TINY, "sd-v1-4-random": SD_V1_4, "sd-v2-1-random": SD_V2_1,
}  # fmt: skip
TRAINED = ("tiny",)  # the others have random weights


def folder(name: str, cache_dir: str | None = None) -> Path:
    """The folder of an embedded model, a pipeline as StableDiffusionPipeline saves it, built once and cached."""
    architecture, trained = ARCHITECTURES[name], name in TRAINED
    made_with = [FORMAT, architecture, _SCHEDULER, SEED, _digest(TRAINED_WEIGHTS, trained)]
    made_from = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:8]
    kept = cache_root(cache_dir) / "models" / f"{name}-{made_from}"
    return made_once(kept, lambda target: _build(architecture, trained, target))


@functools.cache
def _digest(folder: Path, with_weights: bool) -> str:
    digest = hashlib.sha256()
    weights = ("vae.safetensors", "unet.safetensors", "text_encoder.safetensors") if with_weights else ()
    for file in (VOCABULARY, MERGES, *weights):
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()


def _build(architecture: dict[str, dict[str, Any]], trained: bool, target: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = architecture["text_encoder"]
    vocabulary = read_vocabulary(TRAINED_WEIGHTS)
    tokenizer = clip_tokenizer(*vocabulary, text["max_position_embeddings"])
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = CLIPTextConfig(**{"vocab_size": len(tokenizer), **text, **special})
    generator = torch.default_generator  # torch.manual_seed would also seed the GPUs, which a run draws from
    with torch.random.fork_rng(devices=[]):
        generator.manual_seed(SEED)
        vae, unet = AutoencoderKL(**architecture["vae"]), UNet2DConditionModel(**architecture["unet"])
        text_encoder = CLIPTextModel(text_config)
        generator.manual_seed(SEED)  # transformers' versions draw in different ways
        for name, parameter in sorted(text_encoder.named_parameters()):
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
            else:
                torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        parts = dict(vae=vae, unet=unet, text_encoder=text_encoder)
        if trained:
            _load_weights(parts)
        others = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        scheduler = PNDMScheduler(**_SCHEDULER, **architecture.get("scheduler", {}))
        pipeline = StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler, **others)
    pipeline.save_pretrained(target)
    write_vocabulary(target / "tokenizer", *vocabulary)


def _load_weights(parts: dict[str, Any]) -> None:
    import torch
    from safetensors import safe_open

    for name, part in parts.items():
        with safe_open(TRAINED_WEIGHTS / f"{name}.safetensors", "pt") as file:
            stored = {portable(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if name == "vae":
                part.register_to_config(scaling_factor=float(file.metadata()["scaling_factor"]))
        with torch.no_grad():
            for key, parameter in part.named_parameters():
                parameter.copy_(stored[portable(key)])


def portable(key: str) -> str:
    """The name of a weight, without the prefix that only some versions of transformers use."""
    return key.removeprefix("text_model.")
