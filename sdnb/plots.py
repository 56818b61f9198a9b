"""Figures of a run. They draw what `metrics` has computed.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .metrics import RUNNING_MEAN_STEPS, Measurements, time_by_phase
from .runs import SAMPLES, Run

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
PHASE_COLOURS = {
    "data": "#CC79A7", "encode": ORANGE, "forward": "#56B4E9", "backward": BLUE,
    "optimizer": GREEN, "ema": "#F0E442", "other": GREY,
}  # fmt: skip
WIDTH = 9.0
MOST_ROWS = 6


def _figure(title: str, caption: str, height: float) -> tuple[Figure, Axes]:
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained", dpi=110)
    plt.close(figure)  # the notebook shows what is returned, and that once
    _title(figure, title, caption)
    return figure, axes


def _title(figure: Figure, title: str, caption: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", parse_math=False)
    figure.supxlabel(textwrap.fill(caption, 118), x=0.01, ha="left", fontsize=9, color="#444444", parse_math=False)


def loss(measured: Measurements) -> Figure:
    """The loss of each step, its running mean, the held-out loss, and the target."""
    steps, validation = measured.steps, measured.validation
    last = steps.iloc[-1]
    caption = f"The running mean ends at {last.running_loss:.4f} (step 1: {steps.loss.iloc[0]:.4f})"
    if len(validation):
        caption += f"; the held-out loss goes from {validation.loss.iloc[0]:.4f} to {validation.loss.iloc[-1]:.4f}"
    figure, axes = _figure("Loss of each optimizer step", caption + ".", 4.0)
    axes.plot(steps.step, steps.loss, color=BLUE, alpha=0.35, lw=1, label="each step")
    axes.plot(steps.step, steps.running_loss, color=BLUE, lw=2, label=f"mean of {RUNNING_MEAN_STEPS} steps")
    if len(validation):
        axes.plot(validation.step, validation.loss, color=RED, marker="o", ms=4, lw=1.2, label="held-out pictures")
    if measured.config.target_loss is not None:
        axes.axhline(measured.config.target_loss, color=GREY, ls="--", label=f"target {measured.config.target_loss:g}")
    axes.set(xlabel="optimizer step", ylabel="mean squared error", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def step_times(measured: Measurements) -> Figure:
    """The wall time of each step, the short steps and the warm-up marked."""
    steps = measured.steps
    full, short = steps[~steps.short], steps[steps.short]
    steady = full[full.steady]
    warmup = int((~steps.steady).sum())
    median = (
        f"{steady.seconds.median():.3f} s is the median of the full steps after the warm-up; " if len(steady) else ""
    )
    caption = f"{median}{len(short)} of {len(steps)} steps are short; {warmup} are left out as warm-up."
    figure, axes = _figure("Wall time of each optimizer step", caption, 3.6)
    axes.plot(full.step, full.seconds, "o", color=BLUE, ms=4, label="full step")
    axes.plot(short.step, short.seconds, "D", color=ORANGE, ms=6, label="short step")
    if warmup:
        axes.axvspan(0.5, warmup + 0.5, color=GREY, alpha=0.2, lw=0, label="warm-up, left out")
    if len(steady):
        axes.axhline(steady.seconds.median(), color=BLUE, lw=1, alpha=0.6, label="median")
    axes.set(xlabel="optimizer step", ylabel="seconds", ylim=(0, None), xlim=(0.5, len(steps) + 0.5))
    axes.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def where_time_goes(measured: Measurements) -> Figure:
    """The mean time of a step by phase."""
    phases = time_by_phase(measured.steps)
    share = 100 * phases / phases.sum()
    caption = f"Of {phases.sum():.3f} s a step, {share.max():.0f} % go to {share.idxmax()}. Mean of the steady steps."
    figure, axes = _figure("Where the time of a step goes", caption, 2.9)
    axes.barh(phases.index, phases, color=[PHASE_COLOURS[phase] for phase in phases.index])
    for row, (seconds, percent) in enumerate(zip(phases, share)):
        axes.text(seconds, row, f" {seconds:.3f} s, {percent:.1f} %", va="center")
    axes.set(xlabel="seconds per optimizer step", xlim=(0, phases.max() * 1.25))
    axes.invert_yaxis()
    return figure


def samples(run: Run) -> Figure | None:
    """Pictures of the same prompts and seeds, a row for each step at which they were drawn; None without any."""
    drawn = run.samples
    if drawn.empty:
        return None
    prompts, times = list(dict.fromkeys(drawn.prompt)), _spread(sorted(drawn.step.unique()), MOST_ROWS)
    pictures = {(row.step, row.prompt): Image.open(run.folder / SAMPLES / row.file) for row in drawn.itertuples()}
    first = drawn.iloc[0]
    how = f"Seed {first.seed}, {first.num_inference_steps} steps, guidance {first.guidance_scale:g}."
    if run.model.get("random_weights"):
        how += " The model started from random weights: its pictures do not show anything yet."
    labels = ["before" if step == 0 else f"after step {step}" for step in times]
    return _grid(
        [[pictures.get((step, prompt)) for prompt in prompts] for step in times],
        "Pictures drawn from the same noise as the training went on", how, columns=prompts, rows=labels,
    )  # fmt: skip


def pictures(images: Sequence[Image.Image], captions: Sequence[str], total: int) -> Figure:
    """Some training pictures with their captions."""
    return _grid([list(images)], "What it trains on", f"{len(images)} of {total} pictures.", columns=captions)


def _spread(values: list[int], most: int) -> list[int]:
    """So many of the values at most, from all over, the first and the last among them."""
    return [values[round(index)] for index in np.linspace(0, len(values) - 1, min(most, len(values)))]


def _grid(
    images: list[list[Image.Image | None]],
    title: str,
    caption: str,
    columns: Sequence[str],
    rows: Sequence[str] = ("",),
) -> Figure:
    across, down = len(columns), len(rows)
    side = min(2.2, WIDTH / across)
    figure, grid = plt.subplots(
        down,
        across,
        figsize=(max(side * across, 5), (side + 0.25) * down + 0.5),
        layout="constrained",
        dpi=110,
        squeeze=False,
    )
    plt.close(figure)
    _title(figure, title, caption)
    for axes_row, images_row, label in zip(grid, images, rows):
        axes_row[0].set_ylabel(label)
        for axes, image in zip(axes_row, images_row):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if image is not None:
                axes.imshow(image, interpolation="nearest")
    for axes, text in zip(grid[0], columns):
        shown = textwrap.fill(textwrap.shorten(text, 48, placeholder=" …"), round(10 * side))
        axes.set_title(shown, fontsize=9, parse_math=False)
    return figure
