"""The process that a run happens in: `python -m sdnb.ranks <run folder> <pipe>` starts the ranks with accelerate's
notebook_launcher. It is a process of its own because that launcher forks: a kernel that has computed before, or that
holds an Accelerator, would hang or fail there.

When the other end of the pipe closes, the one who launched the run is gone, however it ended, and every rank ends.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import runs
from .config import TrainConfig
from .errors import SdnbError


def main() -> None:
    folder, pipe = Path(sys.argv[1]), int(sys.argv[2])
    config = runs.Run(folder).config.updated(output_dir=str(folder))
    _end_when(lambda: os.read(pipe, 1) == b"")  # nothing is ever written: it returns when the other end closes

    from accelerate import notebook_launcher
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the launcher says "2 CUDAs" of CPU ranks too
            notebook_launcher(
                _rank,
                args=(config,),
                num_processes=config.num_processes,
                mixed_precision=config.mixed_precision,
                use_port=str(_free_port()),
            )
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:  # a rank that was killed could not write its own
            killed = "SIGKILL, sent by hand or by the system for want of memory"
            how = killed if failure.exitcode == -signal.SIGKILL else failure.signal_name()
            runs.write(folder / runs.FAILURE, {"rank": rank, "what": f"it died of {how}", "details": failure.message})
        sys.exit(1)


def _rank(config: TrainConfig) -> None:
    sys.stdout = sys.__stdout__
    # elastic's handler, inherited, would not let a rank that waits for another end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if config.num_processes > 1:
        launcher = os.getppid()
        _end_when(lambda: time.sleep(1) or os.getppid() != launcher)
    try:
        from .train import train

        train(config)
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        lines = str(error) if isinstance(error, SdnbError) else traceback.format_exc()
        print(f"rank {rank} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        if not isinstance(error, SdnbError):
            time.sleep(1)  # a rank that lost its peer fails too: the launcher ends it before it files that
        _file_failure(Path(config.output_dir), rank, type(error).__name__, lines)
        sys.stderr.flush()
        os._exit(1)  # at once: interpreter shutdown would wait for ranks that wait for this one


def _file_failure(folder: Path, rank: int, what: str, details: Any) -> None:
    """Keep the first failure; the others' are its consequences."""
    try:
        os.close(os.open(folder / f".{runs.FAILURE}.claim", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    runs.write(folder / runs.FAILURE, {"rank": rank, "what": what, "details": str(details)})


def _end_when(is_over: Callable[[], bool]) -> None:
    """End every process of the run as soon as `is_over`, which may take its time, says so."""

    def watch() -> None:
        while not is_over():
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
