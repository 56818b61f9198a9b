"""How the embedded model was trained, from random weights to what ships: the VAE, then the UNet with the text encoder.

Each of the two is a run like any other, with its own folder, records and figures. It runs in the process that calls it,
on one device, and goes on where it was interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor

from . import data, environment, models, run_folder
from .clock import StepClock
from .compat import has_fused_adam, read_vocabulary, write_vocabulary
from .config import TrainConfig
from .device import peak_bytes
from .diffusion import draw_latents, draw_noise, draw_timesteps, loss_of, target_of
from .embedded import portable
from .environment import PROJECT
from .errors import ConfigError, DataError, RunError
from .evaluate import HeldOutLoss, draw_samples, psnr
from .launch import Show
from .live import Live, progress
from .run import PART_OF, PRETRAINING, Run

STATE = "state.pt"  # in the run folder, until the run is complete
EMA_DECAY = 0.999
KL_WEIGHT = 1e-6  # of a picture's whole divergence, against the mean error of its pixels
UNCAPTIONED = 0.1  # the share of pictures that are shown without a caption, for guidance (arXiv 2207.12598)
# Settings that only the main training heeds.
_NOT_HEEDED = (
    "prediction_type", "gradient_checkpointing", "enable_xformers_memory_efficient_attention", "use_8bit_adam",
    "gradient_accumulation_steps", "scale_lr", "whole_steps", "dream_training", "resume_from_checkpoint", "push_to_hub",
)  # fmt: skip


def train_vae(
    config: TrainConfig, vae_steps: int, vae_batch_size: int, vae_learning_rate: float, show: Show | None = None
) -> Run:
    """Train the VAE of the model that the settings name: L1 + 0.5 MSE + 1e-6 KL, half of the pictures in other colours.

    The run folder gets the VAE, in `vae/`, with the scaling factor that makes the latents' variance 1. The validation
    records have, besides the loss, the `psnr` of the held-out pictures in dB.

    Args:
        config: the settings of the UNet's training; of them the VAE's has those that are not given here.
        show: as in `launch.launch`.

    Raises:
        SdnbError: if the settings, the data or the run folder cannot be used.
    """
    _check_heeded(config)  # before hours are spent on the VAE
    config = config.updated(
        max_train_steps=vae_steps, train_batch_size=vae_batch_size, learning_rate=vae_learning_rate,
        validation_prompts=None, output_dir=str(_folder(config) / "vae"),
    )  # fmt: skip
    training = _Training(config, {PART_OF: "a pretraining"})
    vae, device = training.parts.vae.requires_grad_(True).train(), training.device
    pixels, held_out = _pixels(training.splits.train), _pixels(training.splits.held_out).to(device)

    def loss() -> Tensor:
        batch = pixels[torch.randint(len(pixels), (config.train_batch_size,))]
        return _vae_losses(vae, _in_other_colours(batch).to(device), sample=True)[0].mean()

    def measure(step: int) -> None:
        parts = [_vae_losses(vae, batch, sample=False) for batch in held_out.split(config.train_batch_size)]
        losses, back = (torch.cat(part) for part in zip(*parts))
        spread = losses.std().item() / len(losses) ** 0.5
        record = dict(step=step, loss=losses.mean().item(), standard_error=spread, pictures=len(losses))
        run_folder.append(training.folder / run_folder.VALIDATION, {**record, "psnr": psnr(held_out, back)})

    def save() -> None:
        latents = draw_latents(torch.cat([_moments(vae, batch.to(device)) for batch in pixels.split(64)]), 1.0)
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        vae.save_pretrained(training.folder / "vae")

    return training.run_through([vae], loss, measure, save, show)


def _vae_losses(vae: AutoencoderKL, pixels: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
    """The loss of each picture, [batch], and the pictures as they come back, from the posterior's draw or its mode."""
    posterior = vae.encode(pixels).latent_dist
    back = vae.decode(posterior.sample() if sample else posterior.mode()).sample.float()
    difference = (back - pixels).flatten(1)
    return (difference.abs() + 0.5 * difference.square()).mean(1) + KL_WEIGHT * posterior.kl(), back


