"""The run folder: what is in it, written while the training runs and read at any time, also after a crash."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from sdnb.errors import RunError
from sdnb.machine.environment import PROJECT
from sdnb.settings.config import TrainConfig

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
MODEL = "model.json"
STEPS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
LOG = "train.log"
SUMMARY = "summary.json"
FAILURE = "failure.json"
LOCK = ".lock"
FAILURE_CLAIM = ".failure.json.claim"
SAMPLES = "samples"
SAMPLES_LIST = f"{SAMPLES}/samples.jsonl"


def begin(config: TrainConfig, environment: dict[str, Any]) -> Path:
    """Make the run folder, and file what is known before the training.

    Args:
        environment: what `environment.capture` gives.

    Raises:
        RunError: if a run is in it already that is not to be resumed, or it cannot be made.
    """
    folder = create(config)
    lock(folder).close()
    before = _read(folder / ENVIRONMENT)
    earlier = {name: before.get(name) for name in ("started", "host")}
    resumed = [*before.get("resumed", []), {**earlier, "after_step": last_step(folder)}] if before else []
    _save_settings(config, folder)
    write(folder / ENVIRONMENT, {**environment, "started": time.time(), "resumed": resumed})
    for name in (SUMMARY, FAILURE, FAILURE_CLAIM):  # those of the run that is resumed
        (folder / name).unlink(missing_ok=True)
    return folder


def lock(folder: Path) -> TextIO:
    """Keep a run folder for one training. The lock ends when what is returned is closed, and with its process.

    Raises:
        RunError: if another training has it.
    """
    file = (folder / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"{folder}: another training is running in this folder; wait for it, or end it") from None
    return file


def join(config: TrainConfig) -> Path:
    """The run folder on a machine that trains along: machine 0 keeps it, here only its settings may have to be put."""
    folder = Path(config.output_dir).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():
        _save_settings(config, folder)
    return folder


def _save_settings(config: TrainConfig, folder: Path) -> None:
    """Without where the run is and what it went on from, so that the file makes another run elsewhere."""
    here = ("output_dir", "resume_from_checkpoint", "main_process_ip")
    config.updated(**dict.fromkeys(here), num_machines=1, machine_rank=0).save(folder / CONFIG)


def create(config: TrainConfig) -> Path:
    """Make the run folder that the settings name, or a new one under `runs/` in the project's root.

    Raises:
        RunError: if a run is in it already that is not to be resumed, or it cannot be made.
    """
    try:
        if config.output_dir is None:
            return _new_folder(config)
        folder = Path(config.output_dir).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).touch()
    except OSError as error:
        raise RunError(f"output_dir {config.output_dir}: no run can be written there: {error}") from None
    # Not by its settings: a machine that trains along may have put them there already, see `join`.
    if config.resume_from_checkpoint is None and any((folder / name).exists() for name in (STEPS, ENVIRONMENT)):
        raise RunError(
            f"output_dir {config.output_dir}: there is a run in it already. Give another output_dir, "
            "or resume_from_checkpoint = latest to go on with that run."
        )
    return folder


def _new_folder(config: TrainConfig) -> Path:
    root = (PROJECT if (PROJECT / "pyproject.toml").exists() else Path.cwd()) / "runs"
    model = Path(config.pretrained_model_name_or_path).name
    data = Path(config.dataset_name or config.train_data_dir).name
    name = f"{datetime.now():%Y-%m-%d-%H%M%S}-{model}-{data}"
    for attempt in range(1, 1000):
        folder = root / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run started in the same second
            continue
        return folder
    raise FileExistsError(root / name)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file and hand it to the system. A number that JSON has no word for becomes null."""
    line = {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()}  # fmt: skip
    with _writing(path), path.open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def records(folder: Path) -> list[Path]:
    """The JSON-lines files of a run folder, those that there are; each line says its step."""
    return [folder / name for name in (STEPS, VALIDATION, SAMPLES_LIST) if (folder / name).exists()]


def last_step(folder: Path) -> int:
    """The step of the last record; 0 if there is none."""
    return max((json.loads(line)["step"] for line in _whole_lines(folder / STEPS)), default=0)


