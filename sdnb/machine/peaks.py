"""Peak rates of devices, from their data sheets."""

from pathlib import Path

import yaml

from sdnb.settings.config import TrainConfig

_PEAK_TFLOPS = yaml.safe_load(Path(__file__).with_name("peaks.yaml").read_text())


def peak_of(config: TrainConfig, device: str) -> float | None:
    """The peak that MFU is computed from, in TFLOP/s: `device_peak_tflops`, or the device's own; None if unknown."""
    return config.device_peak_tflops or peak_tflops(device, config.mixed_precision or "no")


def peak_tflops(device: str, precision: str) -> float | None:
    """A device's peak for matrix products, in TFLOP/s; None if unknown. For float32 it is the TF32 peak if the device
    has TF32, because torch's convolutions use TF32 by default."""
    words = f" {device.replace('-', ' ')} "
    rates = next((rates for name, rates in _PEAK_TFLOPS.items() if f" {name} " in words), {})
    return rates.get("tf32", rates.get("no")) if precision == "no" else rates.get(precision)
