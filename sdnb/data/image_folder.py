"""Checks a folder of images: `datasets` would wait for a FIFO, and skip images without a caption without a word. Reads
captions in .txt files."""

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow.compute as pc
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from sdnb.errors import DataError

HELD_OUT = ("validation", "valid", "val", "test")
logger = logging.getLogger("sdnb")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_OF_A_DATA_SET = (".parquet", ".arrow", ".tar")
_RUN, _DRAWN = {"config.yaml", "environment.json"}, "samples"  # files of a run folder; where the run draws images


def splits_of(folder: Path) -> dict[str, tuple[Path, list[Path]]]:
    """The folder of each split, and the images in it. A folder with images in the sub-folders `train` and `validation`
    (or `valid`, `val`, `test`), and nowhere else, has two splits. Of any other, all is for the training, as for the
    reference. Raises DataError if something there would keep `datasets` from reading it."""
    images = images_in(folder)
    tops = {path.relative_to(folder).parts[0] for path in images}
    held_out = next((name for name in HELD_OUT if name in tops), None)
    if held_out is None or "train" not in tops:
        return {"train": (folder, images)}
    others = sorted({*tops - {"train", *HELD_OUT}, *(name for name in _METADATA if (folder / name).exists())})
    if others:
        logger.warning(
            "train_data_dir %s: the images in %s/ are trained on, too: %s beside train/ and %s/ says that these are no "
            "splits", folder, held_out, _some(others), held_out,
        )  # fmt: skip
        return {"train": (folder, images)}
    return {
        split: (folder / name, [path for path in images if path.is_relative_to(folder / name)])
        for split, name in (("train", "train"), ("validation", held_out))
    }


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and its sub-folders, without hidden ones and those that a run has drawn."""
    found, others = [], set()
    for path in _files_in(folder):
        suffix = path.suffix.lower()
        if suffix not in ImageFolder.EXTENSIONS:
            others.add(suffix if path.name not in _METADATA else "")
            continue
        if path.exists() and not path.is_file():
            kind = "a FIFO" if stat.S_ISFIFO(path.stat().st_mode) else "no regular file"
            raise DataError(f"train_data_dir {folder}: {path.relative_to(folder)} is {kind}, not an image. Remove it.")
        found.append(path)
    if not found and (stored := others & {*_OF_A_DATA_SET}):
        raise DataError(
            f"train_data_dir {folder}: has no images, but {' and '.join(sorted(stored))} files. train_data_dir is for "
            f"folders of images; for a data set in such files, set dataset_name = {folder}"
        )
    return found


def text_captions(folder: Path, images: list[Path]) -> list[str] | None:
    """The captions of images that have a .txt file of the same name beside them, as kohya's scripts want them. None if
    there are no such files, or there is a metadata file, which `datasets` reads. Raises DataError if some are missing
    or cannot be read."""
    if any((parent / name).exists() for parent in {folder, *(path.parent for path in images)} for name in _METADATA):
        return None
    beside = {path: path.with_suffix(".txt") for path in images}
    if not any(text.is_file() for text in beside.values()):
        return None
    if without := [str(path.relative_to(folder)) for path, text in beside.items() if not text.is_file()]:
        raise DataError(
            f"train_data_dir {folder}: {len(without)} of {len(images)} images have no caption: {_some(without)}. "
            "Others have a .txt file of the same name: give each one, or remove the image."
        )
    try:
        return [text.read_text(encoding="utf-8-sig").strip() for text in beside.values()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"train_data_dir {folder}: a caption cannot be read: {error}") from None


def write_metadata(folder: Path) -> list[Path]:
    """Write the captions of .txt files into a metadata.jsonl, one for each split, and return the files. Raises
    DataError if there are none, or there is a metadata file already."""
    written = []
    for split, images in splits_of(folder).values():
        captions = text_captions(split, images)
        if captions is None:
            raise DataError(f"{split}: has no .txt files beside its images, or has a metadata file already")
        lines = [
            json.dumps({"file_name": path.relative_to(split).as_posix(), "text": caption}, ensure_ascii=False)
            for path, caption in zip(images, captions)
        ]
        written.append(split / "metadata.jsonl")
        written[-1].write_text("".join(f"{line}\n" for line in lines))
    return written


def _files_in(folder: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(folder):
        here, is_run = Path(name), {*files} >= _RUN
        visible = (one for one in folders if not one.startswith((".", "__")))
        folders[:] = sorted(one for one in visible if not (is_run and one == _DRAWN))
        if links := [str((here / one).relative_to(folder)) for one in folders if (here / one).is_symlink()]:
            logger.warning("train_data_dir %s: links to folders are not followed: %s", folder, _some(links))
        yield from (here / one for one in sorted(files) if not one.startswith((".", "__")))


def check_files(described: str, rows: datasets.Dataset, column: str) -> None:
    """Raises DataError if image files are missing that the rows of a data set name: loading would fail at their turn,
    which may be hours after the start."""
    if not isinstance(rows.features.get(column), datasets.Image):
        return
    missing = [
        path or f"row {row} has no {'' if column == 'image' else column + '_'}file_name"
        for row, (path, inside) in enumerate(_stored(rows, column))
        if not inside and not (path and ("://" in path or os.path.isfile(path)))
    ]
    if missing:
        raise DataError(
            f"{described}: {len(missing)} of {len(rows)} images are missing: {_some(missing)}. The folder of a "
            "metadata.jsonl is searched for the files that it names. Add the files, or remove their lines."
        )


def check_captions(described: str, folder: Path, images: list[Path], rows: datasets.Dataset) -> None:
    """Raises DataError if no row of the data set names an image of the folder, in whichever column: `datasets` skips
    those without a word."""
    # Not `Path.resolve`, which raises for a link to itself.
    named = {os.path.realpath(path) for column in rows.features for path, _ in _stored(rows, column) if path}
    if without := [str(path.relative_to(folder)) for path in images if os.path.realpath(path) not in named]:
        raise DataError(
            f"{described}: {len(without)} of {len(images)} images have no caption: {_some(without)}. "
            "Give each a line in the folder's metadata.jsonl, or remove it."
        )


def _stored(rows: datasets.Dataset, column: str) -> Iterator[tuple[str | None, bool]]:
    """The path of each image in a column, and whether its content is in the data set itself. Nothing is loaded."""
    feature = rows.features[column]
    several = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if not any(isinstance(one, datasets.Image) for one in (feature, several)):
        return
    for chunk in rows.data.column(column).chunks:
        images = chunk if isinstance(feature, datasets.Image) else pc.list_flatten(chunk)
        inside = pc.is_valid(pc.struct_field(images, "bytes"))
        yield from zip(pc.struct_field(images, "path").to_pylist(), inside.to_pylist())


def _some(names: list[str]) -> str:
    """The first five names."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
