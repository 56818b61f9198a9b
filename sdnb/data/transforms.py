"""From a picture to what is trained on: the arithmetic of torchvision's transforms on PIL pictures, and their draws."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from sdnb.settings.config import TrainConfig


def cut(picture: Image.Image, corner: tuple[int, int], mirrored: bool, side: int) -> torch.Tensor:
    """The square with this corner, left and top, of a resized picture, mirrored or not: uint8 [3, side, side]."""
    left, top = corner
    picture = picture.crop((left, top, left + side, top + side))
    return _levels(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture)


def resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The width and height that make the shorter one `side`."""
    width, height = size
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def resize(picture: Image.Image, side: int, mode: str = "bilinear") -> Image.Image:
    """The picture with its shorter side of that length, interpolated as torchvision does it on PIL pictures."""
    if min(picture.size) == side:
        return picture
    return picture.resize(resized(picture.size, side), getattr(Image.Resampling, mode.partition("_")[0].upper()))


def draw_corner(size: tuple[int, int], config: TrainConfig) -> tuple[int, int]:
    """Where a picture of this width and height is cropped, left and top; with torch's global generator, in
    torchvision's order, which draws no place where there is but one."""
    (width, height), side = size, config.resolution
    if (width, height) == (side, side):
        return 0, 0
    top = int(torch.randint(0, height - side + 1, size=(1,)))
    left = int(torch.randint(0, width - side + 1, size=(1,)))
    return left, top


def draw_mirrored(config: TrainConfig) -> bool:
    """Whether a picture is mirrored; drawn after its corner, with torch's global generator, as torchvision does it."""
    return config.random_flip and bool(torch.rand(1) < 0.5)


def centre(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Left and top of the square in the middle, rounded as torchvision rounds them."""
    return round((size[0] - side) / 2), round((size[1] - side) / 2)


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """A picture as float32 [3, height, width] in [-1, 1]."""
    return normalize(_levels(picture))


def normalize(levels: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape to float32 in [-1, 1], to the bit as torchvision's ToTensor and Normalize(0.5, 0.5) give it on
    a CPU: looked up on any device, because others divide in another way."""
    return _values(levels.device).take(levels.long())


@lru_cache
def _values(device: torch.device) -> torch.Tensor:
    return torch.arange(256).float().div(255).sub(0.5).div(0.5).to(device)


def _levels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())
