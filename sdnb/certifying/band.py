"""A band: what trainings with the same settings and other seeds give. `sdnb certify` compares a run with it."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.special import stdtrit

from sdnb.certifying.quantities import AVERAGED, BEFORE, GIVEN, ROUNDED, UNMOVED
from sdnb.errors import ConfigError
from sdnb.machine.device_kind import HOST
from sdnb.places import shipped, workspace
from sdnb.run import files
from sdnb.run.folder import RunFolder
from sdnb.settings.config import TrainConfig, read_yaml
from sdnb.settings.fields import IDENTIFIED_BY_DIGEST

BANDS = "params/bands"
FALSE_ALARMS = 0.01  # of honest runs, over all quantities
LEAST_SEEDS, LEAST_STEPS = 8, 4
# How a machine does the same training. `trajectory` has them, because they change the last digits.
_MAY_DIFFER = {
    "seed", "num_processes", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "enable_xformers_memory_efficient_attention", "dataloader_num_workers", "offload_ema", "foreach_ema",
    "mixed_precision", "allow_tf32", "scale_lr", "learning_rate",
}  # fmt: skip
# The seed does not change these. What the precision does to the first is relative: torch's convolutions on a GPU use
# TF32, and AdamW's sums are of float32. Processors differed by 1e-7; layers that round to bfloat16 moved it by 8e-6.
_OF_PRECISION = {"no": 2e-6, "fp16": 2e-4, "bf16": 2e-3}
_ON_A_GPU = 2e-4
_EXACT = {UNMOVED: 0.0, AVERAGED: 0.0, ROUNDED: 0.5, GIVEN: 1e-2}


@dataclass(frozen=True)
class Band:
    """`settings`: those that decide the training, see `deciding_settings`. `made_with`: the model and the data by name,
    and the precision and kind of device. `quantities`: for each, the values of the seeds, in their order.
    `file`: where it is kept."""

    settings: dict[str, Any]
    made_with: dict[str, str]
    steps: int
    held_out_after: int
    seeds: list[int]
    quantities: dict[str, list[float]]
    file: str = ""

    @property
    def z(self) -> float:
        """How many standard deviations of a new run's value are allowed: Student's t for a prediction, divided among
        the quantities that the seed changes (Bonferroni)."""
        tested = sum(name not in _EXACT and name != BEFORE for name in self.quantities)
        n = len(self.seeds)
        return float(stdtrit(n - 1, 1 - FALSE_ALARMS / tested / 2)) * math.sqrt(1 + 1 / n)

    def limits(self, name: str, made_with: dict[str, str]) -> tuple[float, float]:
        """Between which values a quantity of an honest run lies. `made_with`: what the run was, as of a band."""
        values = np.asarray(self.quantities[name])
        if name in _EXACT or name == BEFORE:
            low, high = float(values.min()), float(values.max())
            precision = max(map(_tolerance, (self.made_with, made_with)))
            margin = _EXACT.get(name, precision * high)
            return max(0.0, low - margin), high + margin
        logs = np.log(values)
        margin = self.z * logs.std(ddof=1)
        return float(np.exp(logs.mean() - margin)), float(np.exp(logs.mean() + margin))

    def differences(self, run: RunFolder) -> list[str]:
        """The deciding settings that are not the same in a run."""
        theirs = deciding_settings(run)
        return [
            f"{name}: {self.settings.get(name)} in the band, {theirs.get(name)} in the run"
            for name in {**self.settings, **theirs}
            if theirs.get(name) != self.settings.get(name)
        ]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {name: value for name, value in asdict(self).items() if name != "file"}
        layout: dict[str, Any] = dict(sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
        files.write_text(path, yaml.safe_dump(content, **layout))


def made_with(run: RunFolder) -> dict[str, str]:
    """The model and the data of a run by name, its precision, and its kind of device."""
    config = run.config
    return {
        "model": config.pretrained_model_name_or_path,
        "data": config.dataset_name or config.train_data_dir or "",
        "precision": config.mixed_precision or "no",
        "device": run.environment.get("devices", {}).get("type", HOST),
    }


def _tolerance(made: dict[str, str]) -> float:
    """How far the precision may move a loss, relative."""
    return max(_OF_PRECISION[made["precision"]], 0.0 if made["device"] == HOST else _ON_A_GPU)


def deciding_settings(run: RunFolder) -> dict[str, Any]:
    """What decides the result of a run, apart from the seed and the way the machine computes."""
    config = run.config
    settings = {
        name: value for name, value in config.trajectory().items() if name not in _MAY_DIFFER | IDENTIFIED_BY_DIGEST
    }
    return {
        **settings,
        "global_batch": config.global_batch,
        "learning_rate": config.peak_learning_rate,
        "model": run.model.get("unet_digest"),
        "data": run.environment.get("data", {}).get("digest"),
    }


def read_band(path: str | Path) -> Band:
    """Raises ConfigError if the file is no band."""
    content = read_yaml(path)
    try:
        band = Band(**content, file=str(path))
        values = [value for one in band.quantities.values() for value in one]
        if {len(one) for one in band.quantities.values()} != {len(band.seeds)}:
            raise ValueError("each quantity needs a number for each seed")
        if not all(isinstance(value, (int, float)) and 0 <= value < 1e300 for value in values):
            raise ValueError("a quantity is not a number, or is negative")
        if len(band.seeds) < LEAST_SEEDS:
            raise ValueError(f"it has {len(band.seeds)} seeds, and needs {LEAST_SEEDS}")
        if not (isinstance(band.steps, int) and isinstance(band.settings, dict) and _tolerance(band.made_with)):
            raise ValueError("steps is not a number, or settings has no names")
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{path}: is no band as `sdnb certify --make-band` writes it: {error}") from None
    return band


def band_for(run: RunFolder) -> Band:
    """The band in `params/bands/`, of the current folder or as shipped, with the settings of a run: one with as many
    steps, or else the longest that is shorter. Raises ConfigError with the differences to the nearest one, if there is
    none."""
    folders = dict.fromkeys((workspace() / BANDS, shipped(BANDS)))
    paths = (path for folder in folders for path in sorted(folder.glob("*.yaml")))
    bands = [replace(read_band(path), file=f"{BANDS}/{path.name}") for path in paths]
    if fitting := [band for band in bands if not band.differences(run)]:
        steps = len(run.steps)
        return max(fitting, key=lambda band: (band.steps <= steps, band.steps if band.steps <= steps else -band.steps))
    nearest = min(bands, key=lambda band: len(band.differences(run)), default=None)
    differ = "".join(f"\n  {line}" for line in nearest.differences(run)) if nearest else ""
    raise ConfigError(
        f"{run.folder}: there is no band of these settings in {BANDS}."
        + (f" The nearest is {nearest.file}; it differs in{differ}" if nearest else "")
        + "\nMake one of settings that you trust: sdnb certify --make-band SETTINGS.yaml"
    )


def settings_for(config: TrainConfig, seed: int, folder: Path) -> TrainConfig:
    """The settings of one of a band's trainings. Raises ConfigError if the seeds would have different data."""
    if config.max_train_samples is not None:
        raise ConfigError("max_train_samples chooses by the seed, so each seed of a band would have other data")
    return config.measured_only(
        seed=seed, output_dir=str(folder), checkpoints_total_limit=1,
        validation_loss_steps=config.validation_loss_steps or 10,
    )  # fmt: skip
