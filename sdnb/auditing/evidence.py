"""What a log or a run shows, and each way in which someone can compute images/s from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from sdnb.metrics.results import Measurements
from sdnb.settings.config import TrainConfig

_WHOLE = "over the whole training"
# What can be wrong with a way to compute images/s.
SHORT, SMOOTHING, WARMUP, SAVING = "short steps as full", "moving average", "warm-up in it", "saving in it"
_READING = 0.02  # of the rate: what one reading of a moving average says about the steps


@dataclass(frozen=True)
class Way:
    """A way to compute images/s of a device, and what is wrong with it."""

    name: str
    rate: float
    how: str
    faults: frozenset[str] = frozenset()
    tolerance: float = 0.0  # how far the rate may be off, as a share of it, for what the log shows is rounded


@dataclass(frozen=True)
class Evidence:
    """A log or a run, and what was measured from it."""

    name: str
    measured: Measurements
    environment: dict[str, Any]
    total_seconds: float | None
    recorded: list[dict[str, Any]]  # the rows of results.json of a run of sdnb
    recorded_by: str | None = None  # the version of sdnb

    @property
    def config(self) -> TrainConfig:
        return self.measured.config

    @property
    def steps(self) -> pd.DataFrame:
        return self.measured.steps

    @property
    def log(self) -> dict[str, Any]:
        """What was imported; empty for a run of sdnb, which recorded its own steps."""
        return self.environment.get("imported", {})

    @property
    def is_own(self) -> bool:
        return not self.log

    @property
    def trained_seconds(self) -> float | None:
        """From the start to the end of the last step."""
        if self.is_own:
            return float(self.steps.seconds.sum())
        return self.log.get("trained_seconds")

    @property
    def only_whole_is_known(self) -> bool:
        return bool(self.log) and self.measured.results[0].name.endswith("whole training")

    @cached_property
    def ways(self) -> list[Way]:
        """The first is the rate that the log shows best. The others have faults."""
        rate, ranks, images = self.measured.throughput.value, self.config.ranks, self.steps.images.sum()
        if self.only_whole_is_known:
            how = f"{images:.0f} images / {self.trained_seconds:.1f} s / {ranks}"
            found = [Way(_WHOLE, rate, how, frozenset({WARMUP}), self._by_clock(self.trained_seconds))]
        elif "smoothing undone" in self.measured.results[0].how:
            shown = self.log["shown_seconds_per_step"]
            how = f"{rate * shown * ranks:.4g} images, averaged as the seconds / {shown:.4g} s / {ranks}"
            found = [Way("near the end", rate, how, tolerance=_READING + 0.005 / shown)]
        else:
            found = [Way("after the warm-up", rate, f"images / seconds of these steps / {ranks}")]
        found += self._of_the_whole(images, ranks)
        found += self._of_full_steps(ranks)
        return [way for way in found if np.isfinite(way.rate)]

    @staticmethod
    def _by_clock(seconds: float | None) -> float:
        """The tolerance of a time on a clock that shows whole seconds."""
        return 1 / seconds if seconds and float(seconds).is_integer() else 0.0

    def _of_the_whole(self, images: float, ranks: int) -> Iterator[Way]:
        trained, total = self.trained_seconds, self.total_seconds
        if trained and not self.only_whole_is_known:
            how = f"{images:.0f} images / {trained:.1f} s / {ranks}"
            yield Way(_WHOLE, images / trained / ranks, how, frozenset({WARMUP}), self._by_clock(trained))
        if total and total > (trained or 0) + 1:
            how = f"{images:.0f} images / {total:.1f} s / {ranks}"
            faults = frozenset({WARMUP, SAVING})
            yield Way("with the saving", images / total / ranks, how, faults, self._by_clock(total))

    def _of_full_steps(self, ranks: int) -> Iterator[Way]:
        """As if all steps had the global batch."""
        full, count, log = self.config.global_batch, len(self.steps), self.log
        short = {SHORT} if self.steps.short.any() else set()
        trained, total = self.trained_seconds, self.total_seconds
        if shown := log.get("shown_seconds_per_step"):
            how = f"{full} / {shown:.4g} s/it, smoothed, at step {log['at_step']} / {ranks}"
            yield Way("progress bar, all steps full", full / shown / ranks, how, frozenset({*short, SMOOTHING}))
        elif self.is_own:
            nominal = self.measured.value_of("nominal IPS")
            how = f"{full} / s/it at step {count - 1}, smoothed as by tqdm / {ranks}"
            yield Way("progress bar, all steps full", nominal, how, frozenset({*short, SMOOTHING}))
        steady = self.steps[self.steps.steady & self.steps.seconds.notna()]
        if short and len(steady) > count / 2:
            mean = steady.seconds.mean()
            how = f"{full} / {mean:.4g} s/it, mean after the warm-up / {ranks}"
            yield Way("mean step, all full", full / mean / ranks, how, frozenset(short))
        if trained and short:
            how = f"{full} × {count} steps / {trained:.1f} s / {ranks}"
            faults = frozenset({*short, WARMUP})
            rate = full * count / trained / ranks
            yield Way("mean of all steps, all full", rate, how, faults, self._by_clock(trained))
        if total and total > (trained or 0) + 1:
            how = f"{full} × {count} steps / {total:.1f} s / {ranks}"
            faults = frozenset({*short, WARMUP, SAVING})
            rate = full * count / total / ranks
            yield Way("closing bar, all steps full", rate, how, faults, self._by_clock(total))
