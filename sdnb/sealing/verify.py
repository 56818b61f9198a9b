"""Verifies a sealed run: `sdnb verify RUN.sdnb.zip`."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN, Finding, lines_of, table_of
from sdnb.errors import RunError
from sdnb.metrics.results import measure
from sdnb.run.folder import CONFIG, RunFolder, problems_of
from sdnb.sealing.checks import findings
from sdnb.sealing.seal import DIGESTS, ENDING, Sealed, sha256_of, unseal, weights_in


@dataclass(frozen=True)
class Verification:
    """What the checks of a sealed run found, and its headline."""

    file: Path
    headline: str
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing was found that does not hold."""
        return not self._with(FAILS)

    @property
    def table(self) -> pd.DataFrame:
        """The findings, one per row."""
        return table_of(self.findings)

    def _with(self, verdict: str) -> list[str]:
        return [finding.check for finding in self.findings if finding.verdict == verdict]

    def __repr__(self) -> str:
        bad, unknown = self._with(FAILS), self._with(UNKNOWN)
        end = f"does not hold: {', '.join(bad)}" if bad else "nothing contradicts" if unknown else "all holds"
        end += f"; cannot be known: {', '.join(unknown)}" if unknown else ""
        return "\n".join([self.headline, "", *lines_of(self.findings), "", end])


@contextmanager
def opened(file: str | Path) -> Iterator[Sealed]:
    """A sealed file, as long as the `with` lasts. Raises RunError if it is none."""
    with tempfile.TemporaryDirectory(prefix="sdnb-verify-") as into:
        yield unseal(file, Path(into))


def verify(file: str | Path, run: RunFolder | None = None, more: Sequence[Finding] = ()) -> Verification:
    """Check a sealed run, also against its run folder if that is here. `more`: what else was found, as by a replay.
    Raises RunError if the file is none, or has values that no run has."""
    with opened(file) as sealed:

        def checked() -> Verification:
            found = [*findings(sealed), *([_weights(sealed, run)] if run else []), *more]
            rows = measure(sealed.run).results[:1] if len(sealed.run.steps) else ()
            return Verification(sealed.file, "".join(f"{row.name}  {row.text}" for row in rows), tuple(found))

        verified, problem = problems_of(checked)
        if verified is None:
            raise RunError(f"{file}: {problem.replace(str(sealed.run.folder) + '/', '')}")
        return verified


def folder_beside(file: str | Path) -> Path | None:
    """The run folder that a sealed file lies beside; None if there is none."""
    folder = Path(str(file).removesuffix(ENDING)).expanduser()
    return folder if str(file).endswith(ENDING) and (folder / CONFIG).is_file() else None


def _weights(sealed: Sealed, run: RunFolder) -> Finding:
    """Whether the weights and states in the run folder are those that were sealed."""
    then = sealed.json(DIGESTS)
    now = {str(path.relative_to(run.folder)): sha256_of(path) for path in weights_in(run.folder)}
    wrong = [f"{name} was changed" for name in then if name in now and now[name] != then[name]]
    wrong += [f"{name} came later" for name in now if name not in then]
    missing = sum(name not in now for name in then)
    if then and missing == len(then):
        return Finding("weights", UNKNOWN, f"none of the {missing} sealed files is here")
    how = f"{len(then) - missing} files as sealed{f', {missing} are not here' if missing else ''}"
    return Finding("weights", FAILS if wrong else HOLDS, "; ".join(wrong[:3]) or how)
