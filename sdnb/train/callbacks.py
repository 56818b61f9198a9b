"""What happens around the steps of a training: records, held-out loss, pictures, checkpoints, the saved pipeline."""

from __future__ import annotations

import logging
import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sdnb.data import image_captions as data
from sdnb.errors import RunError
from sdnb.machine.device import EnergyMeter, give_back_freed_memory, peak_bytes
from sdnb.models import pipeline as models
from sdnb.models.ema import EMA
from sdnb.models.encoders import Encoders
from sdnb.run import folder as run_folder
from sdnb.run import hub
from sdnb.settings.config import TrainConfig
from sdnb.train.checkpoints import Checkpoints
from sdnb.train.evaluation import HeldOutLoss, draw_samples

logger = logging.getLogger("sdnb")


class Tally:
    """Adds up the micro-batches of an optimizer step on the device; read once a step, when all ranks have added."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, encoders: Encoders) -> None:
        self.accelerator, self.encoders = accelerator, encoders
        self.accumulation_steps = config.gradient_accumulation_steps
        self.meter = EnergyMeter(accelerator.device)
        self._clear()

    def restart(self) -> None:
        """Leave out of the next step what was used since the last one, as the clock leaves out its time."""
        self.meter.joules()

    def _clear(self) -> None:
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.micro_batches = self.images = 0

    def add(self, losses: torch.Tensor, images: int) -> None:
        """Args:
        losses: of the micro-batches that were run together, [micro-batches].
        images: how many pictures they have together.
        """
        self.last_loss = losses[-1].detach()
        self.loss_sum += losses.detach().sum()
        self.images += images
        self.micro_batches += len(losses)

    def read(self, grad_norm: torch.Tensor) -> dict[str, Any]:
        """The record of the step: `loss` is the mean over the micro-batches there were; `train_loss` divides by those
        that a full step has, as the reference logs it."""
        ranks = self.accelerator.num_processes
        counted = (self.images, *self.encoders.take_counts(), self.meter.joules())
        sums = torch.stack([self.loss_sum, *(torch.full_like(self.loss_sum, number) for number in counted)])
        loss_sum, images, encoded_images, encoded_captions, joules, step_loss, norm = torch.stack(
            [*self.accelerator.reduce(sums, reduction="sum"), self.last_loss, grad_norm.float()]
        ).tolist()
        self.encoders.keep_new()  # the device has come to rest
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


class Observer:
    """Watches a training. It draws nothing from the training's generators, and its time is no step's."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        parts: models.Parts,
        held_out: data.ImageCaptions | None,
        unet: torch.nn.Module,
        ema: EMA | None,
        checkpoints: Checkpoints,
    ) -> None:
        self.accelerator, self.config, self.parts = accelerator, config, parts
        self.unet, self.ema, self.checkpoints = unet, ema, checkpoints
        self.folder = Path(config.output_dir)
        self.began = time.perf_counter()
        self.diverged = False
        self.held_out_loss = None
        if config.validation_loss_steps and held_out is None:
            logger.warning("no held-out pictures in this data set (a split named validation or test): no such loss")
        elif config.validation_loss_steps and accelerator.is_main_process:
            self.held_out_loss = HeldOutLoss(held_out, parts, config, accelerator.device)
        if accelerator.is_main_process:
            self.repository = hub.create(config) if config.push_to_hub else None
            # Put together now, so that what cannot be had is missed before the training and not after it.
            with torch.random.fork_rng(devices=[]):  # transformers 4 draws weights to be overwritten
                self.pipeline = models.pipeline(config, parts)

    def before_training(self, step: int) -> None:
        """Args:
        step: the one that is resumed after; 0 at the beginning.
        """
        if step == 0:
            self._measure_held_out(step)
            self._draw(step)
        self.accelerator.wait_for_everyone()
        if self.accelerator.device.type == "cuda":  # the peak that is reported is that from the first step on
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def after_step(self, record: dict[str, Any], last: bool) -> bool:
        """File the record; measure, and keep a checkpoint, where it is time to. Returns whether the training was held
        up."""
        step = record["step"]
        if self.accelerator.is_main_process:
            peak_gib = peak_bytes(self.accelerator.device)[0] / 2**30
            run_folder.append(self.folder / run_folder.STEPS, {**record, "peak_memory_gib": round(peak_gib, 3)})
            if not math.isfinite(record["loss"]) and not self.diverged:
                self.diverged = True
                logger.warning("step %d: the loss is not finite; what comes after is of no use", step)
        self.accelerator.log({name: record[name] for name in ("train_loss", "loss", "lr")}, step=step)
        measured = self.config.validation_loss_steps and (step % self.config.validation_loss_steps == 0 or last)
        if measured:
            self._measure_held_out(step)
            self.accelerator.wait_for_everyone()
        kept = step % self.config.checkpointing_steps == 0
        if kept:
            self.checkpoints.save(step)
        return bool(measured or kept)

    def after_epoch(self, epoch: int, step: int) -> bool:
        """Draw `validation_prompts`, where it is time to. Returns whether the training was held up."""
        if not self.config.validation_prompts or epoch % self.config.validation_epochs:
            return False
        self._draw(step)
        self.accelerator.wait_for_everyone()
        return True

    def after_training(self, steps: int, threads: dict[str, Any]) -> None:
        """Args:
        threads: how they have waited for each other, see `threads.Waits.stop`.
        """
        accelerator, trained = self.accelerator, time.perf_counter()
        ranks = self._ranks()
        if self.ema is not None:
            self.ema.copy_to(self.unet.parameters())
        if accelerator.is_main_process:
            logger.info("saving the pipeline")
            give_back_freed_memory()  # the copies that saving makes are not to come on top
            self._save_pipeline()
            summary = dict(
                world_size=accelerator.num_processes,
                distributed_type=accelerator.distributed_type.value,
                ranks=ranks,
                threads=threads,
                training_seconds=trained - self.began,
                saving_seconds=time.perf_counter() - trained,
                ended=time.time(),
            )
            run_folder.write(self.folder / run_folder.SUMMARY, summary)
        self._draw(steps)
        if accelerator.is_main_process and self.repository:
            logger.info("uploading to %s", self.repository)
            hub.publish(run_folder.RunFolder(self.folder), self.config, self.repository)
        accelerator.wait_for_everyone()
        # Not `end_training`, which gives up the process group as well: DDP's reducer is then the last to hold it, and
        # takes it down with the GIL held, while a thread of gloo's that holds the group's lock may wait for the GIL.
        for tracker in accelerator.trackers:
            tracker.finish()

    def _save_pipeline(self) -> None:
        encoders, dtype = (self.pipeline.vae, self.pipeline.text_encoder), self.pipeline.vae.dtype
        try:
            # transformers loads in the precision that weights lie in, diffusers in float32, and the two would not go
            # together.
            for encoder in encoders:
                encoder.float()
            self.pipeline.save_pretrained(self.folder)
            for encoder in encoders:
                encoder.to(dtype)
        except Exception as error:  # torch and safetensors do not raise OSError when the disk is full
            free = shutil.disk_usage(self.folder).free / 2**30
            raise RunError(
                f"{self.folder}: the trained pipeline could not be saved: {error}\n{free:.2f} GiB are free there. The "
                "measurements are whole; with a checkpoint, resume_from_checkpoint = latest comes back to this point."
            ) from error

    def _draw(self, step: int) -> None:
        """Draw with the weights that would be saved now, unless the run has these pictures already."""
        if not (self.config.validation_prompts and self.accelerator.is_main_process):
            return
        drawn = run_folder.RunFolder(self.folder).drawn
        if len(drawn) and (drawn.step == step).any():
            return
        with self.ema.in_place_of(self.parts.unet) if self.ema is not None else nullcontext():
            draw_samples(self.pipeline, self.config, self.accelerator, self.folder, step)

    def _measure_held_out(self, step: int) -> None:
        if self.held_out_loss is not None:
            with self.accelerator.autocast():
                measured = self.held_out_loss(self.accelerator.unwrap_model(self.unet))
            run_folder.append(self.folder / run_folder.VALIDATION, dict(step=step, **measured))

    def _ranks(self) -> list[dict[str, Any]]:
        """Each rank's peak memory, and a checksum of its parameters (sum and sum of squares): all ranks must agree."""
        memory = peak_bytes(self.accelerator.device)
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for parameter in self.unet.parameters():  # one at a time: a copy of all of them may not fit
            values = parameter.detach().double()
            sums += torch.stack([values.sum(), values.square().sum()])
        own = torch.cat([sums.new_tensor(memory), sums])
        ranks = [
            dict(
                rank=rank,
                peak_memory_gib=allocated / 2**30,
                peak_reserved_gib=reserved / 2**30,
                checksum=[value.hex() for value in checksum],
            )
            for rank, (allocated, reserved, *checksum) in enumerate(self.accelerator.gather(own[None]).tolist())
        ]
        if any(rank["checksum"] != ranks[0]["checksum"] for rank in ranks):
            logger.error("the ranks' parameters differ at the end: %s", [rank["checksum"] for rank in ranks])
        return ranks
