"""The embedded models, which need no download: a small trained one, and others with random weights from a fixed seed.
Each is built into a folder in the cache, which is then read like any other model."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from sdnb.cache import cache_root, made_once
from sdnb.compat import MERGES, VOCABULARY, clip_tokenizer, read_vocabulary, write_vocabulary

SEED = 0
TRAINED_WEIGHTS = Path(__file__).parent / "tiny"  # with the vocabulary, which all embedded models share
PARTS = ("vae", "unet", "text_encoder")  # that have weights
FORMAT = 3  # of the folder: increased when its content changes

# The noise schedule of Stable Diffusion v1.
_SCHEDULER = dict(
    num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip

# Images of 64×64, latents of 16×16.
TINY = dict(
    vae=dict(
        block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=1.0,  # random weights give latents of about unit variance
    ),
    text_encoder=dict(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, projection_dim=64,
        max_position_embeddings=24,
    ),
    unet=dict(
        block_out_channels=(64, 128, 192), layers_per_block=1, attention_head_dim=4, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), sample_size=16,
    ),
)  # fmt: skip

# The architecture of CompVis/stable-diffusion-v1-4, as the configurations on its hub page give it.
SD_V1_4 = dict(
    vae=dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ),
    text_encoder=dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        max_position_embeddings=77, vocab_size=49408,
    ),
    unet=dict(
        block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, attention_head_dim=8, cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, sample_size=64,
    ),
)  # fmt: skip

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {"tiny": TINY, "tiny-random": TINY, "sd-v1-4-random": SD_V1_4}
TRAINED = ("tiny",)  # the others have random weights


def folder(name: str, cache_dir: str | None = None) -> Path:
    """The folder of the embedded model `name`, a pipeline as StableDiffusionPipeline saves it, built once and
    cached."""
    architecture, trained = ARCHITECTURES[name], name in TRAINED
    made_with = [FORMAT, architecture, _SCHEDULER, SEED, _digest(TRAINED_WEIGHTS, trained)]
    made_from = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:8]
    return made_once(
        cache_root(cache_dir) / "models" / f"{name}-{made_from}", lambda target: _build(architecture, trained, target)
    )


@functools.cache
def _digest(folder: Path, with_weights: bool) -> str:
    digest = hashlib.sha256()
    for file in (VOCABULARY, MERGES, *(f"{part}.safetensors" for part in PARTS if with_weights)):
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()


def _build(architecture: dict[str, dict[str, Any]], trained: bool, target: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = architecture["text_encoder"]
    vocabulary = read_vocabulary(TRAINED_WEIGHTS)
    tokenizer = clip_tokenizer(*vocabulary, text["max_position_embeddings"])
    text_config = CLIPTextConfig(
        **{"vocab_size": len(tokenizer), **text},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
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
        if trained:
            _load_weights(dict(vae=vae, unet=unet, text_encoder=text_encoder))
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(**_SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
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
