"""From the step records to results: throughput, loss, utilisation. Reads no files and draws nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sdnb.machine.device_kind import DeviceKind, kind_of
from sdnb.machine.peaks import peak_of, source_of_peak
from sdnb.metrics.isolation import disturbances, others_share
from sdnb.metrics.logged import throughput_of_a_log
from sdnb.metrics.result import RATE, Result, rate_result
from sdnb.metrics.steps import RUNNING_MEAN_STEPS, first_not_finite, mark, slow_steps, steady_state, warmup_steps
from sdnb.metrics.throughput import Estimate, flop_of, images_per_second, nominal_ips, ratio_of_sums
from sdnb.settings.config import TrainConfig
from sdnb.tables import html_table

RESULTS_MIME = "application/vnd.sdnb.results+json"  # the rows of the results table
MFU_NAME = "MFU"
PAGE_MIME = "application/vnd.sdnb.page+json"  # what a page says besides the notebook's outputs


@dataclass(frozen=True)
class Measurements:
    """Everything that the figures and the results table of a run show."""

    steps: pd.DataFrame
    validation: pd.DataFrame
    config: TrainConfig
    throughput: Estimate
    results: tuple[Result, ...]
    disturbed: tuple[str, ...] = ()  # what disturbed the measured steps, see `metrics.isolation`

    def __getitem__(self, name: str) -> Result:
        return {result.name: result for result in self.results}[name]

    def value_of(self, name: str) -> float:
        """The number of a result; NaN if the run has no such result."""
        return next((row.value for row in self.results if row.name == name and row.value is not None), math.nan)

    @property
    def slow_steps(self) -> pd.DataFrame:
        """As `steps.slow_steps` finds them."""
        return slow_steps(self.steps, list(self.validation.get("step", ())), self.config.checkpointing_steps)

    def __repr__(self) -> str:
        width = max(len(result.name) for result in self.results)
        return "\n".join(f"{result.name:<{width}}  {result.text}" for result in self.results)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        names, texts, hows = zip(*((row.name, row.text, row.how) for row in self.results))
        table = pd.DataFrame({"Result": texts, "How it is measured": hows}, index=names)
        rows = [row.row() for row in self.results]
        return {"text/plain": repr(self), "text/html": html_table(table, "results"), RESULTS_MIME: rows}


def measure(run: Any) -> Measurements:
    """All results of a run, complete or not, from its `RunFolder`. It needs at least one step."""
    config, environment, model, summary = run.config, run.environment, run.model, run.summary
    resumed, log = environment.get("resumed", []), environment.get("imported")
    steps = mark(run.steps, config, [one["after_step"] for one in resumed], examples_of(environment))
    devices = environment.get("devices", {})  # unknown if environment.json is damaged
    kind = kind_of(devices.get("type"))
    noun = kind.noun
    steady = steps[steps.steady & steps.seconds.notna()]
    if log:
        each, throughput = throughput_of_a_log(steps, config, noun, log, summary.get("total_seconds"))
    else:
        begin, change = steady_state(steps)
        of = images_per_second(steady.images, steady.seconds) if begin is not None else _range_of_quarters(steady)
        each = of.scaled(1 / config.ranks)
        throughput = [*_throughput(steps, config, noun, each, of, begin, change)]
    disturbed = () if config.device_isolation == "ignore" else tuple(disturbances(steady, environment))
    short = int(steps.short.sum())
    how = f"steps with fewer images than the global batch{', by the header' if log else ''}"
    results = (
        *throughput,
        *_unique(steps, noun, each),
        Result("short steps", f"{short} of {len(steps)}", how, short, "steps", len(steps)),
        *_skipped(steps),
        *_mfu(model, config, devices.get("names"), steady),
        *([] if log else _encodings(steady)),
        *_energy(steady, config, noun),
        *([] if log else [_memory(summary, kind)]),
        *_losses(steps, run.validation, config, model, bool(log)),
        *([] if log and summary.get("total_seconds") is None else [_total_time(steps, summary, environment)]),
        *_others(steady, disturbed),
        *_resumed(resumed, environment.get("host")),
    )
    return Measurements(steps, run.validation, config, each, results, disturbed)


def examples_of(environment: dict[str, Any]) -> int | None:
    """Images in the data set that a run was trained on; None if that is not known."""
    data = environment.get("imported") or environment.get("data")
    return (data.get("examples") or data.get("images")) if isinstance(data, dict) else None  # 0.1 had the data's name


def _unique(steps: pd.DataFrame, noun: str, each: Estimate) -> Iterator[Result]:
    """Images/s without the images that an epoch repeats."""
    images, unique = steps.images.sum(), steps.unique_images.sum()
    if steps.unique_images.notna().all():
        repeats = images - unique
        how = f"each image once an epoch: {repeats:.0f} of {images:.0f} images ({repeats / images:.1%}) are repeats"
        how += ", with which accelerate fills the last round of an epoch" if repeats else ""
        yield rate_result(f"unique images/s per {noun}", each.scaled(unique / images), how, len(steps))


def _skipped(steps: pd.DataFrame) -> Iterator[Result]:
    if skipped := int(steps.skipped.sum()):
        how = "their gradients overflowed in float16, so weights and learning rate stayed as they were; "
        how += "they count as steps"
        yield Result("skipped steps", f"{skipped} of {len(steps)}", how, skipped, "steps", len(steps))


def _throughput(
    steps: pd.DataFrame, config: TrainConfig, noun: str, each: Estimate, together: Estimate, begin: int | None,
    change: int | None,
) -> Iterator[Result]:  # fmt: skip
    steady = steps[steps.steady]
    warmup = warmup_steps(len(steps)) if begin is None else begin
    how = f"images trained on / time / {noun}s, with 95 % confidence interval; "
    if begin is None:
        how = f"images trained on / time / {noun}s, with the range of its quarters, as the pace never became steady; "
    how += f"steps {warmup + 1} to {len(steps)}, without {warmup} of warm-up"
    if resumed := len(steps) - warmup - len(steady):
        how += f" and {resumed} directly after a resume"
    yield rate_result("images/s per " + noun, each, how, len(steady))
    if change is not None:
        yield from _changed_pace(steps, begin, change, noun, config)
    how = f"{config.global_batch} × tqdm's it/s at step {len(steps) - 1} / {config.num_processes} {noun}s; "
    how += "counts every step as a full one: only to compare with published numbers"
    nominal = nominal_ips(steps, config)
    if math.isfinite(nominal):
        yield Result("nominal IPS", f"{nominal:.2f}", how, nominal, RATE, 1)
    else:
        yield Result("nominal IPS", "unknown after one step", how)
    if config.ranks > 1:
        yield rate_result(f"images/s, all {noun}s", together, f"{config.ranks} {noun}s together", len(steady))
    full = steady[~steady.short]
    if len(full):
        median, p95 = full.seconds.median(), full.seconds.quantile(0.95)
        how = f"the {len(full)} full steps among them, {config.global_batch} images each"
        yield Result("seconds per step", f"median {median:.3f}, 95 % under {p95:.3f}", how, median, "s", len(full))


def _changed_pace(
    steps: pd.DataFrame, begin: int | None, change: int, noun: str, config: TrainConfig
) -> Iterator[Result]:
    how = f"the pace changed at step {change + 1}"
    if begin is None:
        yield Result("steady state", "not reached", f"{how}, and again later, or drifted to the end", 0.0)
        return
    before = steps[warmup_steps(len(steps)) : change]
    rate = images_per_second(before.images, before.seconds).scaled(1 / config.ranks)
    yield Result("steady state", f"from step {begin + 1}", how, 1.0, n=len(steps) - begin)
    yield rate_result(f"before the steady state, images/s per {noun}", rate, how, len(before))


def _range_of_quarters(steady: pd.DataFrame) -> Estimate:
    """The rate, with the lowest and the highest of four parts as its interval: the pace was not steady."""
    quarters = [steady.iloc[part] for part in np.array_split(np.arange(len(steady)), 4)]
    rates = [quarter.images.sum() / quarter.seconds.sum() for quarter in quarters]
    return Estimate(steady.images.sum() / steady.seconds.sum(), min(rates), max(rates))


def _mfu(model: dict[str, Any], config: TrainConfig, names: list[str] | None, steady: pd.DataFrame) -> Iterator[Result]:
    if not (flop := model.get("flop_per_image")):
        return
    done = flop_of(flop, steady.images, steady.encoded_images, steady.encoded_captions)
    total = sum(each.sum() for each in done.values())
    tflops = total / steady.seconds.sum() / config.ranks / 1e12
    parts = ", ".join(name for name, each in done.items() if each.sum())
    rate = f"{tflops:.3g} TFLOP/s ({total / steady.images.sum() / 1e12:.4g} TFLOP per image: {parts})"
    if reachable := model.get("reachable_tflops"):
        rate += f"; {tflops / reachable:.0%} of the {reachable:.3g} TFLOP/s that a plain matrix product reaches here"
    device = (names or [""])[0]
    peak = peak_of(config, device)
    if peak is None:
        yield Result(MFU_NAME, "unknown peak: set device_peak_tflops", rate)
    else:
        source = "device_peak_tflops" if config.device_peak_tflops else source_of_peak(device)
        yield Result(
            MFU_NAME,
            f"{100 * tflops / peak:.1f} %",
            f"of {peak:g} TFLOP/s peak, by {source}: {rate}",
            tflops / peak,
            "of peak",
            len(steady),
        )


def _energy(steady: pd.DataFrame, config: TrainConfig, noun: str) -> Iterator[Result]:
    if "joules" in steady and not steady.joules.isna().any() and steady.joules.sum():
        watts = steady.joules.sum() / steady.seconds.sum() / config.ranks
        per_joule = steady.images.sum() / steady.joules.sum()
        how = f"from the energy counters of the {noun}s, without the rest of the machine; mean {watts:.0f} W per {noun}"
        yield Result("images per joule", f"{per_joule:.4f}", how, per_joule, "images/J", len(steady))


def _encodings(steady: pd.DataFrame) -> Iterator[Result]:
    encoded, trained = steady.encoded_images.sum(), steady.images.sum()
    share = 1 - encoded / trained
    if share > 0:
        how = f"in the measured steps the VAE encoded {encoded:.0f} images for {trained:.0f} trained on"
        yield Result("encodings kept", f"{100 * share:.0f} %", how, share, "of images", int(trained))


def _memory(summary: dict[str, Any], kind: DeviceKind) -> Result:
    if not summary:
        return Result("peak memory", "unknown: the run is incomplete", "")
    peaks = [rank["peak_memory_gib"] for rank in summary["ranks"]]
    of_host, of_device = "resident memory of the process, from its start", "torch's allocator, from the first step on"
    how = of_device if kind.is_known and not kind.is_host else of_host
    highest = "the highest of the ranks; " if len(peaks) > 1 else ""
    return Result("peak memory", f"{max(peaks):.2f} GiB", highest + how, max(peaks), "GiB", len(peaks))


def _losses(
    steps: pd.DataFrame, validation: pd.DataFrame, config: TrainConfig, model: dict[str, Any], imported: bool
) -> Iterator[Result]:
    last, first = steps.iloc[-1], steps.iloc[0]
    window = min(RUNNING_MEAN_STEPS, len(steps))
    if (first_bad := first_not_finite(steps)) and not imported:
        yield Result("final loss", "not finite", f"the loss of step {first_bad} is not finite: this run is no result")
    elif not (imported and math.isnan(last.running_loss)):
        meaning = "; from random weights, so it says nothing about quality" if model.get("random_weights") else ""
        how = f"running mean of the last {window} steps; step 1 had {first.loss:.4f}{meaning}"
        yield Result("final loss", f"{last.running_loss:.4f}", how, last.running_loss, n=window)
    if not (imported and math.isnan(last.step_loss)):
        how = "rank 0's last micro-batch, as the reference's progress bar shows it: noise"
        yield Result("final step_loss", f"{last.step_loss:.4f}", how, last.step_loss, n=1)
    if len(validation):
        measured = model.get("held_out_loss_of", "the UNet as trained (not its EMA)")
        begin, end = validation.iloc[0], validation.iloc[-1]
        how = f"{int(end.images)} images that are not trained on, {measured}, fixed noise; "
        how += f"step {int(begin.step)} → {int(end.step)}"
        yield Result("held-out loss", f"{begin.loss:.4f} → {end.loss:.4f}", how, end.loss, n=int(end.images))
    if config.target_loss is not None:
        yield _target(steps, config.target_loss)


def _target(steps: pd.DataFrame, target: float) -> Result:
    """Whether the mean loss of the last quarter of the steps, and at least of ten, is below the target, by a one-sided
    test at 5 %. Its value is 1, 0, or None if that cannot be told."""
    last = steps.iloc[-max(RUNNING_MEAN_STEPS, len(steps) // 4) :]
    mean = ratio_of_sums(last.loss * last.images, last.images, 0.9)  # 5 % on each side
    verdict: tuple[str, float | None] = (f"cannot be told from {len(last)} steps", None)
    if first_not_finite(steps):
        verdict = "not met, the loss is not finite", 0.0
    elif mean.high < target:
        verdict = "met", 1.0
    elif mean.low > target:
        verdict = "not met", 0.0
    interval = f" ({mean.low:.4f} to {mean.high:.4f})" if math.isfinite(mean.low) else ""
    how = (
        f"mean loss of the last {len(last)} steps, with its 90 % interval, against {target:g}: a one-sided test at 5 %"
    )
    return Result(
        "target", f"{verdict[0]}: {mean.value:.4f}{interval} against {target:g}", how, verdict[1], n=len(last)
    )


def _total_time(steps: pd.DataFrame, summary: dict[str, Any], environment: dict[str, Any]) -> Result:
    training = steps.seconds.sum()
    if not summary:
        return Result("total time", f"{training:.0f} s in steps", "the run is incomplete", training, "s", len(steps))
    if (total := summary.get("total_seconds")) is None:  # version 0.1 had only the wall clock
        total = summary["ended"] - environment.get("started", math.nan)
        if not total >= training:
            return Result("total time", f"{training:.0f} s in steps", "the clock was set meanwhile", training, "s")
    if "imported" in environment:
        how = "by the log, from the first step to its end"
    else:
        how = f"from launch to the saved pipeline; {training:.0f} s of it in steps"
        if environment.get("resumed"):
            how = f"from the last resume to the saved pipeline; all steps together took {training:.0f} s"
    return Result("total time", f"{total:.0f} s", how, total, "s")


def time_by_part(steps: pd.DataFrame, summary: dict[str, Any]) -> dict[str, float]:
    """Where the total time of a complete run went, in seconds; empty if that was not recorded."""
    if "spent_seconds" not in summary or summary.get("total_seconds") is None:
        return {}
    encode = sum(phases.get("encode", 0) for phases in steps.phase_seconds)
    parts = {
        "start": summary["total_seconds"] - summary["training_seconds"] - summary["saving_seconds"],
        "encode": encode,
        "train": steps.seconds.sum() - encode,
        **{name: summary["spent_seconds"].get(name, 0) for name in ("held-out loss", "images", "saving")},
    }
    parts["other"] = summary["total_seconds"] - sum(parts.values())
    return {name: seconds for name, seconds in parts.items() if seconds > 0.005 * summary["total_seconds"]}


def _others(steady: pd.DataFrame, disturbed: tuple[str, ...]) -> Iterator[Result]:
    share = others_share(steady)
    if math.isfinite(share):
        how = "of the cores, in the measured steps, by /proc/stat without the ranks' own processor time"
        yield Result("other processes", f"{100 * share:.1f} %", how, share, "of the cores", len(steady))
    if disturbed:
        yield Result("machine", "not the run's own", "; ".join(disturbed), 0.0)


def _resumed(resumed: list[dict[str, Any]], host: str | None) -> Iterator[Result]:
    if resumed:
        elsewhere = ", on another machine" if any(one.get("host", host) != host for one in resumed) else ""
        after = ", ".join(str(one["after_step"]) for one in resumed)
        yield Result("resumed", f"after step {after}", f"the steps before that were measured earlier{elsewhere}")
