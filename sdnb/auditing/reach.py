"""Whether a claimed rate is within reach of the device."""

import re
from collections.abc import Iterator

from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN, WORTH_SAYING, Case, Finding
from sdnb.machine.peaks import peak_tflops
from sdnb.metrics.results import MFU_NAME
from sdnb.run.baselines import baselines

POSSIBLE = "within reach"

# TFLOP of the UNet alone, forward and backward, for one image: counted with torch's FlopCounterMode in the layers of
# Stable Diffusion 1 (859,520,964 parameters) and 2 (865,910,724). A test counts one of them again.
UNET_TFLOP = {
    "v1": {512: 2.4068, 768: 6.4412, 960: 11.6961},
    "v2": {512: 2.4087, 768: 6.4432, 960: 11.6980},
}


def within_reach(case: Case) -> Iterator[Finding]:
    """Whether the device can do it: by its peak, and by what is published for it."""
    evidence, config = case.evidence, case.evidence.config
    own = next((row for row in evidence.measured.results if row.name == MFU_NAME and row.value is not None), None)
    if own is not None and own.value is not None:
        yield Finding(POSSIBLE, FAILS if own.value > 1 else HOLDS, f"MFU {own.text} {own.how}")
        return
    if config.lora:
        yield Finding(POSSIBLE, UNKNOWN, "no figures of LoRA are published for a device")
        return
    rate = case.rate or (evidence.ways[0].rate if evidence.ways else None)
    tflop = UNET_TFLOP.get(_architecture(config.pretrained_model_name_or_path), {}).get(_resolution(case) or 0)
    kind = _kind_of(case.device or next(iter(evidence.environment.get("devices", {}).get("names") or []), ""))
    if not (rate and tflop and kind):
        yield Finding(POSSIBLE, UNKNOWN, "it needs a known model, its resolution and a known device")
        return
    peak, most, who = _limits(kind, config.mixed_precision or "fp16")
    least = rate * tflop
    why = f"{rate:.4g} images/s × {tflop:.4g} TFLOP, UNet alone = {least:.1f} TFLOP/s"
    if peak and least > peak:
        yield Finding(POSSIBLE, FAILS, f"{why}, above the peak of {kind}, {peak:g}")
    elif least > most * (1 + WORTH_SAYING):
        yield Finding(POSSIBLE, FAILS, f"{why}, above the most that is published for {kind}, {most:.1f} ({who})")
    else:
        of_peak = f", {least / peak:.0%} of the peak" if peak else ""
        yield Finding(POSSIBLE, HOLDS, f"{why}{of_peak}; {most:.1f} is published for {kind} ({who})")


def _resolution(case: Case) -> int | None:
    evidence = case.evidence
    is_known = evidence.is_own or "resolution" in evidence.log.get("known_settings", ())
    return case.resolution or (evidence.config.resolution if is_known else None)


def _architecture(model: str) -> str:
    name = model.rstrip("/").rpartition("/")[2].lower()
    found = re.search(r"(?:stable-diffusion|sd)-?(?:v-?)?([12])(?=\D|$)", name)
    return f"v{found[1]}" if found else ""


def _kind_of(device: str) -> str | None:
    words = re.split(r"[^A-Za-z0-9]+", device.upper())
    return next((one.kind for one in baselines().values() if one.kind.upper() in words), None)


def _limits(kind: str, precision: str) -> tuple[float | None, float, str]:
    """A device's peak, and the most UNet TFLOP/s that is published for it, with its source."""
    of_kind = [one for one in baselines().values() if one.kind == kind]
    achieved = {one.name: one.images_per_second * UNET_TFLOP[one.architecture][one.resolution] for one in of_kind}
    best = max(achieved, key=lambda name: achieved[name])
    return peak_tflops(kind, precision), achieved[best], best
