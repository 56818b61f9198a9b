"""Random numbers. A kernel takes its numbers from the generator when it is launched: their order is that of launches.

A launch draws one number, a seed, and the kernel makes its numbers from that seed, so they are not the CPU's.
"""

import weakref

import torch

_ours = weakref.WeakValueDictionary()  # torch hands an operator the same generator in another Python object
_Generator = torch._C.Generator
_DEFAULT_SEED = 67280421310721  # as in torch


class _DeviceGenerator(_Generator):
    @property
    def device(self) -> torch.device:  # torch itself believes that it is on the CPU
        return torch.device("npu", self.index)

    def graphsafe_get_state(self):
        raise NotImplementedError("this device has no graphs")

    def __reduce__(self):
        raise TypeError("a generator of an npu cannot be pickled")


class _AnyGenerator(type(_Generator)):
    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, _Generator)


class Generator(_Generator, metaclass=_AnyGenerator):
    """In place of torch.Generator, which asks the C++ part of a backend for a generator."""

    def __new__(cls, device="cpu"):
        device = torch.device(device)
        if device.type != "npu":
            return _Generator(device)
        return new(torch.npu.current_device() if device.index is None else device.index)


def new(index: int) -> torch.Generator:
    generator = _DeviceGenerator.__new__(_DeviceGenerator)
    generator.index = index
    _ours[generator._cdata] = generator
    generator.manual_seed(_DEFAULT_SEED)
    return generator


def draw_seed(generator: torch.Generator, device: torch.device) -> int:
    generator = _ours.get(generator._cdata, generator)
    if generator.device != device:
        raise RuntimeError(f"Expected a '{device}' generator device but found '{generator.device}'")
    return torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator).item()


def seeded(seed: int, compute):
    """Run a computation with the default generator of the CPU at a seed."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        return compute()
    finally:
        torch.default_generator.set_state(state)
