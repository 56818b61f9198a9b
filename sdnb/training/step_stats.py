"""What is measured in an optimizer step besides its time: images, losses, energy."""

import math
import signal
from typing import Any

import torch
from accelerate import Accelerator

from sdnb.machine.device import EnergyMeter
from sdnb.machine.witness import Witness
from sdnb.models.encoders import Encoders
from sdnb.training.stopping import StopRequest


class StepStats:
    """Adds up the micro-batches of a step on the device. `read` waits for the device, once a step."""

    def __init__(
        self, accelerator: Accelerator, accumulation_steps: int, encoders: Encoders, stop: StopRequest
    ) -> None:
        self.accelerator, self.accumulation_steps, self.encoders = accelerator, accumulation_steps, encoders
        self.stop, self.signal = stop, 0
        self.meter = EnergyMeter(accelerator.device)
        self.witness = Witness(accelerator.device, of_machine=accelerator.is_local_main_process)
        self._clear()

    def restart(self) -> None:
        """Leave out what was used since the last step, as the clock leaves out the time."""
        self.meter.joules()
        self.witness.spent()

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
        divides by those of a full step, as the reference logs it. `signal` becomes the number of the signal that asks
        to stop, on all ranks in the same step."""
        ranks = self.accelerator.num_processes
        gpu = self.witness.gpu() if self.accelerator.is_main_process else {}  # only that of rank 0 is recorded
        slowed_down, spent = bool(self.witness.slowed_by()), self.witness.spent()
        counted = (
            self.images, *self.encoders.take_counts(), self.meter.joules(), self.stop.signal,
            slowed_down, spent.in_use, spent.own, spent.cores,
        )  # fmt: skip
        sums = torch.stack([self.loss_sum, *(torch.full_like(self.loss_sum, number) for number in counted)])
        (loss_sum, images, encoded_images, encoded_captions, joules, signals, slowed, in_use, own, cores, step_loss,
         norm) = torch.stack(
            [*self.accelerator.reduce(sums, reduction="sum"), self.last_loss, grad_norm.float()]
        ).tolist()  # fmt: skip
        # Not what has come since the sum was made: other ranks do not know of it.
        self.signal = (self.stop.signal or signal.SIGTERM) if signals else 0
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
        if math.isfinite(own) and spent.clock > 0:
            record["cpu_seconds"] = round(own, 3)
            record["others_share"] = round(max(0.0, (in_use - own) / spent.clock / cores), 4)
        if gpu:
            record |= {"gpu": gpu, "slowed_gpus": int(slowed)}
        self._clear()
        return record
