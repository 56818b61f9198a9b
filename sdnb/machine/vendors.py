"""What differs from `DeviceKind`, for each kind of device."""

import contextlib
import os
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdnb.compat import torch_since
from sdnb.machine.device_kind import DeviceKind
from sdnb.machine.nvml import SLOWED_BY, nvml_of

if TYPE_CHECKING:
    import torch


class Host(DeviceKind):
    """The processor."""

    noun = "CPU rank"
    is_host = True
    norms_in_float32 = False
    images_at_once = 4  # eight were 0 to 5 % faster, and took 0.1 GiB more
    memory_was_measured = True
    pins_memory = False
    fp16 = False
    default_precision = "no"

    @property
    def process_gib(self) -> float:
        """Measured: 0.50 to 0.61 GiB are resident after all imports, with the embedded data (torch 2.13 and 2.1). A
        torch that is built for CUDA, such as PyPI's, adds 0.36 (torch 2.13, CUDA 13)."""
        import torch

        return 0.58 + (0.36 if torch.version.cuda else 0.0)

    def is_available(self) -> bool:
        return True

    def count(self) -> int:
        return 1

    def names(self) -> tuple[str, ...]:
        return (cpu_name(),)

    def memory_gib(self) -> tuple[float, ...]:
        import psutil

        return (round(psutil.virtual_memory().total / 2**30, 1),)

    def free_gib(self) -> tuple[float, ...]:
        import psutil

        return (round(psutil.virtual_memory().available / 2**30, 1),)

    @property
    def bf16(self) -> bool:
        """torch computes in bfloat16 with oneDNN if the CPU has the instructions, such as AVX-512, else with slow
        loops."""
        import torch

        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def missing(self, device: "torch.device") -> list[str]:
        return []

    def environment_of_ranks(self, one_machine: bool) -> dict[str, str]:
        # Without the first, accelerate's launcher takes CPU ranks for GPU ranks, and each of them trains alone.
        return {"ACCELERATE_USE_CPU": "true", **({"GLOO_SOCKET_IFNAME": "lo"} if one_machine else {})}

    def synchronize(self, device: "torch.device") -> None:
        """The host has done its work when a call returns."""

    def event(self) -> None:
        return None

    def empty_cache(self) -> None:
        """See `release_freed_memory`."""

    def reset_peak(self, device: "torch.device") -> None:
        """The system keeps the peak of a process's whole life."""

    def peak_bytes(self, device: "torch.device") -> tuple[int, int]:
        """Both are the resident memory of this process."""
        # ru_maxrss would not do: it starts with the value of the parent process.
        resident = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        return resident, resident

    def rng_state(self) -> None:
        """The host's generators are saved in any case."""

    def use_tf32(self) -> None:
        """The setting has no effect, as in the reference."""

    @property
    def has_fused_adam(self) -> bool:
        return torch_since(2, 4)

    def state(self, device: "torch.device") -> dict[str, float]:
        return {}


