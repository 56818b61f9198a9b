"""Figures that compare runs."""

import itertools
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sdnb.errors import ConfigError
from sdnb.figures.chart import Chart, dots, grid_of, legend
from sdnb.figures.colours import INK, RUN_COLOURS
from sdnb.figures.run_plots import held_out
from sdnb.metrics.results import Measurements
from sdnb.metrics.steps import RUNNING_MEAN_STEPS
from sdnb.run.comparison import MANY, Comparison
from sdnb.run.files import DamagedFile
from sdnb.run.folder import problems_of
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import several


def throughputs(comparison: Comparison) -> Chart:
    """Images/s per device of each run, with its confidence interval."""
    estimates = {label: measured.throughput for label, measured in comparison.measured.items()}
    best = max(estimates, key=lambda label: estimates[label].value)
    first, *_ = estimates.values()
    ranked = comparison.caveat or f"{best} trains the most, {estimates[best]}."
    caption = f"{ranked} Lines: 95 % confidence within the run, if known."
    chart = Chart("Images per second and device", caption, 1.4 + 0.6 * len(estimates))
    axes = chart.panel()
    for row, (colour, estimate) in enumerate(zip(itertools.cycle(RUN_COLOURS), estimates.values())):
        axes.barh(row, estimate.value, height=0.5, color=colour, alpha=0.6)
        axes.plot([estimate.low, estimate.high], [row, row], color=INK, lw=1.5)
        end = max(estimate.value, estimate.high if np.isfinite(estimate.high) else 0)
        axes.text(end, row, f"  {estimate.value:.2f}, ×{estimate.value / first.value:.2f}", va="center", color=INK)
    for row, label in enumerate(estimates):  # above its bar: beside it, a long name would take the bars' place
        axes.text(0, row - 0.32, label, va="bottom", color=INK, fontsize=9, parse_math=False)
    axes.set(xlabel="images/s", xlim=(0, axes.get_xlim()[1] * 1.35), ylim=(-0.8, len(estimates) - 0.5), yticks=[])
    axes.invert_yaxis()
    return chart


def swept(comparison: Comparison, settings: Sequence[str] | str) -> Chart:
    """Images/s of all devices and peak memory over the first setting, with one line for each choice of the others. The
    best is marked. If ranks were swept, the caption has their scaling efficiency. Without settings: `throughputs`.
    Raises ConfigError if there is no such setting."""
    settings = several(settings)
    if unknown := [name for name in settings if name not in TrainConfig.model_fields]:
        raise ConfigError(f"swept = {', '.join(unknown)}: there is no such setting")
    if not settings:
        return throughputs(comparison)
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
            where = f" ({rest})" if rest else ""
            caption += f" Scaling efficiency from {few[0]} to {many[0]} ranks{where}: {efficiency:.0%}."
    chart = Chart(f"Over {setting}", caption, 3.8, stacks=True)
    ((left, right),) = chart.panels(1, 2)
    values = list(dict.fromkeys(value for line in points.values() for value, _ in line))
    for colour, (rest, line) in zip(itertools.cycle(RUN_COLOURS), points.items()):
        across = [values.index(value) for value, _ in line]
        left.plot(across, [_all_devices(measured) for _, measured in line], "o-", color=colour, label=rest or None)
        right.plot(across, [measured.value_of("peak memory") for _, measured in line], "o-", color=colour)
    left.plot(values.index(getattr(best.config, setting)), _all_devices(best), "*", color=INK, ms=13, label="the most")
    for axes, label in ((left, "images/s, all devices"), (right, "peak memory of a rank, GiB")):
        axes.set(xlabel=setting, ylabel=label, ylim=(0, None))
        axes.set_xticks(range(len(values)), map(str, values))
    legend(left)
    return chart


def _all_devices(measured: Measurements) -> float:
    return measured.throughput.value * measured.config.num_processes


