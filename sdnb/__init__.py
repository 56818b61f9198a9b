"""sdnb: fine-tune Stable Diffusion from a notebook, and measure how fast a machine does it.

`sdnb.Run(folder)` is a run, `sdnb.runs()` the table of all.
"""

import os
import warnings
from typing import Any

__version__ = "0.1.0"

# A notebook is a document: what the libraries only remark while they load stays out of it. A user's choice goes first.
for _library in ("TRANSFORMERS", "DIFFUSERS", "DATASETS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore", message="IProgress not found")


def __getattr__(name: str) -> Any:
    if name in ("Run", "runs"):  # when they are asked for: a training has no use for them
        from sdnb.report import run

        return getattr(run, name)
    raise AttributeError(f"module 'sdnb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Run", "runs"])
