"""How does the cost of a run grow? Measures sdnb alone and varies one setting at a time: the batch size, the
resolution, the size of the data set, the number of ranks.

    python benchmarks/growth.py
    python benchmarks/growth.py --model sd-v1-4-random --minutes 10    # on a GPU
    python benchmarks/growth.py --vary train_batch_size --flags="--compile_unet=blocks --encoder_cache_gib=10"

For each run, it measures images/s of the steps after the warm-up, with the 95 % confidence interval of the run's
report. It also measures the peak memory of a rank, and shows it next to the prediction that sdnb makes before the
start.

No micro-batches are accumulated, and the encoders run for every image (`--encoder_cache_gib=0`), so that only the
varied setting has an effect. The runs that vary the size of the data set are different: they cache encodings and start
with an empty cache folder, because this size decides how often an image is seen again. Ranks on a CPU share its cores.

`--vary` chooses some of the four settings. `--flags` adds sdnb flags to every run. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import pandas as pd
from common import MODELS, a_python, at_least, describe, file_of, follow, inspect, write

from sdnb import errors
from sdnb.data import openmoji
from sdnb.figures.chart import Chart
from sdnb.figures.colours import BLUE, GREY
from sdnb.launch import memory
from sdnb.metrics import throughput
from sdnb.metrics.steps import warmup_steps
from sdnb.models import embedded
from sdnb.run import folder as run_folder

PROGRAM = ("-m", "sdnb.train")
FLAGS = "--use_ema --center_crop --random_flip --learning_rate=1e-05 --lr_warmup_steps=0 --seed=42 --report_to=none"
LABELS = {
    "train_batch_size": "images in a micro-batch", "resolution": "side of the images, pixels",
    "max_train_samples": "images in the data set", "num_processes": "ranks",
}  # fmt: skip


def points(side: int, ranks: int) -> dict[str, list[int]]:
    """The values of each varied setting. The others stay at batch 8 and the model's resolution."""
    return {
        "train_batch_size": [1, 2, 4, 8, 16, 32],
        "resolution": [side // 2, side, side * 3 // 2, side * 2],
        "max_train_samples": [openmoji.TRAINING_IMAGES // part for part in (16, 8, 4, 2, 1)],
        "num_processes": [count for count in (1, 2, 4, 8) if count <= ranks],
    }


def measure(
    name: str, setting: str, value: int, options: argparse.Namespace, device: str, further: str, work: Path
) -> dict[str, Any]:
    """Measure one run with `setting` at `value`, in its own cache folder.

    Raises:
        RuntimeError, SdnbError: if it fails, for example because it does not fit in memory.
    """
    values = {"train_batch_size": 8, "resolution": MODELS[name][0], "max_train_samples": 0, "num_processes": 1}
    values[setting] = value
    ranks = values.pop("num_processes")
    data = work / f"data-{values['resolution']}"
    if not data.exists():
        shutil.copytree(openmoji.folder(values["resolution"]) / "train", data)
    cache = Path(tempfile.mkdtemp(dir=work))
    flags = [f"--{flag}={number}" for flag, number in values.items() if number]
    if setting != "max_train_samples":
        flags.append("--encoder_cache_gib=0")
    # With ACCELERATE_USE_CPU, which is set here on a CPU, accelerate's --multi_gpu also starts ranks on a CPU.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={ranks}", "--num_machines=1",
                "--mixed_precision=no", "--dynamo_backend=no"]  # fmt: skip
    command = [options.python, *(launcher if ranks > 1 else ()), *PROGRAM,
               f"--pretrained_model_name_or_path={embedded.folder(name)}", f"--train_data_dir={data}",
               f"--output_dir={cache / 'output'}", f"--cache_dir={cache}",
               f"--max_train_steps={options.steps}", *FLAGS.split(), *flags, *further.split()]  # fmt: skip
    wall_seconds = follow(command, device, cache)["wall_seconds"]
    run = run_folder.RunFolder(cache / "output")
    steady = run.steps[warmup_steps(len(run.steps)) :]
    speed = throughput.images_per_second(steady.images, steady.seconds)
    result = dict(
        setting=setting, value=value, images_per_second=speed.value, low=speed.low, high=speed.high,
        peak_gib=max(rank["peak_memory_gib"] for rank in run.summary["ranks"]),
        predicted_gib=memory.predict(run.config, device, run.config.fold_micro_batches).total_gib,
        wall_seconds=wall_seconds,
    )  # fmt: skip
    shutil.rmtree(cache)
    return result


def plot(results: pd.DataFrame, title: str) -> Chart:
    settings = [setting for setting in LABELS if (results.setting == setting).any()]
    caption = "Bars: 95 % confidence intervals within a run. Dashed: peak memory predicted before the start."
    chart = Chart(title, caption, 5.2)
    grid = chart.panels(2, len(settings), sharex="col", sharey="row")
    for column, setting in zip(grid.T, settings):
        chosen = results[results.setting == setting].sort_values("value")
        above = [chosen.images_per_second - chosen.low, chosen.high - chosen.images_per_second]
        column[0].errorbar(chosen.value, chosen.images_per_second, above, color=BLUE, marker="o", ms=4, capsize=2)
        column[1].plot(chosen.value, chosen.peak_gib, color=BLUE, marker="o", ms=4)
        column[1].plot(chosen.value, chosen.predicted_gib, color=GREY, ls="--")
        column[1].set_xscale("log", base=2)
        column[1].set_xticks(chosen.value, map(str, chosen.value), fontsize=8)
        column[1].minorticks_off()
        column[1].set_xlabel(LABELS[setting], fontsize=9)
    for axes in grid.flat:  # after everything is drawn, because a row shares its scale
        axes.set_ylim(0)
    grid[0, 0].set_ylabel("images/s, all ranks")
    grid[1, 0].set_ylabel("peak memory of a rank, GiB")
    return chart


def save(results: list[dict[str, Any]], about: dict[str, Any], path: str) -> None:
    frame = pd.DataFrame(results)
    plot(frame, about["title"]).savefig(f"{path}.png")
    lines = ["| setting | | images/s | peak memory, GiB | predicted, GiB |", "|---" * 5 + "|"]
    for row in frame.itertuples():
        speed = throughput.Estimate(row.images_per_second, row.low, row.high)
        lines.append(f"| {row.setting} | {row.value} | {speed} | {row.peak_gib:.2f} | {row.predicted_gib:.2f} |")
    about_each = f"{about['steps']} steps per run, with these flags: `{about['flags']}`."
    write(path, "\n".join([*lines, "", about_each]), about, runs=results)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--python", type=a_python, default=sys.executable, help="Python that runs sdnb")
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument(
        "--vary", nargs="+", choices=list(LABELS), default=list(LABELS), help="settings to vary, one at a time"
    )
    parser.add_argument("--flags", default="", help='additional sdnb flags for every run: --flags="--name …"')
    parser.add_argument("--steps", type=at_least(3), default=31, help="optimizer steps per run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many minutes")
    options = parser.parse_args()
    ends, (side, device, further) = time.monotonic() + 60 * options.minutes, MODELS[options.model]
    further = f"{further} {options.flags}".rstrip()
    with tempfile.TemporaryDirectory(prefix="sdnb-growth-") as work:
        try:
            seen = inspect(options.python, device, {PROGRAM}, Path(work))
            ranks = len(seen["devices"]["names"]) if device != "cpu" else os.cpu_count() or 1
            title = f"How the cost grows: {options.model} at {side}×{side}, batch 8, {device}"
            about = describe(title, seen, steps=options.steps, flags=f"{FLAGS}{further}")
            results: list[dict[str, Any]] = []
            failed: list[str] = []
            for setting in options.vary:
                for value in points(side, ranks)[setting]:
                    if time.monotonic() > ends:
                        failed.append(f"{setting} = {value} ({options.minutes:g} minutes are over)")
                        continue
                    try:
                        result = measure(options.model, setting, value, options, device, further, Path(work))
                    except (RuntimeError, errors.SdnbError) as error:
                        failed.append(f"{setting} = {value}")
                        print(f"{failed[-1]}: {error}", file=sys.stderr)
                        continue
                    results.append(result)
                    print(json.dumps(result), flush=True)
                    save(results, about, file_of(options, "growth", options.model))
            if failed:
                sys.exit(f"error: not measured: {', '.join(failed)}")
        except (RuntimeError, errors.SdnbError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
