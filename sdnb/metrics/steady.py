"""From which step on a training runs at a steady pace. Reads no files and draws nothing."""

import math

import numpy as np
from scipy.special import kolmogi, stdtr

FALSE_ALARMS = 0.01  # share of steady trainings in which a change is seen; for the change and the drift together
_LEAST_STEPS = 20  # to tell
_LEAST_SHARE = 1 / 3  # of the steps after the warm-up that a steady state must have
_MARGIN = 2  # steps after a change that belong to neither side for certain


def autocorrelation(residuals: np.ndarray) -> float:
    """Of neighbours, from 0 to 0.97, and to less for few: they cannot tell a strong one from chance. Estimated from n
    residuals of a mean, it is too low by (1 + 4 rho)/n (Marriott and Pope, Biometrika 41, 1954), which is corrected."""
    squares, n = residuals @ residuals, len(residuals)
    if n < 3 or squares <= 0:
        return 0.0
    seen = residuals[1:] @ residuals[:-1] / squares
    return float(min(max(seen + (1 + 4 * seen) / n, 0.0), max(0.0, 1 - 6 / n), 0.97))


def inflation(rho: float) -> float:
    """How many times larger the variance of a mean is with this autocorrelation, for an autoregression of order 1."""
    return (1 + rho) / (1 - rho)


def steady_from(costs: np.ndarray, warmup: int) -> tuple[int | None, int | None]:
    """Where the pace becomes steady: the index of the first such step, None if it never does; and of the first change
    of pace, None if there is none. `costs`: seconds per image of each step, without what is known to differ between
    steps. The first `warmup` steps are never steady. With too few steps to tell, all others are."""
    begin, first_change = warmup, None
    after = len(costs) - warmup
    while True:
        rest = costs[begin:]
        if len(rest) < max(_LEAST_STEPS, _LEAST_SHARE * after):
            return (warmup, None) if first_change is None else (None, first_change)
        change = _change_in(rest)
        if change is None:
            return begin, first_change
        first_change = begin + change if first_change is None else first_change
        begin += change + _MARGIN


def _change_in(costs: np.ndarray) -> int | None:
    """The index at which the mean changes, if it does, or drifts. The change is tested by the largest cumulative sum of
    deviations, which is that of a Brownian bridge (Ploberger and Krämer, Econometrica 60, 1992), the drift by the slope
    of a line, both with the variance around the change or the line, and its autocorrelation."""
    n = len(costs)
    sums = np.cumsum(costs - costs.mean())
    change = int(np.argmax(np.abs(sums[:-1]))) + 1
    parts = np.concatenate([part - part.mean() for part in (costs[:change], costs[change:])])
    if parts @ parts <= 1e-18 * (costs @ costs):  # without noise
        return change if np.ptp(costs) > 1e-9 * abs(costs.mean()) else None
    variance = parts @ parts / (n - 2) * inflation(autocorrelation(parts))
    if abs(sums[change - 1]) / math.sqrt(variance * n) > kolmogi(FALSE_ALARMS / 2):
        return change
    place = np.arange(n) - (n - 1) / 2
    slope = place @ costs / (place @ place)
    around = costs - costs.mean() - slope * place
    rho = autocorrelation(around)
    error = math.sqrt(around @ around / (n - 2) * inflation(rho) / (place @ place))
    freedom = max(3.0, n / inflation(rho) - 2)
    return change if error and 2 * stdtr(freedom, -abs(slope / error)) < FALSE_ALARMS / 2 else None


def without(costs: np.ndarray, *known: np.ndarray) -> np.ndarray:
    """The costs without what they owe to known properties of the steps, by a linear fit: their mean is unchanged."""
    varying = [column - column.mean() for column in known if np.ptp(column) > 0]
    if not varying or len(costs) < 4 * len(varying):
        return costs
    columns = np.stack(varying, 1)
    effect, *_ = np.linalg.lstsq(columns, costs - costs.mean(), rcond=None)
    return costs - columns @ effect
