"""What a device and its torch must be able to do, tried without a model. Each check returns its finding."""

import math
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdnb.auditing.case import HOLDS, UNKNOWN, Finding, judged
from sdnb.machine.device import WEIGHT_DTYPES, EnergyMeter, measured_matmul_tflops
from sdnb.machine.device_kind import HOST, DeviceKind
from sdnb.machine.peaks import peak_tflops

_JOB_SECONDS, _MOST_PRODUCTS, _PRODUCT_SECONDS, _SIDE = 0.3, 60, 5e-3, 512  # _SIDE is the smallest
_MEMORY_BYTES = 256 * 2**20
# Relative errors of a product of 512 numbers, of the largest result: float32, and TF32, which has 10 bits.
_FLOAT32, _TF32 = 1e-5, 2e-3
_HALF = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_GELU_BY_TANH = 2e-4
_NORM = 2e-3  # of a norm whose input is rounded to half precision, and whose result is not
_ABOVE_PEAK = 1.15  # cards for players run faster clocks than their data sheet: RTX 5090s reached 1.13 of it
_WATTS = (1.0, 3000.0)
_POWER_SECONDS = 2.0  # counters advance several times in it
_GELU = "GELU"


class Device:
    """A device under test."""

    def __init__(self, device: torch.device, kind: DeviceKind, name: str) -> None:
        self.device, self.kind, self.name = device, kind, name
        self._jobs = 0

    def job(self) -> Tensor:
        """Hand work of about 0.3 s to the device, without waiting for it. Each time the result is another."""
        factor, products = self._work
        self._jobs += 1
        return _multiplied(factor, products, self._jobs)

    @cached_property
    def _work(self) -> tuple[Tensor, int]:
        """A matrix and how often to multiply by it. A product takes far longer than to hand it over: else the device
        would have done its work when the host has handed it over."""
        side = _SIDE // 2
        each = 0.0
        while each < _PRODUCT_SECONDS:
            side *= 2
            factor = torch.eye(side, device=self.device) - 2 / side  # a reflection: its powers neither grow nor vanish
            each = min(self.seconds(partial(_multiplied, factor, 10)) for _ in range(3)) / 10
        return factor, min(_MOST_PRODUCTS, math.ceil(_JOB_SECONDS / each))

    def seconds(self, function: Callable[[], Any]) -> float:
        """The time from the hand-over of work until a value of its result is on the host."""
        began = time.perf_counter()
        function()[0, 0].item()
        return time.perf_counter() - began

    def wait(self) -> None:
        self.kind.synchronize(self.device)


def _multiplied(factor: Tensor, products: int, scale: float = 1.0) -> Tensor:
    result = scale * factor
    for _ in range(products):
        result = factor @ result
    return result


def synchronization(tried: Device) -> Finding:
    """After a synchronization the device has done its work, also a copy to the host that nobody waited for."""
    took = min(tried.seconds(tried.job) for _ in range(3))
    began = time.perf_counter()
    tried.job()
    handed_over = time.perf_counter() - began
    tried.wait()
    waited = time.perf_counter() - began
    wrong = []
    if waited < took / 2:
        wrong.append(f"a synchronization came back {waited:.3f} s after the hand-over of work that takes {took:.3f} s")
    result = tried.job()
    copied = result.to(HOST, non_blocking=True)
    tried.wait()
    if not torch.equal(copied.clone(), result.cpu()):
        wrong.append("the copy of a result was incomplete after a synchronization")
    return judged(
        "synchronization", wrong, f"work of {took:.2f} s was handed over in {handed_over:.3f} s, and waited for"
    )


def events(tried: Device) -> Finding:
    """Two events around work measure what the device took, not how fast the host handed it over."""
    if tried.kind.is_host:
        return Finding("events", HOLDS, "the host's clock times the phases: a call returns when its work is done")
    if tried.kind.event() is None:
        return Finding("events", UNKNOWN, "this kind of device has no timing events: phases are not measured")
    ratios = []
    for _ in range(3):
        tried.job()
        tried.wait()
        began, first = time.perf_counter(), tried.kind.event()
        tried.job()
        last = tried.kind.event()
        last.synchronize()
        tried.wait()
        ratios.append(first.elapsed_time(last) / 1000 / (time.perf_counter() - began))
    ratio = sorted(ratios)[1]
    said = f"events measured {ratio:.3f} of the time from the hand-over of work to its end"
    return judged("events", [] if 0.9 <= ratio <= 1.02 else [said], said)


