"""What a device does and uses: the matrix-product rate that it really reaches, its energy, the host's memory."""

import contextlib
import ctypes
import logging
import math
import os
import time

import torch

from sdnb.machine import onednn_linear
from sdnb.machine.device_kind import kind_here, kind_of, with_index

logger = logging.getLogger("sdnb")

# What the weights that are not trained are kept in, by `mixed_precision`.
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ROUNDS, _PRODUCTS = 3, 4  # products per round, at least
_ROUND_SECONDS = 0.1  # about, at least
_SIDE, _LARGER, _TOO_SHORT = 1024, 8, 0.005  # of a matrix; eight times as long if a product takes fewer seconds
_TOO_LONG = 0.5  # seconds for one product, as on a processor without half precision: then one is enough


def measured_matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of square matrix products on the device, in TFLOP/s: of the fastest round, with the faster library."""
    kind = kind_of(device.type)
    multiply = onednn_linear.as_convolution if onednn_linear.pays(device, dtype) else torch.matmul
    # Random, as in a model: with zeros an A100 draws less power, and reached 295 TFLOP/s instead of 257
    # (thonking.ai/p/strangely-matrix-multiplications).
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(_SIDE, _SIDE, generator=generator).to(device, dtype) for _ in range(2))

    def seconds(products: int) -> float:
        kind.synchronize(device)
        began = time.perf_counter()
        for _ in range(products):
            multiply(one, other)
        kind.synchronize(device)
        return (time.perf_counter() - began) / products

    once = min(seconds(1), seconds(1))  # the first is a warm-up
    if not kind.is_host and once < _TOO_SHORT:
        one, other = (matrix.repeat(_LARGER, _LARGER) for matrix in (one, other))
        once = min(seconds(1), seconds(1))
    products = max(_PRODUCTS, math.ceil(_ROUND_SECONDS / once))
    fastest = once if once > _TOO_LONG else min(seconds(products) for _ in range(_ROUNDS))
    return 2 * len(one) ** 3 / fastest / 1e12


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
    """Return freed memory to the system: the device's, and the host's (malloc_trim(3))."""
    kind_here().empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says so. torch has a type for its allocator on GPUs; on the host, and in some vendors'
    packages, only the message tells."""
    said = isinstance(error, RuntimeError) and ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error))
    return said or isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))


class EnergyMeter:
    """Reads a device's energy counter. False if it has none."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._kind = with_index(device), kind_of(device.type)
        self._read = self._kind.energy_counter(self._device)
        self._before = self._read() if self._read else math.nan

    def __bool__(self) -> bool:
        return self._read is not None

    def joules(self) -> float:
        """Energy since the last call, in J; NaN without a counter. It waits for the device."""
        if self._read is None:
            return math.nan
        self._kind.synchronize(self._device)
        try:
            before, self._before = self._before, self._read()
        except Exception as error:  # of a driver, or of a vendor's own package: no run ends for it
            logger.warning("the energy counter of %s cannot be read any more: %s", self._device, error)
            self._read = None
            return math.nan
        return self._before - before
