"""What is shown during a run: in a notebook one progress line, and below it the loss and the step times so far; on a
terminal, a progress bar. The SVG is written by hand and has some kilobytes: a plotting library would take CPU time from
the training."""

import html
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from sdnb.figures.colours import BLUE, ORANGE
from sdnb.metrics.recent import RECENT_STEPS, recent_rates, utilisation_of
from sdnb.metrics.steps import RUNNING_MEAN_STEPS
from sdnb.run.folder import RunFolder

SECONDS_BETWEEN = 1.0
LOG_LINES = 6
_MOST_POINTS = 300
_WIDE, _HIGH, _LEFT, _TOP = 400, 130, 46, 18


class Progress:
    """The progress of a run. `records`: of its steps so far, also those before a resume. `log`: the lines that the log
    has gained. `doing`: what it does before the first step and after the last one."""

    def __init__(self, run: RunFolder, total_steps: int, resumed_after: int = 0) -> None:
        self.run, self.total_steps, self.resumed_after = run, total_steps, resumed_after
        self.records: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.doing, self.ended = "starting: loading PyTorch", False
        self.began = time.monotonic()
        self._known: tuple[dict[str, float], float] | None = None

    @property
    def step(self) -> int:
        return self.records[-1]["step"] if self.records else self.resumed_after

    @property
    def recent(self) -> list[dict[str, Any]]:
        """The steps that the rates are computed from."""
        return [record for record in self.records[-RECENT_STEPS:] if record["step"] > self.resumed_after]

    @property
    def line(self) -> str:
        """In one line: step, time left, and the rates."""
        step, total, recent = self.step, self.total_steps, self.recent
        if not recent:  # the seconds show that it is alive
            return f"step {step}/{total} · {self.doing} · {time.monotonic() - self.began:.0f} s"
        left = clock((total - step) * sum(record["seconds"] for record in recent) / len(recent))
        rates = (f"{value} {name}" if name == "images/s" else f"{name} {value}" for name, value in self.rates())
        state = f"{left} left" if step < total and not self.ended else self.doing
        return " · ".join([f"{'█' * (20 * step // total):░<20} step {step}/{total}", state, *rates])

    def rates(self) -> Iterator[tuple[str, str]]:
        """As `recent_rates`, of the recent steps."""
        return recent_rates(self.recent, *self._model())

    def _model(self) -> tuple[dict[str, float], float]:
        if self._known is None:
            self._known = utilisation_of(self.run)
        return self._known


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, or an IPython terminal."""
    from IPython import get_ipython

    return get_ipython() is not None


class Live:
    """Shows a run under its cell, about once a second. Each state replaces the one before, so the saved notebook has
    one output. It includes the latest log lines; at the end, the warnings. A plain script prints the line only."""

    def __init__(self) -> None:
        from IPython.display import display

        self.handle = display({"text/plain": "starting"}, raw=True, display_id=True) if in_notebook() else None
        self.latest: deque[str] = deque(maxlen=LOG_LINES)
        self.warnings: list[str] = []
        self.shown: Any = None
        self.shown_at = 0.0

    def __call__(self, progress: Progress) -> None:
        self.latest.extend(progress.log)
        self.warnings += [logged for logged in progress.log if re.search(r" rank \d+ (WARNING|ERROR) ", logged)]
        lines = "\n".join(self.warnings if progress.ended else self.latest)
        state = progress.line, lines, progress.ended
        if state == self.shown or (not progress.ended and time.monotonic() < self.shown_at + SECONDS_BETWEEN):
            return
        # The next cells have better figures of a complete run.
        complete = progress.ended and progress.step == progress.total_steps
        figure = "" if complete else figures(progress.records, progress.total_steps)
        below = f"<pre style='font-size:smaller'>{html.escape(lines)}</pre>" if lines else ""
        content = {"text/plain": progress.line, "text/html": f"<div>{html.escape(progress.line)}</div>{figure}{below}"}
        if self.handle:
            self.handle.update(content, raw=True)
        else:
            print(f"\r{progress.line:<100}", end="\n" if progress.ended else "", flush=True)
        self.shown, self.shown_at = state, time.monotonic()


class Bar:
    """Shows a run on a terminal: the log, and below it the reference's progress bar with the rates."""

    def __init__(self, each_step: bool) -> None:
        """`each_step`: it is called after each step. Otherwise it sees several steps at once, and the bar's own pace
        would be wrong: it is not shown."""
        self.bar: tqdm | None = None
        self.format = None if each_step else "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

    def __call__(self, progress: Progress) -> None:
        for logged in progress.log:
            tqdm.write(logged)
        if progress.recent:
            if self.bar is None:
                first, total = progress.resumed_after, progress.total_steps
                self.bar = tqdm(desc="Steps", total=total, initial=first, dynamic_ncols=True, bar_format=self.format)
            step_loss = progress.records[-1]["step_loss"]
            self.bar.set_postfix({**dict(progress.rates()), "step_loss": step_loss}, refresh=False)
            self.bar.update(progress.step - self.bar.n)
        if progress.ended:
            self.close()
            if progress.step < progress.total_steps:
                tqdm.write(progress.line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


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
