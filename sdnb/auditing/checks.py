"""The checks of an audit. Each says whether a claim holds, does not hold, or cannot be known from the log, and why."""

import math
from collections.abc import Callable, Iterator, Sequence

from sdnb.auditing.case import FAILS, HOLDS, SAME, UNKNOWN, WORTH_SAYING, Case, Finding
from sdnb.auditing.claim import LOSS, SECONDS
from sdnb.auditing.evidence import SAVING, SHORT, SMOOTHING, WARMUP
from sdnb.auditing.reach import within_reach
from sdnb.machine.environment import version_of
from sdnb.metrics.results import examples_of
from sdnb.metrics.steps import warmup_steps
from sdnb.metrics.throughput import images_per_second

# The names of the checks say what holds.
RATE, SECONDS_PER_STEP, FINAL_LOSS, OWN_IMAGES = "rate", "s/it", "loss", "each step with its own images"
NO_SMOOTHING, NO_WARMUP, NO_SAVING, NO_REPEATS = "no moving average", "no warm-up", "no saving", "no repeats"
DEVICES, GLOBAL_BATCH, EACH_STEP, NO_DRIFT = "number of devices", "global batch", "each step once", "no drift"
RECORDED = "recorded results"
_DRIFT, _SURE = 0.02, 2.5  # of the rate; in half-widths of a 95 % interval, so that honest runs give no alarm
_LEAST_FOR_DRIFT = 20  # steps
_LONGEST_WARMUP = 3  # times the rest of a training


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


def _fault(case: Case, check: str, fault: str, possible: bool, wrong: str, right: str) -> Iterator[Finding]:
    """A fault in how the claimed rate is computed. `possible`: whether a claim from this log could have it."""
    if case.rate is None:
        return
    if case.way is not None:
        yield Finding(check, *((FAILS, wrong) if fault in case.way.faults else (HOLDS, right)))
    elif possible:
        yield Finding(check, UNKNOWN, "no way to compute the claimed rate from this log gives it")
    else:
        yield Finding(check, HOLDS, right)


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
        yield from _fault(case, NO_WARMUP, WARMUP, True, wrong, "the warm-up is not in it")


def _saving(case: Case) -> Iterator[Finding]:
    evidence = case.evidence
    pause = (evidence.total_seconds or 0) - (evidence.trained_seconds or evidence.total_seconds or 0)
    wrong = f"{pause:.1f} s after the last step, in which the pipeline was saved, are counted as training"
    right = "no time after the last step is in it"
    yield from _fault(case, NO_SAVING, SAVING, pause > 1, wrong, right)


def _repeats(case: Case) -> Iterator[Finding]:
    steps = case.evidence.steps
    if not steps.unique_images.notna().all():
        yield Finding(NO_REPEATS, UNKNOWN, "the log does not say how many images an epoch has")
        return
    images, unique = steps.images.sum(), steps.unique_images.sum()
    share = 1 - unique / images
    why = f"{images - unique:.0f} of {images:.0f} images ({share:.1%}) are repeats that fill the last round of an epoch"
    if share < WORTH_SAYING:
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
    absent = sorted({*expected} - {*numbers})
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
    # From the first tenth on: a steady state begins after a change of pace.
    timed = case.evidence.steps.iloc[warmup_steps(len(case.evidence.steps)) :].dropna(subset="seconds")
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
    if any(abs(value - claim.value) <= max(SAME * value, claim.rounding) for value in known.values()):
        yield Finding(SECONDS_PER_STEP, HOLDS, f"{claim.text}: {said}")
    elif smoothed and abs(smoothed - claim.value) <= max(SAME * smoothed, claim.rounding):
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
    _steps, _drift, within_reach, _recorded,
)  # fmt: skip
