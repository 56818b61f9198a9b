"""What happens around the steps: records, held-out loss, drawn images, checkpoints, the saved pipeline."""

import logging
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

from sdnb.errors import RunError
from sdnb.machine.device import release_freed_memory
from sdnb.machine.device_kind import HOST, kind_of
from sdnb.metrics.recent import RECENT_STEPS, recent_rates, utilisation_of
from sdnb.metrics.steps import first_not_finite
from sdnb.models.lora import SCALES, save_adapter, scaled
from sdnb.models.pipeline import assemble
from sdnb.run import files, hub
from sdnb.run import folder as run_folder
from sdnb.training.checkpoints import Checkpoints
from sdnb.training.evaluation import HeldOutLoss, draw_samples
from sdnb.training.setup import Training
from sdnb.training.stopping import stopped

logger = logging.getLogger("sdnb")
SECONDS_BETWEEN_LINES = 30.0  # of the log


class Callbacks:
    """Called before and after the training, after each step and each epoch. They use no random number of the training,
    and their time counts for no step."""

    def __init__(self, training: Training) -> None:
        self.training, self.checkpoints = training, Checkpoints(training)
        self.config, self.accelerator, self.folder = training.config, training.accelerator, training.folder
        self.kind = kind_of(training.accelerator.device.type)
        self.began, self.diverged = time.perf_counter(), False
        self.spent: Counter[str] = Counter()  # seconds that no step counts
        self.held_out_loss: HeldOutLoss | None = None
        held_out = training.splits.held_out
        if self.config.validation_loss_steps and held_out is None:
            logger.warning("no held-out loss: this data set has no split named validation or test")
        elif self.config.validation_loss_steps and self.accelerator.is_main_process:
            device = self.accelerator.device
            self.held_out_loss = HeldOutLoss(held_out, training.parts, self.config.train_batch_size, device)
        if self.accelerator.is_main_process:
            self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
            self.utilisation, self.logged = utilisation_of(run_folder.RunFolder(self.folder)), self.began
            self.repository = hub.create(self.config) if self.config.push_to_hub else None
            # Assembled now, so that a missing part is found before the training and not after it.
            with torch.random.fork_rng(devices=[]):  # transformers 4 draws random weights and overwrites them
                self.pipeline = assemble(self.config, training.parts)

    def before_training(self) -> None:
        """Measure and draw, unless a run is resumed."""
        self.began = time.perf_counter()
        if self.training.step == 0:
            self._measure_held_out()
            self._draw()
        self.accelerator.wait_for_everyone()
        self.kind.empty_cache()
        self.kind.reset_peak(self.accelerator.device)  # the reported peak starts with the first step

    def after_step(self, record: dict[str, Any], last: bool) -> bool:
        """Write the record; measure, and save a checkpoint, when it is time. Returns whether the training paused.
        Raises Stopped, with a checkpoint, if a signal asks the training to stop before its last step."""
        step = record["step"]
        if self.accelerator.is_main_process:
            peak_gib = self.kind.peak_bytes(self.accelerator.device)[0] / 2**30
            record = {**record, "peak_memory_gib": round(peak_gib, 3)}
            files.append(self.folder / run_folder.STEPS, record)
            self._log(record)
            if self.accelerator.scaler is not None and not math.isfinite(record["grad_norm"]):
                scale = self.accelerator.scaler.get_scale()
                logger.info("step %d: skipped, as its gradients overflowed in float16; loss scale: %g", step, scale)
            if not math.isfinite(record["loss"]) and not self.diverged:
                self.diverged = True
                logger.warning("step %d: the loss is not finite; the steps after it are useless", step)
        self.accelerator.log({name: record[name] for name in ("train_loss", "loss", "lr")}, step=step)
        measure = self.config.validation_loss_steps and (step % self.config.validation_loss_steps == 0 or last)
        if measure:
            self._measure_held_out()
            self.accelerator.wait_for_everyone()
        number = 0 if last else self.training.stats.signal
        save = step % self.config.checkpointing_steps == 0 or number
        if save:
            with self._counted("saving"):
                self.checkpoints.save(step)
        if number:
            self._finish_trackers()
            error = stopped(number, self.folder, step)
            logger.warning("%s", error)
            raise error
        return bool(measure or save)

    def after_epoch(self, epoch: int) -> bool:
        """Draw `validation_prompts`, when it is time. Returns whether the training paused."""
        if not self.config.validation_prompts or epoch % self.config.validation_epochs:
            return False
        self._draw()
        self.accelerator.wait_for_everyone()
        return True

    def after_training(self, threads: dict[str, Any]) -> None:
        """Save, draw and upload. `threads`: how threads have waited for each other, see `Waits.stop`."""
        accelerator, trained, paused = self.accelerator, time.perf_counter(), sum(self.spent.values())
        ranks = self._describe_ranks()
        if self.training.ema is not None:
            self.training.ema.copy_to(self.training.unet.parameters())
        if accelerator.is_main_process:
            logger.info("saving the %s", "adapter" if self.config.lora else "pipeline")
            release_freed_memory()  # saving makes copies
            with self._counted("saving"):
                self._save_trained()
            summary = dict(
                world_size=accelerator.num_processes, machines=self.config.num_machines,
                distributed_type=accelerator.distributed_type.value, ranks=ranks, threads=threads,
                diverged_at=first_not_finite(run_folder.RunFolder(self.folder).steps),
                second_moment=self.training.second_moment, training_seconds=trained - self.began, paused_seconds=paused,
                saving_seconds=time.perf_counter() - trained, spent_seconds=dict(self.spent), ended=time.time(),
                total_seconds=run_folder.seconds_since_start(self.folder),
            )  # fmt: skip
            files.write(self.folder / run_folder.SUMMARY, summary)
            run_folder.write_results(self.folder)
        for scale in SCALES if self.config.lora else (1.0,):
            self._draw(scale)
        if accelerator.is_main_process and self.repository:
            logger.info("uploading to %s", self.repository)
            hub.publish(run_folder.RunFolder(self.folder), self.config, self.repository)
        accelerator.wait_for_everyone()
        self._finish_trackers()

    def _finish_trackers(self) -> None:
        # Not `end_training`, which also gives up the process group. DDP's reducer would then hold it last, and destroy
        # it while holding the GIL, for which a thread of gloo that holds the group's lock may be waiting.
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _save_trained(self) -> None:
        try:
            if self.config.lora:
                save_adapter(self.training.parts.unet, self.folder / run_folder.ADAPTER)
            else:
                self._save_pipeline()
        except Exception as error:  # torch and safetensors do not raise OSError when the disk is full
            free = shutil.disk_usage(self.folder).free / 2**30
            raise RunError(
                f"{self.folder}: the trained weights could not be saved: {error}\n{free:.2f} GiB are free there. The "
                "measurements are complete. With a checkpoint, resume_from_checkpoint = latest returns to this point."
            ) from error

    def _save_pipeline(self) -> None:
        # In float32: from_pretrained keeps the stored precision of transformers' models but not of diffusers', and the
        # two would not fit together.
        encoders, dtype = (self.pipeline.vae, self.pipeline.text_encoder), self.pipeline.vae.dtype
        for encoder in encoders:
            encoder.float()
        self.pipeline.save_pretrained(self.folder)
        for encoder in encoders:
            encoder.to(dtype)

    def _draw(self, scale: float = 1.0) -> None:
        """Draw with the weights that would be saved now, unless the run has these images already. `scale`: of an
        adapter."""
        config, step = self.config, self.training.step
        if not (config.validation_prompts and self.accelerator.is_main_process):
            return
        drawn = run_folder.RunFolder(self.folder).drawn
        if len(drawn) and ((drawn.step == step) & (drawn.scale == scale)).any():
            return
        ema, unet = self.training.ema, self.training.parts.unet
        logger.info("drawing images %s", f"after step {step}" if step else "before the training")
        with self._counted("images"), ema.applied_to(unet) if ema is not None else scaled(unet, scale):
            draw_samples(
                self.pipeline, self.accelerator, self.folder, step, config.validation_prompts, config.resolution,
                seeds=[(config.seed or 0) + index for index in range(config.num_validation_images)],
                guidance_scale=config.validation_guidance_scale, adapter_scale=scale if config.lora else None,
            )  # fmt: skip

    def _measure_held_out(self) -> None:
        if self.held_out_loss is not None:
            if self.training.step == 0:
                logger.info("measuring the held-out loss before the training")
            with self._counted("held-out loss"), self.accelerator.autocast():
                measured = self.held_out_loss(self.accelerator.unwrap_model(self.training.unet))
            files.append(self.folder / run_folder.VALIDATION, dict(step=self.training.step, **measured))

    def _log(self, record: dict[str, Any]) -> None:
        """The rates, in the log, twice a minute at most."""
        self.recent.append(record)
        if time.perf_counter() < self.logged + SECONDS_BETWEEN_LINES:
            return
        self.logged = time.perf_counter()
        rates = ", ".join(f"{name} {text}" for name, text in recent_rates(self.recent, *self.utilisation))
        logger.info("step %d/%d: %s", record["step"], self.training.total_steps, rates)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - began

    def _describe_ranks(self) -> list[dict[str, Any]]:
        """Each rank's peak memory, and a checksum of its weights (sum and sum of squares): all ranks must agree."""
        memory = self.kind.peak_bytes(self.accelerator.device)  # before the sums take some
        sums = torch.zeros(2, dtype=torch.float64)
        for parameter in self.training.trained:  # one by one, and on the host: not every device has float64
            values = parameter.detach().to(HOST).double()
            sums += torch.stack([values.sum(), values.square().sum()])
        ranks = []
        for rank, (allocated, reserved, *checksum) in enumerate(gather_object([(*memory, *sums.tolist())])):
            peaks = dict(peak_memory_gib=allocated / 2**30, peak_reserved_gib=reserved / 2**30)
            ranks.append(dict(rank=rank, **peaks, checksum=[value.hex() for value in checksum]))
        if any(rank["checksum"] != ranks[0]["checksum"] for rank in ranks):
            logger.error("the ranks' weights differ at the end: %s", [rank["checksum"] for rank in ranks])
        return ranks
