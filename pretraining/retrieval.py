"""Does the model draw what a caption says? A measure for the embedded model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdnb.data.image_captions import ImageCaptions, first_caption
from sdnb.data.transforms import to_tensor
from sdnb.figures.chart import Chart, grid_of
from sdnb.training.evaluation import INFERENCE_STEPS

_DRAWN_TOGETHER = 25
_GUIDANCE_SCALE = 3.0


def retrieval(
    pipeline: StableDiffusionPipeline, examples: ImageCaptions, count: int = 100
) -> tuple[float, list[tuple[str, Image.Image, Image.Image]]]:
    """Measure how often the drawing of a caption is nearer to the caption's own image than to nine other images. Chance
    is 0.1. Nearness is the cosine of the images after they are shrunk to 16×16 and their mean is subtracted.

    Args:
        count: the largest number of captions, chosen at random. There must be at least ten.

    Returns:
        The share, and each caption with its image and its drawing.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(examples), generator=generator)[:count].tolist()
    count = len(rows)
    pipeline.set_progress_bar_config(disable=True)
    captions = [first_caption(examples.captions[row]) for row in rows]
    own, side = torch.stack([examples.pixels(row) for row in rows]), examples.settings.resolution
    drawn: list[Image.Image] = []
    for start in range(0, count, _DRAWN_TOGETHER):
        drawn += pipeline(
            captions[start : start + _DRAWN_TOGETHER], height=side, width=side, guidance_scale=_GUIDANCE_SCALE,
            num_inference_steps=INFERENCE_STEPS, generator=generator,
        ).images  # fmt: skip
    small, small_drawn = (
        F.adaptive_avg_pool2d(images, 16).flatten(1) for images in (own, torch.stack([*map(to_tensor, drawn)]))
    )
    mean = small.mean(0)
    likeness = F.normalize(small_drawn - mean) @ F.normalize(small - mean).T
    hits = 0
    for row in range(count):
        others = torch.randperm(count - 1, generator=generator)[:9]
        others += others >= row
        hits += bool(likeness[row, row] > likeness[row, others].max())
    images = [examples.image(row) for row in rows]
    return hits / count, list(zip(captions, images, drawn))


def retrieved(share: float, drawn: Sequence[tuple[str, Image.Image, Image.Image]]) -> Chart:
    """A figure of some drawings from `retrieval`, each below the image of its caption."""
    captions, images, drawings = zip(*drawn)
    text = f"{share:.0%} of the drawings are nearer to their own image than to nine others; chance is 10 %."
    return grid_of([list(images), list(drawings)], "Captions drawn again", text, columns=captions,
                   rows=["image", "drawn"])  # fmt: skip
