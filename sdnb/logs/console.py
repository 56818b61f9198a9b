"""Console logs with a header and tqdm's progress bar: of diffusers' `train_text_to_image.py`, and of kohya's
sd-scripts. The bar shows the seconds per step as a rounded moving average, and counts every step as a full one; the
header tells which steps are short."""

import re
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from sdnb.errors import RunError
from sdnb.logs import progress_bar
from sdnb.logs.facts import checked, chosen, require
from sdnb.logs.progress_bar import State
from sdnb.run.log import Log, empty_records

REFERENCE = "console log of diffusers' train_text_to_image.py"
KOHYA = "console log of kohya's sd-scripts"
_BEGINS = re.compile(r"\*{3,} Running training|\brunning training / ")
_FACTS = {
    "examples": r"Num examples = (\d+)|num (?:train images \* repeats|examples) / [^:]*: (\d+)",
    "train_batch_size": r"Instantaneous batch size per device = (\d+)|batch size per device / [^:]*: (\d+) *$",
    "global_batch": r"Total train batch size \(w\. parallel, distributed & accumulation\) = (\d+)"
    r"|total train batch size \(with parallel & distributed & accumulation\) / [^:]*: (\d+)",
    "gradient_accumulation_steps": r"Gradient Accumulation steps = (\d+)|gradient a?ccumulation steps / [^=]*= (\d+)",
    "num_train_epochs": r"Num Epochs = (\d+)|num epochs / [^:]*: (\d+)",
    "max_train_steps": r"Total optimization steps = (\d+)|total optimization steps / [^:]*: (\d+)",
    "num_processes": r"\bNum processes: (\d+)|loading model for process \d+/(\d+)",
    "batches_per_epoch": r"num batches per epoch / [^:]*: (\d+)",  # of one rank; kohya only
    "mixed_precision": r"Mixed precision type: (no|fp16|bf16)",
    "pretrained_model_name_or_path": r"subfolder of ([^\s]+?)\.?(?:\s|$)",
    "device_type": r"\bDevice: (\w+)",
    "began": r"(\d\d/\d\d/\d{4} \d\d:\d\d:\d\d) - INFO - \S+ - \*+ Running training",
}
_PATTERNS = {name: re.compile(pattern.replace(r"(\d+)", r"(\d{1,18})(?!\d)")) for name, pattern in _FACTS.items()}
_SECONDS = re.compile(r"\s+(\d+\.\d{6,})\s*")
_SAVED = "pretrained_model_name_or_path"  # named when the pipeline is saved
_MOST_NAMED = 1000  # steps
_COUNTS = ("examples", "train_batch_size", "gradient_accumulation_steps", "num_processes", "max_train_steps")


@dataclass
class _Run:
    """What the log says of one run: the facts before and in its header, and its bar."""

    facts: dict[str, str] = field(default_factory=dict)
    bar: list[State] = field(default_factory=list)
    furthest: State | None = None  # of the bar
    elapsed: list[float] = field(default_factory=list)  # seconds, as the chip-evaluation suite's ranks print at the end

    def add(self, state: State) -> None:
        if self.furthest is None or (state.step, state.elapsed) > (self.furthest.step, self.furthest.elapsed):
            self.furthest = state
        self.bar.append(state)

    @property
    def is_complete(self) -> bool:
        return self.furthest is not None and self.furthest.step == self.furthest.total


def read(lines: Iterable[str], name: str, settings: dict[str, Any], run: int | None = None) -> Log:
    """Read a console log. The ranks may have printed anything between the states of the bar. `name`: of the log, for
    messages; `settings`: facts that it does not contain. Raises RunError if it has no progress bar or no header, or
    there is no such `run` in it."""
    runs = _split(lines)
    if not runs:
        raise RunError(f"{name}: has no progress bar of a run, such as «Steps:  99%|█| 100/101 [03:22<…»")
    number = chosen(runs, run, [one.is_complete for one in runs], name)
    return _log(runs[number], name, settings, number + 1, len(runs))


def _split(lines: Iterable[str]) -> list[_Run]:
    """The runs in a log, each with a bar. A run begins at its header, or where the bar begins anew. What is said
    between the last state of a bar and that belongs to the run that begins."""
    runs = [_Run()]
    facts: dict[str, str] = {}  # since the last state of a bar
    for line in filter(None, lines):
        if _BEGINS.search(line) and runs[-1].bar:
            runs.append(_Run())
        for name, pattern in _PATTERNS.items():
            if match := pattern.search(line):
                (runs[-1].facts if name == _SAVED else facts)[name] = match[match.lastindex or 0]
        if "elapsed_time:" in line or _SECONDS.fullmatch(line):
            runs[-1].elapsed += map(float, _SECONDS.findall(line))
        for state in progress_bar.states(line):
            run = runs[-1]
            if run.furthest and progress_bar.begins_anew(run.bar[0], run.furthest, state):
                runs.append(_Run(dict(run.facts)))
            runs[-1].facts |= facts
            facts = {}
            if state.total == int(runs[-1].facts.get("max_train_steps", state.total)):  # else another bar's counter
                runs[-1].add(state)
    return [one for one in runs if one.bar]


