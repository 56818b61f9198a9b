"""A run, or an executed notebook, as one self-contained HTML page: `sdnb report`. The page has the notebook's sections
in order; that of a run folder has those of train.ipynb. Sections tagged `appendix` come last; cells tagged
`not-in-report` are left out. At the end are the settings, the machine and the commands, from the output of type
`PAGE_MIME`. The page loads nothing from a network, and its content security policy forbids it."""

import base64
import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from traitlets.config import Config

from sdnb.errors import RunError
from sdnb.figures.chart import CHART_MIME
from sdnb.machine.environment import version_of
from sdnb.metrics.results import PAGE_MIME, RESULTS_MIME
from sdnb.report.export import export
from sdnb.report.in_process import executed
from sdnb.report.redaction import Redaction
from sdnb.report.run import Run
from sdnb.report.sanitizer import clean
from sdnb.run import files
from sdnb.run.repeats import REPEATS, repeats_in

# Of an output's types, the first of these is shown.
SHOWN = [
    CHART_MIME, "text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain",
]  # fmt: skip
HEADLINE = (
    "images/s per", "spread", "nominal IPS", "seconds per step", "final loss", "held-out loss", "peak memory", "total",
)  # fmt: skip


def shown(notebook: nbformat.NotebookNode, mime: str) -> Any:
    """The last output of a type in an executed notebook; None if there is none."""
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    return next((one[mime] for one in reversed(data) if mime in one), None)


