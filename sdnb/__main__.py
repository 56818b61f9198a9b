"""The command `sdnb`, also `python -m sdnb`: work with runs outside a notebook."""

import argparse
import signal
import sys
from pathlib import Path

from sdnb.errors import SdnbError

# What a log may not contain.
_FACTS = {
    "examples": "images in its data set", "num_processes": "its ranks", "train_batch_size": "images in a micro-batch",
    "gradient_accumulation_steps": "micro-batches in an optimizer step",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sdnb", description="Work with runs outside a notebook.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="make one HTML page of an executed notebook")
    report.add_argument("notebook", help="an executed notebook")
    report.add_argument("page", nargs="?", help="the page to write; default: beside the notebook")
    report.set_defaults(run=_report)

    what = "make a run folder from a log of train_text_to_image.py"
    description = "Make a run folder from a log of diffusers' train_text_to_image.py."
    importing = commands.add_parser("import", help=what, description=description)
    importing.add_argument("log", type=Path, help="its console log, or its TensorBoard events (a file or the folder)")
    importing.add_argument("--output_dir", type=Path, help="the run folder; default: a new one under runs/")
    for name, what in _FACTS.items():
        importing.add_argument(f"--{name}", type=int, help=f"{what}, if the log does not contain it")
    importing.set_defaults(run=_import)

    sweeping = commands.add_parser("sweep", help="run a grid of settings, and compare the runs on one page")
    sweeping.add_argument("grid", help="a YAML file, such as params/sweep-batch.yaml")
    sweeping.add_argument("--output_dir", help="folder for the runs; default: one under runs/ with the file's name")
    sweeping.set_defaults(run=_sweep)

    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except SdnbError as error:
        sys.exit(f"error: {error}")


def _report(given: argparse.Namespace) -> None:
    from sdnb.report.page import write_and_print

    write_and_print(given.notebook, given.page)


def _import(given: argparse.Namespace) -> None:
    from sdnb.metrics.results import measure
    from sdnb.run import importing

    log = importing.read(given.log, **{name: fact for name in _FACTS if (fact := getattr(given, name)) is not None})
    run = importing.write(log, given.output_dir, given.log.name)
    print(measure(run), f"in {run.folder}", sep="\n")


def _sweep(given: argparse.Namespace) -> None:
    from sdnb.launch import sweep

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            # An exception, so that the notebook ends, too. Its training then keeps a checkpoint.
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    page, failed = sweep.run(sweep.load(given.grid), given.output_dir)
    print(f"report: {page}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: {', '.join(failed)}. The same command tries them again")


if __name__ == "__main__":
    main()
