"""How long a run will take, told before it begins."""

from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPTextConfig

from sdnb.cache import computed_once
from sdnb.figures.live import clock
from sdnb.launch.dry_run import architecture_of
from sdnb.machine.device import WEIGHT_DTYPES, measured_matmul_tflops
from sdnb.machine.device_kind import HOST
from sdnb.machine.environment import PROCESSOR
from sdnb.machine.peaks import peak_of
from sdnb.metrics.throughput import flop_of
from sdnb.models.flops import flop_per_image
from sdnb.places import runs_folder
from sdnb.run.folder import SUMMARY, RunFolder, problems_of
from sdnb.settings.config import TrainConfig

# Runs that differ in one of these take another time per step.
_KIND = (
    "pretrained_model_name_or_path", "resolution", "mixed_precision", "num_processes", "train_batch_size",
    "gradient_accumulation_steps", "fold_micro_batches", "gradient_checkpointing", "compile_unet", "use_ema", "lora",
)  # fmt: skip
_MOST_RUNS = 20  # of the latest, that are looked at
_START_SECONDS = 20  # until the first step, and from the last one to the end
# The embedded model reached 0.67 to 0.78 of a plain matrix product's rate on two cores. A published run of June 2024
# trained 13.74 images/s per A100, of 3.54 TFLOP each; the peak is 312 TFLOP/s.
_OF_MATMUL, _OF_PEAK = 0.5, 0.16


def expected(config: TrainConfig, environment: dict[str, Any], steps: int) -> str:
    """In words: as the latest run of its kind in `runs_folder`, else a rough estimate from the floating-point
    operations of the model. Empty if neither is known."""
    seconds: float | None = None
    summaries = runs_folder().glob(f"*/{SUMMARY}")
    for path in sorted(summaries, key=lambda one: one.stat().st_mtime, reverse=True)[:_MOST_RUNS]:
        seconds, _ = problems_of(partial(_as, RunFolder(path.parent), config, environment, steps))
        if seconds:
            return f"about {clock(seconds)}, as {path.parent.name} did"
    with suppress(Exception):  # a model that cannot run fails in the training, with all that is known then
        seconds = _roughly(config, environment, steps)
    if seconds:
        return f"about {clock(seconds)}, roughly: by the operations of the model and the speed of the device"
    return ""


def _as(run: RunFolder, config: TrainConfig, environment: dict[str, Any], steps: int) -> float | None:
    """Seconds, if the run is of the same kind, and was made on such a machine."""
    machine = [[one.get(name) for name in (PROCESSOR, "cpu_cores")] + [one["devices"]["names"]]
               for one in (run.environment, environment)]  # fmt: skip
    if machine[0] != machine[1] or any(getattr(run.config, name) != getattr(config, name) for name in _KIND):
        return None
    recorded = run.steps
    return run.summary["total_seconds"] - recorded.seconds.sum() + recorded.seconds.mean() * steps


def _roughly(config: TrainConfig, environment: dict[str, Any], steps: int) -> float | None:
    architecture = architecture_of(config)
    parts: Any = SimpleNamespace(
        unet=SimpleNamespace(config=architecture["unet"]), vae=SimpleNamespace(config=architecture["vae"]),
        text_encoder=SimpleNamespace(config=CLIPTextConfig.from_dict(dict(architecture["text_encoder"]))),
    )  # fmt: skip
    parts.tokenizer = SimpleNamespace(model_max_length=parts.text_encoder.config.max_position_embeddings)
    per_image = computed_once(
        "flop", [architecture, config.resolution, config.adapter_rank, torch.__version__],
        lambda: flop_per_image(parts, config.resolution, config.adapter_rank), config.cache_dir,
    )  # fmt: skip
    devices = environment["devices"]
    if devices["type"] == HOST:  # its ranks share the cores
        dtype = WEIGHT_DTYPES[config.mixed_precision or "no"]
        tflops = _OF_MATMUL * measured_matmul_tflops(torch.device(HOST), dtype)
    else:  # not measured: that would keep memory of a GPU
        tflops = _OF_PEAK * (peak_of(config, devices["names"][0]) or 0.0) * config.ranks
    images = config.global_batch * steps
    flop = sum(flop_of(per_image, images, images, images).values())
    return _START_SECONDS + flop / tflops / 1e12 if tflops else None
