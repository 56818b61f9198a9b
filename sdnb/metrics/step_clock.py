"""Where the time of an optimizer step goes, measured without waiting for the device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # readers of a run need the phases, but not torch, which takes seconds to load
    import torch

PHASES = ("data", "encode", "forward", "backward", "optimizer", "ema", "other")


class Moment(NamedTuple):
    wall: float  # seconds
    event: Any  # the same moment on the GPU, or None


class StepClock:
    """Times the phases of a step on the device, and the whole step on the wall clock. On a GPU the end of a phase is an
    event. It costs the host some microseconds and the device nothing. The events are read once a step, when the device
    is idle because the step's results have been read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Start a step now. The time since the last step, such as a validation, counts for no step."""
        self._ends = [("", self._now())]

    def end_phase(self, phase: str) -> None:
        """The time since the end of the phase before belongs to this phase."""
        self._ends.append((phase, self._now()))

    def read(self) -> tuple[float, dict[str, float]]:
        """End the step and start the next one. Returns the step's seconds on the wall clock, and the seconds of each
        phase; `other` is the rest."""
        end_of_step = self._now()
        seconds = end_of_step.wall - self._ends[0][1].wall
        if self._on_gpu:
            self._ends[-1][1].event.synchronize()
        phases = dict.fromkeys(PHASES, 0.0)
        for (_, start), (phase, end) in zip(self._ends, self._ends[1:]):
            phases[phase] += start.event.elapsed_time(end.event) / 1000 if self._on_gpu else end.wall - start.wall
        phases["other"] += max(0.0, seconds - sum(phases.values()))
        self._ends = [("", end_of_step)]
        return seconds, phases

    def _now(self) -> Moment:
        wall, event = time.perf_counter(), None
        if self._on_gpu:
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return Moment(wall, event)
