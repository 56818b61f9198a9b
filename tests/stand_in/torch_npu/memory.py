"""Device memory: what is allocated and reserved, in bytes, and tensors that lie in it.

A device tensor is a plain torch.Tensor of device type npu. Its bytes are host memory, which a CPU tensor can share. But
torch does not know that, and leaves every operation on it to this package.
"""

import ctypes
import os
import weakref

import torch

TOTAL = int(float(os.environ.get("STAND_IN_MEMORY_GIB", 4)) * 2**30)
_ALIGNMENT = 512  # bytes, of an allocation
_SEGMENT = 2 * 2**20  # bytes; memory is reserved in segments of this size
RAW = 0xFF  # in memory that nobody has written to: NaN as a float, -1 as an integer
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Memory:
    """The figures of one device, and its limit."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = self.allocations = 0
        self.on_host = 0  # bytes that the host really holds: also those of freed tensors that kernels will still use

    def take(self, size: int) -> None:
        if self._segments(self.allocated + size) > max(TOTAL, self.reserved):
            raise RuntimeError(
                f"NPU out of memory. Tried to allocate {size / 2**20:.2f} MiB (NPU {self.index}; "
                f"{TOTAL / 2**30:.2f} GiB total capacity; {self.allocated / 2**30:.2f} GiB already allocated; "
                f"{(TOTAL - self.reserved) / 2**30:.2f} GiB free; {self.reserved / 2**30:.2f} GiB reserved in total by "
                "PyTorch)"
            )
        self.allocations += 1
        self.allocated += size
        self.reserved = max(self.reserved, self._segments(self.allocated))
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def give_back(self, size: int) -> None:
        self.allocated -= size

    def drop(self, size: int) -> None:
        self.on_host -= size

    def empty_cache(self) -> None:
        self.reserved = self._segments(self.allocated)

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    @staticmethod
    def _segments(size: int) -> int:
        return -(-size // _SEGMENT) * _SEGMENT


class _Block:
    """The memory of a storage. It is freed with the last tensor of the storage; a launched kernel may still use the
    bytes, as with a caching allocator."""

    def __init__(self, owner: Memory, size: int) -> None:
        self._owner, self._size = owner, -(-size // _ALIGNMENT) * _ALIGNMENT
        owner.take(self._size)
        self.bytes = torch.UntypedStorage(size, device="cpu").fill_(RAW)
        owner.on_host += size
        weakref.finalize(self.bytes, owner.drop, size)

    def __del__(self) -> None:
        if hasattr(self, "bytes"):
            self._owner.give_back(self._size)


def allocate(owner: Memory, size, stride, dtype: torch.dtype) -> torch.Tensor:
    """A new tensor in the memory of a device."""
    length = 0 if 0 in size else 1 + sum((extent - 1) * step for extent, step in zip(size, stride))
    block = _Block(owner, length * dtype.itemsize)
    flat = _as_device_tensor(block.bytes.data_ptr(), block.bytes.nbytes(), owner.index)
    flat.untyped_storage().block = block
    return as_strided(torch.ops.aten.view.dtype.redispatch(_CPU, flat, dtype), size, stride, 0)


def as_strided(tensor: torch.Tensor, *geometry) -> torch.Tensor:
    return view(torch.ops.aten.as_strided.default, tensor, *geometry)


def view(operator, *args, **kwargs):
    """Any view, or set_: torch's own code for CPUs moves no data, and the result is on the device of its argument."""
    return operator.redispatch(_CPU, *args, **kwargs)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor that shares the memory of a device tensor."""
    memory = tensor.untyped_storage().block.bytes
    empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return empty.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


class _DLPack(ctypes.Structure):
    """DLManagedTensor of dlpack.h, of one dimension. torch takes kDLExtDev (12) as its PrivateUse1."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_index", ctypes.c_int32),
        ("dimensions", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p), ("length", ctypes.c_int64),
    )  # fmt: skip


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _as_device_tensor(address: int, size: int, index: int) -> torch.Tensor:
    """A tensor of bytes on a device. The description is malloc's, because torch frees it when the storage goes, which
    can be after Python has ended."""
    where = _libc.malloc(ctypes.sizeof(_DLPack))
    length = where + _DLPack.length.offset
    uint8 = (1, 8, 1)
    ctypes.memmove(
        where,
        ctypes.byref(_DLPack(address, 12, index, 1, *uint8, length, None, 0, None, _FREE, size)),
        ctypes.sizeof(_DLPack),
    )
    return torch._C._from_dlpack(_capsule(where, b"dltensor", None))
