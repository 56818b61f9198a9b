"""Peak rates of devices, from their data sheets."""

from pathlib import Path
from typing import Any

import yaml

from sdnb.settings.config import TrainConfig

_TABLE = yaml.safe_load(Path(__file__).with_name("peaks.yaml").read_text())


def peak_of(config: TrainConfig, device: str) -> float | None:
    """The peak that MFU is computed from, in TFLOP/s: `device_peak_tflops`, or the device's own; None if unknown."""
    return config.device_peak_tflops or peak_tflops(device, config.mixed_precision or "no")


def peak_tflops(device: str, precision: str) -> float | None:
    """A device's peak for matrix products, in TFLOP/s; None if unknown. For float32 it is the TF32 peak if the table
    has one: torch's convolutions use TF32 there by default."""
    rates = _entry(device)
    return rates.get("tf32", rates.get("no")) if precision == "no" else rates.get(precision)


def source_of_peak(device: str) -> str | None:
    """What `peak_tflops` has its numbers from; None if it has none."""
    return _entry(device).get("source")


def _entry(device: str) -> dict[str, Any]:
    """The longest name of the table that is in the device's name counts: an H100 PCIe is no H100."""
    words = _words(device)
    if any(_words(name) in words for name in _TABLE["unknown"]):
        return {}
    names = [name for name in _TABLE["peaks"] if _words(name) in words]
    return _TABLE["peaks"][max(names, key=len)] if names else {}


def _words(name: str) -> str:
    return f" {name.replace('-', ' ')} "
