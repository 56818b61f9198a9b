"""What a training is judged by besides its own loss: the loss on held-out pictures, and pictures drawn from prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from sdnb.data.image_captions import ImageCaptions, first_caption, tokenize
from sdnb.data.transforms import to_tensor
from sdnb.models.pipeline import Parts
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.train.objective import per_picture_loss, target_of

HELD_OUT_PICTURES = 64
INFERENCE_STEPS = 20
_DRAWN_TOGETHER = 25
_GUIDANCE_SCALE = 3.0


class HeldOutLoss:
    """The loss on pictures that are not trained on, with the same noise every time and timesteps spread evenly over the
    schedule, so that it changes only because the UNet does. Its own generators leave the training's draws alone.

    As in the training, the latents are drawn from the VAE's posterior. All is computed and kept at the start.
    """

    def __init__(self, pictures: ImageCaptions, parts: Parts, config: TrainConfig, device: torch.device) -> None:
        count = min(HELD_OUT_PICTURES, len(pictures))
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(pictures), generator=generator)[:count].tolist()
        steps = parts.noise_scheduler.config.num_train_timesteps
        self.batch_size = config.train_batch_size
        self.scheduler = parts.noise_scheduler
        self.timesteps = ((torch.arange(count) + 0.5) * steps / count).long().to(device)
        with torch.no_grad():
            self.latents = torch.cat([self._latents(pictures.pixels(row)[None], parts, generator) for row in rows])
            token_ids = tokenize(parts.tokenizer, [first_caption(pictures.captions[row]) for row in rows]).to(device)
            encoded = [parts.text_encoder(ids)[0] for ids in token_ids.split(self.batch_size)]
            self.encoder_hidden_states = torch.cat(encoded)
        self.noise = torch.randn(self.latents.shape, generator=generator).to(device, self.latents.dtype)

    @staticmethod
    def _latents(pixels: Tensor, parts: Parts, generator: torch.Generator) -> Tensor:
        posterior = parts.vae.encode(pixels.to(parts.vae.device, parts.vae.dtype)).latent_dist
        return posterior.sample(generator) * parts.vae.config.scaling_factor

    @torch.no_grad()
    def __call__(self, unet: torch.nn.Module) -> dict[str, Any]:
        """The mean over the pictures, its standard error, and their number."""
        target = target_of(self.scheduler, self.latents, self.noise, self.timesteps)
        noisy = self.scheduler.add_noise(self.latents, self.noise, self.timesteps)
        wholes = (noisy, self.timesteps, self.encoder_hidden_states, target)
        batches = zip(*(whole.split(self.batch_size) for whole in wholes))
        losses = torch.cat(
            [
                per_picture_loss(unet(latents, timesteps, encoder_hidden_states, return_dict=False)[0], goal)
                for latents, timesteps, encoder_hidden_states, goal in batches
            ]
        )
        spread = losses.std() / len(losses) ** 0.5 if len(losses) > 1 else torch.tensor(float("nan"))
        return {"loss": losses.mean().item(), "standard_error": spread.item(), "pictures": len(losses)}


def psnr(pixels: Tensor, others: Tensor) -> float:
    """The peak signal-to-noise ratio of pictures in [-1, 1] of the same shape, in dB, from the mean squared error."""
    return 10 * math.log10(4 / (pixels - others.clamp(-1, 1)).square().mean().item())


def retrieval(
    pipeline: StableDiffusionPipeline, examples: ImageCaptions, count: int = 100
) -> tuple[float, list[tuple[str, Image.Image, Image.Image]]]:
    """How often a caption's drawing is nearer to the caption's own picture than to nine others': chance is 0.1.

    Near is what the cosine says of the pictures shrunk to 16×16, the mean of all of them taken away.

    Args:
        count: captions at the most, taken from all over the examples at random; ten are needed.

    Returns:
        The share, and each caption with its picture and its drawing.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(examples), generator=generator)[:count].tolist()
    count = len(rows)
    pipeline.set_progress_bar_config(disable=True)
    captions = [first_caption(examples.captions[row]) for row in rows]
    own, side = torch.stack([examples.pixels(row) for row in rows]), examples.config.resolution
    drawn: list[Image.Image] = []
    for start in range(0, count, _DRAWN_TOGETHER):
        drawn += pipeline(
            captions[start : start + _DRAWN_TOGETHER], height=side, width=side, guidance_scale=_GUIDANCE_SCALE,
            num_inference_steps=INFERENCE_STEPS, generator=generator,
        ).images  # fmt: skip
    small, small_drawn = (
        F.adaptive_avg_pool2d(pictures, 16).flatten(1) for pictures in (own, torch.stack([*map(to_tensor, drawn)]))
    )
    mean = small.mean(0)
    likeness = F.normalize(small_drawn - mean) @ F.normalize(small - mean).T
    hits = 0
    for row in range(count):
        others = torch.randperm(count - 1, generator=generator)[:9]
        others += others >= row
        hits += bool(likeness[row, row] > likeness[row, others].max())
    pictures = [examples.picture(row) for row in rows]
    return hits / count, list(zip(captions, pictures, drawn))


def draw_samples(
    pipeline: StableDiffusionPipeline, config: TrainConfig, accelerator: Accelerator, folder: Path, step: int
) -> None:
    """Draw each of `validation_prompts` with the settings' seed, file the pictures with how they were made, and show
    them to the trackers. As in the reference's validation, no safety checker looks at them."""
    unchecked = {**pipeline.components, "safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline(**unchecked, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    seed = config.seed or 0
    (folder / run_folder.SAMPLES).mkdir(exist_ok=True)
    pictures, records = [], []
    for index, prompt in enumerate(config.validation_prompts):  # one at a time: the optimizer's state is in memory too
        with accelerator.autocast():
            picture = pipeline(
                prompt,
                height=config.resolution,
                width=config.resolution,
                num_inference_steps=INFERENCE_STEPS,
                guidance_scale=config.validation_guidance_scale,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
        name = f"step-{step:06d}-{index}.png"
        picture.save(folder / run_folder.SAMPLES / name)
        record = dict(
            file=name, step=step, prompt=prompt, seed=seed,
            num_inference_steps=INFERENCE_STEPS, guidance_scale=config.validation_guidance_scale,
        )  # fmt: skip
        records.append(record)
        pictures.append(picture)
    for record in records:  # when all are there, so that a run that is killed here draws them again
        run_folder.append(folder / run_folder.SAMPLES_LIST, record)
    for tracker in accelerator.trackers:
        _show(tracker, pictures, config.validation_prompts, step)


def _show(tracker: GeneralTracker, pictures: list[Image.Image], prompts: Sequence[str], step: int) -> None:
    if tracker.name == "tensorboard":
        batch = np.stack([np.asarray(picture) for picture in pictures])
        tracker.writer.add_images("validation", batch, step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        shown = [wandb.Image(picture, caption=prompt) for picture, prompt in zip(pictures, prompts)]
        tracker.log({"validation": shown}, step=step)
    elif tracker.name == "comet_ml":
        for picture, prompt in zip(pictures, prompts):
            tracker.tracker.log_image(picture, name=prompt, step=step)
