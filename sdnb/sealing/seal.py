"""Seals a run: one file with what it measured, chained by hashes. `sdnb seal RUN` writes `RUN.sdnb.zip` beside it."""

import hashlib
import io
import json
import lzma
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sdnb.errors import RunError
from sdnb.machine.environment import version_of
from sdnb.metrics.results import measure
from sdnb.report.redaction import Redaction
from sdnb.run import folder as run_folder
from sdnb.run.files import read, write_bytes
from sdnb.run.folder import RunFolder, problems_of
from sdnb.training.checkpoint_folder import MANIFEST, digest_of, numbered

SEAL = "seal.json"
ENDING = ".sdnb.zip"
CHECKPOINTS, DIGESTS, FIGURES = "checkpoints.json", "digests.json", "figures.json"
# Settings first, then what followed from them: an entry's place in the chain is its place here.
_JSON = (run_folder.ENVIRONMENT, run_folder.MODEL)
_RECORDS = (run_folder.STEPS, run_folder.VALIDATION)
_AFTER = (run_folder.SUMMARY, run_folder.RESULTS, run_folder.CERTIFICATE)
NAMES = (run_folder.CONFIG, *_JSON, *_RECORDS, CHECKPOINTS, DIGESTS, *_AFTER, FIGURES)
_MOST_BYTES = 1 << 28  # of what a sealed file contains: a zip file can be made to fill a disk
_DAMAGED = (  # what a zip file, JSON and YAML raise
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, yaml.YAMLError, EOFError, ValueError, KeyError,
    TypeError, IndexError, RecursionError, RuntimeError,
)  # fmt: skip
_WEIGHTS = ("checkpoint-*/**/*", "*/*.safetensors")


@dataclass(frozen=True)
class Sealed:
    """A sealed file that was opened. `contents`: its entries by name; `seal`: the chain; `run`: the
    entries as a run folder."""

    file: Path
    contents: dict[str, bytes]
    seal: dict[str, Any]
    run: RunFolder

    def json(self, name: str) -> dict[str, Any]:
        """An entry; empty if it is missing. Raises RunError if it is not JSON."""
        try:
            content = json.loads(self.contents.get(name, b"{}"))
        except ValueError as error:
            raise RunError(f"{self.file}: {name} is not JSON: {error}") from None
        return content if isinstance(content, dict) else {}


def seal(run: RunFolder, file: Path | None = None) -> Path:
    """Write the sealed file of a complete run. Home folders, the user's name and secrets are left out, as of a page.
    Raises RunError if the run is not complete, or sdnb did not make it."""
    if "imported" in run.environment:
        raise RunError(f"{run.folder}: was imported from a log; only a run of sdnb can be sealed")
    if run.state not in ("complete", "diverged"):
        raise RunError(f"{run.folder}: is {run.state}; a run is sealed when it is complete")
    contents, problem = problems_of(partial(_contents, run))
    if contents is None or problem:
        raise RunError(f"{run.folder}: cannot be sealed: {problem}")
    entries = chain(contents)
    sealed = {"sdnb": version_of("sdnb"), "entries": entries, "head": entries[-1]["chain"]}
    folder, written = run.folder.resolve(), io.BytesIO()
    target = file or folder.with_name(folder.name + ENDING)
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in {**contents, SEAL: _json(sealed)}.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # without a date: the same bytes
    write_bytes(target, written.getvalue())
    return target


def chain(contents: dict[str, bytes]) -> list[dict[str, str]]:
    """For each entry its hash, and the hash of that and of all before it (SHA-256)."""
    entries, before = list[dict[str, str]](), ""
    for name, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        before = hashlib.sha256(f"{before}\n{name}\n{digest}".encode()).hexdigest()
        entries.append({"name": name, "sha256": digest, "chain": before})
    return entries


def _contents(run: RunFolder) -> dict[str, bytes]:
    folder, redaction = run.folder, Redaction()
    figures = {"sdnb": version_of("sdnb"), "results": [row.row() for row in measure(run).results]}
    return {
        run_folder.CONFIG: redaction.text((folder / run_folder.CONFIG).read_text()).encode(),
        **{name: _json(redaction.node(read(folder / name))) for name in _JSON},
        **{name: (folder / name).read_bytes() for name in _RECORDS if (folder / name).exists()},
        CHECKPOINTS: _json(redaction.node({path.name: read(path / MANIFEST) for _, path in sorted(numbered(folder))})),
        DIGESTS: _json({str(path.relative_to(folder)): sha256_of(path) for path in weights_in(folder)}),
        **{name: _json(redaction.node(read(folder / name))) for name in _AFTER if (folder / name).exists()},
        FIGURES: _json(figures),
    }


def is_of_this_version(run: RunFolder) -> bool:
    """Whether the run was made by the version of sdnb that is installed here: it recorded what this one records."""
    return bool(run.environment.get("packages", {}).get("sdnb") == version_of("sdnb"))


def weights_in(folder: Path) -> list[Path]:
    """The files of weights and states in a run folder: those of its checkpoints, and of the saved pipeline."""
    found = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    return sorted(path for path in found if path.is_file())


def sha256_of(path: Path) -> str:
    return digest_of(path, hashlib.sha256())


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def unseal(file: str | Path, into: Path) -> Sealed:
    """Open a sealed file, and write its entries into a folder. Raises RunError if it is none."""
    try:
        path = Path(file).expanduser()
        if path.is_dir():
            raise RunError(f"{file}: is a folder; give the file that `sdnb seal` made of it, such as RUN{ENDING}")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len({*names}) < len(names):
                raise ValueError("it has two entries of the same name")
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"it has more than {_MOST_BYTES / 2**20:g} MiB, and a sealed run has megabytes")
            if other := [name for name in names if name not in (*NAMES, SEAL)]:
                raise ValueError(f"it has an entry {other[0]!r}")
            contents = {name: archive.read(name) for name in names}
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(contents.get(run_folder.CONFIG, b""))):
            raise ValueError(f"{run_folder.CONFIG} refers to itself")
        stated = json.loads(contents.pop(SEAL))
        if stated["head"] != [(entry["name"], entry["sha256"], entry["chain"]) for entry in stated["entries"]][-1][2]:
            raise ValueError("its head is not that of its chain")
    except FileNotFoundError:
        raise RunError(f"{file}: there is no such file") from None
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror or error}") from None
    except _DAMAGED as error:
        raise RunError(f"{file}: was not written by `sdnb seal`, or is damaged: {error}") from None
    for name, content in contents.items():
        (into / name).write_bytes(content)
    return Sealed(path, contents, stated, RunFolder(into))
