"""Stops a training in good order when the system takes the machine back."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import TracebackType

from sdnb.errors import Stopped
from sdnb.machine.watchdog import end_with_parent

logger = logging.getLogger("sdnb")

SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # from Slurm and Kubernetes; from a terminal that closes
LAUNCHER_GONE = signal.SIGUSR2  # sent to a group of ranks when the process that launched them has ended
SAME_SECONDS = 1.0


class StopRequest:
    """While it is entered, the first SIGTERM or SIGHUP asks the training to stop after its step. Its number is in
    `signal`, which is 0 before. The next one ends the process at once. What comes within a second counts as one signal:
    `timeout`, Slurm and torch's launcher may each deliver the same.

    A signal that the process ignores, as under nohup, stays ignored. Python handles signals in the main thread only:
    in another one, nothing changes.
    """

    def __init__(self, failure: Path | None = None) -> None:
        """`failure`: for one of several ranks, the file where a failure is written. When a rank fails, its launcher
        ends the others with SIGTERM: if the file exists when a signal comes, the process ends at once; and an error
        after a signal is a consequence, so that the signal ends the process."""
        self.failure, self.signal = failure, 0

    def __enter__(self) -> "StopRequest":
        self._handlers, self._writing = {}, None
        if threading.current_thread() is not threading.main_thread():
            return self
        # Handlers of Python run between two of its instructions, but a backward pass is one of them, and so is the wait
        # for a rank that has gone. The numbers of the signals arrive in this pipe at once.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (*SIGNALS, LAUNCHER_GONE):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._writing is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writing)  # this ends the thread
        if self.failure and self.signal and error is not None and not isinstance(error, Stopped):
            logger.error("ended by %s, in: %s", signal.Signals(self.signal).name, error)
            os.kill(os.getpid(), self.signal)

    def _listen(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as pipe:
            asked = 0.0
            while received := pipe.read(1):
                number = received[0]
                if number not in self._handlers:
                    continue
                if self.failure and self.failure.exists():
                    os._exit(1)
                if not self.signal:
                    self.signal, asked = number, time.monotonic()
                elif number != LAUNCHER_GONE and time.monotonic() - asked > SAME_SECONDS:
                    os._exit(128 + number)


def end_with_rank(_: int) -> None:
    """For a process that loads images: no signal ends it before its rank ends, and nothing keeps it afterwards. Only
    its rank may end it with SIGTERM: others send that to all processes of a training."""
    rank, blocked = os.getppid(), {*SIGNALS, LAUNCHER_GONE}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)

    def listen() -> None:
        received = signal.sigwaitinfo(blocked)
        while (received.si_signo, received.si_pid) != (signal.SIGTERM, rank):
            received = signal.sigwaitinfo(blocked)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    end_with_parent()


def stopped(number: int, folder: Path, step: int) -> Stopped:
    """The error of a training in `folder` that a signal ended after a step."""
    why = "its launcher ended" if number == LAUNCHER_GONE else f"by {signal.Signals(number).name}"
    checkpoint = folder / f"checkpoint-{step}"
    kept = f"{checkpoint} is complete. " if checkpoint.exists() else ""
    return Stopped(
        f"stopped after step {step}: {why}. {kept}To go on, repeat the command with resume_from_checkpoint = latest.",
        128 + number,
    )
