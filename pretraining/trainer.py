"""A training loop for one device. It runs in the calling process, and resumes exactly where it was interrupted. Both
stages of `stages.py` use it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from sdnb.data.loading import load_data
from sdnb.errors import ConfigError, DataError, RunError
from sdnb.figures.live import Live, Progress
from sdnb.launch.notebook import Show
from sdnb.machine import environment
from sdnb.machine.device_kind import kind_of
from sdnb.metrics.step_clock import StepClock
from sdnb.models.flops import parameter_counts
from sdnb.models.pipeline import load_parts
from sdnb.report.run import Run
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig

PRETRAINING = "pretraining"  # key in environment.json: the settings of the previous stage
STATE = "state.pt"  # file in the run folder, deleted when the run is complete
EMA_DECAY = 0.999
# Settings that this loop does not use.
_UNUSED = (
    "prediction_type", "gradient_checkpointing", "enable_xformers_memory_efficient_attention", "use_8bit_adam",
    "gradient_accumulation_steps", "scale_lr", "whole_steps", "dream_training", "allow_tf32",
    "compile_unet", "checkpoints_total_limit", "resume_from_checkpoint", "push_to_hub",
)  # fmt: skip


class Training:
    """A run: the model's parts on their device, the data, and the steps with their records and saved states."""

    def __init__(self, config: TrainConfig, besides: dict[str, Any]) -> None:
        """Args:
        besides: additional entries for environment.json.
        """
        seen = environment.capture()
        config = environment.resolved(config.updated(num_processes=1), environment.Devices(**seen["devices"]))
        check_used(config)
        self.config = config
        self.folder = Path(config.output_dir)
        self.parts, self.splits = load_parts(config), load_data(config)
        if self.splits.held_out is None:
            raise DataError(f"data set {config.dataset_name}: has no held-out images (a split named validation)")
        self.environment = {**seen, **besides, "data": self.splits.train.digest()}
        AcceleratorState._reset_state()  # an earlier run may have used another precision
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.device, self.kind = self.accelerator.device, kind_of(self.accelerator.device.type)
        for part in (self.parts.vae, self.parts.unet, self.parts.text_encoder):
            part.to(self.device)

    def run_through(
        self,
        modules: Sequence[torch.nn.Module],
        loss: Callable[[], Tensor],
        measure: Callable[[int], None],
        save: Callable[[], None],
        show: Show | None,
    ) -> Run:
        """Run all steps and save the result. Starts at the beginning, or resumes from a saved state.

        Args:
            modules: the modules to train.
            loss: draws a new batch and returns its loss, a scalar.
            measure: evaluates the modules after a step and writes the result.
            save: writes the modules.
        """
        if (self.folder / run_folder.SUMMARY).exists():
            self._check_same()
            return Run(self.folder)
        config = self.config
        parameters = [parameter for module in modules for parameter in module.parameters()]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=self.kind.has_fused_adam or None,  # with False, torch would update the weights one by one
        )
        schedule = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        ema = EMAModel(parameters, decay=EMA_DECAY)
        stateful = [*modules, optimizer, schedule, ema]
        set_seed(config.seed)
        with self._open():
            step = self._resume(stateful)

            @contextmanager
            def ema_weights() -> Iterator[None]:
                ema.store(parameters)
                ema.copy_to(parameters)
                try:
                    with torch.no_grad(), torch.random.fork_rng(), self.accelerator.autocast():
                        yield
                finally:
                    ema.restore(parameters)

            show = show or Live()
            run = Run(self.folder)
            progress = Progress(run, config.max_train_steps, resumed_after=step)
            progress.records = run.steps.to_dict("records")
            self.kind.reset_peak(self.device)
            clock = StepClock(self.kind)
            while step < config.max_train_steps:
                with self.accelerator.autocast():
                    batch_loss = loss()
                clock.end_phase("forward")
                batch_loss.backward()
                clock.end_phase("backward")
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                learning_rate = schedule.get_last_lr()[0]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                clock.end_phase("optimizer")
                ema.step(parameters)
                clock.end_phase("ema")
                step += 1
                progress.records.append(self._record(step, batch_loss.item(), grad_norm.item(), learning_rate, clock))
                last = step == config.max_train_steps
                if measured := step % config.validation_loss_steps == 0 or last:
                    with ema_weights():
                        measure(step)
                if saved := step % config.checkpointing_steps == 0:
                    self._save_state(step, stateful)
                progress.ended = last
                show(progress)
                if measured or saved:
                    clock.restart()
                else:
                    clock.end_phase("other")
            ema.copy_to(parameters)
            with torch.no_grad():
                save()
            peak_gib = self.kind.peak_bytes(self.device)[0] / 2**30
            summary = dict(
                world_size=1,
                ranks=[dict(rank=0, peak_memory_gib=peak_gib)],
                ended=time.time(),
                total_seconds=run_folder.seconds_since_start(self.folder),
            )
            files.write(self.folder / run_folder.SUMMARY, summary)
            for state in self.folder.glob(f"*{STATE}"):
                state.unlink()
            return run

    def _record(self, step: int, loss: float, grad_norm: float, lr: float, clock: StepClock) -> dict[str, Any]:
        if not math.isfinite(loss):
            raise RunError(
                f"{self.folder}: the loss of step {step} is not finite. The records up to it are in the folder. A "
                "smaller learning rate may help, or mixed_precision = no, in another output_dir."
            )
        images = self.config.train_batch_size
        record = dict(step=step, epoch=(step - 1) * images // len(self.splits.train), micro_batches=1, images=images,
                      loss=loss, train_loss=loss, step_loss=loss, grad_norm=grad_norm, lr=lr)  # fmt: skip
        record["seconds"], record["phase_seconds"] = clock.read()
        record["peak_memory_gib"] = round(self.kind.peak_bytes(self.device)[0] / 2**30, 3)
        files.append(self.folder / run_folder.STEPS, record)
        return record

    def _open(self) -> TextIO:
        """Create the run folder, or continue the run in it. Returns its lock."""
        there = (self.folder / run_folder.ENVIRONMENT).exists()
        if there:
            self._check_same()
        config = self.config.updated(resume_from_checkpoint="latest") if there else self.config
        _, held = run_folder.begin(config, self.environment)
        counts = parameter_counts(self.parts)
        described = dict(random_weights=False, parameters=counts, held_out_loss_of="the EMA weights")
        files.write(self.folder / run_folder.MODEL, described)
        return held

    def _resume(self, stateful: Sequence[Any]) -> int:
        """Load the saved state and delete the records after it. Returns the step of the state."""
        saved = self.folder / STATE
        if not saved.exists():  # also if the run was interrupted before its first saved state
            run_folder.go_back(self.folder, 0)
            return 0
        state = torch.load(saved, map_location=self.device, weights_only=True)
        for one, its_state in zip(stateful, state["states"]):
            one.load_state_dict(its_state)
        torch.random.set_rng_state(state["random"].cpu())
        if (on_device := state.get("random_on_device")) is not None:
            self.kind.set_rng_state(on_device.cpu())
        run_folder.go_back(self.folder, state["step"])
        return state["step"]

    def _save_state(self, step: int, stateful: Sequence[Any]) -> None:
        state = dict(step=step, states=[one.state_dict() for one in stateful], random=torch.random.get_rng_state())
        state["random_on_device"] = self.kind.rng_state()
        aside = self.folder / f".{STATE}"
        torch.save(state, aside)
        aside.replace(self.folder / STATE)

    def _check_same(self) -> None:
        """Raises:
        RunError: if the run folder has a run with other settings.
        """
        run = Run(self.folder)
        there, asked = (
            {**config.trajectory(), "steps": config.max_train_steps, "device": seen["devices"]["type"],
             **{name: seen.get(name) for name in (PRETRAINING, "data")}}
            for config, seen in ((run.config, run.environment), (self.config, self.environment))
        )  # fmt: skip
        if differ := [name for name in asked if asked[name] != there.get(name)]:
            listed = ", ".join(f"{name} was {there.get(name)}, now {asked[name]}" for name in differ)
            raise RunError(f"{self.folder}: it has a run with other settings: {listed}. Give another output_dir.")


def check_used(config: TrainConfig) -> None:
    """Raises:
    ConfigError: if pretraining does not support a setting.
    """
    if config.mixed_precision == "fp16":
        raise ConfigError("mixed_precision = fp16: pretraining does not scale its loss: use bf16, or no")
    if config.num_processes not in (None, 1):
        raise ConfigError(f"num_processes = {config.num_processes}: pretraining runs on one rank: do not set it")
    if not config.center_crop:
        raise ConfigError("center_crop = False: pretraining does not crop at random: set it to True")
    if not (config.max_train_steps and config.validation_loss_steps and config.seed is not None):
        raise ConfigError("pretraining needs steps, validation_loss_steps and a seed: set each to a number")
    defaults = type(config).model_fields
    if ignored := [name for name in _UNUSED if getattr(config, name) != defaults[name].default]:
        raise ConfigError(f"{', '.join(ignored)}: pretraining does not use them: do not set them")
