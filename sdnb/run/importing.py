"""Imports a run of diffusers' `train_text_to_image.py` as a run folder, from its console log or its TensorBoard events.
The console log has a header, and tqdm's progress bar once for each micro-batch of rank 0. The bar shows the seconds per
step as a rounded moving average. Undoing the average gives the time of each step that follows a logged one. The bar
counts every step as a full one; the header tells which steps are short."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sdnb.errors import RunError
from sdnb.metrics.throughput import SMOOTHING, seconds_per_micro_batch
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig, read_yaml

UNKNOWN = "unknown"
# The published measurement of Stable Diffusion v1-4 on eight GPUs, as a run folder.
PUBLISHED = Path(__file__).parent / "published" / "sd-v1-4-8-gpus-2024"

_BAR = re.compile(
    r"Steps:\s*\d+%\|[^|\r\n]*\|\s*(?P<step>\d+)/(?P<total>\d+)\s*"
    r"\[(?P<elapsed>[\d:]+)<[^,\]]*,\s*(?:(?P<seconds>[\d.]+)s/it|(?P<rate>[\d.]+)it/s|\?it/s)(?:,\s*(?P<rest>[^\]]*))?\]"
)
_HEADER = {
    "examples": r"Num examples = (\d+)",
    "num_train_epochs": r"Num Epochs = (\d+)",
    "train_batch_size": r"Instantaneous batch size per device = (\d+)",
    "global_batch": r"Total train batch size \(w\. parallel, distributed & accumulation\) = (\d+)",
    "gradient_accumulation_steps": r"Gradient Accumulation steps = (\d+)",
    "max_train_steps": r"Total optimization steps = (\d+)",
}
_SETTINGS = {
    "mixed_precision": r"Mixed precision type: (no|fp16|bf16)",
    "pretrained_model_name_or_path": r"subfolder of ([^\s]+?)\.?\s",
    "learning_rate": r"\blr=([\d.e+-]+)",
}
# Hyperparameters in the events that are not imported as settings.
_NOT_IMPORTED = {"output_dir", "hub_token", "validation_prompts", "train_data_dir", "cache_dir"}


@dataclass
class Log:
    """What a log contains: the known settings, and a record for each optimizer step."""

    settings: dict[str, Any]
    examples: int
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds_shown: dict[int, float] = field(default_factory=dict)  # by the progress bar after each step, s/it
    total_seconds: float | None = None
    began: float | None = None
    device_type: str = "cuda"


def read(path: str | Path, **settings: Any) -> Log:
    """Read a console log, an event file, or a folder of event files. `settings`: those of the run, if the file does not
    contain them; also `examples`, the number of images. Raises RunError if the file contains no run."""
    source = Path(path).expanduser()
    if not source.exists():
        raise RunError(f"{source}: there is no such file or folder")
    if source.is_dir() or source.name.startswith("events.out.tfevents"):
        return _read_events(source, settings)
    try:
        text = source.read_text(errors="replace")
    except OSError as error:
        raise RunError(f"{source}: cannot be read: {error.strerror}") from None
    return read_console(text, str(source), settings)


def read_console(text: str, name: str, settings: dict[str, Any] | None = None) -> Log:
    """Read the text of a console log. Carriage returns or line breaks separate the states of the bar, and the ranks may
    have printed anything else between them. `name`: of the text, for messages. Raises RunError if the text has no
    progress bar, or no header."""
    bars = [match.groupdict() for match in _BAR.finditer(text)]
    if not bars:
        raise RunError(f"{name}: has no progress bar of a run, such as «Steps:  99%|█| 100/101 [03:22<…»")
    header = {name: int(match[1]) for name, pattern in _HEADER.items() if (match := re.search(pattern, text))}
    logged = {name: match[1] for name, pattern in _SETTINGS.items() if (match := re.search(pattern, text))}
    given: dict[str, Any] = {**header, **logged, **(settings or {})}
    missing = {"examples", "train_batch_size", "gradient_accumulation_steps"} - set(given)
    if missing or not ("global_batch" in given or "num_processes" in given):
        flags = ", ".join(f"--{one}" for one in sorted(missing)) or "--num_processes"
        raise RunError(f"{name}: has no complete header «***** Running training *****»; give {flags}")
    examples, together = given.pop("examples"), given.pop("global_batch", None)
    if together:
        given.setdefault("num_processes", together // given["train_batch_size"] // given["gradient_accumulation_steps"])
    given["max_train_steps"] = int(bars[-1]["total"])
    if "pretrained_model_name_or_path" in given:  # a path is useless elsewhere, and may contain a user's name
        given["pretrained_model_name_or_path"] = Path(given["pretrained_model_name_or_path"]).name
    log = Log(given, examples, device_type="cuda" if re.search(r"Device: cuda", text) else "cpu")
    if stamp := re.search(r"(\d\d/\d\d/\d{4} \d\d:\d\d:\d\d) - INFO - \S+ - \*+ Running training", text):
        log.began = datetime.strptime(stamp[1], "%m/%d/%Y %H:%M:%S").timestamp()
    _follow(bars, log, _config(given))
    clock = reversed(bars[-1]["elapsed"].split(":"))
    log.total_seconds = float(sum(int(part) * 60**place for place, part in enumerate(clock)))
    return log


def _follow(bars: list[dict[str, Any]], log: Log, config: TrainConfig) -> None:
    """Fill in the records of all steps, and what the bar showed; unknown values are NaN. The bar shows each
    micro-batch's loss. At the last one of a step it first advances with the loss before (tqdm may skip that), and then
    shows the last one's loss."""
    total = log.settings["max_train_steps"]
    last = min(max(int(bar["step"]) for bar in bars), total)
    records = _records(range(1, last + 1), config, log.examples)
    at, before, earlier, moved_on = 0, math.nan, [], False
    for bar in bars:
        step, rest = int(bar["step"]), dict(re.findall(r"(\w+)=([^,\s]+)", bar["rest"] or ""))
        loss, lr = (_number(rest.get(name)) for name in ("step_loss", "lr"))
        if step > total:
            break
        shown = float(bar["seconds"] or 0) or 1 / float(bar["rate"] or math.inf)
        if shown and (bar is not bars[-1] or step < int(bar["total"])):  # when it closes, the bar shows the plain mean
            log.seconds_shown.setdefault(step, shown)
        if step > at + 1:  # some of the log is missing
            earlier, moved_on = [loss], False
        elif step == at + 1 and loss == before:
            moved_on = True
        elif step == at + 1 or moved_on:
            missing = records[step]["micro_batches"] - 1
            losses = [*earlier[len(earlier) - missing :], loss] if missing <= len(earlier) else [math.nan]
            records[step].update(loss=sum(losses) / len(losses), step_loss=loss, lr=lr)
            earlier, moved_on = [], False
        elif not math.isnan(loss):
            earlier.append(loss)
        at, before = step, loss
    for step, seconds in undo_smoothing(log.seconds_shown).items():
        records[step]["seconds"] = seconds
    log.records = list(records.values())


