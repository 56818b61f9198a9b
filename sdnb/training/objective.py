"""The mathematics of the training step: noise, target and loss, as in diffusers' `train_text_to_image.py`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from torch import Tensor


def draw_latents(moments: Tensor, scaling_factor: float) -> Tensor:
    """Scaled latents [batch, channels, h, w], from the posterior with these moments [batch, 2 × channels, h, w]."""
    return DiagonalGaussianDistribution(moments).sample() * scaling_factor


def draw_noise(latents: Tensor, noise_offset: float = 0.0, input_perturbation: float = 0.0) -> tuple[Tensor, Tensor]:
    """The noise to predict and the noise to add, both of the latents' shape. They differ under input perturbation
    (arXiv 2301.11706). The offset (crosslabs.org, "Diffusion with Offset Noise") is one draw per channel."""
    noise = torch.randn_like(latents)
    if noise_offset:
        noise += noise_offset * torch.randn((*latents.shape[:2], 1, 1), device=latents.device)
    if input_perturbation:
        return noise, noise + input_perturbation * torch.randn_like(noise)
    return noise, noise


def draw_timesteps(scheduler: DDPMScheduler, latents: Tensor) -> Tensor:
    """A uniformly random timestep for each image, int64 [batch]."""
    return torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)


def target_of(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet should predict: the noise, or the velocity of arXiv 2202.00512."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps)


def dream(
    unet: torch.nn.Module, scheduler: DDPMScheduler, noisy_latents: Tensor, timesteps: Tensor,
    encoder_hidden_states: Tensor, noise: Tensor, target: Tensor, detail_preservation: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """DREAM (arXiv 2312.00210, algorithm 1): the noise that the UNet still misses in `noisy_latents`, weighted by
    (1 - ᾱ)^(p/2), is added to both. Returns the rectified noisy latents and target, with unchanged shapes."""
    deviation = (1 - scheduler.alphas_cumprod.to(timesteps.device)[timesteps, None, None, None]) ** 0.5
    with torch.no_grad():
        missed = noise - unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
    missed = missed * deviation**detail_preservation
    return noisy_latents + deviation * missed, target + missed


def loss_of(
    prediction: Tensor, target: Tensor, scheduler: DDPMScheduler, timesteps: Tensor, snr_gamma: float | None
) -> Tensor:
    """The mean squared error, a scalar. With `snr_gamma` it is weighted by min(SNR, γ)/SNR, or for a velocity by
    min(SNR, γ)/(SNR + 1) (arXiv 2303.09556, section 3.4)."""
    if snr_gamma is None:
        return F.mse_loss(prediction.float(), target.float())
    snr = compute_snr(scheduler, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    weight = snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
    return (loss_per_image(prediction, target) * weight).mean()


def losses_of(
    prediction: Tensor, target: Tensor, scheduler: DDPMScheduler, timesteps: Tensor, snr_gamma: float | None,
    sizes: Sequence[int],
) -> Tensor:  # fmt: skip
    """The loss of each micro-batch, [micro-batches], of several that ran as one batch; `sizes`: images in each."""
    parts = zip(*(whole.split(sizes) for whole in (prediction, target, timesteps)))
    return torch.stack([loss_of(one, goal, scheduler, times, snr_gamma) for one, goal, times in parts])


def loss_per_image(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each image, [batch]."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
