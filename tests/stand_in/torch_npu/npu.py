"""What torch_npu has as torch.npu, as far as torch, accelerate, diffusers and transformers ask for it."""

import collections
import contextlib
import functools
import time
from types import SimpleNamespace

import torch

from . import devices, memory

current_device, is_initialized, _is_in_bad_fork = devices.current, devices.initialized, devices.in_bad_fork
default_generators = tuple(devices.generator(index) for index in range(devices.COUNT))
amp = SimpleNamespace(
    autocast=functools.partial(torch.autocast, "npu"), GradScaler=functools.partial(torch.amp.GradScaler, "npu")
)


def is_available() -> bool:
    return devices.COUNT > 0


def device_count() -> int:
    return devices.COUNT


def init() -> None:
    devices.used()


_lazy_init = init


def set_device(where) -> None:
    devices.select(devices.index_of(where))


class device(contextlib.ContextDecorator):
    """with torch.npu.device(1): …"""

    def __init__(self, device) -> None:
        self._index = devices.index_of(device)

    def __enter__(self) -> None:
        self._before = devices.current()
        devices.select(self._index)

    def __exit__(self, *_) -> None:
        devices.select(self._before)


def synchronize(where=None) -> None:
    devices.used(where).run()


def _sleep(seconds: float) -> None:
    """Keep the device busy."""
    devices.used().launch(lambda: time.sleep(seconds))


# names and properties


def get_device_name(where=None) -> str:
    return f"Stand-in NPU {devices.index_of(where)}"


def get_device_capability(where=None):
    return None  # as torch_npu


def get_device_properties(where=None) -> SimpleNamespace:
    return SimpleNamespace(name=get_device_name(where), total_memory=memory.TOTAL)


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


# streams and events


class Stream:
    """All streams of a device are one: its queue, which runs in order."""

    def __init__(self, device=None, priority: int = 0, **_) -> None:
        self.device = torch.device("npu", devices.index_of(device))

    @property
    def device_index(self) -> int:
        return self.device.index

    def synchronize(self) -> None:
        synchronize(self.device)

    def query(self) -> bool:
        return devices.used(self.device).idle()

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


class Event:
    """A point in the queue. It has the device's time when the device gets there."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timing, self._device, self._reached = enable_timing, None, None

    def record(self, stream=None) -> None:
        self._device, self._reached = devices.used(stream and stream.device), None
        self._device.launch(self._arrive)

    def _arrive(self) -> None:
        self._reached = self._device.clock

    def query(self) -> bool:
        return self._device is None or self._reached is not None

    def synchronize(self) -> None:
        if not self.query():
            self._device.run(until=self.query)

    def wait(self, stream=None) -> None:
        pass  # the queue runs in order

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds to another event."""
        if not (self._timing and end._timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self._reached is None or end._reached is None:
            raise RuntimeError("Both events must be recorded and completed before calculating elapsed time.")
        return 1000 * (end._reached - self._reached)


def stream(stream: Stream) -> Stream:
    return stream


def current_stream(where=None) -> Stream:
    return Stream(where)


default_stream = current_stream


def set_stream(stream: Stream) -> None:
    set_device(stream.device)


# memory


def _memory(where) -> memory.Memory:
    return devices.used(where).memory


def memory_allocated(where=None) -> int:
    return _memory(where).allocated


def max_memory_allocated(where=None) -> int:
    return _memory(where).peak_allocated


def memory_reserved(where=None) -> int:
    return _memory(where).reserved


def max_memory_reserved(where=None) -> int:
    return _memory(where).peak_reserved


def reset_peak_memory_stats(where=None) -> None:
    _memory(where).reset_peaks()


reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats


def empty_cache() -> None:
    for index in range(devices.COUNT) if is_initialized() else ():
        _memory(index).empty_cache()


def mem_get_info(where=None) -> tuple[int, int]:
    """Free and total memory."""
    return memory.TOTAL - _memory(where).reserved, memory.TOTAL


def memory_stats(where=None) -> dict[str, int]:
    figures = _memory(where)
    return collections.OrderedDict({
        "allocation.all.allocated": figures.allocations,
        "allocated_bytes.all.current": figures.allocated,
        "allocated_bytes.all.peak": figures.peak_allocated,
        "reserved_bytes.all.current": figures.reserved,
        "reserved_bytes.all.peak": figures.peak_reserved,
    })  # fmt: skip


# random numbers


def manual_seed(seed: int) -> None:
    devices.generator(devices.current()).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(int(seed))


def seed() -> None:
    devices.generator(devices.current()).seed()


def seed_all() -> None:
    manual_seed_all(torch.seed())


def initial_seed() -> int:
    return devices.generator(devices.current()).initial_seed()


def get_rng_state(where="npu") -> torch.Tensor:
    return devices.generator(devices.index_of(where)).get_state()


def set_rng_state(new_state: torch.Tensor, device="npu") -> None:
    devices.generator(devices.index_of(device)).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(devices.COUNT)]


def set_rng_state_all(states) -> None:
    for index, state in enumerate(states):
        set_rng_state(state, index)
