"""The look of all figures: a title, and a caption with the number that matters."""

import base64
import copy
import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from PIL import Image

from sdnb.figures.colours import INK, RED, SOFT

WIDTH = 8.7  # inches: the width of a page, and of a JupyterLab cell beside the file browser
NARROW = 3.9  # of a phone
CHART_MIME = "application/vnd.sdnb.chart+json"  # for a page, which writes title and caption as text
_MOST_POINTS = 2000  # drawn as shapes; more become a bitmap


class Chart(Figure):
    """A figure with a text description, `alt`. A notebook shows it as SVG and as PNG. A page has two SVGs of it, for
    wide and for narrow windows: in a narrow one, panels are below each other if `stacks`."""

    def __init__(
        self, title: str, caption: str, height: float, width: float = WIDTH, stacks: bool = False
    ) -> None:  # fmt: skip
        super().__init__(figsize=(width, height), layout="constrained", dpi=110)
        self.title, self.caption, self.alt, self.stacks = title, caption, f"{title}. {caption}", stacks
        self.named: list[tuple[Axes, list[tuple[float, float, str]]]] = []
        words = dict(x=0.01, ha="left", parse_math=False)
        self.words = (
            self.suptitle(textwrap.fill(title, round(9 * width)), fontweight="bold", color=INK, **words),
            self.supxlabel(textwrap.fill(caption, round(13.1 * width)), fontsize=9, color=SOFT, **words),
        )

    def panels(self, rows: int = 1, columns: int = 1, **options: Any) -> np.ndarray:
        """Axes [rows, columns]."""
        grid = self.subplots(rows, columns, squeeze=False, **options)
        for axes in grid.flat:
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(SOFT)
            axes.tick_params(color=SOFT, labelcolor=INK)
            for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
                label.set_color(INK)
        return grid

    def panel(self) -> Axes:
        return self.panels()[0, 0]

    def svg(self) -> str:
        """An SVG element that needs no fonts. The CSS variables --ink and --soft set its ink."""
        drawn = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": self.alt}):
            no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.savefig(drawn, format="svg", transparent=True, metadata=no_metadata)
        svg = drawn.getvalue()
        return svg[svg.index("<svg") :].replace(INK, f"var(--ink, {INK})").replace(SOFT, f"var(--soft, {SOFT})")

    def for_page(self) -> dict[str, str]:
        """Title, caption, and the SVGs without them. The chart is narrow afterwards."""
        for text in self.words:
            text.set_visible(False)
            text.set_in_layout(False)
        wide = self.svg()
        width, height = self.get_size_inches()
        if self.stacks:
            grid = GridSpec(len(self.axes), 1, figure=self)
            for axes, place in zip(self.axes, grid):
                axes.set_subplotspec(place)
            height *= len(self.axes)
        elif any(axes.images for axes in self.axes):
            height *= NARROW / width
        self.set_size_inches(NARROW, height)
        for axes in self.axes:
            axes.tick_params(labelsize=8)
            columns = axes.get_gridspec().ncols
            wrapped = textwrap.fill(" ".join(axes.get_title().split()), round(55 / columns))
            axes.set_title(wrapped, fontsize=7, parse_math=False)
            if axes.images:
                axes.yaxis.label.set_fontsize(7)
        named, self.named = self.named, []
        for axes, points in named:  # the places are others now
            for text in axes.texts:
                text.set_visible(text.get_visible() and not isinstance(text, Annotation))
            if points:
                name_points(axes, *zip(*points))
        return {"title": self.title, "caption": self.caption, "alt": self.alt, "wide": wide, "narrow": self.svg()}

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        drawn = io.BytesIO()
        self.savefig(drawn, format="png")
        png = base64.b64encode(drawn.getvalue()).decode()
        data = {"text/plain": self.alt, "image/svg+xml": self.svg(), "image/png": png}
        data[CHART_MIME] = copy.deepcopy(self).for_page()
        # JupyterLab then shows a transparent figure on a light background
        about = {"alt": self.alt, "needs_background": "light"}
        return data, {"image/svg+xml": about, "image/png": about}


def legend(axes: Axes, **options: Any) -> None:
    """The legend, without a frame."""
    axes.legend(**{"frameon": False, "labelcolor": INK, "fontsize": 9, **options})


def dots(axes: Axes, x: Any, y: Any, marker: str = "o", **options: Any) -> None:
    """Points without a line. Thousands of them become a bitmap, so that a page stays small."""
    axes.plot(x, y, marker, rasterized=len(x) > _MOST_POINTS, **options)


def name_points(axes: Axes, x: Iterable[float], y: Iterable[float], names: Iterable[str]) -> None:
    """A name beside each point. It moves up or down if it would cover an earlier one, and is dropped if nothing helps.
    The axes must have their final limits."""
    points = [*zip(x, y, names)]
    axes.figure.named.append((axes, points))
    axes.figure.draw_without_rendering()  # fixes the layout, and so the names' positions
    taken: list[Bbox] = []
    for one_x, one_y, name in points:
        left = one_x > np.quantile(axes.get_xlim(), 0.7)
        text = axes.annotate(
            name, (one_x, one_y), (0, 0), textcoords="offset points", ha="right" if left else "left", va="center",
            fontsize=8, color=RED,
        )  # fmt: skip
        for lines in (0, 1, -1, 2, -2):
            text.set_position((-6 if left else 6, 10 * lines))
            place = text.get_window_extent()
            if not any(place.overlaps(other) for other in taken):
                taken.append(place)
                break
        else:
            text.remove()


def grid_of(
    images: Sequence[Sequence[Image.Image | None]], title: str, caption: str, columns: Sequence[str],
    rows: Sequence[str] = ("",),
) -> Chart:  # fmt: skip
    """Images in rows and columns, with names; long names are cut. None is an empty place."""
    side = min(2.2, WIDTH / len(columns))
    chart = Chart(title, caption, (side + 0.25) * len(rows) + 0.5, width=max(side * len(columns), 5))
    named = f" Rows: {', '.join(rows)}." if any(rows) else ""
    chart.alt += f" Columns: {', '.join(columns)}.{named}"
    grid = chart.panels(len(rows), len(columns))
    for axes_row, images_row, label in zip(grid, images, rows):
        axes_row[0].set_ylabel(textwrap.fill(label, round(10 * side)), parse_math=False)
        for axes, image in zip(axes_row, images_row):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if image is not None:
                axes.imshow(image, interpolation="nearest")
    for axes, text in zip(grid[0], columns):
        shown = textwrap.fill(textwrap.shorten(text, 48, placeholder=" …"), round(10 * side))
        axes.set_title(shown, fontsize=9, parse_math=False)
    return chart
