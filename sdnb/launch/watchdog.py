"""Ends a process as soon as the one it works for is gone, however that ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable


def end_when(is_over: Callable[[], bool], everyone: bool = False) -> None:
    """End this process, or every process of its group, as soon as `is_over`, which may take its time, says so."""

    def watch() -> None:
        while not is_over():
            pass
        os.kill(0 if everyone else os.getpid(), signal.SIGKILL)  # 0: the group, see kill(2)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """End this process with the one that started it."""
    parent = os.getppid()
    end_when(lambda: time.sleep(1) or os.getppid() != parent)
