"""The cache folder: what is made once on a machine and kept, such as the embedded models and data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdnb.errors import CacheError


def cache_root(cache_dir: str | None = None) -> Path:
    """The folder `sdnb` in `cache_dir`, or in the user's cache folder where that is None."""
    parent = cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser() / "sdnb"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if it is not there yet.

    It is filled aside and then renamed: it is complete or absent, also where several processes fill it at once.

    Raises:
        CacheError: if nothing can be written there.
    """
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise CacheError(
                f"the cache folder {folder.parent} cannot be written: {error}; "
                "set cache_dir, or XDG_CACHE_HOME, to another"
            ) from None
        try:
            make(aside)
            aside.chmod(0o755)
            aside.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, and made the same
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def computed_once(kind: str, key: Any, compute: Callable[[], Any], cache_dir: str | None = None) -> Any:
    """What `compute` gives, kept for the next time; where that cannot be read or written, it is computed every time.

    Args:
        kind: the beginning of the file's name.
        key: everything that the result depends on. Both must be such that JSON can say them.
    """
    folder = cache_root(cache_dir) / "computed"
    path = folder / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    result = compute()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=folder) as aside:
            whole = Path(aside, path.name)
            whole.write_text(json.dumps(result))
            whole.replace(path)
    return result
