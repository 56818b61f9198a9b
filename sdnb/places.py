"""Where runs are kept, and where the notebooks and parameter files of sdnb lie."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
CLONE = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").exists() else None  # None: installed from a wheel


def workspace() -> Path:
    """The folder of a user's notebooks, parameter files and runs: the clone if the current folder is in it, else the
    current folder."""
    here = Path.cwd()
    return CLONE if CLONE and here.resolve().is_relative_to(CLONE) else here


def runs_folder() -> Path:
    """The folder of all runs: the variable SDNB_RUNS, or `runs` in the workspace."""
    given = os.environ.get("SDNB_RUNS")
    return Path(given).expanduser().absolute() if given else workspace() / "runs"


def shipped(name: str) -> Path:
    """A folder or file that comes with sdnb, such as `notebooks/train.ipynb`."""
    return (CLONE or _PACKAGE) / name
