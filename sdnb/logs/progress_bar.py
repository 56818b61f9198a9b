"""tqdm's progress bar in a console log: its states, and the time of each step behind its moving average."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from sdnb.metrics.throughput import SMOOTHING

# `Steps:  99%|█████████▉| 100/101 [03:22<00:01,  1.79s/it, lr=1e-5, step_loss=0.09]`. The bar itself may be missing, or
# hold what another rank printed; the end may be cut off.
_STATE = re.compile(
    r"(?<!validation )\bsteps:(?:(?!\bsteps:).){0,400}?(?<![\d.])(?P<step>\d{1,18})/(?P<total>\d{1,18}) *"
    r"\[(?P<elapsed>\d{1,6}(?::\d\d){1,2})<(?:\?|[\d:]*), *"
    r"(?:(?P<rate>\d{1,9}(?:\.\d{1,9})?)(?P<unit>s/it|it/s)|\?it/s)(?P<postfix>[^\]]{0,400})",
    re.IGNORECASE,
)

_FASTEST = 0.12  # seconds


@dataclass(frozen=True)
class State:
    """What the bar showed at one moment."""

    step: int  # optimizer steps done
    total: int
    elapsed: int  # seconds since the bar began, rounded down
    seconds: float  # per step, a moving average; NaN if the bar did not know it yet
    postfix: dict[str, str]  # what stands behind it, such as the loss

    @property
    def is_first(self) -> bool:
        """Whether the bar had just begun."""
        return self.elapsed == 0 and math.isnan(self.seconds) and not self.postfix

    def number(self, name: str) -> float:
        """A number of the postfix; NaN if it is not there."""
        try:
            return float(self.postfix.get(name, "nan"))
        except ValueError:
            return math.nan


def states(line: str) -> Iterator[State]:
    """The states of the bar in a line. One that counts beyond its end is none."""
    for match in _STATE.finditer(line):
        seconds = float(match["rate"] or "nan") or math.nan
        if match["unit"] == "it/s":
            seconds = 1 / seconds
        elapsed = sum(int(part) * 60**place for place, part in enumerate(reversed(match["elapsed"].split(":"))))
        postfix = dict(re.findall(r"([\w ]+?)=([^,\s]+)", match["postfix"]))
        step, total = int(match["step"]), int(match["total"])
        if step <= total:
            yield State(step, total, elapsed, seconds, {name.strip(): text for name, text in postfix.items()})


def begins_anew(first: State, furthest: State, state: State) -> bool:
    """Whether a state belongs to another run than those before it, of which these are the first and the furthest. The
    bars of several machines may alternate, each some seconds or a step behind the others."""
    if state.is_first:
        return state.total != first.total or furthest.step > first.step or state.step != first.step
    return state.total == first.total and state.step < furthest.step - 1 and state.elapsed < furthest.elapsed / 2


def seconds_shown(bar: Sequence[State], first: int) -> dict[int, float]:
    """The moving average after each step that follows step `first`, where the bar began. When the bar closes, it shows
    the plain mean: of the last step, only what it showed on reaching it counts."""
    shown: dict[int, float] = {}
    for before, state in pairwise([*bar[:1], *bar]):
        closing = state.step == state.total and (before.step != state.total - 1 or state is bar[-1])
        if not closing and not math.isnan(state.seconds) and state.step > first:
            shown.setdefault(state.step, state.seconds)
    return shown


def times_reached(bar: Sequence[State]) -> dict[int, int]:
    """When each step ended, in seconds since the bar began, for the steps at whose end the bar was seen to move on."""
    reached, before = {}, bar[0]
    if before.is_first:
        reached[before.step] = 0
    for state in bar:
        if state.step == before.step + 1:
            reached.setdefault(state.step, state.elapsed)
        before = state
    return reached


def seconds_per_step(shown: dict[int, float], first: int) -> dict[int, float]:
    """The seconds of each step, from what the bar showed after it and after the step before. `first`: the step at which
    the bar began.
    tqdm's average of the seconds x of n steps is v(n) = L(n) / (1 - b^n), L(n) = a x(n) + b L(n-1), a = 0.3, b = 1 - a.
    Shown to 0.005 s, it gives x to 0.03 s. A time that is not positive is none."""
    decay = 1 - SMOOTHING
    averages = {step: value * (1 - decay ** (step - first)) for step, value in shown.items()} | {first: 0.0}
    known = [step for step in averages if step - 1 in averages]
    seconds = {step: (averages[step] - decay * averages[step - 1]) / SMOOTHING for step in known}
    return {step: value for step, value in seconds.items() if value > 0}


def is_of_single_steps(
    shown: dict[int, float], seconds: dict[int, float], reached: dict[int, int], micro_batches: dict[int, int]
) -> bool:
    """Whether the bar's average was of single steps. tqdm takes it at most ten times a second, so it is not if the
    shortest step takes less; nor if the times of the steps do not add up to the time on the bar's clock."""
    mean = sum(micro_batches.values()) / len(micro_batches)
    shortest = min(shown.values(), default=1) * min(micro_batches.values()) / mean
    tenth = sorted(seconds.values())[len(seconds) // 10] if seconds else shortest  # the few fastest are rounding errors
    if min(shortest, tenth) < _FASTEST:
        return False
    begin = end = min(reached, default=0)
    while end + 1 in seconds and end + 1 in reached:
        end += 1
    clock = reached.get(end, 0) - reached.get(begin, 0)
    return abs(sum(seconds[step] for step in range(begin + 1, end + 1)) - clock) <= 2 + 0.05 * clock


def losses(bar: Sequence[State], micro_batches: dict[int, int]) -> dict[int, tuple[float, float, float]]:
    """For each step, the mean of its micro-batches' losses on the rank that the bar belongs to, the last of them, and
    the learning rate. The bar shows each micro-batch's loss. At the last one of a step it first moves on with the loss
    before, then shows the last one's; if it is fast, tqdm skips the first of these. A step is left out if the log does
    not have all its states."""
    groups = [(step, [state for state in states if not math.isnan(state.number("step_loss"))])
              for step, states in groupby(bar, key=lambda state: state.step)]  # fmt: skip
    lasts = [math.nan, *(states[-1].number("step_loss") if states else math.nan for _, states in groups)]
    moves_on = [len(states) > 1 and states[0].number("step_loss") == last for (_, states), last in zip(groups, lasts)]
    is_usual = sum(moves_on) > 0.1 * len(groups)
    found: dict[int, tuple[float, float, float]] = {}
    own, at, is_first = list[float](), bar[0].step, True
    for number, (step, states) in enumerate(groups):
        values = [state.number("step_loss") for state in states[moves_on[number] and is_usual :]]
        if step == at + 1 and values:
            loss, count = values.pop(0), micro_batches[step]
            own.append(loss)
            # After a gap, the first may still belong to the step before.
            has_own = count <= len(own) <= count + is_first
            follows = number + 1 < len(groups) and groups[number + 1][0] == step + 1
            has_next = not follows or len(values) == micro_batches[step + 1] - 1
            if has_own and has_next and (moves_on[number] or not is_usual or at == bar[0].step):
                found[step] = (sum(own[-count:]) / count, loss, states[-1].number("lr"))
            own, is_first = [], False
        elif step > at:  # some of the log is missing
            own, is_first = [], True
        own += values
        at = step
    if groups and groups[-1][1] and at == bar[0].total:  # the bar closes with the last loss
        last = groups[-1][1][-1]
        found.setdefault(at, (math.nan, last.number("step_loss"), last.number("lr")))
    return found
