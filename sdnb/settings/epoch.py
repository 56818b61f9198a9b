"""How an epoch divides into micro-batches and optimizer steps."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One pass over the data. accelerate repeats some examples to fill the last round, so that every rank has the same
    number of micro-batches. The end of an epoch ends the accumulation, so the last optimizer step may be *short*: it
    has fewer micro-batches. With `whole_steps` there are no repeats and no short steps; an epoch may end within a step.
    """

    examples: int
    batch_size: int
    accumulation_steps: int
    ranks: int
    whole_steps: bool = False

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank."""
        if self.whole_steps:
            return self.examples // self.batch_size // self.ranks
        return math.ceil(math.ceil(self.examples / self.batch_size) / self.ranks)

    @property
    def steps(self) -> float:
        """Optimizer steps; a whole number, except with `whole_steps`."""
        steps = self.micro_batches / self.accumulation_steps
        return steps if self.whole_steps else math.ceil(steps)

    def steps_in(self, epochs: int) -> int:
        """Optimizer steps in so many epochs, at least one."""
        if self.whole_steps:
            return max(1, epochs * self.micro_batches // self.accumulation_steps)
        return epochs * math.ceil(self.micro_batches / self.accumulation_steps)

    @property
    def images(self) -> int:
        """Images that all ranks train on, repeats included."""
        if self.ranks == 1 and not self.whole_steps:
            return self.examples
        return self.micro_batches * self.ranks * self.batch_size

    @property
    def global_batch(self) -> int:
        """Images in a full optimizer step, of all ranks."""
        return self.batch_size * self.accumulation_steps * self.ranks

    @property
    def short_steps(self) -> int:
        return 0 if self.whole_steps else int(self.steps) - self.images // self.global_batch

    def micro_batches_in(self, step: int) -> int:
        """Micro-batches of one rank in an optimizer step. Steps are counted from 1."""
        full = self.accumulation_steps
        return full if self.whole_steps or step % self.steps else self.micro_batches - (int(self.steps) - 1) * full

    def images_in(self, step: int) -> int:
        """Images that all ranks train on in an optimizer step, repeats included."""
        full = self.global_batch
        return full if self.whole_steps or step % self.steps else self.images - (int(self.steps) - 1) * full

    def unique_images_in(self, step: int) -> int:
        """As `images_in`, without the images that accelerate repeats at the end of an epoch."""
        if self.whole_steps:
            return self.global_batch
        before = (step - 1) % int(self.steps) * self.global_batch
        return max(0, min(self.images_in(step), self.examples - before))
