"""The training, as every rank runs it."""

import gc
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from sdnb.data.loading import Splits
from sdnb.errors import ConfigError, RunError
from sdnb.machine.device import WEIGHT_DTYPES, keep_freed_memory, measured_matmul_tflops, release_freed_memory
from sdnb.machine.device_kind import kind_of
from sdnb.machine.threads import Waits
from sdnb.machine.witness import what_else_runs
from sdnb.metrics.isolation import most_of_others
from sdnb.models.flops import describe_model
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.training.callbacks import Callbacks
from sdnb.training.checkpoint_folder import find_checkpoints
from sdnb.training.checkpoints import fingerprint, remove_leftovers, resume
from sdnb.training.machines import link
from sdnb.training.objective import draw_latents, draw_noise, draw_timesteps, dream, losses_of, target_of
from sdnb.training.setup import Training, build, set_stance, start

logger = logging.getLogger("sdnb")

Show = Callable[[dict[str, Any], int], None]
NoisyBatch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def train(config: TrainConfig, show: Show = lambda record, total: None, splits: Splits | None = None) -> None:
    """Train on this rank, from the first step or a checkpoint to the saved pipeline. Raises SdnbError if the ranks did
    not join, or the model, the data or a checkpoint cannot be used; Stopped if a signal ended it, see `StopRequest`.

    Args:
        config: resolved: its run folder exists, its precision and number of ranks are set.
        show: gets the record of each step, and the number of steps.
        splits: the data that `config` names; default: they are loaded.
    """
    gc.freeze()  # the collector ignores what is loaded by now
    gc.enable()
    accelerator = start(config)
    machines = link(config, accelerator)
    waits = Waits(accelerator.device.type)
    training = build(config, accelerator, splits)
    callbacks = _begin(training, waits)
    paused = True
    with training.stop, machines:
        while training.step < training.total_steps:
            if paused:  # no step counts the time and the energy of a pause
                training.clock.restart()
                training.stats.restart()
            else:
                training.clock.end_phase("other")
            epoch = training.batches.epoch
            record = train_step(training)
            if record["images"] == config.global_batch:
                # Batches of another size, at the end of an epoch, run uncompiled: compiling for each would take longer.
                set_stance(config, "eager_on_recompile")
            show(record, training.total_steps)
            last = training.step == training.total_steps
            paused = callbacks.after_step(record, last)
            if training.batches.epoch > epoch or last:
                paused |= callbacks.after_epoch(epoch)
        callbacks.after_training(waits.stop())


def train_step(training: Training, noisy: Callable[..., NoisyBatch] | None = None) -> dict[str, Any]:
    """One optimizer step. Returns its record. `noisy`: in place of `add_noise`."""
    config, clock = training.config, training.clock
    epoch, waiting = training.batches.epoch, []
    for batch, ends_step in training.batches.of_a_step():
        clock.end_phase("data")
        waiting.append((noisy or add_noise)(training, batch))
        clock.end_phase("encode")
        if len(waiting) == config.fold_micro_batches or ends_step:
            forward_and_backward(training, waiting, ends_step)
            waiting = []

    learning_rate = training.schedule.get_last_lr()[0]
    grad_norm = training.accelerator.clip_grad_norm_(training.trained, config.largest_norm)
    training.optimizer.step()
    training.optimizer.zero_grad()
    clock.end_phase("optimizer")
    if training.ema is not None:
        training.ema.step(training.unet.parameters())
        clock.end_phase("ema")

    training.step += 1
    record = dict(step=training.step, epoch=epoch, **training.stats.read(grad_norm), lr=learning_rate)
    # A fused AdamW does not tell the schedule that it skipped a step because gradients overflowed in float16.
    if training.accelerator.scaler is None or math.isfinite(record["grad_norm"]):
        training.schedule.step()
    record["seconds"], record["phase_seconds"] = clock.read()
    return record


def add_noise(training: Training, batch: dict[str, Any]) -> NoisyBatch:
    """Noisy latents, timesteps, hidden states, noise and target of a micro-batch."""
    config, scheduler = training.config, training.parts.noise_scheduler
    moments, encoder_hidden_states = training.encoders(batch)
    latents = draw_latents(moments, training.parts.vae.config.scaling_factor)
    noise, added_noise = draw_noise(latents, config.noise_offset, config.input_perturbation)
    timesteps = draw_timesteps(scheduler, latents)
    noisy_latents = scheduler.add_noise(latents, added_noise, timesteps)
    target = target_of(scheduler, latents, noise, timesteps)
    return noisy_latents, timesteps, encoder_hidden_states, noise, target


