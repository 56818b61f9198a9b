"""Published measurements to compare with: what their sources say, and what is known of the work behind them."""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sdnb.machine.device_kind import SOME_GPU
from sdnb.metrics.result import RATE, Result
from sdnb.metrics.results import Measurements, measure
from sdnb.metrics.throughput import Estimate
from sdnb.run.folder import RunFolder
from sdnb.run.log import Log, empty_records
from sdnb.settings.config import TrainConfig

_FOLDER = Path(__file__).parent / "published"
# The measurement of Stable Diffusion v1-4 on eight GPUs behind the published 17.88, as a run folder.
PUBLISHED = _FOLDER / "sd-v1-4-8-gpus-2024"
SUITE = _FOLDER / "suite.yaml"  # what is published of the suite's cards


@dataclass(frozen=True)
class Baseline:
    """A published measurement. `images_per_second` is that of one device, as published. With `seconds_per_step`,
    `steps` and `examples`, the work of each step is known. In a comparison it stands for a run."""

    name: str
    what: str
    source: str
    date: str
    device: str
    kind: str  # of device, as in the table of peaks
    devices_used: int
    model_name: str
    architecture: str  # v1 or v2: of the UNet
    resolution: int
    images_per_second: float
    settings: dict[str, Any] = field(default_factory=dict)
    not_comparable: tuple[str, ...] = ()  # in what it differs from a run of diffusers' script
    seconds_per_step: float | None = None
    steps_run: int | None = None
    examples: int | None = None

    @property
    def log(self) -> Log:
        """What is known of the run, as if it was a log. Without the steps, one whose only step is unknown."""
        settings = {
            "pretrained_model_name_or_path": self.model_name, "resolution": self.resolution,
            "num_processes": self.devices_used, **self.settings,
            **({"max_train_steps": self.steps_run} if self.steps_run else {}),
        }  # fmt: skip
        log = Log(f"published figures: {self.source}", settings, self.examples, device_type=SOME_GPU)
        log.device_names = [self.device] * self.devices_used
        log.records = [*empty_records(range(1, (self.steps_run or 1) + 1), log.config, self.examples).values()]
        if self.seconds_per_step and self.steps_run:
            log.trained_seconds = self.seconds_per_step * self.steps_run
        return log

    @property
    def measured(self) -> Measurements:
        """The published rate; and the rate that its own seconds per step give, if the work of each step is known."""
        published = Estimate(self.images_per_second, math.nan, math.nan)
        how = f"as published, {self.date}: {self.what}; {self.source}"
        if self.seconds_per_step is None:
            row = Result("images/s per GPU", str(published), how, self.images_per_second, RATE)
            return Measurements(pd.DataFrame(), pd.DataFrame(), self.config, published, (row,))
        measured = measure(self.log)
        row = Result("nominal IPS", str(published), how, self.images_per_second, RATE, 1)
        return Measurements(
            measured.steps, measured.validation, measured.config, measured.throughput, (*measured.results, row)
        )

    @property
    def config(self) -> TrainConfig:
        return self.log.config

    @property
    def known_settings(self) -> dict[str, Any]:
        settings = self.config.model_dump(mode="json")
        return {name: settings[name] for name in self.log.settings}

    @property
    def environment(self) -> dict[str, Any]:
        return self.log.environment

    @property
    def devices(self) -> str:
        return f"{self.devices_used} × {self.device}"

    @property
    def folder(self) -> Path:
        """The name by which commands know it."""
        return Path(self.name)

    @property
    def drawn(self) -> pd.DataFrame:
        return pd.DataFrame()


@cache
def baselines() -> dict[str, Baseline]:
    """All published measurements that have no run folder, by name."""
    found = {}
    for known in yaml.safe_load((_FOLDER / "baselines.yaml").read_text()).values():
        if "name" in known:
            facts = {"devices_used": known["devices"], "model_name": known["model"], "steps_run": known.get("steps")}
            rest = {name: value for name, value in known.items() if name not in ("devices", "model", "steps")}
            rest["not_comparable"] = tuple(known["not_comparable"])
            found[known["name"]] = Baseline(**{**rest, **facts})
    return found


def published() -> pd.DataFrame:
    """Published measurements, each with its source, date and hardware, what is known of its work, and in what it is not
    comparable with a run of diffusers' `train_text_to_image.py`. `compare` knows them by the name in the index.
    `images/s per GPU` is as published; `images trained/s` is computed from what is known of the work."""
    run = RunFolder(PUBLISHED)
    first = {
        "what": "chip-evaluation suite, Stable Diffusion v1-4 at 512 on 8 GPUs; its log comes with sdnb",
        "date": "2024-03", "hardware": run.devices, "images/s per GPU": 17.88, "s/it": 1.79,
        "images trained/s": measure(run).throughput.value,
        "not comparable": "a short step is counted as a full one; its time is a moving average",
        "source": "https://github.com/DeepLink-org/AIChipBenchmark/tree/main/llm/stable-diffusion",
    }  # fmt: skip
    rows = {"published": first}
    for name, one in baselines().items():
        rows[name] = {
            "what": one.what, "date": str(one.date), "hardware": one.devices, "images/s per GPU": one.images_per_second,
            "s/it": one.seconds_per_step, "images trained/s": one.measured.throughput.value if one.examples else None,
            "not comparable": "; ".join(one.not_comparable), "source": one.source,
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")
