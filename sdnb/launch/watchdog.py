"""Ends a process as soon as the one it works for has ended, whatever the reason."""

import os
import signal
import threading
import time
from collections.abc import Callable


def end_when(is_over: Callable[[], bool], everyone: bool = False) -> None:
    """End this process, or every process of its group, as soon as `is_over` is true. `is_over` may block."""

    def watch() -> None:
        while not is_over():
            pass
        os.kill(0 if everyone else os.getpid(), signal.SIGKILL)  # 0: the group, see kill(2)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """End this process together with its parent."""
    parent = os.getppid()

    def parent_ended() -> bool:
        time.sleep(1)
        return os.getppid() != parent

    end_when(parent_ended)
