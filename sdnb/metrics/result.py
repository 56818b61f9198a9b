"""A row of the results table."""

import math
from dataclasses import dataclass
from typing import Any

from sdnb.metrics.throughput import Estimate

RATE = "images/s"


@dataclass(frozen=True)
class Result:
    """A row of the results table: what is read, how it is measured, and the number with its unit, its 95 % confidence
    interval and the `n` steps, ranks or images that it comes from, where it has them."""

    name: str
    text: str
    how: str
    value: float | None = None
    unit: str = ""
    n: int | None = None
    low: float | None = None
    high: float | None = None

    def row(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in vars(self).items()}  # fmt: skip


def rate_result(name: str, rate: Estimate, how: str, steps: int) -> Result:
    """Of images/s; `unknown` if it is not finite."""
    if not math.isfinite(rate.value):
        return Result(name, "unknown", how)
    return Result(name, str(rate), how, rate.value, RATE, int(steps), rate.low, rate.high)
