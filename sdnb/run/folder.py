"""The run folder: its files, written during a run and readable at any time, also after a crash."""

import errno
import fcntl
import json
import logging
import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

import pandas as pd
from PIL import Image

from sdnb.errors import RunError, SdnbError
from sdnb.machine.device_kind import kind_of
from sdnb.machine.environment import version_of
from sdnb.metrics.results import measure
from sdnb.places import runs_folder
from sdnb.run.files import DamagedFile, intact_lines, read, read_lines, remove_strays, write, write_text, writing
from sdnb.settings.config import TrainConfig

logger = logging.getLogger("sdnb")
T = TypeVar("T")

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
MODEL = "model.json"
STEPS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
LOG = "train.log"
SUMMARY = "summary.json"
ADAPTER = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` of a pipeline looks
RESULTS = "results.json"
CERTIFICATE = "certificate.json"
CERTIFIED, NOT_CERTIFIED = "certified", "not certified"  # its verdict, or another
FAILURE = "failure.json"
LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre without -o flock, some NFS
FAILURE_CLAIM = ".failure.json.claim"
SAMPLES = "samples"
SAMPLES_LIST = f"{SAMPLES}/samples.jsonl"


def path_of(config: TrainConfig) -> Path:
    """The absolute path of the run folder, `output_dir`."""
    assert config.output_dir is not None
    return Path(config.output_dir).expanduser().absolute()


def begin(config: TrainConfig, environment: dict[str, Any]) -> tuple[Path, TextIO]:
    """Make the run folder, and write what is known before the training, with the environment of `environment.capture`.
    Also returns its lock, which the caller holds until the training ends: a second start cannot come between. Raises
    RunError if the folder has a run that is not to be resumed, or is used by another run, or cannot be made."""
    folder, held = create(config)
    before = read(folder / ENVIRONMENT)
    resumed = before.get("resumed", [])
    if before or last_step(folder):
        resumed.append({"started": before.get("started"), "host": before.get("host"), "after_step": last_step(folder)})
    _save_settings(config, folder)
    # The monotonic clock is the machine's: it is the same in every process, and nobody can set it back.
    began = {"started": time.time(), "started_monotonic": time.monotonic(), "resumed": resumed}
    write(folder / ENVIRONMENT, {**environment, **began})
    if config.num_machines == 1:  # another machine may be writing, see `join`
        remove_strays(folder)
    for name in (SUMMARY, CERTIFICATE, FAILURE, FAILURE_CLAIM):  # of the run that is resumed
        (folder / name).unlink(missing_ok=True)
    return folder, held


def lock(folder: Path) -> TextIO:
    """Reserve a run folder for one run. The lock ends when the returned file is closed in every process that inherited
    it. Raises RunError if another run has it. Some network file systems have no locks: then it only logs a warning."""
    try:
        file = (folder / LOCK).open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"{folder}: another run is using this folder; wait for it, or end it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise RunError(f"{folder}: cannot be locked: {error.strerror}") from None
        logger.warning("%s cannot be locked (%s): make sure that only one run uses it", folder, error.strerror)
    return file


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or no locks
        pass
    return False


def join(config: TrainConfig) -> Path:
    """The run folder, on a machine other than machine 0, which writes it. If the folder is not shared, a local one."""
    folder = _made(config)
    if not (folder / CONFIG).exists():
        _save_settings(config, folder)
    return folder


def _save_settings(config: TrainConfig, folder: Path) -> None:
    """Without the run's location and what it resumed from, so that the file can start another run elsewhere."""
    here = ("output_dir", "resume_from_checkpoint", "main_process_ip")
    settings = config.updated(**dict.fromkeys(here), num_machines=1, machine_rank=0)
    write_text(folder / CONFIG, settings.to_yaml())


def create(config: TrainConfig) -> tuple[Path, TextIO]:
    """Make the run folder that the settings name, or a new one in `runs_folder`, and lock it. Raises
    RunError if the folder has a run that is not to be resumed, or is used by another run, or cannot be made."""
    folder = _made(config)
    held = lock(folder)
    # config.yaml alone is no run: another machine of this run may have written it, see `join`. Neither is a start that
    # failed before its first step.
    started = (folder / ENVIRONMENT).exists() and not (folder / FAILURE).exists()
    if config.resume_from_checkpoint is None and (started or last_step(folder)):
        held.close()
        raise RunError(
            f"output_dir {config.output_dir}: there is a run in it already. Give another output_dir, "
            "or set resume_from_checkpoint = latest to resume that run."
        )
    return folder, held


def _made(config: TrainConfig) -> Path:
    try:
        if config.output_dir is None:
            return new_folder(config)
        folder = path_of(config)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).touch()
        return folder
    except (OSError, ValueError, RuntimeError) as error:  # not only the system's: a path with a NUL, `~nobody`
        raise RunError(f"output_dir {config.output_dir}: cannot be written: {error}") from None


def new_folder(config: TrainConfig) -> Path:
    """Make a new folder in `runs_folder`, named by time, model and data."""
    root = runs_folder()
    name = f"{datetime.now():%Y-%m-%d-%H%M%S}-{Path(config.pretrained_model_name_or_path).name}-{data_name(config)}"
    for attempt in range(1, 1000):
        folder = root / (name if attempt == 1 else f"{name}-{attempt}")
        with suppress(FileExistsError):  # another run started in the same second
            folder.mkdir(parents=True)
            return folder
    raise FileExistsError(root / name)


def data_name(config: TrainConfig) -> str:
    """The last part of the data set's name or path."""
    return Path(config.dataset_name or config.train_data_dir or "").name


def records(folder: Path) -> list[Path]:
    """The JSON-lines files of a run folder that exist. Each of their lines has a step."""
    return [folder / name for name in (STEPS, VALIDATION, SAMPLES_LIST) if (folder / name).exists()]


def last_step(folder: Path) -> int:
    """The step of the last record; 0 if there is none."""
    return max((json.loads(line)["step"] for line in intact_lines(folder / STEPS)), default=0)


def go_back(folder: Path, step: int) -> None:
    """Remove the records after a step, so that a resumed run can record these steps again. For step 0 remove all, as
    the measurements before the first step are also repeated."""
    environment = read(folder / ENVIRONMENT)
    *earlier, last = environment.get("resumed") or [{}]
    kept = [one for one in earlier if one["after_step"] < step]
    write(folder / ENVIRONMENT, {**environment, "resumed": [*kept, {**last, "after_step": step}] if step else []})
    for path in records(folder):
        lines = [line for line in intact_lines(path) if step and json.loads(line)["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in lines))


def seconds_since_start(folder: Path) -> float | None:
    """By the monotonic clock, since `begin`; None if that is not known."""
    began = read(folder / ENVIRONMENT).get("started_monotonic")
    return None if began is None else time.monotonic() - began


def add_to_environment(folder: Path, **facts: Any) -> None:
    """Add facts about the machine that are known only when the training starts."""
    write(folder / ENVIRONMENT, {**read(folder / ENVIRONMENT), **facts})


def write_results(folder: Path) -> None:
    """Write the results of a complete run, each with its unit, interval and definition."""
    rows = [result.row() for result in measure(RunFolder(folder)).results]
    write(folder / RESULTS, {"sdnb": version_of("sdnb"), "results": rows})


def fail(folder: Path, rank: int, what: str, details: str) -> bool:
    """Write the first failure that can be written; failures of other ranks are its consequences. Returns whether this
    one is the first. Raises RunError if it cannot be written."""
    first = True
    try:
        with writing(folder / FAILURE):
            (folder / FAILURE_CLAIM).touch(exist_ok=False)
    except RunError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        first = False
        for _ in range(20):
            if (folder / FAILURE).exists():
                return False
            time.sleep(0.05)
    write(folder / FAILURE, {"rank": rank, "what": what, "details": details})
    return first


def problems_of(look: Callable[[], T], passed: tuple[type[SdnbError], ...] = ()) -> tuple[T | None, str]:
    """What `look` returns, None if it raises an error, and that error with the warnings about damaged files. Errors of
    the types in `passed` are raised."""
    seen, error = None, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            seen = look()
        except SdnbError as raised:
            if isinstance(raised, passed):
                raise
            error = str(raised)
        except Exception as raised:  # values that nobody could foresee must not hide the other runs
            error = f"a file has values that sdnb did not write: {type(raised).__name__}: {raised}"
    about_files = [str(one.message) for one in caught if issubclass(one.category, DamagedFile)]
    return seen, "; ".join(dict.fromkeys([*about_files, *([error] if error else [])]))


class RunFolder:
    """Reads a run folder. Each property reads its file again, so a running run can be watched. Raises RunError if the
    folder has no run."""

    def __init__(self, folder: str | Path) -> None:
        try:
            self.folder = Path(folder).expanduser().absolute()
            is_run = (self.folder / CONFIG).exists()
        except (OSError, ValueError, RuntimeError) as error:  # a name that no folder can have, `~nobody`
            raise RunError(f"{folder}: cannot be a run folder: {error}") from None
        if not is_run:
            raise RunError(f"{self.folder}: there is no run here ({CONFIG} is missing)")

    def __repr__(self) -> str:
        steps, ended = len(self.steps), "complete" if self.summary else "incomplete"
        return f"Run: {steps} steps, {ended}\n{self.folder}"

    @property
    def config(self) -> TrainConfig:
        config = TrainConfig.from_yaml(self.folder / CONFIG)
        if config.num_processes is None:
            raise RunError(f"{self.folder / CONFIG}: is cut off: a run's settings have num_processes")
        return config

    @property
    def environment(self) -> dict[str, Any]:
        return read(self.folder / ENVIRONMENT)

    @property
    def model(self) -> dict[str, Any]:
        """Parameters, FLOP per image, and whether the weights were random: see `describe_model`."""
        return read(self.folder / MODEL)

    @property
    def steps(self) -> pd.DataFrame:
        """The records of the optimizer steps, one row for each line of metrics.jsonl: `step` (from 1), `epoch` (from 0,
        as in the reference), `micro_batches` (of one rank), `images` (of all ranks), `loss` (mean over micro-batches
        and ranks), `train_loss` (as the reference logs it), `step_loss` (rank 0's last micro-batch), `grad_norm`
        (before clipping), `lr` (of this step), `seconds` (wall time), `phase_seconds` (its parts), and
        `peak_memory_gib` (of rank 0, so far)."""
        return read_lines(self.folder / STEPS, numbers=("step", "images", "loss", "seconds"))

    @property
    def validation(self) -> pd.DataFrame:
        """The measurements of the held-out loss: step, loss, standard_error, images."""
        measured = read_lines(self.folder / VALIDATION, numbers=("step", "loss"))
        if "pictures" in measured:  # their name in version 0.1; a run may have been resumed since
            measured["images"] = measured.pop("pictures").fillna(measured.get("images", math.nan))
        return measured

    @property
    def drawn(self) -> pd.DataFrame:
        """The drawn images: file (in samples/), step, prompt, seed, scale (of an adapter; 1 without one),
        num_inference_steps, guidance_scale. Those with the whole adapter are last."""
        drawn = read_lines(self.folder / SAMPLES_LIST, numbers=("step",), texts=("file", "prompt"))
        drawn = drawn.assign(scale=drawn.scale.fillna(1.0) if "scale" in drawn else 1.0)
        return drawn if drawn.empty else drawn.sort_values(["step", "scale"], kind="stable", ignore_index=True)

    def sample(self, file: str) -> Image.Image | None:
        """A drawn image, by its name in `drawn`; None with a warning that names it, if it is missing or damaged."""
        path = self.folder / SAMPLES / file
        try:
            return Image.open(path).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            warnings.warn(f"{path}: is damaged, and is not shown: {error}", DamagedFile, stacklevel=2)
            return None

    @property
    def summary(self) -> dict[str, Any]:
        """What is known at the end: world size, memory, times. Empty if the run is incomplete."""
        return read(self.folder / SUMMARY)

    @property
    def failure(self) -> dict[str, Any]:
        """The rank that failed, and its error. Empty if none did."""
        return read(self.folder / FAILURE)

    @property
    def certificate(self) -> dict[str, Any]:
        """What `sdnb certify` found. Empty if it was not asked."""
        return read(self.folder / CERTIFICATE)

    @property
    def known_settings(self) -> dict[str, Any]:
        """The settings, without those that an imported log did not contain: there the defaults say nothing."""
        settings = self.config.model_dump(mode="json")
        known = self.environment.get("imported", {}).get("known_settings")
        return settings if known is None else {name: settings[name] for name in settings if name in known}

    @property
    def devices(self) -> str:
        """The devices that it ran on, as `8 × NVIDIA A100`."""
        seen = self.environment.get("devices", {})
        names, ranks = seen.get("names") or [], self.config.num_processes or 1
        if names:
            return f"{len(names)} × {names[0]}"
        kind = kind_of(seen.get("type"))
        if not kind.is_known:
            return "unknown"
        return f"{ranks} × {kind.noun}{'' if kind.is_host else ', kind unknown'}"

    @property
    def state(self) -> str:
        """`complete`, `failed`, `running`, `interrupted` (it ended before its last step), or `diverged`: its loss was
        not finite, so it is no result."""
        if summary := self.summary:
            return "diverged" if summary.get("diverged_at") else "complete"
        if self.failure:
            return "failed"
        return "running" if _is_locked(self.folder) else "interrupted"

    @property
    def log(self) -> str:
        path = self.folder / LOG
        return path.read_text(errors="replace") if path.exists() else ""
