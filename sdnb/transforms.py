"""From a picture to what is trained on: the arithmetic of torchvision's transforms on PIL pictures, and their draws."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from .config import TrainConfig


def transform(picture: Image.Image, config: TrainConfig) -> torch.Tensor:
    """A picture as the reference's torchvision transforms make it: shorter side to the resolution, square crop, random
    mirroring, float32 [3, resolution, resolution] in [-1, 1]."""
    picture = resize(picture, config.resolution, config.image_interpolation_mode)
    return cut(picture, draw_view(picture.size, config), config)


def cut(picture: Image.Image, view: tuple[int, int, bool], config: TrainConfig) -> torch.Tensor:
    """The square at left and top of a resized picture, mirrored or not; of the shape and range of `transform`."""
    left, top, mirrored = view
    picture = picture.crop((left, top, left + config.resolution, top + config.resolution))
    return to_tensor(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture)


def resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The width and height that make the shorter one `side`."""
    width, height = size
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def resize(picture: Image.Image, side: int, mode: str = "bilinear") -> Image.Image:
    """The picture with its shorter side of that length, interpolated as torchvision does it on PIL pictures."""
    if min(picture.size) == side:
        return picture
    return picture.resize(resized(picture.size, side), getattr(Image.Resampling, mode.partition("_")[0].upper()))


def draw_view(size: tuple[int, int], config: TrainConfig) -> tuple[int, int, bool]:
    """Where a picture of this width and height is cropped, left and top, and whether it is mirrored; with torch's
    global generator, in torchvision's order, which draws no place where there is but one."""
    (width, height), side = size, config.resolution
    if config.center_crop:
        left, top = centre(size, side)
    elif (width, height) == (side, side):
        left = top = 0
    else:
        top = int(torch.randint(0, height - side + 1, size=(1,)))
        left = int(torch.randint(0, width - side + 1, size=(1,)))
    return left, top, config.random_flip and bool(torch.rand(1) < 0.5)


def centre(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Left and top of the square in the middle, rounded as torchvision rounds them."""
    return round((size[0] - side) / 2), round((size[1] - side) / 2)


def to_tensor(picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return pixels.float().div(255).sub(0.5).div(0.5)
