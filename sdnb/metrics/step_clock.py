"""Where the time of an optimizer step goes, measured without making the device wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # who reads a run needs the phases, and not torch, which takes seconds to load
    import torch

PHASES = ("data", "encode", "forward", "backward", "optimizer", "ema", "other")


class Moment(NamedTuple):
    wall: float  # seconds
    event: Any  # the same moment on the GPU, or None


class StepClock:
    """Times the phases of a step on the device, and the step itself on the wall.

    On a GPU a lap records an event, which costs the host a few microseconds and the device nothing; the events are read
    once a step, after the step's results have been read and the device has thus come to rest.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            from torch.cuda import Event

            self._event = Event
        self.restart()

    def restart(self) -> None:
        """Begin a step now; what came since the last one (a validation, a picture drawn) belongs to none."""
        self._laps = [("", self._now())]

    def lap(self, phase: str) -> None:
        """End a phase: the time since the last lap was its."""
        self._laps.append((phase, self._now()))

    def read(self) -> tuple[float, dict[str, float]]:
        """End the step and begin the next.

        Returns:
            The step's seconds on the wall, and the seconds of each phase; `other` is what no lap claimed.
        """
        end_of_step = self._now()
        seconds = end_of_step.wall - self._laps[0][1].wall
        if self._on_gpu:
            self._laps[-1][1].event.synchronize()
        phases = dict.fromkeys(PHASES, 0.0)
        for (_, start), (phase, end) in zip(self._laps, self._laps[1:]):
            phases[phase] += start.event.elapsed_time(end.event) / 1000 if self._on_gpu else end.wall - start.wall
        phases["other"] += max(0.0, seconds - sum(phases.values()))
        self._laps = [("", end_of_step)]
        return seconds, phases

    def _now(self) -> Moment:
        wall = time.perf_counter()
        if not self._on_gpu:
            return Moment(wall, None)
        event = self._event(enable_timing=True)
        event.record()
        return Moment(wall, event)
