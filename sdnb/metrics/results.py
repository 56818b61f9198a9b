"""From the step records to results: throughput, loss, utilisation. Reads no files and draws nothing."""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sdnb.machine.peaks import peak_tflops
from sdnb.metrics.steps import RUNNING_MEAN_STEPS, mark, slow_steps, warmup_steps
from sdnb.metrics.throughput import Estimate, images_per_second, nominal_ips
from sdnb.settings.config import TrainConfig
from sdnb.tables import html_table

RESULTS_MIME = "application/vnd.sdnb.results+json"  # the rows of the results table
PAGE_MIME = "application/vnd.sdnb.page+json"  # what a page says besides the notebook's outputs


@dataclass(frozen=True)
class Result:
    """A row of the results table."""

    name: str
    text: str
    how: str
    value: float | None = None


@dataclass(frozen=True)
class Measurements:
    """Everything that the figures and the results table of a run show."""

    steps: pd.DataFrame
    validation: pd.DataFrame
    config: TrainConfig
    throughput: Estimate
    results: tuple[Result, ...]

    def __getitem__(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)

    @property
    def slow_steps(self) -> pd.DataFrame:
        """As `steps.slow_steps` finds them."""
        measured_at = list(self.validation.step) if len(self.validation) else []
        return slow_steps(self.steps, measured_at, self.config.checkpointing_steps)

    def __repr__(self) -> str:
        width = max(len(result.name) for result in self.results)
        return "\n".join(f"{result.name:<{width}}  {result.text}" for result in self.results)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        names, texts, hows = zip(*((row.name, row.text, row.how) for row in self.results))
        table = pd.DataFrame({"Result": texts, "How it is measured": hows}, index=names)
        return {
            "text/plain": repr(self),
            "text/html": html_table(table, "results"),
            RESULTS_MIME: [
                {**vars(row), "value": row.value if row.value is not None and math.isfinite(row.value) else None}
                for row in self.results
            ],
        }


def measure(run: Any) -> Measurements:
    """All results of a run, complete or not, from its `RunFolder`. It needs at least one step."""
    config, environment, model = run.config, run.environment, run.model
    resumed = environment.get("resumed", [])
    steps = mark(run.steps, config, [one["after_step"] for one in resumed])
    on_gpu = environment["devices"]["type"] != "cpu"
    noun = "GPU" if on_gpu else "CPU rank"
    steady = steps[steps.steady & steps.seconds.notna()]
    together = images_per_second(steady.images, steady.seconds)
    each = Estimate(*(part / config.ranks for part in (together.value, together.low, together.high)))
    log = environment.get("imported")
    if log:
        each, throughput = _throughput_of_a_log(steps, config, noun, each, log, run.summary["total_seconds"])
    else:
        throughput = _throughput(steps, config, noun, each, together)
    return Measurements(
        steps=steps,
        validation=run.validation,
        config=config,
        throughput=each,
        results=(
            *throughput,
            *([_mfu(model, config, environment["devices"], steady)] if "flop_per_image" in model else []),
            *_encodings(steady),
            *_energy(steady, config),
            *([] if log else [_memory(run.summary, on_gpu)]),
            *_losses(steps, run.validation, config, model, bool(log)),
            _total_time(steps, run.summary, environment),
            *_resumed(resumed, environment.get("host")),
        ),
    )


