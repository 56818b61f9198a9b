"""An executed notebook as one self-contained HTML page: `sdnb report out.ipynb`. The page has the notebook's
sections in order. Sections tagged `appendix` come last; cells tagged `not-in-report` are left out. At the end are the
settings, the machine and the commands, from the output of type `PAGE_MIME`. The page loads nothing from a network, and
its content security policy forbids it."""

import base64
import getpass
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter

from sdnb.errors import RunError
from sdnb.machine.environment import version_of
from sdnb.metrics.results import PAGE_MIME, RESULTS_MIME

HEADLINE = ("images/s per", "nominal IPS", "seconds per step", "final loss", "target", "total time")

# Tokens of the hub and other services, and values assigned to names of tokens and passwords.
_SECRETS = re.compile(
    r"""(?i)\b(?:hf_|sk-|gh[pousr]_)\w{8,}|((?:_token|api_key|password)["']?\s*[=:]\s*)(\\?["'])(?:(?!\2).)+\2"""
)
_HOME = re.escape(str(Path.home()).rstrip("/") or "/root")  # the home is / in some containers
_HOMES = re.compile(rf"(?:/home/[\w.-]+|/Users/[\w.-]+|/root|{_HOME})(?![\w-])")


def redacted(text: str) -> str:
    """A text without tokens. Home folders become ~, and the user's name becomes … in other paths."""
    text = _SECRETS.sub(lambda found: f"{found[1]}{found[2]}…{found[2]}" if found[1] else "…", text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # some containers have a user without a name
        user = Path.home().name or "root"
    return re.sub(rf"(?<=/){re.escape(user)}(?![\w-])", "…", _HOMES.sub("~", text))


def _redacted(node: Any) -> Any:
    if isinstance(node, str):
        return redacted(node)
    if isinstance(node, list):
        return [_redacted(one) for one in node]
    if isinstance(node, dict):  # images are base64, which may look like a token
        return type(node)({key: one if key.startswith("image/") else _redacted(one) for key, one in node.items()})
    return node


def shown(notebook: nbformat.NotebookNode, mime: str) -> Any:
    """The last output of a type in an executed notebook; None if there is none."""
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    return next((one[mime] for one in reversed(data) if mime in one), None)


def results(notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """The rows of the results table in an executed notebook; empty if there is none."""
    return shown(notebook, RESULTS_MIME) or []


def write_page(
    notebook_path: str | Path, page_path: str | Path | None = None, besides: dict[str, Any] | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """Write the page of an executed notebook, by default beside it, with the name of the run that it shows, if it shows
    one. `besides` replaces parts of what the notebook says about its page, such as `title` and `reproduce`. Returns the
    page's path, and the headline results. Raises RunError if the file is missing, is no notebook, or has not been
    executed."""
    source = Path(notebook_path)
    try:
        notebook = _redacted(nbformat.reads(source.read_text(), as_version=4))
    except OSError as error:
        raise RunError(f"{source}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # nbformat raises many types
        raise RunError(f"{source}: is not a notebook: {str(error).partition(chr(10))[0]}") from None
    if not any(cell.get("outputs") for cell in notebook.cells):
        raise RunError(f"{source}: has no outputs: execute it first, for example with papermill")
    about = {**(shown(notebook, PAGE_MIME) or {}), **_redacted(besides or {})}
    name = re.sub(r"[^\w.,=+-]+", "-", about.get("name") or "").strip("-.") or source.stem
    target = Path(page_path) if page_path else source.with_name(f"{name}.html")
    if target.resolve() == source.resolve():
        raise RunError(f"{target}: this is the notebook; give the page another name")
    headline = about.get("headline") or [row for row in results(notebook) if row["name"].startswith(HEADLINE)]
    here = Path(__file__).parent
    script = (here / "template" / "sort.js").read_text()
    resources = dict(
        about=about, title=about.get("title") or _title(notebook, source), headline=headline, source=source.name,
        version=version_of("sdnb"), script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    notebook.cells = _arranged(notebook.cells)
    # nbconvert's own templates load scripts from the network.
    no_prompts = dict(exclude_input_prompt=True, exclude_output_prompt=True)
    exporter = HTMLExporter(template_name="template", extra_template_basedirs=[str(here)], **no_prompts)
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    try:
        target.write_text(page)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target, headline


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
    return _folded([cell for section in (*first, *later) for cell in section if "not-in-report" not in _tags(cell)])


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


def write_and_print(notebook: str, page: str | None = None) -> None:
    """Write the page, and print the headline results and the page's path."""
    written, headline = write_page(notebook, page)
    for row in headline:
        print(f"{row['name']:<24}{row['text']}")
    print(f"report: {written.resolve()}")
