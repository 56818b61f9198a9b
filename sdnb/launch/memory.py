"""Before the launch: does the run fit? Predicts the peak memory of a rank from the model's architecture."""

import logging
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

from sdnb.errors import ConfigError, SdnbError
from sdnb.launch.dry_run import trace_of
from sdnb.machine.device_kind import kind_of
from sdnb.machine.environment import Devices, devices
from sdnb.settings.config import TrainConfig

logger = logging.getLogger("sdnb")

# What the allocator takes in addition to the tensors. On a CPU, fitted to the runs of benchmarks/growth.py (glibc,
# torch 2.13): fragmentation of the heap, the same with gradient checkpointing. Blocks from 32 MiB are outside the heap,
# so this is too much for large models. On an accelerator, an estimate: fragmentation, and workspaces of libraries.
_HEAP_SLACK_OF_ACTIVATIONS = 0.6
_SLACK_OF_ALL = 0.05
# The share of a rank's memory that folded micro-batches may fill: a prediction error must not end a run.
_FOR_FOLDING = 0.8


@dataclass(frozen=True)
class Prediction:
    """The peak memory of a rank. `activations_gib` is the maximum of what comes and goes within a step."""

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    average_gib: float
    encoders_gib: float
    activations_gib: float
    overhead_gib: float

    @property
    def total_gib(self) -> float:
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name[:-4]} {getattr(self, part.name):.2f}" for part in fields(self))
        return f"{self.total_gib:.2f} GiB: {parts}"


def settle(config: TrainConfig, on: Devices) -> tuple[TrainConfig, Prediction | None]:
    """A copy in which `fold_micro_batches` is set: as many as fit in most of a rank's memory. It counts all memory and
    not only what is free, so that a machine always folds the same number; fewer only if that much is not free. In
    float16 the default is none: folded gradients add up in float16, where the reference adds them up in float32, so
    they overflow at a smaller scale of the loss, and other steps are skipped. Also returns the predicted peak; None if
    the architecture cannot be predicted. Raises ConfigError if the peak is above the free memory, and ModelError if the
    model is missing."""
    steps = config.gradient_accumulation_steps
    wanted = config.fold_micro_batches or (1 if config.mixed_precision == "fp16" else None)
    asked = min(wanted, steps) if wanted else None
    all_gib, free_gib = (per_rank(config, on.type, gib) for gib in (on.memory_gib, on.free_gib))
    try:
        folded = asked or folded_that_fits(config, on.type, min(_FOR_FOLDING * all_gib, free_gib))
        predicted = predict(config, on.type, folded)
    except SdnbError:
        raise
    except Exception as error:  # of any type: a model's code may not support fake tensors
        logger.warning("the peak memory cannot be predicted: %s: %s", type(error).__name__, error)
        return config.updated(fold_micro_batches=asked or 1), None
    require_fit(config, on.type, free_gib, folded)
    return config.updated(fold_micro_batches=folded), predicted


def per_rank(config: TrainConfig, device_type: str, gib: tuple[float, ...]) -> float:
    """A rank's part of the memory of these devices. `memory_gib` takes precedence. It is the smallest of those
    in use; on a CPU the ranks share."""
    if config.memory_gib is not None:
        return config.memory_gib
    return gib[0] / config.ranks_here if kind_of(device_type).is_host else min(gib[: config.ranks_here])


def predict(config: TrainConfig, device_type: str, folded: int = 1) -> Prediction:
    """The peak of a run without `torch.compile` that draws no samples between steps. The precision and the number of
    ranks must be resolved. `folded`: micro-batches that the UNet runs as one batch. Raises ModelError if the model is
    missing."""
    kind, several = kind_of(device_type), config.ranks > 1
    trace = trace_of(config, kind.norms_in_float32, config.gradient_checkpointing)
    trained, of_frozen = 4 * trace.trained_parameters, 4 if config.mixed_precision == "no" else 2
    # DDP's buckets keep the gradients, as views. While ranks accumulate without reducing, gradients are tensors of
    # their own in addition to the buckets: `zero_grad` has dropped the views.
    accumulates = folded < config.gradient_accumulation_steps
    gradients = 2 * trained if several and accumulates else trained
    offloaded = not kind.is_host and config.use_ema and config.offload_ema
    # After the backward pass, a foreach AdamW makes a copy of the weights' size, and an offloaded EMA returns, in the
    # place of the gradients unless these are in buckets. DREAM's extra forward pass keeps nothing, so it stays below
    # the trained one.
    in_one_pass = config.use_8bit_adam or (config.fused_optimizer and kind.has_fused_adam)
    copies = not kind.is_host and (not in_one_pass or (offloaded and several))
    batches = config.train_batch_size, config.train_batch_size * folded, accumulates or several
    activations = max(trace.peak(*batches), trained if copies else 0)
    tensors = dict(
        weights_gib=(trained + of_frozen * trace.frozen_parameters) / 2**30,
        gradients_gib=gradients / 2**30,
        optimizer_gib=(2 if config.use_8bit_adam else 8) * trace.trained_parameters / 2**30,
        average_gib=trained / 2**30 if config.use_ema and not offloaded else 0.0,
        encoders_gib=of_frozen * trace.encoder_parameters / 2**30,
        activations_gib=activations / 2**30,
    )
    if kind.is_host:
        without_checkpointing = trace_of(config, kind.norms_in_float32, gradient_checkpointing=False)
        slack_gib = _HEAP_SLACK_OF_ACTIVATIONS * without_checkpointing.peak(*batches) / 2**30
    else:
        slack_gib = _SLACK_OF_ALL * sum(tensors.values())
    return Prediction(**tensors, overhead_gib=kind.process_gib + slack_gib)


