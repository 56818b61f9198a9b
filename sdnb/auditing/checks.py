"""The checks of an audit. Each says whether a claim holds, does not hold, or cannot be known from the log, and why."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sdnb.auditing.claim import LOSS, PER_DEVICE, SECONDS, TOGETHER, Claim
from sdnb.auditing.evidence import SAVING, SHORT, SMOOTHING, WARMUP, Evidence, Way
from sdnb.errors import ConfigError
from sdnb.machine.environment import version_of
from sdnb.metrics.results import MFU_NAME, examples_of
from sdnb.metrics.throughput import images_per_second
from sdnb.run.baselines import baselines

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be known"
# The names of the checks say what holds.
RATE, SECONDS_PER_STEP, FINAL_LOSS, OWN_IMAGES = "rate", "s/it", "loss", "each step with its own images"
NO_SMOOTHING, NO_WARMUP, NO_SAVING, NO_REPEATS = "no moving average", "no warm-up", "no saving", "no repeats"
DEVICES, GLOBAL_BATCH, EACH_STEP, NO_DRIFT = "number of devices", "global batch", "each step once", "no drift"
POSSIBLE, RECORDED = "within reach", "recorded results"
_SAME = 0.005  # two rates this close are one: a bar has whole seconds, and figures are rounded
_WORTH_SAYING = 0.01  # of the images, for repeats; of the rate
_DRIFT, _SURE = 0.02, 2.5  # of the rate; in half-widths of a 95 % interval, so that honest runs give no alarm
_LEAST_FOR_DRIFT = 20  # steps
_LONGEST_WARMUP = 3  # times the rest of a training

# TFLOP of the UNet alone, forward and backward, for one image: counted with torch's FlopCounterMode in the layers of
# Stable Diffusion 1 (859,520,964 parameters) and 2 (865,910,724). A test counts one of them again.
UNET_TFLOP = {
    "v1": {512: 2.4068, 768: 6.4412, 960: 11.6961},
    "v2": {512: 2.4087, 768: 6.4432, 960: 11.6980},
}


@dataclass(frozen=True)
class Finding:
    """The result of a check: `verdict` is HOLDS, FAILS or UNKNOWN; `why` has the arithmetic."""

    check: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Case:
    """What is judged: the claims about a run, and the evidence. `gpus` and `device` are what is claimed of the machine;
    `rate` is the claimed images/s of one device, and `way` how it is computed from the log; None if that is unknown."""

    evidence: Evidence
    claims: Sequence[Claim]
    gpus: int | None
    device: str | None
    resolution: int | None
    rate: float | None
    way: Way | None

    def claimed(self, kind: str) -> Claim | None:
        return next((claim for claim in self.claims if claim.kind == kind), None)


def case_of(
    evidence: Evidence, claims: Sequence[Claim], gpus: int | None, device: str | None, resolution: int | None
) -> Case:
    """Find how the claimed rate is computed from the log: of all ways that give it, the one with the fewest faults."""
    for kinds in ((PER_DEVICE, TOGETHER), (SECONDS,), (LOSS,)):
        if len(same := [claim.text for claim in claims if claim.kind in kinds]) > 1:
            raise ConfigError(f"claims = {' and '.join(same)}: audit one after the other")
    devices = gpus or evidence.config.ranks
    rates = [(claim.value / (devices if claim.kind == TOGETHER else 1), claim.rounding)
             for claim in claims if claim.kind in (PER_DEVICE, TOGETHER)]  # fmt: skip
    if not rates:
        return Case(evidence, claims, gpus, device, resolution, None, None)
    rate, rounding = rates[0]
    allowed = max(_SAME * rate, rounding)
    near = [way for way in evidence.ways
            if abs(way.rate - rate) <= allowed + way.tolerance * way.rate + _interval(evidence, way)]  # fmt: skip
    way = min(near, key=lambda way: (len(way.faults), abs(way.rate - rate)), default=None)
    return Case(evidence, claims, gpus, device, resolution, rate, way)


def _interval(evidence: Evidence, way: Way) -> float:
    """Half the interval of the rate that holds, at most 1 %, for whoever left out other steps; 0 for the other ways."""
    rate = evidence.measured.throughput
    is_known = way is evidence.ways[0] and math.isfinite(rate.low)
    return min(rate.value - rate.low, _WORTH_SAYING * rate.value) if is_known else 0.0


def findings(case: Case) -> list[Finding]:
    """All checks that apply, in the order of a report."""
    return [finding for check in CHECKS for finding in check(case)]


def _rate(case: Case) -> Iterator[Finding]:
    if case.rate is None:
        return
    shown = ", ".join(f"{way.rate:.2f} {way.name}" for way in case.evidence.ways if not way.faults - {WARMUP, SAVING})
    claimed = f"{case.rate:.4g} images/s per device; the log shows {shown or 'no rate'}"
    if not case.evidence.ways:
        yield Finding(RATE, UNKNOWN, claimed)
    elif case.way is case.evidence.ways[0]:
        yield Finding(RATE, HOLDS, claimed)
    elif case.way is None and _may_be_warmup(case, case.rate / case.evidence.ways[0].rate):
        yield Finding(RATE, UNKNOWN, f"{claimed}, and not how long its warm-up was")
    else:
        true = case.evidence.ways[0].rate
        found = f"It is computed as {case.way.how}" if case.way else "No way to compute it from this log gives it"
        yield Finding(RATE, FAILS, f"{claimed}: ×{case.rate / true:.3f}. {found}")


def _may_be_warmup(case: Case, faster: float) -> bool:
    """Whether a claim, so many times faster than the log, may be that of its steps after the warm-up."""
    return case.evidence.only_whole_is_known and 1 < faster < _LONGEST_WARMUP


def _fault(case: Case, check: str, fault: str, applies: bool | None, wrong: str, right: str) -> Iterator[Finding]:
    """A fault in how the claimed rate is computed. `applies`: whether this log could have it; None if unknown."""
    if case.rate is None:
        return
    if case.way is not None:
        yield Finding(check, *((FAILS, wrong) if fault in case.way.faults else (HOLDS, right)))
    elif applies is False:
        yield Finding(check, HOLDS, right)
    else:
        yield Finding(check, UNKNOWN, "no way to compute the claimed rate from this log gives it")


def _short_steps(case: Case) -> Iterator[Finding]:
    evidence, config = case.evidence, case.evidence.config
    steps, full = evidence.steps, config.global_batch
    if examples_of(evidence.environment) is None and not evidence.is_own:
        if case.rate is not None:
            yield Finding(OWN_IMAGES, UNKNOWN, "the log does not say how many images an epoch has")
        return
    short, count = int(steps.short.sum()), len(steps)
    micro = f"{steps.micro_batches.sum():.0f} micro-batches of {config.train_batch_size}"
    wrong = f"{short} of {count} steps are short: {micro}, not {count * config.gradient_accumulation_steps}"
    if evidence.trained_seconds:
        seconds = evidence.trained_seconds
        rate = steps.micro_batches.sum() * config.train_batch_size / seconds
        wrong += f"; in {seconds:.1f} s that is {rate:.2f} images/s per device"
    wrong += f". The claim counts {full} images in each step"
    right = f"{short} of {count} steps are short, and counted with their own images" if short else "no step is short"
    yield from _fault(case, OWN_IMAGES, SHORT, bool(short), wrong, right)


def _smoothing(case: Case) -> Iterator[Finding]:
    log = case.evidence.log
    wrong = right = "the claim is no progress bar's moving average"
    if shown := log.get("shown_seconds_per_step"):
        wrong = f"{shown:.4g} s/it at step {log['at_step']} is tqdm's moving average, which follows the last steps"
        if case.evidence.trained_seconds:
            mean = case.evidence.trained_seconds / len(case.evidence.steps)
            wrong += f"; the mean of all {len(case.evidence.steps)} steps is {mean:.4g} s"
    yield from _fault(case, NO_SMOOTHING, SMOOTHING, bool(shown) or case.evidence.is_own, wrong, right)


def _warmup(case: Case) -> Iterator[Finding]:
    steps, seconds = case.evidence.steps, case.evidence.trained_seconds
    wrong = "the warm-up is in it: the claim is a mean over the whole training"
    if seconds and math.isfinite(steps.seconds.iloc[0]):
        wrong += (
            f": step 1 took {steps.seconds.iloc[0]:.1f} s, all {len(steps)} steps {seconds / len(steps):.2f} s each"
        )
    slow_start = bool(seconds) and steps.seconds.iloc[0] > 2 * (seconds or 0) / len(steps)
    if case.evidence.only_whole_is_known and case.way is case.evidence.ways[0] and not slow_start:
        yield Finding(NO_WARMUP, UNKNOWN, "the log shows only the whole training, and not how its first steps went")
    else:
        yield from _fault(case, NO_WARMUP, WARMUP, None, wrong, "the warm-up is not in it")


def _saving(case: Case) -> Iterator[Finding]:
    evidence = case.evidence
    pause = (evidence.total_seconds or 0) - (evidence.trained_seconds or evidence.total_seconds or 0)
    wrong = f"{pause:.1f} s after the last step, in which the pipeline was saved, are counted as training"
    right = "no time after the last step is in it"
    yield from _fault(case, NO_SAVING, SAVING, None if pause > 1 else False, wrong, right)


def _repeats(case: Case) -> Iterator[Finding]:
    steps = case.evidence.steps
    if not steps.unique_images.notna().all():
        yield Finding(NO_REPEATS, UNKNOWN, "the log does not say how many images an epoch has")
        return
    images, unique = steps.images.sum(), steps.unique_images.sum()
    share = 1 - unique / images
    why = f"{images - unique:.0f} of {images:.0f} images ({share:.1%}) are repeats that fill the last round of an epoch"
    if share < _WORTH_SAYING:
        yield Finding(NO_REPEATS, HOLDS, why)
    elif case.evidence.is_own:
        yield Finding(NO_REPEATS, HOLDS, f"{why}; the results say it, with the unique images/s")
    else:
        rate = f"; {case.evidence.ways[0].rate * (1 - share):.2f} unique images/s" if case.evidence.ways else ""
        yield Finding(NO_REPEATS, FAILS, why + rate)


def _world_size(case: Case) -> Iterator[Finding]:
    evidence = case.evidence
    processes, ranks = evidence.log.get("header", {}).get("num_processes"), evidence.config.ranks
    known = processes or (ranks if evidence.is_own or "num_processes" in evidence.log["known_settings"] else None)
    if case.gpus is None:
        return
    if known is None:
        yield Finding(DEVICES, UNKNOWN, f"{case.gpus} devices are claimed; the log does not say how many it had")
    elif case.gpus != known:
        batch = f" and a global batch of {evidence.config.global_batch}"
        yield Finding(DEVICES, FAILS, f"{case.gpus} devices are claimed; the log has {known} processes{batch}")
    else:
        yield Finding(DEVICES, HOLDS, f"{known} processes")


def _global_batch(case: Case) -> Iterator[Finding]:
    evidence, config = case.evidence, case.evidence.config
    if evidence.is_own:
        examples = examples_of(evidence.environment)
        epoch = config.epoch(examples) if examples else None
        wrong = [int(step) for step, images in zip(evidence.steps.step, evidence.steps.images)
                 if images > config.global_batch or (epoch and images != epoch.images_in(int(step)))]  # fmt: skip
        product = f"{config.train_batch_size} × {config.gradient_accumulation_steps} × {config.ranks}"
        if wrong:
            yield Finding(GLOBAL_BATCH, FAILS, f"the images of {_steps_in_words(wrong)} are not those of {product}")
        else:
            yield Finding(GLOBAL_BATCH, HOLDS, f"{product} = {config.global_batch}")
        return
    header = evidence.log.get("header", {})
    names = ("train_batch_size", "gradient_accumulation_steps", "num_processes", "global_batch")
    if any(name not in header for name in names):
        yield Finding(GLOBAL_BATCH, UNKNOWN, "the log does not name batch, accumulation, ranks and global batch")
        return
    batch, accumulation, ranks, together = (header[name] for name in names)
    why = f"{batch} × {accumulation} × {ranks} = {batch * accumulation * ranks}; the header says {together}"
    yield Finding(GLOBAL_BATCH, HOLDS if batch * accumulation * ranks == together else FAILS, why)


def _steps(case: Case) -> Iterator[Finding]:
    evidence, steps = case.evidence, case.evidence.steps
    numbers = [int(step) for step in steps.step]
    again = [step for step, twice in zip(numbers, steps.step.duplicated()) if twice]
    expected = range(numbers[0] if evidence.log else 1, max(numbers) + 1)
    absent = sorted({*expected} - {*numbers}) if not evidence.log.get("form", "").startswith("MLPerf") else []
    logged_again = evidence.log.get("header", {}).get("steps_logged_again", 0)
    timed = int(steps.seconds.notna().sum())
    not_shown = evidence.log.get("not_shown", ())
    if again or absent or logged_again:
        parts = [f"without {_steps_in_words(absent)}"] if absent else []
        parts += [f"twice {_steps_in_words(again)}"] if again else []
        parts += [f"{logged_again} of the steps logged again, as after a resume"] if logged_again else []
        yield Finding(EACH_STEP, FAILS, "; ".join(parts))
    elif 0 < len(not_shown) < 0.1 * len(numbers):
        yield Finding(EACH_STEP, UNKNOWN, f"the log shows nothing of {_steps_in_words(not_shown)}")
    elif timed < 0.9 * (len(numbers) - 1):
        yield Finding(EACH_STEP, UNKNOWN, f"the log shows the times of {timed} of {len(numbers)} steps")
    else:
        yield Finding(EACH_STEP, HOLDS, f"steps {numbers[0]} to {numbers[-1]}, each once")


def _drift(case: Case) -> Iterator[Finding]:
    steps = case.evidence.steps
    timed = steps[steps.steady & steps.seconds.notna()]
    if len(timed) < _LEAST_FOR_DRIFT:
        yield Finding(NO_DRIFT, UNKNOWN, f"the log shows the times of {len(timed)} of the steps after the warm-up")
        return
    cut = len(timed) // 4
    first, rest = (images_per_second(part.images, part.seconds) for part in (timed[:cut], timed[cut:]))
    ratio = first.value / rest.value
    margin = math.hypot(*((each.high - each.low) / 2 / each.value for each in (first, rest)))
    interval = f"95 % interval {ratio * math.exp(-margin):.3f} to {ratio * math.exp(margin):.3f}"
    why = f"the first quarter after the warm-up trained ×{ratio:.3f} as fast as the rest ({interval})"
    is_sure = math.log(ratio) > _SURE * margin
    yield Finding(NO_DRIFT, HOLDS if ratio <= 1 + _DRIFT else FAILS if is_sure else UNKNOWN, why)


def _utilisation(case: Case) -> Iterator[Finding]:
    evidence, config = case.evidence, case.evidence.config
    own = next((row for row in evidence.measured.results if row.name == MFU_NAME and row.value is not None), None)
    if own is not None and own.value is not None:
        yield Finding(POSSIBLE, FAILS if own.value > 1 else HOLDS, f"MFU {own.text} {own.how}")
        return
    rate = case.rate or (evidence.ways[0].rate if evidence.ways else None)
    tflop = UNET_TFLOP.get(_architecture(config.pretrained_model_name_or_path), {}).get(_resolution(case) or 0)
    kind = _kind_of(case.device or next(iter(evidence.environment.get("devices", {}).get("names") or []), ""))
    if not (rate and tflop and kind):
        yield Finding(POSSIBLE, UNKNOWN, "it needs a known model, its resolution and a known device")
        return
    peak, most, who = _limits(kind, config.mixed_precision or "fp16")
    least = rate * tflop
    why = f"{rate:.4g} images/s × {tflop:.4g} TFLOP, UNet alone = {least:.1f} TFLOP/s"
    if peak and least > peak:
        yield Finding(POSSIBLE, FAILS, f"{why}, above the peak of {kind}, {peak:g}")
    elif least > most * (1 + _WORTH_SAYING):
        yield Finding(POSSIBLE, FAILS, f"{why}, above the most that is published for {kind}, {most:.1f} ({who})")
    else:
        of_peak = f", {least / peak:.0%} of the peak" if peak else ""
        yield Finding(POSSIBLE, HOLDS, f"{why}{of_peak}; {most:.1f} is published for {kind} ({who})")


def _resolution(case: Case) -> int | None:
    evidence = case.evidence
    is_known = evidence.is_own or "resolution" in evidence.log.get("known_settings", ())
    return case.resolution or (evidence.config.resolution if is_known else None)


def _architecture(model: str) -> str:
    name = model.rstrip("/").rpartition("/")[2].lower()
    found = re.search(r"(?:stable-diffusion|sd)-?(?:v-?)?([12])(?=\D|$)", name)
    return f"v{found[1]}" if found else ""


def _kind_of(device: str) -> str | None:
    words = re.split(r"[^A-Za-z0-9]+", device.upper())
    return next((one.kind for one in baselines().values() if one.kind.upper() in words), None)


def _limits(kind: str, precision: str) -> tuple[float | None, float, str]:
    """A device's peak, and the most UNet TFLOP/s that is published for it, with its source."""
    from sdnb.machine.peaks import peak_tflops

    of_kind = [one for one in baselines().values() if one.kind == kind]
    achieved = {one.name: one.images_per_second * UNET_TFLOP[one.architecture][one.resolution] for one in of_kind}
    best = max(achieved, key=lambda name: achieved[name])
    return peak_tflops(kind, precision), achieved[best], best


