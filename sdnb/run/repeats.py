"""Runs of the same settings, one after the other: the spread between them is what a single run cannot know."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scipy.special import stdtrit

from sdnb.metrics.result import RATE, Result
from sdnb.metrics.results import Measurements, measure
from sdnb.metrics.throughput import Estimate
from sdnb.run import files
from sdnb.run.folder import RunFolder

REPEATS = "repeats.json"  # in the folder that contains the runs
MOST_REPEATS = 20  # of `until`
LEAST_REPEATS = 3  # to know a spread


@dataclass(frozen=True)
class Repeats:
    """The complete runs of a repeated training, and the images/s of a device in each."""

    runs: tuple[RunFolder, ...]
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def middle(self) -> RunFolder:
        """The run whose rate is nearest to the median: its page stands for all."""
        return min(zip(self.rates, self.runs), key=lambda one: abs(one[0] - self.median))[1]

    @property
    def mean(self) -> Estimate:
        """The mean of the runs, with its 95 % confidence interval by Student's t; NaN with fewer than three runs."""
        n, mean = len(self.rates), statistics.fmean(self.rates)
        margin = math.nan
        if n >= LEAST_REPEATS:
            margin = float(stdtrit(n - 1, 0.975)) * statistics.stdev(self.rates) / math.sqrt(n)
        return Estimate(mean, mean - margin, mean + margin)

    @property
    def half_width(self) -> float:
        """Of that interval, as a share of the mean."""
        return (self.mean.high - self.mean.value) / self.mean.value

    @property
    def without_extremes(self) -> float:
        """The mean without the fastest and the slowest run, as MLPerf computes it; NaN with fewer than three runs."""
        return statistics.fmean(sorted(self.rates)[1:-1]) if len(self.rates) >= LEAST_REPEATS else math.nan

    def results(self, name: str) -> list[Result]:
        """The rows of the results table. `name`: of the rate, such as `images/s per GPU`."""
        n, low, high = len(self.rates), min(self.rates), max(self.rates)
        each = ", ".join(f"{rate:.4g}" for rate in self.rates)
        how = f"of {n} runs of the same settings, one after the other: {each}; in brackets the slowest and the fastest"
        text, spread = str(Estimate(self.median, low, high)), (high - low) / self.median
        rows = [
            Result(f"{name}, median of {n} runs", text, how, self.median, RATE, n, low, high),
            Result(
                "spread between runs", f"{100 * spread:.1f} %", "fastest less slowest, over the median", spread, n=n
            ),
        ]
        mean, how = self.mean, "with its 95 % interval, by Student's t between the runs"
        rows.append(Result(f"{name}, mean of {n} runs", str(mean), how, mean.value, RATE, n, mean.low, mean.high))
        if math.isfinite(rest := self.without_extremes):
            how = "without the fastest and the slowest run, as MLPerf computes it"
            rows.append(Result(f"{name}, mean without extremes", f"{rest:.2f}", how, rest, RATE, n - 2))
        return rows


def repeats_in(folder: Path) -> Repeats | None:
    """The repeated training whose runs a folder contains; None if it contains none, or fewer than two complete ones."""
    runs = [RunFolder(folder / name) for name in names_in(folder) if (folder / name).is_dir()]
    complete = [run for run in runs if run.state == "complete"]
    if len(complete) < 2:
        return None
    return Repeats(tuple(complete), tuple(measure(run).throughput.value for run in complete))


def names_in(folder: Path) -> list[str]:
    """The names of the runs, complete or not, of the repeated training that a folder contains; empty if of none."""
    names = files.read(folder / REPEATS).get("runs", [])
    return names if isinstance(names, list) else []


def begin(folder: Path, names: Sequence[str]) -> None:
    """Say that a folder contains these runs."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / REPEATS, {"runs": [*names]})


def measured_of(run: RunFolder) -> Measurements:
    """The results of a run. If it is one of a repeated training, those of all its runs lead, and the rate is their
    mean."""
    measured = measure(run)
    repeats = repeats_in(run.folder.parent) if (run.folder.parent / REPEATS).exists() else None
    if repeats is None or run.state != "complete":
        return measured
    rows = repeats.results(measured.results[0].name)
    return replace(measured, throughput=repeats.mean, results=(*rows, *measured.results))
