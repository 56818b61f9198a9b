"""Notebooks executed as a user executes them."""

import subprocess
import sys

from processes import ROOT


def papermill(out, *arguments, cwd=ROOT, notebook="notebooks/train.ipynb", env=None):
    command = [sys.executable, "-m", "papermill", notebook, str(out), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=250)


def outputs(notebook, kind):
    every = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return [output.data[kind] for output in every if kind in output.get("data", {})]
