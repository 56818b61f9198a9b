"""A run that sdnb did not make and that has no folder: what a log contains, in the form that `measure` needs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from sdnb.errors import ConfigError, RunError
from sdnb.metrics.steps import warmup_steps
from sdnb.settings.config import TrainConfig

UNKNOWN = "unknown"


@dataclass
class Log:
    """One run in a log. `settings`: those that the log contains, by their names in TrainConfig. Each of `records` has
    the fields of a line of metrics.jsonl that are known; unknown numbers are NaN."""

    form: str  # what kind of log it is
    settings: dict[str, Any]
    examples: int | None = None  # images in the data set
    records: list[dict[str, Any]] = field(default_factory=list)
    began: float | None = None  # Unix time
    trained_seconds: float | None = None  # from the first step of the log to the end of its last
    total_seconds: float | None = None  # to the end of the log: saving the pipeline is in it
    seconds_shown: dict[int, float] = field(default_factory=dict)  # by the progress bar after each step, s/it
    shows_single_steps: bool = True  # whether that is a moving average of the times of single steps
    not_shown: list[int] = field(default_factory=list)  # steps of which the log says nothing, the first of them
    device_type: str = UNKNOWN
    device_names: list[str] = field(default_factory=list)
    header: dict[str, int] = field(default_factory=dict)  # what the header says, for whoever checks it
    run: int = 1  # which of the runs in the log this is
    runs: int = 1
    remarks: list[str] = field(default_factory=list)  # what a reader must know about how it was read

    @cached_property
    def config(self) -> TrainConfig:
        """The settings, with `unknown` as the model and the data if the log does not name them. Raises RunError if a
        setting has a value that no run can have."""
        given = self.settings
        data = {} if given.get("dataset_name") or given.get("train_data_dir") else {"dataset_name": UNKNOWN}
        defaults = {"pretrained_model_name_or_path": UNKNOWN, "num_processes": 1}
        try:
            return TrainConfig(**{**defaults, **data, **given})
        except ConfigError as error:
            problems = str(error).replace("\n", "; ")
            raise RunError(f"the log has settings that no run can have: {problems}") from None

    @property
    def steps(self) -> pd.DataFrame:
        return pd.DataFrame(self.records)

    @property
    def validation(self) -> pd.DataFrame:
        return pd.DataFrame()

    @property
    def model(self) -> dict[str, Any]:
        return {}

    @property
    def summary(self) -> dict[str, Any]:
        return dict(world_size=self.config.ranks, total_seconds=self.total_seconds, ranks=[])

    @property
    def environment(self) -> dict[str, Any]:
        """As in environment.json, with all that the log says in `imported`."""
        imported: dict[str, Any] = {
            "form": self.form, "known_settings": sorted(self.settings), "examples": self.examples, "run": self.run,
            "runs": self.runs, "header": self.header, "trained_seconds": self.trained_seconds, "remarks": self.remarks,
            "shows_single_steps": self.shows_single_steps, "not_shown": self.not_shown,
        }  # fmt: skip
        first = self.steps.step.iloc[0] + warmup_steps(len(self.records))
        shown = {step: seconds for step, seconds in self.seconds_shown.items()
                 if first <= step < self.settings.get("max_train_steps", math.inf)}  # fmt: skip
        if shown:
            imported |= {"at_step": max(shown), "shown_seconds_per_step": shown[max(shown)]}
        devices = dict(type=self.device_type, names=self.device_names, memory_gib=[], free_gib=[], bf16=False)
        return dict(devices=devices, packages={}, started=self.began, resumed=[], imported=imported)

    def what_was_read(self) -> list[str]:
        """Lines for a reader: what the log contains, before any conclusion."""
        config, steps = self.config, self.steps
        facts = {
            "form": self.form + (f"; run {self.run} of {self.runs} in it" if self.runs > 1 else ""),
            "images in the data set": f"{self.examples:,}" if self.examples else UNKNOWN,
            "global batch": f"{config.train_batch_size} images × {config.gradient_accumulation_steps} micro-batches × "
            f"{config.ranks} ranks = {config.global_batch}",
            "steps": f"{steps.step.iloc[0]} to {steps.step.iloc[-1]} of {config.max_train_steps or len(steps)}, "
            f"{steps.seconds.notna().sum()} with a time, {steps.loss.notna().sum()} with a loss",
        }
        imported = self.environment["imported"]
        if "at_step" in imported:
            facts["progress bar"] = f"{imported['shown_seconds_per_step']:.4g} s/it at step {imported['at_step']}"
        if self.trained_seconds is not None:
            facts["time"] = f"{self.trained_seconds:.0f} s to the last step"
            if self.total_seconds and self.total_seconds > self.trained_seconds + 1:
                facts["time"] += f", {self.total_seconds:.0f} s to the end of the log"
        if self.runs > 1:
            others = "another" if self.runs > 2 else "the other"
            facts["other runs"] = f"the log has {self.runs} runs; --run chooses {others}"
        width = max(map(len, facts))
        return [*(f"{name:<{width}}  {text}" for name, text in facts.items()), *self.remarks]


def empty_records(steps: Iterable[int], config: TrainConfig, examples: int | None) -> dict[int, dict[str, Any]]:
    """A record for each of the steps, in which the numbers that come from the log are NaN. Without the number of
    examples, all steps are full."""
    unknown = dict.fromkeys(("loss", "step_loss", "lr", "seconds", "elapsed"), math.nan)
    if examples is None:
        full = dict(epoch=0, micro_batches=config.gradient_accumulation_steps, images=config.global_batch)
        return {step: dict(step=step, **full, **unknown) for step in steps}
    epoch = config.epoch(examples)
    return {
        step: dict(step=step, epoch=(step - 1) // int(epoch.steps), micro_batches=epoch.micro_batches_in(step),
                   images=epoch.images_in(step), **unknown)
        for step in steps
    }  # fmt: skip
