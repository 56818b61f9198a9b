"""The cache folder: what a machine makes once and reuses, such as the embedded models and data."""

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
    """The folder `sdnb` in `cache_dir`, or in the user's cache folder if that is None."""
    parent = cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser() / "sdnb"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if it does not exist yet. It is filled under another name and then renamed, so it is
    complete or absent, even if several processes fill it at once. Raises CacheError if it cannot be written."""
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            advice = "set cache_dir or XDG_CACHE_HOME to another folder"
            raise CacheError(f"the cache folder {folder.parent} cannot be written: {error}; {advice}") from None
        try:
            make(aside)
            aside.chmod(0o755)
            aside.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and made the same
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def computed_once(kind: str, key: Any, compute: Callable[[], Any], cache_dir: str | None = None) -> Any:
    """The result of `compute`, cached. `key` is everything that it depends on; both are JSON values. The file's name
    begins with `kind`. If the cache cannot be read or written, the result is computed every time."""
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
