"""Figures of a run. They draw what `metrics` has computed.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .compare import Comparison
from .metrics import RUNNING_MEAN_STEPS, Measurements, time_by_phase
from .runs import SAMPLES, Run

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
PHASE_COLOURS = {
    "data": "#CC79A7", "encode": ORANGE, "forward": "#56B4E9", "backward": BLUE,
    "optimizer": GREEN, "ema": "#F0E442", "other": GREY,
}  # fmt: skip
RUN_COLOURS = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000", GREY)
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


def throughputs_of(comparison: Comparison) -> Figure:
    """Images/s per device of each run, with its confidence interval."""
    estimates = {label: measured.throughput for label, measured in comparison.measured.items()}
    best = max(estimates, key=lambda label: estimates[label].value)
    first = next(iter(estimates.values()))
    caption = f"{best} trains the most, {estimates[best]}. Lines: 95 % confidence within the run, where it is known."
    figure, axes = _figure("Images per second and device", caption, 1.4 + 0.45 * len(estimates))
    for row, (colour, estimate) in enumerate(zip(_colours(comparison), estimates.values())):
        axes.barh(row, estimate.value, color=colour, alpha=0.6)
        axes.plot([estimate.low, estimate.high], [row, row], color="black", lw=1.5)
        end = max(estimate.value, estimate.high if np.isfinite(estimate.high) else 0)
        axes.text(end, row, f"  {estimate.value:.2f}, ×{estimate.value / first.value:.2f}", va="center")
    axes.set(xlabel="images/s", xlim=(0, axes.get_xlim()[1] * 1.2))
    axes.set_yticks(range(len(estimates)), estimates)
    axes.invert_yaxis()
    return figure


def swept(comparison: Comparison, settings: Sequence[str]) -> Figure:
    """Images/s, all devices together, and peak memory over the first of the settings, a line for each choice of the
    others; the best is marked. Where ranks were swept, the caption has their scaling efficiency."""
    setting, *others = settings
    points: dict[str, list[tuple[Any, Measurements]]] = {}
    for measured in comparison.measured.values():
        rest = ", ".join(f"{name} = {getattr(measured.config, name)}" for name in others)
        points.setdefault(rest, []).append((getattr(measured.config, setting), measured))
    best = max(comparison.measured.values(), key=_all_devices)
    chosen = ", ".join(f"{name} = {getattr(best.config, name)}" for name in settings)
    caption = f"The most is {_all_devices(best):.2f} images/s with {chosen}."
    if setting == "num_processes":
        for rest, line in points.items():
            few, many = (pick(line, key=lambda point: point[0]) for pick in (min, max))
            efficiency = _all_devices(many[1]) / many[0] / (_all_devices(few[1]) / few[0])
            caption += f" From {few[0]} to {many[0]} ranks it scales with {efficiency:.0%} {rest}."
    figure, (upper, lower) = plt.subplots(1, 2, figsize=(WIDTH, 3.8), layout="constrained", dpi=110)
    plt.close(figure)
    _title(figure, f"Over {setting}", caption)
    values = list(dict.fromkeys(value for line in points.values() for value, _ in line))
    for colour, (rest, line) in zip(RUN_COLOURS, points.items()):
        across = [values.index(value) for value, _ in line]
        upper.plot(across, [_all_devices(measured) for _, measured in line], "o-", color=colour, label=rest or None)
        lower.plot(across, [_peak_gib(measured) for _, measured in line], "o-", color=colour)
    upper.plot(
        values.index(getattr(best.config, setting)), _all_devices(best), "*", color="black", ms=13, label="the most"
    )
    for axes, label in ((upper, "images/s, all devices"), (lower, "peak memory of a rank, GiB")):
        axes.set(xlabel=setting, ylabel=label, ylim=(0, None))
        axes.set_xticks(range(len(values)), map(str, values))
        axes.spines[["top", "right"]].set_visible(False)
    upper.legend(frameon=False, fontsize=9)
    return figure


def _all_devices(measured: Measurements) -> float:
    return measured.throughput.value * measured.config.num_processes


def _peak_gib(measured: Measurements) -> float:
    return next((row.value for row in measured.results if row.name == "peak memory" and row.value), float("nan"))


def losses_of(comparison: Comparison) -> Figure:
    """The running means of the loss, and single losses where a log has no more, over the optimizer steps."""
    ends = {label: measured.steps.running_loss.iloc[-1] for label, measured in comparison.measured.items()}
    said = ", ".join(f"{label} {end:.4f}" for label, end in ends.items() if np.isfinite(end))
    caption = f"Running means of {RUNNING_MEAN_STEPS} steps end at: {said or 'not known'}."
    figure, axes = _figure("Loss", caption, 4.0)
    for colour, (label, measured) in zip(_colours(comparison), comparison.measured.items()):
        steps = measured.steps
        sparse = steps.loss.isna().mean() > 0.5  # a log with gaps
        axes.plot(
            steps.step, steps.loss, "o" if sparse else "-", color=colour, alpha=0.8 if sparse else 0.25, lw=0.8, ms=3
        )
        axes.plot(steps.step, steps.running_loss, color=colour, lw=2, label=label)
    axes.set(xlabel="optimizer step", ylabel="mean squared error", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def step_times_of(comparison: Comparison) -> Figure:
    """The wall time of each step; short steps as diamonds."""
    full = {
        label: measured.steps[measured.steps.steady & ~measured.steps.short].seconds.dropna()
        for label, measured in comparison.measured.items()
    }
    said = ", ".join(f"{label} {seconds.median():.3f} s" for label, seconds in full.items() if len(seconds) > 2)
    caption = f"Medians of the full steps after the warm-up: {said or 'not known'}. Diamonds are short steps."
    figure, axes = _figure("Wall time of each optimizer step", caption, 3.6)
    for colour, (label, measured) in zip(_colours(comparison), comparison.measured.items()):
        for steps, marker in (
            (measured.steps[~measured.steps.short], "o"),
            (measured.steps[measured.steps.short], "D"),
        ):
            axes.plot(steps.step, steps.seconds, marker, color=colour, ms=3, label=label if marker == "o" else None)
    axes.set(xlabel="optimizer step", ylabel="seconds", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def samples_of(comparison: Comparison) -> Figure | None:
    """What each run drew last, of the prompts that all of them drew; None if there are none."""
    drawn = {label: run.samples for label, run in comparison.runs.items() if not run.samples.empty}
    if not drawn:
        return None
    last = {label: samples[samples.step == samples.step.max()] for label, samples in drawn.items()}
    prompts = [prompt for prompt in next(iter(last.values())).prompt
               if all(prompt in set(samples.prompt) for samples in last.values())]  # fmt: skip
    if not prompts:
        return None
    rows = []
    for label, samples in last.items():
        files = dict(zip(samples.prompt, samples.file))
        rows.append([Image.open(comparison.runs[label].folder / SAMPLES / files[prompt]) for prompt in prompts])
    seeds = {int(seed) for samples in last.values() for seed in samples.seed}
    how = "From the same seed." if len(seeds) == 1 else f"From different seeds: {', '.join(map(str, sorted(seeds)))}."
    return _grid(rows, "What each run drew last", how, columns=prompts, rows=list(last))


def _colours(comparison: Comparison) -> list[str]:
    return [RUN_COLOURS[row % len(RUN_COLOURS)] for row in range(len(comparison.runs))]


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
