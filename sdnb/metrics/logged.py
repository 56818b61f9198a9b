"""The throughput of a run that sdnb did not make, from what its log shows. A log rarely has the time of each step."""

import math
from typing import Any

import pandas as pd

from sdnb.metrics.result import RATE, Result, rate_result
from sdnb.metrics.steps import warmup_steps
from sdnb.metrics.throughput import Estimate, images_per_second, seconds_per_micro_batch, smoothed_seconds_per_step
from sdnb.settings.config import TrainConfig

_ENOUGH = 3  # steps, for an interval
_SHORT_SECONDS = 100  # for a clock that shows whole seconds
_LEAST_STEPS, _LEAST_SECONDS = 10, 50  # of a stretch between two readings of a clock that shows whole seconds


def throughput_of_a_log(
    steps: pd.DataFrame, config: TrainConfig, noun: str, log: dict[str, Any], seconds: float | None
) -> tuple[Estimate, list[Result]]:
    """Images/s of a rank, and the rows of the results table. `seconds`: to the end of the log."""
    ranks, images, rows = config.ranks, steps.images.sum(), list[Result]()
    whole = None
    if trained := log.get("trained_seconds"):
        whole = _by_clock(images / ranks, trained)
        how = f"{images:.0f} images / {trained:.0f} s / {noun}s, from the start to the last step, with the warm-up"
        rows.append(rate_result(f"images/s per {noun}, whole training", whole, how, len(steps)))
    if seconds and seconds > (trained or 0) + 1:
        rate = _by_clock(images / ranks, seconds)
        how = f"{images:.0f} images / {seconds:.0f} s / {noun}s, with all pauses and what follows the last step"
        rows.append(rate_result(f"images/s per {noun}, whole log", rate, how, len(steps)))
    each, how, known = _longest_stretch(steps, config, log, whole)
    if ranks > 1:
        how_all = f"{ranks} times that of one {noun}"
        rows.insert(0, rate_result(f"images/s, all {noun}s", each.scaled(ranks), how_all, known))
    if each is not whole:
        rows.insert(0, rate_result(f"images/s per {noun}", each, f"images / time / {noun}s, {how}", known))
    else:  # it is the headline
        rows.sort(key=lambda row: not row.name.endswith("whole training"))
    if shown := log.get("shown_seconds_per_step"):
        at = log["at_step"]
        nominal = config.global_batch / shown / ranks
        counted = (
            f"{config.global_batch} / {shown:.4g} s/it at step {at} / {ranks} {noun}s; counts every step as a full "
        )
        counted += f"one{_short_at(steps, config, at)}"
        rows.append(Result("nominal IPS", f"{nominal:.2f}", counted, nominal, RATE, 1))
        if log.get("shows_single_steps", True):
            micro_batch = _seconds_per_micro_batch(steps, log)
            solved = f"from tqdm's s/it at step {at}, with its smoothing undone"
            rows.append(Result("seconds per micro-batch", f"{micro_batch:.3f}", solved, micro_batch, "s"))
    return each, rows


def _by_clock(images: float, seconds: float) -> Estimate:
    """Images over seconds. A progress bar's clock cuts to whole seconds: of a short time, the interval is what that
    allows."""
    rate, is_short = images / seconds, seconds < _SHORT_SECONDS and float(seconds).is_integer()
    return Estimate(rate, images / (seconds + 1), rate) if is_short else Estimate(rate, math.nan, math.nan)


def _longest_stretch(
    steps: pd.DataFrame, config: TrainConfig, log: dict[str, Any], whole: Estimate | None
) -> tuple[Estimate, str, int]:
    """Images/s of a rank, where it comes from, and from how many steps. It is that of the longest stretch after the
    warm-up that the log shows: the steps with a time, if they are half of all; else the time between two readings of
    the clock; else the bar near the end; else the `whole`. A step of the warm-up alone is never taken. `steps` are
    marked; `log` is what was imported."""
    after = steps[steps.steady]
    timed = after[after.seconds.notna()]
    if len(timed) >= max(1, len(after) / 2) and (len(timed) >= _ENOUGH or whole is None):
        each = images_per_second(timed.images, timed.seconds).scaled(1 / config.ranks)
        return each, f"over the {len(timed)} steps with a time in the log, without the warm-up", len(timed)
    read = steps.iloc[max(0, warmup_steps(len(steps)) - 1) :]
    read = read[read.elapsed.notna()] if "elapsed" in read else read[:0]
    if len(read):
        begin, end = read.iloc[0], read.iloc[-1]
        seconds, count = end.elapsed - begin.elapsed, int(end.step - begin.step)
        if count >= _LEAST_STEPS and seconds >= _LEAST_SECONDS:
            images = steps.images[(steps.step > begin.step) & (steps.step <= end.step)].sum()
            between = f"on the log's clock from step {begin.step:.0f} to step {end.step:.0f}"
            how = f"{images:.0f} images in {seconds:.0f} s, {between}"
            return _certain(images / seconds / config.ranks), how, count
    at = log.get("at_step", 0) if log.get("shows_single_steps", True) else 0
    if (after.step <= at).sum() >= _LEAST_STEPS:  # the warm-up has left the average
        shown = log["shown_seconds_per_step"]
        # the average is linear, and the images of the steps are known
        rate = smoothed_seconds_per_step(steps.images[steps.step <= at].to_numpy(float)) / shown / config.ranks
        how = f"from tqdm's {shown:.4g} s/it at step {at}, with its smoothing undone{_short_at(steps, config, at)}"
        return _certain(rate), how, 1
    if whole is not None:
        return whole, "over the whole training, warm-up included: the log shows no stretch after it", len(steps)
    return _certain(math.nan), "unknown: the log has no time of a step after the warm-up", 0


def _short_at(steps: pd.DataFrame, config: TrainConfig, at: int) -> str:
    """A remark if this step was a short one."""
    size, full = steps.micro_batches[steps.step == at].iloc[0], config.gradient_accumulation_steps
    return f"; step {at} was a short one, {size:.0f} of {full} micro-batches" if size < full else ""


def _seconds_per_micro_batch(steps: pd.DataFrame, log: dict[str, Any]) -> float:
    """Seconds of a micro-batch, from what the progress bar shows near the end."""
    sizes = steps.micro_batches[steps.step <= log["at_step"]]
    return seconds_per_micro_batch(log["shown_seconds_per_step"], [*sizes])


def _certain(rate: float) -> Estimate:
    """A rate whose interval is unknown."""
    return Estimate(rate, math.nan, math.nan)
