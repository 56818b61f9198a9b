"""Peak rates of devices, from their data sheets."""

from pathlib import Path

import yaml

_PEAK_TFLOPS = yaml.safe_load(Path(__file__).with_name("peaks.yaml").read_text())


def peak_tflops(device: str, precision: str) -> float | None:
    """A device's peak for matrix products, in TFLOP/s; None if unknown. For float32 it is the TF32 peak if the device
    has TF32, because torch's convolutions use TF32 by default."""
    words = f" {device.replace('-', ' ')} "
    rates = next((rates for name, rates in _PEAK_TFLOPS.items() if f" {name} " in words), {})
    return rates.get("tf32", rates.get("no")) if precision == "no" else rates.get(precision)
