"""What there is to resume from: checkpoint folders, whether they are whole, and whether they belong to a training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdnb.data.image_captions import ImageCaptions
from sdnb.errors import RunError
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig

MANIFEST = "checkpoint.json"
LATEST = "latest"
_REFERENCE_FILES = ("unet/config.json", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. `manifest` is None for one that the reference made."""

    folder: Path
    step: int
    manifest: dict[str, Any] | None


@dataclass(frozen=True)
class Found:
    """What there is to resume from: usable checkpoints, the first to be tried first, and why others are not."""

    usable: tuple[Checkpoint, ...]
    passed_over: tuple[str, ...]


def find(config: TrainConfig, examples: ImageCaptions) -> Found:
    """What `resume_from_checkpoint` stands for in the run folder. Nothing, if it is not set, or if it is `latest` and
    there is no checkpoint yet.

    Raises:
        RunError: if a checkpoint that is named is not there or incomplete, if none of several is complete, or if it was
            made with other settings that decide how a training goes.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return Found((), ())
    if config.output_dir is None:
        raise RunError(f"resume_from_checkpoint = {wanted}: set output_dir to the folder of the run to resume")
    where = Path(config.output_dir).expanduser().absolute()
    there = [folder for _, folder in sorted(numbered(where), reverse=True)]
    if wanted != LATEST:
        named = where / Path(wanted).name  # as the reference takes it: a path's last part, in output_dir
        if named not in there:
            names = ", ".join(folder.name for folder in there) or "none"
            raise RunError(f"resume_from_checkpoint = {wanted}: no such checkpoint in {where}; there are: {names}")
        there = [named]
    elif there:
        there = _not_given_up(where, there)
    usable, passed_over = [], []
    for folder in there:
        try:
            usable.append(_inspect(folder))
        except RunError as error:
            passed_over.append(str(error))
    if there and not usable:
        raise RunError("\n".join([f"resume_from_checkpoint = {wanted}: nothing to resume from", *passed_over]))
    if usable and not config.resume_with_changes and (differ := differences(usable[0], config, examples)):
        raise RunError(
            f"{usable[0].folder} was made with other settings, so the training would not go on as it was:\n  "
            + "\n  ".join(differ.values())
            + "\nSet them back, or set resume_with_changes to go on with those of now."
        )
    return Found(tuple(usable), tuple(passed_over))


def numbered(where: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoint folders in a run folder, whole or not, each with the step that it was made after."""
    for folder in where.glob("checkpoint-*"):
        if folder.is_dir() and (number := re.fullmatch(r"checkpoint-(\d+)", folder.name)):
            yield int(number[1]), folder


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _not_given_up(folder: Path, there: list[Path]) -> list[Path]:
    """Those no later than the records: later ones are of a training that was given up for an earlier checkpoint."""
    last = run_folder.last_step(folder)
    return [one for one in there if _step(one) <= last] or there


def _inspect(folder: Path) -> Checkpoint:
    """Raises RunError if a file is missing or is not as long as it was."""
    path = folder / MANIFEST
    if not path.exists():
        missing = [name for name in _REFERENCE_FILES if not (folder / name).is_file()]
        if missing:
            raise RunError(f"{folder}: incomplete, it has no {', '.join(missing)}")
        return Checkpoint(folder, _step(folder), None)
    try:
        manifest = json.loads(path.read_text())
        wrong = [
            f"{name} has {_size(folder / name)} of {size} bytes"
            for name, size in manifest["files"].items()
            if _size(folder / name) != size
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder}: unreadable, its {MANIFEST} is damaged: {error}") from None
    if wrong:
        raise RunError(f"{folder}: incomplete: {'; '.join(wrong)}")
    return Checkpoint(folder, _step(folder), manifest)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def identity(config: TrainConfig, examples: ImageCaptions) -> dict[str, Any]:
    """What decides how a training goes: a checkpoint keeps it, to be resumed by no other."""
    return {**config.trajectory(), "the data": examples.digest()}


def differences(checkpoint: Checkpoint, config: TrainConfig, examples: ImageCaptions) -> dict[str, str]:
    """Which settings that decide how a training goes are others now, and how; none for a checkpoint that says none."""
    if checkpoint.manifest is None:
        return {}
    then, now = checkpoint.manifest["settings"], identity(config, examples)
    return {
        name: f"{name}: {then.get(name)} in the checkpoint, {now.get(name)} now"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    }
