"""The exponential moving average (EMA) of the UNet's weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from sdnb.machine.device_kind import HOST, kind_of


class EMA(EMAModel):
    """diffusers' EMAModel. It can stay in host memory between steps, and saving it draws no random numbers."""

    def __init__(self, unet: UNet2DConditionModel, offload: bool = False, fused: bool = True) -> None:
        """The UNet's weights are the average's first value. `offload` keeps the average in pinned host memory between
        steps, if the device is an accelerator. `fused` updates all weights in one pass over memory."""
        super().__init__(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
        self._offload, self._fused = offload, fused

    def settle(self, device: torch.device) -> None:
        """Move to where the average stays between steps: the device, or with `offload` the host."""
        self._device = device
        self._offload = self._offload and not (kind := kind_of(device.type)).is_host
        if self._offload:
            self.shadow_params = [kind.pinned(average.to(HOST)) for average in self.shadow_params]
        else:
            self.to(device)

    @torch.no_grad()
    def step(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        kept = self.shadow_params
        if self._offload:
            self.shadow_params = [average.to(self._device, non_blocking=True) for average in kept]
        if self._fused:
            self.optimization_step += 1
            self.cur_decay_value = self.get_decay(self.optimization_step)
            torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)
        else:
            super().step(parameters)
        if self._offload:
            for average, now in zip(kept, self.shadow_params):
                average.copy_(now, non_blocking=True)
            self.shadow_params = kept

    @contextmanager
    def applied_to(self, unet: torch.nn.Module) -> Iterator[None]:
        """Within a `with`, the UNet has the averaged weights."""
        self.store(unet.parameters())
        self.copy_to(unet.parameters())
        try:
            yield
        finally:
            self.restore(unet.parameters())

    def save(self, folder: Path) -> None:
        """Write the average like `EMAModel.save_pretrained`, which also draws random weights and overwrites them. A
        checkpoint must not change the training, so this draws none."""
        state = {name: value for name, value in self.state_dict().items() if name != "shadow_params"}
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.model_config)
        unet.register_to_config(**state)
        averages = {
            name: average.contiguous() for (name, _), average in zip(unet.named_parameters(), self.shadow_params)
        }
        unet.load_state_dict(averages, assign=True)
        unet.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read an average that `save`, or the reference, has written."""
        saved = UNet2DConditionModel.from_pretrained(folder)
        state = json.loads((folder / "config.json").read_text())
        self.load_state_dict({name: state[name] for name in self.state_dict() if name in state})
        self.shadow_params = [parameter.detach().clone() for parameter in saved.parameters()]
        self.settle(self._device)
