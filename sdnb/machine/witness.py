"""What disturbs a measurement: other processes on the cores and on the GPU, and a GPU that slows itself down."""

import contextlib
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from sdnb.machine.device_kind import kind_of, with_index
from sdnb.machine.threads import CoreUse

logger = logging.getLogger("sdnb")

_LOOK_SECONDS = 0.4  # before the first step
_NAMED_FROM = 0.05  # cores


class Spent(NamedTuple):
    """Since the last reading, in seconds: on the clock, by anyone on the cores of this machine, by this process on
    them and by its children; and the number of cores."""

    clock: float
    in_use: float
    own: float
    cores: int


class Witness:
    """Watches the machine of a rank from step to step. One rank of each machine counts the use of its cores
    (`of_machine`); the sums over all ranks then tell what others used."""

    def __init__(self, device: Any, of_machine: bool) -> None:
        self.of_machine, self._device, self._use = of_machine, with_index(device), None
        with contextlib.suppress(OSError):  # not Linux
            self._use = CoreUse()
        self._children = _children_seconds(os.getpid())
        self._kind = kind_of(device.type)
        self._failed = set[str]()

    def spent(self) -> Spent:
        """What was used since the last call; NaN if the system does not tell."""
        if self._use is None:
            return Spent(math.nan, math.nan, math.nan, 0)
        clock, in_use, own = self._use.spent()
        before, self._children = self._children, _children_seconds(os.getpid())
        own += max(0.0, self._children - before)
        return Spent(clock, in_use if self.of_machine else 0.0, own, len(self._use.cores) if self.of_machine else 0)

    def gpu(self) -> dict[str, Any]:
        """Clock, power, temperature and use of this rank's device now, and why it is slowed down; empty if none of it
        is known."""
        state = self._told("state", {})
        return {**state, "slowed_by": self.slowed_by()} if state else {}

    def slowed_by(self) -> list[str]:
        """Why this rank's device is slowed down now; empty if it is not, or that is unknown."""
        return self._told("slowed_by", [])

    def other_processes(self) -> int:
        """Other processes that compute on this rank's device; 0 if that is unknown."""
        return self._told("other_processes", 0)

    def _told(self, what: str, unknown: Any) -> Any:
        """What the kind tells of the device. No run ends because a vendor's own package raises something."""
        if what not in self._failed:
            try:
                return getattr(self._kind, what)(self._device)
            except Exception as error:
                logger.warning("%s of %s cannot be read: %s: %s", what, self._device, type(error).__name__, error)
                self._failed.add(what)
        return unknown


def _children_seconds(pid: int) -> float:
    """Processor seconds of the processes that a process has started from its main thread, such as those that load
    images, and of theirs; also of those that have ended."""
    ticks, own = 0.0, os.times()
    with contextlib.suppress(OSError, ValueError):  # one that has just ended, or a system without these files
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            times = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:15]
            ticks += sum(map(int, times)) + _children_seconds(int(child)) * os.sysconf("SC_CLK_TCK")
    seconds = ticks / os.sysconf("SC_CLK_TCK")
    return seconds + (own.children_user + own.children_system if pid == os.getpid() else 0.0)


class Others(NamedTuple):
    """What else runs: the share of this machine's cores that other processes use, and the names of those that use
    most."""

    share: float
    names: list[str]

    def __str__(self) -> str:
        named = f": {', '.join(self.names)}" if self.names else ""
        return f"other processes use {self.share:.0%} of the cores{named}"


def what_else_runs(with_siblings: bool) -> Others:
    """Look for a moment at what other processes use. The children of this process are none of them, nor are, if it was
    started by a launcher (`with_siblings`), that one and its children. Processes outside of a container have no
    names here."""
    import psutil

    root = psutil.Process(os.getppid() if with_siblings else os.getpid())
    use, before = CoreUse(), _processor_seconds()
    began = time.monotonic()
    time.sleep(_LOOK_SECONDS)
    clock, in_use, _ = use.spent()
    after, passed = _processor_seconds(), time.monotonic() - began
    ours = {root.pid, os.getpid(), *(child.pid for child in root.children(recursive=True))}
    cores = {pid: (seconds - before.get(pid, (seconds,))[0]) / passed for pid, (seconds, _) in after.items()}
    own = sum(used for pid, used in cores.items() if pid in ours)
    most = sorted((pid for pid in cores if pid not in ours and cores[pid] >= _NAMED_FROM), key=lambda pid: -cores[pid])
    names = [f"{after[pid][1]} {cores[pid]:.2f} cores" for pid in most[:3]]
    return Others(max(0.0, in_use / clock - own) / len(use.cores), names)


def _processor_seconds() -> dict[int, tuple[float, str]]:
    """Of each process that this one can see: its processor seconds, and its name."""
    import psutil

    seen = {}
    for process in psutil.process_iter(["cpu_times", "name"]):
        if times := process.info["cpu_times"]:
            seen[process.pid] = (times.user + times.system, process.info["name"])
    return seen