def forward_and_backward(training: Training, batches: list[NoisyBatch], ends_step: bool) -> None:
    """Run some micro-batches as one batch, and add up their gradients. The ranks reduce them when the step ends."""
    config, unet, scheduler = training.config, training.unet, training.parts.noise_scheduler
    sizes = [len(noisy_latents) for noisy_latents, *_ in batches]
    noisy_latents, timesteps, encoder_hidden_states, noise, target = map(torch.cat, zip(*batches))
    with nullcontext() if ends_step else training.accelerator.no_sync(unet):
        if config.dream_training:
            noisy_latents, target = dream(
                unet, scheduler, noisy_latents, timesteps, encoder_hidden_states, noise, target,
                config.dream_detail_preservation,
            )  # fmt: skip
        prediction = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        losses = losses_of(prediction, target, scheduler, timesteps, config.snr_gamma, sizes)
        training.clock.end_phase("forward")
        training.accelerator.backward(losses.sum() / config.gradient_accumulation_steps)
        training.clock.end_phase("backward")
    training.stats.add(losses, sum(sizes))


def _begin(training: Training, waits: Waits) -> Callbacks:
    """Everything between set-up and the first step: resume, start the records, measure and draw."""
    config, accelerator = training.config, training.accelerator
    found = find_checkpoints(config, training.splits.train)
    if accelerator.is_main_process:
        reached = measured_matmul_tflops(accelerator.device, WEIGHT_DTYPES[config.mixed_precision or "no"])
        described = {**describe_model(config, training.parts), **fingerprint(config), "reachable_tflops": reached}
        files.write(training.folder / run_folder.MODEL, described)
    callbacks = Callbacks(training)
    training.step = resume(training, found)
    if accelerator.is_main_process:
        remove_leftovers(training.folder)
        # An interrupted run may have recorded later steps, which will be recorded again.
        run_folder.go_back(training.folder, training.step)
        data = {"images": training.splits.train.count, "digest": training.splits.train.digest()}
        run_folder.add_to_environment(training.folder, threads=waits.now(), data=data)
    settings = config.model_dump(mode="json", exclude={"validation_prompts", "hub_token"})
    purge = {"tensorboard": {"purge_step": training.step + 1}} if training.step else {}
    try:
        accelerator.init_trackers(config.tracker_project_name, settings, init_kwargs=purge)
    except Exception as error:  # each tracker raises its own
        raise ConfigError(
            f"report_to = {config.report_to}, logging_dir = {config.logging_dir}: cannot be started: {error}"
        ) from error
    _log_start(training)
    _look_around(training)
    if kind_of(accelerator.device.type).is_host:
        release_freed_memory()  # gaps that loading has left
        keep_freed_memory()
    set_stance(config, "force_eager")  # for batch sizes that no step has
    callbacks.before_training()
    set_stance(config, "default")
    return callbacks


def _look_around(training: Training) -> None:
    """Log and record what else runs. Raises RunError if that is too much and `device_isolation` is `error`."""
    config, accelerator = training.config, training.accelerator
    kind = kind_of(accelerator.device.type)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and config.device_isolation != "ignore":
        with suppress(OSError):  # not Linux
            others = what_else_runs(with_siblings=accelerator.num_processes > 1)
            on_device = training.stats.witness.other_processes()
            found = {"share_of_cores": round(others.share, 3), "processes": others.names, "gpu_processes": on_device}
            run_folder.add_to_environment(training.folder, what_else_ran=found)
            beside = f"; {on_device} other processes compute on the {kind.noun}" if on_device else ""
            is_shared = others.share > most_of_others(kind.is_host) or on_device
            if is_shared and config.device_isolation == "error":
                raise RunError(f"device_isolation = error: {others}{beside}. End them, or set device_isolation = warn")
            logger.log(logging.WARNING if is_shared else logging.INFO, "%s%s", others, beside)
    accelerator.wait_for_everyone()


def _log_start(training: Training) -> None:
    config, accelerator, examples = training.config, training.accelerator, training.splits.train.count
    held_out = len(training.splits.held_out) if training.splits.held_out is not None else 0
    steps, scheduled, ranks = training.total_steps, config.schedule_steps(examples), accelerator.num_processes
    logger.info(
        "%s images to train on, %d held out; %d optimizer steps of %d%s, on %s%s",
        "an unknown number of" if examples is None else examples, held_out, steps, config.global_batch,
        f", {training.step} of them done" if training.step else "", accelerator.device,
        f", {ranks} ranks, {accelerator.distributed_type.value}" if ranks > 1 else "",
    )  # fmt: skip
    if (missing := kind_of(accelerator.device.type).missing(accelerator.device)) and accelerator.is_main_process:
        logger.info("not measured, as torch does not tell it of this kind of device: %s", "; ".join(missing))
    if config.lora and accelerator.is_main_process:
        logger.info("gradients are not clipped: the reference's script for LoRA does not apply max_grad_norm")
    if scheduled != steps and not config.lr_scheduler.startswith("constant") and accelerator.is_main_process:
        logger.warning(
            "the %s schedule is laid out for %d steps, but this run has %d: with num_train_epochs and several ranks "
            "the reference counts so. Set max_train_steps = %d to make the schedule end with the run",
            config.lr_scheduler, scheduled, steps, steps,
        )  # fmt: skip
