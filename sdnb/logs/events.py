"""TensorBoard events of diffusers' scripts: `train_loss` after each step, with the time when it was logged."""

import fnmatch
import math
import os
import struct
from pathlib import Path
from typing import Any

from sdnb.errors import RunError
from sdnb.logs import sessions
from sdnb.logs.sessions import Logged, Session
from sdnb.run.log import Log
from sdnb.settings.config import read_yaml

_NAMES = "events.out.tfevents*"
# Hyperparameters that are imported as settings: those of the work, and not those of this machine.
_IMPORTED = (
    "pretrained_model_name_or_path", "revision", "dataset_name", "resolution", "center_crop", "random_flip",
    "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "max_train_steps", "learning_rate",
    "lr_scheduler", "lr_warmup_steps", "snr_gamma", "noise_offset", "prediction_type", "use_ema", "mixed_precision",
    "max_grad_norm", "seed", "enable_xformers_memory_efficient_attention", "rank",
)  # fmt: skip
_MOST_FILES = 100_000


def is_events(source: Path) -> bool:
    """Whether this is an event file, or a folder that contains one."""
    return source.match(_NAMES) if source.is_file() else source.is_dir() and bool(_files(source, _NAMES))


def read(source: Path, settings: dict[str, Any], run: int | None = None) -> Log:
    """Read an event file, or a folder of event files. `settings`: facts that they do not contain. Raises RunError if
    there are no events of a run, they cannot be read, or there is no such `run` in them."""
    paths = [source] if source.is_file() else _files(source, _NAMES)
    remarks = [remark for path in paths if (remark := _cut_off(path))]
    found = [session for path in paths if (session := _session(path))]
    if not found:
        raise RunError("; ".join([f"{source}: has no TensorBoard events with a train_loss", *remarks]))
    found.sort(key=lambda session: min(one.time for one in session.values()))
    known = [{**_hyperparameters(source, min(one.time for one in session.values())), **settings} for session in found]
    log = sessions.read(str(source), "TensorBoard events of a diffusers script", found, known, run)
    log.remarks += remarks
    return log


def _files(folder: Path, name: str) -> list[Path]:
    """The files of a name in a folder and its subfolders. Raises RunError if there are too many to look through."""
    found, count = [], 0
    for where, _, names in os.walk(folder):
        count += len(names)
        if count > _MOST_FILES:
            raise RunError(f"{folder}: has more than {_MOST_FILES:,} files; give the folder of the events")
        found += [path for one in fnmatch.filter(names, name) if (path := Path(where, one)).is_file()]
    return sorted(found)


def _session(path: Path) -> Session:
    """The events of a file; empty if it has none of a training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    try:
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if "train_loss" not in accumulator.Tags()["scalars"]:
            return {}
        return {event.step: Logged(event.wall_time, event.value) for event in accumulator.Scalars("train_loss")}
    except Exception as error:  # a damaged file raises many types
        raise RunError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None


def _hyperparameters(source: Path, began: float) -> dict[str, Any]:
    """The settings that accelerate wrote last before a run began, each in a folder named by the time."""
    found = []
    for path in _files(source if source.is_dir() else source.parent, "hparams.yml"):
        try:
            found.append((float(path.parent.name), path))
        except ValueError:  # put there by hand
            found.append((-math.inf, path))
    found.sort()
    before = [path for at, path in found if at <= began] or [path for _, path in found]
    known = read_yaml(before[-1]) if before else {}
    imported = {name: known[name] for name in _IMPORTED if known.get(name) is not None}
    return {**imported, "lora": True} if "rank" in imported else imported  # only the script for LoRA has a rank


def _cut_off(path: Path) -> str:
    """What is missing at the end of an event file; empty if it is whole. Each record has 8 bytes with the length of its
    content, 4 bytes, the content, and 4 bytes."""
    size, end, records = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length = struct.unpack("<Q", head[:8])[0] + 4
            if length > size - end - 12:
                break
            end = file.seek(length, 1)
            records += 1
    return "" if end == size else f"{path.name} is cut off: {records} records, {end:,} of {size:,} bytes, were read"
