"""Checks claims about a training against its log: `sdnb audit LOG --claim "17.88 images/s per GPU" --gpus 8`."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN, Case, Finding, case_of, lines_of, table_of
from sdnb.auditing.checks import findings
from sdnb.auditing.claim import SECONDS, Claim, claim_of
from sdnb.auditing.evidence import Evidence
from sdnb.errors import ConfigError, RunError
from sdnb.logs import importing
from sdnb.logs.facts import MOST_EXAMPLES, checked
from sdnb.metrics.result import RATE
from sdnb.metrics.results import PAGE_MIME, measure
from sdnb.run import files
from sdnb.run.baselines import PUBLISHED, baselines
from sdnb.run.folder import CONFIG, RESULTS, RunFolder, problems_of
from sdnb.run.log import Log, empty_records
from sdnb.tables import html_table


@dataclass(frozen=True)
class Audit:
    """The claims, what the log shows, and a verdict for each check. `read` says what was read."""

    case: Case
    read: tuple[str, ...]
    findings: tuple[Finding, ...]
    assumed: bool = False  # whether nobody made the claims: they are what is usually published from such a log

    @property
    def holds(self) -> bool:
        """Whether nothing was found that does not hold."""
        return not any(finding.verdict == FAILS for finding in self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """The findings, one per row."""
        return table_of(self.findings)

    @property
    def ways(self) -> pd.DataFrame:
        """Images/s of a device, in each way that the log allows, and what is wrong with the way."""
        rows = {way.name: (f"{way.rate:.2f}", way.how, ", ".join(sorted(way.faults)) or "nothing")
                for way in self.case.evidence.ways}  # fmt: skip
        columns = [f"{RATE} per device", "Computed as", "Wrong with it"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns)

    def __repr__(self) -> str:
        return "\n".join([*self.read, "", *self._claims, "", *lines_of(self.findings)])

    @property
    def _claims(self) -> list[str]:
        word = "assumed claim" if self.assumed else "claim"
        return [f"{word}: {claim.text}" for claim in self.case.claims]

    def export(self, kind: str) -> str:
        """As `json` or `markdown`."""
        if kind == "json":
            told = dict(
                log=self.case.evidence.name, claims=[claim.text for claim in self.case.claims], gpus=self.case.gpus,
                holds=self.holds, findings=[asdict(finding) for finding in self.findings],
                ways=[{**asdict(way), "faults": sorted(way.faults)} for way in self.case.evidence.ways],
            )  # fmt: skip
            return json.dumps(told, indent=2, ensure_ascii=False)
        claims = "; ".join(claim.text for claim in self.case.claims)
        rows = [f"| {one.check} | {one.verdict} | {one.why.replace('|', '/')} |" for one in self.findings]
        head = [f"### Audit of {self.case.evidence.name}: {claims}", "", "| | verdict | why |", "|---|---|---|"]
        return "\n".join([*head, *rows])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        evidence, case = self.case.evidence, self.case
        kinds = {FAILS: "bad", UNKNOWN: "", HOLDS: "good"}
        count = {verdict: sum(one.verdict == verdict for one in self.findings) for verdict in kinds}
        said = {FAILS: "not hold", UNKNOWN: "cannot be known", HOLDS: "hold"}
        badges = [{"text": f"{number} {'do ' if verdict == FAILS else ''}{said[verdict]}", "kind": kinds[verdict]}
                  for verdict, number in count.items() if number]  # fmt: skip
        headline = [] if case.rate is None else [_tile("claimed", case.rate)]
        headline += [_tile("the log shows", evidence.ways[0].rate)] if evidence.ways else []
        claims = " ".join(f"--claim {shlex.quote(claim.text)}" for claim in case.claims)
        gpus = f" --gpus {case.gpus}" if case.gpus else ""
        page = dict(
            kind="audit", name=f"audit of {Path(evidence.name).name}",
            title=f"Audit of {Path(evidence.name).name}: {'; '.join(claim.text for claim in case.claims)}",
            headline=headline, badges=badges,
            facts={name: text for line in self.read if "  " in line for name, _, text in [_parted(line)]},
            warnings=[line for line in self.read if "  " not in line],
            reproduce=[f"sdnb audit {shlex.quote(evidence.name)} {claims}{gpus}"],
        )  # fmt: skip
        marks = {FAILS: "✗", UNKNOWN: "?", HOLDS: "✓"}
        table = self.table.assign(Verdict=[f"{marks[one.verdict]} {one.verdict}" for one in self.findings])
        return {"text/plain": repr(self), "text/html": html_table(table, "audit"), PAGE_MIME: page}


def _parted(line: str) -> tuple[str, str, str]:
    name, gap, text = line.partition("  ")
    return name, gap, text.strip()


def _tile(name: str, rate: float) -> dict[str, Any]:
    return {"name": name, "text": f"{rate:.4g}", "value": rate, "unit": f"{RATE} per device"}


def audit(
    source: str | Path | None = None, claims: Sequence[str] | str = (), gpus: int | None = None,
    device: str | None = None, run: int | None = None, steps: int | None = None, **facts: int,
) -> Audit:  # fmt: skip
    """Check claims about a training. `source`: a log as `sdnb import` reads it, a run folder, or the name of a
    published measurement; None if only the claims are known. `claims`: such as `17.88 images/s per GPU`, `2.040 s/it`,
    `loss 0.0456`; without one, the figure that is usually published from such a log, or a run's own headline. `gpus`,
    `device`: what is claimed of the machine. `run`, `facts`: as for `sdnb import`; also `resolution`. Without a source,
    the `steps` and facts that tell the work of each step. Raises ConfigError for claims that cannot be read, RunError
    for a log that cannot be read."""
    for name, count in {"gpus": gpus, "steps": steps, **facts}.items():
        if count is not None and not 1 <= count <= MOST_EXAMPLES:
            raise ConfigError(f"{name} = {count}: give a number from 1 on")
    given = [claim_of(text) for text in ([claims] if isinstance(claims, str) else claims)]
    resolution = facts.pop("resolution", None)

    def judged() -> Audit:
        shown, evidence, usual = _evidence(source, given, gpus, run, steps, facts)
        stated = given or [claim_of(text) for text in usual]
        case = case_of(evidence, stated, gpus, device, resolution)
        return Audit(case, tuple(shown), tuple(findings(case)), assumed=not given and bool(usual))

    if source is None or not _is_run(Path(source)):
        return judged()
    found, problem = problems_of(judged, passed=(ConfigError,))
    if found is None:
        raise RunError(f"{source}: {problem}")
    return replace(found, read=(*found.read, problem)) if problem else found


def _evidence(
    source: str | Path | None, claims: Sequence[Claim], gpus: int | None, run: int | None, steps: int | None,
    facts: dict[str, int],
) -> tuple[list[str], Evidence, list[str]]:  # fmt: skip
    """What was read, the evidence, and what is usually claimed of it."""
    if source is None:
        log = _claimed_log(claims, gpus, steps, facts)
        return log.what_was_read(), _of_log("the claims alone", log), []
    if baseline := baselines().get(str(source)):
        log = baseline.log
        usual = [f"{baseline.images_per_second} images/s per GPU"]
        usual += [f"{baseline.seconds_per_step:.3f} s/it"] if baseline.seconds_per_step else []
        return log.what_was_read(), _of_log(baseline.name, log), usual
    folder = PUBLISHED if str(source) == "published" else Path(source)
    if _is_run(folder):
        return _of_folder(RunFolder(folder))
    log = importing.read(source, run, **facts)
    evidence = _of_log(str(source), log)
    return log.what_was_read(), evidence, _usual(evidence)


def _is_run(folder: Path) -> bool:
    try:
        return (folder / CONFIG).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _of_log(name: str, log: Log) -> Evidence:
    return Evidence(name, measure(log), log.environment, log.total_seconds, [])


def _of_folder(run: RunFolder) -> tuple[list[str], Evidence, list[str]]:
    if run.steps.empty:
        raise RunError(f"{run.folder}: has no step to audit")
    summary, environment = run.summary, run.environment
    is_own = "imported" not in environment
    results = files.read(run.folder / RESULTS) if is_own and summary else {}
    recorded = results.get("results", [])
    total = None if is_own else summary.get("total_seconds")
    evidence = Evidence(str(run.folder), measure(run), environment, total, recorded, results.get("sdnb"))
    read = [f"run of {'sdnb' if is_own else environment['imported'].get('form', 'another program')}, {run.state}",
            f"steps  {len(run.steps)} of {run.config.max_train_steps}"]  # fmt: skip
    if not is_own:
        return read, evidence, _usual(evidence)
    rate = next((row["value"] for row in recorded if row["name"].startswith("images/s per")), None)
    return read, evidence, [f"{_plain(rate or evidence.ways[0].rate, 6)} images/s per device"] if evidence.ways else []


def _usual(evidence: Evidence) -> list[str]:
    """The figure that is usually published from a log: that of its progress bar, all steps counted as full."""
    named = [way for way in evidence.ways if way.name.endswith("full")] or evidence.ways
    return [f"{_plain(named[0].rate)} images/s per device"] if named else []


def _plain(rate: float, digits: int = 4) -> str:
    return np.format_float_positional(rate, digits, fractional=False, trim="-")


def _claimed_log(claims: Sequence[Claim], gpus: int | None, steps: int | None, facts: dict[str, int]) -> Log:
    """The steps that the claims are about, if there is no log of them."""
    per_step = next((claim.value for claim in claims if claim.kind == SECONDS), None)
    needed = {"examples", "train_batch_size", "gradient_accumulation_steps"} - {*facts}
    ranks = gpus or facts.get("num_processes")
    missing = [*sorted(needed), *([] if ranks else ["gpus"]), *([] if steps else ["steps"])]
    if missing or per_step is None:
        flags = [*(f"--{name}" for name in missing), *([] if per_step else ["--claim with s/it"])]
        raise ConfigError(f"there is no log: then the work of each step must be known: give {', '.join(flags)}")
    checked("no log", steps=steps, num_processes=ranks)
    settings = {**facts, "num_processes": ranks, "max_train_steps": steps}
    examples = settings.pop("examples")
    log = Log("no log: the claims alone", settings, examples)
    log.records = [*empty_records(range(1, (steps or 0) + 1), log.config, examples).values()]
    log.trained_seconds = per_step * (steps or 0)
    return log
