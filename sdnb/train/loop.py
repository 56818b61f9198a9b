"""The training, as every rank runs it."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from sdnb.compat import has_fused_adam, has_stances, save_contiguous
from sdnb.data import image_captions as data
from sdnb.data.micro_batches import Batches
from sdnb.errors import ConfigError, RunError
from sdnb.machine import onednn_linear
from sdnb.machine.device import give_back_freed_memory, keep_freed_memory, reachable_tflops
from sdnb.machine.threads import Waits
from sdnb.metrics.step_clock import StepClock
from sdnb.models import pipeline as models
from sdnb.models.ema import EMA
from sdnb.models.encoders import WEIGHT_DTYPES, Encoders
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.train.callbacks import Observer, Tally
from sdnb.train.checkpoint_folder import find
from sdnb.train.checkpoints import Checkpoints, clean_up
from sdnb.train.objective import draw_latents, draw_noise, draw_timesteps, dream, losses_of, target_of

logger = logging.getLogger("sdnb")


def train(
    config: TrainConfig,
    show: Callable[[dict[str, Any], int], None] = lambda record, total: None,
    splits: data.Splits | None = None,
) -> None:
    """Train on this rank, from the first step, or the one resumed after, to the saved pipeline. `config` is resolved:
    its run folder exists, its precision and number of ranks are set.

    Args:
        show: is given the record of each step, and the number of steps.
        splits: the data that `config` names; left out, they are loaded.

    Raises:
        SdnbError: if the ranks did not join, or the model, the data or a checkpoint cannot be used.
    """
    folder = Path(config.output_dir)
    gc.freeze()  # what is loaded by now stays
    gc.enable()
    accelerator = _accelerator(config)
    _log_to(folder / run_folder.LOG, accelerator)
    _check_ranks_joined(accelerator, config)
    held = run_folder.lock(folder) if accelerator.is_main_process else None  # until this function ends, or its process
    waits = Waits(accelerator.device.type)
    if config.seed is not None:
        set_seed(config.seed)

    # The first to come fills the caches; on another machine the first there, whose caches may be its own.
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        parts = models.load(config)
        splits = splits or data.load(config)
        encoders = Encoders(parts, splits.train, config, accelerator.device)
        ema = EMA(models.start_of_average(config, parts), config) if config.use_ema else None
    found = find(config, splits.train)
    set_up(parts, config, accelerator.device)
    if accelerator.is_main_process:
        reached = reachable_tflops(accelerator.device, WEIGHT_DTYPES[config.mixed_precision])
        run_folder.write(folder / run_folder.MODEL, {**models.describe(config, parts), "reachable_tflops": reached})
    splits.train.tokenizer = parts.tokenizer
    # On a CPU, the cores that would load are those that train; and processes that load do without threads.
    if accelerator.device.type == "cuda" and not config.dataloader_num_workers:
        splits.train.load_in_threads(max(1, len(os.sched_getaffinity(0)) // config.ranks_here))
    loader = DataLoader(
        splits.train,
        shuffle=True,
        collate_fn=splits.train.collate,
        batch_size=config.train_batch_size,
        num_workers=config.dataloader_num_workers,
        drop_last=config.whole_steps,
    )
    optimizer = adam(config, accelerator.device)(
        parts.unet.parameters(),
        lr=config.peak_learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    # accelerate steps the schedule once per rank
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=config.schedule_steps(len(splits.train)) * accelerator.num_processes,
    )
    unet, optimizer, lr_scheduler = accelerator.prepare(parts.unet, optimizer, lr_scheduler)
    # The encoders bring its batches to the device: accelerate would wait there for all that is under way.
    loader = accelerator.prepare_data_loader(loader, device_placement=False)
    batches = Batches(loader, config)
    if ema is not None:
        ema.settle(accelerator.device)

    checkpoints = Checkpoints(accelerator, config, splits.train, batches, optimizer, lr_scheduler, ema)
    observer = Observer(accelerator, config, parts, splits.held_out, unet, ema, checkpoints)
    step, total_steps = checkpoints.resume(found), config.total_steps(len(splits.train))
    _start_records(accelerator, config, step, waits)
    _say_what_begins(accelerator, config, len(splits.train), step)
    if config.keep_freed_memory and accelerator.device.type == "cpu":
        give_back_freed_memory()  # the holes that loading has left
        keep_freed_memory()
    with _uncompiled(config):  # what is measured and drawn has sizes that no step has
        observer.before_training(step)

    tally = Tally(accelerator, config, encoders)
    clock = StepClock(accelerator.device)
    scheduler, scaling_factor = parts.noise_scheduler, parts.vae.config.scaling_factor
    while step < total_steps:
        epoch, waiting = batches.epoch, []
        for batch, ends_step in batches.of_a_step():
            clock.lap("data")
            moments, encoder_hidden_states = encoders(batch)
            latents = draw_latents(moments, scaling_factor)
            noise, added_noise = draw_noise(latents, config)
            timesteps = draw_timesteps(scheduler, latents)
            noisy_latents = scheduler.add_noise(latents, added_noise, timesteps)
            target = target_of(scheduler, latents, noise, timesteps)
            waiting.append((noisy_latents, timesteps, encoder_hidden_states, noise, target))
            clock.lap("encode")
            if len(waiting) < config.fold_micro_batches and not ends_step:
                continue

            sizes = [len(latents) for latents, *_ in waiting]
            noisy_latents, timesteps, encoder_hidden_states, noise, target = map(torch.cat, zip(*waiting))
            waiting = []
            with nullcontext() if ends_step else accelerator.no_sync(unet):
                if config.dream_training:
                    noisy_latents, target = dream(
                        unet, scheduler, noisy_latents, timesteps, encoder_hidden_states, noise, target,
                        config.dream_detail_preservation,
                    )  # fmt: skip
                prediction = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
                losses = losses_of(prediction, target, scheduler, timesteps, config.snr_gamma, sizes)
                clock.lap("forward")
                accelerator.backward(losses.sum() / config.gradient_accumulation_steps)
                clock.lap("backward")
            tally.add(losses, sum(sizes))

        learning_rate = lr_scheduler.get_last_lr()[0]
        grad_norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("optimizer")
        if ema is not None:
            ema.step(unet.parameters())
            clock.lap("ema")

        if config.compile_unet != "no" and tally.images == config.train_batch_size * config.gradient_accumulation_steps:
            _compile_no_more()
        step += 1
        record = dict(step=step, epoch=epoch, **tally.read(grad_norm), lr=learning_rate)
        # A fused AdamW does not tell the schedule that it left out a step because gradients overflowed in float16.
        if accelerator.scaler is None or math.isfinite(record["grad_norm"]):
            lr_scheduler.step()
        record["seconds"], record["phase_seconds"] = clock.read()
        show(record, total_steps)
        last = step == total_steps
        held_up = observer.after_step(record, last)
        if batches.epoch > epoch or last:
            held_up |= observer.after_epoch(epoch, step)
        if held_up:
            clock.restart()
            tally.restart()
        else:
            clock.lap("other")

    observer.after_training(step, waits.stop())
    del held


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `Batches` knows where a step ends
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        # The ranks wait for each other while one of them fills a cache, draws, or saves.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )


def set_up(parts: models.Parts, config: TrainConfig, device: torch.device) -> None:
    """Have the parts compute as the settings ask for.

    Raises:
        ConfigError: if they cannot.
    """
    if config.prediction_type is not None:
        parts.noise_scheduler.register_to_config(prediction_type=config.prediction_type)
    predicts = parts.noise_scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise ConfigError(f"prediction_type: the model's scheduler says {predicts}: set it to epsilon, or v_prediction")
    if config.dream_training and predicts != "epsilon":
        raise ConfigError("dream_training is defined for models that predict the noise; this one predicts a velocity")
    if config.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        try:
            parts.unet.enable_xformers_memory_efficient_attention()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(f"enable_xformers_memory_efficient_attention: {error}") from error
    if config.onednn_linear and onednn_linear.pays(device, WEIGHT_DTYPES[config.mixed_precision]):
        onednn_linear.convolve(parts.unet)
    if config.channels_last:  # the UNet's only: noise is drawn in the order in which the VAE lays out what it gives
        parts.unet.to(memory_format=torch.channels_last)
        save_contiguous(parts.unet)
    if config.compile_unet != "no":
        _compile(parts.unet, config)


def _compile(unet: UNet2DConditionModel, config: TrainConfig) -> None:
    torch._dynamo.config.cache_size_limit = 64  # blocks of one kind, each of another shape
    # Within DDP, torch cuts what it compiles at the buckets of gradients, so that their reduction begins before the
    # backward pass ends. Blocks are such pieces already; cut further, a large one of SD v1-4 was four graphs. And torch
    # 2.1 cannot cut what is checkpointed.
    torch._dynamo.config.optimize_ddp = config.compile_unet == "whole" and not config.gradient_checkpointing
    if has_stances():
        torch.compiler.set_stance("default")
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for module in blocks if config.compile_unet == "blocks" else [unet]:
        module.compile(dynamic=False, mode="reduce-overhead" if config.cuda_graphs else None)


def _uncompiled(config: TrainConfig) -> AbstractContextManager:
    if config.compile_unet == "no" or not has_stances():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _compile_no_more() -> None:
    """A whole step is compiled for. Batches of another size, at an epoch's end, run as they are: to compile for each
    takes longer than they do."""
    if has_stances():
        torch.compiler.set_stance("eager_on_recompile")


def adam(config: TrainConfig, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """The AdamW that the settings ask for, fused where torch has it for the device."""
    if config.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit
    if config.fused_optimizer and has_fused_adam(device.type):
        return partial(torch.optim.AdamW, fused=True)
    return torch.optim.AdamW


def _start_records(accelerator: Accelerator, config: TrainConfig, step: int, waits: Waits) -> None:
    """Begin the records after `step`: what an interrupted training recorded beyond it is recorded again."""
    if accelerator.is_main_process:
        clean_up(Path(config.output_dir))
        run_folder.go_back(Path(config.output_dir), step)
        run_folder.add_to_environment(Path(config.output_dir), threads=waits.now())
    settings = config.model_dump(mode="json", exclude={"validation_prompts", "hub_token"})
    purge = {"tensorboard": {"purge_step": step + 1}} if step else {}
    accelerator.init_trackers(config.tracker_project_name, settings, init_kwargs=purge)


def _say_what_begins(accelerator: Accelerator, config: TrainConfig, examples: int, step: int) -> None:
    steps, laid_out, ranks = config.total_steps(examples), config.schedule_steps(examples), accelerator.num_processes
    logger.info(
        "%d pictures, %d optimizer steps of %d%s, on %s%s", examples, steps, config.global_batch,
        f", {step} of them done" if step else "", accelerator.device,
        f", {ranks} ranks, {accelerator.distributed_type.value}" if ranks > 1 else "",
    )  # fmt: skip
    if laid_out != steps and not config.lr_scheduler.startswith("constant") and accelerator.is_main_process:
        logger.warning(
            "the %s schedule is laid out for %d steps, as the reference does it with num_train_epochs and several "
            "ranks, and the training has %d: set max_train_steps = %d to have it end with the training",
            config.lr_scheduler, laid_out, steps, steps,
        )  # fmt: skip
    if config.cuda_graphs and ranks > 1 and accelerator.is_main_process:
        logger.warning(
            "cuda_graphs: torch is known to fail with these and several ranks (its issues 113809 and 140395): if this "
            "training does, leave them out"
        )


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
