"""The kinds of devices that train. `DeviceKind` gets what sdnb needs to know of one from torch's device module, which
all vendors offer in the same form; a subclass in `vendors.py`, or of a vendor's own package, changes what differs."""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sdnb.compat import torch_since

if TYPE_CHECKING:  # readers of a run need the nouns, but not torch, which takes seconds to load
    import torch

logger = logging.getLogger("sdnb")

HOST = "cpu"  # torch's name for the host, as a place of tensors
SOME_GPU = "gpu"  # in the records: an accelerator whose kind nobody wrote down
ENTRY_POINTS = "sdnb.accelerators"
# The order in which accelerate looks for a device (PartialState.default_device).
_ORDER = ("mps", "mlu", "sdaa", "musa", "npu", "hpu", "cuda", "xpu")


class DeviceKind:
    """A kind of device by torch's name, such as `cuda`. Memory is in bytes if a name does not say otherwise."""

    noun = "device"
    is_known = True
    is_host = False  # it computes on the processor's cores, in the host's memory
    extension: str | None = None  # the package that adds it to torch
    norms_in_float32 = True  # autocast computes norms, softmax and losses in float32
    images_at_once: int | None = None  # that the VAE encodes together; None: all
    process_gib = 0.8  # what a process takes besides tensors. An estimate: context, kernels, communication
    memory_was_measured = False  # benchmarks/growth.py compared predicted peaks with real ones
    asked_apart = False  # to ask what there is would keep a device, or memory of each, in use by the process that asks
    pins_memory = True  # copies from pinned host memory run beside the host

    def __init__(self, type: str) -> None:
        self.type = type

    @property
    def module(self) -> ModuleType:
        """torch's module of this kind, such as `torch.cuda`."""
        import torch

        return getattr(torch, self.type)

    # What there is

    def is_available(self) -> bool:
        """Whether this machine has such a device, and torch can use it."""
        if self.extension and not _extension_loads(self.extension):
            return False
        import torch

        module = getattr(torch, self.type, None)
        with contextlib.suppress(Exception):  # each vendor raises its own, without a driver
            return bool(module and module.is_available() and module.device_count())
        return False

    def count(self) -> int:
        """The devices that torch sees; ranks can use one each."""
        return self.module.device_count()

    def names(self) -> tuple[str, ...]:
        return tuple(self._of_each("get_device_name", self.type))

    def memory_gib(self) -> tuple[float, ...]:
        """All memory of each device; 0 if torch does not tell."""
        each = self._of_each("get_device_properties")
        return tuple(round(getattr(one, "total_memory", 0) / 2**30, 1) for one in each)

    def free_gib(self) -> tuple[float, ...]:
        """The free memory of each device, all if torch does not tell. To ask takes some of it, for a context."""
        asked = self._of_each("mem_get_info")
        all_gib = self.memory_gib()
        return tuple(min(total, round(one[0] / 2**30, 1)) if one else total for one, total in zip(asked, all_gib))

    def _of_each(self, function: str, default: Any = None) -> list[Any]:
        found = []
        for index in range(self.count()):
            with contextlib.suppress(Exception):  # missing, or each vendor's own
                found.append(getattr(self.module, function)(index))
            found += [default] * (index + 1 - len(found))
        return found

    @property
    def fp16(self) -> bool:
        """Whether it trains in float16, with accelerate's scaling of the loss."""
        return self.type in _known_to_accelerate()

    @property
    def bf16(self) -> bool:
        """Whether it has instructions for bfloat16."""
        asked = getattr(self.module, "is_bf16_supported", None)
        return bool(asked()) if asked else False

    @property
    def default_precision(self) -> str:
        """As the published measurements: float16 where it can be."""
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "no"

    @property
    def half_precision(self) -> str:
        """That which saves memory."""
        return "fp16" if self.fp16 else "bf16"

    def software(self) -> dict[str, str]:
        """What it runs with besides torch's packages, such as its driver: name and version."""
        return {}

    def missing(self, device: "torch.device") -> list[str]:
        """What cannot be measured on this device."""
        state: dict[str, float] = {}
        with contextlib.suppress(Exception):  # each vendor's own
            state = self.state(device)
        lacking = {
            "memory": not hasattr(self.module, "max_memory_allocated"),
            "phases of a step (it has no timing events)": self.event() is None,
            "clock, power and temperature": not state,
            "energy": self.energy_counter(device) is None,
        }
        return [what for what, lacks in lacking.items() if lacks]

    # Running

    @property
    def most_ranks_per_machine(self) -> int | None:
        """None: one per device."""
        return None if self.type in _known_to_accelerate() else 1

    def environment_of_ranks(self, one_machine: bool) -> dict[str, str]:
        """Variables that ranks need before they load torch."""
        return {}

    def environment_for_accelerate(self) -> dict[str, str]:
        """Variables without which accelerate would take the processor, in place of a kind that it does not know."""
        return {} if self.type in _known_to_accelerate() else {"ACCELERATE_TORCH_DEVICE": f"{self.type}:0"}

    def synchronize(self, device: "torch.device") -> None:
        """Wait until the device has done all its work."""
        self.module.synchronize(device)

    def event(self) -> Any:
        """A moment of the device's work, now: events have `synchronize()`, and `elapsed_time(later)` in ms. None if
        the device has none that measure time."""
        if not self._has_timing_events:
            return None
        event = self.module.Event(enable_timing=True)
        event.record()
        return event

    @functools.cached_property
    def _has_timing_events(self) -> bool:
        with contextlib.suppress(Exception):  # missing, or each vendor's own
            first, last = (self.module.Event(enable_timing=True) for _ in range(2))
            for event in (first, last):
                event.record()
            last.synchronize()
            return first.elapsed_time(last) >= 0
        return False

    def empty_cache(self) -> None:
        """Give memory that no tensor uses back to the device."""
        if self.is_initialized():
            getattr(self.module, "empty_cache", lambda: None)()

    def reset_peak(self, device: "torch.device") -> None:
        """Let the peak memory start with what is allocated now."""
        with contextlib.suppress(AttributeError):
            self.module.reset_peak_memory_stats(device)

    def peak_bytes(self, device: "torch.device") -> tuple[int, int]:
        """The peak memory of this process: allocated to tensors, and reserved; 0 if torch does not tell."""
        figures = ("max_memory_allocated", "max_memory_reserved")
        allocated, reserved = (getattr(self.module, name, lambda _: 0)(device) for name in figures)
        return allocated, max(allocated, reserved)

    def rng_state(self) -> "torch.Tensor | None":
        """The state of the device's random number generator; None if this process has not used the device."""
        return self.module.get_rng_state() if self.is_initialized() else None

    def set_rng_state(self, state: "torch.Tensor") -> None:
        self.module.set_rng_state(state)

    def pinned(self, values: "torch.Tensor") -> "torch.Tensor":
        """Host memory from which a copy to the device does not keep the host waiting, if torch has such memory."""
        if self.pins_memory:
            try:
                return values.pin_memory()
            except RuntimeError as error:
                logger.warning("copies to the device wait for it: memory cannot be pinned: %s", error)
                self.pins_memory = False
        return values

    def use_tf32(self) -> None:
        """Multiply float32 matrices in TF32. Raises AttributeError if the device has no such switch."""
        import torch

        getattr(torch.backends, self.type).matmul.allow_tf32 = True

    def compute_float32_exactly(self) -> None:
        """Turn TF32, or what the vendor calls it, off in this process; where torch has no switch for it, nothing."""
        import torch

        with contextlib.suppress(AttributeError):
            getattr(torch.backends, self.type).matmul.allow_tf32 = False

    @property
    def has_fused_adam(self) -> bool:
        """Whether torch's AdamW has a kernel that updates all weights in one pass. Before torch 2.5 it refused
        gradients with other strides than the weights, even in dimensions of size 1 (ATen/native/ForeachUtils.h)."""
        import torch

        # torch's own list has every kind that an extension adds, with or without a kernel.
        asked = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
        key = getattr(torch._C, "_dispatch_key_for_device", None)
        return torch_since(2, 5) and bool(asked and key and asked("aten::_fused_adamw_", key(self.type)))

    # Watching

    def state(self, device: "torch.device") -> dict[str, float]:
        """Clock, power, temperature and use now, as far as torch tells, in MHz, W, °C and percent."""
        read: dict[str, float] = {}
        figures = {"clock_mhz": "clock_rate", "power_w": "power_draw", "temperature_c": "temperature",
                   "busy_percent": "utilization"}  # fmt: skip
        for name, function in figures.items():
            with contextlib.suppress(Exception):  # missing, or each vendor's own
                read[name] = getattr(self.module, function)(device)
        return read

    def slowed_by(self, device: "torch.device") -> list[str]:
        """Why it is slowed down now; empty if it is not, or that is unknown."""
        return []

    def other_processes(self, device: "torch.device") -> int:
        """Other processes that compute on it; 0 if that is unknown."""
        return 0

    def energy_counter(self, device: "torch.device") -> Callable[[], float] | None:
        """Reads the energy that it has used so far, in J; None if it has no counter."""
        return None

    def is_initialized(self) -> bool:
        """Whether this process has used a device."""
        asked = getattr(self.module, "is_initialized", None)
        return bool(asked()) if asked else True


