"""Accelerators that are wrong in one thing each: STAND_IN_FAULT=<name of a function here>."""

import time

import torch

from . import copies, devices, distributed, kernels, memory, npu

FAULTS = {}


def apply(name: str) -> None:
    if name not in FAULTS:
        raise ValueError(f"STAND_IN_FAULT = {name}: there are {', '.join(sorted(FAULTS))}")
    FAULTS[name]()


def _fault(function):
    FAULTS[function.__name__] = function
    return function


# waiting and time


@_fault
def no_synchronize() -> None:
    """synchronize returns at once."""
    npu.synchronize = lambda where=None: None


@_fault
def host_clock() -> None:
    """An event has the host's time of when it was recorded, not the device's of when the device gets there."""

    def record(event, stream=None) -> None:
        event._device, event._reached = devices.used(stream and stream.device), time.perf_counter()

    npu.Event.record = record


@_fault
def stale_copy() -> None:
    """A copy to the device that does not block reads the host's memory late, even if it is not pinned."""
    copies.read_late = lambda source: True


# memory


@_fault
def memory_in_mib() -> None:
    """The figures are MiB times a million, in place of bytes."""
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        exact = getattr(npu, name)
        setattr(npu, name, lambda where=None, exact=exact: int(exact(where) / 2**20 * 10**6))


@_fault
def peak_not_reset() -> None:
    memory.Memory.reset_peaks = lambda figures: None


@_fault
def never_frees() -> None:
    memory.Memory.give_back = lambda figures, size: None


# random numbers


@_fault
def generator_not_restored() -> None:
    npu.set_rng_state = lambda new_state, device="npu": None


@_fault
def seed_ignored() -> None:
    npu.manual_seed_all = lambda seed: None


# precision


@_fault
def scaler_never_skips() -> None:
    """The check for gradients that are not finite finds none."""

    def unscale(op, held):
        return op(**held | {"found_inf": held["found_inf"].clone()})

    kernels.computed_by["aten::_amp_foreach_non_finite_check_and_unscale_"] = unscale


@_fault
def saturates() -> None:
    """A product that overflows float16 is its largest number, not infinity, as in Ascend's saturation mode."""

    def compute(op, held):
        half = any(isinstance(value, torch.Tensor) and value.dtype == torch.float16 for value in held.values())
        values = kernels.in_float32(op, held)
        most = torch.finfo(torch.float16).max
        for value in (values if isinstance(values, tuple) else (values,)) if half else ():
            if value is not None:
                value.clamp_(-most, most)
        return values

    _products(compute)


@_fault
def bf16_claimed() -> None:
    """It says that it has bfloat16, and its matrix products take the bits for float16."""

    def compute(op, held):
        return kernels.in_float32(op, {name: kernels.each(_as_float16, value) for name, value in held.items()})

    _products(compute)


@_fault
def wrong_norm() -> None:
    """Group normalisation in half precision is off by one percent."""

    def compute(op, held):
        normed, *others = op(**held)
        return normed * 1.01 if normed.dtype.itemsize == 2 else normed, *others

    kernels.computed_by["aten::native_group_norm"] = compute


@_fault
def gelu_by_tanh() -> None:
    """GELU is always its approximation, as with the real torch_npu."""
    for name in ("gelu", "gelu_backward"):
        kernels.computed_by[f"aten::{name}"] = lambda op, held: op(**held | {"approximate": "tanh"})


@_fault
def weights_in_half() -> None:
    """The optimizer rounds the weights to bfloat16."""

    def compute(op, held):
        op(**held)
        for weight in held["self"]:
            weight.copy_(weight.bfloat16())

    for name in ("_foreach_addcdiv_", "_fused_adamw_"):
        kernels.computed_by[f"aten::{name}"] = compute


def _products(compute) -> None:
    for name, usual in kernels.computed_by.items():
        if usual is kernels.in_float32:
            kernels.computed_by[name] = compute


def _as_float16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor


# collectives


@_fault
def lost_rank() -> None:
    """A sum over the ranks is a rank's own value."""
    distributed.HcclGroup.allreduce = lambda group, tensors, *_: distributed.done(tensors)


@_fault
def wrong_sum() -> None:
    """A sum over the ranks is a rank's own value, times the number of ranks."""

    def allreduce(group, tensors, *_):
        return distributed.done([tensor.mul_(group.size()) for tensor in tensors])

    distributed.HcclGroup.allreduce = allreduce
