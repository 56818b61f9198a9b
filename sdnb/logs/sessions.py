"""Logs with a line for each optimizer step and the time when it was logged: their runs, and the time of each step."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sdnb.errors import RunError
from sdnb.logs.facts import checked, chosen, require
from sdnb.run.log import Log, empty_records

_LONGEST_STEP = 6 * 3600  # seconds
_PAUSE_SECONDS = 600  # a longer one that is also many times a usual step is a gap between sessions


@dataclass(frozen=True)
class Logged:
    """What was logged after a step: when, as Unix time, and the mean loss as the script computed it."""

    time: float
    loss: float


Session = dict[int, Logged]  # what one start of a script logged, by step


def split(lines: Iterable[tuple[int, Logged]]) -> list[Session]:
    """The sessions in a file to which each start of a script has appended."""
    sessions: list[Session] = []
    last = None
    for step, logged in lines:
        if last is None or step <= last:
            sessions.append({})
        sessions[-1][step] = logged
        last = step
    return [part for session in sessions for part in _split_at_gaps(session)]


def _split_at_gaps(session: Session) -> list[Session]:
    passed = [later.time - before.time for before, later in pairwise(session.values())]
    longest = max(_PAUSE_SECONDS, 20 * statistics.median(passed)) if passed else math.inf
    parts: list[Session] = [{}]
    for (step, logged), gap in zip(session.items(), [0.0, *passed]):
        if gap > longest:
            parts.append({})
        parts[-1][step] = logged
    return parts


def read(name: str, form: str, sessions: Sequence[Session], settings: Sequence[dict[str, Any]], run: int | None) -> Log:
    """The log of the run that is asked for, see `chosen`. A session that does not begin at step 1 resumes the run
    before it. `settings`: what is known of each session's run. Raises RunError if a needed fact is missing, or a count
    is absurd."""
    runs: list[list[int]] = []
    for number, session in enumerate(sessions):
        checked(name, step=max(session))
        resumed = runs and 1 < min(session) <= max(sessions[runs[-1][-1]]) + 1
        runs[-1].append(number) if resumed else runs.append([number])
    known = [dict(settings[numbers[0]]) for numbers in runs]
    lengths = [max(max(sessions[number]) for number in numbers) for numbers in runs]
    planned = [facts.get("max_train_steps") for facts in known]
    complete = [not isinstance(steps, int) or length >= steps for length, steps in zip(lengths, planned)]
    which = chosen(runs, run, complete, name)
    given = known[which]
    require(name, given, "examples", "num_processes", "train_batch_size", "gradient_accumulation_steps")
    if complete[which]:
        given["max_train_steps"] = lengths[which]
    checked(name, examples=given["examples"], max_train_steps=given["max_train_steps"])
    log = Log(form, given, given.pop("examples"), run=which + 1, runs=len(runs))
    if not complete[which]:
        log.remarks.append(f"incomplete: it ends at step {lengths[which]} of {given['max_train_steps']}")
    own = [sessions[number] for number in runs[which]]
    if len(own) > 1:
        log.remarks.append(f"it has {len(own)} sessions; the time between them is no step's")
        log.header["steps_logged_again"] = sum(max(before) - min(later) + 1 for before, later in pairwise(own))
    _follow(log, own)
    return log


def _follow(log: Log, sessions: Sequence[Session]) -> None:
    """Fill in the records. The time of a step is that since the one before, in the same session. If only each n-th
    step was logged, it is the mean of those between."""
    strides = [step - before for session in sessions for before, step in pairwise(sorted(session))]
    stride = statistics.mode(strides) if strides else 1
    if stride > 1:
        log.remarks.append(f"it logged each {stride}th step: the time of a step is the mean of {stride}")
    logged, seconds = Session(), dict[int, float]()
    for session in sessions:
        begin = min(session)
        logged = {step: one for step, one in logged.items() if step < begin} | session
        seconds = {step: one for step, one in seconds.items() if step < begin}
        for before, step in pairwise(sorted(session)):
            passed = session[step].time - session[before].time
            if step <= before + stride and passed > 0:
                seconds |= dict.fromkeys(range(before + 1, step + 1), passed / (step - before))
    if seconds and statistics.median(seconds.values()) > _LONGEST_STEP:
        raise RunError(f"a step takes {statistics.median(seconds.values()):.3g} s: the times are not in seconds")
    full = log.config.gradient_accumulation_steps
    between = range(min(logged), max(logged) + 1) if stride > 1 else sorted(logged)
    records = empty_records(between, log.config, log.examples)
    for step, record in records.items():
        record["seconds"] = seconds.get(step, math.nan)
        if step in logged:
            # the reference divides by a full step's number
            record["loss"] = logged[step].loss * (full / record["micro_batches"])
            record["train_loss"] = logged[step].loss
    log.records = list(records.values())
    log.began = logged[min(logged)].time
