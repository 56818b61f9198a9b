"""Evaluation during a run: the loss on held-out images, and images drawn from prompts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from sdnb.data.image_captions import ImageCaptions, first_caption, tokenize
from sdnb.data.loading import HELD_OUT_IMAGES
from sdnb.models.pipeline import Parts
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.training.objective import loss_per_image, target_of

INFERENCE_STEPS = 20


class HeldOutLoss:
    """The loss on images that are not trained on. The noise is the same every time, and the timesteps are spread evenly
    over the schedule, so it changes only with the UNet. It has its own generators, so the training's random numbers
    stay the same.

    As in the training, the latents are drawn from the VAE's posterior. Everything is encoded once, at the start.
    """

    def __init__(self, examples: ImageCaptions, parts: Parts, batch_size: int, device: torch.device) -> None:
        count = min(HELD_OUT_IMAGES, len(examples))
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(examples), generator=generator)[:count].tolist()
        steps = parts.noise_scheduler.config.num_train_timesteps
        self.batch_size, self.scheduler = batch_size, parts.noise_scheduler
        self.timesteps = ((torch.arange(count) + 0.5) * steps / count).long().to(device)
        vae, latents = parts.vae, []
        with torch.no_grad():
            for row in rows:
                pixels = examples.pixels(row)[None].to(vae.device, vae.dtype)
                latents.append(vae.encode(pixels).latent_dist.sample(generator) * vae.config.scaling_factor)
            token_ids = tokenize(parts.tokenizer, [first_caption(examples.captions[row]) for row in rows]).to(device)
            encoded = [parts.text_encoder(ids)[0] for ids in token_ids.split(batch_size)]
        self.latents, self.encoder_hidden_states = torch.cat(latents), torch.cat(encoded)
        self.noise = torch.randn(self.latents.shape, generator=generator).to(device, self.latents.dtype)

    @torch.no_grad()
    def __call__(self, unet: torch.nn.Module) -> dict[str, Any]:
        """The mean over the images, its standard error, and the number of images."""
        target = target_of(self.scheduler, self.latents, self.noise, self.timesteps)
        noisy = self.scheduler.add_noise(self.latents, self.noise, self.timesteps)
        wholes = (noisy, self.timesteps, self.encoder_hidden_states, target)
        losses = torch.cat([
            loss_per_image(unet(*inputs, return_dict=False)[0], goal)
            for *inputs, goal in zip(*(whole.split(self.batch_size) for whole in wholes))
        ])  # fmt: skip
        spread = losses.std() / len(losses) ** 0.5 if len(losses) > 1 else torch.tensor(float("nan"))
        return {"loss": losses.mean().item(), "standard_error": spread.item(), "images": len(losses)}


def psnr(pixels: Tensor, others: Tensor) -> float:
    """The peak signal-to-noise ratio of images in [-1, 1] of the same shape, in dB, from the mean squared error."""
    return 10 * math.log10(4 / (pixels - others.clamp(-1, 1)).square().mean().item())


def draw_samples(
    pipeline: StableDiffusionPipeline, accelerator: Accelerator, folder: Path, step: int, prompts: Sequence[str],
    resolution: int, seeds: Sequence[int], guidance_scale: float, adapter_scale: float | None = None,
) -> None:  # fmt: skip
    """Draw each prompt from each of the seeds, and give the images to the run folder and the trackers. As in the
    reference's validation, no safety checker is used. `adapter_scale`: to be recorded."""
    unchecked = {**pipeline.components, "safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline(**unchecked, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    (folder / run_folder.SAMPLES).mkdir(exist_ok=True)
    how = dict(num_inference_steps=INFERENCE_STEPS, guidance_scale=guidance_scale)
    scaled = {} if adapter_scale is None else {"scale": adapter_scale}
    part = f"-scale-{adapter_scale}" if adapter_scale not in (None, 1.0) else ""
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    images, records = [], []
    for index, (prompt, seed) in enumerate(wanted):  # one by one: the optimizer's state is in memory, too
        with accelerator.autocast():
            generator = torch.Generator().manual_seed(seed)
            image = pipeline(prompt, height=resolution, width=resolution, generator=generator, **how).images[0]
        name = f"step-{step:06d}{part}-{index}.png"
        image.save(folder / run_folder.SAMPLES / name)
        records.append(dict(file=name, step=step, prompt=prompt, seed=seed, **scaled, **how))
        images.append(image)
    for record in records:  # after all are drawn: a run that is killed before draws them again
        files.append(folder / run_folder.SAMPLES_LIST, record)
    for tracker in accelerator.trackers:
        _track(tracker, f"validation{part}", images, [f"{prompt}{part} ({seed})" for prompt, seed in wanted], step)


def _track(tracker: GeneralTracker, tag: str, images: list[Image.Image], names: list[str], step: int) -> None:
    if tracker.name == "tensorboard":
        batch = np.stack([np.asarray(image) for image in images])
        tracker.writer.add_images(tag, batch, step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        shown = [wandb.Image(image, caption=name) for image, name in zip(images, names)]
        tracker.log({tag: shown}, step=step)
    elif tracker.name == "comet_ml":
        for image, name in zip(images, names):
            tracker.tracker.log_image(image, name=name, step=step)
