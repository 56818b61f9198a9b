"""What a training step gets of the examples: random draws, pixels and tokens, in micro-batches."""

import random
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image

from sdnb.data.image_captions import ImageCaptions, tokenize
from sdnb.data.stream import ImageStream
from sdnb.data.transforms import crop, draw_corner, draw_mirrored


class Draw(NamedTuple):
    """What is drawn for an example in one epoch. `row` is its number, or the example itself if it is streamed. `corner`
    is the left and top of the crop, None for the centre; `caption` is one of several. `image` is the resized image, if
    it had to be loaded to draw the corner."""

    row: Any
    corner: tuple[int, int] | None
    mirrored: bool
    caption: str
    image: Image.Image | None


class TrainingSet(torch.utils.data.Dataset):
    """A dataset for torch's DataLoader. An item is a `Draw`: crop and mirroring come from torch's global generator, as
    in torchvision's transforms, and one of several captions from Python's `random`. `collate` makes a micro-batch of
    several items, and starts to load their pixels."""

    def __init__(
        self, examples: ImageCaptions | ImageStream, tokenizer: Any, cached: Container[int] | None = None,
        threads: int = 0,
    ) -> None:  # fmt: skip
        """`cached` are the views whose encoding is cached: they need no pixels, and their crop is the centre. As many
        `threads` load the images; 0: the caller's own. With a fixed crop they load while the step runs."""
        self.examples, self.tokenizer, self._cached = examples, tokenizer, cached
        self._map: Callable[..., Iterable[Any]] = ThreadPoolExecutor(threads, "images").map if threads else map
        if cached is not None and isinstance(examples, ImageCaptions):
            self._caption_numbers = {caption: number for number, caption in enumerate(examples.distinct_captions)}
        self.begin_epoch(0)

    def __len__(self) -> int:
        if self.examples.count is None:
            raise TypeError("the number of examples is unknown")
        return self.examples.count

    def __getitem__(self, row: Any) -> Draw:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[Any]) -> list[Draw]:  # torch's loader asks for a micro-batch at once
        settings, draws = self.examples.settings, []
        unloaded = settings.center_crop or self._is_skipped()
        images = [None] * len(rows) if unloaded else self._map(self.examples.resized, rows)
        for row, image in zip(rows, images):
            corner = None
            if not settings.center_crop:
                corner = draw_corner(image.size if image else self.examples.resized_size(row), settings.resolution)
            mirrored = settings.random_flip and draw_mirrored()
            captions = self.examples.caption(row)
            caption = captions if isinstance(captions, str) else random.choice(captions)
            draws.append(Draw(row, corner, mirrored, caption, image))
        return draws

    def collate(self, draws: list[Draw]) -> dict[str, Any]:
        """A micro-batch: `pixels`, an iterable of uint8 [3, resolution, resolution], and `input_ids`, int64 [batch,
        tokens].

        Where encodings are cached: the numbers of `views` and `captions`, and `pixels` of the views in `loaded` only.
        Of a batch that is skipped: nothing.
        """
        skipped = self._is_skipped()
        self._fetched += 1
        if skipped:
            return {}
        captions = [draw.caption for draw in draws]
        if self._cached is None:
            to_load = dict(enumerate(draws))
            batch = {"input_ids": tokenize(self.tokenizer, captions)}
        else:
            views = [draw.row + draw.mirrored * len(self) for draw in draws]
            to_load = {view: draw for view, draw in zip(views, draws) if view not in self._cached}
            numbers = [self._caption_numbers[caption] for caption in captions]
            batch = {"views": views, "captions": numbers, "loaded": [*to_load]}
        pixels = self._map(self._pixels, to_load.values())
        if to_load and torch.utils.data.get_worker_info() is not None:
            pixels = torch.stack([*pixels])  # one tensor to send to the rank's process
        return {**batch, "pixels": pixels}

    def _pixels(self, draw: Draw) -> torch.Tensor:
        image = draw.image or self.examples.resized(draw.row)
        return crop(image, draw.corner, draw.mirrored, self.examples.settings.resolution)

    def begin_epoch(self, epoch: int, skipped: int = 0) -> None:
        """What the loader fetches next belongs to this epoch. Of the first batches make all random draws, but load no
        pixels and no tokens."""
        if isinstance(self.examples, ImageStream):
            self.examples.epoch = epoch
        self._skipped, self._fetched = skipped, 0

    def _is_skipped(self) -> bool:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return self._fetched * workers + number < self._skipped  # the workers fetch in turn
