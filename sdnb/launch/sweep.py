"""A grid of settings. Each combination is an executed notebook: `sdnb sweep params/sweep-batch.yaml`.

The file has the common settings, and under `grid` the swept ones, each with its values:

    pretrained_model_name_or_path: tiny
    dataset_name: openmoji
    steps: 21
    grid:
      train_batch_size: [1, 2, 4, 8]
      num_processes: [1, 2]

A failed run does not stop the rest. A complete run is not repeated, unless a setting has changed.
"""

import base64
import glob
import itertools
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from sdnb.errors import ConfigError, RunError
from sdnb.places import runs_folder, shipped
from sdnb.report.page import write_page
from sdnb.run.folder import STEPS, SUMMARY
from sdnb.run.repeats import REPEATS
from sdnb.settings.config import TrainConfig, read_yaml
from sdnb.settings.flags import found

EXECUTED = "train.ipynb"  # in the folder of each run
# When a sweep is killed, its notebook and the training in it end, too.
_PAPERMILL = """
from sdnb.machine.watchdog import end_with_parent
end_with_parent()
from papermill.__main__ import papermill
papermill()
"""


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep: the settings of each, by the name of its folder."""

    name: str
    file: str
    swept: tuple[str, ...]
    runs: dict[str, dict[str, Any]]


def load(path: str | Path) -> Sweep:
    """Raises ConfigError if the file has no grid, or its settings are wrong."""
    source, read = Path(path), read_yaml(found(path))
    grid = read.pop("grid", None)
    if not (isinstance(grid, dict) and grid and all(isinstance(one, list) and one for one in grid.values())):
        raise ConfigError(f"{path}: has no grid: settings under `grid:`, each with a list of values, such as [1, 2, 4]")
    if both := set(grid) & set(read):
        raise ConfigError(f"{path}: {', '.join(sorted(both))}: both in the grid and beside it; remove one")
    combinations = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values))
        try:
            TrainConfig(**read, **chosen)  # all are checked before the first runs
        except ConfigError as error:
            raise ConfigError(f"{path}, {chosen}: {error}") from None
        name = ",".join(f"{setting}={str(value).replace('/', '_')}" for setting, value in chosen.items())
        combinations[name] = {**read, **chosen}
    swept = tuple("max_train_steps" if name == "steps" else name for name in grid)
    return Sweep(source.stem, str(path), swept, combinations)


def run(
    sweep: Sweep, folder: str | Path | None = None, say: Callable[[str], None] = print
) -> tuple[Path, dict[str, str]]:
    """Run what is not complete yet in `folder` (default: `runs/<name of the sweep>`), and then the comparison, as a
    notebook and as a page. Returns the page, and for each failed run the reason. Raises RunError if fewer than two
    succeeded, so that there is nothing to compare."""
    target = Path(folder).expanduser().absolute() if folder else runs_folder() / sweep.name
    failed = run_each(sweep.runs, target, say)
    complete = [str(target / name) for name in sweep.runs if name not in failed]
    if len(complete) < 2:
        raise RunError(f"{target}: only {len(complete)} of {len(sweep.runs)} runs succeeded, too few to compare")
    notebook = target / "comparison.ipynb"
    if reason := _execute(shipped("notebooks/compare.ipynb"), notebook, {"runs": complete, "swept": list(sweep.swept)}):
        raise RunError(f"{notebook}: {reason}")
    title = f"{sweep.name}: {len(complete)} runs over {', '.join(sweep.swept)}"
    besides = {"title": title, "reproduce": [f"sdnb sweep {shlex.quote(sweep.file)}"]}
    page, *_ = write_page(notebook, target / f"{sweep.name}.html", besides)
    return page, failed


def run_each(runs: dict[str, dict[str, Any]], target: Path, say: Callable[[str], None] = print) -> dict[str, str]:
    """Run what is not complete yet, each with its settings in a folder of its name. Returns for each failed run the
    reason."""
    failed: dict[str, str] = {}
    for number, (name, settings) in enumerate(runs.items(), 1):
        where = target / name
        parameters = {**settings, "output_dir": str(where)}
        if _is_complete(where, parameters):
            say(f"{number} of {len(runs)}: {name}: complete already")
            continue
        say(f"{number} of {len(runs)}: {name}")
        if any(where.rglob(STEPS)):  # keep the measurements of a failed run, or of other settings
            before = len(list(target.glob(f"{glob.escape(name)}.before-*")))
            where.rename(target / f"{name}.before-{before + 1}")
        where.mkdir(parents=True, exist_ok=True)
        if reason := _execute(shipped("notebooks/train.ipynb"), where / EXECUTED, parameters):
            failed[name] = reason
            say(f"    failed: {reason}")
    return failed


def _is_complete(where: Path, parameters: dict[str, Any]) -> bool:
    """Whether the folder has a complete run with these parameters."""
    if not ((where / EXECUTED).exists() and any((where / name).exists() for name in (SUMMARY, REPEATS))):
        return False
    return nbformat.read(where / EXECUTED, as_version=4).metadata.papermill.parameters == parameters


def _execute(notebook: Path, out: Path, parameters: dict[str, Any]) -> str | None:
    """Execute a notebook in another process. Returns the last line of an error, if there was one."""
    encoded = base64.b64encode(yaml.safe_dump(parameters).encode()).decode()
    command = [sys.executable, "-c", _PAPERMILL, str(notebook), str(out), "--no-progress-bar", "-b", encoded]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "unknown reason")
