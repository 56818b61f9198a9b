"""Where the time of an optimizer step goes, measured without waiting for the device."""

import time
from typing import Any, NamedTuple

from sdnb.machine.device_kind import DeviceKind

PHASES = ("data", "encode", "forward", "backward", "optimizer", "ema", "other")


class Moment(NamedTuple):
    wall: float  # seconds
    event: Any  # the same moment on the device; None if it is the host, or has no timing events


class StepClock:
    """Times the phases of a step on the device, and the whole step on the wall clock. On an accelerator the end of a
    phase is an event. It costs the host some microseconds and the device nothing. The events are read once a step, when
    the device is idle because the step's results have been read. Without events the whole step is `other`: the host's
    clock would time how fast work is handed over."""

    def __init__(self, kind: DeviceKind) -> None:
        self._kind = kind
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
        if last := self._ends[-1][1].event:
            last.synchronize()
        phases = dict.fromkeys(PHASES, 0.0)
        for (_, start), (phase, end) in zip(self._ends, self._ends[1:]):
            phases[phase] += self._seconds(start, end)
        phases["other"] += max(0.0, seconds - sum(phases.values()))
        self._ends = [("", end_of_step)]
        return seconds, phases

    def _seconds(self, start: Moment, end: Moment) -> float:
        if self._kind.is_host:
            return end.wall - start.wall
        return start.event.elapsed_time(end.event) / 1000 if start.event and end.event else 0.0

    def _now(self) -> Moment:
        return Moment(time.perf_counter(), self._kind.event())
