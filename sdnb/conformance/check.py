"""Tries what the measurements rely on, and says which numbers of this machine can be trusted: `sdnb check`."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN, Finding, judged, lines_of, table_of
from sdnb.conformance.stage import BEGUN, FINDINGS
from sdnb.errors import ConfigError, RunError, SdnbError
from sdnb.machine import device_kind, environment
from sdnb.metrics.results import PAGE_MIME
from sdnb.run import files
from sdnb.settings.config import TrainConfig
from sdnb.tables import html_table

_MOST_SECONDS = 180  # of a check, and compilers are slow: what hangs is ended
TRUSTED, NOT_TRUSTED, NOT_KNOWN = "can be trusted", "cannot be trusted", "not known"
_HOST, _RANKS = "training on the host", "all ranks"
_WITH_HOST = {"parity with the host", "training in fp16", "training in bf16", "fp16 with overflow", "compile"}
# The checks that each number relies on. Where one is not known, such as the peak, so is the number.
NUMBERS = {
    "images/s and seconds per step": ("synchronization", "copies"),
    "phases of a step": ("synchronization", "events"),
    "peak memory": ("memory",),
    "losses and weights in float32": ("float32", "copies", "random numbers", "parity with the host"),
    "losses and weights in fp16": ("fp16", "copies", "random numbers", "training in fp16", "fp16 with overflow"),
    "losses and weights in bf16": ("bf16", "copies", "random numbers", "training in bf16"),
    "a resumed run": ("random numbers", "resume"),
    "runs on all devices": (_RANKS, "synchronization"),
    "kept encodings and folded micro-batches": ("kept and folded",),
    "compiled runs": ("compile",),
    "MFU": ("synchronization", "peak", "MFU"),
    "power, and images per joule": ("power",),
}
CHECKS = (*dict.fromkeys(name for checks in NUMBERS.values() for name in checks),)


@dataclass(frozen=True)
class Conformance:
    """What was tried on a machine. `machine`: as `environment.capture` gives it."""

    findings: tuple[Finding, ...]
    machine: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether no check failed."""
        return not any(finding.verdict == FAILS for finding in self.findings)

    @property
    def numbers(self) -> pd.DataFrame:
        """Which numbers of this machine can be trusted, one per row."""
        verdicts = {finding.check: finding.verdict for finding in self.findings}
        rows = {}
        for number, checks in NUMBERS.items():
            failed = [check for check in checks if verdicts.get(check) == FAILS]
            unknown = [check for check in checks if verdicts.get(check) in (None, UNKNOWN)]
            verdict = NOT_TRUSTED if failed else NOT_KNOWN if unknown else TRUSTED
            rows[number] = (verdict, ", ".join(failed or unknown) or _hold(len(checks)))
        return pd.DataFrame.from_dict(rows, orient="index", columns=["Verdict", "Because of"])

    @property
    def table(self) -> pd.DataFrame:
        """The findings, one per row."""
        return table_of(self.findings)

    @property
    def title(self) -> str:
        names = self.machine["devices"]["names"]
        return f"{len(names)} × {names[0]}"

    def __repr__(self) -> str:
        numbers = self.numbers
        width, wide = max(map(len, numbers.index)), max(map(len, numbers.Verdict))
        trusted = [f"{name:<{width}}  {row.Verdict:<{wide}}  {row.iloc[1]}" for name, row in numbers.iterrows()]
        return "\n".join([f"checks of {self.title}", "", *lines_of(self.findings), "", *trusted])

    def export(self) -> str:
        """As JSON."""
        numbers = {name: row.Verdict for name, row in self.numbers.iterrows()}
        told = dict(machine=self.machine, findings=[asdict(one) for one in self.findings], numbers=numbers)
        return json.dumps(told, indent=2, ensure_ascii=False)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        count = {verdict: sum(one.verdict == verdict for one in self.findings) for verdict in (HOLDS, FAILS, UNKNOWN)}
        kinds = {HOLDS: ("hold", "good"), FAILS: ("do not hold", "bad"), UNKNOWN: ("cannot be known", "")}
        badges = [{"text": f"{count[verdict]} {said}", "kind": kind}
                  for verdict, (said, kind) in kinds.items() if count[verdict]]  # fmt: skip
        machine = self.machine
        versions = {**machine["packages"], **machine["software"]}
        facts = {
            "date": f"{pd.Timestamp.now():%Y-%m-%d}", "devices": self.title,
            "processor": machine[environment.PROCESSOR], "host": machine["host"],
            "system": machine["system"],
            "software": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        }  # fmt: skip
        page = dict(
            kind="check", name=f"check of {machine['devices']['names'][0]}", title=f"Checks of {self.title}",
            badges=badges, facts=facts, reproduce=["sdnb check"],
        )  # fmt: skip
        marks = {FAILS: "✗", UNKNOWN: "?", HOLDS: "✓"}
        table = self.table.assign(Verdict=[f"{marks[one.verdict]} {one.verdict}" for one in self.findings])
        return {"text/plain": repr(self), "text/html": html_table(table, "audit"), PAGE_MIME: page}


def check(only: Sequence[str] = (), show: Callable[[Finding], None] = lambda finding: None) -> Conformance:
    """Try this machine's device, in processes of their own, within minutes. Nothing else should use the machine.

    Args:
        only: the names of some checks; default: all.
        show: called with each finding as it comes.

    Raises ConfigError if there is no check of such a name."""
    if unknown := [name for name in only if name not in CHECKS]:
        raise ConfigError(f"only = {', '.join(unknown)}: there is no such check. The checks are: {', '.join(CHECKS)}")
    machine, findings = environment.capture(), list[Finding]()

    def keep(found: Iterable[Finding]) -> None:
        for finding in found:
            findings.append(finding)
            show(finding)

    with tempfile.TemporaryDirectory(prefix="sdnb-check-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        on_host = device_kind.kind_of(device_kind.HOST).environment_of_ranks(one_machine=True)
        names = [name for name in only or CHECKS if name != _RANKS]
        if _WITH_HOST & {*names}:
            keep(_tried(folder, on_host, [_HOST]))
            if findings[-1].verdict != HOLDS:  # then there is nothing to compare with
                names = [name for name in names if name not in _WITH_HOST]
        keep(_tried(folder, {}, names))
        if not only or _RANKS in only:
            keep([_ranks(folder, environment.Devices(**machine["devices"]))])
    return Conformance(tuple(findings), machine)


def _hold(checks: int) -> str:
    return f"all {checks} of its checks hold" if checks > 1 else "its check holds"


def _tried(folder: Path, variables: dict[str, str], checks: Sequence[str]) -> Iterator[Finding]:
    """The findings of some checks as they come. One that ends or hangs its process fails; another process goes on with
    those after it."""
    while checks:
        for name in (FINDINGS, BEGUN):
            (folder / name).unlink(missing_ok=True)
        with (folder / "output").open("w+b") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "sdnb.conformance.stage", str(folder), *checks], stdout=output, stderr=output,
                env={**os.environ, **variables}, start_new_session=True,
            )  # fmt: skip
            count, how = 0, ""
            try:
                for found in _followed(process, folder):
                    count += 1
                    yield found
                how = "ended" if process.poll() is not None else f"hung, and was ended after {_MOST_SECONDS} s"
                if process.poll() is not None and process.returncode < 0:
                    how = f"ended with {signal.Signals(-process.returncode).name}"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also what it has started, such as compilers
                process.wait()
        if process.returncode == 0:
            return
        begun = [*files.read_lines(folder / BEGUN).get("check", [])]
        said = ((folder / "output").read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        doing = begun[-1] if len(begun) > count else "the device"
        yield Finding(doing, FAILS, f"its process {how}; it said: {said[:300]}")
        checks = [name for name in checks if name not in begun] if begun else []


def _followed(process: subprocess.Popen, folder: Path) -> Iterator[Finding]:
    """The findings of a process, until it ends or takes too long for one."""
    count, began, ended = 0, time.monotonic(), False
    while not ended:
        time.sleep(0.1)
        ended = process.poll() is not None or time.monotonic() > began + _MOST_SECONDS
        for row in files.read_lines(folder / FINDINGS).iloc[count:].to_dict("records"):
            count, began = count + 1, time.monotonic()
            yield Finding(**row)


def _ranks(folder: Path, devices: environment.Devices) -> Finding:
    """A run on all devices, or with two ranks on a CPU, as the notebook launches it."""
    from sdnb.conformance.training import SETTINGS
    from sdnb.launch.notebook import launch
    from sdnb.launch.plan import prepare

    ranks = 2 if devices.kind.is_host else devices.ranks
    if ranks == 1:
        return Finding(_RANKS, UNKNOWN, "there is one device, or accelerate starts one rank on this kind")
    settings = {**SETTINGS, "num_processes": ranks, "max_train_steps": 3, "output_dir": str(folder / "ranks")}
    began = time.monotonic()

    def end_what_hangs(progress: Any) -> None:
        if time.monotonic() > began + _MOST_SECONDS:
            raise RunError(f"the ranks hung, and were ended after {_MOST_SECONDS} s")

    try:
        run = launch(prepare(TrainConfig(**settings)), end_what_hangs)
    except SdnbError as error:
        return Finding(_RANKS, FAILS, ": ".join(str(error).splitlines()[:2]))
    except Exception as error:  # whatever a device and its libraries raise
        return Finding(_RANKS, FAILS, f"{type(error).__name__}: {error}")
    sums = {tuple(rank["checksum"]) for rank in run.summary["ranks"]}
    wrong = [] if len(sums) == 1 else ["the weights of the ranks differ after 3 steps"]
    wrong += ["a loss is not finite"] if run.state == "diverged" else []
    return judged(_RANKS, wrong, f"{ranks} ranks trained 3 steps, and have the same weights")
