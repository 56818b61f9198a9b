"""sdnb: fine-tune Stable Diffusion from a notebook, and measure how fast a machine does it.

`sdnb.Run(folder)` is a run, `sdnb.runs()` is a table of all runs.
"""

import os
import warnings
from typing import Any

__version__ = "0.2.0"

# A notebook is a document, so the libraries' remarks while loading stay out of it. The user's own choice goes first.
for _library in ("TRANSFORMERS", "DIFFUSERS", "DATASETS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore", message="IProgress not found")


def __getattr__(name: str) -> Any:
    if name in ("Run", "runs"):  # only when needed: a training has no use for them
        from sdnb.report import run

        return getattr(run, name)
    raise AttributeError(f"module 'sdnb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Run", "runs"])
