"""What do more ranks cost, and what would 8 and 32 reach? Measures sdnb alone, on several numbers of ranks:

- a micro-batch, and a step without the reduction of the gradients;
- the reduction alone, its bytes and its rate;
- a step with the reduction: how much of it hides behind the backward pass.

    python benchmarks/scaling.py --ranks 1 2 4
    python benchmarks/scaling.py --ranks 1 2 4 8 --model sd-v1-4-random    # on eight GPUs, with NCCL
    python benchmarks/scaling.py --published    # also shows what published figures of 8 and 32 GPUs imply

A round launches each number of ranks once. Each launch measures in turn, see scaling_rank.py. A model is fitted to the
measurements (scaling_model.py), which predicts a step on the numbers of ranks in `--predict`. The program checks the
model: it fits it without the largest number of ranks, and predicts that.

A step of several ranks is predicted for machines that are as full as the measured one, and with a network as fast as
what was measured. 32 ranks on four machines need the bandwidth between the machines, which one machine cannot show.

On a CPU, each rank has one thread and is pinned to one core. If there are more ranks than cores, ranks take turns on a
core, and all their times are divided by the number of turns. A prediction is therefore one for a machine with a core
per rank, or a GPU per rank. Encoders run for each image, micro-batches are not folded, and all steps are full ones. The
machine should do nothing else. The table says what share of the cores other processes used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
import scaling_published
import torch
from common import MODELS, at_least, describe, file_of, follow, inspect, table, write
from scaling_model import Fit, Launch, ring

from sdnb import errors
from sdnb.data import openmoji
from sdnb.figures.chart import Chart, legend
from sdnb.figures.colours import BLUE, GREEN, GREY, ORANGE, RED
from sdnb.launch.ranks import free_port
from sdnb.machine.witness import Witness
from sdnb.metrics.isolation import MOST_OF_A_CPU
from sdnb.metrics.throughput import Estimate
from sdnb.models import embedded
from sdnb.settings.flags import parse

PROGRAM = Path(__file__).with_name("scaling_rank.py")
FLAGS = (
    "--use_ema --center_crop --random_flip --learning_rate=1e-05 --lr_warmup_steps=0 --seed=42 --report_to=none "
    "--whole_steps --encoder_cache_gib=0 --fold_micro_batches=1"
)


def launch(ranks: int, flags: list[str], device: str, repetitions: int, work: Path) -> dict[str, Any]:
    """Measure one launch. Returns what its rank 0 wrote, and the share of the cores that other processes used.

    Raises:
        RuntimeError, SdnbError: if it fails.
    """
    folder = Path(tempfile.mkdtemp(dir=work))
    config = parse([*flags, f"--output_dir={folder}"])
    precision = config.mixed_precision or "no"
    config = config.updated(num_processes=ranks, mixed_precision=precision)
    job = dict(config=config.model_dump(mode="json"), repetitions=repetitions, pin=device == "cpu",
               result=str(folder / "result.json"))  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    # With ACCELERATE_USE_CPU, which is set on a CPU, accelerate's --multi_gpu also starts ranks on a CPU.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={ranks}",
                "--num_machines=1", f"--mixed_precision={precision}", "--dynamo_backend=no",
                f"--main_process_port={free_port()}"]  # fmt: skip
    witness = Witness(torch.device("cpu"), of_machine=True)
    follow([sys.executable, *(launcher if ranks > 1 else ()), str(PROGRAM), str(folder / "job.json")], device, work)
    spent = witness.spent()
    others = max(0.0, spent.in_use - spent.own) / spent.clock / spent.cores
    return dict(json.loads((folder / "result.json").read_text()), others_share=others)


def quiet_launch(tries: int, *arguments: Any) -> dict[str, Any]:
    """As `launch`, again and again until other processes leave the cores alone. The least disturbed one counts."""
    found: list[dict[str, Any]] = []
    while not found or (found[-1]["others_share"] > MOST_OF_A_CPU and len(found) < tries):
        found.append(launch(*arguments))
    return min(found, key=lambda one: one["others_share"])


def spread(values: list[float], digits: int = 3) -> str:
    """Median (lowest to highest)."""
    low, high = (f"{pick(values):.{digits}f}" for pick in (min, max))
    return f"{np.median(values):.{digits}f} ({low} to {high})"


def by_ranks(launches: list[Launch]) -> dict[int, list[Launch]]:
    counts = sorted({one.ranks for one in launches})
    return {count: [one for one in launches if one.ranks == count] for count in counts}


def measured_table(launches: list[Launch]) -> str:
    head = (
        "ranks", "micro-batch, s", "step without reduction, s", "step, s", "adds to a step, ms", "reduction alone, ms",
        "hidden", "bytes/time, GB/s", "each rank sends, GB/s",
    )  # fmt: skip
    rows = []
    for ranks, same in by_ranks(launches).items():
        steps = ("micro_batch", "unreduced", "reduced")
        rows.append([str(ranks), *(spread([np.median(getattr(one, name)) for one in same]) for name in steps)])
        if ranks > 1:
            rates = [one.bytes / one.allreduce / 1e9 for one in same]
            rows[-1] += [
                *(spread([getattr(one, name) * 1e3 for one in same], 1) for name in ("exposed", "allreduce")),
                f"{np.median([one.hidden_share for one in same]):.0%}",
                *(spread([factor * rate for rate in rates], 2) for factor in (1, ring(ranks))),
            ]
    return table(head, rows)


def prediction_table(fitted: Fit, launches: list[Launch], counts: list[int]) -> str:
    head = ("ranks", "step, measured, s", "step, model, s (95 %)", "images/s per rank, relative to one rank (95 %)")
    measured, rows = by_ranks(launches), []
    for ranks in sorted({*measured, *counts}):
        seen = spread([np.median(one.reduced) for one in measured[ranks]]) if ranks in measured else ""
        rows.append([str(ranks), seen, str(fitted.step(ranks)), str(fitted.efficiency(ranks)) if ranks > 1 else "1"])
    return table(head, rows)


def parameters(fitted: Fit) -> str:
    model = fitted.model
    share = model.hidden_share
    beside = f"{share:.0%} of the reduction is hidden"
    if share < 0:
        beside = f"in a step the reduction costs {-share:.0%} more"
    bandwidth = f"{1e-9 / model.seconds_per_byte:.2f} GB/s" if model.seconds_per_byte else "too high to be seen"
    return (
        f"The model: work {model.alone:.3f} s of one rank, {model.work:.3f} s of several; latency "
        f"{model.latency * 1e6:.0f} µs per bucket and hop; bandwidth {bandwidth}; {model.bytes / 1e6:.1f} MB in "
        f"{model.buckets} buckets; {beside}; hidden is at most "
        f"{model.backward:.3f} s. The steps of the launches differ from the model by {fitted.noise:.1%} (standard "
        f"deviation, {fitted.freedom} degrees of freedom)."
    )


def check(launches: list[Launch]) -> str:
    """Whether a model of fewer ranks predicts the largest number of them."""
    *fewer, (ranks, same) = by_ranks(launches).items()
    if len(fewer) < 2:
        return "The model was not checked. That needs three numbers of ranks."
    predicted = Fit.of([one for _, some in fewer for one in some]).step(ranks)
    steps = [float(np.median(one.reduced)) for one in same]
    median, *each = (predicted.low <= step <= predicted.high for step in (float(np.median(steps)), *steps))
    verdict = "inside" if median else "outside"
    wide = " The interval is too wide for this to say much." if predicted.high > 1.5 * predicted.low else ""
    return (
        f"Check: fitted to {' and '.join(str(count) for count, _ in fewer)} ranks alone, the model predicts "
        f"{predicted} s for {ranks} ranks. Measured: {spread(steps)} s. The median is "
        f"**{verdict}** the interval; {sum(each)} of {len(steps)} launches are inside.{wide}"
    )


def plot(fitted: Fit, launches: list[Launch], counts: list[int], title: str, with_published: bool) -> Chart:
    measured = by_ranks(launches)
    shown = ", ".join(f"{count} ranks {fitted.efficiency(count)}" for count in counts)
    caption = f"Predicted: {shown}, with a core or a GPU of its own for each rank. Band: 95 % of new launches."
    chart = Chart(title, caption, 3.8)
    grid = chart.panels(1, 1 + with_published, sharey=True)[0]
    most = max(*measured, *counts)
    _plot_model(grid[0], fitted, 1, most)
    alone = np.median([np.median(one.reduced) for one in measured[1]])
    points = [(one.ranks, alone / np.median(one.reduced)) for one in launches]
    grid[0].plot(*zip(*points), "o", color=BLUE, ms=4, label="measured launches")
    grid[0].set(ylabel="images/s per rank, relative", xlabel="ranks, relative to one")
    if with_published:
        _plot_published(grid[1], fitted)
    for axes, ticks in zip(grid, (sorted({*measured, *counts}), [8, 32])):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_ylim(0, max(1.2, *(1.05 * value for _, value in points)))
        legend(axes, loc="lower left")
    return chart


def _plot_model(axes: Any, fitted: Fit, base: int, most: int) -> None:
    counts = np.unique(np.geomspace(base, most, 40).round().astype(int))
    curve: list[Estimate] = [fitted.efficiency(int(count), base) for count in counts]
    axes.fill_between(counts, [one.low for one in curve], [one.high for one in curve], color=GREY, alpha=0.25, lw=0)
    axes.plot(counts, [one.value for one in curve], color=GREY, label="model of this machine")


def _plot_published(axes: Any, fitted: Fit) -> None:
    _plot_model(axes, fitted, 8, 32)
    for pair, colour in zip(scaling_published.pairs(), (RED, GREEN, ORANGE)):
        for value, marker, what in ((pair.nominal, "x", "published IPS"), (pair.trained, "s", "images trained on")):
            axes.plot([8, 32], [1, value], color=colour, marker=marker, ls=":", label=f"{pair.name}, {what}")
    axes.set_xlabel("A100, relative to eight")


def save(found: list[dict[str, Any]], about: dict[str, Any], options: argparse.Namespace, cores: int | None) -> None:
    """Write the table, the figure and the raw numbers."""
    launches = [Launch.of(one, turns=max(1.0, one["ranks"] / cores) if cores else 1.0) for one in found]
    fitted, path = Fit.of(launches), file_of(options, "scaling", options.model)
    others = [one["others_share"] for one in found]
    turns = [ranks for ranks in by_ranks(launches) if cores and ranks > cores]
    notes = (
        f"Medians of the launches (lowest to highest). Each launch is the median of {options.repetitions} repetitions. "
        f"Flags: `{about['flags']}`. Other processes used {np.median(others):.0%} of the cores ({min(others):.0%} to "
        f"{max(others):.0%})."
    )  # fmt: skip
    if turns:
        notes += (
            f" {' and '.join(map(str, turns))} ranks take turns on {cores} cores. Their times are divided by the "
            "number of ranks per core."
        )
    text = [measured_table(launches), notes, prediction_table(fitted, launches, options.predict), parameters(fitted),
            check(launches), *([scaling_published.text()] if options.published else [])]  # fmt: skip
    write(path, "\n\n".join(text), about, runs=found)
    plot(fitted, launches, options.predict, about["title"], options.published).savefig(f"{path}.png")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="tiny-random")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2, 4], help="with 1 and a larger number")
    parser.add_argument("--predict", type=at_least(2), nargs="+", default=[8, 32], help="numbers of ranks to predict")
    parser.add_argument("--train_batch_size", type=at_least(1), default=8)
    parser.add_argument("--gradient_accumulation_steps", type=at_least(1), default=4)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="launches of each number of ranks")
    parser.add_argument("--repetitions", type=at_least(2), default=10, help="in each launch")
    parser.add_argument(
        "--tries", type=at_least(1), default=1, help="launch again, so many times at most, if other processes "
        f"used more than {MOST_OF_A_CPU * 100:.0f} %% of the cores",
    )  # fmt: skip
    parser.add_argument("--published", action="store_true", help="also show what published figures imply")
    options = parser.parse_args()
    counts, (side, device, further) = sorted({*options.ranks}), MODELS[options.model]
    if counts[0] != 1 or len(counts) < 2:
        parser.error("--ranks: the fit needs 1, and at least one larger number")
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    sizes = [f"--{name}={getattr(options, name)}" for name in ("train_batch_size", "gradient_accumulation_steps")]
    with tempfile.TemporaryDirectory(prefix="sdnb-scaling-") as work:
        try:
            seen = inspect(sys.executable, device, set(), Path(work))
            about = describe(f"What more ranks cost: {options.model} at {side}×{side}, {device}", seen,
                             flags=" ".join([f"--resolution={side}", *sizes, f"{FLAGS}{further}"]))  # fmt: skip
            flags = [f"--pretrained_model_name_or_path={embedded.folder(options.model)}",
                     f"--train_data_dir={openmoji.folder(side) / 'train'}", *about["flags"].split()]  # fmt: skip
            found: list[dict[str, Any]] = []
            for number in range(options.rounds):
                for ranks in counts[:: -1 if number % 2 else 1]:
                    found.append(quiet_launch(options.tries, ranks, flags, device, options.repetitions, Path(work)))
                    step = np.median(found[-1]["reduced"] or found[-1]["unreduced"])
                    print(f"{number + 1}: {ranks} ranks: {step:.3f} s per step; other processes used "
                          f"{found[-1]['others_share']:.0%} of the cores", flush=True)  # fmt: skip
                save(found, about, options, len(os.sched_getaffinity(0)) if device == "cpu" else None)
        except (RuntimeError, errors.SdnbError) as error:
            sys.exit(f"error: {error}")
    print(Path(f"{file_of(options, 'scaling', options.model)}.md").read_text())


if __name__ == "__main__":
    main()