def losses(comparison: Comparison) -> Chart:
    """The running means of the loss, and the held-out losses with their 95 % intervals, over the optimizer steps. For a
    log with gaps, single losses."""
    known_steps = {label: measured for label, measured in comparison.measured.items() if len(measured.steps)}
    ends = {label: measured.steps.running_loss.iloc[-1] for label, measured in known_steps.items()}
    known = ", ".join(f"{label} {end:.4f}" for label, end in ends.items() if np.isfinite(end))
    caption = f"Running means of {RUNNING_MEAN_STEPS} steps end at: {known or 'unknown'}."
    if any(len(measured.validation) for measured in comparison.measured.values()):
        caption += " Dots: held-out images, with 95 % intervals."
    chart = Chart("Loss", caption, 4.0)
    axes = chart.panel()
    for colour, (label, measured) in zip(itertools.cycle(RUN_COLOURS), known_steps.items()):
        steps, validation = measured.steps, measured.validation
        if steps.loss.isna().mean() > 0.5:  # a log with gaps
            dots(axes, steps.step, steps.loss, "x", color=colour, alpha=0.8, ms=4)
        else:
            axes.plot(steps.step, steps.loss, color=colour, alpha=0.25, lw=0.8)
        axes.plot(steps.step, steps.running_loss, color=colour, lw=2, label=label)
        if len(validation):
            held_out(axes, validation, fmt="o", color=colour)
    _label(axes, "mean squared error", comparison)
    return chart


def step_times(comparison: Comparison) -> Chart:
    """The wall time of each step; short steps as diamonds."""
    runs = {label: measured.steps for label, measured in comparison.measured.items() if len(measured.steps)}
    full = {label: steps[steps.steady & ~steps.short].seconds.dropna() for label, steps in runs.items()}
    known = ", ".join(f"{label} {seconds.median():.3f} s" for label, seconds in full.items() if len(seconds) > 2)
    caption = f"Medians of the full steps after the warm-up: {known or 'unknown'}. Diamonds are short steps."
    chart = Chart("Wall time of each optimizer step", caption, 3.6)
    axes = chart.panel()
    for colour, (label, steps) in zip(itertools.cycle(RUN_COLOURS), runs.items()):
        plain, short = steps[~steps.short], steps[steps.short]
        dots(axes, plain.step, plain.seconds, color=colour, ms=3, label=label)
        dots(axes, short.step, short.seconds, "D", color=colour, ms=3)
    _label(axes, "seconds", comparison)
    return chart


def _label(axes: Axes, quantity: str, comparison: Comparison) -> None:
    """Name the axes and the runs; the legend is beside the axes if there are many runs."""
    axes.set(xlabel="optimizer step", ylabel=quantity, ylim=(0, None))
    legend(axes, **({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(comparison.runs) > MANY else {}))


def samples(comparison: Comparison) -> Chart | None:
    """The last images of each run, for the prompts that all of them drew; None if there are none."""
    lists = {label: problems_of(partial(getattr, run, "drawn")) for label, run in comparison.runs.items()}
    for problem in filter(None, (problem for _, problem in lists.values())):
        warnings.warn(problem, DamagedFile, stacklevel=2)
    drawn = {label: listed for label, (listed, _) in lists.items() if listed is not None and not listed.empty}
    last = {
        label: samples[(samples.step == samples.step.max()) & (samples.scale == samples.scale.max())]
        for label, samples in drawn.items()
    }
    # of each prompt the image of the first seed
    last = {label: samples.drop_duplicates("prompt") for label, samples in last.items()}
    files = {label: dict(zip(samples.prompt, samples.file)) for label, samples in last.items()}
    first = next(iter(files.values()), {})
    prompts = [prompt for prompt in first if all(prompt in of_run for of_run in files.values())]
    if not prompts:
        return None
    rows = [[comparison.runs[label].sample(of_run[prompt]) for prompt in prompts] for label, of_run in files.items()]
    seeds = sorted({int(seed) for samples in last.values() for seed in samples.seed})
    how = "From the same seed." if len(seeds) == 1 else f"From different seeds: {', '.join(map(str, seeds))}."
    return grid_of(rows, "What each run drew last", how, columns=prompts, rows=list(files))