def _log(one: _Run, name: str, settings: dict[str, Any], number: int, count: int) -> Log:
    header = {fact: int(text) for fact, text in one.facts.items() if text.isdigit()}
    given: dict[str, Any] = {**one.facts, **header, **settings, "max_train_steps": one.bar[-1].total}
    popped = ("began", "device_type", "global_batch", "batches_per_epoch")
    began, device, together, batches = (given.pop(fact, None) for fact in popped)
    require(name, given, "examples", "train_batch_size", "gradient_accumulation_steps")
    checked(name, **{fact: given[fact] for fact in _COUNTS if fact in given}, global_batch=together)
    remarks = []
    if together and "num_processes" not in settings:
        # The header's own arithmetic, from the number of processes that the training really had.
        per_rank = given["train_batch_size"] * given["gradient_accumulation_steps"]
        if together % per_rank:
            raise RunError(
                f"{name}: a global batch of {together} is no multiple of {given['train_batch_size']} images × "
                f"{given['gradient_accumulation_steps']} micro-batches; give --num_processes"
            )
        ranks = together // per_rank
        if given.setdefault("num_processes", ranks) != ranks:
            said = f"it says {given['num_processes']} processes, and the global batch of {ranks}"
            remarks = [f"{said}: {ranks} are counted"]
        given["num_processes"] = ranks
    require(name, given, "num_processes")
    saved = Path(given.pop(_SAVED, "")).name  # a path is useless elsewhere, and may contain a user's name
    given |= {_SAVED: saved} if saved else {}
    rates = {rate for state in one.bar if (rate := state.number("lr")) > 0}
    if len(rates) == 1:  # else a schedule, whose peak is unknown
        given["learning_rate"] = rates.pop()
    form = REFERENCE if batches is None else KOHYA
    log = Log(form, given, given.pop("examples"), header=header, run=number, runs=count, remarks=remarks)
    log.device_type = device or log.device_type
    with suppress(ValueError, OverflowError, TypeError):  # a damaged date
        log.began = datetime.strptime(began, "%m/%d/%Y %H:%M:%S").timestamp()
    if batches is not None and batches != log.config.epoch(log.examples or 1).micro_batches:
        expected = log.config.epoch(log.examples or 1).micro_batches
        log.remarks.append(
            f"an epoch has {batches} batches per rank, and {log.examples} images fill {expected}: it has sizes in "
            "buckets, or regularisation images. All steps are counted as full: images/s is an upper bound"
        )
        log.examples = None
    _follow(log, one.bar, name)
    if near := [seconds for seconds in one.elapsed if abs(seconds - (log.trained_seconds or 0)) < 3]:
        log.trained_seconds = statistics.median(near)  # the bar has whole seconds
    return log


def _follow(log: Log, bar: list[State], name: str) -> None:
    """Fill in the records of the steps, from what the bar showed; unknown values are NaN. The bar of kohya's scripts
    shows means from its start, of the rate and (nearly) of the loss: no single step's value is behind them."""
    first = bar[0].step if bar[0].is_first else 0
    last, alternate = max(state.step for state in bar), _alternate(bar)
    if last == first:
        raise RunError(f"{name}: its run has not completed a step")
    records = empty_records(range(first + 1, last + 1), log.config, log.examples)
    is_mean = log.form == KOHYA
    log.seconds_shown = {} if is_mean else progress_bar.seconds_shown(bar, first)
    if alternate:  # the bar of one machine may have closed before another reached the last step
        log.seconds_shown.pop(bar[0].total, None)
    reached = progress_bar.times_reached(bar)
    sizes = {step: record["micro_batches"] for step, record in records.items()}
    for step, elapsed in reached.items():
        if step in records:
            records[step]["elapsed"] = elapsed
    seconds = progress_bar.seconds_per_step(log.seconds_shown, first)
    if is_mean:
        log.remarks.append("its bar shows means: the times come from the bar's clock, and the losses are unknown")
    elif not progress_bar.is_of_single_steps(log.seconds_shown, seconds, reached, sizes):
        log.remarks.append("the bar's average is not of single steps: the times come from its clock")
        seconds, log.shows_single_steps = {}, False
    for step, value in seconds.items():
        records[step]["seconds"] = value
    if alternate:
        log.remarks.append("bars of several machines alternate: it is unknown which loss is whose")
    elif not is_mean:
        for step, (loss, step_loss, lr) in progress_bar.losses(bar, sizes).items():
            records[step].update(loss=loss, step_loss=step_loss, lr=lr)
    if first:
        log.remarks.append(f"resumed: this log begins after step {first}")
    if last < bar[-1].total:
        log.remarks.append(f"incomplete: this log ends at step {last} of {bar[-1].total}")
    shown = {state.step for state in bar}
    log.not_shown = list(islice((step for step in records if step not in shown), _MOST_NAMED))
    log.records = list(records.values())
    log.trained_seconds = float(reached.get(last, next(state.elapsed for state in bar if state.step == last)))
    log.total_seconds = float(max(state.elapsed for state in bar))


def _alternate(bar: list[State]) -> bool:
    """Whether several machines printed their bars into one log."""
    return any(now.step < before.step or now.elapsed < before.elapsed for before, now in pairwise(bar))
