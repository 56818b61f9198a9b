"""Executes cells of the notebooks that come with sdnb in this process: so the page of a run, however it was started, is
that of its notebook."""

import ast
import base64
from typing import Any

import nbformat
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_output

from sdnb.errors import SdnbError
from sdnb.places import shipped

GIVEN = {"parameters", "launch"}  # tags of cells that make what is given here


def executed(name: str, given: dict[str, Any]) -> nbformat.NotebookNode:
    """A notebook that comes with sdnb, with the outputs that its cells have for these names. The cells that make them
    are left out. A cell that cannot show its part of an incomplete run has no output."""
    notebook = nbformat.read(shipped(f"notebooks/{name}.ipynb"), as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not GIVEN & {*cell.metadata.get("tags", ())}]
    names = dict(given)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            try:
                value = _value_of(cell.source, names)
            except SdnbError:
                continue
            if value is not None:
                data, metadata = DisplayFormatter().format(value)
                data = {kind: _text(content) for kind, content in data.items()}
                cell.outputs = [new_output("execute_result", data, metadata=metadata)]
    return notebook


def _value_of(source: str, names: dict[str, Any]) -> Any:
    """Execute a cell. Returns the value of its last line, as a notebook shows it."""
    cell = ast.parse(source)
    last = cell.body.pop() if cell.body and isinstance(cell.body[-1], ast.Expr) else None
    exec(compile(cell, "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None


def _text(content: Any) -> Any:
    return base64.b64encode(content).decode() if isinstance(content, bytes) else content
