"""The exponential moving average of the UNet's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from sdnb.settings.config import TrainConfig


class EMA(EMAModel):
    """diffusers' EMAModel, which can wait in the host's memory between steps, and is saved without a random draw."""

    def __init__(self, unet: UNet2DConditionModel, config: TrainConfig) -> None:
        """Args:
        unet: what the average begins with.
        """
        super().__init__(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
        self._offloaded = config.offload_ema
        self._fused = config.fused_optimizer or config.foreach_ema
        self._channels_last = config.channels_last

    def settle(self, device: torch.device) -> None:
        """Go to where it is between steps: the device, or with `offload_ema` pinned memory of the host; in the order in
        memory that the weights have, which torch's foreach kernels ask for (ATen/native/ForeachUtils.h)."""
        self._device = device
        if self._channels_last:
            self.shadow_params = [
                average.to(memory_format=torch.channels_last) if average.dim() == 4 else average
                for average in self.shadow_params
            ]
        if self._offloaded and device.type == "cuda":
            self.shadow_params = [average.to("cpu").pin_memory() for average in self.shadow_params]
        else:
            self.to(device)

    def step(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        if not (self._offloaded and self._device.type == "cuda"):
            return self._average(parameters)
        kept = self.shadow_params
        self.shadow_params = [average.to(self._device, non_blocking=True) for average in kept]
        self._average(parameters)
        for average, now in zip(kept, self.shadow_params):
            average.copy_(now, non_blocking=True)
        self.shadow_params = kept

    @torch.no_grad()
    def _average(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        if not self._fused:
            return super().step(parameters)
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)

    @contextmanager
    def in_place_of(self, unet: torch.nn.Module) -> Iterator[None]:
        """The UNet with the averaged weights, for the time of a `with`."""
        self.store(unet.parameters())
        self.copy_to(unet.parameters())
        try:
            yield
        finally:
            self.restore(unet.parameters())

    def save(self, folder: Path) -> None:
        """Write it as `EMAModel.save_pretrained` does, but without drawing weights to be overwritten: whether a
        checkpoint is made must not change the training."""
        state = {name: value for name, value in self.state_dict().items() if name != "shadow_params"}
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.model_config)
        unet.register_to_config(**state)
        names = [name for name, _ in unet.named_parameters()]
        averages = [average.contiguous() for average in self.shadow_params]
        unet.load_state_dict(dict(zip(names, averages)), assign=True)
        unet.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Take up what `save`, or the reference, has written."""
        saved = UNet2DConditionModel.from_pretrained(folder)
        state = json.loads((folder / "config.json").read_text())
        self.load_state_dict({name: state[name] for name in self.state_dict() if name in state})
        self.shadow_params = [parameter.detach().clone() for parameter in saved.parameters()]
        self.settle(self._device)
