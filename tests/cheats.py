"""Ten trainings that are not what their settings say. Each changes the trainer, and leaves the records plausible."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from sdnb.data.micro_batches import MicroBatches
from sdnb.models.ema import EMA
from sdnb.models.encoders import Encoders
from sdnb.training import loop


def no_ema(patch):
    """The weights of the last step are saved as their average."""
    patch.setattr(EMA, "step", lambda self, parameters: None)
    patch.setattr(EMA, "copy_to", lambda self, parameters: None)


def no_clipping(patch):
    def norm_of(self, parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(parameters, float("inf"))

    patch.setattr(Accelerator, "clip_grad_norm_", norm_of)


def dropped_micro_batches(patch):
    """Half of the micro-batches are computed, and count twice."""
    real = loop.forward_and_backward

    def half(training, batches, ends_step):
        kept = batches[: max(1, len(batches) // 2)]
        real(training, (kept * len(batches))[: len(batches)], ends_step)

    patch.setattr(loop, "forward_and_backward", half)


def frozen_block(patch):
    def build(*arguments):
        training = real(*arguments)
        training.parts.unet.down_blocks[0].requires_grad_(False)
        return training

    real = loop.build
    patch.setattr(loop, "build", build)


def half_the_timesteps(patch):
    def draw(scheduler, latents):
        return torch.randint(0, scheduler.config.num_train_timesteps // 2, (len(latents),), device=latents.device)

    patch.setattr(loop, "draw_timesteps", draw)


def repeated_data(patch):
    """The first step's images are trained on in all steps."""
    real, kept = MicroBatches.of_a_step, []

    def again(self):
        if not kept:
            kept.extend(batch for batch, _ in real(self))
        for batch, (_, last) in zip(kept, real(self)):
            yield batch, last

    patch.setattr(MicroBatches, "of_a_step", again)


def without_resampling(patch):
    """The posterior's mean in place of a draw."""
    patch.setattr(loop, "draw_latents", lambda moments, scale: moments.chunk(2, dim=1)[0] * scale)


def lower_precision(patch):
    """bfloat16, where float32 is claimed: each layer's output and its gradient are rounded."""

    def build(*arguments):
        training = real(*arguments)
        for module in training.parts.unet.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.register_forward_hook(lambda _, given, result: result.bfloat16().float())
        return training

    real = loop.build
    patch.setattr(loop, "build", build)


def smaller_resolution(patch):
    """Images of half the side."""
    real = Encoders._encode_images

    def smaller(self, pixels):
        return real(self, F.interpolate(pixels.float(), scale_factor=0.5).to(pixels.dtype))

    patch.setattr(Encoders, "_encode_images", smaller)


def learning_rate_of_zero(patch):
    def build(*arguments):
        training = real(*arguments)
        training.optimizer.step = lambda *_: None
        return training

    real = loop.build
    patch.setattr(loop, "build", build)


CHEATS = {
    cheat.__name__: cheat
    for cheat in (
        no_ema, no_clipping, dropped_micro_batches, frozen_block, half_the_timesteps, repeated_data,
        without_resampling, lower_precision, smaller_resolution, learning_rate_of_zero,
    )
}  # fmt: skip
NO_CACHE = {"smaller_resolution"}  # whose encodings have another shape