def results(notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """The rows of the results table in an executed notebook; empty if there is none."""
    return shown(notebook, RESULTS_MIME) or []


def write_page(
    source: str | Path, page_path: str | Path | None = None, besides: dict[str, Any] | None = None,
    notebook: nbformat.NotebookNode | None = None,
) -> tuple[Path, list[dict[str, Any]], str]:  # fmt: skip
    """Write the page of an executed notebook or of a run folder, by default beside or in it, with the name of the run
    that it shows, if it shows one. `besides` replaces parts of what the notebook says about its page, such as `title`
    and `reproduce`. `notebook`: what to show, if `source` is only the folder where the page goes. Returns the page's
    path, the headline results, and what is wrong, see `problem_of`. Raises RunError if there is no such run, or the
    file is missing, is no notebook, or has not been executed."""
    source, redaction = Path(source), Redaction()
    try:
        notebook = redaction.node(notebook or _read(source))
        about = {**(shown(notebook, PAGE_MIME) or {}), **redaction.node(besides or {})}
        problem = problem_of(notebook, about)
        name = re.sub(r"[^\w.,=+-]+", "-", about.get("name") or "").strip("-.") or source.stem
        chosen = (row for row in results(notebook) if row["name"].startswith(HEADLINE) and row["value"] is not None)
        headline = about.get("headline") or [*chosen]
        page = _page(notebook, about, [*map(_tile, headline)], source, redaction)
    except RunError:
        raise
    except Exception as error:  # a cell or an output that is not what a notebook may have
        raise RunError(f"{source}: cannot be shown: {_first_line(error)}") from error
    beside = source if source.is_dir() else source.parent
    target = Path(page_path) if page_path else beside / f"{name}.html"
    if target.resolve() == source.resolve():
        raise RunError(f"{target}: this is the notebook; give the page another name")
    files.write_text(target, page.encode(errors="replace").decode())
    return target, headline, problem


def _tile(row: dict[str, Any]) -> dict[str, str]:
    """A headline result: the number, and small beside it its unit and interval."""
    text, unit, interval = row["text"], row.get("unit") or "", ""
    if estimate := re.fullmatch(r"(\S+) \((.+ to .+)\)", text):
        text, interval = estimate.groups()
    number = text.removesuffix(f" {unit}")
    if re.search("[a-z]", number) and row.get("value") is not None:  # more than a number
        number = f"{row['value']:.3g}"
    return {
        "name": row["name"], "number": number, "interval": interval,
        "interval_name": "slowest to fastest" if "median of" in row["name"] else "95 % interval",
        "unit": "" if row["name"].startswith(unit) else unit,
    }  # fmt: skip


def export_of(source: str | Path, kind: str) -> str:
    """The results of an executed notebook or a run folder as `markdown`, `json` or `csv`, without secrets. Raises
    RunError as `write_page` does."""
    notebook = Redaction().node(_read(Path(source)))
    return export(kind, shown(notebook, PAGE_MIME) or {}, results(notebook))


def _read(source: Path) -> nbformat.NotebookNode:
    if source.is_dir():
        repeats = repeats_in(source) if (source / REPEATS).exists() else None
        return executed("train", {"run": Run(repeats.middle.folder if repeats else source)})
    if source.exists() and not source.is_file():
        raise RunError(f"{source}: is not a file")
    try:
        notebook = nbformat.reads(source.read_text(encoding="utf-8-sig"), as_version=4)
    except OSError as error:
        raise RunError(f"{source}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # nbformat raises many types
        raise RunError(f"{source}: is not a notebook: {_first_line(error)}") from None
    if not any(cell.get("outputs") for cell in notebook.cells):
        raise RunError(f"{source}: has no outputs: execute it first, for example with papermill")
    return notebook


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _page(
    notebook: nbformat.NotebookNode, about: dict[str, Any], headline: list[dict[str, str]], source: Path,
    redaction: Redaction,
) -> str:  # fmt: skip
    here = Path(__file__).parent
    script = (here / "template" / "sort.js").read_text()
    title, problem = about.get("title") or redaction.text(_title(notebook, source)), problem_of(notebook, about)
    resources = dict(
        about=about, title=f"{problem}: {title}" if problem else title, headline=headline,
        chart_mime=CHART_MIME, source=redaction.text(source.name), version=version_of("sdnb"), script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    resources["redacted"] = str(redaction)
    notebook.cells = _arranged(notebook.cells)
    resources["sections"] = [
        cell.source.partition("\n")[0][3:].strip()
        for cell in notebook.cells if cell.cell_type == "markdown" and cell.source.startswith("## ")
    ]  # fmt: skip
    notebook.metadata.pop("widgets", None)  # they need scripts, and Colab saves them without what nbconvert expects
    # nbconvert's own templates load scripts from the network.
    options = dict(exclude_input_prompt=True, exclude_output_prompt=True, sanitize_html=True)
    kinds = {"NbConvertBase": {"display_data_priority": SHOWN}}
    exporter = HTMLExporter(Config(kinds), template_name="template", extra_template_basedirs=[str(here)], **options)
    exporter.register_filter("clean_html", clean)
    return exporter.from_notebook_node(notebook, resources=resources)[0]


def problem_of(notebook: nbformat.NotebookNode, about: dict[str, Any]) -> str:
    """Whether an executed notebook has `failed`, or was `not completed`, or the run that it shows is `running`, or was
    `interrupted`; empty if all is complete."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    expected = [cell for cell in code if "raises-exception" in _tags(cell)]
    errors = [one for cell in code if cell not in expected for one in cell.outputs if one.output_type == "error"]
    if errors or notebook.metadata.get("papermill", {}).get("exception"):
        return "failed"
    left = [cell for cell in code if cell.metadata.get("papermill", {}).get("status") in ("pending", "running")]
    if left:
        return "not completed"
    return "" if about.get("state") == "complete" else about.get("state", "")


def _title(notebook: nbformat.NotebookNode, source: Path) -> str:
    """The title of a page without a run: the notebook's heading, and its file."""
    texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = next((text.partition("\n")[0][2:].strip() for text in texts if text.startswith("# ")), None)
    return f"{heading}: {source.stem}" if heading else f"{source.resolve().parent.name}/{source.name}"


def _arranged(cells: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    sections: list[list[nbformat.NotebookNode]] = [[]]
    for cell in cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            sections.append([])
        sections[-1].append(cell)
    later = [section for section in sections if section and "appendix" in _tags(section[0])]
    first = [section for section in sections if section not in later and not _is_empty(section)]
    return _folded([cell for section in (*first, *later) for cell in section if _is_shown(cell)])


def _is_shown(cell: nbformat.NotebookNode) -> bool:
    return "not-in-report" not in _tags(cell) or any(one.output_type == "error" for one in cell.get("outputs", ()))


def _is_empty(section: Sequence[nbformat.NotebookNode]) -> bool:
    """Whether a section has code but no output, such as the images of a run that drew none."""
    code = [cell for cell in section if cell.cell_type == "code"]
    return bool(code) and section[0].cell_type == "markdown" and not any(cell.outputs for cell in code)


def _folded(cells: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins the code of a cell without output to the next cell with output."""
    folded, silent = [], None
    for cell in cells:
        if cell.cell_type == "code":
            if silent:
                cell.source = f"{silent.source}\n\n{cell.source}"
            silent = None if cell.outputs else cell
        if cell is not silent:
            folded.append(cell)
    return [*folded, silent] if silent else folded


def _tags(cell: nbformat.NotebookNode) -> Sequence[str]:
    return cell.metadata.get("tags", ())


def write_and_print(source: str, page: str | None = None) -> None:
    """Write the page, and print the headline results and the page's path. Ends with exit status 1 if the run or the
    notebook failed or was not completed."""
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)  # what is wrong with a notebook is said in one line
    written, headline, problem = write_page(source, page)
    width = max((len(row["name"]) for row in headline), default=0)
    for row in headline:
        print(f"{row['name']:<{width}}  {row['text']}")
    print(f"report: {written.resolve()}")
    if problem:
        sys.exit(f"error: {source}: {problem}, as the page's title says")
