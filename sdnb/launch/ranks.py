"""The process that starts the ranks: `python -m sdnb.launch.ranks <run folder> <pipe> <temporary folder>`, with a
job as JSON on its standard input: the settings, and the steps to replay, if it is no training. It calls accelerate's
notebook_launcher, which forks. A kernel that has computed before, or that holds an Accelerator, would hang or fail
there, so this is a process of its own.

When the other end of the pipe closes, whoever launched the run is gone: every rank stops after its step, and what is
left after half a minute is killed. On SIGUSR1 each process writes its stack trace into the log.
"""

import contextlib
import faulthandler
import gc
import io
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from sdnb.errors import Stopped
from sdnb.launch.failure import advice_when_killed, details_of, how_it_was_killed, write_down
from sdnb.machine.watchdog import end_when, end_with_parent
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.training.stopping import LAUNCHER_GONE, SIGNALS


def main() -> None:
    folder, pipe = Path(sys.argv[1]), int(sys.argv[2])
    tempfile.tempdir = sys.argv[3]  # torch's launcher leaves a folder
    job = json.load(sys.stdin)
    config = TrainConfig(**job["config"])
    gc.disable()  # until everything is loaded, see `train`
    faulthandler.register(signal.SIGUSR1)
    if config.ranks_here > 1:  # the launcher waits for the ranks; torch's has handlers of its own
        signal.signal(LAUNCHER_GONE, lambda *_: None)
        for number in SIGNALS:
            signal.signal(number, _pass_on)
    # Nobody writes into the pipe: a read returns when its other end closes.
    end_when(lambda: os.read(pipe, 1) == b"", first=LAUNCHER_GONE)

    from accelerate import notebook_launcher

    from sdnb.compat import first_failure

    if os.environ.get("ACCELERATE_USE_CPU") == "true":
        # Loaded once for all forked ranks. Not for ranks on GPUs: a library that touches a GPU while it is loaded would
        # make it unusable in a forked rank.
        from sdnb.training import loop  # noqa: F401

    address, port = config.main_process_ip or "127.0.0.1", str(config.meeting_port or free_port())
    is_the_rank = config.ranks_here == 1 and config.num_machines > 1
    if is_the_rank:  # the launcher would start it as a run of its own
        os.environ.update(RANK=str(config.machine_rank), LOCAL_RANK="0", WORLD_SIZE=str(config.num_machines),
                          MASTER_ADDR=address, MASTER_PORT=port)  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the launcher prints "2 CUDAs" for CPU ranks, too
            notebook_launcher(
                _rank, (config, job["replay"]), num_processes=config.ranks_here, num_nodes=config.num_machines,
                node_rank=config.machine_rank, mixed_precision=config.mixed_precision, master_addr=address,
                use_port=port,
            )  # fmt: skip
    except Exception as error:
        rank, exit_code = first_failure(error)
        if -exit_code in (*SIGNALS, LAUNCHER_GONE):
            exit_code = 128 - exit_code
        elif exit_code < 0:  # a rank that was killed could not write its own
            how, advice = how_it_was_killed(-exit_code), advice_when_killed(-exit_code, config)
            exit_code = write_down(folder, rank, f"it {how}", advice)
        # At once: on a full disk, interpreter shutdown would fail, as it could not write what the log still waits for.
        os._exit(exit_code)
    if is_the_rank:
        sys.stdout.flush()
        os._exit(0)  # at once, like forked ranks: interpreter shutdown would destroy the process group


def _pass_on(number: int, _: object) -> None:
    """To the ranks, which share the group; once, as this process is in it, too."""
    signal.signal(number, signal.SIG_IGN)
    os.killpg(0, number)


def _rank(config: TrainConfig, replayed: dict[str, Any] | None) -> None:
    sys.stdout = sys.__stdout__
    tempfile.tempdir = None
    faulthandler.register(signal.SIGUSR1)  # a rank that was spawned, and not forked, has not run `main`
    if config.ranks_here > 1:
        for number in (*SIGNALS, LAUNCHER_GONE):  # not as torch's launcher handles them, from which it was forked
            signal.signal(number, signal.SIG_DFL)
        end_with_parent()
    try:
        if replayed:
            from sdnb.training.replay import replay

            replay(config, **replayed)
        else:
            from sdnb.training.loop import train

            train(config)
    except Stopped as error:
        os._exit(error.status)
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        details = details_of(error, config)
        with contextlib.suppress(OSError):  # the log may be on a full disk
            print(f"rank {rank} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        if config.ranks > 1:
            time.sleep(3)  # a rank that lost its peer fails, too: the launcher ends it before it reports that
        # At once: interpreter shutdown would wait for ranks that wait for this one.
        os._exit(write_down(run_folder.path_of(config), rank, type(error).__name__, details))


def free_port() -> int:
    """A free TCP port, outside the range from which systems assign ports: no other process will be assigned this one
    before the ranks meet."""
    with socket.socket() as probe:
        for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise OSError("no port is free between 20000 and 30000")


if __name__ == "__main__":
    main()