def folded_that_fits(config: TrainConfig, device_type: str, memory_gib: float) -> int:
    """The most micro-batches of a step that fit as one batch: a divisor of `gradient_accumulation_steps`, or 1."""
    steps = config.gradient_accumulation_steps
    divisors = (count for count in range(steps, 1, -1) if steps % count == 0)
    return next((count for count in divisors if predict(config, device_type, count).total_gib <= memory_gib), 1)


def require_fit(config: TrainConfig, device_type: str, free_gib: float, folded: int = 1) -> None:
    """Raise ConfigError if the predicted peak is above `free_gib`, with the settings that would lower it. On a kind of
    device on which the constants above were not measured, it is a warning, unless `memory_gib` is set: to refuse a run
    that would fit is worse than to run out of memory."""

    def total_gib(changes: dict[str, Any]) -> float:
        return predict(config.updated(**changes), device_type, changes.get("fold_micro_batches", folded)).total_gib

    def verdict(changes: dict[str, Any]) -> str:
        return f"{total_gib(changes):.1f} GiB{', enough' if total_gib(changes) <= free_gib else ''}"

    if free_gib == 0 and config.memory_gib is None:
        logger.warning("whether the run fits is not known: torch does not tell the memory of this kind of device")
    if total_gib({}) <= free_gib or free_gib == 0:
        return
    advice: list[str] = []
    together: dict[str, Any] = {}
    for candidates in _remedies(config, device_type, folded):
        changes = next((one for one in candidates if total_gib(one) <= free_gib), candidates[-1])
        if total_gib(changes) < total_gib({}) - 0.05:
            advice.append(f"{_as_text(changes)}: {verdict(changes)}")
            together |= changes
    if len(advice) > 1:
        advice.append(f"all of these: {verdict(together)}")
    problem = (
        f"predicted peak {total_gib({}):.1f} GiB per rank, and {free_gib:.1f} GiB are "
        f"{'free' if config.memory_gib is None else 'what memory_gib allows'}. "
        f"What would help: {'; '.join(advice) or 'a smaller model, or a smaller resolution'}. "
        f"The prediction is {predict(config, device_type, folded)}"
    )
    if kind_of(device_type).memory_was_measured or config.memory_gib is not None:
        raise ConfigError(f"{problem}. If you know better, set memory_gib")
    logger.warning("%s. It was not measured on this kind of device, so the run starts", problem)


def advice_after_running_out(config: TrainConfig) -> str:
    """The settings that would help a run whose memory ran out. It predicts nothing: other ranks may end this one
    meanwhile."""
    remedies = _remedies(config, devices().type, config.fold_micro_batches or 1)
    return f"What would help: {'; '.join(_as_text(smallest) for smallest, *_ in remedies) or 'a smaller resolution'}"


def _remedies(config: TrainConfig, device_type: str, folded: int) -> Iterator[list[dict[str, Any]]]:
    """Changes that keep the number of images in a step. If a setting has several values, the smallest change comes
    first."""
    if folded > 1:
        yield [{"fold_micro_batches": count} for count in range(folded - 1, 0, -1) if folded % count == 0]
    if not config.gradient_checkpointing:
        yield [{"gradient_checkpointing": True}]
    batch, steps = config.train_batch_size, config.gradient_accumulation_steps
    if batch > 1:
        sizes = [size for size in range(batch - 1, 0, -1) if batch % size == 0]
        yield [{"train_batch_size": size, "gradient_accumulation_steps": steps * batch // size} for size in sizes]
    if config.mixed_precision == "no":
        yield [{"mixed_precision": kind_of(device_type).half_precision}]
    if not kind_of(device_type).is_host:
        yield from ([{name: True}] for name in ("fused_optimizer", "use_8bit_adam", "offload_ema"))


def _as_text(changes: dict[str, Any]) -> str:
    return " with ".join(f"{name} = {value}" for name, value in changes.items())
