"""What do the live display and the recording cost? Trains from a notebook's kernel, as train.ipynb does, and measures:

- the CPU time of the kernel from launch to end, as a share of the CPU time that all cores have in this period. The
  kernel uses it only to follow the run and show it.
- the phase `other` in the run's own records, as a share of the steps' time. In this phase the run reads the losses,
  writes the record of the step and updates the trackers.

    python benchmarks/overhead.py --steps 101 --rounds 3

The first run is not counted. It encodes the images for the other runs. A browser that shows the notebook is not counted
either. The machine should do nothing else.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import common
import nbformat
import numpy as np
from common import at_least, describe, file_of, write
from nbclient import NotebookClient

from sdnb.run import folder as run_folder

SETTINGS = dict(
    pretrained_model_name_or_path="tiny", dataset_name="openmoji", resolution=64, center_crop=True, random_flip=True,
    train_batch_size=8, gradient_accumulation_steps=4, use_ema=True, learning_rate=1e-5, lr_warmup_steps=0, seed=42,
)  # fmt: skip
CELL = """
import json, resource, time
from sdnb.settings.config import TrainConfig

plan = prepare(TrainConfig(**settings))
used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
launch(plan)
now, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
print(json.dumps({"cpu_seconds": now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime, "seconds": seconds}))
"""


def measure(steps: int, folder: Path) -> dict[str, float]:
    """Measure one run from a kernel. Returns the shares of the display and of the recording."""
    settings = {**SETTINGS, "steps": steps, "output_dir": str(folder), "cache_dir": str(folder.parent)}
    cell = nbformat.v4.new_code_cell(f"settings = {settings!r}\n{CELL}")
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=metadata)
    NotebookClient(notebook, timeout=None).execute()
    printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
    kernel, recorded = json.loads(printed), run_folder.RunFolder(folder).steps
    return {
        "display": kernel["cpu_seconds"] / kernel["seconds"] / len(os.sched_getaffinity(0)),
        "recording": sum(phases["other"] for phases in recorded.phase_seconds) / recorded.seconds.sum(),
        "steps_seconds": recorded.seconds.sum(),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=at_least(1), default=101)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sdnb-overhead-") as work:
        rounds = []
        measure(options.steps, Path(work) / "first")
        for number in range(options.rounds):
            rounds.append(measure(options.steps, Path(work) / str(number)))
            print(json.dumps(rounds[-1]), flush=True)
    about = describe("Live display and recording", steps=options.steps, settings=SETTINGS)
    lines = ["| | share of the run, median (lowest to highest) |", "|---|---|"]
    for name, what in (("display", "following and showing, CPU time"), ("recording", "recording, wall time")):
        shares = np.array([one[name] for one in rounds]) * 100
        lines.append(f"| {what} | {np.median(shares):.2f} % ({shares.min():.2f} to {shares.max():.2f}) |")
    text = "\n".join([*lines, "", f"{options.rounds} runs of {options.steps} steps."])
    write(file_of(options, "overhead"), text, about, rounds=rounds)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
