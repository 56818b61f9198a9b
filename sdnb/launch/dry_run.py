"""A dry run of the training step on fake tensors: which bytes are alive at which time. It loads no weights, allocates
nothing, and takes seconds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel

from sdnb.cache import computed_once
from sdnb.machine.device_kind import HOST
from sdnb.machine.environment import version_of
from sdnb.models import embedded
from sdnb.models.lora import add_adapter
from sdnb.models.pipeline import model_folder
from sdnb.settings.config import TrainConfig

# The batch size: a prime that is no factor of a layer's size, so that it divides only the bytes of the images.
_IMAGES = 101


@dataclass(frozen=True)
class Trace:
    """The bytes alive after each operation, [3, operations]: per image, independent of the batch, and of the latter
    the gradients. `frozen_parameters`: of the UNet, if an adapter is trained."""

    trained_parameters: int
    frozen_parameters: int
    encoder_parameters: int
    encoders: np.ndarray
    unet: np.ndarray

    def peak(self, encoders_batch: int, unet_batch: int, gradients_are_kept: bool) -> int:
        """Bytes in addition to all gradients. These are kept from earlier micro-batches, or appear one by one in the
        backward pass."""
        peaks = []
        for batch, (images, fixed, gradients) in ((encoders_batch, self.encoders), (unet_batch, self.unet)):
            counted_elsewhere = gradients if gradients_are_kept else 4 * self.trained_parameters
            peaks.append(int((batch * images + fixed - counted_elsewhere).max()))
        return max(peaks)


def trace_of(config: TrainConfig, norms_in_float32: bool, gradient_checkpointing: bool) -> Trace:
    """Raises ModelError if the model is missing."""
    how = config.resolution, config.mixed_precision or "no", norms_in_float32, gradient_checkpointing
    return _trace(_where(config), (*how, config.adapter_rank), config.cache_dir)


def architecture_of(config: TrainConfig) -> dict[str, Any]:
    """The configurations of UNet, VAE and text encoder. Raises ModelError if the model is missing."""
    return _architecture(_where(config))


def _where(config: TrainConfig) -> str:
    name = config.pretrained_model_name_or_path
    return name if name in embedded.ARCHITECTURES else model_folder(config)


def _architecture(where: str) -> dict[str, Any]:
    parts = ("unet", "vae", "text_encoder")
    if where in embedded.ARCHITECTURES:
        # Not from its folder: building that of SD v1-4 would take minutes. tiny has CLIP's vocabulary here, not its
        # own: 12 MiB more.
        return {part: embedded.ARCHITECTURES[where][part] for part in parts}
    return {part: json.loads((Path(where) / part / "config.json").read_text()) for part in parts}


@lru_cache
def _trace(where: str, how: tuple[int, str, bool, bool, int | None], cache_dir: str | None) -> Trace:
    architecture = _architecture(where)
    versions = [version_of("sdnb"), torch.__version__, diffusers.__version__, transformers.__version__]
    cached = computed_once("memory", [architecture, how, versions], lambda: _dry_run(architecture, *how), cache_dir)
    arrays = {name: np.array(cached.pop(name)).T for name in ("encoders", "unet")}
    return Trace(**cached, **arrays)


def _dry_run(
    architecture: dict[str, Any], resolution: int, precision: str, norms_in_float32: bool, gradient_checkpointing: bool,
    adapter_rank: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Run the step on fake tensors, which have shapes and types but no memory. No random number is drawn.

    They are CPU tensors also for an accelerator, because torch differentiates fake ones of it only if there is one.
    Attention is the same on both: the fused kernels, also those of xformers, keep no matrix of tokens × tokens.
    Autocast differs, and is corrected here.
    """
    dtype = torch.float32 if precision == "no" else torch.bfloat16  # has the size of fp16
    with torch.device("meta"):  # PEFT moves its layers, and fake ones cannot be moved
        unet = UNet2DConditionModel.from_config(architecture["unet"]).train()
        if adapter_rank:
            add_adapter(unet, adapter_rank)
    with FakeTensorMode():
        unet = _on_cpu(unet)
        vae = AutoencoderKL.from_config(architecture["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(dict(architecture["text_encoder"])))
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in unet.parameters() if not parameter.requires_grad]
        encoders = [*vae.parameters(), *text_encoder.parameters()]
        for parameter in (*frozen, *encoders):
            parameter.data = parameter.data.to(dtype)
        if norms_in_float32 and precision != "no":
            for module in unet.modules():
                if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                    module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        with _AliveBytes([*trained, *frozen, *encoders]) as alive:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(alive.count_gradient)
            with torch.no_grad():
                images = torch.empty(_IMAGES, 3, resolution, resolution)
                latents = vae.encode(images.to(dtype)).latent_dist.mean
                token_ids = torch.zeros(_IMAGES, text_encoder.config.max_position_embeddings, dtype=torch.long)
                encoder_hidden_states = text_encoder(token_ids, return_dict=False)[0]
            encoded = len(alive.bytes)
            with torch.autocast(HOST, torch.bfloat16, enabled=precision != "no"):
                timesteps = torch.zeros(_IMAGES, dtype=torch.long)
                prediction = unet(latents, timesteps, encoder_hidden_states, return_dict=False)[0]
            F.mse_loss(prediction.float(), latents.float()).backward()
    return dict(
        trained_parameters=sum(parameter.numel() for parameter in trained),
        frozen_parameters=sum(parameter.numel() for parameter in frozen),
        encoder_parameters=sum(parameter.numel() for parameter in encoders),
        encoders=alive.bytes[:encoded],
        unet=alive.bytes[encoded:],
    )


def _on_cpu(module: torch.nn.Module) -> torch.nn.Module:
    """Replaces the module's parameters by those of the same shapes on the CPU."""
    for one in module.modules():
        for name, parameter in one.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(one, name, torch.nn.Parameter(values, parameter.requires_grad))
    return module


class _AliveBytes(TorchDispatchMode):
    """Sees each operation, and records the bytes that are alive after it, as in `Trace`."""

    def __init__(self, uncounted: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes: list[tuple[int, int, int]] = []
        self._images = self._fixed = self._gradients = self._new = 0
        self._uncounted = {tensor.untyped_storage()._cdata for tensor in uncounted}
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        self.bytes.append((self._images, self._fixed, self._gradients))
        return result

    def count_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._gradients += parameter.grad.untyped_storage().nbytes()

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages or storage._cdata in self._uncounted:
            return
        self._new += 1
        if 256 * self._new > len(self._storages):
            # torch 2.1 reports no end of a storage, so all must be checked. With thousands of storages that is slow, so
            # not at each operation: a few operations late make 1 % of the peak (SD v1-4).
            self._new = 0
            for address in [one for one in self._storages if torch.UntypedStorage._expired(one)]:
                self._add(-self._storages.pop(address)[0])
        # A weak reference keeps the address from being used again.
        self._storages[storage._cdata] = storage.nbytes(), StorageWeakRef(storage)
        self._add(storage.nbytes())

    def _add(self, size: int) -> None:
        if size % _IMAGES:
            self._fixed += size
        else:
            self._images += size // _IMAGES
