"""How the threads of a process that computes on a CPU wait for each other: spinning while the cores are theirs, asleep
while other processes use the cores too.

torch computes with GNU's OpenMP library, libgomp. A thread of it that waits spins, for 300,000 rounds or a few
milliseconds, before it sleeps (GOMP_SPINCOUNT in libgomp's manual). On cores of its own that is the fastest way. Beside
other processes it takes the core from the very thread that it waits for: the embedded model then trains about half as
many images/s as with threads that sleep at once, or fewer (benchmarks/contention.py). So a watch looks at the cores a
few times a second, and changes how they wait. It changes no number that is computed: the threads remain as many.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("sdnb")

# With one of these in the environment, the user has decided how threads wait.
DECIDED_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SECONDS = 0.25  # between two looks: 50 ticks of /proc/stat on two cores
# Cores that others may use in the threads' place before these sleep, and that they must leave before these spin again.
# Measured on two cores: beside a process that computes half of the time spinning trains a quarter more images/s than
# sleeping, beside one that does for seven tenths of it as many.
_TOO_MANY, _FEW = 0.4, 0.3


def share(cores: int, ranks: int) -> int:
    """The threads of each of the ranks on a machine. With one for every core each, they are in each other's way: two
    ranks on two cores took 1.8 times as long."""
    return max(1, cores // ranks)


class CoreUse:
    """What the cores that this process may run on are used for.

    Raises:
        OSError: if the system does not say.
    """

    def __init__(self) -> None:
        self.cores = os.sched_getaffinity(0)
        self._before = self._read()

    def by_others(self) -> float:
        """How many of the cores other processes, and other guests of the same machine, used since the last time that
        this was asked, on average."""
        before, self._before = self._before, self._read()
        seconds, in_use, own = (now - then for then, now in zip(before, self._before))
        return max(0.0, (in_use - own) / seconds)

    def _read(self) -> tuple[float, float, float]:
        """Seconds: of the clock, that the cores were in use, that this process used them."""
        ticks = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *numbers = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self.cores:
                user, nice, system, _, _, irq, softirq, steal = map(int, numbers[:8])
                ticks += user + nice + system + irq + softirq + steal
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


class Waits:
    """Watches the cores, from now until it is stopped, and has this process's threads wait accordingly. Where nothing
    is to be decided, for want of several threads or of libgomp or because the user has, it only says so."""

    def __init__(self, device_type: str) -> None:
        import torch

        self.threads, self.others, self.asleep = torch.get_num_threads(), 0.0, False
        self._seconds = {False: 0.0, True: 0.0}
        self._over, self._awake = threading.Event(), threading.Event()
        self.fixed = self._why_fixed(device_type)
        if not self.fixed:
            threading.Thread(target=self._watch, name="core use", daemon=True).start()

    def _why_fixed(self, device_type: str) -> str:
        if device_type != "cpu":
            return f"the {device_type} device computes"
        if self.threads == 1:
            return "one thread has none to wait for"
        if decided := [f"{name}={os.environ[name]}" for name in DECIDED_BY if name in os.environ]:
            return f"as {', '.join(decided)} asks for"
        library = ctypes.CDLL(None)
        if not hasattr(library, "GOMP_parallel") or hasattr(library, "kmp_set_blocktime"):
            return "as this torch's OpenMP library, which is not libgomp, has them wait"
        try:
            self._use = CoreUse()
        except OSError as error:
            return f"what uses the cores cannot be read: {error}"
        return ""

    def _watch(self) -> None:
        allowed = len(self._use.cores) - self.threads  # which others may use without being in the way
        while not self._over.wait(_SECONDS):
            self.others = self._use.by_others()
            self._seconds[self.asleep] += _SECONDS
            if self.others - allowed > (_FEW if self.asleep else _TOO_MANY):
                if not self._seconds[True]:
                    logger.info(
                        "other processes use %.2f of %d cores: as long as they do, the %d threads of this one sleep "
                        "while they wait for each other", self.others, len(self._use.cores), self.threads,
                    )  # fmt: skip
                self._sleep()
            else:
                self._spin()
        self._spin()

    def _sleep(self) -> None:
        """libgomp has a waiting thread sleep after 100 rounds while there are more threads than cores (its
        config/linux/wait.h). A team that has nothing to do makes them more."""
        if self.asleep:
            return
        self.asleep = True
        begun, awake = threading.Event(), self._awake
        idle = len(self._use.cores) - self.threads + 2  # one of which is the thread that starts the team

        def keep_a_team() -> None:
            ctypes.CDLL(None).GOMP_parallel(_NOTHING, None, idle, 0)
            begun.set()
            awake.wait()

        threading.Thread(target=keep_a_team, name="idle team", daemon=True).start()
        begun.wait()

    def _spin(self) -> None:
        if self.asleep:
            self._awake.set()  # its team ends with the thread that started it
            self.asleep, self._awake = False, threading.Event()

    def now(self) -> dict[str, Any]:
        """How they wait at this moment, and why: for environment.json."""
        how = {"threads": self.threads, "waiting": self.fixed or ("asleep" if self.asleep else "spinning")}
        return how if self.fixed else {**how, "cores_used_by_others": round(self.others, 2)}

    def stop(self) -> dict[str, Any]:
        """End the watch. How they have waited: for summary.json."""
        self._over.set()
        seconds = sum(self._seconds.values())
        return {} if self.fixed or not seconds else {"asleep_share": round(self._seconds[True] / seconds, 3)}


_NOTHING = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
