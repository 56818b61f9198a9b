"""An executed notebook as one HTML page that needs nothing else: `python -m sdnb.report out.ipynb`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter

from . import __version__
from .errors import RunError, SdnbError
from .metrics import RESULTS_MIME

HEADLINE = ("images/s per", "nominal IPS", "seconds per step", "final loss", "target", "total time")


# A token of the hub, and what a cell assigns to the setting for one, as they stand in a notebook's JSON.
_SECRETS = re.compile(r"""\bhf_\w{8,}|(?<=hub_token)(\s*=\s*)(\\?["'])(?:(?!\2).)+\2""")


def redacted(text: str) -> str:
    """A notebook's text without the tokens that stand in it."""
    return _SECRETS.sub(lambda found: f"{found[1]}{found[2]}…{found[2]}" if found[1] else "…", text)


def results(notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """The rows of the results table that an executed notebook shows; none where it did not get that far."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if RESULTS_MIME in output.get("data", {}):
                return output.data[RESULTS_MIME]
    return []


def write(notebook_path: str | Path, page_path: str | Path | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """Write the page of an executed notebook, beside it unless `page_path` says where.

    Returns:
        Where the page is, and the headline results.

    Raises:
        RunError: if the notebook is not there, is none, or has not been executed.
    """
    source = Path(notebook_path)
    target = Path(page_path) if page_path else source.with_suffix(".html")
    if target.resolve() == source.resolve():
        raise RunError(f"{target}: is the notebook itself; give the page another name")
    try:
        notebook = nbformat.reads(redacted(source.read_text()), as_version=4)
    except OSError as error:
        raise RunError(f"{source}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a file can fail to be a notebook in many ways
        raise RunError(f"{source}: is no notebook: {str(error).partition(chr(10))[0]}") from None
    if not any(cell.get("outputs") for cell in notebook.cells):
        raise RunError(f"{source}: has not been executed: run it first, for example with papermill")
    headline = [row for row in results(notebook) if row["name"].startswith(HEADLINE)]
    # nbconvert's own templates load scripts from the network; ours loads nothing.
    exporter = HTMLExporter(
        template_name="report_template",
        extra_template_basedirs=[str(Path(__file__).parent)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    page, _ = exporter.from_notebook_node(
        notebook,
        resources={
            "title": f"sdnb report: {source.resolve().parent.name}/{source.name}",
            "headline": headline,
            "version": __version__,
            "source": source.name,
        },
    )
    try:
        target.write_text(page)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target, headline


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sdnb.report", description=__doc__)
    parser.add_argument("notebook", help="an executed notebook")
    parser.add_argument("page", nargs="?", help="the page to write; left out, beside the notebook")
    arguments = parser.parse_args()
    try:
        write_and_say(arguments.notebook, arguments.page)
    except SdnbError as error:
        sys.exit(f"error: {error}")


def write_and_say(notebook: str, page: str | None = None) -> None:
    """Write the page, and print the headline results and where it is."""
    written, headline = write(notebook, page)
    for row in headline:
        print(f"{row['name']:<24}{row['text']}")
    print(f"report: {written.resolve()}")


if __name__ == "__main__":
    main()