def _seconds_per_step(case: Case) -> Iterator[Finding]:
    claim, evidence = case.claimed(SECONDS), case.evidence
    if claim is None:
        return
    steps, log = evidence.steps, evidence.log
    shown = {"the mean of all steps": (evidence.trained_seconds or math.nan) / len(steps)}
    if steps.seconds[steps.steady].notna().mean() > 0.5:
        shown["the median of the full steps"] = steps.seconds[steps.steady & ~steps.short].median()
        shown["the mean after the warm-up"] = steps.seconds[steps.steady].mean()
    known = {name: value for name, value in shown.items() if math.isfinite(value)}
    smoothed = log.get("shown_seconds_per_step")
    said = ", ".join(f"{value:.4g} s is {name}" for name, value in known.items()) or "the log shows no time of a step"
    if any(abs(value - claim.value) <= max(_SAME * value, claim.rounding) for value in known.values()):
        yield Finding(SECONDS_PER_STEP, HOLDS, f"{claim.text}: {said}")
    elif smoothed and abs(smoothed - claim.value) <= max(_SAME * smoothed, claim.rounding):
        average = f"it is the bar's moving average at step {log['at_step']}"
        yield Finding(SECONDS_PER_STEP, FAILS, f"{claim.text}: {average}; {said}")
    else:
        mean = known.get("the mean of all steps", math.nan)
        is_unknown = not known or _may_be_warmup(case, mean / claim.value)
        yield Finding(SECONDS_PER_STEP, UNKNOWN if is_unknown else FAILS, f"{claim.text}: {said}")


