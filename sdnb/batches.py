"""The micro-batches of a training, epoch after epoch, and the place among them, which can be kept and taken up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader


class Batches:
    """A rank's micro-batches, in the order that accelerate's loader deals them, which is the reference's.

    The loader fetches one micro-batch ahead, and with `num_workers=0` its draws (crop, mirroring, caption) come from
    the generators that the training step draws from as well. To take up a place in an epoch, its beginning is gone
    through again: with the generators as they were when it began, which gives the order and the workers their seeds;
    with those of the last fetch for the micro-batch that was fetched but not trained on; and at last with those of the
    place.
    """

    def __init__(self, loader: DataLoader) -> None:
        """Args:
        loader: over a `data.ImageCaptions`, prepared by accelerate.
        """
        self.loader = loader
        self.epoch = 0
        self._taken = 0
        self._resume_with: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of the current epoch, or those that remain of it; at its end the next is the current."""
        if self._resume_with is not None and self._resume_with["taken"]:
            iterator = self._gone_through()
        else:
            if self._resume_with is not None:
                self._set_generators(self._resume_with["generators"])
                self._resume_with = None
            self._taken, self._at_start = 0, self._generators()
            self.loader.dataset.pass_over(0)
            iterator = iter(self.loader)
        while True:
            self._before_fetch = generators()
            batch = next(iterator, None)
            if batch is None:
                break
            self._taken += 1
            yield batch
        self.epoch += 1

    def place(self) -> dict[str, Any]:
        """Where the training is, after a step; what `take_up` needs. `torch.save` can write it."""
        place = {"epoch": self.epoch, "taken": self._taken, "generators": self._generators()}
        if torch.cuda.is_available():
            place["generators"]["cuda"] = torch.cuda.get_rng_state()
        if self._taken == len(self.loader):
            return {**place, "epoch": self.epoch + 1, "taken": 0}
        return {**place, "at_start": self._at_start, "before_fetch": self._before_fetch}

    def take_up(self, place: dict[str, Any]) -> None:
        """Go on from a place, at the next iteration, as if nothing had happened in between."""
        self.epoch, self._resume_with = place["epoch"], place

    def _gone_through(self) -> Iterator[dict[str, Tensor]]:
        place, self._resume_with = self._resume_with, None
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
        if "cuda" in states:
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
