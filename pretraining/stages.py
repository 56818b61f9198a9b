"""How the embedded model was trained, from random weights to what ships: the VAE, then the UNet with the text encoder.

Each of the two is a run like any other, with its own folder, records and figures. It runs in the process that calls it,
on one device, and goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from pretraining.trainer import Training, check_heeded
from sdnb.compat import read_vocabulary, write_vocabulary
from sdnb.data import image_captions as data
from sdnb.launch.notebook import Show
from sdnb.machine.environment import PROJECT
from sdnb.models import pipeline as models
from sdnb.models.embedded import portable
from sdnb.report.run import PART_OF, PRETRAINING, Run
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.train.evaluation import HeldOutLoss, draw_samples, psnr
from sdnb.train.objective import draw_latents, draw_noise, draw_timesteps, loss_of, target_of

KL_WEIGHT = 1e-6  # of a picture's whole divergence, against the mean error of its pixels
UNCAPTIONED = 0.1  # the share of pictures that are shown without a caption, for guidance (arXiv 2207.12598)
STYLED = 0.2  # the share of pictures that are shown in one of these styles
# How much of its colours a picture keeps, and what black and white become. Paper stays light: by night
# it is dark, which is what the main training has to learn.
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
    """Train the VAE of the model that the settings name: L1 + 0.5 MSE + 1e-6 KL, half of the pictures in other colours.

    The run folder gets the VAE, in `vae/`, with the scaling factor that makes the latents' variance 1. The validation
    records have, besides the loss, the `psnr` of the held-out pictures in dB.

    Args:
        config: the settings of the UNet's training; of them the VAE's has those that are not given here.
        show: as in `launch.launch`.

    Raises:
        SdnbError: if the settings, the data or the run folder cannot be used.
    """
    check_heeded(config)  # before hours are spent on the VAE
    config = config.updated(
        max_train_steps=vae_steps, train_batch_size=vae_batch_size, learning_rate=vae_learning_rate,
        snr_gamma=None, validation_prompts=None, output_dir=str(_folder(config) / "vae"),
    )  # fmt: skip
    training = Training(config, {PART_OF: "a pretraining"})
    vae, device = training.parts.vae.requires_grad_(True).train(), training.device
    pixels, held_out = _pixels(training.splits.train), _pixels(training.splits.held_out).to(device)

    def loss() -> Tensor:
        batch = pixels[torch.randint(len(pixels), (config.train_batch_size,))]
        return _vae_losses(vae, _in_other_colours(batch).to(device), sample=True)[0].mean()

    def measure(step: int) -> None:
        parts = [_vae_losses(vae, batch, sample=False) for batch in held_out.split(config.train_batch_size)]
        losses, back = (torch.cat(part) for part in zip(*parts))
        spread = losses.std().item() / len(losses) ** 0.5
        record = dict(step=step, loss=losses.mean().item(), standard_error=spread, pictures=len(losses))
        run_folder.append(training.folder / run_folder.VALIDATION, {**record, "psnr": psnr(held_out, back)})

    def save() -> None:
        latents = draw_latents(_all_moments(vae, pixels), 1.0)
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        vae.save_pretrained(training.folder / "vae")

    return training.run_through([vae], loss, measure, save, show)


def _vae_losses(vae: AutoencoderKL, pixels: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
    """The loss of each picture, [batch], and the pictures as they come back, from the posterior's draw or its mode."""
    posterior = vae.encode(pixels).latent_dist
    back = vae.decode(posterior.sample() if sample else posterior.mode()).sample.float()
    difference = (back - pixels).flatten(1)
    return (difference.abs() + 0.5 * difference.square()).mean(1) + KL_WEIGHT * posterior.kl(), back


def _in_other_colours(pixels: Tensor) -> Tensor:
    """Half of the pictures, [batch, 3, h, w], with their channels exchanged, half of these inverted, and every channel
    drawn towards a level of its own: OpenMoji has but 26 colours, and a VAE that saw no others would know no others."""
    count = len(pixels)
    other = pixels[torch.arange(count)[:, None], torch.rand(count, 3).argsort(1)]
    other = torch.where(torch.rand(count, 1, 1, 1) < 0.5, -other, other)
    level, share = 2 * torch.rand(count, 3, 1, 1) - 1, 0.8 * torch.rand(count, 3, 1, 1)
    other = torch.lerp(other, level.expand_as(other), share.expand_as(other))
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, other, pixels)


