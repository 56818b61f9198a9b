"""Collective operations, backend "hccl": gloo, on the memory that the devices share with the host.

A collective waits for the kernels before it, and the host waits for the collective. Otherwise a rank that has nothing
to wait for would keep its part in the queue, and the others would wait for it for ever.
"""

import functools

import torch
import torch.distributed as dist

from . import devices, memory

_COLLECTIVES = ("all", "barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send")
_FLAT = {"all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base"}  # names in gloo


class HcclGroup(dist.ProcessGroup):
    def __init__(self, store, rank: int, size: int, timeout) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "hccl"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("npu")]

    def run(self, name: str, *args, **kwargs):
        """One collective, by its name in gloo."""
        found = []
        arguments = [_on_host(value, found) for value in args]
        if name in _FLAT.values():  # of any shapes
            arguments = [value.view(-1) if isinstance(value, torch.Tensor) else value for value in arguments]
        on = devices.used(found[0].device if found else None)
        on.launch(lambda: getattr(self._gloo, name)(*arguments, **kwargs).wait())
        on.run()
        return done(found)


for _name in dir(dist.ProcessGroup):
    _in_gloo = _FLAT.get(_name, _name)
    if _in_gloo.strip("_").startswith(_COLLECTIVES):
        setattr(HcclGroup, _name, functools.partialmethod(HcclGroup.run, _in_gloo))


def done(tensors: list[torch.Tensor]):
    """What torch has for an operation that is complete."""
    future = torch.futures.Future()
    future.set_result(tensors)
    return torch._C._distributed_c10d._create_work_from_future(future)


def _on_host(value, found: list):
    if isinstance(value, (list, tuple)):
        return [_on_host(part, found) for part in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type != "npu":
        raise RuntimeError(f"No backend type associated with device type {value.device.type}")
    found.append(value)
    return memory.on_host(value)


def register() -> None:
    dist.Backend.register_backend("hccl", HcclGroup, devices=["npu"])
