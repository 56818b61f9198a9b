"""torch_npu's own operators, which diffusers and transformers call where torch_npu is installed."""

import torch
import torch.nn.functional as F


def npu_geglu(self: torch.Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False):
    """The one half by GELU of the other. As the real one, it is for this device only, and approximates GELU by tanh."""
    if self.device.type != "npu":
        kind = self.device.type
        raise NotImplementedError(f"Could not run 'npu::npu_geglu' with arguments from the '{kind}' backend.")
    left, right = self.chunk(2, dim)
    value, gate = (right, left) if activate_left else (left, right)
    gelu = F.gelu(gate, approximate="tanh" if approximate else "none")
    return value * gelu, gelu


def npu_fusion_attention(*_, **__):
    raise NotImplementedError("the stand-in has torch's attention only")
