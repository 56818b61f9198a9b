"""What a training step gets of the examples: random draws, pixels and tokens, in micro-batches."""

import random
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image

from sdnb.data.image_captions import ImageCaptions, tokenize
from sdnb.data.transforms import crop, draw_corner, draw_mirrored


class Draw(NamedTuple):
    """What is drawn for an example in one epoch. `corner` is the left and top of the crop, None for the centre;
    `caption` is one of several. `image` is the resized image, if it had to be loaded to draw the corner."""

    row: int
    corner: tuple[int, int] | None
    mirrored: bool
    caption: str
    image: Image.Image | None


class TrainingSet(torch.utils.data.Dataset):
    """A dataset for torch's DataLoader. An item is a `Draw`: crop and mirroring come from torch's global generator, as
    in torchvision's transforms, and one of several captions from Python's `random`. `collate` makes a micro-batch of
    several items, and starts to load their pixels."""

    def __init__(
        self, examples: ImageCaptions, tokenizer: Any, cached: Container[int] | None = None, threads: int = 0
    ) -> None:
        """`cached` are the views whose encoding is cached: they need no pixels, and their crop is the centre. As many
        `threads` load the images; 0: the caller's own. With a fixed crop they load while the step runs."""
        self.examples, self.tokenizer, self._cached = examples, tokenizer, cached
        self._map: Callable[..., Iterable[Any]] = ThreadPoolExecutor(threads, "images").map if threads else map
        if cached is not None:
            self._caption_numbers = {caption: number for number, caption in enumerate(examples.distinct_captions)}
        self.skip_batches(0)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> Draw:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[Draw]:  # torch's loader asks for a micro-batch at once
        settings, draws = self.examples.settings, []
        images = [None] * len(rows) if settings.center_crop else self._map(self.examples.resized, rows)
        for row, image in zip(rows, images):
            corner = draw_corner(image.size, settings.resolution) if image else None
            mirrored = settings.random_flip and draw_mirrored()
            captions = self.examples.captions[row]
            caption = captions if isinstance(captions, str) else random.choice(captions)
            draws.append(Draw(row, corner, mirrored, caption, image))
        return draws

    def collate(self, draws: list[Draw]) -> dict[str, Any]:
        """A micro-batch: `pixels`, an iterable of uint8 [3, resolution, resolution], and `input_ids`, int64 [batch,
        tokens].

        Where encodings are cached: the numbers of `views` and `captions`, and `pixels` of the views in `loaded` only.
        Of a batch that is skipped: nothing.
        """
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        batch_number = self._fetched * workers + number  # the workers fetch in turn
        self._fetched += 1
        if batch_number < self._skipped:
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
        if to_load and worker is not None:
            pixels = torch.stack([*pixels])  # one tensor to send to the rank's process
        return {**batch, "pixels": pixels}

    def _pixels(self, draw: Draw) -> torch.Tensor:
        image = draw.image or self.examples.resized(draw.row)
        return crop(image, draw.corner, draw.mirrored, self.examples.settings.resolution)

    def skip_batches(self, batches: int) -> None:
        """In the loader's next epoch, make all random draws of the first batches, but load no pixels and no tokens."""
        self._skipped, self._fetched = batches, 0
