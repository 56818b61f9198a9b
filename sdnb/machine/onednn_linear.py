"""Linear layers on a CPU in float32, computed by oneDNN where it is faster than MKL.

torch multiplies matrices with MKL and convolves images with oneDNN. A linear layer is a convolution with a 1×1 kernel.
On an AMD EPYC with AVX-512 (torch 2.13, two cores, float32) MKL reached 205 GFLOP/s and oneDNN 440; most of tiny's
linear layers, forward and backward, took half to two thirds of the time, and tiny trained 1.23 times as many images/s.
On an Intel Xeon with AVX-512 MKL is faster (249 GFLOP/s against 208), so there the layers stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdnb.machine.device_kind import HOST
from sdnb.machine.vendors import cpu_name


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `as_convolution` is faster, on a device and in a precision."""
    return device.type == HOST and dtype == torch.float32 and _mkl_is_slower()


def _mkl_is_slower() -> bool:
    intel = "Intel" in cpu_name()
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and not intel and torch.backends.cpu.get_cpu_capability() == "AVX512"


def as_convolution(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: tokens [..., in], weight [out, in], bias [out]; returns [..., out]. Nothing is copied: the tokens are
    an image one pixel high, with channels last."""
    pixels = tokens.reshape(1, 1, -1, tokens.shape[-1]).permute(0, 3, 1, 2)
    convolved = F.conv2d(pixels, weight[:, :, None, None], bias)
    return convolved.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], len(weight))


class ConvolvedLinear(nn.Linear):
    """A linear layer that computes tokens [batch, tokens, in] with `as_convolution`. Single vectors are too few."""

    def forward(self, tokens: Tensor) -> Tensor:
        return as_convolution(tokens, self.weight, self.bias) if tokens.dim() > 2 else super().forward(tokens)


def convolve(module: nn.Module) -> None:
    """Change all linear layers in a module. Their parameters keep their values and names."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = ConvolvedLinear
