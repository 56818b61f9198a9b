"""A process that tries this machine: `python -m sdnb.conformance.stage <folder> <check>…`. It writes each finding into
the folder at once, so that they are kept if a check ends or hangs the process."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from sdnb.auditing.case import FAILS, Finding
from sdnb.conformance import device
from sdnb.machine.device_kind import kind_here, with_index
from sdnb.machine.watchdog import end_with_parent
from sdnb.run import files

FINDINGS, BEGUN = "findings.jsonl", "begun.jsonl"


def main() -> None:
    end_with_parent()
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    logging.getLogger("sdnb").setLevel(logging.WARNING)
    for check, function in _checks(folder, only):
        files.append(folder / BEGUN, {"check": check})
        try:
            finding = function()
        except Exception as error:  # whatever a device and its libraries raise
            first, *_ = str(error).strip().splitlines() or [""]
            finding = Finding(check, FAILS, f"{type(error).__name__}: {first[:300]}")
            logging.getLogger("sdnb").warning("%s", check, exc_info=error)
        files.append(folder / FINDINGS, asdict(finding))


def _checks(folder: Path, only: Sequence[str]) -> Iterator[tuple[str, Callable[[], Finding]]]:
    kind = kind_here()
    name = kind.names()[0]
    tried = device.Device(with_index(torch.device(kind.type)), kind, name)
    yield from ((check, partial(function, tried)) for check, function in device.CHECKS.items() if check in only)
    if {*only} - {*device.CHECKS}:
        from sdnb.conformance import training

        trials = training.Trials(folder, kind, name)
        yield from ((check, partial(function, trials)) for check, function in training.CHECKS.items() if check in only)


if __name__ == "__main__":
    main()