def _throughput_of_a_log(
    steps: pd.DataFrame, config: TrainConfig, noun: str, measured: Estimate, log: dict[str, Any], seconds: float
) -> tuple[Estimate, list[Result]]:
    """Of a run that sdnb did not make: from the times of its steps if the log has most of them, else from the progress
    bar near the end."""
    shown, ranks = log.get("shown_seconds_per_step"), config.ranks
    full_size, known = config.gradient_accumulation_steps, steps.seconds.notna().sum()
    each, how = measured, f"images / time / {noun}s, over the {known} steps with a time in the log, without the warm-up"
    rows = []
    if shown:
        micro_batch, size, at = log["seconds_per_micro_batch"], log["micro_batches_at_step"], log["at_step"]
        solved = f"from tqdm's {shown:.2f} s/it at step {at}, with its smoothing undone"
        short = f"; step {at} was a short one, {size} of {full_size} micro-batches" if size < full_size else ""
        if known < (config.max_train_steps or len(steps)) / 2:
            each, how = Estimate(config.train_batch_size / micro_batch, math.nan, math.nan), solved + short
        nominal = config.global_batch / shown / ranks
        rows = [
            Result("nominal IPS", f"{nominal:.2f}",
                   f"{config.global_batch} / {shown:.2f} s/it at step {at} / {ranks} {noun}s; counts every step as a "
                   f"full one{short}", nominal),
            Result("seconds per micro-batch", f"{micro_batch:.3f}", solved, micro_batch),
        ]  # fmt: skip
    rows.insert(0, Result("images/s per " + noun, str(each), how, each.value))
    if ranks > 1:
        rows.append(Result(f"images/s, all {noun}s", f"{each.value * ranks:.2f}", f"{ranks} times that",
                           each.value * ranks))  # fmt: skip
    if seconds:
        whole = steps.images.sum() / seconds / ranks
        how = f"{steps.images.sum():.0f} images / {seconds:.0f} s / {noun}s, with the start and all pauses"
        rows.append(Result(f"images/s per {noun}, whole log", f"{whole:.2f}", how, whole))
    return each, [*rows, _short_steps(steps, ", by the header")]


def _throughput(
    steps: pd.DataFrame, config: TrainConfig, noun: str, each: Estimate, together: Estimate
) -> list[Result]:
    steady = steps[steps.steady]
    full = steady[~steady.short]
    warmup = warmup_steps(len(steps))
    measured = f"steps {warmup + 1} to {len(steps)}, without {warmup} of warm-up"
    if resumed := len(steps) - warmup - len(steady):
        measured += f" and {resumed} directly after a resume"
    nominal = nominal_ips(steps, config)
    rows = [
        Result("images/s per " + noun, str(each),
               f"images trained on / time / {noun}s, with 95 % confidence interval; {measured}", each.value),
        Result("nominal IPS", f"{nominal:.2f}" if math.isfinite(nominal) else "unknown after one step",
               f"{config.global_batch} × tqdm's it/s at step {len(steps) - 1} / {config.num_processes} {noun}s; "
               "counts every step as a full one: only to compare with published numbers",
               nominal if math.isfinite(nominal) else None),
    ]  # fmt: skip
    if config.ranks > 1:
        rows.append(Result(f"images/s, all {noun}s", str(together), f"{config.ranks} {noun}s together", together.value))
    if len(full):
        median, p95 = full.seconds.median(), full.seconds.quantile(0.95)
        rows.append(
            Result("seconds per step", f"median {median:.3f}, 95 % under {p95:.3f}",
                   f"the {len(full)} full steps among them, {config.global_batch} images each", median)
        )  # fmt: skip
    return [*rows, _short_steps(steps)]


def _short_steps(steps: pd.DataFrame, source: str = "") -> Result:
    short = int(steps.short.sum())
    how = f"steps with fewer images than the global batch{source}"
    return Result("short steps", f"{short} of {len(steps)}", how, short)


def _mfu(model: dict[str, Any], config: TrainConfig, devices: dict[str, Any], steady: pd.DataFrame) -> Result:
    flop = model["flop_per_image"]
    done = {
        "UNet forward and backward": flop["unet_training"] * steady.images,
        "VAE": flop["vae_encoder"] * steady.encoded_images,
        "text encoder": flop["text_encoder"] * steady.encoded_captions,
    }
    total = sum(each.sum() for each in done.values())
    tflops = total / steady.seconds.sum() / config.ranks / 1e12
    peak = config.device_peak_tflops or peak_tflops(devices["names"][0], config.mixed_precision or "no")
    parts = ", ".join(name for name, each in done.items() if each.sum())
    rate = f"{tflops:.3g} TFLOP/s ({total / steady.images.sum() / 1e12:.4g} TFLOP per image: {parts})"
    reachable = model.get("reachable_tflops")
    if reachable:
        rate += f"; {tflops / reachable:.0%} of the {reachable:.3g} TFLOP/s that a plain matrix product reaches here"
    if peak is None:
        return Result("MFU", "unknown peak of this device: set device_peak_tflops", rate)
    return Result("MFU", f"{100 * tflops / peak:.1f} %", f"of {peak:g} TFLOP/s peak: {rate}", tflops / peak)