def _in_other_colours(pixels: Tensor) -> Tensor:
    """Half of the pictures, [batch, 3, h, w], with their channels exchanged, half of these inverted, and every channel
    drawn towards a level of its own: OpenMoji has but 26 colours, and a VAE that saw no others would know no others."""
    count = len(pixels)
    other = pixels[torch.arange(count)[:, None], torch.rand(count, 3).argsort(1)]
    other = torch.where(torch.rand(count, 1, 1, 1) < 0.5, -other, other)
    level, share = 2 * torch.rand(count, 3, 1, 1) - 1, 0.8 * torch.rand(count, 3, 1, 1)
    other = torch.lerp(other, level.expand_as(other), share.expand_as(other))
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, other, pixels)


def train_unet(config: TrainConfig, trained_vae: Run, show: Show | None = None) -> Run:
    """Train the UNet and the text encoder of the model that the settings name, in the latents of a trained VAE, on the
    noise as in the main training; one caption in ten is left out. The run folder gets the pipeline, with the average of
    the weights.

    Args:
        trained_vae: what `train_vae` gives.
        show: as in `launch.launch`.

    Raises:
        SdnbError: if the settings, the data or the run folder cannot be used.
    """
    config = config.updated(output_dir=str(_folder(config) / "unet"))
    before = trained_vae.config
    training = _Training(config, {PRETRAINING: {
        "vae_steps": before.max_train_steps, "vae_batch_size": before.train_batch_size,
        "vae_learning_rate": before.learning_rate,
    }})  # fmt: skip
    parts, device, examples = training.parts, training.device, training.splits.train
    parts.vae = AutoencoderKL.from_pretrained(trained_vae.folder / "vae").to(device).requires_grad_(False)
    unet, text_encoder = parts.unet, parts.text_encoder.requires_grad_(True).train()
    scheduler, scaling_factor = parts.noise_scheduler, parts.vae.config.scaling_factor
    moments = torch.cat([_moments(parts.vae, batch.to(device)) for batch in _pixels(examples).split(64)])
    captions_of = [caption if isinstance(caption, list) else [caption] for caption in examples.captions]
    ids_of = dict(zip(examples.distinct_captions, data.tokenize(parts.tokenizer, examples.distinct_captions)))
    none = data.tokenize(parts.tokenizer, [""])[0]

    def one_of(captions: Sequence[str]) -> Tensor:
        left_out = torch.rand(()) < UNCAPTIONED
        chosen = captions[torch.randint(len(captions), ())]
        return none if left_out else ids_of[chosen]

    def loss() -> Tensor:
        views = torch.randint(len(moments), (config.train_batch_size,))
        input_ids = torch.stack([one_of(captions_of[view % len(captions_of)]) for view in views.tolist()])
        latents = draw_latents(moments[views.to(device)], scaling_factor)
        noise, added_noise = draw_noise(latents, config)
        timesteps = draw_timesteps(scheduler, latents)
        noisy_latents = scheduler.add_noise(latents, added_noise, timesteps)
        words = text_encoder(input_ids.to(device))[0]
        prediction = unet(noisy_latents, timesteps, words, return_dict=False)[0]
        target = target_of(scheduler, latents, noise, timesteps)
        return loss_of(prediction, target, scheduler, timesteps, config.snr_gamma)

    pipeline = models.pipeline(config, parts)

    def measure(step: int) -> None:
        held_out_loss = HeldOutLoss(training.splits.held_out, parts, config, device)  # its words: the encoder learns
        run_folder.append(training.folder / run_folder.VALIDATION, dict(step=step, **held_out_loss(unet)))
        if config.validation_prompts:
            draw_samples(pipeline, config, training.accelerator, training.folder, step)

    def save() -> None:
        pipeline.save_pretrained(training.folder)

    return training.run_through([unet, text_encoder], loss, measure, save, show)


