"""The devices: each has a queue of work, a clock, a memory and a generator.

A kernel does not run when it is launched. It waits in the queue of its device until the host waits for the device.
Then the queue runs in order. So a test that forgets to wait sees values that are not there yet, every time.
"""

import collections
import os
import threading
import time

import torch

from . import generators, memory

_LONGEST = 5000  # launches in a queue; it keeps tensors alive, so a longer one is run at once


class Device:
    def __init__(self, index: int) -> None:
        self.index = index
        self.memory = memory.Memory(index)
        self.generator = generators.new(index)
        # The device's own time, in seconds. It has nothing to do with the host's: it passes only while work runs.
        self.clock = 86_400.0 * (index + 1)
        self._queue = collections.deque()
        self._lock = threading.RLock()

    def launch(self, work) -> None:
        """Put a function in the queue."""
        self._queue.append(work)
        if len(self._queue) > _LONGEST:
            self.run()

    def allocate(self, size, stride, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor."""
        if self.memory.on_host > memory.TOTAL:  # the queue keeps what the host has freed
            self.run()
        return memory.allocate(self.memory, size, stride, dtype)

    def idle(self) -> bool:
        return not self._queue

    def run(self, until=lambda: False) -> None:
        """Run the queue until a condition holds, by default to its end, whatever the host has set up (autocast, …)."""
        with self._lock, torch.inference_mode(), torch._C._DisableAutocast(), torch._C._DisableTorchDispatch():
            while self._queue and not until():
                began = time.perf_counter()
                self._queue.popleft()()
                self.clock += time.perf_counter() - began


COUNT = int(os.environ.get("STAND_IN_DEVICES", 1))
_devices = [Device(index) for index in range(COUNT)]
_current = 0
_initialized = _bad_fork = False


def _after_fork() -> None:
    global _bad_fork
    _bad_fork = _initialized


os.register_at_fork(after_in_child=_after_fork)


def in_bad_fork() -> bool:
    return _bad_fork


def initialized() -> bool:
    return _initialized and not _bad_fork


def current() -> int:
    return _current


def select(index: int) -> None:
    global _current
    used(index)
    _current = index


def index_of(device=None) -> int:
    """Of a torch.device, a string, a number, or None, which is the current device."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _current if index is None else index


def generator(index: int) -> torch.Generator:
    """A device's default generator. To seed it does not count as use of the device."""
    return _devices[index].generator


def used(device=None) -> Device:
    """A device that is about to be used."""
    global _initialized
    if _bad_fork:
        raise RuntimeError(
            "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you must use the 'spawn' "
            "start method"
        )
    index = index_of(device)
    if not 0 <= index < COUNT:
        raise RuntimeError(f"Invalid NPU device ID: {index}. There are {COUNT} devices.")
    _initialized = True
    # In this thread; torch believes that there is one device, and has no thread for the backward pass of another.
    torch._C._set_multithreading_enabled(False)
    return _devices[index]
