"""From a notebook: what will run where, and the run itself on every device, followed to its end."""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdnb.data import image_captions as data
from sdnb.errors import ConfigError, RunError
from sdnb.figures.live import Live, progress
from sdnb.launch import memory
from sdnb.machine import environment
from sdnb.machine.threads import share
from sdnb.models import pipeline as models
from sdnb.report.run import Run
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.train.checkpoint_folder import find

POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0
LOG_LINES = 6

Show = Callable[[str, str, Sequence[dict[str, Any]], bool], None]


@dataclass(frozen=True)
class Plan:
    """What will run where: settings in which nothing is left open, the machine, and the data."""

    config: TrainConfig
    environment: dict[str, Any]
    examples: data.Splits
    predicted: memory.Prediction | None
    resumes_after: int = 0

    @property
    def facts(self) -> dict[str, str]:
        """What a reader wants to know before the training starts."""
        config, count = self.config, len(self.examples.train)
        resumed = {"resumes": f"after step {self.resumes_after}"} if self.resumes_after else {}
        devices = self.environment["devices"]
        on_gpu = devices["type"] != "cpu"
        ranks = "1 rank" if config.num_processes == 1 else f"{config.num_processes} ranks"
        micro_batches = config.micro_batches_per_epoch(count)
        per_epoch = config.steps_per_epoch(count)
        trained = _pictures_per_epoch(config, count)
        short = 0 if config.whole_steps else per_epoch - trained // config.global_batch
        steps = config.total_steps(count)
        held_out = len(self.examples.held_out) if self.examples.held_out is not None else 0
        return {
            "model": config.pretrained_model_name_or_path,
            "data": f"{config.dataset_name or config.train_data_dir}: {count} to train on, {held_out} held out",
            "runs on": f"{ranks}, "
            + (
                f"each on {devices['names'][0]} with {devices['memory_gib'][0]} GiB"
                if on_gpu
                else f"on the CPU: {devices['names'][0]}, {self.environment['cpu_cores']} cores"
            ),
            "precision": config.mixed_precision + (" (float32)" if config.mixed_precision == "no" else ""),
            "global batch": f"{config.global_batch} = {config.train_batch_size} × "
            f"{config.gradient_accumulation_steps} micro-batches × {ranks}",
            "an epoch": f"{micro_batches} micro-batches a rank, {per_epoch:g} optimizer steps, "
            f"{short} of them short; {trained} pictures"
            + (f", {trained - count} of them repeats that fill the last round" if trained > count else "")
            + (f", {count - trained} are left for another epoch" if trained < count else ""),
            "the training": f"{steps} steps, {steps / per_epoch:.1f} epochs",
            **self._memory,
            **resumed,
        }

    @property
    def _memory(self) -> dict[str, str]:
        together = self.config.fold_micro_batches
        folded = {"micro-batches": f"{together} of a step are run as one larger batch"} if together > 1 else {}
        if self.predicted is None:
            return folded
        free_gib = memory.per_rank(
            self.config, self.environment["devices"]["type"], self.environment["devices"]["free_gib"]
        )
        what = "free" if self.config.memory_gib is None else "allowed by memory_gib"
        return {**folded, "memory": f"{self.predicted.total_gib:.1f} GiB a rank predicted, {free_gib:.1f} GiB {what}"}

    def look(self, count: int) -> tuple[list[Image.Image], list[str], int]:
        """Some pictures to train on, from all over the data set, with their captions; and how many there are in all."""
        train = self.examples.train
        rows = range(0, len(train), max(1, math.ceil(len(train) / count)))
        captions = [train.captions[row] for row in rows]
        return [train.picture(row) for row in rows], [data.first_caption(one) for one in captions], len(train)

    def _repr_html_(self) -> str:
        settings = {name: value for name, value in self.config.model_dump().items() if value is not None}
        folded = f"<summary>All {len(settings)} settings</summary>{_table(settings)}"
        return f"{_table(self.facts)}<details class='plan-settings'>{folded}</details>"

    def __repr__(self) -> str:
        return "\n".join(f"{name + ':':<14}{value}" for name, value in self.facts.items())


def _pictures_per_epoch(config: TrainConfig, examples: int) -> int:
    if config.num_processes == 1 and not config.whole_steps:
        return examples
    return config.micro_batches_per_epoch(examples) * config.num_processes * config.train_batch_size


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def prepare(config: TrainConfig) -> Plan:
    """Settle what the settings leave open, and load the data, before anything is launched.

    Raises:
        SdnbError: if this machine, its memory, the model's name or the data do not allow what is asked for.
    """
    seen = environment.capture()
    devices = seen["devices"]
    config = config.resolved(devices["type"], len(devices["names"]), devices["bf16"])
    environment.require(config)
    _require_port(config)
    models.source(config)
    config, predicted = memory.settle(config, environment.Devices(**devices))
    examples = data.load(config)
    config.total_steps(len(examples.train))  # which there may be too few examples for
    checkpoints = find(config, examples.train).usable
    return Plan(config, seen, examples, predicted, checkpoints[0].step if checkpoints else 0)


