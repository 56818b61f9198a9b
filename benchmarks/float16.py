"""Runs a program in float16 on a CPU as accelerate runs it on a GPU: with autocast, and with a scaled loss.

    python benchmarks/float16.py SCALE STEPS.jsonl PATH/OF/A/SCRIPT.py --mixed_precision=fp16 …
    python benchmarks/float16.py SCALE STEPS.jsonl -m sdnb.train --mixed_precision=fp16 …

torch has both for the CPU since version 2.3. But accelerate ignores fp16 there, and sdnb refuses it. This program sets
the two checks aside, and changes nothing else. SCALE is the loss scale before the first step. Rank 0 writes a line for
each optimizer step: its learning rate, the scale after it, and whether it was skipped.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

Patch = Callable[[Any, str, Any], object]


def scale_on_cpu(init_scale: float, note: Callable[[dict[str, Any]], object], patch: Patch = setattr) -> None:
    """Make accelerate do on a CPU what it does on a GPU. `note` gets the record of each optimizer step of rank 0.
    `patch` replaces an attribute: setattr, or pytest's `monkeypatch.setattr`."""
    begin, update = Accelerator.__init__, AcceleratedOptimizer.step

    @wraps(begin)
    def begin_scaled(self: Accelerator, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        if self.state.mixed_precision == "fp16" and self.device.type == "cpu":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale)

    @wraps(update)
    def update_noted(self: AcceleratedOptimizer, *arguments: Any) -> None:
        if self.scaler is None or not self.gradient_state.sync_gradients:
            return update(self, *arguments)
        before, learning_rate = self.scaler.get_scale(), self.param_groups[0]["lr"]
        update(self, *arguments)
        after = self.scaler.get_scale()
        if self.accelerator_state.is_main_process:
            # A scale becomes smaller only when gradients overflow.
            note({"lr": learning_rate, "scale": after, "skipped": after < before})

    patch(Accelerator, "__init__", begin_scaled)
    patch(AcceleratedOptimizer, "step", update_noted)


def accept_on_cpu(patch: Patch = setattr) -> None:
    """Make sdnb accept fp16 on a CPU."""
    from sdnb.machine.vendors import Host

    patch(Host, "fp16", True)


def main() -> None:
    scale, steps, *program = sys.argv[1:]

    def write(step: dict[str, Any]) -> None:
        with Path(steps).open("a") as file:
            file.write(json.dumps(step) + "\n")

    scale_on_cpu(float(scale), write)
    if program[0] == "-m":
        accept_on_cpu()
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
