"""What a device does and uses: the matrix-product rate that it really reaches, its memory, its energy."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import time
from pathlib import Path
from typing import Any

import torch

from sdnb.machine import onednn_linear

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h

_SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices: large enough to keep the device busy
_ROUNDS, _PRODUCTS = 3, 4  # of a round at the least
_ROUND = 0.1  # seconds, about, at the least
_TOO_LONG = 0.5  # seconds for one product, to measure several


def reachable_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of products of two square matrices on the device, in TFLOP/s: the fastest of a few rounds, by the
    faster library."""
    side = _SIDES.get(device.type, _SIDES["cuda"])
    # Random, as what a model multiplies: with zeros an A100 draws less power, and reached 295 TFLOP/s instead of 257
    # (thonking.ai/p/strangely-matrix-multiplications).
    generator = torch.Generator(device).manual_seed(0)
    one, other = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    multiply = onednn_linear.as_convolution if onednn_linear.pays(device, dtype) else torch.matmul

    def seconds(products: int) -> float:
        _wait_for(device)
        began = time.perf_counter()
        for _ in range(products):
            multiply(one, other)
        _wait_for(device)
        return (time.perf_counter() - began) / products

    once = min(seconds(1), seconds(1))  # the first is a warm-up
    # A processor that does without half precision takes seconds for a product.
    products = max(_PRODUCTS, math.ceil(_ROUND / once))
    fastest = once if once > _TOO_LONG else min(seconds(products) for _ in range(_ROUNDS))
    return 2 * side**3 / fastest / 1e12


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Have this process keep the memory on the host that it frees, where the C library is glibc (mallopt(3)). It gives
    large blocks back to the system at once, and every page of the next one costs a page fault and zeroing."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Give the memory that this process has freed back to the system, a GPU's and the host's (malloc_trim(3))."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class EnergyMeter:
    """The energy that a GPU has used, by the counter that NVML reads (NVIDIA, since Volta; the package nvidia-ml-py).
    Where there is none it reads nothing."""

    def __init__(self, device: torch.device) -> None:
        self._handle, self._device = None, device
        if device.type != "cuda" or torch.version.hip:
            return
        with contextlib.suppress(Exception):  # no driver, no counter, or a torch that does not say the UUID
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._nvml, handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._before = self._joules(handle)
            self._handle = handle

    def __bool__(self) -> bool:
        return self._handle is not None

    def joules(self) -> float:
        """Since the last time that this was asked, the device having come to rest; NaN where nothing is read."""
        if not self:
            return float("nan")
        _wait_for(self._device)
        before, self._before = self._before, self._joules(self._handle)
        return self._before - before

    def _joules(self, handle: Any) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def peak_bytes(device: torch.device) -> list[int]:
    """A rank's peak memory so far: what was allocated, and what was reserved for that."""
    if device.type == "cuda":
        return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    # ru_maxrss would not do: it begins with that of the process which started this one.
    status = Path("/proc/self/status").read_text()
    return [int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024] * 2
