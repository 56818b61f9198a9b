"""Before the launch: what will run where, decided and checked."""

import socket
from dataclasses import dataclass
from typing import Any

import pandas as pd
from PIL import Image

from sdnb.data.loading import Splits, load_data
from sdnb.errors import ConfigError
from sdnb.launch import duration, memory
from sdnb.machine import environment
from sdnb.machine.device_kind import kind_of
from sdnb.models.pipeline import model_folder
from sdnb.settings.config import TrainConfig
from sdnb.tables import html_table
from sdnb.training.checkpoint_folder import find_checkpoints


@dataclass(frozen=True)
class Plan:
    """What will run where: complete settings, the machine, and the data."""

    config: TrainConfig
    environment: dict[str, Any]
    examples: Splits
    predicted: memory.Prediction | None
    resumes_after: int = 0
    duration: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """What a reader wants to know before the training starts."""
        config, devices, count = self.config, self.environment["devices"], self.examples.train.count
        held_out = len(self.examples.held_out) if self.examples.held_out is not None else 0
        ranks = "1 rank" if config.ranks == 1 else f"{config.ranks} ranks"
        where = f"on the CPU: {devices['names'][0]}, {self.environment['cpu_cores']} cores"
        if not kind_of(devices["type"]).is_host:
            where = f"each on {devices['names'][0]} with {devices['memory_gib'][0]} GiB"
        facts = {
            "model": config.pretrained_model_name_or_path,
            "data": f"{config.dataset_name or config.train_data_dir}: {count or 'a stream'} to train on, "
            f"{held_out} held out",
            "runs on": f"{ranks}, {where}",
            "precision": f"{config.mixed_precision}{' (float32)' if config.mixed_precision == 'no' else ''}",
            "global batch": f"{config.global_batch} = {config.train_batch_size} × "
            f"{config.gradient_accumulation_steps} micro-batches × {ranks}",
            **self._epochs(count),
        }
        if (folded := config.fold_micro_batches or 1) > 1:
            facts["micro-batches"] = f"{folded} of a step run as one batch"
        if self.predicted is not None:
            free_gib = memory.per_rank(config, devices["type"], devices["free_gib"])
            source = "free" if config.memory_gib is None else "allowed by memory_gib"
            facts["memory"] = f"{self.predicted.total_gib:.1f} GiB per rank predicted, {free_gib:.1f} GiB {source}"
        if self.resumes_after:
            facts["resumes"] = f"after step {self.resumes_after}"
        if self.duration:
            facts["will take"] = self.duration
        return facts

    def _epochs(self, count: int | None) -> dict[str, str]:
        steps = self.config.total_steps(count)
        if count is None:
            return {"an epoch": "ends with the stream; its length is unknown", "the training": f"{steps} steps"}
        epoch = self.config.epoch(count)
        repeats = f", {epoch.images - count} of them repeats that fill the last round" if epoch.images > count else ""
        skipped = f", {count - epoch.images} are skipped" if epoch.images < count else ""
        return {
            "an epoch": f"{epoch.micro_batches} micro-batches per rank, {epoch.steps:g} optimizer steps, "
            f"{epoch.short_steps} of them short; {epoch.images} images{repeats}{skipped}",
            "the training": f"{steps} steps, {steps / epoch.steps:.1f} epochs",
        }

    def sample_examples(self, count: int) -> tuple[list[Image.Image], list[str], int | None]:
        """Some training images with their captions, evenly chosen, or the first of a stream; and the number of all
        images, if it is known."""
        train = self.examples.train
        return *train.sample(count), train.count

    def _repr_html_(self) -> str:
        settings = {name: value for name, value in self.config.model_dump().items() if value is not None}
        tables = [pd.DataFrame({"": rows.values()}, index=list(rows)) for rows in (self.facts, settings)]
        facts, all_settings = (html_table(table, header=False) for table in tables)
        folded = f"<summary>All {len(settings)} settings</summary>{all_settings}"
        return f"{facts}<details class='plan-settings'>{folded}</details>"

    def __repr__(self) -> str:
        return "\n".join(f"{name + ':':<15}{value}" for name, value in self.facts.items())


def prepare(config: TrainConfig) -> Plan:
    """Complete the settings for this machine, and load the data, before anything is launched. Raises SdnbError if the
    machine, its memory, the model or the data do not allow the run."""
    seen = environment.capture()
    devices = seen["devices"]
    config = environment.resolved(config, environment.Devices(**devices))
    environment.require(config)
    _require_port(config)
    model_folder(config)
    config, predicted = memory.settle(config, environment.Devices(**devices))
    examples = load_data(config)
    steps = config.total_steps(examples.train.count)  # there may be too few examples
    checkpoints = find_checkpoints(config, examples.train).usable
    resumes_after = checkpoints[0].step if checkpoints else 0
    takes = duration.expected(config, seen, steps - resumes_after)
    return Plan(config, seen, examples, predicted, resumes_after, takes)


def _require_port(config: TrainConfig) -> None:
    """Raise ConfigError if another program listens on the port where the ranks meet: they might wait for ever."""
    port = config.meeting_port
    if port and config.machine_rank == 0 and config.ranks > 1:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended does not matter
            try:
                probe.bind(("", port))
            except OSError as error:
                raise ConfigError(
                    f"main_process_port = {port}: the ranks cannot meet there: {error.strerror}. Set another port, the "
                    "same on every machine. A single machine finds a free port if it is not set"
                ) from None
