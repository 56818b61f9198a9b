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
    def short_steps(self) -> int:
        global_batch = self.batch_size * self.accumulation_steps * self.ranks
        return 0 if self.whole_steps else int(self.steps) - self.images // global_batch

    def micro_batches_of(self, steps: int) -> list[int]:
        """Micro-batches of one rank in each of the first optimizer steps, without `whole_steps`."""
        full, epoch = self.accumulation_steps, self.micro_batches
        sizes = [min(full, epoch - start) for start in range(0, epoch, full)]
        return [sizes[step % len(sizes)] for step in range(steps)]
