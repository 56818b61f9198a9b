"""The files of a run folder: JSON, written completely or not at all, and JSON lines, read while they grow."""

import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson
import pandas as pd

from sdnb.errors import RunError


class DamagedFile(UserWarning):
    """A file of a run cannot be read, and the rest of the run can."""


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file. Raises RunError if it cannot be written; the file is then as it was."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write`, for any text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write`, for any content."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # another machine may have the same process number
    with writing(path):
        try:
            aside.write_bytes(content)
            aside.replace(path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise


def remove_strays(folder: Path) -> None:
    """Remove what a killed `write` has left. Call it where nothing else writes into the folder."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name):
            path.unlink(missing_ok=True)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file and flush it. A number that JSON cannot express becomes null. Raises RunError
    if it cannot be written."""
    line = {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()}  # fmt: skip
    with writing(path), path.open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunError for an error of the system, as its cause."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def read(path: Path) -> dict[str, Any]:
    """A JSON file. Empty if it is missing; also, with a warning that names it, if it is damaged: the other files of the
    run are then still of use."""
    try:
        content = json.loads(path.read_text()) if path.is_file() or not path.exists() else OSError("it is not a file")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        content = error
    if isinstance(content, dict):
        return content
    why = content if isinstance(content, Exception) else f"it holds {type(content).__name__}"
    warnings.warn(f"{path}: is damaged, so what it said is unknown: {why}", DamagedFile, stacklevel=2)
    return {}


def read_lines(path: Path, numbers: tuple[str, ...] = (), texts: tuple[str, ...] = ()) -> pd.DataFrame:
    """A JSON-lines file as a table; empty if it is missing. An unfinished last line is ignored: it is being written, or
    a crash cut it. Raises RunError if another line is damaged, or has not what each should have: `numbers`, `texts`."""
    try:
        now = path.stat()
    except FileNotFoundError:
        return pd.DataFrame()
    if not path.is_file():
        raise RunError(f"{path}: is not a file")
    table = _table(path, now.st_ino, now.st_size, now.st_mtime_ns)
    for name in (*numbers, *texts) if len(table) else ():
        right = pd.api.types.is_numeric_dtype if name in numbers else pd.api.types.is_string_dtype
        if name not in table or not right(table[name]):
            kind = "a number" if name in numbers else "a text"
            raise RunError(f"{path}: is damaged: {name} is not {kind} in each line")
    return table.copy()


@lru_cache(maxsize=4)  # a notebook reads the same file for each figure
def _table(path: Path, *version: int) -> pd.DataFrame:
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = orjson.loads(line)
        except ValueError as error:
            record = error
        if not isinstance(record, dict):
            why = f"JSON: {record}" if isinstance(record, ValueError) else "a record"
            raise RunError(
                f"{path}: line {number} is not {why}. Resume the run, or remove the line; the others are good"
            )
        records.append(record)
    table = pd.DataFrame(records)
    for name in filter(lambda name: pd.api.types.is_object_dtype(table[name]), table):
        # null is how `append` writes a number that is not finite
        table[name] = table[name].where(table[name].notna(), math.nan).infer_objects()
    return table


def intact_lines(path: Path) -> Iterator[str]:
    """The lines of records, each with a step. A line that a loss of power has damaged is left out, with a warning."""
    for number, line in enumerate(Tail(path).new(), 1):
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{path}: line {number} is damaged, and is left out", DamagedFile, stacklevel=2)
        else:
            yield line


class Tail:
    """Reads new lines of a growing file. An unfinished line waits for the next call. If the file was cut or replaced,
    it is read again from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode = self.offset = 0

    def new(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_ino != self.inode or now.st_size < self.offset:
                self.inode, self.offset = now.st_ino, 0
            file.seek(self.offset)
            finished = file.read().rpartition(b"\n")[0]
        if not finished:
            return []
        self.offset += len(finished) + 1
        return finished.decode(errors="replace").split("\n")
