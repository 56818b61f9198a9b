"""Compares runs: which settings and machines differ, and whether the throughput does."""

import html
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from sdnb.errors import RunError
from sdnb.machine.environment import PROJECT
from sdnb.metrics.results import PAGE_MIME, Measurements, measure
from sdnb.metrics.throughput import Estimate, ratio_of
from sdnb.run.folder import CONFIG, RunFolder
from sdnb.run.importing import PUBLISHED

BASELINE = "published"
UNKNOWN = "unknown"
# The location of a run does not affect its training.
_NOT_COMPARED = {"output_dir", "cache_dir", "logging_dir", "resume_from_checkpoint", "hub_token"}
# These decide the work per image. If they differ, a ratio of speeds compares more than machines.
_WORK = ("pretrained_model_name_or_path", "resolution")
MANY = 4  # with more runs, the statements about pairs are folded
_HAVE_RATIOS = ("images", "nominal", "seconds", "peak memory", "total time", "final loss", "held-out loss")


@dataclass(frozen=True)
class Comparison:
    """Runs by label. The first is the one that the others are compared with."""

    runs: dict[str, RunFolder]
    measured: dict[str, Measurements]

    @property
    def settings(self) -> pd.DataFrame:
        """The settings that differ, one per row; for an imported run, those that are known."""
        columns = {}
        for label, run in self.runs.items():
            known = run.environment.get("imported", {}).get("known_settings")
            columns[label] = {
                name: _text(value) if known is None or name in known else UNKNOWN
                for name, value in run.config.model_dump(mode="json", exclude=_NOT_COMPARED).items()
            }
        return _differing(pd.DataFrame(columns))

    @property
    def environments(self) -> pd.DataFrame:
        """The differences of machines and versions, one per row."""
        columns = {}
        for label, run in self.runs.items():
            seen = run.environment
            devices = seen.get("devices", {}).get("names") or [UNKNOWN]
            columns[label] = {
                "devices": f"{len(devices)} × {devices[0]}",
                "CPU": seen.get("cpu", UNKNOWN),
                "CPU instructions": seen.get("cpu_capability", UNKNOWN),
                "CPU cores": _text(seen.get("cpu_cores", UNKNOWN)),
                "system": seen.get("system", UNKNOWN),
                "Python": seen.get("python", UNKNOWN),
                **{name: _text(version) for name, version in seen.get("packages", {}).items()},
            }
        return _differing(pd.DataFrame(columns).fillna(UNKNOWN))

    @property
    def results(self) -> pd.DataFrame:
        """The results, one per row; in brackets the ratio to the first run."""
        names = dict.fromkeys(row.name for measured in self.measured.values() for row in measured.results)
        first = next(iter(self.measured.values()))
        before = {row.name: row.value for row in first.results}
        columns: dict[str, dict[str, str]] = {}
        for label, measured in self.measured.items():
            columns[label] = {}
            for row in measured.results:
                columns[label][row.name] = row.text
                if measured is not first and row.name.startswith(_HAVE_RATIOS):
                    ratio = (row.value or math.nan) / (before.get(row.name) or math.nan)
                    columns[label][row.name] += f" [×{ratio:.2f}]" if math.isfinite(ratio) else ""
        return pd.DataFrame(columns).reindex(names).fillna("")

    @property
    def statements(self) -> list[str]:
        """For each pair of runs, whether and how much they differ in images/s per device."""
        statements = [
            _compare(one, self.measured[one].throughput, other, self.measured[other].throughput)
            for one, other in combinations(self.runs, 2)
        ]
        differs = [name for name in _WORK if name in self.settings.index]
        if differs:
            statements.append(f"The runs do not do the same work per image: {' and '.join(differs)} differ.")
        return statements

    def __repr__(self) -> str:
        return "\n".join([self.results.to_string(), "", *self.statements])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        statements, labels = self.statements, list(self.runs)
        listed = f"<ul>{''.join(f'<li>{html.escape(statement)}</li>' for statement in statements)}</ul>"
        if many := len(labels) > MANY:
            listed = f"<details><summary>All {len(statements)} statements about pairs</summary>{listed}</details>"
        others = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
        folders = json.dumps([BASELINE if run.folder == PUBLISHED else str(run.folder) for run in self.runs.values()])
        return {
            "text/plain": repr(self),
            "text/html": f"{self.results.to_html()}{listed}" if many else f"{listed}{self.results.to_html()}",
            PAGE_MIME: {
                "kind": "comparison",
                "name": " beside ".join(label.replace("/", "-") for label in labels[:2]) + others,
                "title": f"{labels[0]} beside {', '.join(labels[1:])}",
                "headline": [
                    {"name": name, "text": f"{self.measured[label].throughput} images/s per device"}
                    for name, label in self._headlined(many)
                ],
                "reproduce": [
                    f"papermill notebooks/compare.ipynb comparison.ipynb -p runs {shlex.quote(folders)}",
                    "python -m sdnb.report comparison.ipynb",
                ],
            },
        }

    def _headlined(self, many: bool) -> list[tuple[str, str]]:
        """The headlines of the page, each with its run: all runs, or of many the fastest and the slowest."""
        if not many:
            return [(label, label) for label in self.runs]
        by_rate = sorted(self.runs, key=lambda label: self.measured[label].throughput.value)
        return [(f"{what}: {label}", label) for what, label in (("fastest", by_rate[-1]), ("slowest", by_rate[0]))]


