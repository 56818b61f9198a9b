"""Shows the steps of a training that papermill runs: `papermill --engine sdnb notebooks/train.ipynb out.ipynb`. Its own
bar counts cells, and so stands still during a training."""

import re
import shutil
import sys
import time
from typing import Any

from nbformat import NotebookNode
from papermill.engines import NBClientEngine
from traitlets.config import Config

SECONDS_BETWEEN = 10.0  # where lines cannot be replaced, as in a log file


class Engine(NBClientEngine):
    """papermill's engine, with what will run where, and then one line of progress, on the terminal."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        nb_man.cleanup_pbar()
        autosave, complete, show = nb_man.autosave_cell, nb_man.cell_complete, _Lines()

        def autosave_cell() -> None:  # papermill calls it for each output
            autosave()
            show.progress(nb_man.nb)

        def cell_complete(cell: NotebookNode, cell_index: int | None = None, **more: Any) -> None:
            complete(cell, cell_index, **more)
            show.plan(cell)

        nb_man.autosave_cell, nb_man.cell_complete = autosave_cell, cell_complete
        try:
            # Sockets in files: the kernel warns of a connection over TCP.
            config = Config({"KernelManager": {"transport": "ipc"}})
            return super().execute_managed_notebook(nb_man, kernel_name, config=config, **options)
        finally:
            show.end()


class _Lines:
    def __init__(self) -> None:
        self.replaces, self.shown, self.shown_at = sys.stderr.isatty(), "", 0.0

    def plan(self, cell: NotebookNode) -> None:
        if "plan" in cell.metadata.get("tags", ()):
            print(*_texts(cell), sep="\n", file=sys.stderr, flush=True)

    def progress(self, notebook: NotebookNode) -> None:
        running = (cell for cell in notebook.cells if cell.metadata.get("papermill", {}).get("status") == "running")
        line = next((text for cell in running for text in _texts(cell) if re.search(r"step \d+/\d+ · ", text)), "")
        due = self.replaces or " · complete" in line or time.time() > self.shown_at + SECONDS_BETWEEN
        if line in ("", self.shown) or not due:
            return
        self.shown, self.shown_at = line, time.time()
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{line[:width]}" if self.replaces else line, end="" if self.replaces else "\n", file=sys.stderr,
              flush=True)  # fmt: skip

    def end(self) -> None:
        if self.replaces and self.shown:
            print(file=sys.stderr)


def _texts(cell: NotebookNode) -> list[str]:
    """The outputs of a cell as plain texts."""
    return [one["data"]["text/plain"] for one in cell.get("outputs", ()) if "text/plain" in one.get("data", {})]
