"""Peak rates of devices, from their data sheets."""

# Peak matrix-product TFLOP/s without sparsity, by precision of the products ("no": float32), from data sheets:
# NVIDIA's for A100, H100, H200, L40S, L4, T4, V100, A10, RTX 4090; AMD's for MI250X (one of its two dies) and MI300X.
_PEAK_TFLOPS = {
    "A100": {"fp16": 312, "bf16": 312, "tf32": 156},
    "A10": {"fp16": 125, "bf16": 125, "tf32": 62.5},
    "H100 PCIe": {"fp16": 756, "bf16": 756, "tf32": 378},
    "H100 NVL": {"fp16": 835, "bf16": 835, "tf32": 417},
    "H100": {"fp16": 989, "bf16": 989, "tf32": 494},
    "H200 NVL": {"fp16": 835, "bf16": 835, "tf32": 417},
    "H200": {"fp16": 989, "bf16": 989, "tf32": 494},
    "L40S": {"fp16": 362, "bf16": 362, "tf32": 183},
    "L4": {"fp16": 121, "bf16": 121, "tf32": 60},
    "T4": {"fp16": 65, "no": 8.1},
    "V100 PCIE": {"fp16": 112, "no": 14},
    "V100": {"fp16": 125, "no": 15.7},
    "4090 D": {},  # slower than the 4090; no rate known
    "4090": {"fp16": 165, "bf16": 165, "tf32": 82.6},
    "MI250X": {"fp16": 191.5, "bf16": 191.5, "no": 47.9},
    "MI300X": {"fp16": 1307, "bf16": 1307, "no": 163},
}


def peak_tflops(device: str, precision: str) -> float | None:
    """A device's peak for matrix products, in TFLOP/s; None if unknown. For float32 it is the TF32 peak if the device
    has TF32, because torch's convolutions use TF32 by default."""
    words = f" {device.replace('-', ' ')} "
    rates = next((rates for name, rates in _PEAK_TFLOPS.items() if f" {name} " in words), {})
    return rates.get("tf32", rates.get("no")) if precision == "no" else rates.get(precision)
