"""Image–caption data sets: loaded, checked, and turned into training batches as the reference does it."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

from sdnb.data import openmoji
from sdnb.data.transforms import centre, cut, draw_corner, draw_mirrored, normalize, resize
from sdnb.errors import DataError
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import EMBEDDED_DATA

HELD_OUT_SPLITS = ("validation", "valid", "test")
VANISHED = "lambdalabs/pokemon-blip-captions"

# What `datasets` makes of a folder with images is decoded here, so that a broken one can be named.
_DECODER = datasets.Image()


@dataclass
class Splits:
    """A data set's examples: those to train on, and those held out, if there are any."""

    train: ImageCaptions
    held_out: ImageCaptions | None


def load(config: TrainConfig) -> Splits:
    """The data set that the settings name.

    Raises:
        DataError: if it is not there, is empty, lacks a column, or lacks a caption.
    """
    splits = _load_splits(config)
    train = splits["train"]
    if config.max_train_samples is not None:
        if config.max_train_samples > len(train):
            raise DataError(f"max_train_samples = {config.max_train_samples}, but {_name(config)} has {len(train)}")
        # Without a seed too the same ones on every rank, and when the training is resumed.
        train = train.shuffle(seed=config.seed or 0).select(range(config.max_train_samples))
    held_out = next((splits[name] for name in HELD_OUT_SPLITS if name in splits and len(splits[name])), None)
    return Splits(
        ImageCaptions(train, config, "train"),
        ImageCaptions(held_out, config, "held out") if held_out is not None else None,
    )


def _name(config: TrainConfig) -> str:
    return f"data set {config.dataset_name}" if config.dataset_name else f"train_data_dir {config.train_data_dir}"


def _load_splits(config: TrainConfig) -> datasets.DatasetDict:
    name, folder = config.dataset_name, config.train_data_dir
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise DataError(f"train_data_dir {folder}: there is no such folder (seen from {Path.cwd()})")
    files = {"train": _all_in(Path(folder).expanduser())} if name is None else None
    if name in EMBEDDED_DATA:
        # With the files named, `datasets` does not look for splits in all the ways that a folder may show them.
        rendered = openmoji.folder(config.resolution, config.cache_dir, name)
        files = {split: _all_in(rendered / split) for split in openmoji.SPLITS}
    try:
        if files is None:
            splits = datasets.load_dataset(
                name, config.dataset_config_name, cache_dir=config.cache_dir, data_dir=folder
            )
        else:
            splits = datasets.load_dataset("imagefolder", data_files=files, cache_dir=config.cache_dir)
    except Exception as error:  # `datasets` raises dozens of types, its builders' included
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise DataError(f"{_name(config)} cannot be loaded: {cause}\n{_advice(config)}") from error
    if "train" not in splits or not len(splits["train"]):
        raise DataError(f"{_name(config)}: has no examples in a split named train; it has: {dict(splits.num_rows)}")
    if name is None and "image" in splits["train"].column_names:
        _check_all_have_captions(splits["train"], config)
    return splits


def _all_in(folder: Path) -> str:
    return f"{glob.escape(str(folder))}/**"


def _check_all_have_captions(rows: datasets.Dataset, config: TrainConfig) -> None:
    # `datasets` leaves out, without a word, the pictures that metadata.jsonl does not name.
    folder = Path(config.train_data_dir).expanduser()
    loaded = {
        Path(stored["path"]).resolve() for stored in rows.cast_column("image", datasets.Image(decode=False))["image"]
    }
    there = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in ImageFolder.EXTENSIONS
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    ]
    if without := [path for path in there if path.resolve() not in loaded]:
        shown = ", ".join(str(path.relative_to(folder)) for path in without[:5])
        raise DataError(
            f"{_name(config)}: {len(without)} of {len(there)} pictures have no caption: {shown}"
            f"{', …' if len(without) > 5 else ''}. Give each a line in the folder's metadata.jsonl, or take it out."
        )


def _advice(config: TrainConfig) -> str:
    if config.dataset_name == VANISHED:
        return (
            f"{VANISHED} was taken down from the hub. Use lambdalabs/naruto-blip-captions, the embedded "
            f"{openmoji.PLAIN} (both as dataset_name), or a folder of images with a metadata.jsonl (as train_data_dir)."
        )
    if config.dataset_name is not None:
        return f"Give a hub id, a folder that `datasets` can load, or one of the embedded: {', '.join(EMBEDDED_DATA)}."
    return (
        'The folder needs images, and a metadata.jsonl with a line {"file_name": "a.png", '
        f'"{config.caption_column}": "its caption"}} for each of them.'
    )


class Drawn(NamedTuple):
    """What is drawn of an example for one epoch: the place of the crop, left and top, None for the centre; whether it
    is mirrored; one caption of several. With the resized picture, where it had to be loaded to draw the place."""

    row: int
    corner: tuple[int, int] | None
    mirrored: bool
    caption: str
    picture: Image.Image | None


class ImageCaptions(torch.utils.data.Dataset):
    """Examples of pictures with captions. An item is what is drawn of one, a `Drawn`: crop and mirroring from torch's
    global generator, as torchvision's transforms draw them, a caption out of several with Python's `random`. `collate`
    makes a micro-batch of several, and begins to load its pictures.

    Of views that are kept, which it is told of with `keep`, no pixels are loaded; a view is a picture, or a picture
    mirrored.
    """

    def __init__(self, rows: datasets.Dataset, config: TrainConfig, split: str) -> None:
        self.config = config
        self.split = split
        self.tokenizer: Any = None
        self._kept: Container[int] | None = None
        self._map: Callable[..., Iterable[Any]] = map
        self.pass_over(0)
        self.captions = rows[self._column(rows, config.caption_column, "caption_column")][:]
        column = self._column(rows, config.image_column, "image_column")
        if not isinstance(rows.features[column], datasets.Image):
            raise DataError(f"{_name(config)}: column {column} holds {rows.features[column]}, not images")
        self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        for row, caption in enumerate(self.captions):
            several = caption if isinstance(caption, list) else [caption]
            if not several or not all(isinstance(one, str) for one in several):
                raise DataError(
                    f"{self.name_of(row)}: the caption in column {config.caption_column} is {caption!r}; "
                    "a text is needed, or a list of texts"
                )

    def _column(self, rows: datasets.Dataset, column: str, setting: str) -> str:
        if column not in rows.column_names:
            missing_metadata = "" if len(rows.column_names) > 1 else " A folder needs a metadata.jsonl for captions."
            raise DataError(
                f"{setting} = {column}: {_name(self.config)} has no such column; "
                f"it has: {', '.join(rows.column_names)}. Set {setting} to the one that is meant.{missing_metadata}"
            )
        return column

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """What tells this data set from another: how many examples, and a hash of their captions in their order."""
        captions = hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()[:16]
        return f"{len(self)} examples, captions {captions}"

    def _stored(self, row: int) -> dict[str, Any]:
        return self.rows[row][self.config.image_column] or {}

    def name_of(self, row: int) -> str:
        """What to call a row in a message: the data set, the row's number, and its file if it has one."""
        path = self._stored(row).get("path")
        return f"{_name(self.config)}, row {row} ({self.split}{', ' + path if path else ''})"

    def picture(self, row: int) -> Image.Image:
        """The picture of a row as it is stored, in RGB."""
        stored = self._stored(row)
        if not stored:
            raise DataError(f"{self.name_of(row)}: there is no picture")
        try:
            picture = _DECODER.decode_example(stored)
            if picture.mode.startswith(("I", "F")):
                raise ValueError(
                    f"its pixels are of mode {picture.mode}, deeper than 8 bits, and would be cut to white"
                )
            return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{self.name_of(row)}: the picture cannot be used: {error}. "
                "Mend the file, or take it and its caption out."
            ) from error

    def __getitem__(self, row: int) -> Drawn:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[Drawn]:  # which torch's loader asks for, a micro-batch at once
        if self.config.center_crop:
            return [self._draw(row, None) for row in rows]
        return [self._draw(row, picture) for row, picture in zip(rows, self._map(self._resized, rows))]

    def _draw(self, row: int, picture: Image.Image | None) -> Drawn:
        corner = draw_corner(picture.size, self.config) if picture else None
        return Drawn(row, corner, draw_mirrored(self.config), _one_of(self.captions[row]), picture)

    def collate(self, drawn: list[Drawn]) -> dict[str, Any]:
        """A micro-batch: `pixels`, an iterable over its pictures as `levels` gives them, and `input_ids`, int64 [batch,
        tokens], for which the tokenizer must be set.

        Of views that are kept: the numbers of `views` and `captions`, and with `pixels` those that are `loaded`. Of a
        batch that is passed over: nothing.
        """
        if self._is_passed_over():
            return {}
        captions = [one.caption for one in drawn]
        if self._kept is None:
            to_load = dict(enumerate(drawn))
            batch = {"input_ids": tokenize(self.tokenizer, captions)}
        else:
            views = [one.row + one.mirrored * len(self) for one in drawn]
            to_load = {view: one for view, one in zip(views, drawn) if view not in self._kept}
            numbers = [self._caption_numbers[caption] for caption in captions]
            batch = {"views": views, "captions": numbers, "loaded": [*to_load]}
        pixels = self._map(self._cut, to_load.values())
        if to_load and torch.utils.data.get_worker_info() is not None:
            pixels = torch.stack([*pixels])  # goes to the training's process as one
        return {**batch, "pixels": pixels}

    def load_in_threads(self, threads: int) -> None:
        """From now on, have threads load the pictures: of a fixed crop while this one goes on; else, as their sizes
        decide what is drawn, all of a micro-batch's at once."""
        self._map = ThreadPoolExecutor(threads, "pictures").map

    def _cut(self, drawn: Drawn) -> torch.Tensor:
        picture = drawn.picture or self._resized(drawn.row)
        side = self.config.resolution
        return cut(picture, drawn.corner or centre(picture.size, side), drawn.mirrored, side)

    def _resized(self, row: int) -> Image.Image:
        return resize(self.picture(row), self.config.resolution, self.config.image_interpolation_mode)

    def keep(self, kept: Container[int]) -> None:
        """From now on, load the pixels only of views that are not in `kept`. Where the crop is the centre."""
        self._kept = kept
        self._caption_numbers = {caption: number for number, caption in enumerate(self.distinct_captions)}

    @property
    def views(self) -> int:
        """How many different views there are: view n is picture n; the mirrored ones, if there are, come after all."""
        return len(self) * (2 if self.config.random_flip else 1)

    @property
    def distinct_captions(self) -> list[str]:
        """All captions, each once."""
        several = (caption if isinstance(caption, list) else [caption] for caption in self.captions)
        return list(dict.fromkeys(itertools.chain.from_iterable(several)))

    def levels(self, view: int) -> torch.Tensor:
        """A view, uint8 [3, resolution, resolution], cropped in the centre."""
        mirrored, row = divmod(view, len(self))
        return self._cut(Drawn(row, None, bool(mirrored), "", None))

    def pixels(self, view: int) -> torch.Tensor:
        """A view as the encoder sees it, float32 [3, resolution, resolution] in [-1, 1], cropped in the centre."""
        return normalize(self.levels(view))

    def pixels_digest(self) -> str:
        """A hash of what decides the pixels of the views: the pictures' files and their order, and the settings."""
        decide = [getattr(self.config, name) for name in ("resolution", "center_crop", "image_interpolation_mode")]
        digest = hashlib.sha256(json.dumps([*decide, self.views]).encode())
        for row in range(len(self)):
            digest.update(hashlib.sha256(self._file(row)).digest())
        return digest.hexdigest()

    def _file(self, row: int) -> bytes:
        stored = self._stored(row)
        try:
            return stored.get("bytes") or (Path(stored["path"]).read_bytes() if stored else b"")
        except OSError:
            return b""  # said when its turn comes

    def pass_over(self, batches: int) -> None:
        """Of the loader's next epoch, leave out the pixels and tokens of so many batches, but none of their draws."""
        self._passed_over, self._fetched = batches, 0

    def _is_passed_over(self) -> bool:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        batch = self._fetched * workers + number  # the workers fetch in turn
        self._fetched += 1
        return batch < self._passed_over


def first_caption(caption: str | list[str]) -> str:
    """The caption of a picture, or the first of several."""
    return caption if isinstance(caption, str) else caption[0]


def _one_of(caption: str | list[str]) -> str:
    return caption if isinstance(caption, str) else random.choice(caption)


def tokenize(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Token ids, int64 [captions, tokens], padded or cut to the model's length."""
    return tokenizer(
        captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
