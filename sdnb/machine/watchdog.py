"""Ends a process as soon as the one it works for has ended, whatever the reason."""

import os
import signal
import threading
import time
from collections.abc import Callable

GRACE_SECONDS = 30.0  # what Kubernetes and Slurm give, too


def end_when(is_over: Callable[[], bool], first: signal.Signals | None = None) -> None:
    """End this process as soon as `is_over` is true; it may block. With `first`, every process of its group: they get
    this signal, and are killed if they have not ended within GRACE_SECONDS."""

    def watch() -> None:
        while not is_over():
            pass
        if first is not None:
            os.kill(0, first)  # 0: the group, see kill(2)
            time.sleep(GRACE_SECONDS)
        os.kill(0 if first is not None else os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """End this process together with its parent."""
    parent = os.getppid()

    def parent_ended() -> bool:
        time.sleep(1)
        return os.getppid() != parent

    end_when(parent_ended)
