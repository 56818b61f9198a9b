"""Compares runs: which settings and machines differ, and whether the throughput does."""

import html
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from sdnb.errors import RunError
from sdnb.machine.environment import PROCESSOR
from sdnb.metrics.result import Result
from sdnb.metrics.results import PAGE_MIME, Measurements
from sdnb.metrics.throughput import Estimate, ratio_of
from sdnb.places import runs_folder
from sdnb.run.baselines import PUBLISHED, Baseline, baselines
from sdnb.run.folder import CONFIG, NOT_CERTIFIED, RunFolder, problems_of
from sdnb.run.log import UNKNOWN
from sdnb.run.repeats import REPEATS, measured_of, repeats_in
from sdnb.settings.fields import several

BASELINE = "published"
# The location of a run does not affect its training.
_NOT_COMPARED = {"output_dir", "cache_dir", "logging_dir", "resume_from_checkpoint", "hub_token"}
# These decide the work per image. If they differ, a ratio of speeds compares more than machines.
_WORK = ("pretrained_model_name_or_path", "resolution")
MANY = 4  # with more runs, the statements about pairs are folded
_HAVE_RATIOS = ("images", "unique", "nominal", "seconds", "peak memory", "total time", "final loss", "held-out loss")


@dataclass(frozen=True)
class Comparison:
    """Runs by label. The first is the one that the others are compared with."""

    runs: dict[str, RunFolder | Baseline]
    measured: dict[str, Measurements]
    problems: tuple[str, ...] = ()  # runs that were left out, and files that cannot be read

    @property
    def settings(self) -> pd.DataFrame:
        """The settings that differ, one per row; for an imported run, those that are known."""
        columns = {}
        for label, run in self.runs.items():
            known = run.known_settings
            names = run.config.model_dump(exclude=_NOT_COMPARED)
            columns[label] = {name: _text(known[name]) if name in known else UNKNOWN for name in names}
        return _differing(pd.DataFrame(columns))

    @property
    def environments(self) -> pd.DataFrame:
        """The differences of machines and versions, one per row."""
        columns = {}
        for label, run in self.runs.items():
            seen = run.environment
            columns[label] = {
                "devices": run.devices,
                "CPU": seen.get(PROCESSOR, UNKNOWN),
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
        first, *_ = self.measured.values()
        before = {_per_device(row.name): row.value for row in self._rows(first)}
        columns: dict[str, dict[str, str]] = {}
        for label, measured in self.measured.items():
            columns[label] = {}
            for row in self._rows(measured):
                name = _per_device(row.name)
                columns[label][name] = row.text
                if measured is not first and name.startswith(_HAVE_RATIOS):
                    ratio = (row.value or math.nan) / (before.get(name) or math.nan)
                    columns[label][name] += f" [×{ratio:.2f}]" if math.isfinite(ratio) else ""
        names = dict.fromkeys(name for column in columns.values() for name in column)
        return pd.DataFrame(columns).reindex(names).fillna("")

    @staticmethod
    def _rows(measured: Measurements) -> list[Result]:
        """The results; the rate of a log that shows only the whole stands in the row of the others' rates."""
        first = _rate_of(measured)
        renamed = replace(first, name=first.name.partition(",")[0], text=f"{first.text}, whole training")
        return [*measured.results] if renamed.name == first.name else [renamed, *measured.results]

    @property
    def caveat(self) -> str:
        """A sentence, if the runs do not do the same work per image: their rates then compare more than machines."""
        differ = [name for name in _WORK if name in self.settings.index]
        return f"The runs do not do the same work per image: {' and '.join(differ)} differ." if differ else ""

    @property
    def _published(self) -> list[str]:
        """In what published measurements are not comparable."""
        return [
            f"{label} differs from a run of diffusers' script: {'; '.join(run.not_comparable)}."
            for label, run in self.runs.items() if isinstance(run, Baseline)
        ]  # fmt: skip

    @property
    def statements(self) -> list[str]:
        """For each pair of runs, whether and how much they differ in images/s per device."""
        rates = {label: measured.throughput for label, measured in self.measured.items()}
        doubts = {label: self._doubts(label) for label in rates}
        pairs = [_compare(one, rates[one], other, rates[other], {label: doubts[label] for label in (one, other)})
                 for one, other in combinations(rates, 2)]  # fmt: skip
        return [*filter(None, [self.caveat]), *self._published, *pairs, *self.problems]

    def _doubts(self, label: str) -> list[str]:
        """Why a run's rate is not to be compared: its machine was shared, or its training was another."""
        run = self.runs[label]
        rejected = isinstance(run, RunFolder) and run.certificate.get("verdict") == NOT_CERTIFIED
        return [*self.measured[label].disturbed, *(["its training is not certified"] if rejected else [])]

    def __repr__(self) -> str:
        return "\n".join([self.results.to_string(), "", *self.statements])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        statements, labels, table = self.statements, list(self.runs), self.results.to_html()
        listed = f"<ul>{''.join(f'<li>{html.escape(statement)}</li>' for statement in statements)}</ul>"
        shown, headlined = f"{listed}{table}", dict(self.measured)
        if len(labels) > MANY:
            listed = f"<details><summary>All {len(statements)} statements about pairs</summary>{listed}</details>"
            by_rate = sorted(labels, key=lambda label: self.measured[label].throughput.value)
            slowest, fastest = by_rate[0], by_rate[-1]
            caveat = "".join(f"<p>{html.escape(text)}</p>" for text in (self.caveat, *self._published) if text)
            shown = f"{caveat}{table}{listed}"
            headlined = {f"fastest: {fastest}": self.measured[fastest], f"slowest: {slowest}": self.measured[slowest]}
        others = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
        folders = json.dumps([BASELINE if run.folder == PUBLISHED else str(run.folder) for run in self.runs.values()])
        page = dict(
            kind="comparison", name=" beside ".join(label.replace("/", "-") for label in labels[:2]) + others,
            title=f"{labels[0]} beside {', '.join(labels[1:])}",
            headline=[{**_rate_of(measured).row(), "name": name, "unit": "images/s per device"}
                      for name, measured in headlined.items()],
            badges=[{"text": "different work per image", "kind": "bad"}] if self.caveat else [],
            reproduce=[f"papermill notebooks/compare.ipynb comparison.ipynb -p runs {shlex.quote(folders)}",
                       "sdnb report comparison.ipynb"],
        )  # fmt: skip
        return {"text/plain": repr(self), "text/html": shown, PAGE_MIME: page}


def compare(runs: Sequence[str | Path] | str | Path | None = None) -> Comparison:
    """Compare the runs in a list of run folders with the first of them, or the runs in one folder, by default the
    project's `runs/`. `published` stands for the published measurement that comes with the package, and so do the
    names that `sdnb.published()` lists. Raises RunError if a run in the list is missing, has no steps or cannot be
    read, or there are fewer than two. In a folder, such a run is left out; if it cannot be read, `problems` says so."""
    folders, listed = _find(runs_folder() if runs is None else runs)
    found: dict[Path, tuple[RunFolder | Baseline, Measurements]] = {}
    problems = []
    for folder in folders:
        if _is_diverged(folder):
            problems.append(f"Left out: {folder}: its loss was not finite, so it is no result.")
            continue
        one, problem = problems_of(partial(_measured, folder, listed))
        if one is not None:
            found[folder] = one
        elif problem and listed:
            raise RunError(problem)
        if problem:
            problems.append(problem if one else f"Left out: {problem}")
    if len(found) < 2:
        there = f"only {next(iter(found))}" if found else "none"
        needed = f"a comparison needs two runs, and there is {there}: give runs, a list of run folders"
        raise RunError("\n".join([needed, *problems]))
    labelled = dict(zip(_labels(list(found)), found.values()))
    opened = {label: run for label, (run, _) in labelled.items()}
    return Comparison(opened, {label: measured for label, (_, measured) in labelled.items()}, tuple(problems))


def _per_device(name: str) -> str:
    """The name of a result, whatever the device is called: so the rates of all runs are in one row."""
    return re.sub(r"\b(GPU|NPU|MLU|HPU|CPU rank|rank)(s?)\b", r"device\2", name) if "images/s" in name else name


def _rate_of(measured: Measurements) -> Result:
    return next(row for row in measured.results if row.name.startswith("images/s per"))


def _measured(folder: Path, listed: bool) -> tuple[RunFolder | Baseline, Measurements] | None:
    if baseline := baselines().get(str(folder)):
        return baseline, baseline.measured
    repeats = repeats_in(folder) if (folder / REPEATS).exists() else None
    run = repeats.middle if repeats else RunFolder(folder)
    if len(run.steps):
        return run, measured_of(run)
    if listed:
        raise RunError(f"{run.folder}: has no steps to compare; remove it from the list")
    return None


def _find(given: Sequence[str | Path] | str | Path) -> tuple[list[Path], bool]:
    """The run folders, and whether they were listed one by one."""
    if isinstance(given, str) and given.lstrip().startswith("["):
        given = several(given)
    if given == BASELINE:
        return [PUBLISHED], True
    if isinstance(given, (str, Path)):
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise RunError(f"runs = {given}: there is no such folder (the current folder is {Path.cwd()})")
        if (folder / CONFIG).exists():
            return [folder], True
        if (folder / REPEATS).exists():
            return [folder], True
        return sorted(path.parent for name in (CONFIG, REPEATS) for path in folder.glob(f"*/{name}")), False
    listed = [_path_of(one) for one in given]
    if twice := sorted({str(folder) for folder in listed if listed.count(folder) > 1}):
        raise RunError(f"the same run is given twice: {', '.join(twice)}")
    return listed, True


def _is_diverged(folder: Path) -> bool:
    try:
        return RunFolder(folder).state == "diverged"
    except RunError:  # said by whoever needs its files
        return False


def _path_of(given: str | Path) -> Path:
    if given == BASELINE:
        return PUBLISHED
    return Path(given) if str(given) in baselines() else Path(given).expanduser().resolve()


def _labels(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that are different."""
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(paths):
        parts += 1
    return ["/".join(path.parts[-parts:]) for path in paths]


def _compare(one: str, first: Estimate, other: str, second: Estimate, doubts: dict[str, list[str]]) -> str:
    ratio = ratio_of(second, first)
    statement = f"{other} trains {ratio.value:.3g} times as many images/s per device as {one}"
    if not math.isfinite(ratio.low):
        return f"{statement}. It is unknown whether that is chance: one of them has no confidence interval."
    statement += f" (95 % confidence: {ratio.low:.3g} to {ratio.high:.3g})"
    if why := [f"{label}: {', '.join(reasons)}" for label, reasons in doubts.items() if reasons]:
        return f"{statement}. It is not judged whether that is chance ({'; '.join(why)})."
    if ratio.low <= 1 <= ratio.high:
        return f"{statement}: no significant difference."
    return f"{statement}: a significant difference. Two runs on the same machine can differ by more: repeat both."


def _differing(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame.where(frame != UNKNOWN).nunique(axis=1) > 1]


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
