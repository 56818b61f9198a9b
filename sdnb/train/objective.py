"""The mathematics of the training step: noise, target, loss; as in diffusers' `train_text_to_image.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from torch import Tensor

from sdnb.settings.config import TrainConfig


def draw_latents(moments: Tensor, scaling_factor: float) -> Tensor:
    """Latents [batch, channels, h, w], scaled: a draw from the posterior with these moments, [batch, 2 × channels, h,
    w]."""
    return DiagonalGaussianDistribution(moments).sample() * scaling_factor


def draw_noise(latents: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The noise that is to be predicted and the noise that is added, both of the latents' shape: they differ under
    input perturbation (arXiv 2301.11706). The offset (crosslabs.org, "Diffusion with Offset Noise") is one draw a
    channel."""
    noise = torch.randn_like(latents)
    if config.noise_offset:
        noise += config.noise_offset * torch.randn((*latents.shape[:2], 1, 1), device=latents.device)
    if config.input_perturbation:
        return noise, noise + config.input_perturbation * torch.randn_like(noise)
    return noise, noise


def draw_timesteps(scheduler: DDPMScheduler, latents: Tensor) -> Tensor:
    """A uniformly random timestep for each picture, int64 [batch]."""
    return torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)


def target_of(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict: the noise, or the velocity of arXiv 2202.00512."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps)


def dream(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    noise: Tensor,
    target: Tensor,
    detail_preservation: float,
) -> tuple[Tensor, Tensor]:
    """DREAM (arXiv 2312.00210, algorithm 1): the noise that the UNet does not find in `noisy_latents` yet, weighted by
    (1 - ᾱ)^(p/2), is put into both.

    Returns:
        The rectified noisy latents and target, of the shapes of those given.
    """
    deviation = (1 - scheduler.alphas_cumprod.to(timesteps.device)[timesteps, None, None, None]) ** 0.5
    with torch.no_grad():
        missed = noise - unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
    missed = missed * deviation**detail_preservation
    return noisy_latents + deviation * missed, target + missed


def loss_of(
    prediction: Tensor, target: Tensor, scheduler: DDPMScheduler, timesteps: Tensor, snr_gamma: float | None
) -> Tensor:
    """The mean squared error, a scalar; with `snr_gamma` weighted by min(SNR, γ)/SNR, or for a velocity by
    min(SNR, γ)/(SNR + 1) (arXiv 2303.09556, section 3.4)."""
    if snr_gamma is None:
        return F.mse_loss(prediction.float(), target.float())
    snr = compute_snr(scheduler, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    weight = snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
    return (per_picture_loss(prediction, target) * weight).mean()


def losses_of(
    prediction: Tensor,
    target: Tensor,
    scheduler: DDPMScheduler,
    timesteps: Tensor,
    snr_gamma: float | None,
    sizes: Sequence[int],
) -> Tensor:
    """The loss of each micro-batch, [micro-batches], where they were run as one batch.

    Args:
        sizes: how many pictures each has.
    """
    parts = zip(*(whole.split(sizes) for whole in (prediction, target, timesteps)))
    return torch.stack([loss_of(one, goal, scheduler, times, snr_gamma) for one, goal, times in parts])


def per_picture_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each picture, [batch]."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
