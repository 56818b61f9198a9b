"""Launches a run on every device, and follows it to its end: `sdnb.train(…)`, and in a notebook `launch(plan)`."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from sdnb.errors import RunError
from sdnb.figures.live import Live, Progress, in_notebook
from sdnb.launch.failure import advice_when_killed, how_it_was_killed
from sdnb.launch.plan import Plan, prepare
from sdnb.machine.device_kind import kind_of
from sdnb.machine.threads import share
from sdnb.report.run import Run
from sdnb.run import files, repeats
from sdnb.run import folder as run_folder
from sdnb.run.repeats import LEAST_REPEATS, MOST_REPEATS
from sdnb.settings.config import TrainConfig, takes_settings
from sdnb.training.stopping import SIGNALS, StopRequest, stopped

POLL_SECONDS = 0.5

Show = Callable[[Progress], None]


@takes_settings(output_dir=None)
def train(**settings: Any) -> Run:
    """Train with these settings on every device of the machine, and return the run. In a notebook its progress is shown
    under the cell. Without output_dir, the run folder is a new one in `runs_folder`. Raises SdnbError as `prepare` and
    `launch` do."""
    return launch(prepare(TrainConfig(**{"output_dir": None, **settings})))


def launch(plan: Plan, show: Show | None = None, replay: dict[str, Any] | None = None) -> Run:
    """Run the training in a new process, with a rank on every device, and follow it to its end; with `repeats` or
    `until`, several times, in a folder each, and return the run in the middle. An interrupt of this
    call ends every rank at once; in a notebook, the run so far is then returned. SIGTERM and SIGHUP, and the end of
    this process, stop them in good order, see `StopRequest`. Raises RunError if a rank fails, with that rank's
    traceback, and Stopped. The run folder keeps what was measured.

    Args:
        show: called twice a second. Default: `Live`, which shows the progress under the cell.
        replay: run these steps of another run in place of a training, see `training.replay`.
    """
    config = plan.config
    if config.repeats > 1 or config.until:
        return _repeat(plan, show)
    held = None
    if config.machine_rank == 0:
        folder, held = run_folder.begin(config, plan.environment)
    else:
        folder = run_folder.join(config)
    run = Run(folder)
    progress = Progress(run, config.total_steps(plan.examples.train.count), plan.resumes_after)
    show = show or Live()
    log = files.Tail(folder / run_folder.LOG)
    log.new()  # skips earlier attempts
    ends_with_us, held_here = os.pipe()
    temporary = tempfile.TemporaryDirectory(prefix="sdnb-", ignore_cleanup_errors=True)
    try:
        with held or contextlib.nullcontext():  # the process inherits it
            process = _start(plan, replay, folder, ends_with_us, held, temporary.name)
        try:
            with StopRequest() as stop:
                _follow(process, progress, log, show, stop)
        except KeyboardInterrupt:
            progress.doing, progress.log, progress.ended = f"interrupted; the measurements are in {folder}", [], True
            show(progress)
            if not in_notebook():
                raise
            return run  # the cells below show what was measured
        finally:
            _end(process)
    finally:
        os.close(held_here)  # this also ends the process, if a second interrupt came
        temporary.cleanup()
    number = -process.returncode if process.returncode < 0 else process.returncode - 128
    if number in SIGNALS:
        raise stopped(number, folder, run_folder.last_step(folder))
    if process.returncode:
        raise RunError(_explain(process, run))
    return run


def _repeat(plan: Plan, show: Show | None) -> Run:
    """Run the training several times. Runs that are complete already are kept, so the same call goes on where it was
    interrupted."""
    config, limit = plan.config, plan.config.repeats
    if config.until and limit == 1:
        limit = MOST_REPEATS
    folder = run_folder.path_of(config) if config.output_dir else run_folder.new_folder(config)
    names = [f"repeat-{number}" for number in range(1, limit + 1)]
    repeats.begin(folder, names)
    run = None
    for number, name in enumerate(names, 1):
        done = repeats.repeats_in(folder)
        if config.until and done and number > LEAST_REPEATS and done.half_width <= config.until / 100:
            break
        if not (folder / name / run_folder.SUMMARY).exists():
            one = config.updated(output_dir=str(folder / name), repeats=1, until=None)
            run = launch(replace(plan, config=one), show)
            if run.state != "complete":  # interrupted in a notebook
                return run
    done = repeats.repeats_in(folder)
    return Run(done.middle.folder) if done else run or Run(folder / names[0])


def _start(
    plan: Plan, replay: dict[str, Any] | None, folder: Path, ends_with_us: int, held: TextIO | None, temporary: str
) -> subprocess.Popen[bytes]:  # fmt: skip
    command = [sys.executable, "-m", "sdnb.launch.ranks", str(folder), str(ends_with_us), temporary]
    token = {"HF_TOKEN": plan.config.hub_token.get_secret_value()} if plan.config.hub_token else {}
    environment = {**_process_environment(plan), **os.environ, **token}
    with (folder / run_folder.LOG).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
            pass_fds=(ends_with_us, held.fileno()) if held else (ends_with_us,),
            start_new_session=True,  # its own process group, so that all of it can be ended
        )  # fmt: skip
    os.close(ends_with_us)
    config = plan.config.updated(output_dir=str(folder)).model_dump(mode="json", exclude={"hub_token"})
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # if it has ended already, its log says why
        process.stdin.write(json.dumps({"config": config, "replay": replay}).encode())
    return process


def _process_environment(plan: Plan) -> dict[str, str]:
    """Variables that the ranks' process needs before it loads torch. The user's own variables take precedence."""
    threads = {"OMP_NUM_THREADS": str(share(plan.environment["cpu_cores"], plan.config.ranks_here))}
    kind = kind_of(plan.environment["devices"]["type"])
    return {**kind.environment_of_ranks(one_machine=plan.config.num_machines == 1), **threads}


def _follow(
    process: subprocess.Popen[bytes], progress: Progress, log: files.Tail, show: Show, stop: StopRequest
) -> None:
    recorded, records = files.Tail(progress.run.folder / run_folder.STEPS), progress.records
    told = False
    while True:
        if stop.signal and not told:
            told = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, stop.signal)
        status = process.poll()
        progress.ended = status is not None
        for record in map(json.loads, recorded.new()):
            while records and records[-1]["step"] >= record["step"]:  # recorded again after a resume
                records.pop()
            records.append(record)
        progress.log = log.new()
        for line in progress.log:
            if logged := re.search(r" rank 0 INFO (.*)", line):
                progress.doing = logged[1]
        if progress.ended:
            progress.doing = "failed" if status else "complete"
        show(progress)
        if progress.ended:
            return
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all its ranks."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _explain(process: subprocess.Popen[bytes], run: Run) -> str:
    saved = f"The measurements so far ({len(run.steps)} steps) and the log are in {run.folder}"
    if failure := run.failure:
        return f"rank {failure['rank']} failed: {failure['what']}\n{failure['details'].rstrip()}\n{saved}"
    if process.returncode > 1:  # see `write_down`
        why = os.strerror(process.returncode)
        return f"{run.folder}: cannot be written: {why}. Its ranks have ended\n{saved}"
    killed = max(0, -process.returncode)
    how = how_it_was_killed(killed) if killed else "failed"
    log_end = "\n".join(run.log.rstrip().splitlines()[-20:])
    return f"the training {how}; its log ends with\n{log_end}\n{advice_when_killed(killed, run.config)}{saved}"
