"""The data set for pretraining the embedded model: OpenMoji, with several captions for each image."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from sdnb.data import openmoji

NAME = "openmoji-pretraining"
NEVER_SEEN = 192  # images that were not in the training data of the embedded model
FORMAT = 2  # version of the captions: increase it when they change

# The words for OpenMoji's palette, without the black of its outlines.
_COLOUR_WORDS = {
    "#fcea2b": "yellow", "#f1b31c": "yellow", "#f4aa41": "orange", "#e27022": "orange", "#d22f27": "red",
    "#ea5a47": "red", "#781e32": "dark red", "#ffa7c0": "pink", "#e67a94": "pink", "#8967aa": "purple",
    "#b399c8": "purple", "#92d3f5": "light blue", "#61b2e4": "blue", "#1e50a0": "dark blue", "#b1cc33": "green",
    "#5c9e31": "green", "#186648": "dark green", "#a57939": "brown", "#6a462f": "brown", "#9b9b9a": "grey",
    "#d0cfce": "light grey", "#3f3f3f": "dark grey",
}  # fmt: skip
_MUCH = 0.05  # the share of an image that a colour must fill to be named
_ANY_COLOUR = {"black", "white", *" ".join(_COLOUR_WORDS.values()).split()}
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)


def folder(resolution: int, cache_dir: str | None = None) -> Path:
    """An image folder of all of OpenMoji with `captions`, rendered once and cached. It holds out 192 images, all of
    which the embedded data sets hold out, too."""
    to_train = len(openmoji.named_drawings()) - NEVER_SEEN

    def depict(svg: Path, name: str) -> tuple[Image.Image, list[str]]:
        return openmoji.draw(svg.read_text(), resolution), captions(name, svg)

    return openmoji.rendered_folder(f"{resolution}px-pretraining-{FORMAT}", to_train, depict, cache_dir)


def captions(name: str, svg: Path) -> list[str]:
    """Captions that are true of an image. The name comes first and most often. The others are the name with its
    colours, its style or its kind."""
    found = [name, name, f"{name}, day style"]
    if colours := main_colours(svg.read_text()):
        found.append(f"{name}, {' and '.join(colours)}")
        if not _ANY_COLOUR & set(name.split()):
            found.append(f"{colours[0]} {name}")
    if int(svg.stem.partition("-")[0], 16) in _FLAG_LETTERS:
        found.append(f"flag of {name}")
    return found


def main_colours(svg: str) -> list[str]:
    """The words for the two colours that fill most of a drawing, without outlines. Skips a colour that fills little."""
    side = 48
    words = {bytes.fromhex(colour[1:]): word for colour, word in _COLOUR_WORDS.items()}
    pixels = openmoji.draw(svg, side).tobytes()
    counts: dict[str, int] = {}
    for start in range(0, len(pixels), 3):
        if word := words.get(pixels[start : start + 3]):
            counts[word] = counts.get(word, 0) + 1
    most = sorted(counts, key=lambda word: -counts[word])[:2]
    return [word for word in most if counts[word] >= _MUCH * side * side]
