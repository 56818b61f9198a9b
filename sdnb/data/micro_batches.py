"""The micro-batches of a run, epoch after epoch, and the position among them, which can be saved and restored."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard

from sdnb.errors import DataError


class MicroBatches:
    """A rank's micro-batches, in the order of accelerate's loader, which is the reference's.

    The loader fetches one micro-batch ahead. With `num_workers=0` its random draws (crop, mirroring, caption) come from
    the generators that the training step also uses. To resume mid-epoch, replay it without loading images:

    1. Start from the RNG state at the epoch's start. This fixes the order, and the workers' seeds.
    2. Before the last fetch, restore the RNG state of that time. This fixes the micro-batch that was fetched ahead.
    3. Restore the RNG state of the position itself.
    """

    def __init__(
        self, loader: DataLoaderShard, accumulation_steps: int, whole_steps: bool = False, device: Any = None
    ) -> None:
        """`loader` is over a `TrainingSet`, prepared by accelerate. A full step has `accumulation_steps` micro-batches.
        With `whole_steps` a step does not end where an epoch ends. `device`: the `DeviceKind` whose generator belongs
        to the position, too."""
        self.loader, self.accumulation_steps, self.whole_steps = loader, accumulation_steps, whole_steps
        self._device = device
        self.epoch = self._taken = 0
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._resume_from: dict[str, Any] | None = None

    def of_a_step(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """The micro-batches of the next optimizer step, each with whether it is the step's last."""
        for number in range(1, self.accumulation_steps + 1):
            if self._iterator is None:
                self._iterator = self._begin_epoch()
            self._before_fetch = rng_states()
            batch = next(self._iterator, None)
            if batch is None:
                raise DataError("whole_steps = True: there are too few examples for one micro-batch on each rank")
            batch["pixels"] = list(batch["pixels"])  # threads may have loaded them already
            self._taken += 1
            epoch_ends = self.loader.end_of_dataloader  # it has looked ahead: a stream's end is not known before
            if epoch_ends:
                next(self._iterator, None)  # lets the loader end, too
                self._iterator, self._taken = None, 0
                self.epoch += 1
            last = number == self.accumulation_steps or (epoch_ends and not self.whole_steps)
            yield batch, last
            if last:
                return

    def state_dict(self) -> dict[str, Any]:
        """The position after a step. `torch.save` can write it."""
        state = {"epoch": self.epoch, "taken": self._taken, "generators": self._rng_states()}
        if self._device is not None and (of_device := self._device.rng_state()) is not None:
            state["generators"][self._device.type] = of_device
        if self._taken:
            state.update(at_start=self._at_start, before_fetch=self._before_fetch)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position with the next step."""
        self.epoch, self._resume_from = state["epoch"], state
        self._iterator, self._taken = None, 0

    def _begin_epoch(self) -> Iterator[dict[str, Any]]:
        state, self._resume_from = self._resume_from, None
        if state is not None:
            self._taken = state["taken"]
            self._set_rng_states(state["at_start"] if self._taken else state["generators"])
        self._at_start = self._rng_states()
        self.loader.dataset.begin_epoch(self.epoch, self._taken)
        iterator = iter(self.loader)
        if state is not None and self._taken:
            for _ in range(self._taken - 1):
                next(iterator)
            set_rng_states(state["before_fetch"])
            next(iterator)
            self._set_rng_states(state["generators"])
        return iterator

    def _rng_states(self) -> dict[str, Any]:
        order = self.loader.synchronized_generator  # draws the order if there are several ranks
        return {**rng_states(), "order": order.get_state() if order is not None else None}

    def _set_rng_states(self, states: dict[str, Any]) -> None:
        set_rng_states(states)
        if states["order"] is not None:
            self.loader.synchronized_generator.set_state(states["order"])
        if self._device is not None and self._device.type in states:
            self._device.set_rng_state(states[self._device.type])


def rng_states() -> dict[str, Any]:
    """The states of the host's random number generators, in a form that `torch.load(weights_only=True)` accepts."""
    kind, keys, *rest = np.random.get_state()
    numpy_state = (kind, torch.from_numpy(keys.astype(np.int64)), *rest)
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}


def set_rng_states(states: dict[str, Any]) -> None:
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
