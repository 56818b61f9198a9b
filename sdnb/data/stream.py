"""A data set that is read while it is trained on, because it is larger than the disk."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import datasets
from PIL import Image

from sdnb.compat import one_shard_at_a_time
from sdnb.data import shards
from sdnb.data.columns import describe, find_columns, value_of
from sdnb.data.image_captions import ImageCaptions, Images, first_caption
from sdnb.data.shards import ARCHIVE, KEY, file_in_archive
from sdnb.errors import DataError
from sdnb.settings.fields import DataSettings

READ_AHEAD = 128  # examples: `datasets` fills half of its buffer at once, and a step should not wait for that
T = TypeVar("T")


class Streamed(NamedTuple):
    """An example as it is stored. Nothing is decoded yet. `file` is the name of the image file, if it has one."""

    stored: dict[str, Any]
    caption: str | list[str]
    file: str


class ImageStream(Images):
    """The images and captions to train on, in the order of `epoch`, which depends on nothing else but the seed.
    `datasets` shuffles the shards, and the examples in a buffer. All ranks read the same examples in the same order,
    and each decodes its own."""

    def __init__(
        self, rows: datasets.IterableDataset, settings: DataSettings, seed: int, files: Sequence[str], count: int | None
    ) -> None:
        """`files` are the shards. `count`: the number of examples; None if it is unknown. Raises DataError if a column
        is missing, or there are fewer examples than `max_train_samples`."""
        self.settings, self.epoch, self._files, self.count = settings, 0, files, count
        self._column, self._caption_column = find_columns(rows.features, settings)
        self._in_order = stored_only(rows, self._column)
        if (wanted := settings.max_train_samples) is not None:
            if count is not None and wanted > count:
                raise self._too_few(count)
            self._in_order, self.count = self._in_order.take(wanted), wanted
        shuffle = self._in_order.shuffle
        self._shuffled = shuffle(seed=seed, buffer_size=settings.shuffle_buffer, **one_shard_at_a_time(shuffle))

    def __iter__(self) -> Iterator[Streamed]:
        """The examples of an epoch. Raises DataError if one cannot be read or has no caption, or if there are none."""
        self._shuffled.set_epoch(self.epoch)
        read = 0
        for example in read_ahead(self._read(self._shuffled), READ_AHEAD):
            read += 1
            yield example
        if not read or read < (self.settings.max_train_samples or 0):
            raise self._too_few(read)

    def digest(self) -> str:
        """Identifies the data and their order, on which versions of `datasets` do not agree."""
        named = f"{len(self._files)} shards, names and sizes {shards.digest_of(self._files)}"
        return f"stream of {named}, in the order of datasets {datasets.__version__}"

    def sample(self, count: int) -> tuple[list[Image.Image], list[str]]:
        """The first images, with their captions."""
        examples = [*self._read(self._in_order.take(count))]
        return [self.image(one) for one in examples], [first_caption(one.caption) for one in examples]

    def name_of(self, row: Streamed) -> str:
        """An example's name in a message: its file, or else its caption."""
        return f"{describe(self.settings)}, {row.file or f'the image with the caption {row.caption!r}'}"

    def caption(self, row: Streamed) -> str | list[str]:
        return row.caption

    def _stored(self, row: Streamed) -> dict[str, Any]:
        return row.stored

    def _read(self, rows: datasets.IterableDataset) -> Iterator[Streamed]:
        try:
            for row in rows:
                stored = row[self._column] or {}
                file = file_in_archive(stored.get("path") or row.get(KEY), row.get(ARCHIVE))
                example = Streamed(stored, value_of(row, self._caption_column), file)
                if error := self.caption_error(example, self._caption_column):
                    raise error
                yield example
        except DataError:
            raise
        except Exception as error:  # `datasets`, pyarrow, tarfile and fsspec each raise their own
            raise DataError(
                f"{describe(self.settings)}: a shard cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _too_few(self, count: int) -> DataError:
        wanted = self.settings.max_train_samples
        asked = f"max_train_samples = {wanted}, but " if wanted else ""
        return DataError(f"{asked}{describe(self.settings)} has {count} examples")


def read_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items. A thread reads so many ahead."""
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "reader")
    try:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def first_examples(rows: datasets.IterableDataset, settings: DataSettings, count: int) -> ImageCaptions | None:
    """The first examples of a stream's held-out split, loaded; None if it is empty."""
    rows = stored_only(rows, find_columns(rows.features, settings)[0])
    first = [*rows.take(count)]
    return ImageCaptions(datasets.Dataset.from_list(first, rows.features), settings, "held out") if first else None


def stored_only(rows: datasets.IterableDataset, column: str) -> datasets.IterableDataset:
    """The rows with their images as they are stored, those in other columns too: `datasets` would decode them."""
    others = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    for name in dict.fromkeys([column, *others]):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows
