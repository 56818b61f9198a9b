"""How fast does sdnb train, compared with the reference? Runs both alternately on one machine, on one rank, with the
same Python, torch, model, images, settings and seed. The reference is unchanged.

    python benchmarks/speed.py --reference PATH/train_text_to_image.py --python PATH/OF/AN/ENVIRONMENT/bin/python
    python benchmarks/speed.py --model sd-v1-4-random --pairs 2 --steps 41 --minutes 10 --reference …    # on a GPU
    python benchmarks/speed.py    # sdnb alone, with each of its techniques turned off
    python benchmarks/speed.py --only "all on" "encoder cache"    # one of them

The environment needs sdnb's dependencies, and torchvision for the reference. sdnb itself comes from this checkout.

Both programs are measured from outside, in the same way. Columns with "own" are sdnb's own records in its run folder.
- images/s: the images of the steps after the warm-up, divided by the time from the last TensorBoard event of the
  warm-up to the event of the last step. The warm-up is the first tenth of the steps, as in sdnb. A short step counts
  only the images that it has.
- wall time: from the start of the process to its end, after the pipeline is saved.
- peak memory: VmHWM of the process, which includes mapped files. For a GPU: the used memory that NVML reports.

A pair on a CPU has these runs:
- Two of each program. The first starts with an empty cache folder (HF_HOME, XDG_CACHE_HOME, --cache_dir). There
  `datasets` prepares the images and sdnb caches encodings. The second uses what the first cached.
- A third one of sdnb, like its second, without folded micro-batches. Its memory can be compared with the reference's.
- A fourth one of sdnb, like its second, with all techniques off.

A pair on a GPU has one run of the reference and four of sdnb:
- One that does as much work as the reference (no cache, no folding), with an empty cache folder.
- One like it, but with folded micro-batches, with an empty cache folder.
- Two with the settings of params/fast.yaml, in one cache folder, which also keeps compiled kernels.

Each program has its own folder, and each pair has new ones. Both programs are imported once before. Which one comes
first alternates. The number of threads is torch's default, or OMP_NUM_THREADS. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
import pandas as pd
import yaml
from common import MODELS, a_python, at_least, describe, file_of, follow, inspect, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdnb import errors
from sdnb.data import openmoji
from sdnb.figures.chart import Chart
from sdnb.figures.colours import BLUE, RED
from sdnb.metrics.steps import warmup_steps
from sdnb.models import embedded
from sdnb.places import shipped
from sdnb.run import folder as run_folder
from sdnb.settings.flags import parse

# The techniques that make sdnb faster, and the flags that turn them off.
TECHNIQUES: dict[str, tuple[str, ...]] = {
    "encoder cache": ("--encoder_cache_gib=0",),
    "folded micro-batches": ("--fold_micro_batches=1",),
    "fused AdamW and EMA": ("--no-fused_optimizer",),
}
ALL_OFF = tuple(flag for flags in TECHNIQUES.values() for flag in flags)
BATCH, ACCUMULATION = 8, 4
FLAGS = (
    f"--use_ema --center_crop --random_flip --train_batch_size={BATCH} --gradient_accumulation_steps={ACCUMULATION} "
    "--learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0 --seed=42 "
    "--dataloader_num_workers=0 --report_to=tensorboard"
)
QUANTITIES = {
    "images_per_second": "images/s", "wall_seconds": "wall time, s", "peak_gib": "peak memory, GiB",
    "gpu_used_gib": "GPU memory, GiB", "own_images_per_second": "own images/s", "own_peak_gib": "own peak memory, GiB",
}  # fmt: skip


class Kind(NamedTuple):
    """A kind of run: the program, its additional flags, its cache folder, and the kind that it is compared with."""

    label: str
    program: tuple[str, ...] = ("-m", "sdnb.train")
    flags: tuple[str, ...] = ()
    cache: str = "sdnb"
    against: str | None = None


def of_fast_yaml() -> tuple[str, ...]:
    """The flags for the settings in which params/fast.yaml differs from params/reference.yaml."""
    folder = shipped("params")
    slow, fast = (yaml.safe_load((folder / name).read_text()) for name in ("reference.yaml", "fast.yaml"))
    changed = {name: value for name, value in fast.items() if value != slow.get(name) and value is not None}
    return tuple(f"--{name}" if value is True else f"--{name}={value}" for name, value in changed.items())


def comparison(reference: Path, device: str) -> list[list[Kind]]:
    """The runs of a pair in order, for even pairs and for odd pairs."""
    # v0.26.3 resizes bilinearly and has no flag for it. Later versions have a flag with another default.
    later = "image_interpolation_mode" in reference.read_text()
    flags = ("--image_interpolation_mode=bilinear",) if later else ()
    if device != "cpu":
        theirs = Kind("reference", (str(reference),), flags, "reference")
        no_cache, no_folding = TECHNIQUES["encoder cache"], TECHNIQUES["folded micro-batches"]
        same = [
            Kind("sdnb, no cache, no folding", flags=no_cache + no_folding, cache="same", against=theirs.label),
            Kind("sdnb, no cache", flags=no_cache, cache="folded", against=theirs.label),
        ]
        fast = [
            Kind(f"sdnb, fast.yaml, {which} run", flags=of_fast_yaml(), cache="fast", against=theirs.label)
            for which in ("first", "second")
        ]
        return [[theirs, *same, *fast], [*fast, *same[::-1], theirs]]
    theirs = [Kind(f"reference, {which} run", (str(reference),), flags, "reference") for which in ("first", "second")]
    ours = [Kind(one.label.replace("reference", "sdnb"), against=one.label) for one in theirs]
    less = {"no folding": TECHNIQUES["folded micro-batches"], "all off": ALL_OFF}
    further = [Kind(f"sdnb, second run, {off}", flags=flags, against=theirs[1].label) for off, flags in less.items()]
    return [
        [theirs[0], ours[0], theirs[1], ours[1], *further],
        [ours[0], theirs[0], *further[::-1], ours[1], theirs[1]],
    ]


def ablation() -> list[list[Kind]]:
    """The runs of a round in order, for even rounds and for odd rounds. The first run fills the cache for the others.
    Otherwise the time of encoding would hide the effect of a technique on a step."""
    off = {f"without {name}": flags for name, flags in TECHNIQUES.items()}
    off["all off"] = ALL_OFF
    first, second = Kind("all on, first run", against="all on"), Kind("all on")
    less = [Kind(label, flags=flags, against="all on") for label, flags in off.items()]
    return [[first, second, *less], [first, *less[::-1], second]]


def images_of_steps(examples: int, steps: int) -> list[int]:
    """The number of images in each optimizer step on one rank. The end of an epoch ends the accumulation."""
    batches = [min(BATCH, examples - start) for start in range(0, examples, BATCH)]
    epoch = [sum(batches[start : start + ACCUMULATION]) for start in range(0, len(batches), ACCUMULATION)]
    return [epoch[step % len(epoch)] for step in range(steps)]


def measure(kind: Kind, python: str, device: str, flags: list[str], images: list[int], cache: Path) -> dict[str, Any]:
    """Measure one run. `images` is the expected number of images in each step.

    Raises:
        RuntimeError: if it fails, or its steps differ from the expected ones.
    """
    cache.mkdir(parents=True, exist_ok=True)
    output, warmup = cache / "output", warmup_steps(len(images))
    command = [python, *kind.program, f"--output_dir={output}", f"--cache_dir={cache}", *flags, *kind.flags]
    result: dict[str, Any] = dict(follow(command, device, cache))
    events = EventAccumulator(str(output / "logs" / "text2image-fine-tune"), size_guidance={"scalars": 0}).Reload()
    times = [event.wall_time for event in events.Scalars("train_loss")]
    if len(times) != len(images):
        raise RuntimeError(f"{kind.label}: it logged {len(times)} steps instead of {len(images)}")
    result.update(images_per_second=sum(images[warmup:]) / (times[-1] - times[warmup - 1]), event_times=times)
    if kind.program[0] == "-m":
        run = run_folder.RunFolder(output)
        if list(run.steps.images) != images:
            raise RuntimeError(f"{kind.label}: its steps had {list(run.steps.images)} images instead of {images}")
        own = run.steps.images[warmup:].sum() / run.steps.seconds[warmup:].sum()
        peak_gib = run.summary["ranks"][0]["peak_memory_gib"]  # on a GPU: of torch's allocator
        result.update(own_images_per_second=own, own_peak_gib=peak_gib, model=run.model)
    shutil.rmtree(output)  # a pipeline can be large
    return result


def figures(results: list[dict], kind: Kind, quantity: str) -> tuple[pd.Series, str]:
    """A quantity of a kind of run, by round. Also, as text, its ratio to the kind that it is compared with in the same
    round: median, lowest and highest."""
    by_round = pd.DataFrame(results).pivot(index="round", columns="run", values=quantity)
    ratios = (by_round[kind.label] / by_round.get(kind.against, float("nan"))).dropna()
    in_words = f" ×{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})" if len(ratios) else ""
    return by_round[kind.label].dropna(), in_words


def table(results: list[dict], kinds: list[Kind]) -> str:
    quantities = [name for name in QUANTITIES if any(name in one for one in results)]
    lines = ["| | " + " | ".join(map(QUANTITIES.get, quantities)) + " |", "|---" * (1 + len(quantities)) + "|"]
    for kind in kinds:
        both = [figures(results, kind, quantity) for quantity in quantities]
        cells = [f"{values.median():.2f}{ratio}" if len(values) else "" for values, ratio in both]
        lines.append(f"| {kind.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[dict], kinds: list[Kind], title: str, caption: str) -> Chart:
    panels = [name for name in list(QUANTITIES)[:4] if name in results[0]]
    chart = Chart(title, caption, 1.6 + 0.4 * len(kinds))
    grid = chart.panels(1, len(panels), sharey=True)[0]
    for axes, name in zip(grid, panels):
        for row, kind in enumerate(kinds):
            values, ratio = figures(results, kind, name)
            colour = RED if kind.against else BLUE
            axes.barh(row, values.median(), color=colour, alpha=0.4)
            axes.plot(values, [row] * len(values), ".", color=colour)
            axes.text(values.max(), row, f" {ratio.partition(' (')[0]}", va="center", fontsize=9)
        axes.set(xlabel=QUANTITIES[name], xlim=(0, axes.get_xlim()[1] * 1.3))
    grid[0].set_yticks(range(len(kinds)), [kind.label for kind in kinds])
    grid[0].invert_yaxis()
    return chart


def save(results: list[dict], kinds: list[Kind], about: dict[str, Any], path: str) -> None:
    """Write the table, the figure and the raw numbers to `path` with three extensions. Skips kinds that did not run."""
    kinds = [kind for kind in kinds if any(one["run"] == kind.label for one in results)]
    ratios = ", ".join(kind.label + figures(results, kind, "images_per_second")[1] for kind in kinds if kind.against)
    caption = f"Images/s relative to {about['baseline']}: {ratios}. Bars are medians, dots are single runs."
    plot(results, kinds, about["title"], caption).savefig(f"{path}.png")
    model = next((one["model"]["parameters"] for one in results if "model" in one), {})
    text = (
        f"{table(results, kinds)}\n\nThe values are medians. × is the ratio to {about['baseline']}: median (lowest to "
        f"highest). Flags of every run, on one rank: `{about['flags']}`. Parameters: "
        + ", ".join(f"{part} {count / 1e6:.2f} million" for part, count in model.items()) + "."
    )  # fmt: skip
    write(path, text, about, runs=results)


def run_all(name: str, options: argparse.Namespace, work: Path) -> None:
    ends, (side, device, further) = time.monotonic() + 60 * options.minutes, MODELS[name]
    orders = comparison(options.reference.absolute(), device) if options.reference else ablation()
    orders = [[kind for kind in order if any(words in kind.label for words in options.only)] for order in orders]
    if not orders[0]:
        raise RuntimeError(f"--only {' '.join(options.only)}: no run of {name} has this in its name")
    title = f"sdnb and train_text_to_image.py of {options.name}" if options.reference else "sdnb without its techniques"
    about = describe(
        f"{title}: {name} at {side}×{side}, {device}",
        inspect(options.python, device, {kind.program for kind in orders[0]}, work),
        flags=f"--resolution={side} --max_train_steps={options.steps} {FLAGS}{further}", turned_off_by=TECHNIQUES,
        baseline="the reference's run in the same pair" if options.reference else "all on in the same round",
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
    )  # fmt: skip
    shutil.copytree(openmoji.folder(side) / "train", work / "data")
    flags = [f"--pretrained_model_name_or_path={embedded.folder(name)}", f"--train_data_dir={work / 'data'}",
             *about["flags"].split()]  # fmt: skip
    for kind in orders[0]:
        if kind.program[0] == "-m":
            parse([*flags, *kind.flags])  # reports a mistake in a flag before the first run
    images = images_of_steps(openmoji.TRAINING_IMAGES, options.steps)
    results: list[dict] = []
    for number in range(options.pairs):
        for kind in orders[number % 2]:
            if time.monotonic() + max((one["wall_seconds"] for one in results), default=0) > ends:
                print(f"stopped after {len(results)} runs: the next might not end within {options.minutes:g} minutes")
                return
            result = measure(kind, options.python, device, flags, images, work / str(number) / kind.cache)
            results.append(dict(run=kind.label, round=number, **result))
            shown = ", ".join(f"{text} {result[one]:.2f}" for one, text in QUANTITIES.items() if one in result)
            print(f"{number + 1}: {kind.label}: {shown}", flush=True)
            path = file_of(options, "speed" if options.reference else "ablation", name)
            save(results, orders[0], about, path)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--reference", type=Path, help="path of its train_text_to_image.py; default: compare sdnb's techniques"
    )
    parser.add_argument("--name", default="the reference", help="name of the reference in the results, such as v0.26.3")
    parser.add_argument("--python", type=a_python, default=sys.executable, help="Python that runs both programs")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["tiny"])
    parser.add_argument("--only", nargs="+", default=[""], help="only runs whose name contains one of these")
    parser.add_argument("--pairs", type=at_least(1), default=3, help="number of pairs; without --reference, of rounds")
    parser.add_argument("--steps", type=at_least(2), default=101, help="optimizer steps per run, at least 2")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no run that might not end within this many minutes"
    )
    options = parser.parse_args()
    if options.reference and not options.reference.is_file():
        parser.error(f"--reference {options.reference}: no such file")
    for name in options.model:
        with tempfile.TemporaryDirectory(prefix="sdnb-speed-") as work:
            try:
                run_all(name, options, Path(work))
            except (RuntimeError, errors.SdnbError) as error:
                sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
