"""Whether a sealed run could have taken the times, and the memory, that it says."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN, Finding, judged
from sdnb.machine.device_kind import kind_of
from sdnb.machine.peaks import peak_tflops
from sdnb.metrics.results import Measurements
from sdnb.metrics.throughput import flop_of
from sdnb.run.folder import RunFolder
from sdnb.sealing.seal import is_of_this_version

_LEFT_SECONDS, _LEFT_SHARE = 1.0, 0.01  # of the training, that neither steps nor pauses explain
_MOST_OF_REACHABLE = 1.5  # times the rate of a plain matrix product, which was measured for a moment only
_MOST_CPU = 1.05  # processor seconds in a second of a core: the kernel counts in ticks
_MOST_EQUAL = 0.02  # of the steps
_NO_NOISE = "honest times scatter"


def times(steps: pd.DataFrame) -> Finding:
    seconds, wrong = steps.seconds.to_numpy(float), []
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        wrong.append("a step took no time, or its time is no number")
    equal = Counter(seconds).most_common(1)[0][1]
    if equal > max(2, _MOST_EQUAL * len(seconds)):
        wrong.append(f"{equal} steps took the same time, to the last digit; {_NO_NOISE}")
    rounded = sum(float(f"{one:.4g}") == one for one in seconds)
    if rounded > max(2, _MOST_EQUAL * len(seconds)):
        wrong.append(f"{rounded} times have at most four digits; {_NO_NOISE}")
    return judged("step times", wrong, f"{len(seconds)}, of {seconds.min():.4g} to {seconds.max():.4g} s")


def phases(steps: pd.DataFrame, environment: dict[str, Any]) -> Finding:
    sums = np.array([sum(phases.values()) for phases in steps.phase_seconds])
    on_cpu = kind_of(environment.get("devices", {}).get("type")).is_host
    allowed = 1e-6 if on_cpu else 1e-3 + 0.02 * steps.seconds  # an accelerator has a clock of its own
    bad = steps.step[np.abs(sums - steps.seconds) > allowed]
    negative = any(value < 0 for phases in steps.phase_seconds for value in phases.values())
    wrong = [f"the phases of step {step} do not add up to its time, nor those of {len(bad) - 1} more"
             for step in bad.iloc[:1]]  # fmt: skip
    wrong += ["a phase took less than no time"] if negative else []
    return judged("phases", wrong, "of each step they add up to its time")


def total_time(run: RunFolder, steps: pd.DataFrame) -> Finding:
    """The time from launch to end is that of the steps and of the pauses, and little is left."""
    summary, environment = run.summary, run.environment
    try:
        training, saving, paused, total = (
            float(summary[f"{name}_seconds"]) for name in ("training", "saving", "paused", "total")
        )
        wall = float(summary["ended"]) - float(environment["started"])
        resumed = [one["after_step"] for one in environment.get("resumed", [])]
    except (KeyError, TypeError, ValueError):
        return Finding("total time", UNKNOWN, "it was not recorded")
    in_steps, wrong = steps.seconds[steps.step > (resumed[-1] if resumed else 0)].sum(), []
    left, allowed = training - in_steps - paused, _LEFT_SECONDS + _LEFT_SHARE * training
    how = f"{training:.1f} s of training: {in_steps:.1f} s in steps, {paused:.1f} s in pauses"
    if not left <= allowed:
        wrong.append(f"{how}; {left:.1f} s are left, which nothing explains")
    if left < -_LEFT_SECONDS / 10:
        wrong.append(f"{how}: that is more than there was")
    if not training + saving <= total + 0.1 or not total <= wall + _LEFT_SECONDS:
        parts = f"{training + saving:.1f} s of training and saving, {total:.1f} s in all"
        wrong.append(f"{parts}, {wall:.1f} s by the wall clock")
    if not wrong and wall > total + _LEFT_SECONDS + 0.01 * total:
        why = f"{total:.1f} s, and {wall:.1f} s by the wall clock: the machine slept, or its clock was set"
        return Finding("total time", UNKNOWN, why)
    begins = [*(one.get("started") for one in environment.get("resumed", [])), environment["started"]]
    for begin, next_begin, first, last_step in zip(begins, begins[1:], [0, *resumed], resumed):
        took = steps.seconds[(steps.step > first) & (steps.step <= last_step)].sum()
        if not took <= next_begin - begin:
            wrong.append(f"the steps up to {last_step} took {took:.1f} s, and the next start came earlier")
    return judged("total time", wrong, how)


def processor_time(run: RunFolder, steps: pd.DataFrame) -> Finding:
    cores = run.environment.get("cpu_cores")
    on_linux = str(run.environment.get("system")).startswith("Linux")
    if "cpu_seconds" not in steps and on_linux and is_of_this_version(run):
        return Finding("processor time", FAILS, "it is missing, and this version records it")
    if "cpu_seconds" not in steps or not cores or run.summary.get("machines", 1) > 1:
        return Finding("processor time", UNKNOWN, "it was not recorded, or the cores of all machines were not")
    used = steps.cpu_seconds.sum() / steps.seconds.sum()
    wrong = [] if used <= _MOST_CPU * cores else [f"{used:.2f} processor seconds a second, and there are {cores} cores"]
    if kind_of(run.environment.get("devices", {}).get("type")).is_host and used < 0.01:
        wrong.append(f"{used:.3f} processor seconds a second: nothing was computed in that time")
    return judged("processor time", wrong, f"{used:.2f} of {cores} cores, by the kernel")


def speed(run: RunFolder, measured: Measurements) -> Finding:
    """The rate is below what the device can do."""
    model, config = run.model, run.config
    if not (flop := model.get("flop_per_image")):
        return Finding("speed", UNKNOWN, "the operations of an image were not counted")
    steady = measured.steps[measured.steps.steady]
    done = sum(flop_of(flop, steady.images, steady.encoded_images, steady.encoded_captions).values()).sum()
    tflops = done / steady.seconds.sum() / config.ranks / 1e12
    limits = {}
    if reachable := model.get("reachable_tflops"):
        limits[f"{_MOST_OF_REACHABLE:g} times a plain matrix product"] = _MOST_OF_REACHABLE * reachable
    names = run.environment.get("devices", {}).get("names") or [""]
    if peak := peak_tflops(names[0], config.mixed_precision or "no"):
        limits[f"the peak of a {names[0]}"] = peak
    wrong = [f"{tflops:.3g} TFLOP/s; {what} is {limit:.3g}" for what, limit in limits.items() if not tflops <= limit]
    if not limits:
        return Finding("speed", UNKNOWN, "neither the peak of the device nor the rate of a matrix product is known")
    below = ", ".join(f"{what} ({limit:.3g})" for what, limit in limits.items())
    return judged("speed", wrong, f"{tflops:.3g} TFLOP/s, below {below}")


def memory(run: RunFolder, steps: pd.DataFrame) -> Finding:
    stated = max((rank.get("peak_memory_gib", 0.0) for rank in run.summary.get("ranks") or [{}]), default=0.0)
    seen = float(steps.peak_memory_gib.max()) if "peak_memory_gib" in steps else 0.0
    wrong = [] if stated >= seen - 0.001 else [f"its peak is {stated:.3f} GiB, and a step had {seen:.3f} GiB"]
    return judged("memory", wrong, f"{stated:.3f} GiB")


def machine(measured: Measurements) -> Finding:
    """As the page warns, and whatever `device_isolation` was."""
    reasons = "; ".join(measured.disturbed)
    return Finding("machine", UNKNOWN if reasons else HOLDS, reasons or "nothing disturbed the measured steps")
