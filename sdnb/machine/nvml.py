"""NVML, the library of NVIDIA's driver, for the GPUs that torch sees."""

import contextlib
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# NVML's reasons for lower clocks (nvml.h, nvmlClocksEventReasons) that are no normal operation. A power cap is: most
# data-centre GPUs reach it under load.
SLOWED_BY = {0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}


@cache
def nvml_of(device: "torch.device") -> tuple[Any, Any] | None:
    """NVML and its handle of a GPU, or of a slice of one (MIG); None if there is none. By UUID: torch numbers only the
    GPUs that CUDA_VISIBLE_DEVICES names, in its order."""
    import torch

    if torch.version.hip:
        return None
    with contextlib.suppress(Exception):  # no driver
        import pynvml

        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device)
        whole = () if "MIG" in getattr(properties, "name", "") else ("GPU-",)
        for prefix in ("MIG-", *whole) if hasattr(properties, "uuid") else ():
            with contextlib.suppress(Exception):  # the other one
                return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{prefix}{properties.uuid}")
        if not whole:  # not the whole GPU's figures for a slice
            return None
        # torch before 2.5 does not know the UUID.
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(device))
    return None
