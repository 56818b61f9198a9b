"""What a notebook shows during a run: one progress line, and below it the loss and the step times so far.

The SVG is written by hand and has some kilobytes: a plotting library would take CPU time from the training.
"""

import html
import time
from collections.abc import Sequence
from typing import Any

from sdnb.figures.chart import BLUE, ORANGE
from sdnb.metrics.steps import RUNNING_MEAN_STEPS

RECENT_STEPS = 20  # that the pace is computed from
SECONDS_BETWEEN = 1.0
_MOST_POINTS = 300
_WIDE, _HIGH, _LEFT, _TOP = 400, 130, 46, 18


def progress(records: Sequence[dict[str, Any]], total: int) -> str:
    """The progress of a run in one line: step, time left, loss, images/s and memory, from the records of its steps."""
    if not records:
        return f"step 0/{total} · starting"
    recent, last = records[-RECENT_STEPS:], records[-1]
    step, loss = last["step"], last["loss"]
    seconds = sum(record["seconds"] for record in recent)
    pace = sum(record["images"] for record in recent) / seconds
    left = _clock((total - step) * seconds / len(recent))
    bar = "█" * (20 * step // total)
    memory = f" · peak {last['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in last else ""
    return (
        f"{bar:░<20} step {step}/{total} · {left} left · "
        f"loss {'not finite' if loss is None else f'{loss:.4f}'} · {pace:.1f} images/s{memory}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Live:
    """Shows a run under its cell, about once a second. Each state replaces the one before, so the saved notebook has
    one output. It includes the latest log lines; at the end, the warnings. A plain script prints the line only."""

    def __init__(self, total_steps: int) -> None:
        from IPython import get_ipython
        from IPython.display import display

        self.total_steps = total_steps
        self.handle = display({"text/plain": "starting"}, raw=True, display_id=True) if get_ipython() else None
        self.shown: Any = None
        self.shown_at = 0.0

    def __call__(self, line: str, log: str, records: Sequence[dict[str, Any]], ended: bool = False) -> None:
        state = line, log, ended
        if state == self.shown or (not ended and time.monotonic() < self.shown_at + SECONDS_BETWEEN):
            return
        # The next cells have better figures of a complete run.
        complete = ended and records and records[-1]["step"] == self.total_steps
        figure = "" if complete else figures(records, self.total_steps)
        below = f"<pre style='font-size:smaller'>{html.escape(log)}</pre>" if log else ""
        content = {"text/plain": line, "text/html": f"<div>{html.escape(line)}</div>{figure}{below}"}
        if self.handle:
            self.handle.update(content, raw=True)
        else:
            print(f"\r{line:<100}", end="\n" if ended else "", flush=True)
        self.shown, self.shown_at = state, time.monotonic()


def figures(records: Sequence[dict[str, Any]], total: int) -> str:
    """The loss and the time of each step, as two SVG elements; empty before the second step."""
    if len(records) < 2:
        return ""
    shown = range(0, len(records), max(1, len(records) // _MOST_POINTS))  # a long run has too many
    steps = [records[row]["step"] for row in shown]
    losses = [records[row]["loss"] for row in shown]
    means = [_running_loss(records[max(0, row + 1 - RUNNING_MEAN_STEPS) : row + 1]) for row in shown]
    full = max(records[row]["images"] for row in shown)
    end = _end_of_axis(records[-1]["step"], total)
    colours = [ORANGE if records[row]["images"] < full else BLUE for row in shown]
    curves = [(losses, _line(BLUE, 0.35, 1)), (means, _line(BLUE, 1, 2))]
    return _panel("loss, and its running mean", steps, losses, end, curves) + _panel(
        "seconds a step", steps, [records[row]["seconds"] for row in shown], end, colours=colours
    )


def _running_loss(records: Sequence[dict[str, Any]]) -> float | None:
    """As `metrics.steps.mark` computes it."""
    if any(record["loss"] is None for record in records):
        return None
    return sum(record["loss"] * record["images"] for record in records) / sum(record["images"] for record in records)


def _line(colour: str, opacity: float, width: float) -> str:
    return f"fill='none' stroke='{colour}' stroke-opacity='{opacity}' stroke-width='{width}'"


def _end_of_axis(step: int, total: int) -> int:
    """The last step of the axis: a little further than the run, so that the curve stays visible."""
    end = 25
    while end < step:
        end *= 2
    return min(end, total)


def _panel(
    title: str,
    steps: Sequence[int],
    values: Sequence[float | None],
    end: int,
    lines: Sequence[tuple[Sequence[float | None], str]] = (),
    colours: Sequence[str] = (),
) -> str:
    """Lines over the steps, each with its style, or one coloured point per value; from 0 to the largest value."""
    top = max((value for value in values if value is not None), default=1) or 1

    def place(step: int, value: float | None) -> tuple[float, float] | None:
        return value if value is None else (_LEFT + (_WIDE - _LEFT) * step / end, _TOP + _HIGH * (1 - value / top))

    drawn = ""
    for series, style in lines:
        for part in _unbroken([place(*one) for one in zip(steps, series)]):
            drawn += f"<polyline points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in part)}' {style}/>"
    for step, value, colour in zip(steps, values, colours):
        x, y = place(step, value)
        drawn += f"<circle cx='{x:.1f}' cy='{y:.1f}' r='1.8' fill='{colour}'/>"
    return (
        f"<svg role='img' aria-label='{title}' width='{_WIDE}' height='{_TOP + _HIGH + 18}' font-size='11' "
        "style='color:var(--jp-ui-font-color1,currentColor);max-width:100%'>"
        f"<g fill='currentColor'><text x='{_LEFT}' y='11'>{title}</text>"
        f"<text x='{_LEFT - 4}' y='{_TOP + 8}' text-anchor='end'>{top:.3g}</text>"
        f"<text x='{_LEFT - 4}' y='{_TOP + _HIGH}' text-anchor='end'>0</text>"
        f"<text x='{_WIDE}' y='{_TOP + _HIGH + 14}' text-anchor='end'>step {end}</text></g>"
        f"<path d='M{_LEFT} {_TOP}V{_TOP + _HIGH}H{_WIDE}' fill='none' stroke='currentColor' stroke-opacity='.5'/>"
        f"{drawn}</svg>"
    )


def _unbroken(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """The lines between gaps."""
    parts: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            parts.append([])
        else:
            parts[-1].append(point)
    return [part for part in parts if part]
