"""The arithmetic of scaling.py: a model of the seconds of a step on any number of ranks, fitted to measured ones.

    step(n) = work(n) + max(0, allreduce(n) - hidden(n))
    work(n) = accumulation × micro-batch + update, of the slowest of n ranks, measured for one rank and for several
    allreduce(n) = buckets × 2 (n - 1) × latency + 2 (n - 1) / n × bytes / bandwidth
    hidden(n) = the same share of allreduce(n) as measured, but at most the backward pass of the last micro-batch

Ranks on one machine share its memory, so that a rank works faster alone than beside others. The work of several ranks
is the median of all launches of several. More ranks are taken to be more machines that are as full.

The slowest of n ranks: the times of a rank vary. If ranks are independent, the median of the slowest of n is the
quantile 0.5^(1/n) of these times.

The all-reduce is a ring. It has the fewest bytes to move: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms
for clusters of workstations, Journal of Parallel and Distributed Computing 69, 2009. Its latency: Thakur, Rabenseifner
and Gropp, Optimization of collective communication operations in MPICH, International Journal of High Performance
Computing Applications 19, 2005.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.special import stdtrit

from sdnb.metrics.throughput import Estimate

PARAMETERS = 3  # fitted to steps: work of one rank and of several, hidden share
DRAWS = 400  # of the bootstrap


def ring(ranks: int) -> float:
    """The bytes that each rank sends in an all-reduce, over the bytes that are reduced."""
    return 2 * (ranks - 1) / ranks


@dataclass(frozen=True)
class Launch:
    """The seconds that one launch of some ranks measured, one value per repetition. If ranks take turns on a core, they
    are divided by the number of turns: as if each rank had a core."""

    ranks: int
    bucket_bytes: tuple[int, ...]  # of the gradients; none for one rank
    reduced: np.ndarray  # a step with the reduction; of one rank, any step
    unreduced: np.ndarray
    own: np.ndarray  # [repetitions, ranks]: a step without the reduction, without waiting for other ranks
    micro_batch: np.ndarray
    backward: np.ndarray  # the backward pass of a micro-batch
    reductions: dict[float, np.ndarray]  # alone, by the part of each bucket that was reduced

    @classmethod
    def of(cls, found: dict[str, Any], turns: float = 1) -> Launch:
        """From what scaling_rank.py wrote."""
        seconds = {name: np.array(found[name]) / turns for name in ("unreduced", "own", "micro_batch", "backward")}
        reduced = np.array(found["reduced"]) / turns if found["ranks"] > 1 else seconds["unreduced"]
        parts = {float(part): np.array(values) / turns for part, values in found["reductions"].items() if values}
        return cls(found["ranks"], tuple(found["bucket_bytes"]), reduced=reduced, reductions=parts, **seconds)

    def resampled(self, rng: np.random.Generator) -> Launch:
        """With repetitions drawn from these, with replacement. What was measured together stays together."""
        drawn = rng.integers(0, len(self.own), len(self.own))
        names = ("reduced", "unreduced", "own", "micro_batch", "backward")
        parts = {part: values[drawn] for part, values in self.reductions.items()}
        return replace(self, reductions=parts, **{name: getattr(self, name)[drawn] for name in names})

    @property
    def bytes(self) -> int:
        return sum(self.bucket_bytes)

    @property
    def exposed(self) -> float:
        """Seconds that the reduction adds to a step. The two steps of a repetition were measured as a pair."""
        return float(np.median(self.reduced - self.unreduced))

    @property
    def allreduce(self) -> float:
        """Seconds of the reduction alone."""
        return float(np.median(self.reductions[1.0]))

    @property
    def hidden_share(self) -> float:
        """The share of the reduction that the backward pass hides. Negative if the reduction also slows the pass."""
        return 1 - self.exposed / self.allreduce


@dataclass(frozen=True)
class Model:
    """The fitted model. `spread`: the times of a rank, relative to the median of their launch."""

    alone: float  # work of one rank
    work: float  # of several
    spread: np.ndarray
    latency: float
    seconds_per_byte: float
    hidden_share: float
    backward: float
    bytes: int
    buckets: int

    def work_of(self, ranks: int) -> float:
        if ranks == 1:
            return self.alone
        return self.work * float(np.quantile(self.spread, 0.5 ** (1 / ranks)))

    def allreduce(self, ranks: int) -> float:
        return self.buckets * 2 * (ranks - 1) * self.latency + ring(ranks) * self.bytes * self.seconds_per_byte

    def exposed(self, ranks: int) -> float:
        seconds = self.allreduce(ranks)
        return max(0.0, seconds - min(self.hidden_share * seconds, self.backward))

    def step(self, ranks: int) -> float:
        return self.work_of(ranks) + self.exposed(ranks)


def fit(launches: Sequence[Launch]) -> Model:
    """Fit the model to launches on one rank and on several."""
    alone, several = ([one for one in launches if (one.ranks > 1) == many] for many in (False, True))
    latency, seconds_per_byte = _fit_ring(several)
    # What is left of a step beside the ranks' own work, such as the reduction of the records, belongs to the work.
    rest = np.median(np.concatenate([one.unreduced - one.own.max(axis=1) for one in several]))
    return Model(
        alone=float(np.median([np.median(one.unreduced) for one in alone])),
        work=float(np.median([np.median(one.own) for one in several]) + rest),
        spread=np.sort(np.concatenate([(one.own / np.median(one.own)).ravel() for one in launches])),
        latency=latency,
        seconds_per_byte=seconds_per_byte,
        hidden_share=float(np.median([one.hidden_share for one in several])),
        backward=float(np.median([np.median(one.backward) for one in several])),
        bytes=several[0].bytes,
        buckets=len(several[0].bucket_bytes),
    )


def _fit_ring(launches: Sequence[Launch]) -> tuple[float, float]:
    """Latency and seconds per byte: least squares of the relative errors, neither below 0."""
    rows = [
        [len(one.bucket_bytes) * 2 * (one.ranks - 1) / seconds, ring(one.ranks) * part * one.bytes / seconds]
        for one in launches
        for part, seconds in ((part, np.median(values)) for part, values in one.reductions.items())
    ]
    scale = np.abs(rows).max(axis=0)
    (latency, seconds_per_byte), _ = nnls(rows / scale, np.ones(len(rows)))
    return latency / scale[0], seconds_per_byte / scale[1]


@dataclass(frozen=True)
class Fit:
    """A model, models of resampled measurements, and the noise: the standard deviation of the logarithms of launches'
    steps around the model, and its degrees of freedom."""

    model: Model
    models: tuple[Model, ...]
    noise: float
    freedom: int

    @classmethod
    def of(cls, launches: Sequence[Launch], draws: int = DRAWS, seed: int = 0) -> Fit:
        """Bootstrap: draws launches of each number of ranks, and repetitions in each."""
        rng, model = np.random.default_rng(seed), fit(launches)
        by_ranks = [
            [one for one in launches if one.ranks == count] for count in sorted({one.ranks for one in launches})
        ]
        models = tuple(
            fit([same[pick].resampled(rng) for same in by_ranks for pick in rng.integers(0, len(same), len(same))])
            for _ in range(draws)
        )
        residuals = np.log([np.median(one.reduced) / model.step(one.ranks) for one in launches])
        freedom = max(1, len(launches) - PARAMETERS)
        return cls(model, models, float(np.sqrt(residuals @ residuals / freedom)), freedom)

    def step(self, ranks: int) -> Estimate:
        """Seconds of a step in a new launch, with the interval that has 95 % of them."""
        return self._estimate(lambda model: model.step(ranks), launches=1)

    def efficiency(self, ranks: int, base: int = 1) -> Estimate:
        """Images/s per rank, relative to `base` ranks; of two new launches."""
        return self._estimate(lambda model: model.step(base) / model.step(ranks), launches=2)

    def _estimate(self, of: Callable[[Model], float], launches: int) -> Estimate:
        draws = len(self.models)
        quantiles = stdtrit(self.freedom, (np.random.default_rng(1).permutation(draws) + 0.5) / draws)
        values = np.array([of(model) for model in self.models]) * np.exp(self.noise * launches**0.5 * quantiles)
        low, high = np.quantile(values, (0.025, 0.975))
        return Estimate(of(self.model), float(low), float(high))
