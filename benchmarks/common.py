"""Shared code of the benchmarks: the models that they train, a function that runs a program and watches it from
outside, and functions that write the result files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sdnb import places
from sdnb.machine import environment
from sdnb.machine.device_kind import kind_here
from sdnb.models import embedded

# A small UNet and a heavy VAE that downsamples by 8: most of a step is encoding. Images are 128×128, latents 16×16.
embedded.ARCHITECTURES["small-unet"] = dict(
    vae={**embedded.TINY["vae"], "block_out_channels": (64, 128, 128, 128), "sample_size": 128,
         "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    text_encoder=embedded.TINY["text_encoder"],
    unet={**embedded.TINY["unet"], "block_out_channels": (32, 48, 64), "norm_num_groups": 16},
)  # fmt: skip
# The tests train this model. It has the same kinds of layers as the embedded model. Its UNet has 0.5 million parameters
# instead of 10.7 million.
embedded.ARCHITECTURES["small"] = dict(
    vae={**embedded.TINY["vae"], "block_out_channels": (8, 16, 16), "norm_num_groups": 8},
    text_encoder={**embedded.TINY["text_encoder"], "hidden_size": 32, "intermediate_size": 64, "projection_dim": 32},
    unet={**embedded.TINY["unet"], "block_out_channels": (16, 24, 32), "norm_num_groups": 8, "cross_attention_dim": 32},
)  # fmt: skip
ACCELERATOR = "cuda" if kind_here().is_host else kind_here().type  # which large models need
# For each model: the side of its images in pixels, its device, and additional flags of a run.
MODELS = {
    "tiny": (64, "cpu", ""),
    "tiny-random": (64, "cpu", ""),
    "small": (64, "cpu", ""),
    "small-unet": (128, "cpu", ""),
    "sd-v1-4-random": (512, ACCELERATOR, " --mixed_precision=fp16"),  # as params/reference.yaml
}
PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "ftfy", "pillow", "numpy")


def parser(description: str) -> argparse.ArgumentParser:
    """The command-line parser of a benchmark, with the options that say where its results go."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=a_folder, default=Path("benchmarks/results"), help="folder for the results")
    made.add_argument("--label", default="", help="suffix of the file names, such as avx2, to keep earlier results")
    return made


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number that is not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return int(text)

    return number


def a_folder(text: str) -> Path:
    """A type for argparse: a folder. Creates it if it does not exist."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def a_python(text: str) -> str:
    """A type for argparse: a Python interpreter."""
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f"{text}: no such program")
    return text


def versions(python: str) -> dict[str, str]:
    """The versions of the installed packages that affect the results, in the environment of a Python."""
    program = (
        "import importlib.metadata, json\n"
        "print(json.dumps({one.name.lower(): one.version for one in importlib.metadata.distributions()}))"
    )
    installed = json.loads(subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout)
    return {name: installed[name] for name in PACKAGES if name in installed}


def variables(device: str, cache: Path) -> dict[str, str]:
    """The environment variables of a program. It gets its own caches, and no GPUs if it must run on the CPU."""
    on_cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    folders = {"HF_HOME": "huggingface", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    caches = {"XDG_CACHE_HOME": str(cache), **{name: str(cache / folder) for name, folder in folders.items()}}
    path = os.pathsep.join([str(places.CLONE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **on_cpu, **caches, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def inspect(python: str, device: str, programs: set[tuple[str, ...]], work: Path) -> dict[str, Any]:
    """Describe the machine and the packages of a Python. Imports the programs once, so that no run pays for reading
    their files from disk.

    Raises:
        RuntimeError: if a program cannot be imported, or torch does not find the device.
    """
    capture = "import json; from sdnb.machine import environment; print(json.dumps(environment.capture()))"
    for command in [*([*program, "--help"] for program in programs), ["-c", capture]]:
        done = subprocess.run([python, *command], capture_output=True, text=True, env=variables(device, work))
        if done.returncode:
            needs = "It needs sdnb's dependencies (see pyproject.toml), and torchvision for the reference."
            raise RuntimeError(f"{python} {' '.join(command)} fails:\n{done.stderr[-2000:]}\n{needs}")
    captured = json.loads(done.stdout)
    if captured["devices"]["type"] != device:
        raise RuntimeError(f"this model is measured on {device}, but torch in {python} finds no such device")
    captured["packages"] |= versions(python)
    return captured


def follow(command: list[str], device: str, cache: Path) -> dict[str, float]:
    """Run a program to its end. Returns its wall time, its peak memory, and the GPU memory that it used.

    Raises:
        RuntimeError: if it fails. The message has the end of its output.
    """
    log, peak_kib, gpu_used_gib = cache / "printed.txt", 0, 0.0
    used_gib = _used_gib_of_gpu() if device == "cuda" else None
    with log.open("w") as printed:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=printed, env=variables(device, cache))
        try:
            while process.poll() is None:
                found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                peak_kib = int(found[1]) if found else peak_kib
                gpu_used_gib = max(gpu_used_gib, used_gib()) if used_gib else 0.0
                time.sleep(0.05)
            wall_seconds = time.perf_counter() - began
        finally:  # also if the measurement is interrupted
            process.kill()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed ({process.returncode}):\n{log.read_text()[-3000:]}")
    on_gpu = {"gpu_used_gib": gpu_used_gib} if used_gib else {}
    return {"wall_seconds": wall_seconds, "peak_gib": peak_kib / 2**20, **on_gpu}


def _used_gib_of_gpu() -> Callable[[], float] | None:
    """A function that reads how much memory of the first GPU all processes use; None if NVML cannot report it."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        by = pynvml.nvmlDeviceGetHandleByIndex if first.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        handle = by(int(first) if first.isdigit() else first)
        pynvml.nvmlDeviceGetMemoryInfo(handle)
        return lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
    return None


def describe(title: str, seen: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """What was measured, when, and in which environment (`seen`, or this Python's), with additional entries."""
    where = {name: value for name, value in (seen or environment.capture()).items() if name != "host"}
    return dict(title=title, date=time.strftime("%Y-%m-%d"), environment=where, **more)


def heading(about: dict[str, Any]) -> str:
    """The result of `describe`, as one line."""
    where = about["environment"]
    commit = where["git_commit"][:12] + " with uncommitted changes" * where["git_changed"]
    return (
        f"{about['title']}; {about['date']}, commit {commit}. {', '.join(where['devices']['names'])}, "
        f"{where['cpu_cores']} CPU cores ({where['cpu_capability']}), {where['memory_gib']} GiB; "
        f"Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version)
        + "."
    )


def file_of(options: argparse.Namespace, *names: str) -> str:
    """The path of a result's files, without extension."""
    return f"{options.out}/{'-'.join(filter(None, [*names, options.label]))}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Rows may be shorter than the head."""
    lines = [head, ["---"] * len(head), *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: str, text: str, about: dict[str, Any], **results: Any) -> None:
    """Write `path`.md with the heading and a text, and `path`.json with all numbers."""
    Path(f"{path}.md").write_text(f"{heading(about)}\n\n{text}\n")
    Path(f"{path}.json").write_text(json.dumps({**about, **results}, indent=1) + "\n")
