"""Certifies that a run trained as its settings say: `sdnb certify RUN` compares it with a band of other seeds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from sdnb.certifying.band import FALSE_ALARMS, Band, made_with
from sdnb.certifying.saved_weights import quantities_of
from sdnb.errors import ConfigError, DataError, ModelError, RunError
from sdnb.metrics.steps import first_not_finite
from sdnb.run import files
from sdnb.run.folder import CERTIFICATE, CERTIFIED, NOT_CERTIFIED, RunFolder, problems_of

TOO_FEW, UNKNOWN = "not enough steps", "cannot be known"
Row = tuple[str, float, float, float]  # a quantity, the run's value, and the limits of the band


@dataclass(frozen=True)
class Certificate:
    """`reasons`: why the run is not certified. `rows`: each quantity, the run's value, and the limits of the band."""

    verdict: str
    reasons: tuple[str, ...]
    rows: tuple[Row, ...]
    band: Band

    @property
    def outside(self) -> list[str]:
        """The quantities outside the band; a value that is no number is outside."""
        return _outside(self.rows)

    @property
    def table(self) -> pd.DataFrame:
        """The quantities, one per row."""
        names, outside = [name for name, *_ in self.rows], self.outside
        rows = [(f"{value:.5g}", f"{low:.5g} to {high:.5g}", "OUTSIDE" if name in outside else "inside")
                for name, value, low, high in self.rows]  # fmt: skip
        return pd.DataFrame(rows, index=names, columns=["run", "band", ""])

    def __repr__(self) -> str:
        how = (
            f"compared with {self.band.file or 'a band'}: {len(self.band.seeds)} seeds, {self.band.steps} steps, "
            f"{len(self.rows)} quantities; of honest runs {FALSE_ALARMS:.0%} are not certified"
        )
        table = [self.table.to_string()] if self.rows else []
        return "\n".join([*table, "", f"{self.verdict}{': ' if self.reasons else ''}{'; '.join(self.reasons)}", how])

    def summary(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        quantities = [
            {"name": name, "value": value if math.isfinite(value) else None, "low": low, "high": high}
            for name, value, low, high in self.rows
        ]
        return {
            "verdict": self.verdict, "reasons": list(self.reasons), "band": self.band.file,
            "steps": self.band.steps, "seeds": len(self.band.seeds), "false_alarms": FALSE_ALARMS,
            "quantities": quantities,
        }  # fmt: skip


def certify(run: RunFolder, band: Band) -> Certificate:
    """Compare a run with a band, and write the certificate into its folder. Raises ConfigError if the band is of other
    settings, SdnbError if the model or the data is not here."""
    if differ := band.differences(run):
        listed = "\n  ".join(differ)
        raise ConfigError(f"{run.folder}: {band.file} is a band of other settings:\n  {listed}")
    certificate, problem = problems_of(partial(_judged, run, band), passed=(DataError, ModelError))
    if certificate is None:
        raise RunError(f"{run.folder}: cannot be certified: {problem}")
    files.write(run.folder / CERTIFICATE, certificate.summary())
    return certificate


def _judged(run: RunFolder, band: Band) -> Certificate:
    steps = run.steps
    if bad := first_not_finite(steps) if len(steps) else None:
        return Certificate(NOT_CERTIFIED, (f"the loss of step {bad} is not finite",), (), band)
    if len(steps) < band.steps:
        return Certificate(TOO_FEW, (f"{len(steps)} of the band's {band.steps} steps",), (), band)
    measured, made = quantities_of(run, band.steps), made_with(run)
    rows = tuple((name, measured[name], *band.limits(name, made)) for name in band.quantities if name in measured)
    if outside := _outside(rows):
        return Certificate(NOT_CERTIFIED, (f"outside the band: {', '.join(outside)}",), rows, band)
    if missing := [name for name in band.quantities if name not in measured]:
        return Certificate(UNKNOWN, (*_missing(missing, run, band),), rows, band)
    return Certificate(CERTIFIED, (), rows, band)


def _outside(rows: tuple[Row, ...]) -> list[str]:
    return [name for name, value, low, high in rows if not low <= value <= high]


def _missing(names: list[str], run: RunFolder, band: Band) -> Iterator[str]:
    if len(run.steps) > band.steps:
        yield f"the run went on after step {band.steps}, the band's last: its saved weights are of another step"
    elif held_out := [name for name in names if name.startswith("held-out loss after")]:
        yield f"the run has no {held_out[0]}: set validation_loss_steps = {band.held_out_after}"
    else:
        yield f"the run did not record: {', '.join(names)}"
