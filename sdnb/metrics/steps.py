"""The step records, classified: warm-up, short, skipped and slow steps, phases. Reads no files and draws nothing."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from sdnb.metrics.steady import steady_from, without
from sdnb.metrics.step_clock import PHASES
from sdnb.settings.config import TrainConfig

RUNNING_MEAN_STEPS = 10
_ENOUGH_STEPS = 5  # to know the usual time


def mark(
    steps: pd.DataFrame, config: TrainConfig, resumed_after: Sequence[int] = (), examples: int | None = None
) -> pd.DataFrame:
    """The step records with five more columns: `short` (fewer images than the global batch), `skipped` (see
    `was_skipped`), `steady` (from `steady_state` on, and not the first step after a resume), `running_loss` (the mean
    of `loss` over the last ten steps, weighted by images), and `unique_images` (without those that accelerate repeats
    at the end of an epoch; NaN if the number of examples is unknown). If a run did not record `encoded_images` and
    `encoded_captions`, it encoded all images."""
    if steps.empty:
        return steps.assign(short=[], skipped=[], steady=[], running_loss=[], unique_images=[])
    epoch = config.epoch(examples) if examples else None
    begin, _ = steady_state(steps)
    begin = warmup_steps(len(steps)) if begin is None else begin
    windows = pd.DataFrame({"images": steps.images, "loss": steps.loss * steps.images, "unknown": steps.loss.isna()})
    sums = windows.rolling(RUNNING_MEAN_STEPS, min_periods=1).sum()
    return steps.assign(
        encoded_images=steps.get("encoded_images", steps.images),
        encoded_captions=steps.get("encoded_captions", steps.images),
        short=steps.images < config.global_batch,
        skipped=was_skipped(steps, config),
        steady=(np.arange(len(steps)) >= begin) & ~(steps.step - 1).isin(resumed_after),
        running_loss=(sums.loss / sums.images).where(sums.unknown == 0),
        unique_images=[epoch.unique_images_in(int(step)) if epoch else math.nan for step in steps.step],
    )


def steady_state(steps: pd.DataFrame) -> tuple[int | None, int | None]:
    """The index of the first step at a steady pace, None if the pace never becomes steady; and of the first change of
    pace after the first tenth of the steps, None if there is none. That some steps encode images and others do not, and
    that a short step has a whole step's overhead, is no change of pace."""
    warmup, seconds, images = warmup_steps(len(steps)), steps.seconds.to_numpy(float), steps.images.to_numpy(float)
    if not np.isfinite(seconds[warmup:]).all() or not (images > 0).all() or not len(seconds[warmup:]):
        return warmup, None
    encoded = steps.get("encoded_images", steps.images).to_numpy(float)
    known = (column[warmup:] for column in (encoded / images, 1 / images))
    costs = np.concatenate([np.zeros(warmup), without((seconds / images)[warmup:], *known)])
    return steady_from(costs, warmup)


def was_skipped(steps: pd.DataFrame, config: TrainConfig) -> pd.Series:
    """Whether each step left the weights and the learning rate's schedule as they were, because its gradients
    overflowed in float16. Their norm is not finite then."""
    norms = steps.get("grad_norm", pd.Series(1.0, steps.index)).astype(float)
    return ~np.isfinite(norms) & (config.mixed_precision == "fp16")


def first_not_finite(steps: pd.DataFrame) -> int | None:
    """The first step whose loss is not finite; None if all are."""
    bad = steps.step[~np.isfinite(steps.loss.astype(float))]
    return int(bad.iloc[0]) if len(bad) else None


def warmup_steps(steps: int) -> int:
    """Steps that the throughput excludes: the first tenth, at least one; none if there is only one step."""
    return max(1, steps // 10) if steps > 1 else 0


def time_by_phase(steps: pd.DataFrame) -> pd.Series:
    """Mean seconds of each phase in a steady step, without phases that took no time."""
    phases = pd.DataFrame(list(steps[steps.steady].phase_seconds), columns=PHASES).mean()
    return phases[phases > 0]


def slow_steps(steps: pd.DataFrame, measured_at: Sequence[int], checkpointing_steps: int) -> pd.DataFrame:
    """The full steps after the warm-up that took much longer than similar ones: by a tenth of the median and by five
    median deviations. Steps that encode images are compared with each other, and so are those that do not. The steps
    are marked, and the held-out loss was measured after those in `measured_at`. The result has the columns `step`,
    `seconds`, `extra_seconds` over the median, and `because`, the reason as far as it is known."""
    steady = steps[steps.steady & ~steps.short]
    begins_epoch = {*steps.step[steps.epoch.diff() > 0]} if "epoch" in steps else set()
    found = []
    for similar in (steady[steady.encoded_images > 0], steady[steady.encoded_images == 0]):
        if len(similar) < _ENOUGH_STEPS:
            continue
        usual = similar.seconds.median()
        deviation = (similar.seconds - usual).abs().median()
        phases = pd.DataFrame(list(similar.get("phase_seconds", ())), columns=PHASES)
        extra = phases - phases.median()
        for row, (step, seconds) in enumerate(zip(similar.step, similar.seconds)):
            if not seconds > usual + max(0.1 * usual, 5 * deviation):
                continue
            if step - 1 in measured_at:
                because = "after a held-out measurement"
            elif (step - 1) % checkpointing_steps == 0:
                because = "after a checkpoint"
            elif step in begins_epoch:
                because = "begins an epoch"
            elif len(extra) and extra.iloc[row].max() > 0:
                because = f"{extra.iloc[row].idxmax()} took longer"
            else:
                because = "unknown reason"
            found.append((step, seconds, seconds - usual, because))
    kinds = {"step": int, "seconds": float, "extra_seconds": float, "because": str}
    return pd.DataFrame(found, columns=list(kinds)).astype(kinds)