def _records(steps: Sequence[int], config: TrainConfig, examples: int) -> dict[int, dict[str, Any]]:
    """A record for each of the steps, in which the numbers that come from the log are NaN."""
    epoch, unknown = config.epoch(examples), dict.fromkeys(("loss", "step_loss", "lr", "seconds"), math.nan)
    sizes = epoch.micro_batches_of(max(steps, default=0))
    return {
        step: dict(step=step, epoch=(step - 1) // int(epoch.steps), micro_batches=sizes[step - 1],
                   images=sizes[step - 1] * config.train_batch_size * config.ranks, **unknown)
        for step in steps
    }  # fmt: skip


def undo_smoothing(shown: dict[int, float]) -> dict[int, float]:
    """The seconds of each step, from what tqdm's bar showed after it and after the step before.
    tqdm's average of the seconds x of n steps is v(n) = L(n) / (1 - b^n), L(n) = a x(n) + b L(n-1), a = 0.3, b = 1 - a.
    Shown to 0.005 s, it gives x to 0.03 s."""
    decay = 1 - SMOOTHING
    averages = {step: value * (1 - decay**step) for step, value in shown.items()} | {0: 0.0}
    known = [step for step in averages if step - 1 in averages]
    return {step: (averages[step] - decay * averages[step - 1]) / SMOOTHING for step in known}