class CUDA(DeviceKind):
    """GPUs of NVIDIA, and those of AMD, which torch shows under the same name."""

    noun = "GPU"

    def free_gib(self) -> tuple[float, ...]:
        """As the driver tells it: torch would take memory on each GPU to find out. If the driver does not, a GPU's
        whole memory; never more than that, as torch may have a slice of a GPU."""
        import torch

        free = []
        for index, all_gib in enumerate(self.memory_gib()):
            free.append(all_gib)
            if nvml := nvml_of(torch.device(self.type, index)):
                with contextlib.suppress(Exception):  # NVML raises many types
                    library, handle = nvml
                    free[-1] = min(all_gib, round(library.nvmlDeviceGetMemoryInfo(handle).free / 2**30, 1))
        return tuple(free)

    @property
    def bf16(self) -> bool:
        """NVIDIA since Ampere; torch's own answer counts emulation."""
        import torch

        return bool(torch.version.hip) or torch.cuda.get_device_properties(0).major >= 8

    def compute_float32_exactly(self) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    @property
    def has_fused_adam(self) -> bool:
        return torch_since(2, 5)

    def software(self) -> dict[str, str]:
        import torch

        versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
        if nvml := nvml_of(torch.device(self.type, 0)):
            with contextlib.suppress(Exception):
                versions = {"driver": _text(nvml[0].nvmlSystemGetDriverVersion()), **versions}
        return {name: version for name, version in versions.items() if version}

    def environment_of_ranks(self, one_machine: bool) -> dict[str, str]:
        # Before it forks, torch's launcher asks whether there are GPUs. It must not ask the driver, or no rank can use
        # one. accelerate sets this itself since 1.14.
        return {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

    def state(self, device: "torch.device") -> dict[str, float]:
        import torch

        read = super().state(device)
        if "power_w" in read and not torch.version.hip:
            read["power_w"] /= 1000  # NVML has mW, AMD's library W
        return read

    def slowed_by(self, device: "torch.device") -> list[str]:
        if nvml := nvml_of(device):
            with contextlib.suppress(Exception):
                reasons = nvml[0].nvmlDeviceGetCurrentClocksThrottleReasons(nvml[1])
                return sorted({why for bit, why in SLOWED_BY.items() if reasons & bit})
        return []

    def other_processes(self, device: "torch.device") -> int:
        if nvml := nvml_of(device):
            with contextlib.suppress(Exception):
                running = nvml[0].nvmlDeviceGetComputeRunningProcesses(nvml[1])
                return len({one.pid for one in running} - {os.getpid()})
        return 0

    def energy_counter(self, device: "torch.device") -> Callable[[], float] | None:
        """NVML has one since Volta."""
        if nvml := nvml_of(device):
            read = partial(nvml[0].nvmlDeviceGetTotalEnergyConsumption, nvml[1])
            with contextlib.suppress(Exception):  # no counter
                read()
                return lambda: read() / 1000
        return None


class Ascend(DeviceKind):
    """Huawei's NPUs, by torch_npu."""

    noun = "NPU"
    extension = "torch_npu"
    asked_apart = True

    def compute_float32_exactly(self) -> None:
        """Huawei calls it HF32."""
        for part in ("matmul", "conv"):
            with contextlib.suppress(AttributeError):
                getattr(self.module, part).allow_hf32 = False

    def software(self) -> dict[str, str]:
        """CANN's version, by the file of its installation."""
        home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME") or ""
        for path in Path(home).glob("*/ascend_toolkit_install.info") if home else ():
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if said := re.search(r"^version=(.+)$", path.read_text(), re.MULTILINE):
                    return {"CANN": said[1]}
        return {}


def geglu_by_device() -> None:
    """Let diffusers compute GEGLU on an NPU with torch_npu's kernel, and elsewhere with torch. Where torch_npu is
    installed, diffusers calls that kernel for tensors on the host, too, which fails."""
    from diffusers.models import activations

    if not getattr(activations, "is_torch_npu_available", bool)():
        return
    on_npu = activations.GEGLU.forward

    def forward(self: Any, hidden_states: "torch.Tensor", *more: Any, **named: Any) -> "torch.Tensor":
        if hidden_states.device.type == "npu":
            return on_npu(self, hidden_states, *more, **named)
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return hidden_states * self.gelu(gate)

    activations.GEGLU.forward = forward


class Cambricon(DeviceKind):
    """Cambricon's MLUs, by torch_mlu."""

    noun = "MLU"
    extension = "torch_mlu"
    asked_apart = True


class MooreThreads(DeviceKind):
    """Moore Threads' GPUs, by torch_musa."""

    noun = "GPU"
    extension = "torch_musa"
    asked_apart = True


class Gaudi(DeviceKind):
    """Intel's Gaudi, by habana_frameworks. One process at a time can use a device."""

    noun = "HPU"
    extension = "habana_frameworks.torch.core"
    asked_apart = True
    norms_in_float32 = False
    default_precision = half_precision = "bf16"

    def environment_of_ranks(self, one_machine: bool) -> dict[str, str]:
        return {"PT_HPU_LAZY_MODE": "0"}  # else work would wait for marks of its own between the steps


class XPU(DeviceKind):
    """Intel's GPUs."""

    noun = "GPU"
    asked_apart = True

    def software(self) -> dict[str, str]:
        with contextlib.suppress(Exception):
            return {"driver": self.module.get_device_properties(0).driver_version}
        return {}


class Apple(DeviceKind):
    """Apple's GPUs, which share the host's memory."""

    noun = "GPU"
    pins_memory = False
    most_ranks_per_machine = 1  # it has no way to reduce over ranks

    @property
    def fp16(self) -> bool:
        return torch_since(2, 8)  # accelerate asks for it

    def names(self) -> tuple[str, ...]:
        return (output_of("sysctl", "-n", "machdep.cpu.brand_string") or "Apple GPU",)

    def memory_gib(self) -> tuple[float, ...]:
        """What Metal recommends as the most."""
        return (round(self.module.recommended_max_memory() / 2**30, 1),)

    def free_gib(self) -> tuple[float, ...]:
        return (round((self.module.recommended_max_memory() - self.module.driver_allocated_memory()) / 2**30, 1),)

    @property
    def bf16(self) -> bool:
        return torch_since(2, 6)  # accelerate asks for it

    def synchronize(self, device: "torch.device") -> None:
        self.module.synchronize()

    def peak_bytes(self, device: "torch.device") -> tuple[int, int]:
        """What is allocated now: Metal keeps no peak."""
        return self.module.current_allocated_memory(), self.module.driver_allocated_memory()

    def missing(self, device: "torch.device") -> list[str]:
        others = [what for what in super().missing(device) if what != "memory"]
        return ["peak memory (what is allocated after a step is recorded)", *others]


KINDS: dict[str, type[DeviceKind]] = {
    "cpu": Host, "cuda": CUDA, "npu": Ascend, "mlu": Cambricon, "musa": MooreThreads, "hpu": Gaudi, "xpu": XPU,
    "mps": Apple,
}  # fmt: skip


def cpu_name() -> str:
    """The processor's model; its architecture if the system does not tell."""
    import platform

    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _text(said: str | bytes) -> str:
    return said.decode() if isinstance(said, bytes) else said


def output_of(*command: str) -> str:
    """The output of a command; empty if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
