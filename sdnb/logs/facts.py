"""The facts that a log must contain, or that are given beside it."""

from collections.abc import Sequence
from typing import Any

from sdnb.errors import RunError

MOST_STEPS = 200_000
MOST_EXAMPLES = 100_000_000_000


def checked(name: str, **counts: int | None) -> None:
    """Raise RunError if a count is beyond what a training can have, so that nothing is computed from it."""
    for what, count in counts.items():
        most = MOST_EXAMPLES if what == "examples" else MOST_STEPS
        if count is not None and not 1 <= count <= most:
            raise RunError(f"{name}: {what} = {count:,}, and sdnb reads logs with 1 to {most:,}")


def require(name: str, given: dict[str, Any], *needed: str) -> None:
    """Raise RunError if a fact is neither in the log nor given as a flag."""
    if absent := [one for one in needed if one not in given]:
        flags = ", ".join(f"--{one}" for one in absent)
        raise RunError(f"{name}: has no header or hyperparameters with {', '.join(absent)}; give {flags}")


def chosen(runs: Sequence[Any], run: int | None, complete: Sequence[bool], name: str) -> int:
    """Which of the runs in a log to import, from 0: the one that was asked for, else the last complete one, else the
    last."""
    if run is not None and not 1 <= run <= len(runs):
        raise RunError(f"{name}: --run {run}: the log has {len(runs)} run{'s' if len(runs) > 1 else ''}")
    ended = [number for number, one in enumerate(complete) if one]
    return run - 1 if run is not None else ended[-1] if ended else len(runs) - 1