def go_back(folder: Path, step: int) -> None:
    """Take what was recorded after a step out of the records, so that a resumed training can record it again; all of
    them before the first step, where what is measured and drawn before the training comes again too."""
    environment = _read(folder / ENVIRONMENT)
    *earlier, last = environment.get("resumed") or [{}]
    kept = [one for one in earlier if one["after_step"] < step]
    write(folder / ENVIRONMENT, {**environment, "resumed": [*kept, {**last, "after_step": step}] if step else []})
    for path in records(folder):
        kept = [line for line in _whole_lines(path) if step and json.loads(line)["step"] <= step]
        _write_whole(path, "".join(f"{line}\n" for line in kept))


def add_to_environment(folder: Path, **facts: Any) -> None:
    """What is known of the machine only when the training is about to begin."""
    write(folder / ENVIRONMENT, {**_read(folder / ENVIRONMENT), **facts})


def _whole_lines(path: Path) -> Iterator[str]:
    """The lines up to the first that a loss of power has torn."""
    for line in Tail(path).new():
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return
        yield line


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    _write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def fail(folder: Path, rank: int, what: str, details: str) -> bool:
    """File the first failure; the others' are its consequences. Returns whether this one is the first."""
    try:
        os.close(os.open(folder / FAILURE_CLAIM, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    write(folder / FAILURE, {"rank": rank, "what": what, "details": details})
    return True


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        aside.write_text(text)
        aside.replace(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


class RunFolder:
    """Reads a run folder. Each property reads the file as it is now, so that a run can be watched.

    Raises:
        RunError: if the folder holds no run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        if not (self.folder / CONFIG).exists():
            raise RunError(f"{self.folder}: there is no run here ({CONFIG} is missing)")

    def __repr__(self) -> str:
        steps, ended = len(self.steps), "complete" if self.summary else "did not reach its end"
        return f"Run: {steps} steps, {ended}\n{self.folder}"

    @property
    def config(self) -> TrainConfig:
        return TrainConfig.from_yaml(self.folder / CONFIG)

    @property
    def environment(self) -> dict[str, Any]:
        return _read(self.folder / ENVIRONMENT)

    @property
    def model(self) -> dict[str, Any]:
        """What `models.describe` says of the model."""
        return _read(self.folder / MODEL)

    @property
    def steps(self) -> pd.DataFrame:
        """The records of the optimizer steps, a line of metrics.jsonl each: `step` (from 1), `epoch` (from 0, as the
        reference's loop counts), `micro_batches` (a rank's), `images` (of all ranks), `loss` (mean over micro-batches
        and ranks), `train_loss` (as the reference logs it), `step_loss` (rank 0's last micro-batch), `grad_norm`
        (before clipping), `lr` (that the step used), `seconds` (wall time), `phase_seconds`, where they went, and
        `peak_memory_gib` (of rank 0, so far)."""
        return read_lines(self.folder / STEPS)

    @property
    def validation(self) -> pd.DataFrame:
        """The measurements of the loss on held-out pictures: step, loss, its standard error, pictures."""
        return read_lines(self.folder / VALIDATION)

    @property
    def drawn(self) -> pd.DataFrame:
        """The pictures drawn: file (in samples/), step, prompt, seed and how they were drawn."""
        return read_lines(self.folder / SAMPLES_LIST)

    @property
    def summary(self) -> dict[str, Any]:
        """What is known at the end: world size, memory, times. Empty for a run that did not reach its end."""
        return _read(self.folder / SUMMARY)

    @property
    def failure(self) -> dict[str, Any]:
        """The rank that failed, and how. Empty unless one did."""
        return _read(self.folder / FAILURE)

    @property
    def log(self) -> str:
        path = self.folder / LOG
        return path.read_text(errors="replace") if path.exists() else ""


class Tail:
    """Reads the lines that a growing file has gained. A line without its end is left for the next time. A file that
    has been cut, or another in its place, is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode = self.read_to = 0

    def new(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_ino != self.inode or now.st_size < self.read_to:
                self.inode, self.read_to = now.st_ino, 0
            file.seek(self.read_to)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self.read_to += len(whole) + 1
        return whole.decode(errors="replace").split("\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: is not JSON: {error}") from None


def read_lines(path: Path) -> pd.DataFrame:
    """A JSON-lines file as a table. A last line without its end is one that is being written, or was when a crash came:
    it is left out."""
    try:
        records = [json.loads(line) for line in Tail(path).new()]
        # null is what `append` makes of a number that is not finite
        return pd.DataFrame(
            [{key: math.nan if value is None else value for key, value in one.items()} for one in records]
        )
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: a line is not JSON: {error}") from None