def compare(runs: Sequence[str | Path] | str | Path | None = None) -> Comparison:
    """Args:
    runs: run folders, the first the one to compare with; or a folder that contains run folders. Default: the
        project's `runs/`. `published` is the published measurement that comes with the package.

    Raises:
        RunError: if one is missing or has no steps, or there are fewer than two.
    """
    found = _find(runs)
    if len(found) < 2:
        there = f"only {found[0]}" if found else "none"
        raise RunError(f"a comparison needs two runs, and there is {there}: give runs, a list of run folders")
    opened = [RunFolder(folder) for folder in found]
    for run in opened:
        if not len(run.steps):
            raise RunError(f"{run.folder}: has no steps to compare; remove it from the list")
    labelled = dict(zip(_labels([run.folder for run in opened]), opened))
    return Comparison(labelled, {label: measure(run) for label, run in labelled.items()})


def _find(given: Sequence[str | Path] | str | Path | None) -> list[Path]:
    if given is None:
        given = PROJECT / "runs"
    if isinstance(given, str) and given.lstrip().startswith("["):  # as papermill's -p gives a list
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise RunError(f'runs = {given}: is not a JSON list, such as ["one", "other"]: {error}') from None
    if isinstance(given, (str, Path)) and given != BASELINE:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise RunError(f"runs = {given}: there is no such folder (the current folder is {Path.cwd()})")
        if (folder / CONFIG).exists():
            return [folder]
        return sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if len(RunFolder(path.parent).steps))
    listed = [given] if isinstance(given, (str, Path)) else list(given)
    return [PUBLISHED if one == BASELINE else Path(one).expanduser() for one in listed]


def _labels(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that are different."""
    paths = [path.resolve() for path in paths]
    if len(set(paths)) < len(paths):
        raise RunError(
            "the same run is given twice: " + ", ".join(sorted({str(p) for p in paths if paths.count(p) > 1}))
        )
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(paths):
        parts += 1
    return ["/".join(path.parts[-parts:]) for path in paths]


def _compare(one: str, first: Estimate, other: str, second: Estimate) -> str:
    ratio = ratio_of(second, first)
    statement = f"{other} trains {ratio.value:.3g} times as many images/s per device as {one}"
    if not math.isfinite(ratio.low):
        return f"{statement}. It is unknown whether that is chance: one of them has no confidence interval."
    statement += f" (95 % confidence: {ratio.low:.3g} to {ratio.high:.3g})"
    if ratio.low <= 1 <= ratio.high:
        return f"{statement}: no significant difference."
    return f"{statement}: a significant difference. Two runs on the same machine can differ by more: repeat both."


def _differing(frame: pd.DataFrame) -> pd.DataFrame:
    known = frame.where(frame != UNKNOWN)
    return frame[known.nunique(axis=1) > 1]


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
