"""The command `sdnb`, also `python -m sdnb`."""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

import shtab

from sdnb.errors import ConfigError, DataError, RunError, SdnbError
from sdnb.logs.facts import MOST_EXAMPLES
from sdnb.machine.environment import version_of
from sdnb.places import runs_folder, shipped, workspace
from sdnb.report.export import FORMATS
from sdnb.settings.config import TrainConfig
from sdnb.settings.flags import DESCRIPTION, Parser, add_settings, config_of, found

# What a log may not contain.
_FACTS = {
    "examples": "images in its data set", "num_processes": "its ranks", "train_batch_size": "images in a micro-batch",
    "gradient_accumulation_steps": "micro-batches in an optimizer step",
}  # fmt: skip
_RUN = "a run folder, or `published`: the published run of eight GPUs"


def main(arguments: list[str] | None = None) -> None:
    """Exit status: 0, 1 for a failure, 2 for wrong usage or settings."""
    try:
        given, more = _parser().parse_known_args(arguments)
        if more and given.command is not _lab:
            given.parser.error(f"unrecognized arguments: {' '.join(more)}")
        given.more = more
        given.command(given)
    except SdnbError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as of `sdnb runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        sys.exit(128 + signal.SIGPIPE)


def _parser() -> argparse.ArgumentParser:
    description = "Fine-tune Stable Diffusion, and measure how fast a machine does it."
    parser = Parser(prog="sdnb", description=description)
    parser.add_argument("--version", action="version", version=f"sdnb {version_of('sdnb')}")
    shtab.add_argument_to(parser, help="print the completion script of a shell")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(name: str, do: object, help: str, description: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=description or f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(command=do, parser=added)
        return added

    training = command("train", _train, "train, on every device", DESCRIPTION)
    add_settings(training)

    report = command("report", _report, "make one HTML page of a run, or of an executed notebook")
    _file(report.add_argument("source", metavar="run", help="a run folder, or an executed notebook"))
    report.add_argument("page", nargs="?", help="the page to write; default: in the run folder, or beside the notebook")
    report.add_argument("--format", choices=FORMATS, help="print the results in this form instead")

    comparing = command("compare", _compare, "compare runs with the first of them")
    _file(comparing.add_argument("runs", nargs="*", metavar="run", help=f"{_RUN}; default: all runs"))
    _file(comparing.add_argument("--page", type=Path, help="the HTML page to write; default: one under runs/"))

    listing = command("runs", _runs, "list the runs, the newest first")
    _file(listing.add_argument("folder", nargs="?", help="default: runs/, or the variable SDNB_RUNS"))

    importing = command("import", _import, "make a run folder from a log of another program")
    _log(importing)
    _file(importing.add_argument("--output_dir", type=Path, help="the run folder; default: a new one under runs/"))

    auditing = command("audit", _audit, "check claims about a training against its log")
    _log(auditing, nargs="?", help="a log as for `sdnb import`, a run folder, or a name that `sdnb.published()` lists")
    what = "such as '17.88 images/s per GPU', '2.040 s/it' or 'loss 0.0456'; default: what such a log usually claims"
    auditing.add_argument("--claim", action="append", default=[], help=what)
    auditing.add_argument("--gpus", type=_count, help="how many devices are claimed")
    auditing.add_argument("--device", help="the device that is claimed, such as 'NVIDIA A100'")
    auditing.add_argument("--resolution", type=_count, help="of the images, if the log does not contain it")
    auditing.add_argument("--steps", type=_count, help="optimizer steps, if there is no log")
    auditing.add_argument("--format", choices=("markdown", "json"), help="print in this form, and make no page")
    _file(auditing.add_argument("--page", type=Path, help="the HTML page to write; default: one under runs/"))

    certifying = command("certify", _certify, "check that a run trained as its settings say")
    what = "a run folder; it is compared with a band: the same training with other seeds"
    _file(certifying.add_argument("run", nargs="?", help=what))
    what = "the band; default: the one in params/bands/ that has the run's settings"
    _file(certifying.add_argument("--band", type=Path, help=what))
    what = "make a band of the settings in this file instead, and write it to params/bands/, or where --band says"
    _file(certifying.add_argument("--make-band", metavar="SETTINGS", help=what))
    certifying.add_argument("--seeds", type=_count, default=20, help="trainings of the band; default: 20")

    sealing = command("seal", _seal, "make one file of a run that anyone can verify")
    _file(sealing.add_argument("run", help="a run folder; the file RUN.sdnb.zip is written beside it"))

    verifying = command("verify", _verify, "verify a sealed run: its figures, and what its records cannot be")
    _file(verifying.add_argument("file", help="a file RUN.sdnb.zip"))
    what = "the run folder, for its checkpoints; default: the one beside the file, if it is there"
    _file(verifying.add_argument("--run", help=what))
    what = "run so many randomly drawn steps again, from the checkpoints in the run folder"
    verifying.add_argument("--replay", type=_count, metavar="STEPS", help=what)

    checking = command("check", _check, "try what the measurements rely on, and say which numbers here can be trusted")
    checking.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="some of the checks; default: all")
    checking.add_argument("--format", choices=("json",), help="print in this form, and make no page")
    _file(checking.add_argument("--page", type=Path, help="the HTML page to write; default: one under runs/"))

    captions = command("captions", _captions, "write captions in .txt files beside images into a metadata.jsonl")
    _file(captions.add_argument("folder", type=Path, help="a folder of images, as in train_data_dir"))

    sweeping = command("sweep", _sweep, "run a grid of settings, and compare the runs on one page")
    _file(sweeping.add_argument("grid", help="a YAML file, such as params/sweep-batch.yaml"))
    where = "folder for the runs; default: one under runs/ with the file's name"
    _file(sweeping.add_argument("--output_dir", help=where))

    what = "open JupyterLab on the notebooks"
    command("lab", _lab, what, f"{what}. Other options, such as --no-browser, are JupyterLab's.")
    return parser


def _log(parser: argparse.ArgumentParser, **log: str) -> None:
    """The arguments of a command that reads a log."""
    _file(parser.add_argument("log", **{"help": "a console log, TensorBoard events, or a tracker's file", **log}))
    parser.add_argument(
        "--run", type=_count, help="which run, from 1, if the log has several; default: the last complete"
    )
    for name, what in _FACTS.items():
        parser.add_argument(f"--{name}", type=_count, help=f"{what}, if the log does not contain it")


def _count(text: str) -> int:
    """A whole number from 1 on, of which a log can have as many."""
    if not text.isdecimal() or not 1 <= int(text[:20]) <= MOST_EXAMPLES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MOST_EXAMPLES:,}")
    return int(text)


def _file(argument: argparse.Action) -> None:
    """A shell completes this argument with the names of files."""
    argument.complete = shtab.FILE  # type: ignore[attr-defined]


def _train(given: argparse.Namespace) -> None:
    from sdnb.launch import command_line

    settings = {
        name: value for name, value in vars(given).items() if name in ("file", "steps", *TrainConfig.model_fields)
    }
    if not any(settings.values()):
        raise ConfigError(
            "there are no settings: give at least a model and data, as `sdnb train --help` lists them. To try the "
            "embedded model: sdnb train params/demo.yaml"
        )
    # Not the reference's folder, which has room for one run.
    command_line.main(lambda: config_of(argparse.Namespace(**settings), output_dir=None), launches=True)


def _report(given: argparse.Namespace) -> None:
    from sdnb.report.page import export_of, write_and_print

    if given.format:
        print(export_of(given.source, given.format))
    else:
        write_and_print(given.source, given.page)


def _compare(given: argparse.Namespace) -> None:
    from sdnb.report.in_process import executed
    from sdnb.report.page import write_page
    from sdnb.run.comparison import compare

    print(compare(given.runs or None))
    notebook = executed("compare", {"runs": given.runs or None, "swept": []})
    page, *_ = write_page(runs_folder(), given.page, notebook=notebook)
    print(f"report: {page}")


def _runs(given: argparse.Namespace) -> None:
    from sdnb.report.run import runs

    if given.folder and not Path(given.folder).expanduser().is_dir():
        raise RunError(f"{given.folder}: there is no such folder")
    listed = runs(given.folder)
    print(listed.to_string() if len(listed) else f"there are no runs in {given.folder or runs_folder()}")


def _import(given: argparse.Namespace) -> None:
    from sdnb.logs import importing
    from sdnb.metrics.results import measure

    log = importing.read(given.log, given.run, **_facts_of(given))
    print(*log.what_was_read(), "", sep="\n")
    run = importing.write(log, given.output_dir, Path(given.log).name)
    print(measure(run), f"in {run.folder}", sep="\n")


def _audit(given: argparse.Namespace) -> None:
    from sdnb.auditing.audit import audit
    from sdnb.report.in_process import executed
    from sdnb.report.page import write_page

    facts = _facts_of(given) | ({"resolution": given.resolution} if given.resolution else {})
    about = dict(gpus=given.gpus, device=given.device, run=given.run, steps=given.steps, **facts)
    audited = audit(given.log, given.claim, **about)
    if given.format:
        print(audited.export(given.format))
    else:
        print(audited)
        page, *_ = write_page(runs_folder(), given.page, notebook=executed("audit", {"audited": audited}))
        print(f"report: {page}")
    if not audited.holds:
        sys.exit(1)


def _certify(given: argparse.Namespace) -> None:
    if bool(given.run) == bool(given.make_band):
        raise ConfigError("give a run to certify, or --make-band and a file of settings")
    if given.make_band:
        from sdnb.launch.bands import make_band

        config, name = TrainConfig.from_yaml(found(given.make_band), output_dir=None), Path(given.make_band).stem
        print(f"band: {make_band(config, name, given.seeds, given.band)}")
        return
    from sdnb.certifying.band import band_for, read_band
    from sdnb.certifying.certificate import CERTIFIED, certify
    from sdnb.run.folder import RunFolder

    run = RunFolder(given.run)
    certificate = certify(run, read_band(given.band) if given.band else band_for(run))
    print(certificate)
    if certificate.verdict != CERTIFIED:
        sys.exit(1)


def _seal(given: argparse.Namespace) -> None:
    from sdnb.run.folder import RunFolder
    from sdnb.sealing.seal import seal
    from sdnb.sealing.verify import opened

    with opened(seal(RunFolder(given.run))) as sealed:
        print(f"sealed: {sealed.file}", f"head: {sealed.seal['head']}", sep="\n")


def _verify(given: argparse.Namespace) -> None:
    from sdnb.run.folder import RunFolder
    from sdnb.sealing.verify import folder_beside, opened, verify

    with opened(given.file):  # before anything else: it may be no sealed run
        folder = given.run or folder_beside(given.file)
    run, replayed = RunFolder(folder) if folder else None, []
    if given.replay:
        from sdnb.launch.replay import replay_findings

        if run is None:
            raise RunError(f"{given.file}: there is no run folder beside it, to replay steps from: give it with --run")
        replayed = replay_findings(given.file, run, given.replay)
    verified = verify(given.file, run, replayed)
    print(verified)
    if not verified.holds:
        sys.exit(1)


def _check(given: argparse.Namespace) -> None:
    from sdnb.conformance.check import check
    from sdnb.report.in_process import executed
    from sdnb.report.page import write_page

    _let_signals_raise()
    checked = check(given.only, lambda found: print(f"{found.check}: {found.verdict}", file=sys.stderr, flush=True))
    if given.format:
        print(checked.export())
    else:
        print(checked)
        page, *_ = write_page(runs_folder(), given.page, notebook=executed("check", {"checked": checked}))
        print(f"report: {page}")
    if not checked.holds:
        sys.exit(1)


def _facts_of(given: argparse.Namespace) -> dict[str, int]:
    return {name: fact for name in _FACTS if (fact := getattr(given, name)) is not None}


def _captions(given: argparse.Namespace) -> None:
    from sdnb.data.image_folder import write_metadata

    if not given.folder.is_dir():
        raise DataError(f"{given.folder}: there is no such folder")
    print(*(f"written: {path}" for path in write_metadata(given.folder)), sep="\n")


def _sweep(given: argparse.Namespace) -> None:
    from sdnb.launch import sweep

    _let_signals_raise()  # so that the notebook ends, too; its training then keeps a checkpoint
    page, failed = sweep.run(sweep.load(given.grid), given.output_dir)
    print(f"report: {page}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: {', '.join(failed)}. The same command tries them again")


def _let_signals_raise() -> None:
    """Let SIGTERM and SIGHUP end this process by an exception, so that it ends those that it has started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _lab(given: argparse.Namespace) -> None:
    folder = workspace()
    for name in ("notebooks", "params"):
        if not (folder / name).exists():
            shutil.copytree(shipped(name), folder / name)
            print(f"copied {name}/ to {folder / name}: the copy is yours to change", flush=True)
    os.environ.setdefault("SDNB_RUNS", str(runs_folder()))  # the notebooks' own folder is another
    root = ["--allow-root"] if os.getuid() == 0 else []
    notebooks = f"--notebook-dir={folder / 'notebooks'}"
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", notebooks, *root, *given.more])


if __name__ == "__main__":
    main()
