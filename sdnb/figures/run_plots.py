"""Figures of a run. They draw what the room `metrics` computes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from PIL import Image

from sdnb.errors import RunError
from sdnb.figures.chart import Chart, dots, grid_of, legend, name_points
from sdnb.figures.colours import BLUE, GREY, INK, ORANGE, PHASE_COLOURS, RED
from sdnb.metrics.results import Measurements
from sdnb.metrics.steps import RUNNING_MEAN_STEPS, time_by_phase
from sdnb.run.folder import RunFolder

MOST_ROWS = 6
_MOST_NAMED = 5
_MOST_SEARCHED = 2000  # steps, for a place that covers none; with more, that takes long


def loss(measured: Measurements, what: str = "mean squared error") -> Chart:
    """The loss of each step in a faint colour, its running mean, the skipped steps, the held-out loss with its 95 %
    interval, and the target. `what` is the label of the loss axis. Raises RunError if no loss is known."""
    steps, validation, target = measured.steps, measured.validation, measured.config.target_loss
    if steps.loss.isna().all():
        raise RunError("no loss was recorded")
    with_gaps = steps.loss.isna().mean() > 0.5  # a log shows few of them
    caption = f"The running mean ends at {steps.running_loss.iloc[-1]:.4f} (step 1: {steps.loss.iloc[0]:.4f})"
    if with_gaps:
        known = steps[steps.loss.notna()]
        caption = f"The log has {len(known)} of {len(steps)} losses"
        caption += f"; that of step {known.step.iloc[-1]} is {known.loss.iloc[-1]:.4f}" if len(known) else ""
    if len(validation):
        caption += f"; the held-out loss goes from {validation.loss.iloc[0]:.4f} to {validation.loss.iloc[-1]:.4f}"
    chart = Chart("Loss of each optimizer step", caption + ".", 4.0)
    axes = chart.panel()
    if with_gaps:
        dots(axes, steps.step, steps.loss, "x", color=BLUE, ms=5, label="in the log")
    else:
        axes.plot(steps.step, steps.loss, color=BLUE, alpha=0.3, lw=1, label="each step")
        axes.plot(steps.step, steps.running_loss, color=BLUE, lw=2, label=f"mean of {RUNNING_MEAN_STEPS} steps")
    if steps.skipped.any():
        skipped = steps[steps.skipped]
        dots(axes, skipped.step, skipped.loss, "x", color=ORANGE, ms=5, label="skipped: gradients overflowed")
    if len(validation):
        label = f"{int(validation.images.iloc[-1])} held-out images, 95 % interval"
        held_out(axes, validation, fmt="o-", color=RED, lw=1.2, label=label)
    if target is not None:
        axes.axhline(target, color=GREY, ls="--", label=f"target {target:g}")
    axes.set(xlabel="optimizer step", ylabel=what, ylim=(0, None))
    legend(axes)
    return chart


def held_out(axes: Axes, validation: pd.DataFrame, **options: Any) -> None:
    """The losses on held-out images with their 95 % intervals."""
    margin = 1.96 * validation.standard_error.astype(float)
    axes.errorbar(validation.step, validation.loss, margin, ms=4, elinewidth=1, capsize=2, **options)


def step_times(measured: Measurements) -> Chart:
    """The wall time of each step. Short steps, the warm-up, and steps that encode new images are marked. The slowest of
    the others are named with the reason. Raises RunError if no time of a step after the warm-up is known."""
    steps, slow = measured.steps, measured.slow_steps
    full, short = steps[~steps.short], steps[steps.short]
    cached = (full.encoded_images < full.images).any()  # else every step encodes, and the mark means nothing
    encoding = full[(full.encoded_images > 0) & cached]
    plain = full[~full.step.isin(encoding.step)]
    if steps.seconds[steps.steady].isna().all():
        raise RunError("no time of a step after the warm-up was recorded")
    steady = full[full.steady & full.seconds.notna()]
    warmup, median, begin = int((~steps.steady).sum()), steady.seconds.median(), steps.step.iloc[0] - 0.5
    caption = f"{median:.3f} s is the median of the full steps after the warm-up; " if len(steady) > 1 else ""
    caption += f"{len(short)} of {len(steps)} steps are short; {warmup} are warm-up."
    if len(slow):
        caption += f" {len(slow)} took much longer than similar steps; the slowest are named."
    chart = Chart("Wall time of each optimizer step", caption, 3.8)
    axes = chart.panel()
    dots(axes, plain.step, plain.seconds, color=BLUE, ms=4, label="full step")
    if len(encoding):
        dots(axes, encoding.step, encoding.seconds, color=BLUE, ms=4, mfc="none", label="full step that encodes images")
    if len(short):
        dots(axes, short.step, short.seconds, "D", color=ORANGE, ms=5, label="short step")
    if warmup:
        axes.axvspan(begin, begin + warmup, color=GREY, alpha=0.2, lw=0, label="warm-up")
    if len(steady) > 1:
        axes.axhline(median, color=BLUE, lw=1, alpha=0.6, label="median")
    axes.set(xlabel="optimizer step", ylabel="seconds", ylim=(0, None), xlim=(begin, steps.step.iloc[-1] + 0.5))
    where = "best" if len(steps) < _MOST_SEARCHED else "lower right"
    legend(axes, ncols=2, loc=where, columnspacing=1, handletextpad=0.5)
    slowest = slow.nlargest(_MOST_NAMED, "extra_seconds")
    name_points(axes, slowest.step, slowest.seconds, [f"{row.step}: {row.because}" for row in slowest.itertuples()])
    return chart


def where_time_goes(measured: Measurements) -> Chart:
    """The mean time of a step by phase."""
    phases = time_by_phase(measured.steps)
    total = phases.sum()
    share = 100 * phases / total
    caption = f"A step takes {total:.3f} s; {share.max():.0f} % of it is {share.idxmax()}. Mean of the steady steps."
    chart = Chart("Where the time of a step goes", caption, 2.9)
    axes = chart.panel()
    axes.barh(phases.index, phases, color=[PHASE_COLOURS[phase] for phase in phases.index])
    for row, (seconds, percent) in enumerate(zip(phases, share)):
        axes.text(seconds, row, f" {seconds:.3f} s, {percent:.1f} %", va="center", color=INK)
    axes.set(xlabel="seconds per optimizer step", xlim=(0, phases.max() * 1.5))
    axes.invert_yaxis()
    return chart


def samples(run: RunFolder) -> Chart | None:
    """Images of the same prompts and seeds, one row for each step at which they were drawn, and at the last step for
    each scale of an adapter; None if there are none."""
    drawn = run.drawn
    if drawn.empty:
        return None
    keys = list(zip(drawn.prompt, drawn.seed))
    columns, rows = list(dict.fromkeys(keys)), sorted({*zip(drawn.step, drawn.scale)})
    # Evenly chosen, with the first; and all of the last step.
    last = [row for row in rows if row[0] == rows[-1][0]]
    before = rows[: -len(last)]
    count = min(max(1, MOST_ROWS - len(last)), len(before))
    rows = [*(before[round(index)] for index in np.linspace(0, len(before) - 1, count)), *last]
    images = dict(zip(zip(zip(drawn.step, drawn.scale), keys), map(run.sample, drawn.file)))
    first, seeds = drawn.iloc[0], sorted(drawn.seed.unique())
    seeded = f"Seed {seeds[0]}" if len(seeds) == 1 else f"Seeds {seeds[0]} to {seeds[-1]}"
    how = f"{seeded}, {first.num_inference_steps} steps, guidance {first.guidance_scale:g}."
    if run.model.get("random_weights"):
        how += " The model started from random weights, so its images show nothing yet."
    labels = [
        "before" if step == 0 else f"after step {step}" + (f", adapter × {scale:g}" if scale != 1 else "")
        for step, scale in rows
    ]
    names = [prompt if len(seeds) == 1 else f"{prompt} ({seed})" for prompt, seed in columns]
    return grid_of(
        [[images.get((row, column)) for column in columns] for row in rows],
        "Images drawn from the same noise during the training", how, columns=names, rows=labels,
    )  # fmt: skip


def examples(images: Sequence[Image.Image], captions: Sequence[str], total: int | None) -> Chart:
    """Some training images with their captions."""
    return grid_of(
        [list(images)], "What it trains on", f"{len(images)} of {total or 'a stream of'} images.", columns=captions
    )
