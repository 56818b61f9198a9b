"""Launches a run from a notebook, on every device, and follows it to its end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from sdnb.errors import RunError
from sdnb.figures.live import Live, progress
from sdnb.launch.failure import advice_when_killed, how_it_was_killed
from sdnb.launch.plan import Plan
from sdnb.machine.threads import share
from sdnb.report.run import Run
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.train.stopping import SIGNALS, StopRequest, stopped

POLL_SECONDS = 0.5
LOG_LINES = 6

Show = Callable[[str, str, Sequence[dict[str, Any]], bool], None]


def launch(plan: Plan, show: Show | None = None) -> Run:
    """Run the training in a new process, with a rank on every device, and follow it to its end. An interrupt of this
    call ends every rank at once. SIGTERM and SIGHUP, and the end of this process, stop them in good order, see
    `StopRequest`. Raises RunError if a rank fails, with that rank's traceback, and Stopped. The run folder keeps what
    was measured.

    Args:
        show: gets the progress line, the end of the log, the records so far, and whether the training has ended, twice
            a second. Default: `Live`, which shows them under the cell.
    """
    config = plan.config
    held = None
    if config.machine_rank == 0:
        folder, held = run_folder.begin(config, plan.environment)
    else:
        folder = run_folder.join(config)
    run, steps = Run(folder), config.total_steps(len(plan.examples.train))
    records: list[dict[str, Any]] = []
    show = show or Live(steps)
    log = files.Tail(folder / run_folder.LOG)
    log.new()  # skips earlier attempts
    ends_with_us, held_here = os.pipe()
    temporary = tempfile.TemporaryDirectory(prefix="sdnb-", ignore_cleanup_errors=True)
    try:
        with held or contextlib.nullcontext():  # the process inherits it
            process = _start(plan, folder, ends_with_us, held, temporary.name)
        try:
            with StopRequest() as stop:
                _follow(process, run, log, steps, records, show, stop)
        except KeyboardInterrupt:
            show(f"interrupted after {len(run.steps)} steps; the measurements are in {folder}", "", records, True)
            raise
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


def _start(
    plan: Plan, folder: Path, ends_with_us: int, held: TextIO | None, temporary: str
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
        process.stdin.write(json.dumps(config).encode())
    return process


def _process_environment(plan: Plan) -> dict[str, str]:
    """Variables that the ranks' process needs before it loads torch. The user's own variables take precedence."""
    threads = {"OMP_NUM_THREADS": str(share(plan.environment["cpu_cores"], plan.config.ranks_here))}
    if plan.environment["devices"]["type"] != "cpu":
        # Before it forks, torch's launcher asks whether there are GPUs. It must not ask the driver, or no rank can use
        # one. accelerate sets this itself since 1.14.
        return {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", **threads}
    # Without the first, accelerate's launcher takes CPU ranks for GPU ranks, and each of them trains alone.
    network = {"GLOO_SOCKET_IFNAME": "lo"} if plan.config.num_machines == 1 else {}
    return {"ACCELERATE_USE_CPU": "true", **network, **threads}


def _follow(
    process: subprocess.Popen[bytes], run: Run, log: files.Tail, steps: int, records: list[dict[str, Any]],
    show: Show, stop: StopRequest,
) -> None:  # fmt: skip
    recorded = files.Tail(run.folder / run_folder.STEPS)
    lines: deque[str] = deque(maxlen=LOG_LINES)
    warnings: list[str] = []
    told = False
    while True:
        if stop.signal and not told:
            told = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, stop.signal)
        ended = process.poll() is not None
        for record in map(json.loads, recorded.new()):
            while records and records[-1]["step"] >= record["step"]:  # recorded again after a resume
                records.pop()
            records.append(record)
        for line in log.new():
            lines.append(line)
            if re.search(r" rank \d+ (WARNING|ERROR) ", line):
                warnings.append(line)
        show(progress(records, steps), "\n".join(warnings if ended else lines), records, ended)
        if ended:
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