def _loss(case: Case) -> Iterator[Finding]:
    claim, steps = case.claimed(LOSS), case.evidence.steps
    if claim is None:
        return
    last, mean = steps.iloc[-1], steps.running_loss.iloc[-1]
    rounding = max(claim.rounding, 1e-3 * claim.value)
    if math.isfinite(mean) and abs(mean - claim.value) <= rounding:
        yield Finding(FINAL_LOSS, HOLDS, f"{claim.text}: the mean of the last ten steps is {mean:.4f}")
    elif math.isfinite(last.get("step_loss", math.nan)) and abs(last.step_loss - claim.value) <= rounding:
        known = f"; the mean of the last step is {last.loss:.4f}" if math.isfinite(last.loss) else ""
        known += f", of the last ten steps {mean:.4f}" if math.isfinite(mean) else ""
        one = f"the loss of one micro-batch of one rank at step {last.step:.0f}"
        yield Finding(FINAL_LOSS, FAILS, f"{claim.text} is {one}{known}")
    elif math.isfinite(mean):
        yield Finding(FINAL_LOSS, FAILS, f"{claim.text}: the mean of the last ten steps is {mean:.4f}")
    else:
        yield Finding(FINAL_LOSS, UNKNOWN, f"{claim.text}: the log does not have the losses of the last ten steps")


def _recorded(case: Case) -> Iterator[Finding]:
    """The results that a run of sdnb recorded, against its step records. Another version may define them otherwise."""
    if not case.evidence.recorded or case.evidence.recorded_by != version_of("sdnb"):
        return
    now = {row.name: row.value for row in case.evidence.measured.results}
    changed = [
        f"{row['name']} {row['value']:.4g}, and its records give {now[row['name']]:.4g}"
        for row in case.evidence.recorded
        if row.get("value") is not None and now.get(row["name"]) is not None
        and not math.isclose(row["value"], now[row["name"]] or 0, rel_tol=1e-6)
    ]  # fmt: skip
    if changed:
        yield Finding(RECORDED, FAILS, f"results.json says {'; '.join(changed)}")
    else:
        yield Finding(RECORDED, HOLDS, "results.json agrees with the records of the steps")


def _steps_in_words(numbers: Sequence[int]) -> str:
    listed = "step " if len(numbers) == 1 else "steps "
    return listed + ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    _rate, _seconds_per_step, _loss, _short_steps, _smoothing, _warmup, _saving, _repeats, _world_size, _global_batch,
    _steps, _drift, _utilisation, _recorded,
)  # fmt: skip
