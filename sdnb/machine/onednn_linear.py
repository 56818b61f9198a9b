"""Linear layers on a CPU, in float32, by the library that is faster at them.

torch has MKL multiply matrices and oneDNN convolve pictures, and a linear layer is a convolution with a 1×1 kernel. On
an AMD EPYC with AVX-512 (torch 2.13, two cores, float32) MKL reached 205 GFLOP/s and oneDNN 440; of tiny's linear
layers, forward and backward, most took half to two thirds of the time. On an Intel Xeon with AVX-512 MKL is
ahead: tiny's linear layers ran at 249 GFLOP/s by MKL and 208 by oneDNN, so there they are left as they are.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `as_convolution` is the faster way on a device, in a precision."""
    return device.type == "cpu" and dtype == torch.float32 and _mkl_falls_behind()


def _mkl_falls_behind() -> bool:
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        intel = "Intel" in platform.processor()
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and not intel and torch.backends.cpu.get_cpu_capability() == "AVX512"


def as_convolution(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: tokens [..., in], weight [out, in], bias [out]; gives [..., out]. Nothing is copied for it: rows of
    tokens are a picture one pixel high, its channels last."""
    pixels = tokens.reshape(1, 1, -1, tokens.shape[-1]).permute(0, 3, 1, 2)
    convolved = F.conv2d(pixels, weight[:, :, None, None], bias)
    return convolved.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], len(weight))


class ConvolvedLinear(nn.Linear):
    """A linear layer whose tokens, [batch, tokens, in], go through `as_convolution`; single vectors are too few for
    it."""

    def forward(self, tokens: Tensor) -> Tensor:
        return as_convolution(tokens, self.weight, self.bias) if tokens.dim() > 2 else super().forward(tokens)


def convolve(module: nn.Module) -> None:
    """Have the linear layers in a module compute so. Their parameters, and the names of these, stay as they are."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = ConvolvedLinear
