"""Images with captions: the rows of a data set, checked."""

import contextlib
import hashlib
import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import fsspec
import torch
from PIL import Image

from sdnb.data.columns import describe, find_columns
from sdnb.data.shards import ARCHIVE, file_in_archive
from sdnb.data.transforms import crop, normalize, resize, size_after_resize
from sdnb.errors import DataError
from sdnb.settings.fields import DataSettings


class Images:
    """Decodes the images of a data set. A row is whatever `_stored`, `caption` and `name_of` know."""

    settings: DataSettings

    def _stored(self, row: Any) -> dict[str, Any]:
        """The `bytes` and the `path` of an image file; one of them may be missing."""
        raise NotImplementedError

    def caption(self, row: Any) -> str | list[str]:
        """The caption of an image, or several."""
        raise NotImplementedError

    def name_of(self, row: Any) -> str:
        """A row's name in a message."""
        raise NotImplementedError

    @staticmethod
    def _file(stored: dict[str, Any]) -> bytes:
        """The content of an image file, which may be in the data set or in an archive. Raises OSError."""
        if stored.get("bytes") or not stored.get("path"):
            return stored.get("bytes") or b""
        if "://" in stored["path"]:  # such as zip://a.png::/path/archive.zip
            with fsspec.open(stored["path"]) as file:
                return file.read()
        return Path(stored["path"]).read_bytes()

    def image(self, row: Any) -> Image.Image:
        """The image of a row as it is stored, in RGB. Raises DataError if there is none or it cannot be decoded."""
        stored = self._stored(row)
        if not stored:
            raise DataError(f"{self.name_of(row)}: there is no image")
        try:
            file = self._file(stored)
            with Image.open(BytesIO(file)) as opened:
                if opened.format == "EPS":
                    raise ValueError("EPS is a program, which Pillow would give to another program to run")
            image = datasets.Image().decode_example({"bytes": file, "path": None})
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels have mode {image.mode}, deeper than 8 bits, and would turn white")
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            advice = "Repair the file, or remove it and its caption."
            raise DataError(f"{self.name_of(row)}: the image cannot be used: {error}. {advice}") from error

    def resized(self, row: Any) -> Image.Image:
        """The image of a row, with its shorter side as long as the resolution."""
        return resize(self.image(row), self.settings.resolution, self.settings.image_interpolation_mode)

    def resized_size(self, row: Any) -> tuple[int, int]:
        """Width and height of `resized`, or of that image on its side. Nothing is decoded. Raises OSError."""
        with Image.open(BytesIO(self._file(self._stored(row)))) as opened:
            return size_after_resize(opened.size, self.settings.resolution)

    def caption_error(self, row: Any, column: str) -> DataError | None:
        """What is wrong with the caption of a row."""
        caption = self.caption(row)
        captions = caption if isinstance(caption, list) else [caption]
        if captions and all(isinstance(one, str) for one in captions):
            return None
        return DataError(
            f"{self.name_of(row)}: the caption in column {column} is {caption!r}; it must be a text, or a list of texts"
        )


class ImageCaptions(Images):
    """The images and captions of one split, in their order.

    A *view* is an image, or an image mirrored, resized and cropped in the centre. View n is image n; with `random_flip`
    the mirrored ones follow after all of these. `views` is their number. `distinct_captions` has each caption once.
    Raises DataError if a column is missing or a caption is not a text.
    """

    def __init__(self, rows: datasets.Dataset, settings: DataSettings, split: str) -> None:
        self.settings, self.split = settings, split
        self._column, captions = find_columns(rows.features, settings)
        self.captions = (rows if captions in rows.column_names else rows.flatten())[captions][:]
        # sdnb decodes images itself, so that it can name a broken one.
        kept = [self._column, *({ARCHIVE} & {*rows.column_names})]
        self.rows = rows.select_columns(kept).cast_column(self._column, datasets.Image(decode=False))
        self.views = len(rows) * (2 if settings.random_flip else 1)
        distinct: dict[str, None] = {}
        for row, caption in enumerate(self.captions):
            if error := self.caption_error(row, captions):
                raise error
            distinct.update(dict.fromkeys(caption if isinstance(caption, list) else [caption]))
        self.distinct_captions = list(distinct)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def count(self) -> int:
        """The number of examples, which a stream may not know."""
        return len(self)

    def caption(self, row: int) -> str | list[str]:
        return self.captions[row]

    def digest(self) -> str:
        """Identifies the data: the number of examples, and a hash of their captions in order."""
        captions = hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()[:16]
        return f"{len(self)} examples, captions {captions}"

    def name_of(self, row: int) -> str:
        """A row's name in a message: the data set, the row's number, and its file and archive if it has them."""
        path = file_in_archive(self._stored(row).get("path"), self.rows[row].get(ARCHIVE))
        return f"{describe(self.settings)}, row {row} ({self.split}{', ' + path if path else ''})"

    def _stored(self, row: int) -> dict[str, Any]:
        return self.rows[row][self._column] or {}

    def sample(self, count: int) -> tuple[list[Image.Image], list[str]]:
        """Some images, evenly chosen, with their captions."""
        rows = range(0, len(self), max(1, math.ceil(len(self) / count)))
        return [self.image(row) for row in rows], [first_caption(self.captions[row]) for row in rows]

    def pixels_uint8(self, view: int) -> torch.Tensor:
        """A view, uint8 [3, resolution, resolution]."""
        mirrored, row = divmod(view, len(self))
        return crop(self.resized(row), None, bool(mirrored), self.settings.resolution)

    def pixels(self, view: int) -> torch.Tensor:
        """A view as the VAE sees it, float32 [3, resolution, resolution] in [-1, 1]."""
        return normalize(self.pixels_uint8(view))

    def pixels_digest(self) -> str:
        """A hash of everything that decides the pixels of the views: the image files in order, and the settings."""
        settings = [getattr(self.settings, name) for name in ("resolution", "center_crop", "image_interpolation_mode")]
        digest = hashlib.sha256(json.dumps([*settings, self.views]).encode())
        for row in range(len(self)):
            file = b""
            with contextlib.suppress(OSError):  # `image` reports it
                file = self._file(self._stored(row))
            digest.update(hashlib.sha256(file).digest())
        return digest.hexdigest()


def first_caption(caption: str | list[str]) -> str:
    """The caption of an image, or the first of several."""
    return caption if isinstance(caption, str) else caption[0]


def tokenize(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Token ids, int64 [captions, tokens], padded or cut to the model's length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
