"""A cache of arrays of one shape in a file, which all processes of a machine read and write at once."""

import hashlib
import math
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdnb.errors import CacheError

SUFFIX = ".table"
_HEADER_BYTES = 64  # a hash of everything that the rows depend on, and zeros
_CHECKSUM_BYTES = 8


class EncodingCache:
    """Rows that are absent or complete. An array is written before its checksum. A row that does not match its checksum
    when it is first read, such as after a loss of power, counts as absent. The file is not mapped into memory: it stays
    in the system's page cache while there is room, takes no memory of the process, and may be cut short at any time.
    """

    def __init__(
        self, folder: Path, kind: str, key: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype, limit: float
    ) -> None:
        """Open the cache, or make it with every row absent. It has room for `rows` rows of `shape` and `dtype`. The
        file's name begins with `kind`. `key` is everything that the rows depend on; another key is another file. All
        caches in the folder may have `limit` bytes together. To make room, the least recently used ones are removed. A
        process that has one of them open keeps it until the process ends. Raises CacheError if the cache is larger than
        the limit, or the file cannot be made, such as on a full disk."""
        self._arguments = (folder, kind, key, rows, shape, dtype, limit)
        self.shape, self.dtype = shape, dtype
        header = hashlib.sha256(repr((key, rows, shape, dtype)).encode()).digest().ljust(_HEADER_BYTES, b"\0")
        self.path = folder / f"{kind}-{header[:10].hex()}{SUFFIX}"
        size = size_of(rows, shape, dtype)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not _is_complete(self.path, header, size):
                _make_room(folder, size, limit)
                _make(self.path, header, size)
            os.utime(self.path)
            self._file = self.path.open("r+b", buffering=0)
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be made with {size / 2**30:.2f} GiB: {error}") from None
        self._row_bytes, self._arrays_begin = math.prod(shape) * dtype.itemsize, _checksum_offset(rows)
        self._checked = np.zeros(rows, bool)

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodingCache, self._arguments  # a worker process that is not forked opens the file again

    def __contains__(self, row: int) -> bool:
        """Whether the row was written. Reading it may still show that it is damaged."""
        return bool(self._stored_checksum(row))

    def read(self, row: int) -> Tensor | None:
        """The row, in host memory; None if it is absent."""
        array = np.empty(self._row_bytes, np.uint8)
        if os.preadv(self._file.fileno(), [array], self._offset(row)) < self._row_bytes:
            return None  # the file was cut
        if not self._checked[row]:
            if self._stored_checksum(row) != _checksum(array):
                return None
            self._checked[row] = True
        return torch.from_numpy(array).view(self.dtype).view(self.shape)

    def write(self, row: int, values: Tensor) -> None:
        """Store `values`, of the cache's shape and dtype, in host memory. Raises OSError if they cannot be written."""
        array = values.contiguous().view(-1).view(torch.uint8).numpy()
        os.pwrite(self._file.fileno(), array, self._offset(row))
        os.pwrite(self._file.fileno(), _checksum(array).to_bytes(_CHECKSUM_BYTES, "little"), _checksum_offset(row))

    def _stored_checksum(self, row: int) -> int:
        """0 if the row is absent."""
        return int.from_bytes(os.pread(self._file.fileno(), _CHECKSUM_BYTES, _checksum_offset(row)), "little")

    def _offset(self, row: int) -> int:
        return self._arrays_begin + row * self._row_bytes


def size_of(rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of the file of a cache with so many rows."""
    return _checksum_offset(rows) + rows * math.prod(shape) * dtype.itemsize


def _checksum_offset(row: int) -> int:
    return _HEADER_BYTES + row * _CHECKSUM_BYTES


def _make_room(folder: Path, needed: int, limit: float) -> None:
    if needed > limit:
        raise CacheError(f"{needed / 2**30:.2f} GiB are needed, and the limit is {limit / 2**30:.2f}")
    oldest_first = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
    in_use = sum(path.stat().st_size for path in oldest_first)
    for path in oldest_first:
        if in_use + needed <= limit:
            return
        in_use -= path.stat().st_size
        path.unlink(missing_ok=True)


def _checksum(array: np.ndarray) -> int:
    return 1 << 32 | zlib.crc32(array)  # never 0, which means absent


def _is_complete(path: Path, header: bytes, size: int) -> bool:
    if not path.exists() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(_HEADER_BYTES) == header


def _make(path: Path, header: bytes, size: int) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as aside:
        whole = Path(aside, path.name)
        with whole.open("wb") as file:
            # Allocate all of it now: a later write may fail on a full disk.
            os.posix_fallocate(file.fileno(), 0, size)
            file.write(header)
        whole.replace(path)
