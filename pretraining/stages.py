"""The training of the embedded model, from random weights to the shipped ones: first the VAE, then the UNet together
with the text encoder.

Each stage is a run with its own folder, records and figures. It runs in the calling process on one device. After an
interruption, it resumes at the same place.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from pretraining import captions
from pretraining.trainer import PRETRAINING, Training, check_used
from sdnb.compat import read_vocabulary, write_vocabulary
from sdnb.data.image_captions import ImageCaptions, first_caption, tokenize
from sdnb.launch.notebook import Show
from sdnb.models.embedded import portable
from sdnb.models.pipeline import assemble, load_parts, model_folder
from sdnb.places import runs_folder
from sdnb.report.run import Run
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.training.evaluation import HeldOutLoss, draw_samples, psnr
from sdnb.training.objective import draw_latents, draw_noise, draw_timesteps, loss_of, target_of

KL_WEIGHT = 1e-6  # the weight of an image's total divergence, relative to the mean error of its pixels
UNCAPTIONED = 0.1  # the share of images with an empty caption, for guidance (arXiv 2207.12598)
STYLED = 0.2  # the share of images in one of these styles
# For each style: how much of its colours an image keeps, and the colours that replace black and white. The page stays
# light in all of them. A dark page is the night style, which the model learns later, when it is fine-tuned.
STYLES = {
    "grey": (0.0, (0, 0, 0), (255, 255, 255)),
    "sepia": (0.0, (70, 45, 20), (255, 243, 214)),
    "pastel": (1.0, (128, 128, 128), (255, 255, 255)),
    "rose": (0.6, (64, 0, 32), (255, 214, 222)),
    "mint": (0.6, (0, 48, 48), (214, 245, 228)),
}


def train_vae(
    config: TrainConfig, vae_steps: int, vae_batch_size: int, vae_learning_rate: float, show: Show | None = None
) -> Run:
    """Train the VAE of the model that the settings name. The loss is L1 + 0.5 MSE + 1e-6 KL. Half of the images are
    recoloured.

    The VAE is saved in `vae/` in the run folder, with the scaling factor that makes the variance of the latents 1. The
    validation records also have the `psnr` of the held-out images, in dB.

    Args:
        config: the settings for the UNet. They apply to the VAE, too, unless another argument replaces them.
        show: as in `launch.launch`.

    Raises:
        SdnbError: if the settings, the data or the run folder cannot be used.
    """
    check_used(config)  # reports a mistake before the VAE trains for hours
    reproduce = _reproduce(
        config, vae_steps=vae_steps, vae_batch_size=vae_batch_size, vae_learning_rate=vae_learning_rate
    )
    config = with_data(config)
    config = config.updated(
        max_train_steps=vae_steps, train_batch_size=vae_batch_size, learning_rate=vae_learning_rate,
        snr_gamma=None, validation_prompts=None, output_dir=str(_folder(config) / "vae"),
    )  # fmt: skip
    training = Training(config, {"reproduce": reproduce})
    vae, device = training.parts.vae.requires_grad_(True).train(), training.device
    pixels, held_out = _pixels(training.splits.train), _pixels(training.splits.held_out).to(device)

    def loss() -> Tensor:
        batch = pixels[torch.randint(len(pixels), (config.train_batch_size,))]
        return _vae_losses(vae, _in_other_colours(batch).to(device), sample=True)[0].mean()

    def measure(step: int) -> None:
        parts = [_vae_losses(vae, batch, sample=False) for batch in held_out.split(config.train_batch_size)]
        losses, back = (torch.cat(part) for part in zip(*parts))
        spread = losses.std().item() / len(losses) ** 0.5
        record = dict(step=step, loss=losses.mean().item(), standard_error=spread, images=len(losses))
        files.append(training.folder / run_folder.VALIDATION, {**record, "psnr": psnr(held_out, back)})

    def save() -> None:
        latents = draw_latents(_all_moments(vae, pixels), 1.0)
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        vae.save_pretrained(training.folder / "vae")

    return training.run_through([vae], loss, measure, save, show)


def _vae_losses(vae: AutoencoderKL, pixels: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
    """The loss of each image, [batch], and the decoded images. The latents are a sample of the posterior, or its
    mode."""
    posterior = vae.encode(pixels).latent_dist
    back = vae.decode(posterior.sample() if sample else posterior.mode()).sample.float()
    difference = (back - pixels).flatten(1)
    return (difference.abs() + 0.5 * difference.square()).mean(1) + KL_WEIGHT * posterior.kl(), back


def _in_other_colours(pixels: Tensor) -> Tensor:
    """Recolour half of the images, [batch, 3, h, w]: permute their channels, invert half of these images, and move
    every channel towards a random level. OpenMoji has only 26 colours, but the VAE must encode others as well."""
    count = len(pixels)
    other = pixels[torch.arange(count)[:, None], torch.rand(count, 3).argsort(1)]
    other = torch.where(torch.rand(count, 1, 1, 1) < 0.5, -other, other)
    level, share = 2 * torch.rand(count, 3, 1, 1) - 1, 0.8 * torch.rand(count, 3, 1, 1)
    other = torch.lerp(other, level.expand_as(other), share.expand_as(other))
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, other, pixels)


def train_unet(config: TrainConfig, trained_vae: Run, show: Show | None = None) -> Run:
    """Train the UNet and the text encoder of the model that the settings name, on the latents of a trained VAE. They
    learn to predict noise, as in fine-tuning. One caption in ten is empty. One image in five has another style, for
    example "sun, sepia style", so that the model learns that a style keeps the subject. The pipeline is saved in the
    run folder, with the EMA weights.

    Args:
        trained_vae: the result of `train_vae`.
        show: as in `launch.launch`.

    Raises:
        SdnbError: if the settings, the data or the run folder cannot be used.
    """
    config = with_data(config).updated(output_dir=str(_folder(config) / "unet"))
    before = trained_vae.config
    training = Training(config, {"reproduce": trained_vae.environment["reproduce"], PRETRAINING: {
        "vae_steps": before.max_train_steps, "vae_batch_size": before.train_batch_size,
        "vae_learning_rate": before.learning_rate,
    }})  # fmt: skip
    parts, device, examples = training.parts, training.device, training.splits.train
    parts.vae = AutoencoderKL.from_pretrained(trained_vae.folder / "vae").to(device).requires_grad_(False)
    unet, text_encoder = parts.unet, parts.text_encoder.requires_grad_(True).train()
    scheduler, scaling_factor = parts.noise_scheduler, parts.vae.config.scaling_factor
    moments = _moments_in_styles(parts.vae, examples)
    named = [first_caption(caption) for caption in examples.captions]
    captions_of = [
        [caption if isinstance(caption, list) else [caption] for caption in examples.captions],
        *([[f"{name}, {style} style"] for name in named] for style in STYLES),
    ]
    distinct = sorted({caption for of_style in captions_of for captions in of_style for caption in captions} | {""})
    ids_of = dict(zip(distinct, tokenize(parts.tokenizer, distinct)))

    def one_of(captions: Sequence[str]) -> Tensor:
        uncaptioned = torch.rand(()) < UNCAPTIONED
        return ids_of["" if uncaptioned else captions[torch.randint(len(captions), ())]]

    def loss() -> Tensor:
        batch = (config.train_batch_size,)
        views, styles = torch.randint(moments.shape[1], batch), torch.randint(1, moments.shape[0], batch)
        styles[torch.rand(batch) >= STYLED] = 0
        shown = list(zip(styles.tolist(), (views % len(named)).tolist()))
        input_ids = torch.stack([one_of(captions_of[style][row]) for style, row in shown])
        latents = draw_latents(moments[styles.to(device), views.to(device)], scaling_factor)
        noise, added_noise = draw_noise(latents, config.noise_offset, config.input_perturbation)
        timesteps = draw_timesteps(scheduler, latents)
        noisy_latents = scheduler.add_noise(latents, added_noise, timesteps)
        encoder_hidden_states = text_encoder(input_ids.to(device))[0]
        prediction = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        target = target_of(scheduler, latents, noise, timesteps)
        return loss_of(prediction, target, scheduler, timesteps, config.snr_gamma)

    pipeline = assemble(config, parts)

    def measure(step: int) -> None:
        # Create a new one each time, because the text encoder changes.
        held_out_loss = HeldOutLoss(training.splits.held_out, parts, config.train_batch_size, device)
        files.append(training.folder / run_folder.VALIDATION, dict(step=step, **held_out_loss(unet)))
        if config.validation_prompts:
            draw_samples(
                pipeline, training.accelerator, training.folder, step, config.validation_prompts, config.resolution,
                seeds=[config.seed or 0], guidance_scale=config.validation_guidance_scale,
            )  # fmt: skip

    def save() -> None:
        pipeline.save_pretrained(training.folder)

    return training.run_through([unet, text_encoder], loss, measure, save, show)


def in_style(style: str, pixels: Tensor) -> Tensor:
    """Convert images, [batch, 3, h, w], to one of `STYLES`."""
    kept, black, white = STYLES[style]
    dark, light = (torch.tensor(colour).view(3, 1, 1) / 127.5 - 1 for colour in (black, white))
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # luma, ITU-R BT.601
    return torch.lerp(dark, light, (torch.lerp(grey, pixels, kept) + 1) / 2)


def export(run: Run, folder: Path) -> None:
    """Write the shipped part of a trained model: its weights in half precision, and its vocabulary."""
    parts = load_parts(run.config.updated(pretrained_model_name_or_path=str(run.folder)))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "unet", "text_encoder"):
        part = getattr(parts, name)
        weights = {portable(key): value.half().contiguous() for key, value in part.named_parameters()}
        metadata = {"scaling_factor": repr(part.config.scaling_factor)} if name == "vae" else None
        save_file(weights, folder / f"{name}.safetensors", metadata)
    write_vocabulary(folder, *read_vocabulary(Path(model_folder(run.config)) / "tokenizer"))


def _reproduce(config: TrainConfig, **vae_settings: float) -> list[str]:
    """The commands that repeat both stages."""
    settings = {name: value for name, value in config.model_dump(mode="json").items()
                if value is not None and name not in ("output_dir", "cache_dir")}  # fmt: skip
    parameters = shlex.quote(json.dumps({**settings, **vae_settings}, ensure_ascii=False))
    return [f"papermill pretraining/pretrain.ipynb out.ipynb -y {parameters}", "sdnb report out.ipynb"]


def with_data(config: TrainConfig) -> TrainConfig:
    """Replace the data set name `openmoji-pretraining`, if the settings have it, by the folder of this data set."""
    if config.dataset_name != captions.NAME:
        return config
    return config.updated(dataset_name=str(captions.folder(config.resolution, config.cache_dir)))


def _folder(config: TrainConfig) -> Path:
    return Path(config.output_dir or runs_folder() / "pretraining").expanduser().absolute()


def _pixels(examples: ImageCaptions) -> Tensor:
    """All views of a data set, [views, 3, resolution, resolution]."""
    return torch.stack([examples.pixels(view) for view in range(examples.views)])


def _moments_in_styles(vae: AutoencoderKL, examples: ImageCaptions) -> Tensor:
    """The moments of all views, first plain, then in each style: [1 + styles, views, …]."""
    pixels = _pixels(examples)
    return torch.stack([_all_moments(vae, pixels), *(_all_moments(vae, in_style(style, pixels)) for style in STYLES)])


@torch.no_grad()
def _all_moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return torch.cat([vae.encode(batch.to(vae.device)).latent_dist.parameters for batch in pixels.split(64)])
