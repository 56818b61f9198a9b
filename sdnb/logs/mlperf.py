"""Logs of MLPerf Training: lines with `:::MLLOG` and JSON. Their blocks of training have a count of images and a time.
Keys as in mlcommons/logging and in the published results of stable_diffusion, rounds 3.1 to 5.0."""

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from sdnb.errors import RunError
from sdnb.logs.facts import MOST_EXAMPLES, checked, chosen, require
from sdnb.machine.device_kind import SOME_GPU
from sdnb.run.log import Log

MARK = ":::MLLOG"
_MEMBER = re.compile(r"MEMBER: \d{1,9}/(\d{1,9})(?!\d)")
_LATEST = 10**14  # milliseconds
_PREFIX = re.compile(r"^\s*(\d{1,5}): *:::MLLOG")


def read(lines: Iterable[str], name: str, settings: dict[str, Any], run: int | None = None) -> Log:
    """Read such a log: a record is a block, with its images and seconds. `settings`: facts that it does not contain.
    Raises RunError if it has no blocks of training, or there is no such `run` in it."""
    events, ranks = [], set[int]()
    for line in lines:
        if member := _MEMBER.search(line):
            ranks.add(int(member[1]) - 1)
        if MARK in line:
            if prefix := _PREFIX.match(line):
                ranks.add(int(prefix[1]))
            events += _event(line.partition(MARK)[2])
    begins = [number for number, event in enumerate(events) if event["key"] == "run_start"] or [0]
    runs = [events[begin:end] for begin, end in zip(begins, [*begins[1:], len(events)])]
    before = events[: begins[0]]
    complete = [any(event["key"] == "run_stop" for event in one) for one in runs]
    number = chosen(runs, run, complete, name)
    said = {event["key"]: event.get("value") for event in [*before, *runs[number]]}
    started = sum(event["key"] == "init_start" for event in before)
    given: dict[str, Any] = {"num_processes": max(max(ranks, default=0) + 1, started), **settings}
    given.pop("examples", None)  # its blocks are no epochs
    if given["num_processes"] == 1 and "num_processes" not in settings:
        del given["num_processes"]  # one process may have written for all
    if "global_batch_size" not in said:
        raise RunError(f"{name}: has no global_batch_size")
    require(name, given, "num_processes")
    counts = {"gradient_accumulation_steps": 1, **said}
    together, accumulated = (counts[key] for key in ("global_batch_size", "gradient_accumulation_steps"))
    if not (isinstance(together, int) and isinstance(accumulated, int)):
        raise RunError(f"{name}: global_batch_size or gradient_accumulation_steps is no whole number")
    given.setdefault("gradient_accumulation_steps", accumulated)
    checked(
        name,
        global_batch_size=together,
        **{key: given[key] for key in ("gradient_accumulation_steps", "num_processes")},
    )
    per_step = given["gradient_accumulation_steps"] * given["num_processes"]
    if "train_batch_size" not in given and together % per_step:
        raise RunError(f"{name}: global_batch_size {together} is no multiple of {per_step}: give --train_batch_size")
    given.setdefault("train_batch_size", together // per_step)
    checked(name, train_batch_size=given["train_batch_size"])
    records = _blocks(runs[number], given)
    if not records:
        raise RunError(f"{name}: has no block_start and block_stop of training with a count of images")
    if benchmark := said.get("submission_benchmark"):
        given.setdefault("pretrained_model_name_or_path", f"MLPerf {benchmark}")
    log = Log("MLPerf Training log", given, None, records, header={"global_batch": together}, run=number + 1,
              runs=len(runs), device_type=SOME_GPU)  # fmt: skip
    log.began = runs[number][0]["time_ms"] / 1000
    log.trained_seconds = sum(record["seconds"] for record in records)
    per_block = records[-1]["images"] / together
    log.remarks.append(f"it has {len(records)} blocks of {per_block:g} steps, read as if each was a step")
    return log


def _event(text: str) -> list[dict[str, Any]]:
    """The event that a line has; none if the lines of two ranks are in one."""
    with suppress(ValueError, RecursionError):
        event = json.loads(text)
        if isinstance(event, dict) and isinstance(event.get("key"), str) and type(event.get("time_ms")) is int:
            return [event] if 0 <= event["time_ms"] < _LATEST else []
    return []


def _blocks(events: Iterable[dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    begun: dict[str, Any] | None = None
    for event in events:
        if event["key"] not in ("block_start", "block_stop") or event.get("value") == "validation_step":
            continue
        if event["key"] == "block_start":
            begun = event
        elif begun:
            about = [one["metadata"] if isinstance(one.get("metadata"), dict) else {} for one in (begun, event)]
            counts = [one.get("samples_count") for one in about]
            seconds = (event["time_ms"] - begun["time_ms"]) / 1000
            if (
                all(type(count) is int for count in counts)
                and 0 <= counts[0] < counts[1] <= MOST_EXAMPLES
                and seconds > 0
            ):
                images = counts[1] - counts[0]
                records.append(dict(
                    step=len(records) + 1, epoch=0, images=images, seconds=seconds, loss=math.nan,
                    micro_batches=round(images / given["train_batch_size"] / given["num_processes"]),
                    step_loss=math.nan, lr=math.nan, elapsed=math.nan,
                ))  # fmt: skip
            begun = None
    return records
