"""The files of a data set that is stored in shards: parquet files, and the tars of a WebDataset."""

import glob
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdnb.errors import DataError

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # of `datasets`
ARCHIVE, KEY = "__url__", "__key__"  # columns of a WebDataset: the path of the tar, the name without its extension
_END_OF_TAR = bytes(1024)


def shards_of(described: str, name: str) -> list[str]:
    """The files that a data set's name stands for: one file, or a pattern such as `data/*.parquet` or
    `data/train-{00000..00012}.tar`. Empty if it is a folder or a hub id. Raises DataError if a file is missing or is
    neither a parquet file nor a tar."""
    path = name if "://" in name else str(Path(name).expanduser())
    if Path(path).suffix not in BUILDERS:
        if Path(path).is_file():
            raise DataError(f"{described}: is a file; give a .parquet file, a .tar file, or a folder")
        return []
    if Path(path).is_dir():
        return []
    files = [file for one in expand_braces(path) for file in ([one] if _is_plain(one) else sorted(glob.glob(one)))]
    missing = [file for file in files if "://" not in file and not Path(file).is_file()]
    if missing or not files:
        which = f"{len(missing)} of {len(files)} files are missing: {', '.join(missing[:5])}" if missing else "no file"
        raise DataError(f"{described}: there is {which}" if not missing else f"{described}: {which}")
    return files


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern with ranges of numbers, as a shell expands them."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for number in numbers for name in expand_braces(pattern.replace(found[0], number, 1))]


def _is_plain(name: str) -> bool:
    return "://" in name or not glob.has_magic(name) or Path(name).exists()


def check_tars(described: str, files: Sequence[str | Path]) -> None:
    """Raises DataError if a tar on this machine has no end. Python's tarfile takes one that is cut between two members
    for a whole one."""
    short = [str(file) for file in files if Path(file).suffix == ".tar" and Path(file).is_file() and not _ends(file)]
    if short:
        raise DataError(
            f"{described}: {len(short)} of {len(files)} files are cut short: {', '.join(short[:5])}: the two empty "
            "blocks that end a tar are missing. Copy or make them again."
        )


def _ends(tar: str | Path) -> bool:
    with open(tar, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(_END_OF_TAR)))
        return file.read() == _END_OF_TAR


def check_images(described: str, rows: datasets.Dataset, column: str) -> None:
    """Raises DataError if an example of a WebDataset has no image."""
    nulls = pc.is_null(rows.data.column(column)).to_pylist()
    missing = [file_in_archive(key, tar) for null, key, tar in zip(nulls, rows[KEY], rows[ARCHIVE]) if null]
    if missing:
        names = ", ".join(missing[:5])
        raise DataError(f"{described}: {len(missing)} of {len(rows)} images are missing, those with .{column}: {names}")


def file_in_archive(name: str | None, archive: str | None) -> str:
    """The name of an image file in a message; empty if it has none."""
    return f"{name} in {archive}" if archive else name or ""


def rows_of(described: str, files: Sequence[str]) -> int | None:
    """The number of examples in parquet files on this machine; None for any others."""
    if not files or not all(Path(file).suffix == ".parquet" and Path(file).is_file() for file in files):
        return None
    rows = 0
    for file in files:
        try:
            rows += pq.read_metadata(file).num_rows
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{described}: {file} cannot be read: {error}") from error
    return rows


def digest_of(files: Sequence[str]) -> str:
    """A hash of the names and sizes of shards. The address of a file on the hub has its revision."""
    listed = [(Path(one).name, Path(one).stat().st_size) if Path(one).is_file() else one for one in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