def _require_port(config: TrainConfig) -> None:
    """Raises:
    ConfigError: if something else listens where the ranks are to meet: it might keep them waiting for ever.
    """
    port = config.meeting_port
    if port and config.machine_rank == 0 and config.num_processes > 1:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended is no hindrance
            try:
                probe.bind(("", port))
            except OSError as error:
                raise ConfigError(
                    f"main_process_port = {port}: the ranks cannot meet there: {error.strerror}. Set it to another, "
                    "the same on every machine; one machine alone finds one by itself"
                ) from None


def launch(plan: Plan, show: Show | None = None) -> Run:
    """Run the training in a clean process, with a rank on every device, and follow it to its end.

    Interrupting this call ends every rank within seconds; so does the end of this process, however it comes.

    Args:
        show: is given the progress line, the end of the log, the records of the steps so far, and whether the training
            has ended, twice a second; left out, `live.Live` shows them under the cell.

    Raises:
        RunError: if a rank fails, with that rank's own traceback. What was measured until then is in the run folder.
    """
    config = plan.config
    folder = run_folder.begin(config, plan.environment) if config.machine_rank == 0 else run_folder.join(config)
    run, steps = Run(folder), config.total_steps(len(plan.examples.train))
    records: list[dict[str, Any]] = []
    show = show or Live(steps)
    log = run_folder.Tail(folder / run_folder.LOG)
    log.new()  # of the attempts before this one

    ends_with_us, held_here = os.pipe()
    try:
        process = _start(plan, folder, ends_with_us)
        try:
            _follow(process, run, log, steps, records, show)
        except KeyboardInterrupt:
            show(f"interrupted after {len(run.steps)} steps; what was measured is in {folder}", "", records, True)
            raise
        finally:
            _end(process)
    finally:
        os.close(held_here)  # which ends the process too, if an impatient second interrupt came
    if process.returncode:
        raise RunError(_why(process, run))
    return run


def _start(plan: Plan, folder: Path, ends_with_us: int) -> subprocess.Popen:
    with (folder / run_folder.LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdnb.launch.ranks", str(folder), str(ends_with_us)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**_process_environment(plan), **os.environ, **_token(plan.config)},
            pass_fds=(ends_with_us,),
            start_new_session=True,  # a group of its own, so that all of it can be ended, and no signal goes astray
        )
    os.close(ends_with_us)
    config = plan.config.updated(output_dir=str(folder)).model_dump(mode="json", exclude={"hub_token"})
    with contextlib.suppress(BrokenPipeError), process.stdin:  # where it has ended already, its log says why
        process.stdin.write(json.dumps(config).encode())
    return process


def _token(config: TrainConfig) -> dict[str, str]:
    return {"HF_TOKEN": config.hub_token.get_secret_value()} if config.hub_token else {}


def _process_environment(plan: Plan) -> dict[str, str]:
    """What the ranks' process needs in its environment before it loads torch; the user's own variables go before it."""
    threads = {"OMP_NUM_THREADS": str(share(plan.environment["cpu_cores"], plan.config.ranks_here))}
    if plan.environment["devices"]["type"] != "cpu":
        # torch's launcher asks, before it forks, whether there are GPUs: without this the driver, and then no rank can
        # use one. accelerate sees to that itself since 1.14.
        return {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", **threads}
    # Without the first, accelerate's launcher takes CPU ranks for GPU ranks, and each of them trains alone.
    network = {"GLOO_SOCKET_IFNAME": "lo"} if plan.config.num_machines == 1 else {}
    return {"ACCELERATE_USE_CPU": "true", **network, **threads}


def _follow(
    process: subprocess.Popen, run: Run, log: run_folder.Tail, steps: int, records: list[dict[str, Any]], show: Show
) -> None:
    recorded = run_folder.Tail(run.folder / run_folder.STEPS)
    lines: deque[str] = deque(maxlen=LOG_LINES)
    warnings: list[str] = []
    while True:
        ended = process.poll() is not None
        for record in map(json.loads, recorded.new()):
            while records and records[-1]["step"] >= record["step"]:  # recorded again, after a resume
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


def _end(process: subprocess.Popen) -> None:
    """End the process and every rank of it."""
    for kill, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(process.pid, kill)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _why(process: subprocess.Popen, run: Run) -> str:
    saved = f"What was measured until then ({len(run.steps)} steps) and the log are in {run.folder}"
    failure = run.failure
    if failure:
        return f"rank {failure['rank']} failed: {failure['what']}\n{failure['details'].rstrip()}\n{saved}"
    how = f"died of {signal.Signals(-process.returncode).name}" if process.returncode < 0 else "failed"
    log_end = "\n".join(run.log.rstrip().splitlines()[-20:])
    return f"the training {how}; its log ends with\n{log_end}\n{saved}"
