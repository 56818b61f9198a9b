"""The micro-batches of a training, epoch after epoch, and the place among them, which can be kept and taken up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from sdnb.settings.config import TrainConfig


class Batches:
    """A rank's micro-batches, in the order that accelerate's loader deals them, which is the reference's.

    The loader fetches one micro-batch ahead, and with `num_workers=0` its draws (crop, mirroring, caption) come from
    the generators that the training step draws from as well. To take up a place in an epoch, its beginning is gone
    through again: with the generators as they were when it began, which gives the order and the workers their seeds;
    with those of the last fetch for the micro-batch that was fetched but not trained on; and at last with those of the
    place.
    """

    def __init__(self, loader: DataLoader, config: TrainConfig) -> None:
        """Args:
        loader: over a `data.ImageCaptions`, prepared by accelerate.
        """
        self.loader = loader
        self.config = config
        self.epoch = 0
        self._taken = 0
        self._epochs_own: Iterator[dict[str, Any]] | None = None
        self._resume_with: dict[str, Any] | None = None

    def of_a_step(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """The micro-batches of the next optimizer step, each with whether it is the step's last. The end of an epoch
        ends the step, unless `whole_steps` is set."""
        for number in range(1, self.config.gradient_accumulation_steps + 1):
            if self._epochs_own is None:
                self._epochs_own = self._begin_epoch()
            self._before_fetch = generators()
            batch = next(self._epochs_own)
            batch["pixels"] = list(batch["pixels"])  # loaded by now, or here
            self._taken += 1
            epoch_ends = self._taken == len(self.loader)
            if epoch_ends:
                next(self._epochs_own, None)  # lets the loader end, too
                self._epochs_own, self._taken = None, 0
                self.epoch += 1
            last = number == self.config.gradient_accumulation_steps or (epoch_ends and not self.config.whole_steps)
            yield batch, last
            if last:
                return

    def place(self) -> dict[str, Any]:
        """Where the training is, after a step; what `take_up` needs. `torch.save` can write it."""
        place = {"epoch": self.epoch, "taken": self._taken, "generators": self._generators()}
        if torch.cuda.is_initialized():  # it is what this training runs on
            place["generators"]["cuda"] = torch.cuda.get_rng_state()
        if self._taken:
            place.update(at_start=self._at_start, before_fetch=self._before_fetch)
        return place

    def take_up(self, place: dict[str, Any]) -> None:
        """Go on from a place, with the next step, as if nothing had happened in between."""
        self.epoch, self._resume_with = place["epoch"], place

    def _begin_epoch(self) -> Iterator[dict[str, Any]]:
        place, self._resume_with = self._resume_with, None
        if place is not None and place["taken"]:
            return self._gone_through(place)
        if place is not None:
            self._set_generators(place["generators"])
        self._taken, self._at_start = 0, self._generators()
        self.loader.dataset.pass_over(0)
        return iter(self.loader)

    def _gone_through(self, place: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._taken, self._at_start = place["taken"], place["at_start"]
        self._set_generators(self._at_start)
        self.loader.dataset.pass_over(self._taken)
        iterator = iter(self.loader)
        for _ in range(self._taken - 1):
            next(iterator)
        set_generators(place["before_fetch"])
        next(iterator)
        self._set_generators(place["generators"])
        return iterator

    def _generators(self) -> dict[str, Any]:
        order = self.loader.synchronized_generator  # draws the order where there are several ranks
        return {**generators(), "order": order.get_state() if order is not None else None}

    def _set_generators(self, states: dict[str, Any]) -> None:
        set_generators(states)
        if states["order"] is not None:
            self.loader.synchronized_generator.set_state(states["order"])
        if "cuda" in states and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(states["cuda"])


def generators() -> dict[str, Any]:
    """The states of the generators on the host that a training draws from, as `torch.save` and a `torch.load` that
    trusts nobody can take them."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }


def set_generators(states: dict[str, Any]) -> None:
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
