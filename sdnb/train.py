"""The training, as every rank runs it."""

from __future__ import annotations

import logging
import math
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from . import data, models, runs
from .clock import StepClock
from .config import TrainConfig
from .diffusion import draw_noise, draw_timesteps, encode, loss_of, target_of
from .errors import RunError
from .evaluate import HeldOutLoss, draw_samples

logger = logging.getLogger("sdnb")

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: TrainConfig) -> None:
    """Train on this rank, from the first step to the saved pipeline. `config` is resolved: its run folder exists, its
    precision and number of ranks are set.

    Raises:
        SdnbError: if the ranks did not join, or the model or the data cannot be used.
    """
    folder = Path(config.output_dir)
    accelerator = _accelerator(config)
    _log_to(folder / runs.LOG, accelerator)
    _check_ranks_joined(accelerator, config)
    if config.seed is not None:
        set_seed(config.seed)

    with accelerator.main_process_first():  # the first to come fills the caches
        parts = models.load(config)
        splits = data.load(config)
    ema = _ema(parts.unet) if config.use_ema else None
    if config.prediction_type is not None:
        parts.noise_scheduler.register_to_config(prediction_type=config.prediction_type)
    if config.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
    if accelerator.is_main_process:
        runs.write(folder / runs.MODEL, models.describe(config, parts))

    splits.train.tokenizer = parts.tokenizer
    loader = DataLoader(
        splits.train,
        shuffle=True,
        collate_fn=data.collate,
        batch_size=config.train_batch_size,
        num_workers=config.dataloader_num_workers,
    )
    total_steps = config.total_steps(len(splits.train))
    optimizer = torch.optim.AdamW(
        parts.unet.parameters(),
        lr=config.learning_rate * (config.global_batch if config.scale_lr else 1),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    # accelerate steps the schedule once per rank
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(parts.unet, optimizer, loader, lr_scheduler)
    text_encoder = parts.text_encoder.to(accelerator.device, WEIGHT_DTYPES[config.mixed_precision])
    vae = parts.vae.to(accelerator.device, WEIGHT_DTYPES[config.mixed_precision])
    if ema is not None:
        ema.to(accelerator.device)

    observer = Observer(accelerator, config, parts, splits.held_out, unet)
    logger.info(
        "%s: %d pictures, %d optimizer steps of %d, %d ranks, %s", accelerator.distributed_type.value,
        len(splits.train), total_steps, config.global_batch, accelerator.num_processes, accelerator.device,
    )  # fmt: skip
    observer.before_training()

    clock = StepClock(accelerator.device)
    tally = Tally(accelerator, config)
    step = 0
    for epoch in range(math.ceil(total_steps / config.steps_per_epoch(len(splits.train)))):
        for batch in loader:
            clock.lap("data")
            with accelerator.accumulate(unet):
                latents = encode(vae, batch["pixel_values"])
                noise, added_noise = draw_noise(latents, config)
                timesteps = draw_timesteps(parts.noise_scheduler, latents)
                noisy_latents = parts.noise_scheduler.add_noise(latents, added_noise, timesteps)
                words = text_encoder(batch["input_ids"], return_dict=False)[0]
                target = target_of(parts.noise_scheduler, latents, noise, timesteps)
                clock.lap("encode")

                prediction = unet(noisy_latents, timesteps, words, return_dict=False)[0]
                loss = loss_of(prediction, target, parts.noise_scheduler, timesteps, config.snr_gamma)
                clock.lap("forward")

                accelerator.backward(loss)
                clock.lap("backward")

                learning_rate = lr_scheduler.get_last_lr()[0]
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                clock.lap("optimizer")
            tally.add(loss, len(latents))

            if accelerator.sync_gradients:
                if ema is not None:
                    ema.step(unet.parameters())
                    clock.lap("ema")
                step += 1
                record = dict(step=step, epoch=epoch, **tally.read(grad_norm), lr=learning_rate)
                record["seconds"], record["phase_seconds"] = clock.read()
                if observer.after_step(record, last=step == total_steps):
                    clock.restart()
                else:
                    clock.lap("other")
                if step == total_steps:
                    break

    observer.after_training(ema, step)


class Tally:
    """Adds up the micro-batches of an optimizer step on the device; read once a step, when all ranks have added."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self.accelerator = accelerator
        self.accumulation_steps = config.gradient_accumulation_steps
        self._clear()

    def _clear(self) -> None:
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.micro_batches = self.images = 0

    def add(self, loss: torch.Tensor, images: int) -> None:
        self.last_loss = loss.detach()
        self.loss_sum += self.last_loss
        self.images += images
        self.micro_batches += 1

    def read(self, grad_norm: torch.Tensor) -> dict[str, Any]:
        """The record of the step: `loss` is the mean over the micro-batches there were; `train_loss` divides by those
        that a full step has, as the reference logs it."""
        ranks = self.accelerator.num_processes
        sums = torch.stack([self.loss_sum, torch.full_like(self.loss_sum, self.images)])
        loss_sum, images, step_loss, norm = torch.stack(
            [*self.accelerator.reduce(sums, reduction="sum"), self.last_loss, grad_norm.float()]
        ).tolist()
        record = dict(
            micro_batches=self.micro_batches,
            images=int(images),
            loss=loss_sum / ranks / self.micro_batches,
            train_loss=loss_sum / ranks / self.accumulation_steps,
            step_loss=step_loss,
            grad_norm=norm,
        )
        self._clear()
        return record


class Observer:
    """What happens around the steps: records, held-out loss, pictures, the saved pipeline. It draws nothing from the
    training's generators, and its time is no step's."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        parts: models.Parts,
        held_out: data.ImageCaptions | None,
        unet: torch.nn.Module,
    ) -> None:
        self.accelerator, self.config, self.parts, self.unet = accelerator, config, parts, unet
        self.folder = Path(config.output_dir)
        self.began = time.perf_counter()
        self.diverged = False
        self.held_out_loss = None
        if config.validation_loss_steps and held_out is None:
            logger.warning("no held-out pictures in this data set (a split named validation or test): no such loss")
        elif config.validation_loss_steps and accelerator.is_main_process:
            self.held_out_loss = HeldOutLoss(held_out, parts, config, accelerator.device)

    def before_training(self) -> None:
        self._measure_held_out(step=0)
        if self.accelerator.is_main_process:
            # Put together now, so that what cannot be had is missed before the training and not after it.
            self.pipeline = models.pipeline(self.config, self.parts)
            self._draw(step=0)
        self.accelerator.wait_for_everyone()
        if self.accelerator.device.type == "cuda":  # the peak that is reported is the training's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def after_step(self, record: dict[str, Any], last: bool) -> bool:
        """File the record, and measure where it is time to. Returns whether the training was held up."""
        step = record["step"]
        if self.accelerator.is_main_process:
            runs.append(self.folder / runs.STEPS, record)
            if not math.isfinite(record["loss"]) and not self.diverged:
                self.diverged = True
                logger.warning("step %d: the loss is not finite; what comes after is of no use", step)
        self.accelerator.log({name: record[name] for name in ("train_loss", "loss", "lr")}, step=step)
        every = self.config.validation_loss_steps
        if not every or (step % every and not last):
            return False
        self._measure_held_out(step)
        self.accelerator.wait_for_everyone()
        return True

    def after_training(self, ema: EMAModel | None, steps: int) -> None:
        accelerator, trained = self.accelerator, time.perf_counter()
        ranks = self._ranks()
        if ema is not None:
            ema.copy_to(self.unet.parameters())
        if accelerator.is_main_process:
            logger.info("saving the pipeline")
            self.pipeline.save_pretrained(self.folder)
            summary = dict(
                world_size=accelerator.num_processes,
                distributed_type=accelerator.distributed_type.value,
                ranks=ranks,
                training_seconds=trained - self.began,
                saving_seconds=time.perf_counter() - trained,
                ended=time.time(),
            )
            runs.write(self.folder / runs.SUMMARY, summary)
            self._draw(steps)
        accelerator.wait_for_everyone()
        accelerator.end_training()

    def _draw(self, step: int) -> None:
        if self.config.validation_prompts:
            draw_samples(self.pipeline, self.config, self.accelerator, self.folder, step)

    def _measure_held_out(self, step: int) -> None:
        if self.held_out_loss is not None:
            with self.accelerator.autocast():
                measured = self.held_out_loss(self.accelerator.unwrap_model(self.unet))
            runs.append(self.folder / runs.VALIDATION, dict(step=step, **measured))

    def _ranks(self) -> list[dict[str, Any]]:
        """Each rank's peak memory, and a checksum of its parameters (sum and sum of squares): all ranks must agree."""
        if self.accelerator.device.type == "cuda":
            memory = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
        else:
            memory = [_peak_resident_bytes()] * 2
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


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        # The ranks wait for each other while one of them fills a cache, draws, or saves.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )
    settings = {name: value for name, value in config.model_dump().items() if name != "validation_prompts"}
    accelerator.init_trackers(config.tracker_project_name, settings)
    return accelerator


def _peak_resident_bytes() -> int:
    # ru_maxrss would not do: it begins with that of the process which started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def _log_to(path: Path, accelerator: Accelerator) -> None:
    handler = logging.FileHandler(path)
    rank = accelerator.process_index
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]  # not those of a training before this one in the same process
    logger.setLevel(logging.INFO)


def _check_ranks_joined(accelerator: Accelerator, config: TrainConfig) -> None:
    # Asked of the others themselves: two ranks that did not find each other each believe that they are alone.
    joined = int(accelerator.reduce(torch.ones(1, device=accelerator.device), reduction="sum"))
    if not joined == accelerator.num_processes == config.num_processes:
        raise RunError(
            f"{config.num_processes} ranks were asked for and {joined} joined "
            f"({accelerator.distributed_type.value}, world size {accelerator.num_processes})"
        )


def _ema(unet: diffusers.UNet2DConditionModel) -> EMAModel:
    return EMAModel(unet.parameters(), model_cls=diffusers.UNet2DConditionModel, model_config=unet.config)
