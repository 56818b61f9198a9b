"""How the threads of a process wait for each other on a CPU: they spin while the cores are free, and sleep while other
processes use the cores.

torch computes with GNU's OpenMP library, libgomp. A waiting thread spins for 300,000 rounds, a few milliseconds, before
it sleeps (GOMP_SPINCOUNT in libgomp's manual). On free cores that is the fastest way. Beside other processes it takes
the core from the very thread that it waits for: the embedded model then trains about half as many images/s as with
threads that sleep at once, or fewer (benchmarks/contention.py). So a watch reads the load of the cores four times a
second, and changes how threads wait. It changes no computed number, because the number of threads stays the same."""

import ctypes
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from sdnb.machine.device_kind import HOST

logger = logging.getLogger("sdnb")

# If one of these is in the environment, the user has decided how threads wait.
DECIDED_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SECONDS = 0.25  # between two readings: 50 ticks of /proc/stat on two cores
# Threads sleep when others use more than the first number of their cores, and spin again below the second. Measured on
# two cores: beside a process that computes 50 % of the time, spinning trains a quarter more images/s than sleeping; at
# 70 % they are equal.
_TOO_MANY, _FEW = 0.4, 0.3
_NOTHING = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)  # what an idle team of threads computes


def share(cores: int, ranks: int) -> int:
    """Threads per rank on a machine. With a thread per core in each, ranks disturb each other: two ranks on two cores
    took 1.8 times as long."""
    return max(1, cores // ranks)


class CoreUse:
    """The load of the cores that this process may use. Raises OSError if the system does not report it."""

    def __init__(self) -> None:
        self.cores = os.sched_getaffinity(0)
        self._before = self._read()

    def spent(self) -> tuple[float, float, float]:
        """Seconds since the last call: on the clock, of use of the cores by anyone, and by this process. Other virtual
        machines on the host count."""
        before, self._before = self._before, self._read()
        seconds, in_use, own = (now - then for then, now in zip(before, self._before))
        return seconds, in_use, own

    def by_others(self) -> float:
        """Cores that others used on average since the last call."""
        seconds, in_use, own = self.spent()
        return max(0.0, (in_use - own) / seconds)

    def _read(self) -> tuple[float, float, float]:
        """Seconds: on the clock, of use of the cores, of use by this process."""
        ticks = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *numbers = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self.cores:
                user, nice, system, _, _, irq, softirq, steal = map(int, numbers[:8])
                ticks += user + nice + system + irq + softirq + steal
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


class Waits:
    """Watches the cores until it is stopped, and makes this process's threads spin or sleep. It does nothing if there
    is only one thread, no libgomp, or the user has decided; `now` then says why."""

    def __init__(self, device_type: str) -> None:
        import torch

        self.threads, self.others, self.asleep = torch.get_num_threads(), 0.0, False
        self._seconds = {False: 0.0, True: 0.0}
        self._over, self._awake = threading.Event(), threading.Event()
        self.fixed = self._why_fixed(device_type)
        if not self.fixed:
            threading.Thread(target=self._watch, name="core use", daemon=True).start()

    def _why_fixed(self, device_type: str) -> str:
        if device_type != HOST:
            return f"the {device_type} device computes"
        if self.threads == 1:
            return "a single thread never waits"
        if decided := [f"{name}={os.environ[name]}" for name in DECIDED_BY if name in os.environ]:
            return f"as set by {', '.join(decided)}"
        library = ctypes.CDLL(None)
        if not hasattr(library, "GOMP_parallel") or hasattr(library, "kmp_set_blocktime"):
            return "as decided by this torch's OpenMP library, which is not libgomp"
        try:
            self._use = CoreUse()
        except OSError as error:
            return f"the load of the cores cannot be read: {error}"
        return ""

    def _watch(self) -> None:
        spare = len(self._use.cores) - self.threads  # cores that others may use freely
        while not self._over.wait(_SECONDS):
            self.others = self._use.by_others()
            self._seconds[self.asleep] += _SECONDS
            if self.others - spare > (_FEW if self.asleep else _TOO_MANY):
                if not self._seconds[True]:
                    logger.info(
                        "other processes use %.2f of %d cores: until they stop, the %d threads of this process sleep "
                        "while they wait for each other", self.others, len(self._use.cores), self.threads,
                    )  # fmt: skip
                self._sleep()
            else:
                self._spin()
        self._spin()

    def _sleep(self) -> None:
        """A waiting thread of libgomp sleeps after 100 rounds if there are more threads than cores (its
        config/linux/wait.h). An idle team adds threads."""
        if self.asleep:
            return
        self.asleep = True
        begun, awake = threading.Event(), self._awake
        idle = len(self._use.cores) - self.threads + 2  # one of them starts the team

        def keep_a_team() -> None:
            ctypes.CDLL(None).GOMP_parallel(_NOTHING, None, idle, 0)
            begun.set()
            awake.wait()

        threading.Thread(target=keep_a_team, name="idle team", daemon=True).start()
        begun.wait()

    def _spin(self) -> None:
        if self.asleep:
            self._awake.set()  # the team ends with the thread that started it
            self.asleep, self._awake = False, threading.Event()

    def now(self) -> dict[str, Any]:
        """How threads wait now, and why: for environment.json."""
        how = {"threads": self.threads, "waiting": self.fixed or ("asleep" if self.asleep else "spinning")}
        return how if self.fixed else {**how, "cores_used_by_others": round(self.others, 2)}

    def stop(self) -> dict[str, Any]:
        """End the watch. Returns how threads have waited: for summary.json."""
        self._over.set()
        seconds = sum(self._seconds.values())
        return {} if self.fixed or not seconds else {"asleep_share": round(self._seconds[True] / seconds, 3)}
