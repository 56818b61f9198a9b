"""What does a busy machine cost? Trains the embedded model with and without the watch of sdnb/machine/threads.py, which
makes waiting threads sleep while other processes use the cores. Measures on a quiet machine, and next to processes that
compute all the time.

    python benchmarks/contention.py
    python benchmarks/contention.py --pairs 7 --steps 31 --busy 0 1 2 4

A pair is a run with the watch and a run without it, one after the other. Which comes first alternates. GOMP_SPINCOUNT,
set to libgomp's default, turns the watch off. Images/s count the steps after the warm-up. All encodings are cached
before the first pair. The machine should do nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import pandas as pd
from common import MODELS, at_least, describe, file_of, follow, write

from sdnb.data import openmoji
from sdnb.figures.chart import Chart, legend
from sdnb.figures.colours import BLUE, GREY, RED
from sdnb.models import embedded
from sdnb.report.run import Run

WATCHED, OPENMP_DEFAULT = "watched", "OpenMP default"
PREFIXES = {WATCHED: [], OPENMP_DEFAULT: ["env", "GOMP_SPINCOUNT=300000"]}  # libgomp's default
FLAGS = (
    "--dataset_name=openmoji --center_crop --use_ema --train_batch_size=8 --lr_warmup_steps=0 "
    "--gradient_accumulation_steps=4 --learning_rate=1e-05 --seed=42 --report_to=none --validation_loss_steps=0"
)
# Uses one core, until its parent process ends.
COMPUTE = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


@contextlib.contextmanager
def beside(busy: int) -> Iterator[None]:
    """Run `busy` processes that compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", COMPUTE]) for _ in range(busy)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(way: str, busy: int, flags: list[str], work: Path) -> dict[str, Any]:
    """Measure one run.

    Raises:
        RuntimeError: if it fails.
    """
    output = work / "run"
    with beside(busy):
        follow([*PREFIXES[way], sys.executable, "-m", "sdnb.train", f"--output_dir={output}", *flags], "cpu", work)
    run = Run(output)
    result = dict(
        way=way, busy=busy, images_per_second=run.results.throughput.value, seconds=list(run.steps.seconds),
        threads=run.environment["threads"], asleep_share=run.summary["threads"].get("asleep_share"),
    )  # fmt: skip
    shutil.rmtree(output)
    return result


def in_pairs(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Images/s of both ways and their ratio, one row per pair."""
    pairs = pd.DataFrame(results).pivot(index=["busy", "pair"], columns="way", values="images_per_second").dropna()
    return pairs.assign(ratio=pairs[WATCHED] / pairs[OPENMP_DEFAULT])


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"| busy processes | pairs | {OPENMP_DEFAULT}, images/s | {WATCHED}, images/s | ratio | asleep |",
        "|---" * 6 + "|",
    ]  # fmt: skip
    asleep = pd.DataFrame(results).query("way == @WATCHED").groupby("busy").asleep_share.median()
    for busy, pairs in in_pairs(results).groupby("busy"):
        each = [", ".join(f"{value:.1f}" for value in pairs[way]) for way in (OPENMP_DEFAULT, WATCHED)]
        lines.append(
            f"| {busy} | {len(pairs)} | {each[0]} | {each[1]} | {in_words(pairs.ratio)} | {asleep[busy]:.0%} |"
        )
    return "\n".join(lines)


def in_words(ratios: pd.Series) -> str:
    return f"×{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def plot(results: list[dict[str, Any]], title: str) -> Chart:
    ratios = {busy: in_words(pairs.ratio) for busy, pairs in in_pairs(results).groupby("busy")}
    caption = "; ".join(f"{busy} busy processes: {ratio}" for busy, ratio in ratios.items())
    chart = Chart(
        title, f"Images/s with the watch divided by images/s without it, median of the pairs: {caption}.", 3.6
    )
    axes = chart.panel()
    for place, (_, pairs) in enumerate(in_pairs(results).groupby("busy")):
        for without, watched in zip(pairs[OPENMP_DEFAULT], pairs[WATCHED]):
            axes.plot([place - 0.15, place + 0.15], [without, watched], color=GREY, linewidth=0.8, zorder=1)
        for offset, way, colour, marker in ((-0.15, OPENMP_DEFAULT, RED, "s"), (0.15, WATCHED, BLUE, "o")):
            axes.scatter([place + offset] * len(pairs), pairs[way], color=colour, marker=marker, zorder=2,
                         label=way if place == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(ratios)), ["quiet" if busy == 0 else f"{busy} busy" for busy in ratios])
    axes.set(ylabel="images/s", ylim=(0, None))
    legend(axes)
    return chart


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--pairs", type=at_least(1), default=5)
    parser.add_argument("--steps", type=at_least(2), default=21, help="optimizer steps per run, at least 2")
    parser.add_argument("--busy", type=at_least(0), nargs="+", default=[0, 1, 2], help="numbers of busy processes")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sdnb-contention-") as work:
        side = MODELS[options.model][0]
        flags = [*FLAGS.split(), f"--resolution={side}", f"--max_train_steps={options.steps}", f"--cache_dir={work}"]
        flags.append(f"--pretrained_model_name_or_path={embedded.folder(options.model)}")
        openmoji.folder(side, work)
        about = describe(f"A run next to busy processes: {options.model} at {side}×{side}, cpu",
                         flags=" ".join(flags[:-2]), omp_num_threads=os.environ.get("OMP_NUM_THREADS"))  # fmt: skip
        try:
            measure(OPENMP_DEFAULT, 0, flags, Path(work))  # fills the encoder cache
            for pair in range(options.pairs):
                for busy in options.busy:
                    for way in list(PREFIXES)[:: 1 if pair % 2 else -1]:
                        results.append({"pair": pair, **measure(way, busy, flags, Path(work))})
                        print(
                            f"{pair + 1}: {busy} busy, {way}: {results[-1]['images_per_second']:.1f} images/s",
                            flush=True,
                        )
                path = file_of(options, "contention", options.model)
                notes = f"Ratio: median of the pairs (lowest to highest). Flags of every run: `{about['flags']}`."
                write(path, f"{table(results)}\n\n{notes}", about, runs=results)
                plot(results, about["title"]).savefig(f"{path}.png")
        except RuntimeError as error:
            sys.exit(f"error: {error}")
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
