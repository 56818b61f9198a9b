"""What torch asks the C++ part of a backend for. This backend has none, so it replaces the functions that ask."""

import functools

import torch
from torch.utils._device import _device_constructors

from . import devices, generators, npu


def apply() -> None:
    torch.Generator, torch.Event, torch.Stream = generators.Generator, _Event, npu.Stream
    _device_constructors()  # torch remembers these functions as they are, for `with torch.device(…)`
    for owner, name in ((torch.Tensor, "to"), (torch, "tensor"), (torch, "as_tensor")):
        setattr(owner, name, _on_current_device(getattr(owner, name)))
    torch.Tensor.new_tensor = _on_own_device(torch.Tensor.new_tensor)
    for name, function in _ACCELERATOR.items():
        setattr(torch._C, f"_accelerator_{name}", function)
    torch.serialization.register_package(11, lambda storage: None, _load)


def _on_current_device(function):
    """torch takes npu for npu:0 here."""

    @functools.wraps(function)
    def on_current_device(*args, **kwargs):
        return function(*map(_indexed, args), **{name: _indexed(value) for name, value in kwargs.items()})

    return on_current_device


def _on_own_device(function):
    @functools.wraps(function)
    def on_own_device(tensor, data, *, device=None, **options):
        return function(tensor, data, device=_indexed(tensor.device if device is None else device), **options)

    return on_own_device


def _indexed(value):
    without_index = isinstance(value, (str, torch.device)) and str(value) == "npu"
    return torch.device("npu", devices.current()) if without_index else value


def _load(storage: torch.UntypedStorage, location: str):
    """A storage that torch.load has read, on the device that it was on. torch would ask for memory there."""
    if location.startswith("npu"):
        on_host = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        return on_host.to(location).untyped_storage()


class _Event(npu.Event):
    def __init__(self, device=None, *, enable_timing=False, blocking=False, interprocess=False) -> None:
        super().__init__(enable_timing)


def _exchange(index: int) -> int:
    before = devices.current()
    if index >= 0:
        devices.select(index)
    return before


_ACCELERATOR = {  # torch.accelerator
    "synchronizeDevice": lambda index: npu.synchronize(index),
    "getDeviceIndex": devices.current,
    "setDeviceIndex": devices.select,
    "exchangeDevice": _exchange,
    "maybeExchangeDevice": _exchange,
    "getStream": npu.current_stream,
    "setStream": npu.set_stream,
    "isAllocatorInitialized": npu.is_initialized,
    "emptyCache": npu.empty_cache,
    "getDeviceStats": lambda index: npu.memory_stats(index),
    "resetPeakStats": lambda index: npu.reset_peak_memory_stats(index),
    "resetAccumulatedStats": lambda index: None,
    "getMemoryInfo": lambda index: npu.mem_get_info(index),
}
