"""Makes a run folder from a log of another program."""

from itertools import islice
from pathlib import Path
from typing import Any

from sdnb.errors import RunError
from sdnb.logs import console, events, mlperf, trackers
from sdnb.logs.text import lines_of
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.run.log import Log


def read(path: str | Path, run: int | None = None, **settings: Any) -> Log:
    """Read a log, whatever its form. `settings`: those of the run, if the log does not contain them; also `examples`,
    the number of images. `run`: which one, from 1, if the log has several; default: the last complete one. Raises
    RunError if the log contains no run."""
    try:
        source = Path(path).expanduser()
        there = bool(str(path)) and source.exists()
    except (OSError, RuntimeError, ValueError):  # a name that no file can have, or `~nobody`
        there = False
    if not there:
        raise RunError(f"{path}: there is no such file or folder")
    if events.is_events(source):
        return events.read(source, settings, run)
    if (source / "training_metrics.jsonl").exists():
        source /= "training_metrics.jsonl"
    if source.is_dir():
        raise RunError(f"{source}: has no TensorBoard events; give a log, an event file, or a folder of event files")
    if not source.is_file():
        raise RunError(f"{source}: is no file; write what it gives into one")
    start = "\n".join(islice(lines_of(source), 20))
    if trackers.is_table(source, start) and mlperf.MARK not in start:
        return trackers.read(source, lines_of(source), settings, run)
    if any(mlperf.MARK in line for line in lines_of(source)):
        return mlperf.read(lines_of(source), str(source), settings, run)
    return console.read(lines_of(source), str(source), settings, run)


def write(log: Log, folder: str | Path | None, name: str) -> run_folder.RunFolder:
    """Make a run folder, by default a new one under `runs/`. `name`: of the log, for environment.json. Raises RunError
    if the folder has a run already, or cannot be written."""
    config = log.config.updated(output_dir=str(folder) if folder else None)
    target, held = run_folder.create(config)
    with held:
        files.write_text(target / run_folder.CONFIG, config.updated(output_dir=None).to_yaml())
        environment = log.environment
        environment["imported"] = {"from": name, **environment["imported"]}
        files.write(target / run_folder.ENVIRONMENT, environment)
        for record in log.records:
            files.append(target / run_folder.STEPS, record)
        files.write(target / run_folder.SUMMARY, log.summary)
        run_folder.write_results(target)
    return run_folder.RunFolder(target)
