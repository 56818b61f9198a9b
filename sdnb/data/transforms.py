"""From a PIL image to pixels: the arithmetic of torchvision's transforms on PIL images, and their random draws."""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image


def crop(image: Image.Image, corner: tuple[int, int] | None, mirrored: bool, side: int) -> torch.Tensor:
    """The square of a resized image at a corner (left, top; None: in the middle): uint8 [3, side, side]."""
    left, top = corner or centre(image.size, side)
    image = image.crop((left, top, left + side, top + side))
    return _pixels_uint8(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def resize(image: Image.Image, side: int, mode: str = "bilinear") -> Image.Image:
    """The image with its shorter side resized to `side`, interpolated as torchvision does on PIL images."""
    if min(image.size) == side:
        return image
    return image.resize(size_after_resize(image.size, side), getattr(Image.Resampling, mode.partition("_")[0].upper()))


def size_after_resize(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of an image after `resize`."""
    width, height = size
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def draw_corner(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A random place, left and top, to crop an image of this width and height. It uses torch's global generator in
    torchvision's order, which draws nothing if there is only one place."""
    width, height = size
    if (width, height) == (side, side):
        return 0, 0
    top = int(torch.randint(0, height - side + 1, size=(1,)))
    left = int(torch.randint(0, width - side + 1, size=(1,)))
    return left, top


def draw_mirrored() -> bool:
    """Whether an image is mirrored. Drawn after its corner, with torch's global generator, as in torchvision."""
    return bool(torch.rand(1) < 0.5)


def centre(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Left and top of the square in the middle, rounded as in torchvision."""
    return round((size[0] - side) / 2), round((size[1] - side) / 2)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image as float32 [3, height, width] in [-1, 1]."""
    return normalize(_pixels_uint8(image))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape to float32 in [-1, 1], to the bit as torchvision's ToTensor and Normalize(0.5, 0.5) compute it
    on a CPU. It is a table on any device, because other devices divide in another way."""
    return _normalized_values(pixels.device).take(pixels.long())


@lru_cache
def _normalized_values(device: torch.device) -> torch.Tensor:
    return torch.arange(256).float().div(255).sub(0.5).div(0.5).to(device)


def _pixels_uint8(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