def copies(tried: Device) -> Finding:
    """A copy to the device has the values of the moment in which it was asked for, also from memory that is not
    pinned, and however busy the device is."""
    wrong, values = [], torch.arange(2**20, dtype=torch.float32)
    source = values.clone()
    tried.job()
    copied = source.to(tried.device, non_blocking=True, copy=True)
    source.fill_(-1.0)
    tried.wait()
    if not torch.equal(copied.cpu(), values):
        wrong.append("a copy to the device has values that the host wrote later")
    tried.job()
    copied = tried.kind.pinned(values).to(tried.device, non_blocking=True)
    tried.wait()
    if not torch.equal(copied.cpu(), values):
        wrong.append("a copy from pinned memory has other values")
    return judged("copies", wrong, "they have the values of the moment in which they were asked for")


def random_numbers(tried: Device) -> Finding:
    """They depend on the seed, come back with the state, and take nothing from the host's generator."""

    def draw() -> Tensor:
        return torch.randn(10_000, device=tried.device).cpu()

    wrong = []
    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    if not torch.equal(draw(), first) or torch.equal(first, second):
        wrong.append("the same seed gives other numbers")
    if not tried.kind.is_host:
        state = tried.kind.rng_state()
        before = torch.get_rng_state()
        expected = draw()
        if not torch.equal(torch.get_rng_state(), before):
            wrong.append("they are drawn from the host's generator")
        if state is None:
            wrong.append("the state of their generator cannot be saved")
        else:
            tried.kind.set_rng_state(state)
            if not torch.equal(draw(), expected):
                wrong.append("with a state restored, other numbers come than with it saved")
    numbers = torch.cat([first, second])
    if abs(numbers.mean()) > 0.04 or abs(numbers.std() - 1) > 0.03:  # more than five standard errors
        wrong.append(f"mean {numbers.mean():.3f} and standard deviation {numbers.std():.3f}, in place of 0 and 1")
    return judged("random numbers", wrong, "they follow the seed, and come back with a saved state")


