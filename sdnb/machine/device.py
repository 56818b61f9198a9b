"""What a device does and uses: the matrix-product rate that it really reaches, its memory, its energy."""

import contextlib
import ctypes
import math
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdnb.machine import onednn_linear

_ROUNDS, _PRODUCTS = 3, 4  # products per round, at least
_ROUND_SECONDS = 0.1  # about, at least
_TOO_LONG = 0.5  # seconds for one product, as on a processor without half precision: then one is enough


def measured_matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of square matrix products on the device, in TFLOP/s: of the fastest round, with the faster library."""
    side = 1024 if device.type == "cpu" else 8192  # large enough to keep the device busy
    # Random, as in a model: with zeros an A100 draws less power, and reached 295 TFLOP/s instead of 257
    # (thonking.ai/p/strangely-matrix-multiplications).
    generator = torch.Generator(device).manual_seed(0)
    one, other = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    multiply = onednn_linear.as_convolution if onednn_linear.pays(device, dtype) else torch.matmul

    def seconds(products: int) -> float:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(products):
            multiply(one, other)
        _synchronize(device)
        return (time.perf_counter() - began) / products

    once = min(seconds(1), seconds(1))  # the first is a warm-up
    products = max(_PRODUCTS, math.ceil(_ROUND_SECONDS / once))
    fastest = once if once > _TOO_LONG else min(seconds(products) for _ in range(_ROUNDS))
    return 2 * side**3 / fastest / 1e12


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Make this process keep the host memory that it frees, if the C library is glibc (mallopt(3)). By default glibc
    returns large blocks to the system at once, and each page of the next block costs a page fault and zeroing. glibc's
    own variables for this take precedence."""
    if {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX in glibc's malloc.h
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def release_freed_memory() -> None:
    """Return freed memory to the system: a GPU's, and the host's (malloc_trim(3))."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def nvml_of(device: torch.device) -> tuple[Any, Any] | None:
    """NVML and its handle of a GPU; None if there is none."""
    if device.type != "cuda" or torch.version.hip:
        return None
    with contextlib.suppress(Exception):  # no driver, or a torch that does not know the UUID
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return None


class EnergyMeter:
    """The energy counter of a GPU, read through NVML (NVIDIA since Volta, nvidia-ml-py). False if there is none."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._read = device, None
        if nvml := nvml_of(device):
            library, handle = nvml
            read = partial(library.nvmlDeviceGetTotalEnergyConsumption, handle)
            with contextlib.suppress(Exception):  # no counter
                self._before = read() / 1000
                self._read = read

    def __bool__(self) -> bool:
        return self._read is not None

    def joules(self) -> float:
        """Energy since the last call, in J; NaN without a counter. It waits for the device."""
        if not self:
            return math.nan
        _synchronize(self._device)
        before, self._before = self._before, self._read() / 1000
        return self._before - before


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """The peak memory of this process so far: allocated, and reserved. On a CPU both are its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    # ru_maxrss would not do: it starts with the value of the parent process.
    resident = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    return resident, resident
