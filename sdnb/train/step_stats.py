"""What is measured in an optimizer step besides its time: images, losses, energy."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from sdnb.machine.device import EnergyMeter
from sdnb.models.encoders import Encoders


class StepStats:
    """Adds up the micro-batches of a step on the device. `read` waits for the device, once a step."""

    def __init__(self, accelerator: Accelerator, accumulation_steps: int, encoders: Encoders) -> None:
        self.accelerator, self.accumulation_steps, self.encoders = accelerator, accumulation_steps, encoders
        self.meter = EnergyMeter(accelerator.device)
        self._clear()

    def restart(self) -> None:
        """Leave out the energy that was used since the last step, as the clock leaves out the time."""
        self.meter.joules()

    def _clear(self) -> None:
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.micro_batches = self.images = 0

    def add(self, losses: torch.Tensor, images: int) -> None:
        """Count micro-batches that ran as one batch: their losses, [micro-batches], and the images in all of them."""
        self.last_loss = losses[-1].detach()
        self.loss_sum += losses.detach().sum()
        self.images += images
        self.micro_batches += len(losses)

    def read(self, grad_norm: torch.Tensor) -> dict[str, Any]:
        """The record of the step, of all ranks. `loss` is the mean over the micro-batches of this step; `train_loss`
        divides by those of a full step, as the reference logs it."""
        ranks = self.accelerator.num_processes
        counted = (self.images, *self.encoders.take_counts(), self.meter.joules())
        sums = torch.stack([self.loss_sum, *(torch.full_like(self.loss_sum, number) for number in counted)])
        loss_sum, images, encoded_images, encoded_captions, joules, step_loss, norm = torch.stack(
            [*self.accelerator.reduce(sums, reduction="sum"), self.last_loss, grad_norm.float()]
        ).tolist()
        self.encoders.store_new()  # the device is idle now
        record = dict(
            micro_batches=self.micro_batches,
            images=int(images),
            encoded_images=int(encoded_images),
            encoded_captions=int(encoded_captions),
            loss=loss_sum / ranks / self.micro_batches,
            train_loss=loss_sum / ranks / self.accumulation_steps,
            step_loss=step_loss,
            grad_norm=norm,
        )
        if math.isfinite(joules):
            record["joules"] = joules
        self._clear()
        return record
