"""Checkpoint folders: which of them are complete, and whether they belong to a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sdnb.errors import RunError
from sdnb.machine.environment import PROCESSOR
from sdnb.run import folder as run_folder
from sdnb.run.files import intact_lines, read
from sdnb.settings.config import TrainConfig

if TYPE_CHECKING:  # who verifies a run needs no data, and loading that takes seconds
    from sdnb.data.image_captions import ImageCaptions
    from sdnb.data.stream import ImageStream

MANIFEST = "checkpoint.json"
_REFERENCE_FILES = ("unet/config.json", run_folder.ADAPTER), ("optimizer.bin",), ("scheduler.bin",)  # one of each


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. `manifest` is None if the reference made it."""

    folder: Path
    step: int
    manifest: dict[str, Any] | None


@dataclass(frozen=True)
class FoundCheckpoints:
    """Usable checkpoints, best first, and why others are not usable."""

    usable: tuple[Checkpoint, ...]
    rejected: tuple[str, ...]


def find_checkpoints(config: TrainConfig, examples: ImageCaptions | ImageStream) -> FoundCheckpoints:
    """The checkpoints that `resume_from_checkpoint` names. Empty if it is not set, or if it is `latest` and there is no
    checkpoint yet. Raises RunError if a named checkpoint is missing or incomplete, if none of several is complete, or
    if settings that affect the result have changed."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return FoundCheckpoints((), ())
    if config.output_dir is None:
        raise RunError(f"resume_from_checkpoint = {wanted}: set output_dir to the folder of the run to resume")
    where = run_folder.path_of(config)
    found = sorted(numbered(where), reverse=True)
    if wanted == "latest":
        # If the run was resumed from an earlier checkpoint, it abandoned those after its last record.
        last = run_folder.last_step(where)
        candidates = [(step, folder) for step, folder in found if step <= last] or found
    else:
        name = Path(wanted).name  # like the reference: the last part of a path, in output_dir
        candidates = [(step, folder) for step, folder in found if folder.name == name]
        if not candidates:
            names = ", ".join(folder.name for _, folder in found) or "none"
            raise RunError(f"resume_from_checkpoint = {wanted}: no such checkpoint in {where}; found: {names}")
    usable, rejected = [], []
    for step, folder in candidates:
        try:
            usable.append(Checkpoint(folder, step, manifest_of(folder)))
        except RunError as error:
            rejected.append(str(error))
    if rejected and not usable:
        raise RunError("\n".join([f"resume_from_checkpoint = {wanted}: no checkpoint can be used", *rejected]))
    if usable and not config.resume_with_changes and (changed := differences(usable[0], config, examples)):
        raise RunError(
            f"{usable[0].folder} was made with other settings, and these affect the result:\n  "
            + "\n  ".join(changed.values())
            + "\nSet them back, or set resume_with_changes to resume with the new ones."
        )
    return FoundCheckpoints(tuple(usable), tuple(rejected))


def numbered(where: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoint folders in a run folder, complete or not, each with its step."""
    for folder in where.glob("checkpoint-*"):
        if folder.is_dir() and (number := re.fullmatch(r"checkpoint-(\d+)", folder.name)):
            yield int(number[1]), folder


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None if the reference made it. Raises RunError if a file is missing or has
    another size than in the manifest."""
    if not (folder / MANIFEST).exists():
        there = {name for names in _REFERENCE_FILES for name in names if (folder / name).is_file()}
        if missing := [names[0] for names in _REFERENCE_FILES if not there & {*names}]:
            raise RunError(f"{folder}: incomplete, it has no {', '.join(missing)}")
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = [
            (name, (folder / name).stat().st_size if (folder / name).is_file() else 0, size)
            for name, size in manifest["files"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder}: unreadable, its {MANIFEST} is damaged: {error}") from None
    if wrong := [f"{name} has {found} of {size} bytes" for name, found, size in files if found != size]:
        raise RunError(f"{folder}: incomplete: {'; '.join(wrong)}")
    return manifest


def digest_of(path: Path, digest: Any = None) -> str:
    """A hash of a file; default: 128 bits of XXH3, which are computed faster than a disk reads."""
    digest = digest or xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return str(digest.hexdigest())


def changed_files(checkpoint: Checkpoint) -> list[str]:
    """The files whose content is not what was saved. The reference and version 0.1 saved no digests."""
    digests = (checkpoint.manifest or {}).get("digests", {})
    return [name for name, digest in digests.items() if digest_of(checkpoint.folder / name) != digest]


def identity(config: TrainConfig, examples: ImageCaptions | ImageStream) -> dict[str, Any]:
    """All that affects the result of a run. A checkpoint stores it."""
    return {**config.trajectory(), "the data": examples.digest()}


def records_digest(folder: Path, step: int) -> str:
    """A hash of the records and held-out losses up to a step: a checkpoint commits to what was measured before it."""
    recorded = (line for name in (run_folder.STEPS, run_folder.VALIDATION) for line in intact_lines(folder / name))
    lines = [line for line in recorded if json.loads(line)["step"] <= step]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def machine_and_software(folder: Path) -> dict[str, Any]:
    """The part of a run's environment that a checkpoint commits to."""
    environment = read(folder / run_folder.ENVIRONMENT)
    names = ("host", PROCESSOR, "devices", "packages", "code", "git_commit")
    return {name: environment.get(name) for name in names}


def differences(checkpoint: Checkpoint, config: TrainConfig, examples: ImageCaptions | ImageStream) -> dict[str, str]:
    """By name, what affects the result and has changed since the checkpoint. Empty if the checkpoint does not say."""
    if checkpoint.manifest is None:
        return {}
    then, now = checkpoint.manifest["settings"], identity(config, examples)
    return {
        name: f"{name}: {then.get(name)} in the checkpoint, {now.get(name)} now"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    }
