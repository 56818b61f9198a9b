"""What an audit judges: the claims, the evidence, and how the claimed rate is computed from it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sdnb.auditing.claim import LOSS, PER_DEVICE, SECONDS, TOGETHER, Claim
from sdnb.auditing.evidence import Evidence, Way
from sdnb.errors import ConfigError

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be known"
SAME = 0.005  # two rates this close are one: a bar has whole seconds, and figures are rounded
WORTH_SAYING = 0.01  # of the images, for repeats; of the rate


@dataclass(frozen=True)
class Finding:
    """The result of a check: `verdict` is HOLDS, FAILS or UNKNOWN; `why` has the arithmetic."""

    check: str
    verdict: str
    why: str


def judged(check: str, wrong: Sequence[str], right: str) -> Finding:
    """A finding that FAILS with what is wrong, or HOLDS with `right` if nothing is."""
    return Finding(check, FAILS, "; ".join(wrong)) if wrong else Finding(check, HOLDS, right)


def table_of(findings: Sequence[Finding]) -> pd.DataFrame:
    """The findings, one per row."""
    rows = {finding.check: (finding.verdict, finding.why) for finding in findings}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["Verdict", "Why"])


def lines_of(findings: Sequence[Finding]) -> list[str]:
    """The findings, one per line, in columns, without control characters: what was read may contain some."""
    width, wide = (max(map(len, texts)) for texts in zip(*((one.check, one.verdict) for one in findings)))
    lines = (f"{one.check:<{width}}  {one.verdict:<{wide}}  {one.why}" for one in findings)
    return [re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line) for line in lines]


@dataclass(frozen=True)
class Case:
    """What is judged: the claims about a run, and the evidence. `gpus` and `device` are what is claimed of the machine;
    `rate` is the claimed images/s of one device, and `way` how it is computed from the log; None if that is unknown."""

    evidence: Evidence
    claims: Sequence[Claim]
    gpus: int | None
    device: str | None
    resolution: int | None
    rate: float | None
    way: Way | None

    def claimed(self, kind: str) -> Claim | None:
        return next((claim for claim in self.claims if claim.kind == kind), None)


def case_of(
    evidence: Evidence, claims: Sequence[Claim], gpus: int | None, device: str | None, resolution: int | None
) -> Case:
    """Find how the claimed rate is computed from the log: of all ways that give it, the one with the fewest faults."""
    for kinds in ((PER_DEVICE, TOGETHER), (SECONDS,), (LOSS,)):
        if len(same := [claim.text for claim in claims if claim.kind in kinds]) > 1:
            raise ConfigError(f"claims = {' and '.join(same)}: audit one after the other")
    devices = gpus or evidence.config.ranks
    rates = [(claim.value / (devices if claim.kind == TOGETHER else 1), claim.rounding)
             for claim in claims if claim.kind in (PER_DEVICE, TOGETHER)]  # fmt: skip
    if not rates:
        return Case(evidence, claims, gpus, device, resolution, None, None)
    rate, rounding = rates[0]
    allowed = max(SAME * rate, rounding)
    near = [way for way in evidence.ways
            if abs(way.rate - rate) <= allowed + way.tolerance * way.rate + _interval(evidence, way)]  # fmt: skip
    way = min(near, key=lambda way: (len(way.faults), abs(way.rate - rate)), default=None)
    return Case(evidence, claims, gpus, device, resolution, rate, way)


def _interval(evidence: Evidence, way: Way) -> float:
    """Half the interval of the rate that holds, at most 1 %, for whoever left out other steps; 0 for the other ways."""
    rate = evidence.measured.throughput
    is_known = way is evidence.ways[0] and math.isfinite(rate.low)
    return min(rate.value - rate.low, WORTH_SAYING * rate.value) if is_known else 0.0
