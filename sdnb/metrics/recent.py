"""The rates of the recent steps, as a progress bar and the log show them during a run."""

from collections.abc import Iterator, Sequence
from typing import Any

from sdnb.machine.peaks import peak_of
from sdnb.metrics.throughput import flop_of

RECENT_STEPS = 20


def recent_rates(
    records: Sequence[dict[str, Any]], flop_per_image: dict[str, float], peak: float
) -> Iterator[tuple[str, str]]:
    """From the records of some steps: loss and learning rate of the last one, images/s, MFU where the peak is known,
    the share of the time in which the device waits for data, and the peak memory of rank 0. The latter two arguments
    are those of `utilisation_of`."""
    last, seconds = records[-1], sum(record["seconds"] for record in records)
    yield "loss", "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    if "lr" in last:
        yield "lr", f"{last['lr']:.3g}"
    yield "images/s", f"{sum(record['images'] for record in records) / seconds:.1f}"
    if peak:
        flop = sum(sum(flop_of(flop_per_image, *_counts(record)).values()) for record in records)
        yield "MFU", f"{flop / seconds / peak:.1%}"
    if "phase_seconds" in last:
        yield "data", f"{sum(record['phase_seconds'].get('data', 0) for record in records) / seconds:.0%}"
    if "peak_memory_gib" in last:
        yield "memory", f"{last['peak_memory_gib']:.1f} GiB"


def utilisation_of(run: Any) -> tuple[dict[str, float], float]:
    """Of a `RunFolder`: FLOP per image by part of the model, and the peak of all ranks together in FLOP/s; 0 if it is
    unknown."""
    config, devices = run.config, run.environment.get("devices", {})
    per_image = run.model.get("flop_per_image") or {}
    peak = peak_of(config, (devices.get("names") or [""])[0]) if per_image else None
    return per_image, (peak or 0.0) * 1e12 * config.ranks


def _counts(record: dict[str, Any]) -> list[int]:
    images = record["images"]
    return [images, record.get("encoded_images", images), record.get("encoded_captions", images)]
