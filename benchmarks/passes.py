"""Which settings make a training step faster on this device? Times the parts of a step alone, in each way that sdnb can
run them: the UNet's forward and backward pass, the encoders, and the update of the weights.

    python benchmarks/passes.py                                                     # tiny, on the CPU
    python benchmarks/passes.py --model sd-v1-4-random --precision fp16 --minutes 5    # on a GPU
    python benchmarks/passes.py --model sd-v1-4-random --precision fp16 --only "UNet, 32 images" whole

Each way is warmed up first; this includes compilation. Then it is timed several times, with events on a GPU. The table
gives the median, the lowest and the highest time. TFLOP/s are the model's, as FlopCounterMode counts them. The table
also gives their ratio to the TFLOP/s of matrix multiplication, measured just before and just after. On a machine whose
speed varies, this ratio is more reliable. The weights are random. The memory of a GPU is the peak allocation. It
includes the gradients, but not the optimizer and the EMA.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import common
import torch
from common import MODELS, at_least, describe, file_of, write
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sdnb.machine.device import WEIGHT_DTYPES, keep_freed_memory, measured_matmul_tflops, ran_out_of_memory
from sdnb.machine.device_kind import kind_here, kind_of
from sdnb.metrics.step_clock import StepClock
from sdnb.models import embedded
from sdnb.models.ema import EMA
from sdnb.models.flops import flop_per_image
from sdnb.models.pipeline import Parts
from sdnb.settings.config import TrainConfig
from sdnb.training.setup import configure, optimizer_class


class Way(NamedTuple):
    """A part of the step, the number of images that it processes, and the settings that it runs with."""

    part: str
    images: int
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        how = ", ".join(name if value is True else f"{name} {value}" for name, value in self.settings.items())
        images = f", {self.images} images" if self.images else ""
        return f"{self.part}{images}: {how or 'plain'}"


BLOCKS, WHOLE = {"compile_unet": "blocks"}, {"compile_unet": "whole"}
WAYS = [
    *(Way("UNet", images, {}) for images in (8, 32)),
    *(Way("VAE", images, {}) for images in (8, 32)),
    Way("text encoder", 8, {}),
    *(Way("update", 0, {"fused_optimizer": fused}) for fused in (False, True)),
    *(Way("UNet", images, BLOCKS) for images in (8, 32)),
    *(Way("UNet", images, WHOLE) for images in (32, 64, 96)),
]


def unet_pass(architecture: dict[str, Any], config: TrainConfig, way: Way, device: torch.device) -> Callable[[], Any]:
    unet = UNet2DConditionModel(**architecture["unet"]).train()
    configure(Parts(None, None, torch.nn.Module(), unet, DDPMScheduler()), config, device)
    dtype, side = WEIGHT_DTYPES[config.mixed_precision], architecture["unet"]["sample_size"]
    text = architecture["text_encoder"]
    latents = torch.randn(way.images, unet.config.in_channels, side, side, dtype=dtype)
    encoder_hidden_states = torch.randn(way.images, text["max_position_embeddings"], text["hidden_size"], dtype=dtype)
    timesteps = torch.randint(0, 1000, (way.images,))

    def run() -> None:
        unet.zero_grad()  # each step computes new gradients, and does not add to the previous ones
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = unet(latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        prediction.float().square().mean().backward()

    return run


def vae_pass(architecture: dict[str, Any], config: TrainConfig, way: Way, device: torch.device) -> Callable[[], Any]:
    vae = AutoencoderKL(**architecture["vae"]).to(WEIGHT_DTYPES[config.mixed_precision]).requires_grad_(False)
    images = torch.randn(way.images, 3, config.resolution, config.resolution, dtype=vae.dtype)
    return lambda: vae.encode(images).latent_dist.parameters


def text_pass(architecture: dict[str, Any], config: TrainConfig, way: Way, device: torch.device) -> Callable[[], Any]:
    text_encoder = CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"])).requires_grad_(False)
    text_encoder = text_encoder.to(WEIGHT_DTYPES[config.mixed_precision])
    token_ids = torch.zeros(way.images, architecture["text_encoder"]["max_position_embeddings"], dtype=torch.long)
    return lambda: text_encoder(token_ids, return_dict=False)[0]


def update(architecture: dict[str, Any], config: TrainConfig, way: Way, device: torch.device) -> Callable[[], Any]:
    """Clipping, AdamW and EMA."""
    unet = UNet2DConditionModel(**architecture["unet"])
    optimizer = optimizer_class(config, device)(unet.parameters(), lr=config.learning_rate)
    ema = EMA(unet, fused=config.fused_optimizer)
    ema.settle(device)
    for parameter in unet.parameters():
        parameter.grad = torch.randn_like(parameter)

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())

    return run


PARTS = {"UNet": unet_pass, "VAE": vae_pass, "text encoder": text_pass, "update": update}
FLOP = {"UNet": "unet_training", "VAE": "vae_encoder", "text encoder": "text_encoder"}


def measure(way: Way, architecture: dict[str, Any], config: TrainConfig, device: torch.device, rounds: int) -> dict:
    """The milliseconds of each round, the seconds of the warm-up, the TFLOP/s of matrix multiplication, and the peak
    memory on a GPU."""
    torch.compiler.reset()
    began = time.perf_counter()
    with torch.device(device):
        run = PARTS[way.part](architecture, config.updated(**way.settings), way, device)
    kind = kind_of(device.type)
    clock = StepClock(kind)

    def milliseconds(count: int) -> list[float]:
        times = []
        for _ in range(count):
            clock.restart()
            run()
            clock.end_phase("forward")
            times.append(1000 * clock.read()[1]["forward"])
        return times

    milliseconds(3)
    result: dict[str, Any] = dict(way=way.label, warmup_seconds=time.perf_counter() - began)
    matmul = [measured_matmul_tflops(device, WEIGHT_DTYPES[config.mixed_precision])]
    kind.empty_cache()
    kind.reset_peak(device)  # exclude the matrices of this measurement
    result["milliseconds"] = milliseconds(rounds)
    if not kind.is_host:
        result["peak_gib"] = kind.peak_bytes(device)[0] / 2**30
    matmul.append(measured_matmul_tflops(device, WEIGHT_DTYPES[config.mixed_precision]))
    return {**result, "matmul_tflops": matmul}


def table(results: list[dict[str, Any]]) -> str:
    head = ("", "ms", "images/s", "TFLOP/s", "share of matmul", "peak memory, GiB", "warm-up, s")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for one in results:
        middle, *ends = (pick(one["milliseconds"]) for pick in (statistics.median, min, max))
        per_second = 1000 * one["images"] / middle
        tflops = per_second * one["flop_per_image"] / 1e12
        cells = [one["way"], f"{middle:.1f} ({ends[0]:.1f} to {ends[1]:.1f})"]
        matmul = statistics.mean(one["matmul_tflops"])
        cells += [f"{per_second:.1f}", f"{tflops:.3g}", f"{tflops / matmul:.0%}"] if one["images"] else [""] * 3
        cells += [f"{one['peak_gib']:.1f}" if "peak_gib" in one else "", f"{one['warmup_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--precision", choices=list(WEIGHT_DTYPES), default="no")
    parser.add_argument("--only", nargs="+", default=[""], help="only ways whose name contains one of these")
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no measurement after this many minutes"
    )
    options = parser.parse_args()
    ways = [way for way in WAYS if any(words in way.label for words in options.only)]
    if not ways:
        parser.error(f"--only: no way has this in its name. The ways are: {'; '.join(way.label for way in WAYS)}")
    ends = time.monotonic() + 60 * options.minutes
    architecture, (side, kind, _) = embedded.ARCHITECTURES[options.model], MODELS[options.model]
    device = torch.device(kind)
    if kind != "cpu" and kind_here().is_host:
        parser.error(f"--model {options.model} needs an accelerator, but torch finds none")
    if kind == "cpu" and options.precision == "fp16":
        parser.error("--precision fp16 needs an accelerator, but this model is measured on the CPU")
    config = TrainConfig(
        pretrained_model_name_or_path="tiny", dataset_name="openmoji", resolution=side, learning_rate=1e-5,
        mixed_precision=options.precision,
    )  # fmt: skip
    with torch.device("meta"):
        parts = Parts(
            SimpleNamespace(model_max_length=architecture["text_encoder"]["max_position_embeddings"]),
            CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"])),
            AutoencoderKL(**architecture["vae"]),
            UNet2DConditionModel(**architecture["unet"]),
            None,
        )
    flop = flop_per_image(parts, side)
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    dtype = WEIGHT_DTYPES[options.precision]
    title = f"The parts of a step: {options.model} at {side}×{side}, {str(dtype)[6:]}, {device}"
    about = describe(title, flop_per_image=flop)
    results: list[dict[str, Any]] = []
    for way in ways:
        if time.monotonic() > ends:
            print(f"{way.label}: not measured, because {options.minutes:g} minutes are over")
            continue
        try:
            result = measure(way, architecture, config, device, options.rounds)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            print(f"{way.label}: {str(error).splitlines()[0]}")
            continue
        finally:
            gc.collect()
            kind_of(device.type).empty_cache()
        results.append(dict(result, images=way.images, flop_per_image=flop.get(FLOP.get(way.part), 0)))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        rates = [rate for one in results for rate in one["matmul_tflops"]]
        text = f"{table(results)}\n\nMatrix multiplication reached {min(rates):.3g} to {max(rates):.3g} TFLOP/s."
        precision = options.precision if options.precision != "no" else ""
        write(file_of(options, "passes", options.model, precision), text, about, runs=results)


if __name__ == "__main__":
    main()
