"""From the records of the steps to figures: throughput, loss, utilisation. Reads no files and draws nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sdnb.machine.peaks import peak_tflops
from sdnb.metrics.step_clock import PHASES
from sdnb.metrics.throughput import Estimate, images_per_second, nominal_ips
from sdnb.settings.config import TrainConfig

RESULTS_MIME = "application/vnd.sdnb.results+json"  # the rows of the results table
PAGE_MIME = "application/vnd.sdnb.page+json"  # what a page says beside what its notebook shows
RUNNING_MEAN_STEPS = 10
_ENOUGH_STEPS = 5  # to say what is usual


def mark(steps: pd.DataFrame, config: TrainConfig, resumed_after: Sequence[int] = ()) -> pd.DataFrame:
    """The step records with three more columns: `short` (fewer pictures than the global batch), `steady` (after the
    warm-up, and not the first after a resume), and `running_loss` (the mean of `loss` over the last ten steps, weighted
    by pictures). Where a run does not say how many it encoded (`encoded_images`, `encoded_captions`), every one."""
    if steps.empty:
        return steps.assign(short=[], steady=[], running_loss=[])
    window = dict(window=RUNNING_MEAN_STEPS, min_periods=1)
    weighted = (steps.loss * steps.images).rolling(**window).sum()
    weighted[steps.loss.isna().rolling(**window).max() > 0] = math.nan  # a loss that is not finite is not passed over
    every = steps.images  # as the reference does it
    return steps.assign(
        encoded_images=steps.get("encoded_images", every),
        encoded_captions=steps.get("encoded_captions", every),
        short=steps.images < config.global_batch,
        steady=(np.arange(len(steps)) >= warmup_steps(len(steps))) & ~(steps.step - 1).isin(resumed_after),
        running_loss=weighted / steps.images.rolling(**window).sum(),
    )


def warmup_steps(steps: int) -> int:
    """Steps left out of the throughput: the first tenth, at least one; none where there is only one."""
    return max(1, steps // 10) if steps > 1 else 0


def time_by_phase(steps: pd.DataFrame) -> pd.Series:
    """Mean seconds per steady step of each phase, those that took no time left out."""
    phases = pd.DataFrame(list(steps[steps.steady].phase_seconds), columns=PHASES).mean()
    return phases[phases > 0]


@dataclass(frozen=True)
class Result:
    """A row of the results table."""

    name: str
    text: str
    how: str
    value: float | None = None


@dataclass(frozen=True)
class Measurements:
    """Everything that the figures and the table of a run show."""

    steps: pd.DataFrame
    validation: pd.DataFrame
    config: TrainConfig
    throughput: Estimate
    results: tuple[Result, ...]

    def __getitem__(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)

    def __repr__(self) -> str:
        width = max(len(result.name) for result in self.results)
        return "\n".join(f"{result.name:<{width}}  {result.text}" for result in self.results)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {left}>{html.escape(row.name)}</th><td {left}>{html.escape(row.text)}</td>"
            f"<td {left}>{html.escape(row.how)}</td></tr>"
            for row in self.results
        )
        head = "".join(f"<th {left}>{title}</th>" for title in ("", "Result", "How it is measured"))
        return {
            "text/plain": repr(self),
            "text/html": f"<table class='results'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>",
            RESULTS_MIME: [
                {**vars(row), "value": row.value if row.value is not None and math.isfinite(row.value) else None}
                for row in self.results
            ],
        }


def slow_steps(measured: Measurements) -> pd.DataFrame:
    """The full steps after the warm-up that took much longer than others like them (by a tenth of the median and by
    five median deviations): `step`, `seconds`, `extra_seconds` over the median, and `because`, what is known of the
    reason. Steps that encode pictures and steps that need not are not alike."""
    steps, every = measured.steps, measured.config.checkpointing_steps
    steady = steps[steps.steady & ~steps.short]
    evaluated = set(measured.validation.step) if len(measured.validation) else set()
    found = []
    for alike in (steady[steady.encoded_images > 0], steady[steady.encoded_images == 0]):
        if len(alike) < _ENOUGH_STEPS:
            continue
        usual = alike.seconds.median()
        deviation = (alike.seconds - usual).abs().median()
        phases = pd.DataFrame(list(alike.get("phase_seconds", ())), columns=PHASES)
        extra = phases - phases.median()
        for row, (step, seconds) in enumerate(zip(alike.step, alike.seconds)):
            if not seconds > usual + max(0.1 * usual, 5 * deviation):
                continue
            if step - 1 in evaluated:
                because = "after a held-out measurement"
            elif (step - 1) % every == 0:
                because = "after a checkpoint"
            elif len(extra) and extra.iloc[row].max() > 0:
                because = f"{extra.iloc[row].idxmax()} took longer"
            else:
                because = "it is not known why"
            found.append((step, seconds, seconds - usual, because))
    kinds = {"step": int, "seconds": float, "extra_seconds": float, "because": str}
    return pd.DataFrame(found, columns=list(kinds)).astype(kinds)


def measure(run: Any) -> Measurements:
    """All figures of a run, from what its folder holds (a `RunFolder`, complete or not, with one step at least)."""
    config, environment, model = run.config, run.environment, run.model
    resumed = environment.get("resumed", [])
    steps = mark(run.steps, config, [one["after_step"] for one in resumed])
    on_gpu = environment["devices"]["type"] != "cpu"
    noun = "GPU" if on_gpu else "CPU rank"
    steady = steps[steps.steady & steps.seconds.notna()]
    together = images_per_second(steady.images, steady.seconds)
    each = Estimate(*(part / config.num_processes for part in (together.value, together.low, together.high)))
    log = environment.get("imported")
    if log:
        each, throughput = _throughput_of_a_log(steps, config, noun, each, log, run.summary["total_seconds"])
    else:
        throughput = _throughput_results(steps, config, noun, each, together)
    return Measurements(
        steps=steps,
        validation=run.validation,
        config=config,
        throughput=each,
        results=(
            *throughput,
            *([_mfu(model, config, environment["devices"], steady)] if "flop_per_image" in model else []),
            *_encoders(steady),
            *_energy(steady, config),
            *([] if log else [_memory(run.summary, on_gpu)]),
            *_loss_results(steps, run.validation, config, model, bool(log)),
            _total_time(steps, run.summary, environment),
            *_resumed(resumed, environment.get("host")),
        ),
    )


def _throughput_of_a_log(
    steps: pd.DataFrame, config: TrainConfig, noun: str, measured: Estimate, log: dict[str, Any], seconds: float
) -> tuple[Estimate, list[Result]]:
    """Of a training that sdnb did not run: from the times of its steps if the log has most of them, and otherwise from
    what the progress bar shows near the end."""
    shown, ranks = log.get("shown_seconds_per_step"), config.num_processes
    full_size, known = config.gradient_accumulation_steps, steps.seconds.notna().sum()
    each, how = (
        measured,
        f"pictures / time / {noun}s, over the {known} steps whose time the log tells, warm-up left out",
    )
    rows = []
    if shown:
        micro_batch, size, at = log["seconds_per_micro_batch"], log["micro_batches_at_step"], log["at_step"]
        solved = f"tqdm's {shown:.2f} s/it at step {at}, its smoothing solved for a micro-batch"
        short = f"; step {at} was a short one, {size} of {full_size} micro-batches" if size < full_size else ""
        if known < config.max_train_steps / 2:
            each, how = Estimate(config.train_batch_size / micro_batch, math.nan, math.nan), solved + short
        nominal = config.global_batch / shown / ranks
        rows = [
            Result("nominal IPS", f"{nominal:.2f}",
                   f"{config.global_batch} / {shown:.2f} s/it at step {at} / {ranks} {noun}s; takes every step for a "
                   f"full one{short}", nominal),
            Result("seconds per micro-batch", f"{micro_batch:.3f}", solved, micro_batch),
        ]  # fmt: skip
    rows.insert(0, Result("images/s per " + noun, str(each), how, each.value))
    if ranks > 1:
        rows.append(Result(f"images/s, all {noun}s", f"{each.value * ranks:.2f}", f"{ranks} times as many",
                           each.value * ranks))  # fmt: skip
    if seconds:
        whole = steps.images.sum() / seconds / ranks
        how = f"{steps.images.sum():.0f} pictures / {seconds:.0f} s / {noun}s: the start and every pause count"
        rows.append(Result(f"images/s per {noun}, whole log", f"{whole:.2f}", how, whole))
    short_steps = int(steps.short.sum())
    meaning = "steps with fewer pictures than the global batch, by the header"
    rows.append(Result("short steps", f"{short_steps} of {len(steps)}", meaning, short_steps))
    return each, rows


def _throughput_results(
    steps: pd.DataFrame, config: TrainConfig, noun: str, each: Estimate, together: Estimate
) -> list[Result]:
    steady = steps[steps.steady]
    full = steady[~steady.short]
    warmup = warmup_steps(len(steps))
    measured = f"steps {warmup + 1} to {len(steps)}, {warmup} of warm-up left out"
    if again := len(steps) - warmup - len(steady):
        measured += f", and {again} that came first after a resume"
    nominal = nominal_ips(steps, config)
    rows = [
        Result(
            "images/s per " + noun,
            str(each),
            f"pictures trained on / time / {noun}s, with 95 % confidence interval; {measured}",
            each.value,
        ),
        Result(
            "nominal IPS",
            f"{nominal:.2f}" if math.isfinite(nominal) else "not known from one step",
            f"{config.global_batch} × tqdm's it/s at step {len(steps) - 1} / {config.num_processes} {noun}s; "
            "takes every step for a full one: only to compare with published numbers",
            nominal if math.isfinite(nominal) else None,
        ),
    ]
    if config.num_processes > 1:
        how = f"{config.num_processes} {noun}s together"
        rows.append(Result(f"images/s, all {noun}s", str(together), how, together.value))
    if len(full):
        median, p95 = full.seconds.median(), full.seconds.quantile(0.95)
        rows.append(
            Result("seconds per step", f"median {median:.3f}, 95 % under {p95:.3f}",
                   f"the {len(full)} full steps among them, {config.global_batch} pictures each", median)
        )  # fmt: skip
    short = int(steps.short.sum())
    rows.append(
        Result("short steps", f"{short} of {len(steps)}", "steps with fewer pictures than the global batch", short)
    )
    return rows


def _mfu(model: dict[str, Any], config: TrainConfig, devices: dict[str, Any], steady: pd.DataFrame) -> Result:
    flop = model["flop_per_image"]
    done = {
        "UNet forward and backward": flop["unet_training"] * steady.images,
        "VAE": flop["vae_encoder"] * steady.encoded_images,
        "text encoder": flop["text_encoder"] * steady.encoded_captions,
    }
    total = sum(each.sum() for each in done.values())
    tflops = total / steady.seconds.sum() / config.num_processes / 1e12
    peak = config.device_peak_tflops or peak_tflops(devices["names"][0], config.mixed_precision)
    parts = ", ".join(name for name, each in done.items() if each.sum())
    rate = f"{tflops:.3g} TFLOP/s ({total / steady.images.sum() / 1e12:.4g} TFLOP a picture: {parts})"
    reachable = model.get("reachable_tflops")
    if reachable:
        rate += f"; {tflops / reachable:.0%} of the {reachable:.3g} TFLOP/s that a matrix product alone reaches here"
    if peak is None:
        return Result("MFU", "peak of this device not known: set device_peak_tflops", rate)
    return Result("MFU", f"{100 * tflops / peak:.1f} %", f"of {peak:g} TFLOP/s peak: {rate}", tflops / peak)


def _energy(steady: pd.DataFrame, config: TrainConfig) -> list[Result]:
    if "joules" not in steady or steady.joules.isna().any() or not steady.joules.sum():
        return []
    watts = steady.joules.sum() / steady.seconds.sum() / config.num_processes
    per_joule = steady.images.sum() / steady.joules.sum()
    how = f"by the GPUs' own energy counters, the GPUs alone; {watts:.0f} W a GPU on the mean"
    return [Result("images per joule", f"{per_joule:.4f}", how, per_joule)]


def _encoders(steady: pd.DataFrame) -> list[Result]:
    encoded, trained = steady.encoded_images.sum(), steady.images.sum()
    share = 1 - encoded / trained
    if share <= 0:
        return []
    how = f"in the steps measured the VAE encoded {encoded:.0f} pictures for {trained:.0f} trained on"
    return [Result("encodings kept", f"{100 * share:.0f} %", how, share)]


def _memory(summary: dict[str, Any], on_gpu: bool) -> Result:
    if not summary:
        return Result("peak memory", "not known: the run did not reach its end", "")
    peaks = [rank["peak_memory_gib"] for rank in summary["ranks"]]
    how = "torch's allocator, from the first step on" if on_gpu else "resident memory of the process, from its start"
    return Result(
        "peak memory",
        f"{max(peaks):.2f} GiB",
        f"{'the highest of the ranks; ' if len(peaks) > 1 else ''}{how}",
        max(peaks),
    )


def _loss_results(
    steps: pd.DataFrame, validation: pd.DataFrame, config: TrainConfig, model: dict[str, Any], imported: bool
) -> list[Result]:
    last, first = steps.iloc[-1], steps.iloc[0]
    window = min(RUNNING_MEAN_STEPS, len(steps))
    meaning = "; from random weights, so it says nothing about quality" if model.get("random_weights") else ""
    rows = [
        Result("final loss", f"{last.running_loss:.4f}",
               f"running mean of the last {window} steps; step 1 had {first.loss:.4f}{meaning}", last.running_loss),
        Result("final step_loss", f"{last.step_loss:.4f}",
               "rank 0's last micro-batch, as the reference's progress bar shows: noise", last.step_loss),
    ]  # fmt: skip
    if imported:
        rows = [row for row in rows if not math.isnan(row.value)]
    if len(validation):
        measured = model.get("held_out_loss_of", "the UNet as trained (not its average)")
        begin, end = validation.iloc[0], validation.iloc[-1]
        rows.append(
            Result("held-out loss", f"{begin.loss:.4f} → {end.loss:.4f}",
                   f"{int(end.pictures)} pictures held out from this training, of {measured}, fixed noise; "
                   f"step {int(begin.step)} → {int(end.step)}", end.loss)
        )  # fmt: skip
    if config.target_loss is not None:
        met = last.running_loss < config.target_loss
        verdict = "met" if met else "not met" if math.isfinite(last.running_loss) else "not met, the loss is not finite"
        rows.append(
            Result("target", f"{verdict}: {last.running_loss:.4f} against {config.target_loss}",
                   f"by the running mean of the last {window} steps; "
                   f"the step_loss of step {len(steps)} is {last.step_loss:.4f}", float(met))
        )  # fmt: skip
    return rows


def _total_time(steps: pd.DataFrame, summary: dict[str, Any], environment: dict[str, Any]) -> Result:
    training = steps.seconds.sum()
    if not summary:
        return Result("total time", f"{training:.0f} s in steps", "the run did not reach its end", training)
    if "imported" in environment:
        total = summary["total_seconds"]
        return Result("total time", f"{total:.0f} s", "by the log, from the first step to its end", total)
    total = summary["ended"] - environment["started"]
    if environment.get("resumed"):
        how = f"from the last resume to saved pipeline; all steps together took {training:.0f} s"
    else:
        how = f"from launch to saved pipeline; {training:.0f} s of it in steps"
    return Result("total time", f"{total:.0f} s", how, total)


def _resumed(resumed: list[dict[str, Any]], host: str | None) -> list[Result]:
    if not resumed:
        return []
    elsewhere = " and on another machine" if any(one["host"] != host for one in resumed) else ""
    after = ", ".join(str(one["after_step"]) for one in resumed)
    return [Result("resumed", f"after step {after}", f"the steps before were measured in another run{elsewhere}")]
