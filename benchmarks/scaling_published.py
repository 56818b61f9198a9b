"""What published figures of 8 and 32 GPUs imply: how the training scales, and the bandwidth between the machines."""

from __future__ import annotations

from dataclasses import dataclass

from common import table
from scaling_model import ring

from sdnb.run.baselines import Baseline, baselines

BYTES_PER_GRADIENT = 4  # the weights are in float32, also with mixed_precision = fp16
UNET_PARAMETERS = {"v1": 859_520_964, "v2": 865_910_724}
LARGEST_BACKWARD = 2 / 3  # of a micro-batch: a backward pass has two matrix products for each of the forward pass


@dataclass(frozen=True)
class Pair:
    """What a published pair of figures, on one machine and on several, implies."""

    few: Baseline
    many: Baseline

    @property
    def name(self) -> str:
        return f"{self.few.model_name.removeprefix('stable-diffusion-')} at {self.few.resolution}"

    @property
    def nominal(self) -> float:
        """The efficiency of the published IPS, which counts short steps as full ones."""
        return self.many.images_per_second / self.few.images_per_second

    @property
    def trained(self) -> float:
        """The efficiency of the images that were trained on."""
        return self.many.measured.throughput.value / self.few.measured.throughput.value

    @property
    def full_steps(self) -> tuple[float, float]:
        """Seconds of a full step on few and on many, if all micro-batches take the same time."""
        images = [one.config.global_batch / one.devices_used for one in (self.few, self.many)]
        rates = [one.measured.throughput.value for one in (self.few, self.many)]
        return images[0] / rates[0], images[1] / rates[1]

    @property
    def extra(self) -> float:
        few, many = self.full_steps
        return many - few

    @property
    def hideable(self) -> float:
        """Seconds of the longest possible backward pass of a micro-batch."""
        return LARGEST_BACKWARD * self.full_steps[0] / self.few.config.gradient_accumulation_steps

    @property
    def moved_bytes(self) -> float:
        """Bytes that each rank sends per step, in a ring of all ranks."""
        return ring(self.many.devices_used) * BYTES_PER_GRADIENT * UNET_PARAMETERS[self.many.architecture]

    @property
    def bandwidths(self) -> tuple[float, float]:
        """Bytes/s between the machines, if the backward pass hides as much as it can, and if it hides nothing."""
        return self.moved_bytes / (self.extra + self.hideable), self.moved_bytes / self.extra


def pairs() -> list[Pair]:
    """The pairs in the published measurements of the chip-evaluation suite: the same model on 8 and on 32 GPUs."""
    suite = [one for one in baselines().values() if one.name.startswith("suite") and one.resolution == 960]
    return [
        Pair(few, many)
        for few in suite
        for many in suite
        if few.devices_used < many.devices_used and few.model_name == many.model_name
    ]


def text() -> str:
    """The pairs, what they imply, and how it follows."""
    rows = [
        [
            pair.name,
            f"{pair.few.seconds_per_step:.3f}, {pair.many.seconds_per_step:.3f}",
            f"{pair.nominal:.3f}",
            f"{pair.trained:.3f}",
            ", ".join(f"{distinct_rate(one):.1f}" for one in (pair.few, pair.many)),
            ", ".join(f"{seconds:.3f}" for seconds in pair.full_steps),
            f"{pair.extra:.3f}",
            " to ".join(f"{bandwidth / 1e9:.1f}" for bandwidth in pair.bandwidths),
        ]
        for pair in pairs()
    ]
    head = (
        "8, 32 A100", "s/it", "published IPS, 32 over 8", "images trained on, 32 over 8", "distinct images/s",
        "full step, s", "difference, s", "GB/s between machines",
    )  # fmt: skip
    one, other = pairs()[0], pairs()[-1]
    few, many = one.few, one.many
    epochs = [each.config.epoch(each.examples).images for each in (few, many)]
    mean = few.measured.steps.micro_batches.mean()
    notes = (
        f"Source: {few.source}, {few.date}; batch 8 × 4 per GPU. The measured model above is another model on another "
        "machine: only the shape of the two can be compared.",
        f"**The published IPS understates the scaling.** It counts each step as a full one. On 8 GPUs an epoch of "
        f"{few.examples} images has 14 micro-batches per GPU, so that every fourth step has 2 instead of 4: "
        f"{mean:.3f} on average. The published s/it is a mean of all steps. On 32 GPUs an epoch is one full step. "
        "*Images trained on* counts what the steps had. *Full step* is the time of 4 micro-batches, if "
        "all take the same time.",
        f"**Repeats.** An epoch is filled up to {epochs[0]:,} images on 8 GPUs and to {epochs[1]:,} on 32, so that "
        f"{repeats(few):.1%} and {repeats(many):.1%} of the images are repeats. *Distinct images/s* leaves them out. "
        "It scales as the published IPS does, because an epoch is 4 steps on 8 GPUs and one on 32.",
        f"**The network.** In a ring of 32 GPUs, each sends 2 × 31/32 × {BYTES_PER_GRADIENT} bytes × the parameters of "
        f"the UNet: {one.moved_bytes / 1e9:.2f} GB for the {UNET_PARAMETERS['v1']:,} of v1-5, and "
        f"{other.moved_bytes / 1e9:.2f} GB for the {UNET_PARAMETERS['v2']:,} of v2-1. If only this makes the full step "
        "longer, the bandwidth is these bytes / (difference + hidden seconds). The highest value hides nothing. The "
        "lowest hides the reduction behind all of the last backward pass, at most two thirds of a micro-batch: "
        f"{one.hideable:.2f} and {other.hideable:.2f} s. It is assumed that gradients are in float32, that the "
        "reduction within a machine is hidden, and that latency and waiting for the slowest GPU cost nothing.",
        f"Nearly the same bytes cost v1-5 {one.extra / other.extra:.1f} times as much as v2-1, although v1-5 has the "
        "longer backward pass to hide them. So the difference is not the network alone. The published figures have no "
        "spread, and do not show what else it is.",
    )
    return "\n\n".join(["## Published figures", table(head, rows), *notes])


def repeats(one: Baseline) -> float:
    """The share of repeats among the images that were trained on."""
    return 1 - one.examples / one.config.epoch(one.examples).images


def distinct_rate(one: Baseline) -> float:
    """Images/s of all GPUs, without repeats."""
    return one.measured.throughput.value * one.devices_used * (1 - repeats(one))