def _read_events(source: Path, settings: dict[str, Any]) -> Log:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: dict[int, Any] = {}  # by step; a resumed run may have logged a step again
    for path in [source] if source.is_file() else sorted(source.rglob("events.out.tfevents*")):
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if "train_loss" in accumulator.Tags()["scalars"]:
            events |= {event.step: event for event in accumulator.Scalars("train_loss")}
    if not events:
        raise RunError(f"{source}: has no TensorBoard events with a train_loss")
    given: dict[str, Any] = {}
    for path in sorted((source if source.is_dir() else source.parent).rglob("hparams.yml")):
        for name, value in read_yaml(path).items():
            if name in TrainConfig.model_fields and name not in _NOT_IMPORTED and value is not None:
                given[name] = value
    given |= settings
    missing = sorted({"examples", "num_processes", "train_batch_size", "gradient_accumulation_steps"} - set(given))
    if missing:
        flags = ", ".join(f"--{name}" for name in missing)
        raise RunError(f"{source}: the events do not contain {', '.join(missing)}; give {flags}")
    examples = given.pop("examples")
    given["max_train_steps"] = max(events)
    given.pop("num_train_epochs", None)
    config = _config(given)
    records = _records(sorted(events), config, examples)
    for step, record in records.items():
        event, before = events[step], events.get(step - 1)
        # the reference divides by a full step's number
        record["loss"] = event.value * (config.gradient_accumulation_steps / record["micro_batches"])
        record["train_loss"] = event.value
        record["seconds"] = event.wall_time - before.wall_time if before else math.nan
    began, ended = events[min(events)].wall_time, events[max(events)].wall_time
    return Log(given, examples, list(records.values()), began=began, total_seconds=ended - began)


def write(log: Log, folder: str | Path | None, name: str) -> run_folder.RunFolder:
    """Make a run folder, by default a new one under `runs/`. `name`: of the log, for environment.json. Raises RunError
    if the folder has a run already, or cannot be written."""
    config = _config(log.settings).updated(output_dir=str(folder) if folder else None)
    target, held = run_folder.create(config)
    with held:
        files.write_text(target / run_folder.CONFIG, config.updated(output_dir=None).to_yaml())
        imported = {"from": name, "known_settings": sorted(log.settings), "examples": log.examples}
        if at := max((step for step in log.seconds_shown if step < log.settings["max_train_steps"]), default=0):
            shown, sizes = log.seconds_shown[at], [record["micro_batches"] for record in log.records[:at]]
            imported |= {"at_step": at, "shown_seconds_per_step": shown, "micro_batches_at_step": sizes[-1],
                         "seconds_per_micro_batch": seconds_per_micro_batch(shown, sizes)}  # fmt: skip
        devices = dict(type=log.device_type, names=[], memory_gib=[], free_gib=[], bf16=False)
        about: dict[str, Any] = dict(devices=devices, packages={}, started=log.began, resumed=[], imported=imported)
        files.write(target / run_folder.ENVIRONMENT, about)
        for record in log.records:
            files.append(target / run_folder.STEPS, record)
        summary: dict[str, Any] = dict(world_size=config.ranks, total_seconds=log.total_seconds, ranks=[])
        files.write(target / run_folder.SUMMARY, summary)
        run_folder.write_results(target)
    return run_folder.RunFolder(target)


def _config(given: dict[str, Any]) -> TrainConfig:
    data = {} if given.get("dataset_name") or given.get("train_data_dir") else {"dataset_name": UNKNOWN}
    return TrainConfig(**{"pretrained_model_name_or_path": UNKNOWN, "num_processes": 1, **data, **given})


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