def memory(tried: Device) -> Finding:
    """The peak rises by what tensors take, and a reset forgets it."""

    def allocate() -> Tensor:
        return torch.ones(_MEMORY_BYTES // 4, device=tried.device)

    def peak() -> int:
        tried.wait()
        return tried.kind.peak_bytes(tried.device)[0]

    held = [torch.ones(1, device=tried.device)]
    if peak() == 0:
        return Finding("memory", UNKNOWN, "torch tells nothing of this device's memory")
    wrong = []
    tried.kind.reset_peak(tried.device)
    before = peak()
    count = 2 if tried.kind.is_host else 1  # the peak of a process may have been higher in the past
    held += [allocate() for _ in range(count)]
    tried.wait()
    del held[1:]
    rise = (peak() - before) / count
    least, most = (0.0, 1.1) if tried.kind.is_host else (0.99, 1.01)
    if not least * _MEMORY_BYTES <= rise <= most * _MEMORY_BYTES:
        wrong.append(f"a tensor of {_MEMORY_BYTES / 2**20:.0f} MiB raised the peak by {rise / 2**20:.1f} MiB")
    tried.kind.reset_peak(tried.device)
    after = peak()
    if not tried.kind.is_host and abs(after - before) > 0.01 * _MEMORY_BYTES:
        wrong.append(f"after a reset the peak is {(after - before) / 2**20:.1f} MiB above what is allocated")
    allocated, reserved = tried.kind.peak_bytes(tried.device)
    if reserved < allocated:
        wrong.append("less is reserved than allocated")
    free_gib, all_gib = tried.kind.free_gib()[0], tried.kind.memory_gib()[0]
    if not 0 <= free_gib <= all_gib:
        wrong.append(f"{free_gib} GiB are free of {all_gib}")
    right = f"a tensor of {_MEMORY_BYTES / 2**20:.0f} MiB raised the peak by {rise / 2**20:.1f} MiB"
    return judged("memory", wrong, right)


def float32(tried: Device) -> Finding:
    """Products, softmax and GELU, against float64 on the host."""
    products, others = ({name: _error(function, tried, torch.float32) for name, function in functions.items()}
                        for functions in (_PRODUCTS, _ONE_BY_ONE))  # fmt: skip
    said = ", ".join(f"{name} {error:.1e}" for name, error in {**products, **others}.items())
    exact = all(error <= _FLOAT32 for name, error in others.items() if name != _GELU)
    holds = exact and max(products.values()) <= _TF32 and others[_GELU] <= _GELU_BY_TANH
    notes = ["products are TF32"] * (max(products.values()) > _FLOAT32)
    notes += ["GELU is approximated, as by tanh"] * (others[_GELU] > _FLOAT32)
    right = "; ".join([f"relative errors against float64: {said}", *notes])
    return judged("float32", [] if holds else [f"relative errors: {said}"], right)


def half_precision(tried: Device, precision: str) -> Finding:
    """Products in half precision, and under autocast the layers that stay in float32."""
    dtype, wrong, said = WEIGHT_DTYPES[precision], [], []
    if not getattr(tried.kind, precision):
        return Finding(precision, UNKNOWN, f"{tried.name} does not offer it")
    for name, function in _PRODUCTS.items():
        error = _error(function, tried, dtype)
        said.append(f"{name} {error:.1e}")
        if not error <= _HALF[dtype]:
            wrong.append(f"{name}: relative error {error:.1e}")
    largest = torch.full((16, 16), torch.finfo(dtype).max, dtype=dtype, device=tried.device)
    if not (largest @ largest).isinf().all().item():
        wrong.append("a product that overflows is not infinite, so nobody would skip the step")
    inputs = _inputs(64, 32, 8, 8).to(dtype)
    exact = F.group_norm(inputs.double(), 8)
    plain = F.group_norm(inputs.to(tried.device), 8)  # as in the frozen encoders, which run without autocast
    with torch.autocast(tried.device.type, dtype):
        autocast = F.group_norm(inputs.to(tried.device), 8)
    if tried.kind.norms_in_float32 and autocast.dtype != torch.float32:
        wrong.append(
            f"autocast computes norms in {autocast.dtype}: if that is meant, set norms_in_float32 = False for this kind"
        )
    in_float32 = _NORM if tried.kind.norms_in_float32 else _HALF[dtype]
    for name, found, allowed in (("norm", plain, _HALF[dtype]), ("norm under autocast", autocast, in_float32)):
        error = _relative(found, exact)
        said.append(f"{name} {error:.1e}")
        if not error <= allowed:
            wrong.append(f"{name}: relative error {error:.1e}")
    return judged(precision, wrong, f"relative errors against float64: {', '.join(said)}")


def peak(tried: Device) -> Finding:
    """Matrix products do not run far above the peak in the table: else the table or a clock is wrong."""
    wrong, said, unknown = [], [], []
    for precision in ("no", "fp16", "bf16"):
        if precision != "no" and not getattr(tried.kind, precision):
            continue
        reached = measured_matmul_tflops(tried.device, WEIGHT_DTYPES[precision])
        name, limit = precision.replace("no", "float32"), peak_tflops(tried.name, precision)
        if limit is None:
            unknown.append(f"{name} {reached:.4g} TFLOP/s")
            continue
        said.append(f"{name} {reached:.4g} of {limit:.4g} TFLOP/s")
        if reached > _ABOVE_PEAK * limit:
            wrong.append(f"{name}: {reached:.4g} TFLOP/s were measured, and the peak is {limit:.4g}")
    if not said:
        asked = "set device_peak_tflops, and tell us the data sheet" if not tried.kind.is_host else "as for any CPU"
        why = f"the peak of {tried.name} is unknown ({asked}); measured: {', '.join(unknown)}"
        return Finding("peak", UNKNOWN, why)
    return judged("peak", wrong, ", ".join(said))


def power(tried: Device) -> Finding:
    """Power and energy are plausible."""
    tried.job()
    meter, state = EnergyMeter(tried.device), dict[str, Any]()
    meter.joules()
    began = time.perf_counter()
    while time.perf_counter() < began + _POWER_SECONDS:
        tried.job()
        state = tried.kind.state(tried.device)  # while it works
        tried.wait()
    joules, seconds = meter.joules(), time.perf_counter() - began
    watts = {"its energy counter": joules / seconds} if math.isfinite(joules) else {}
    if "power_w" in state:
        watts["its sensor"] = state["power_w"]
    if not watts:
        return Finding("power", UNKNOWN, "torch tells neither power nor energy of this kind of device")
    said = ", ".join(f"{value:.0f} W by {source}" for source, value in watts.items())
    plausible = all(_WATTS[0] <= value <= _WATTS[1] for value in watts.values())
    return judged("power", [] if plausible else [said], said)


_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matrix product": lambda one, other: one.flatten(1) @ other.flatten(1).T,
    "convolution": lambda one, other: F.conv2d(one[:8], other[:16, :, :3, :3], padding=1),
}
_ONE_BY_ONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda one, other: one.flatten(1).softmax(-1),
    _GELU: lambda one, other: F.gelu(one),
}


def _error(function: Callable[[Tensor, Tensor], Tensor], tried: Device, dtype: torch.dtype) -> float:
    one, other = _inputs(64, 8, 8, 8).to(dtype), (_inputs(64, 8, 8, 8) + 0.5).to(dtype)
    return _relative(function(one.to(tried.device), other.to(tried.device)), function(one.double(), other.double()))


def _inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _relative(found: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest value; NaN if a result is none."""
    return ((found.cpu().double() - exact).abs().max() / exact.abs().max()).item()


CHECKS: dict[str, Callable[[Device], Finding]] = {
    "synchronization": synchronization, "events": events, "copies": copies, "random numbers": random_numbers,
    "memory": memory, "float32": float32, "fp16": lambda tried: half_precision(tried, "fp16"),
    "bf16": lambda tried: half_precision(tried, "bf16"), "peak": peak, "power": power,
}  # fmt: skip