def train_unet(config: TrainConfig, trained_vae: Run, show: Show | None = None) -> Run:
    """Train the UNet and the text encoder of the model that the settings name, in the latents of a trained VAE, on the
    noise as in the main training. One caption in ten is left out. One picture in five is shown in another style, «sun,
    sepia style», so that a style is learnt to leave the subject as it is. The run folder gets the pipeline, with the
    average of the weights.

    Args:
        trained_vae: what `train_vae` gives.
        show: as in `launch.launch`.

    Raises:
        SdnbError: if the settings, the data or the run folder cannot be used.
    """
    config = config.updated(output_dir=str(_folder(config) / "unet"))
    before = trained_vae.config
    training = Training(config, {PRETRAINING: {
        "vae_steps": before.max_train_steps, "vae_batch_size": before.train_batch_size,
        "vae_learning_rate": before.learning_rate,
    }})  # fmt: skip
    parts, device, examples = training.parts, training.device, training.splits.train
    parts.vae = AutoencoderKL.from_pretrained(trained_vae.folder / "vae").to(device).requires_grad_(False)
    unet, text_encoder = parts.unet, parts.text_encoder.requires_grad_(True).train()
    scheduler, scaling_factor = parts.noise_scheduler, parts.vae.config.scaling_factor
    moments = _moments_in_styles(parts.vae, examples)
    named = [data.first_caption(caption) for caption in examples.captions]
    captions_of = [
        [caption if isinstance(caption, list) else [caption] for caption in examples.captions],
        *([[f"{name}, {style} style"] for name in named] for style in STYLES),
    ]
    distinct = sorted({caption for of_style in captions_of for captions in of_style for caption in captions} | {""})
    ids_of = dict(zip(distinct, data.tokenize(parts.tokenizer, distinct)))

    def one_of(captions: Sequence[str]) -> Tensor:
        left_out = torch.rand(()) < UNCAPTIONED
        return ids_of["" if left_out else captions[torch.randint(len(captions), ())]]

    def loss() -> Tensor:
        batch = (config.train_batch_size,)
        views, styles = torch.randint(moments.shape[1], batch), torch.randint(1, moments.shape[0], batch)
        styles[torch.rand(batch) >= STYLED] = 0
        shown = list(zip(styles.tolist(), (views % len(named)).tolist()))
        input_ids = torch.stack([one_of(captions_of[style][row]) for style, row in shown])
        latents = draw_latents(moments[styles.to(device), views.to(device)], scaling_factor)
        noise, added_noise = draw_noise(latents, config)
        timesteps = draw_timesteps(scheduler, latents)
        noisy_latents = scheduler.add_noise(latents, added_noise, timesteps)
        encoder_hidden_states = text_encoder(input_ids.to(device))[0]
        prediction = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        target = target_of(scheduler, latents, noise, timesteps)
        return loss_of(prediction, target, scheduler, timesteps, config.snr_gamma)

    pipeline = models.pipeline(config, parts)

    def measure(step: int) -> None:
        held_out_loss = HeldOutLoss(training.splits.held_out, parts, config, device)  # anew: the text encoder learns
        run_folder.append(training.folder / run_folder.VALIDATION, dict(step=step, **held_out_loss(unet)))
        if config.validation_prompts:
            draw_samples(pipeline, config, training.accelerator, training.folder, step)

    def save() -> None:
        pipeline.save_pretrained(training.folder)

    return training.run_through([unet, text_encoder], loss, measure, save, show)


def in_style(style: str, pixels: Tensor) -> Tensor:
    """Pictures, [batch, 3, h, w], in one of `STYLES`."""
    kept, black, white = STYLES[style]
    dark, light = (torch.tensor(colour).view(3, 1, 1) / 127.5 - 1 for colour in (black, white))
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # luma, ITU-R BT.601
    return torch.lerp(dark, light, (torch.lerp(grey, pixels, kept) + 1) / 2)


def export(run: Run, folder: Path) -> None:
    """Write what ships of a trained model: its weights, in half precision, and its vocabulary."""
    parts = models.load(run.config.updated(pretrained_model_name_or_path=str(run.folder)))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "unet", "text_encoder"):
        part = getattr(parts, name)
        weights = {portable(key): value.half().contiguous() for key, value in part.named_parameters()}
        metadata = {"scaling_factor": repr(part.config.scaling_factor)} if name == "vae" else None
        save_file(weights, folder / f"{name}.safetensors", metadata)
    write_vocabulary(folder, *read_vocabulary(Path(models.source(run.config)) / "tokenizer"))


def _folder(config: TrainConfig) -> Path:
    return Path(config.output_dir or PROJECT / "runs" / "pretraining").expanduser().absolute()


def _pixels(examples: data.ImageCaptions) -> Tensor:
    """All views of a data set, [views, 3, resolution, resolution]."""
    return torch.stack([examples.pixels(view) for view in range(examples.views)])


def _moments_in_styles(vae: AutoencoderKL, examples: data.ImageCaptions) -> Tensor:
    """Of all views, plain first, then in each of the styles: [1 + styles, views, …]."""
    pixels = _pixels(examples)
    return torch.stack([_all_moments(vae, pixels), *(_all_moments(vae, in_style(style, pixels)) for style in STYLES)])


@torch.no_grad()
def _all_moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return torch.cat([vae.encode(batch.to(vae.device)).latent_dist.parameters for batch in pixels.split(64)])
