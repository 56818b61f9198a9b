"""Copies between the host and a device, and pinned memory.

A copy to the host that does not block writes when the queue runs. So does one to the device read, if it comes from
pinned memory: a device gets what is there then. From other memory it gets what is there at the call, as with CUDA.
"""

import torch

from . import devices, memory


def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """target.copy_(source)"""
    if source.device.type == "meta" or target.device.type == "meta":
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    if source.shape != target.shape:
        source = source.expand_as(target)
    if target.device.type == "npu":
        on = devices.used(target.device)
        on.launch(_copying(memory.on_host(target), _held(source, on, non_blocking)))
    else:
        on = devices.used(source.device)
        on.launch(_copying(target, memory.on_host(source)))
        if not non_blocking:
            on.run()
    return target


def _copying(target: torch.Tensor, source: torch.Tensor):
    return lambda: target.copy_(source)


def _held(source: torch.Tensor, on, non_blocking: bool) -> torch.Tensor:
    """What a copy to a device reads when it runs."""
    if source.device.type == "npu":
        if source.device.index != on.index:
            devices.used(source.device).run()
        return memory.on_host(source)
    return source if non_blocking and read_late(source) else source.clone()


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return copy(target, source, non_blocking)


def to_copy(source, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    """source.to(…), of a device tensor"""
    shape = torch.empty_strided(source.size(), source.stride(), dtype=source.dtype, device="meta")
    shape = torch.ops.aten._to_copy(shape, dtype=dtype, memory_format=memory_format)
    where = source.device if device is None else device
    if where.type == "meta":
        return shape
    target = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype, device=where)
    if where.type == "cpu":
        target.untyped_storage().fill_(memory.RAW)
        target.untyped_storage().pinned = non_blocking
    return copy(target, source, non_blocking)


def is_pinned(tensor: torch.Tensor, device=None) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


read_late = is_pinned


def pin_memory(tensor: torch.Tensor, device=None) -> torch.Tensor:
    pinned = torch.empty_like(tensor, device="cpu").copy_(tensor)
    pinned.untyped_storage().pinned = True
    return pinned
