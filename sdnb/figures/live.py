"""What a notebook shows during a run: one progress line, and below it the loss and the step times so far. The SVG is
written by hand and has some kilobytes: a plotting library would take CPU time from the training."""

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
    step, loss = last["step"], "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    seconds = sum(record["seconds"] for record in recent)
    pace = sum(record["images"] for record in recent) / seconds
    left = _clock((total - step) * seconds / len(recent))
    bar = "█" * (20 * step // total)
    memory = f" · peak {last['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in last else ""
    return f"{bar:░<20} step {step}/{total} · {left} left · loss {loss} · {pace:.1f} images/s{memory}"


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
    rows = range(0, len(records), max(1, len(records) // _MOST_POINTS))  # a long run has too many
    steps, losses, seconds, images = (
        [records[row][name] for row in rows] for name in ("step", "loss", "seconds", "images")
    )
    means = [_running_loss(records[max(0, row + 1 - RUNNING_MEAN_STEPS) : row + 1]) for row in rows]
    full = max(images)
    colours = [ORANGE if number < full else BLUE for number in images]
    end = _end_of_axis(records[-1]["step"], total)
    curves = [("stroke-opacity='0.35' stroke-width='1'", losses), ("stroke-opacity='1' stroke-width='2'", means)]
    loss = _panel("loss, and its running mean", steps, losses, end, curves)
    return loss + _panel("seconds a step", steps, seconds, end, colours=colours)


def _running_loss(records: Sequence[dict[str, Any]]) -> float | None:
    """As `metrics.steps.mark` computes it."""
    if any(record["loss"] is None for record in records):
        return None
    return sum(record["loss"] * record["images"] for record in records) / sum(record["images"] for record in records)


def _end_of_axis(step: int, total: int) -> int:
    """The last step of the axis: a little further than the run, so that the curve stays visible."""
    end = 25
    while end < step:
        end *= 2
    return min(end, total)


def _panel(
    title: str, steps: Sequence[int], values: Sequence[float | None], end: int,
    curves: Sequence[tuple[str, Sequence[float | None]]] = (), colours: Sequence[str] = (),
) -> str:  # fmt: skip
    """Curves over the steps, each with its style, or one coloured point per value; from 0 to the largest value. A curve
    has a gap where its value is None."""
    top = max((value for value in values if value is not None), default=1) or 1
    across = [f"{_LEFT + (_WIDE - _LEFT) * step / end:.1f}" for step in steps]

    def height(value: float) -> str:
        return f"{_TOP + _HIGH * (1 - value / top):.1f}"

    drawn = ""
    for style, curve in curves:
        parts: list[list[str]] = [[]]
        for x, value in zip(across, curve):
            if value is None:
                parts.append([])
            else:
                parts[-1].append(f"{x},{height(value)}")
        for part in filter(None, parts):
            drawn += f"<polyline points='{' '.join(part)}' fill='none' stroke='{BLUE}' {style}/>"
    for x, value, colour in zip(across, values, colours):
        drawn += f"<circle cx='{x}' cy='{height(value)}' r='1.8' fill='{colour}'/>"
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
