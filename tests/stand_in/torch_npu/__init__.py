"""A stand-in for Ascend's torch_npu: a device type npu that behaves as an accelerator does, and computes on the CPU.

It takes no C++. With this folder's parent in PYTHONPATH, `import torch_npu` adds the device to torch, as the real one
does. Environment variables: STAND_IN_DEVICES (number, default 1), STAND_IN_MEMORY_GIB (of each, default 4) and
STAND_IN_FAULT (one thing that it does wrong, see faults.py). OMP_NUM_THREADS=1 makes it much faster on a busy machine.
"""

import os

from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from . import autocast, distributed, faults, kernels, npu, patches
from .operators import npu_fusion_attention, npu_geglu  # noqa: F401

__version__ = "2.13.0"

_setup_privateuseone_for_python_backend("npu", npu)
_libraries = [*kernels.register(), *autocast.register()]
distributed.register()
patches.apply()
if name := os.environ.get("STAND_IN_FAULT"):
    faults.apply(name)


def _autoload() -> None:
    """`import torch` calls it, as the package's metadata ask for. It has nothing left to do."""
