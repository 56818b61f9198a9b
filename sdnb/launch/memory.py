"""Before launching: will it fit? The peak memory of a rank, predicted from the architecture in seconds: no weights are
loaded, and nothing is allocated."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
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

from sdnb import __version__
from sdnb.cache import computed_once
from sdnb.compat import has_fused_adam
from sdnb.errors import ConfigError, SdnbError
from sdnb.machine.environment import Devices
from sdnb.models import embedded
from sdnb.models import pipeline as models
from sdnb.settings.config import TrainConfig

logger = logging.getLogger("sdnb")

# What a process takes besides tensors. On a CPU, measured: 0.50 to 0.61 GiB are resident when all is imported, the
# embedded data included (torch 2.13 and 2.1). On a GPU, an estimate: context, kernels, NCCL's buffers.
_PROCESS_GIB = {"cpu": 0.58, "cuda": 0.8}
# What a torch that is built for CUDA, as PyPI's is, has resident on a CPU besides (measured: torch 2.13, CUDA 13).
_CUDA_BUILD_GIB = 0.36
# What the allocator takes beyond the tensors. On a CPU, fitted to the runs of benchmarks/growth.py (glibc, torch 2.13):
# what the heap loses of what comes and goes, with gradient checkpointing as much as without; blocks from 32 MiB are not
# of the heap, so this is too much for large models. On a GPU, an estimate: fragments, and the workspaces of cuDNN and
# cuBLAS.
_CPU_SLACK_OF_ACTIVATIONS = 0.6
_CUDA_SLACK_OF_ALL = 0.05

# The dry run's batch: a prime that is no factor of any layer's size, so that the bytes it divides are the pictures'.
_PICTURES = 101


# Of a rank's memory, for folded micro-batches: a prediction is none that a training should fail by.
_FOR_FOLDING = 0.8


@dataclass(frozen=True)
class Prediction:
    """The peak memory of a rank. `activations_gib` is what comes and goes within a step, at its most."""

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    average_gib: float
    encoders_gib: float
    activations_gib: float
    overhead_gib: float

    @property
    def total_gib(self) -> float:
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name[:-4]} {getattr(self, part.name):.2f}" for part in fields(self))
        return f"{self.total_gib:.2f} GiB: {parts}"


def settle(config: TrainConfig, devices: Devices) -> tuple[TrainConfig, Prediction | None]:
    """A copy in which `fold_micro_batches` is set: as many as fit in most of a rank's memory, all of it, so that a
    machine folds alike every time; fewer only where that much is not free.

    Returns:
        The settings, and the predicted peak; None where a model's architecture does not allow a prediction.

    Raises:
        ConfigError: if the predicted peak is above the memory that is free.
        ModelError: if the model cannot be had.
    """
    steps = config.gradient_accumulation_steps
    asked = min(config.fold_micro_batches or 0, steps) or (steps if config.cuda_graphs else None)
    all_gib, free_gib = (per_rank(config, devices.type, gib) for gib in (devices.memory_gib, devices.free_gib))
    try:
        folded = asked or folded_that_fits(config, devices.type, min(_FOR_FOLDING * all_gib, free_gib))
        predicted = predict(config, devices.type, folded)
    except SdnbError:
        raise
    except Exception as error:  # of any kind: a model's code meets tensors that it was not written for
        logger.warning("the peak memory cannot be predicted: %s: %s", type(error).__name__, error)
        return config.updated(fold_micro_batches=asked or 1), None
    require_fit(config, devices.type, free_gib, folded)
    return config.updated(fold_micro_batches=folded), predicted


def per_rank(config: TrainConfig, device_type: str, gib: tuple[float, ...]) -> float:
    """A rank's part of the memory of the devices here: a GPU's own, the least of those that have a rank; on a CPU the
    ranks share. What the settings say it may count on goes before that."""
    if config.memory_gib is not None:
        return config.memory_gib
    return min(gib[: config.ranks_here]) if device_type != "cpu" else gib[0] / config.ranks_here


def predict(config: TrainConfig, device_type: str, folded: int = 1) -> Prediction:
    """The peak of a training without `torch.compile`, between whose steps no samples are drawn.

    Args:
        config: with precision and number of ranks resolved.
        device_type: torch's name, `cuda` or `cpu`.
        folded: micro-batches that the UNet runs as one larger batch.

    Raises:
        ModelError: if the model cannot be had.
    """
    on_gpu, several = device_type == "cuda", config.num_processes > 1
    trace = _trace_of(config, on_gpu, config.gradient_checkpointing)
    weights = 4 * trace.unet_parameters
    # DDP's buckets hold the gradients for good, as views. As long as ranks accumulate each for itself, gradients are
    # tensors of their own besides the buckets: `zero_grad` has taken the views away.
    accumulates = folded < config.gradient_accumulation_steps
    gradients = 2 * weights if several and accumulates else weights
    offloaded = on_gpu and config.use_ema and config.offload_ema
    # After the backward pass: a foreach AdamW makes a temporary copy of the weights' size, and an average that is
    # offloaded comes back, in the place of the gradients unless these are in buckets. The further forward pass of DREAM
    # keeps nothing, and stays below the one that is trained.
    in_one_pass = config.use_8bit_adam or (config.fused_optimizer and has_fused_adam(device_type))
    copies = on_gpu and (not in_one_pass or (offloaded and several))
    batches = config.train_batch_size, config.train_batch_size * folded, accumulates or several
    activations = max(trace.peak(*batches), weights if copies else 0)
    tensors = dict(
        weights_gib=weights / 2**30,
        gradients_gib=gradients / 2**30,
        optimizer_gib=(2 if config.use_8bit_adam else 8) * trace.unet_parameters / 2**30,
        average_gib=weights / 2**30 if config.use_ema and not offloaded else 0.0,
        encoders_gib=(4 if config.mixed_precision == "no" else 2) * trace.encoder_parameters / 2**30,
        activations_gib=activations / 2**30,
    )
    if on_gpu:
        slack_gib = _CUDA_SLACK_OF_ALL * sum(tensors.values())
    else:
        whole = _trace_of(config, on_gpu, gradient_checkpointing=False)
        slack_gib = _CPU_SLACK_OF_ACTIVATIONS * whole.peak(*batches) / 2**30
        slack_gib += _CUDA_BUILD_GIB if torch.version.cuda else 0.0
    return Prediction(**tensors, overhead_gib=_PROCESS_GIB[device_type] + slack_gib)


def folded_that_fits(config: TrainConfig, device_type: str, memory_gib: float) -> int:
    """The most micro-batches of a step that fit as one batch: a divisor of `gradient_accumulation_steps`; 1 if none."""
    steps = config.gradient_accumulation_steps
    divisors = (count for count in range(steps, 1, -1) if steps % count == 0)
    return next((count for count in divisors if predict(config, device_type, count).total_gib <= memory_gib), 1)


def require_fit(config: TrainConfig, device_type: str, free_gib: float, folded: int = 1) -> None:
    """Raises:
    ConfigError: if the predicted peak is above `free_gib`; names the settings that would lower it, and by how much.
    """

    def total_gib(changes: dict[str, Any]) -> float:
        return predict(config.updated(**changes), device_type, changes.get("fold_micro_batches", folded)).total_gib

    def verdict(changes: dict[str, Any]) -> str:
        return f"{total_gib(changes):.1f} GiB{', enough' if total_gib(changes) <= free_gib else ''}"

    if total_gib({}) <= free_gib:
        return
    said, together = [], {}
    for candidates in _remedies(config, device_type, folded):
        changes = next((one for one in candidates if total_gib(one) <= free_gib), candidates[-1])
        if total_gib(changes) < total_gib({}) - 0.05:
            said.append(f"{' with '.join(f'{name} = {value}' for name, value in changes.items())}: {verdict(changes)}")
            together |= changes
    if len(said) > 1:
        said.append(f"all of these: {verdict(together)}")
    raise ConfigError(
        f"predicted peak {total_gib({}):.1f} GiB per rank, and {free_gib:.1f} GiB are "
        f"{'free' if config.memory_gib is None else 'what memory_gib allows'}. "
        f"What would help: {'; '.join(said) or 'a smaller model, or a smaller resolution'}. "
        f"The prediction is {predict(config, device_type, folded)}. If you know better, set memory_gib"
    )


def _remedies(config: TrainConfig, device_type: str, folded: int) -> Iterator[list[dict[str, Any]]]:
    """Changes that leave an optimizer step as many pictures as it has; where a setting has several values, the one that
    changes least comes first."""
    no_graphs = {"cuda_graphs": False} if config.cuda_graphs else {}  # a step as one batch, a block once in it
    if folded > 1:
        yield [{"fold_micro_batches": count, **no_graphs} for count in range(folded - 1, 0, -1) if folded % count == 0]
    if not config.gradient_checkpointing:
        yield [{"gradient_checkpointing": True, **(no_graphs if config.compile_unet == "blocks" else {})}]
    batch, steps = config.train_batch_size, config.gradient_accumulation_steps
    if batch > 1:
        yield [
            {"train_batch_size": smaller, "gradient_accumulation_steps": steps * batch // smaller, **no_graphs}
            for smaller in range(batch - 1, 0, -1)
            if batch % smaller == 0
        ]
    if config.mixed_precision == "no":
        yield [{"mixed_precision": "fp16" if device_type == "cuda" else "bf16"}]
    if device_type == "cuda":
        yield from ([{name: True}] for name in ("fused_optimizer", "use_8bit_adam", "offload_ema"))


@dataclass(frozen=True)
class _Trace:
    """What a dry run saw: the bytes alive after each operation, [3, operations]: what each picture takes, what a batch
    of any size takes, and of the latter the gradients."""

    unet_parameters: int
    encoder_parameters: int
    encoders: np.ndarray
    unet: np.ndarray

    def peak(self, encoders_batch: int, unet_batch: int, gradients_are_kept: bool) -> int:
        """Bytes beyond all gradients. These are kept from earlier micro-batches, or come as the backward pass goes."""
        peaks = []
        for batch, (pictures, fixed, gradients) in ((encoders_batch, self.encoders), (unet_batch, self.unet)):
            besides = gradients if gradients_are_kept else 4 * self.unet_parameters
            peaks.append(int((batch * pictures + fixed - besides).max()))
        return max(peaks)


def _trace_of(config: TrainConfig, on_gpu: bool, gradient_checkpointing: bool) -> _Trace:
    name = config.pretrained_model_name_or_path
    where = name if name in embedded.ARCHITECTURES else models.source(config)
    how = config.resolution, config.mixed_precision, on_gpu, gradient_checkpointing
    return _trace(where, how, config.cache_dir)


@lru_cache
def _trace(where: str, how: tuple[int, str, bool, bool], cache_dir: str | None) -> _Trace:
    versions = [__version__, torch.__version__, diffusers.__version__, transformers.__version__]
    key = [_configurations(where), how, versions]
    kept = computed_once("memory", key, lambda: _dry_run(where, *how), cache_dir)
    arrays = {name: np.array(kept.pop(name)).T for name in ("encoders", "unet")}
    return _Trace(**kept, **arrays)


def _configurations(where: str) -> Any:
    if where in embedded.ARCHITECTURES:
        return embedded.ARCHITECTURES[where]
    return [(Path(where) / part / "config.json").read_text() for part in ("unet", "vae", "text_encoder")]


def _dry_run(where: str, resolution: int, precision: str, on_gpu: bool, gradient_checkpointing: bool) -> dict[str, Any]:
    """Run the training step on fake tensors, which have shapes and types but no memory. Nothing random is drawn.

    They are a CPU's even for a GPU, whose fake tensors torch differentiates only where there is one. Attention is alike
    on both: the fused kernels (xformers' too) keep no matrix of tokens × tokens. Autocast is not, and is put right.
    """
    dtype = torch.float32 if precision == "no" else torch.bfloat16  # as large as fp16
    with FakeTensorMode():
        unet, vae, text_encoder = _build(where)
        unet.train()
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        frozen = [*vae.parameters(), *text_encoder.parameters()]
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        if on_gpu and precision != "no":
            for module in unet.modules():
                if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                    # a GPU's autocast runs these in float32, a CPU's does not
                    module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        with _AliveBytes([*unet.parameters(), *frozen]) as alive:
            for parameter in unet.parameters():
                parameter.register_post_accumulate_grad_hook(alive.count_gradient)
            with torch.no_grad():
                pictures = torch.empty(_PICTURES, 3, resolution, resolution)
                latents = vae.encode(pictures.to(dtype)).latent_dist.mean
                token_ids = torch.zeros(_PICTURES, text_encoder.config.max_position_embeddings, dtype=torch.long)
                encoder_hidden_states = text_encoder(token_ids, return_dict=False)[0]
            encoded = len(alive.bytes)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
                timesteps = torch.zeros(_PICTURES, dtype=torch.long)
                prediction = unet(latents, timesteps, encoder_hidden_states, return_dict=False)[0]
            F.mse_loss(prediction.float(), latents.float()).backward()
    return dict(
        unet_parameters=sum(parameter.numel() for parameter in unet.parameters()),
        encoder_parameters=sum(parameter.numel() for parameter in frozen),
        encoders=alive.bytes[:encoded],
        unet=alive.bytes[encoded:],
    )


def _build(where: str) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    if where in embedded.ARCHITECTURES:
        # Not from its folder: for SD v1-4 that would have to be built, in minutes. tiny has CLIP's vocabulary here and
        # not its own, 12 MiB more.
        unet, vae, text_encoder = (embedded.ARCHITECTURES[where][part] for part in ("unet", "vae", "text_encoder"))
        return UNet2DConditionModel(**unet), AutoencoderKL(**vae), CLIPTextModel(CLIPTextConfig(**text_encoder))
    unet, vae = (
        cls.from_config(cls.load_config(where, subfolder=part))
        for cls, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    return unet, vae, CLIPTextModel(CLIPTextConfig.from_pretrained(where, subfolder="text_encoder"))


class _AliveBytes(TorchDispatchMode):
    """Sees each operation, and keeps the bytes that are alive after it, as `_Trace` has them."""

    def __init__(self, uncounted: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes: list[tuple[int, int, int]] = []
        self._pictures = self._fixed = self._gradients = self._new = 0
        self._uncounted = {tensor.untyped_storage()._cdata for tensor in uncounted}
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        self.bytes.append((self._pictures, self._fixed, self._gradients))
        return result

    def count_gradient(self, parameter: Tensor) -> None:
        self._gradients += parameter.grad.untyped_storage().nbytes()

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages or storage._cdata in self._uncounted:
            return
        self._new += 1
        if 256 * self._new > len(self._storages):
            # torch 2.1 calls nobody when a storage dies. To look at all takes time, so not at each operation where they
            # are thousands: what is found dead a few operations late is 1 % of the peak (SD v1-4).
            self._new = 0
            for address in [one for one in self._storages if torch.UntypedStorage._expired(one)]:
                self._add(-self._storages.pop(address)[0])
        # A weak reference keeps the address from being given away again.
        self._storages[storage._cdata] = storage.nbytes(), StorageWeakRef(storage)
        self._add(storage.nbytes())

    def _add(self, size: int) -> None:
        if size % _PICTURES:
            self._fixed += size
        else:
            self._pictures += size // _PICTURES
