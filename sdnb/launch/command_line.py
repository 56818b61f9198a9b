"""A run from the command line: `sdnb train`, and one rank as `accelerate launch` starts it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from tqdm.contrib.logging import logging_redirect_tqdm

from sdnb.errors import ConfigError, RunError, SdnbError, Stopped
from sdnb.launch.failure import details_of
from sdnb.machine import environment
from sdnb.machine.threads import share
from sdnb.machine.watchdog import end_with_parent
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.settings.flags import parse
from sdnb.training.stopping import SIGNALS

if TYPE_CHECKING:
    from sdnb.data.loading import Splits


def main(read: Callable[[], TrainConfig] = lambda: parse(sys.argv[1:]), launches: bool = False) -> None:
    """Run one rank, and end the process. With `launches`, where the settings or the devices ask for several, launch
    them and follow them to their end. `read` comes first, because loading torch takes seconds."""
    gc.disable()  # until everything is loaded: collecting takes a fifth of that time
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = splits = config = None
    if rank:
        logging.getLogger("sdnb").setLevel(logging.ERROR)  # until the ranks have a log: rank 0 says it
    if world > 1:
        end_with_parent()  # when accelerate launch is killed, its ranks would stay
        cores, ranks_here = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
        os.environ.setdefault("OMP_NUM_THREADS", str(share(cores, ranks_here)))  # torch reads it when it is loaded
    try:
        config = read()
        several = config.repeats > 1 or config.until
        if launches and "RANK" not in os.environ and (_ranks(config) > 1 or several):
            _launch(config)
            _end("", 0)
        config = _as_launched(config, world)
        if rank == 0:
            from sdnb.data.loading import load_data
            from sdnb.training.checkpoint_folder import find_checkpoints

            splits = load_data(config)
            config.total_steps(splits.train.count)  # there may be too few examples
            find_checkpoints(config, splits.train)  # raises before anything in the folder changes
            folder, _held = run_folder.begin(config, environment.capture())  # until this process ends
        else:
            folder = run_folder.path_of(config)
            folder.mkdir(parents=True, exist_ok=True)
        _train_in_terminal(config.updated(output_dir=str(folder)), rank, splits)
        _end("", 0)
    except Stopped as error:
        _end("", error.status)  # the log has said it
    except KeyboardInterrupt:
        measured = f"; the measurements are in {folder}" if folder else ""
        _end(f"interrupted{measured}" if rank == 0 else "", 130)
    except Exception as error:
        details = details_of(error, config)
        if not isinstance(error, SdnbError) or (folder is None and rank):
            # A rank that lost its peer fails, too, and wrong settings fail on every rank: the launcher ends this one
            # before it reports that.
            time.sleep(2)
        first = rank == 0
        with suppress(RunError):  # the disk may be full; the error is shown all the same
            first = run_folder.fail(folder, rank, type(error).__name__, details) if folder else first
        _end(f"error: {details}" if first else "", 2 if isinstance(error, ConfigError) else 1)


def _ranks(config: TrainConfig) -> int:
    return config.num_processes or config.num_machines * environment.devices().ranks


def _launch(config: TrainConfig) -> None:
    """Start several ranks, each in a process of its own, and show their log and the progress bar."""
    from sdnb.figures.live import Bar
    from sdnb.launch.notebook import launch
    from sdnb.launch.plan import prepare

    gc.enable()
    plan = prepare(config)
    print(plan)
    _print_results(launch(plan, Bar(each_step=False)))


def _as_launched(config: TrainConfig, world: int) -> TrainConfig:
    if config.repeats > 1 or config.until:
        raise ConfigError("repeats and until need `sdnb train` or the notebook, which start each run anew")
    if config.num_machines > 1 or config.num_processes not in (None, world):
        raise ConfigError(
            f"num_processes = {config.num_processes or world}, num_machines = {config.num_machines}, but this is one "
            f"of {world} ranks: a command line starts one rank. To start several, use accelerate launch "
            "--num_processes …, or the notebook."
        )
    devices = environment.devices()
    config = config.updated(
        num_processes=world,
        num_machines=world // int(os.environ.get("LOCAL_WORLD_SIZE", world)),
        machine_rank=int(os.environ.get("GROUP_RANK", 0)),
        main_process_ip=os.environ.get("MASTER_ADDR"),
        mixed_precision=config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    )
    config = environment.resolved(config, devices)
    environment.require(config)
    from sdnb.launch import memory

    return memory.settle(config, devices)[0]


def _train_in_terminal(config: TrainConfig, rank: int, splits: Splits | None) -> None:
    """Train. Rank 0 shows the log and the progress bar, and at the end the results."""
    from sdnb.figures.live import Bar, Progress
    from sdnb.metrics.recent import RECENT_STEPS
    from sdnb.training.loop import train

    if rank:
        return train(config)
    logging.basicConfig(format="%(message)s")
    run = run_folder.RunFolder(run_folder.path_of(config))
    with logging_redirect_tqdm(), closing(Bar(each_step=True)) as bar:
        progress: Progress | None = None

        def show(record: dict[str, Any], total_steps: int) -> None:
            nonlocal progress
            progress = progress or Progress(run, total_steps, record["step"] - 1)
            progress.records = [*progress.records[-RECENT_STEPS:], record]
            bar(progress)

        train(config, show, splits)
        for number in SIGNALS:  # the run is complete: nothing is left to stop
            signal.signal(number, signal.SIG_IGN)
    _print_results(run)


def _print_results(run: run_folder.RunFolder) -> None:
    from sdnb.run.repeats import measured_of

    print(measured_of(run) if len(run.steps) else "there were no steps left", f"in {run.folder}", sep="\n")
    if run.state == "diverged":
        step = run.summary["diverged_at"]
        raise RunError(f"{run.folder}: the loss of step {step} is not finite, so this run is no result")


def _end(message: str, status: int) -> None:
    with suppress(OSError):  # the disk may be full, or the terminal gone
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
    # At once: interpreter shutdown takes a second or two, and would wait for ranks that wait for this one.
    os._exit(status)
