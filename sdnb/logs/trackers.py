"""Tables with a line for each optimizer step, that experiment trackers leave or export: SimpleTuner's
training_metrics.jsonl, swanlab's local JSON lines, MLflow's file of a metric, and the CSV of TensorBoard and wandb."""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from sdnb.errors import RunError
from sdnb.logs import sessions
from sdnb.logs.facts import checked
from sdnb.logs.sessions import Logged
from sdnb.run import files
from sdnb.run.log import Log

# The names of the columns, in small letters, in the order of preference.
_STEP = ("step", "_step", "global_step", "index")
_TIME = ("timestamp", "_timestamp", "wall time", "create_time", "time", "wall_time", "_runtime")
_LOSS = ("train_loss", "loss", "value", "data")
_UNITS = {1e17: 1e9, 1e14: 1e6, 1e11: 1e3}  # a Unix time larger than this has so many units in a second
_MOST_LINES = 10_000_000


def read(path: Path, lines: Iterable[str], settings: dict[str, Any], run: int | None = None) -> Log:
    """Read a table with the columns step, time and loss, as JSON lines, CSV, TSV, or MLflow's `time value step`.
    `settings`: facts that it does not contain. Raises RunError if a column is missing or a line cannot be read."""
    rows = _rows(path, lines)
    form = "SimpleTuner's training_metrics.jsonl" if path.name == "training_metrics.jsonl" else "table of a tracker"
    found = sessions.split(_logged(path, rows))
    if not found:
        raise RunError(f"{path}: has no line with a step, a time and a loss")
    return sessions.read(str(path), form, found, [{**_manifest(path), **settings}] * len(found), run)


def is_table(path: Path, start: str) -> bool:
    """Whether a text file that starts like this is such a table."""
    first = start.lstrip().partition("\n")[0]
    return first.startswith("{") or path.suffix in (".csv", ".tsv", ".jsonl") or _is_mlflow(first)


def _is_mlflow(line: str) -> bool:
    parts = line.split()
    return len(parts) >= 3 and parts[0].isdigit() and len(parts[0]) == 13 and parts[2].isdigit()


def _rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the line, and its values by column."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    header: list[str] = []
    header_line = ""
    for number, line in numbered:
        if number > _MOST_LINES:
            raise RunError(f"{path}: has more than {_MOST_LINES:,} lines")
        if line.lstrip().startswith("{"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the last line of a killed program
                continue
            yield number, {**row, **(row["metrics"] if isinstance(row.get("metrics"), dict) else {})}
        elif not header and _is_mlflow(line):
            time, value, step, *_ = line.split()
            yield number, dict(timestamp=time, train_loss=value, step=step)
        else:
            delimiter = max("\t;,", key=(header_line or line).count)
            try:
                values = next(csv.reader([line], delimiter=delimiter))
            except csv.Error as error:
                raise RunError(f"{path}: line {number} is no line of a table: {error}") from None
            header_line = header_line or line
            if header:
                yield number, dict(zip(header, values))
            header = header or [name.rpartition(" - ")[2] for name in values]


def _logged(path: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, Logged]]:
    for number, row in rows:
        row = {name.strip().lower(): value for name, value in row.items() if isinstance(name, str)}
        step, time, loss = (next((name for name in names if name in row), None) for names in (_STEP, _TIME, _LOSS))
        if step is None or time is None:
            absent = "step" if step is None else "time"
            raise RunError(
                f"{path}: line {number} has no {absent}, only {', '.join(row) or 'nothing'}. Speed needs the time of "
                "each step: TensorBoard events have it"
            )
        if loss is None or row[loss] in ("", None):  # another metric's line
            continue
        try:
            number_of_step = float(row[step])
            logged = Logged(_seconds(row[time]), float(row[loss]))
        except (ValueError, TypeError, OverflowError):
            raise RunError(f"{path}: line {number} has a {step}, {time} or {loss} that is no number") from None
        if isinstance(row[step], bool) or not number_of_step.is_integer() or not math.isfinite(logged.time):
            raise RunError(f"{path}: line {number} has a {step} or {time} that no step has")
        if number_of_step != 0:  # before the first step
            checked(f"{path}: line {number}", step=int(number_of_step))
            yield int(number_of_step), logged


def _seconds(time: Any) -> float:
    """Unix time, or seconds from the start."""
    try:
        seconds = float(time)
    except ValueError:
        return datetime.fromisoformat(str(time).replace("Z", "+00:00")).timestamp()
    return seconds / next((units for least, units in _UNITS.items() if seconds > least), 1)


def _manifest(path: Path) -> dict[str, Any]:
    """The settings that SimpleTuner writes beside its metrics."""
    known = files.read(path.with_suffix(".json")).get("config") if path.suffix == ".jsonl" else None
    counts = (
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "resolution",
    )  # it may be in megapixels
    names = {"pretrained_model_name_or_path": str, **dict.fromkeys(counts, int)}
    known = known if isinstance(known, dict) else {}
    return {name: known[name] for name, kind in names.items() if type(known.get(name)) is kind}
