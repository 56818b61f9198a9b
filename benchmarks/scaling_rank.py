"""One rank of scaling.py's measurement, as `accelerate launch` starts it. It trains with sdnb's own step. A repetition
times three things, one after the other:

- a step in which the ranks reduce their gradients, as in any training;
- a step in which they do not: DDP's `no_sync` lasts until the end of the step;
- the reduction alone: all-reduces of buffers as large as DDP's buckets, issued all at once, as DDP does. It also
  reduces parts of the buffers, which shows the latency.

Each time is that of the slowest rank. Both kinds of step end with the small all-reduce of sdnb's own records, so that
also a step without the reduction ends when the slowest rank has ended it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from sdnb.data.loading import load_data
from sdnb.machine.device import keep_freed_memory
from sdnb.machine.device_kind import kind_of
from sdnb.settings.config import TrainConfig
from sdnb.training.loop import train_step
from sdnb.training.setup import Training, build, start

MICRO_BATCH = ("data", "encode", "forward", "backward")  # the phases of a step that each micro-batch has
PARTS = (0, 0.125, 1)  # of each bucket that the reduction alone reduces; 0: a single value
WARM_UP = 3


def bucket_sizes(training: Training) -> list[int]:
    """The bytes of each bucket of gradients that DDP reduces. DDP settles the buckets in its first backward passes."""
    logged = training.unet._get_ddp_logging_data()  # the sizes have no public name
    return [int(size) for size in logged["rebuilt_bucket_sizes"].split(",")]


def step(training: Training, reduced: bool) -> dict[str, Any]:
    """The record of a step, with the gradients reduced or not."""
    training.accelerator.wait_for_everyone()
    training.clock.restart()
    training.stats.restart()
    with nullcontext() if reduced else training.accelerator.no_sync(training.unet):
        return train_step(training)


def seconds_of_reduction(buffers: list[torch.Tensor]) -> float:
    """Seconds to all-reduce the buffers while nothing else runs."""

    def synchronize() -> None:
        kind_of(buffers[0].device.type).synchronize(buffers[0].device)

    distributed.barrier()
    synchronize()
    began = time.perf_counter()
    for work in [distributed.all_reduce(buffer, async_op=True) for buffer in buffers]:
        work.wait()
    synchronize()
    return time.perf_counter() - began


def of_ranks(accelerator: Accelerator, seconds: float) -> torch.Tensor:
    """The seconds of each rank."""
    return accelerator.gather(torch.tensor([seconds], dtype=torch.float64, device=accelerator.device))


def measure(training: Training, repetitions: int) -> dict[str, Any]:
    """The seconds of each repetition: see `Launch` in scaling_model.py. The order of the steps alternates."""
    accelerator, ranks = training.accelerator, training.config.ranks
    for number in range(WARM_UP):
        step(training, reduced=number % 2 == 0)
    sizes = bucket_sizes(training) if ranks > 1 else []
    buffers = [torch.zeros(size // 4, device=accelerator.device) for size in sizes]  # gradients are in float32
    names = ("reduced", "unreduced", "own", "micro_batch", "backward")
    found: dict[str, Any] = {"ranks": ranks, "bucket_bytes": sizes, **{name: [] for name in names}}
    found["reductions"] = {str(part): [] for part in PARTS}
    for repetition in range(repetitions):
        for reduced in (False, True) if repetition % 2 else (True, False):
            if reduced and ranks == 1:
                continue
            record = step(training, reduced)
            found["reduced" if reduced else "unreduced"].append(of_ranks(accelerator, record["seconds"]).max().item())
            if not reduced:
                for name, seconds in parts_of(record).items():
                    found[name].append(of_ranks(accelerator, seconds).tolist())
        for part in PARTS if ranks > 1 else ():
            parts = [buffer[: max(1, int(part * len(buffer)))] for buffer in buffers]
            found["reductions"][str(part)].append(of_ranks(accelerator, seconds_of_reduction(parts)).max().item())
    return found


def parts_of(record: dict[str, Any]) -> dict[str, float]:
    """The seconds of a rank's own work in a step, of a micro-batch, and of its backward pass."""
    phases, count = record["phase_seconds"], record["micro_batches"]
    of_micro_batches = sum(phases[name] for name in MICRO_BATCH)
    return {
        "own": of_micro_batches + phases["optimizer"] + phases["ema"],
        "micro_batch": of_micro_batches / count,
        "backward": phases["backward"] / count,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = TrainConfig(**job["config"])
    if job["pin"]:  # to one core, with all threads that it starts from now on
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", 0)) % len(cores)]})
    accelerator = start(config)
    training = build(config, accelerator, load_data(config))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    found = measure(training, job["repetitions"])
    if accelerator.is_main_process:
        Path(job["result"]).write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    os._exit(0)  # at once: interpreter shutdown would destroy the process group, and may wait for a thread of gloo


if __name__ == "__main__":
    main()