def export(run: Run, folder: Path) -> None:
    """Write what ships of a trained model: its weights, in half precision, and its vocabulary."""
    parts = models.load(run.config.updated(pretrained_model_name_or_path=str(run.folder)))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "unet", "text_encoder"):
        part = getattr(parts, name)
        weights = {portable(key): value.half().contiguous() for key, value in part.named_parameters()}
        metadata = {"scaling_factor": repr(part.config.scaling_factor)} if name == "vae" else None
        save_file(weights, folder / f"{name}.safetensors", metadata)
    write_vocabulary(folder, *read_vocabulary(Path(models.source(run.config)) / "tokenizer"))


def _folder(config: TrainConfig) -> Path:
    return Path(config.output_dir or PROJECT / "runs" / "pretraining").expanduser().absolute()


def _pixels(examples: data.ImageCaptions) -> Tensor:
    """All views of a data set, [views, 3, resolution, resolution]."""
    return torch.stack([examples.pixels(view) for view in range(examples.views)])


@torch.no_grad()
def _moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent_dist.parameters


class _Training:
    """What the two have in common: the parts on their device, the steps, the records, and the way back into them."""

    def __init__(self, config: TrainConfig, besides: dict[str, Any]) -> None:
        """Args:
        besides: what the run's environment has besides the machine.
        """
        seen = environment.capture()
        config = config.resolved(seen["devices"]["type"], 1, seen["devices"]["bf16"]).updated(num_processes=1)
        _check_heeded(config)
        self.config = config
        self.folder = Path(config.output_dir)
        self.parts, self.splits = models.load(config), data.load(config)
        if self.splits.held_out is None:
            raise DataError(f"data set {config.dataset_name}: has no held-out pictures (a split named validation)")
        self.environment = {**seen, **besides, "data": self.splits.train.digest()}
        AcceleratorState._reset_state()  # of a training before this one, which may have had another precision
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.device = self.accelerator.device
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
        """Train to the saved result, from the beginning or from where it was interrupted.

        Args:
            modules: what is trained.
            loss: of a new batch, a scalar.
            measure: files what the modules are worth after a step.
            save: files the modules.
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
            fused=has_fused_adam(self.device),
        )
        schedule = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        average = EMAModel(parameters, decay=EMA_DECAY)
        stateful = [*modules, optimizer, schedule, average]
        set_seed(config.seed)
        step = self._begin(stateful)
        held = run_folder.lock(self.folder)

        @contextmanager
        def averaged() -> Iterator[None]:
            average.store(parameters)
            average.copy_to(parameters)
            try:
                with torch.no_grad(), torch.random.fork_rng(), self.accelerator.autocast():
                    yield
            finally:
                average.restore(parameters)

        show = show or Live(config.max_train_steps)
        run = Run(self.folder)
        records = run.steps.to_dict("records")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = StepClock(self.device)
        while step < config.max_train_steps:
            with self.accelerator.autocast():
                batch_loss = loss()
            clock.lap("forward")
            batch_loss.backward()
            clock.lap("backward")
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.lap("optimizer")
            average.step(parameters)
            clock.lap("ema")
            step += 1
            records.append(self._record(step, batch_loss.item(), grad_norm.item(), learning_rate, clock))
            last = step == config.max_train_steps
            if measured := step % config.validation_loss_steps == 0 or last:
                with averaged():
                    measure(step)
            if kept := step % config.checkpointing_steps == 0:
                self._keep(step, stateful)
            show(progress(records, config.max_train_steps), "", records, last)
            if measured or kept:
                clock.restart()
            else:
                clock.lap("other")
        average.copy_to(parameters)
        with torch.no_grad():
            save()
        peak_gib = peak_bytes(self.device)[0] / 2**30
        summary = dict(world_size=1, ranks=[dict(rank=0, peak_memory_gib=peak_gib)], ended=time.time())
        run_folder.write(self.folder / run_folder.SUMMARY, summary)
        for state in self.folder.glob(f"*{STATE}"):
            state.unlink()
        held.close()
        return run

    def _record(self, step: int, loss: float, grad_norm: float, lr: float, clock: StepClock) -> dict[str, Any]:
        if not math.isfinite(loss):
            raise RunError(
                f"{self.folder}: the loss of step {step} is not finite; what was measured is there. A smaller "
                "learning rate may help, or mixed_precision = no, in another output_dir."
            )
        images = self.config.train_batch_size
        record = dict(step=step, epoch=(step - 1) * images // len(self.splits.train), micro_batches=1, images=images,
                      loss=loss, train_loss=loss, step_loss=loss, grad_norm=grad_norm, lr=lr)  # fmt: skip
        record["seconds"], record["phase_seconds"] = clock.read()
        record["peak_memory_gib"] = round(peak_bytes(self.device)[0] / 2**30, 3)
        run_folder.append(self.folder / run_folder.STEPS, record)
        return record

    def _begin(self, stateful: Sequence[Any]) -> int:
        """Begin the run folder, or take up what is kept in it. Returns the step that is done."""
        there, kept = (self.folder / run_folder.ENVIRONMENT).exists(), self.folder / STATE
        if there:
            self._check_same()
        config = self.config.updated(resume_from_checkpoint="latest") if there else self.config
        run_folder.begin(config, self.environment)
        counts = models.parameter_counts(self.parts)
        described = dict(random_weights=False, parameters=counts, held_out_loss_of="the average of the weights")
        run_folder.write(self.folder / run_folder.MODEL, described)
        if not kept.exists():  # also where it was interrupted before there was one
            run_folder.go_back(self.folder, 0)
            return 0
        state = torch.load(kept, map_location=self.device, weights_only=True)
        for one, its_state in zip(stateful, state["states"]):
            one.load_state_dict(its_state)
        torch.random.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_on_gpu"].cpu())
        run_folder.go_back(self.folder, state["step"])
        return state["step"]

    def _keep(self, step: int, stateful: Sequence[Any]) -> None:
        state = dict(step=step, states=[one.state_dict() for one in stateful], random=torch.random.get_rng_state())
        if self.device.type == "cuda":
            state["random_on_gpu"] = torch.cuda.get_rng_state()
        aside = self.folder / f".{STATE}"
        torch.save(state, aside)
        aside.replace(self.folder / STATE)

    def _check_same(self) -> None:
        """Raises:
        RunError: if what is in the run folder is another training.
        """
        run = Run(self.folder)
        there, asked = (
            {**config.trajectory(), "steps": config.max_train_steps, "device": seen["devices"]["type"],
             **{name: seen.get(name) for name in (PRETRAINING, "data")}}
            for config, seen in ((run.config, run.environment), (self.config, self.environment))
        )  # fmt: skip
        if differ := [name for name in asked if asked[name] != there.get(name)]:
            listed = ", ".join(f"{name} was {there.get(name)}, now {asked[name]}" for name in differ)
            raise RunError(f"{self.folder}: there is another training: {listed}. Give another output_dir.")


def _check_heeded(config: TrainConfig) -> None:
    if config.mixed_precision == "fp16":
        raise ConfigError("mixed_precision = fp16: this training does not scale its loss: use bf16, or no")
    if not (config.max_train_steps and config.validation_loss_steps and config.seed is not None):
        raise ConfigError("this training needs steps, validation_loss_steps and a seed: set each to a number")
    defaults = type(config).model_fields
    if ignored := [name for name in _NOT_HEEDED if getattr(config, name) != defaults[name].default]:
        raise ConfigError(f"{', '.join(ignored)}: this training does not heed them: leave them out")
