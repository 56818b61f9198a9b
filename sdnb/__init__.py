"""sdnb: fine-tune Stable Diffusion from a notebook, and measure how fast a machine does it.

`sdnb.train(…)` trains and returns a `Run`; `sdnb.Run(folder)` is an earlier one; `sdnb.runs()` is a table of all runs;
`sdnb.compare(…)` compares some of them, also with what others published: `sdnb.published()`.
`sdnb.audit(…)` checks claims about a training against its log; `sdnb.check()` tries what this machine measures with.
"""

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdnb.auditing.audit import audit as audit
    from sdnb.conformance.check import check as check
    from sdnb.launch.notebook import train as train
    from sdnb.report.run import Run as Run
    from sdnb.report.run import runs as runs
    from sdnb.run.baselines import published as published
    from sdnb.run.comparison import compare as compare

__version__ = "0.2.0"

# A notebook is a document, so the libraries' remarks while loading stay out of it. The user's own choice goes first.
for _library in ("TRANSFORMERS", "DIFFUSERS", "DATASETS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore", message="IProgress not found")


# Imported only when they are used: a rank has no use for them.
_PUBLIC = {
    "Run": "report.run", "audit": "auditing.audit", "check": "conformance.check", "compare": "run.comparison",
    "published": "run.baselines", "runs": "report.run", "train": "launch.notebook",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"sdnb.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'sdnb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