def _energy(steady: pd.DataFrame, config: TrainConfig) -> list[Result]:
    if "joules" not in steady or steady.joules.isna().any() or not steady.joules.sum():
        return []
    watts = steady.joules.sum() / steady.seconds.sum() / config.ranks
    per_joule = steady.images.sum() / steady.joules.sum()
    how = f"from the energy counters of the GPUs, without the rest of the machine; mean {watts:.0f} W per GPU"
    return [Result("images per joule", f"{per_joule:.4f}", how, per_joule)]


def _encodings(steady: pd.DataFrame) -> list[Result]:
    encoded, trained = steady.encoded_images.sum(), steady.images.sum()
    share = 1 - encoded / trained
    if share <= 0:
        return []
    how = f"in the measured steps the VAE encoded {encoded:.0f} images for {trained:.0f} trained on"
    return [Result("encodings kept", f"{100 * share:.0f} %", how, share)]


def _memory(summary: dict[str, Any], on_gpu: bool) -> Result:
    if not summary:
        return Result("peak memory", "unknown: the run is incomplete", "")
    peaks = [rank["peak_memory_gib"] for rank in summary["ranks"]]
    how = "torch's allocator, from the first step on" if on_gpu else "resident memory of the process, from its start"
    highest = "the highest of the ranks; " if len(peaks) > 1 else ""
    return Result("peak memory", f"{max(peaks):.2f} GiB", highest + how, max(peaks))


def _losses(
    steps: pd.DataFrame, validation: pd.DataFrame, config: TrainConfig, model: dict[str, Any], imported: bool
) -> list[Result]:
    last, first = steps.iloc[-1], steps.iloc[0]
    window = min(RUNNING_MEAN_STEPS, len(steps))
    meaning = "; from random weights, so it says nothing about quality" if model.get("random_weights") else ""
    rows = [
        Result("final loss", f"{last.running_loss:.4f}",
               f"running mean of the last {window} steps; step 1 had {first.loss:.4f}{meaning}", last.running_loss),
        Result("final step_loss", f"{last.step_loss:.4f}",
               "rank 0's last micro-batch, as the reference's progress bar shows it: noise", last.step_loss),
    ]  # fmt: skip
    if imported:
        rows = [row for row in rows if row.value is not None and not math.isnan(row.value)]
    if len(validation):
        measured = model.get("held_out_loss_of", "the UNet as trained (not its EMA)")
        begin, end = validation.iloc[0], validation.iloc[-1]
        rows.append(
            Result("held-out loss", f"{begin.loss:.4f} → {end.loss:.4f}",
                   f"{int(end.images)} images that are not trained on, {measured}, fixed noise; "
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
        return Result("total time", f"{training:.0f} s in steps", "the run is incomplete", training)
    if "imported" in environment:
        total = summary["total_seconds"]
        return Result("total time", f"{total:.0f} s", "by the log, from the first step to its end", total)
    total = summary["ended"] - environment["started"]
    if environment.get("resumed"):
        how = f"from the last resume to the saved pipeline; all steps together took {training:.0f} s"
    else:
        how = f"from launch to the saved pipeline; {training:.0f} s of it in steps"
    return Result("total time", f"{total:.0f} s", how, total)


def _resumed(resumed: list[dict[str, Any]], host: str | None) -> list[Result]:
    if not resumed:
        return []
    elsewhere = ", on another machine" if any(one["host"] != host for one in resumed) else ""
    after = ", ".join(str(one["after_step"]) for one in resumed)
    return [
        Result("resumed", f"after step {after}", f"the steps before were measured in an earlier session{elsewhere}")
    ]