class _Unrecorded(DeviceKind):
    """Of a run whose records do not tell."""

    noun = "rank"
    is_known = False


class _SomeGPU(DeviceKind):
    noun = "GPU"


def with_index(device: "torch.device") -> "torch.device":
    """accelerate's device of a single rank has no number: it is the first."""
    import torch

    is_host = device.type == HOST
    return device if is_host or device.index is not None else torch.device(device.type, 0)


@functools.cache
def kind_of(type: str | None) -> DeviceKind:
    """The kind with torch's name `type`; None or `unknown` stand for one that was not recorded."""
    if type in (None, "unknown"):
        return _Unrecorded("unknown")
    if type == SOME_GPU:
        return _SomeGPU(SOME_GPU)
    return _entries().get(type, DeviceKind)(type)


def kind_here() -> DeviceKind:
    """The kind that trains on this machine: that which accelerate chooses, or one that only torch knows."""
    if chosen := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return kind_of(chosen.partition(":")[0])
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        return kind_of(HOST)
    entries = {name: kind_of(name) for name in _entries() if name != HOST}
    first = [name for name in _ORDER if name in entries]
    for name in (*first, *sorted(entries.keys() - {*first})):
        if entries[name].is_available():
            return entries[name]
    import torch

    accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
    return kind_of(accelerator.current_accelerator().type if accelerator and accelerator.is_available() else HOST)


@functools.cache
def _entries() -> dict[str, type[DeviceKind]]:
    from sdnb.machine import vendors

    entries = {**vendors.KINDS}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entries[point.name] = point.load()
        except Exception as error:  # of a package that somebody else wrote
            logger.warning("the entry point %s of %s cannot be loaded: %s", point.name, ENTRY_POINTS, error)
    return entries


@functools.cache
def _extension_loads(package: str) -> bool:
    try:
        if importlib.util.find_spec(package) is None:
            return False
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if package.startswith(error.name or " "):  # the package itself is missing
            return False
        logger.warning("%s is installed, and cannot be loaded: %s", package, error)
        return False
    except Exception as error:  # such as a missing library of the driver
        logger.warning("%s is installed, and cannot be loaded: %s", package, error)
        return False
    return True


@functools.cache
def _known_to_accelerate() -> frozenset[str]:
    """The types of devices on which this version of accelerate trains."""
    from accelerate import DistributedType

    several = {kind.value.removeprefix("MULTI_").lower() for kind in DistributedType if kind.value.startswith("MULTI_")}
    return frozenset({*several, "cuda", "mps", HOST})
