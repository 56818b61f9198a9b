"""A run, to look at and to go on thinking with: `sdnb.Run(folder)`, and all of them: `sdnb.runs()`."""

from __future__ import annotations

import base64
import html
import io
import json
import shlex
import time
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from sdnb.errors import RunError
from sdnb.figures import run_plots
from sdnb.figures.chart import Chart
from sdnb.machine.environment import PROJECT
from sdnb.metrics.results import PAGE_MIME, Measurements, measure
from sdnb.metrics.step_clock import PHASES
from sdnb.run.folder import CONFIG, SAMPLES, RunFolder

_ON_CARDS = ("images/s per", "nominal IPS", "final loss", "held-out loss", "peak memory")
# In the environment of a run that is a part of another, and of that other, with the part's settings.
PART_OF, PRETRAINING = "part_of", "pretraining"
_THUMBNAIL = 128  # pixels
# Where a run is kept, and what it goes on from, do not make it another one.
_NOT_REPEATED = {"output_dir", "cache_dir", "resume_from_checkpoint", "hub_token", "push_to_hub"}
# The notebooks' parameter cells set these, so a command that repeats a run says them, even where they are defaults.
_IN_THE_NOTEBOOK = {
    "pretrained_model_name_or_path", "dataset_name", "resolution", "center_crop", "random_flip", "train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_warmup_steps", "use_ema", "mixed_precision", "num_processes",
    "seed", "validation_prompts", "validation_loss_steps", "lr_scheduler", "checkpointing_steps",
    "target_loss", "validation_guidance_scale", "snr_gamma",
}  # fmt: skip


class Run(RunFolder):
    """A run by its folder, complete or not. Each property reads the files as they are now.

    Raises:
        RunError: if the folder holds no run; from what needs steps, if there is none yet.
    """

    @property
    def results(self) -> Measurements:
        """The results table: images/s, losses, memory and times; `run.results["final loss"].value` is a number."""
        if self.steps.empty:
            raise RunError(f"{self.folder}: no step has been recorded yet")
        return measure(self)

    @property
    def frame(self) -> pd.DataFrame:
        """The steps as a table of numbers only, a row an optimizer step: what `steps` has, whether it is `short` and
        `steady`, the `running_loss`, and for each phase its time, such as `forward_seconds`."""
        if self.steps.empty:
            return self.steps
        marked = self.results.steps
        phases = pd.DataFrame(list(marked.get("phase_seconds", ())), columns=PHASES).add_suffix("_seconds")
        return marked.drop(columns="phase_seconds", errors="ignore").join(phases).set_index("step")

    def plot_loss(self) -> Chart:
        """The loss of each step, its running mean, and the held-out loss."""
        return run_plots.loss(self.results)

    def plot_step_times(self) -> Chart:
        """The wall time of each step, and what made some of them slow."""
        return run_plots.step_times(self.results)

    def plot_phases(self) -> Chart:
        """Where the time of a step goes. Of a run that sdnb did not train, that is not known.

        Raises:
            RunError: if it is not known.
        """
        measured = self.results
        if not any(measured.steps.get("phase_seconds", ())):
            raise RunError(f"{self.folder}: where the time of its steps went was not recorded")
        return run_plots.where_time_goes(measured)

    def samples(self) -> Chart | None:
        """The pictures that it drew from the same noise as it went on; None if it drew none. `drawn` lists them."""
        return run_plots.samples(self)

    @property
    def title(self) -> str:
        """What run it is, in a line."""
        config, devices = self.config, self.environment.get("devices", {}).get("names") or ["a device not known"]
        data = Path(config.dataset_name or config.train_data_dir).name
        ranks = f"{config.num_processes} × " if (config.num_processes or 1) > 1 else ""
        return (
            f"{Path(config.pretrained_model_name_or_path).name} on {data}, {config.resolution}×{config.resolution}, "
            f"{len(self.steps)} steps, {ranks}{devices[0]}, {self._started()}"
        )

    def _started(self) -> str:
        began = self.environment.get("started")
        return time.strftime("%Y-%m-%d", time.localtime(began)) if began else "date not known"

    def reproduce(self) -> list[str]:
        """The commands that run the same again, in a clone of the project."""
        seen, config = self.environment, self.config.model_dump(mode="json", exclude=_NOT_REPEATED)
        if "imported" in seen or PART_OF in seen:
            return []
        default = type(self.config).model_fields
        notebook = "pretraining/pretrain" if PRETRAINING in seen else "notebooks/train"
        named = {name: value for name, value in config.items()
                 if value != default[name].default or name in _IN_THE_NOTEBOOK}  # fmt: skip
        named |= seen.get(PRETRAINING, {})
        commit = seen.get("git_commit")
        return [
            *([f"git checkout {commit}"] if commit else []),
            "make .venv/.installed && . .venv/bin/activate",
            f"papermill {notebook}.ipynb out.ipynb -y {shlex.quote(json.dumps(named, ensure_ascii=False))}",
            "python -m sdnb.report out.ipynb",
        ]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        seen = self.environment
        return {
            "text/plain": repr(self),
            "text/html": self._card(),
            PAGE_MIME: {
                "kind": "run",
                "name": self.folder.name,
                "title": self.title,
                "settings": self.config.model_dump(mode="json", exclude=_NOT_REPEATED),
                "machine": _machine(seen, self.summary),
                "reproduce": self.reproduce(),
                "changed": bool(seen.get("git_changed")),
            },
        }

    def _card(self) -> str:
        tiles = ""
        if len(self.steps):
            tiles = "".join(
                f"<div style='margin-right:1.6em'><small>{html.escape(row.name)}</small><br>"
                f"<b>{html.escape(row.text)}</b></div>"
                for row in self.results.results if row.name.startswith(_ON_CARDS)
            )  # fmt: skip
        state = "complete" if self.summary else "did not reach its end"
        return (
            "<div style='display:flex;gap:1em;border:1px solid #8888;border-radius:6px;padding:.8em'>"
            f"{self._thumbnail()}<div><b>{html.escape(self.title)}</b> ({state})"
            f"<div style='display:flex;flex-wrap:wrap;margin:.5em 0'>{tiles}</div>"
            f"<code>{html.escape(str(self.folder))}</code></div></div>"
        )

    def _thumbnail(self) -> str:
        drawn = self.drawn
        if drawn.empty or not (path := self.folder / SAMPLES / drawn.file.iloc[-1]).exists():
            return ""
        picture, small = Image.open(path).convert("RGB"), io.BytesIO()
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        picture.save(small, "PNG")
        encoded = base64.b64encode(small.getvalue()).decode()
        prompt = html.escape(drawn.prompt.iloc[-1], quote=True)
        return f"<img alt='drawn last: {prompt}' style='height:96px' src='data:image/png;base64,{encoded}'>"


def _machine(seen: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    devices = seen.get("devices", {})
    names, gib = devices.get("names") or ["not known"], devices.get("memory_gib")
    units = {"cpu": "", "cpu_capability": "", "cpu_cores": " cores", "memory_gib": " GiB"}
    cpu = [f"{seen[name]}{unit}" for name, unit in units.items() if seen.get(name)]
    said = {
        "devices": f"{len(names)} × {names[0]}" + (f", {gib[0]} GiB" if gib else ""),
        "CPU": ", ".join(cpu),
        "threads": _threads(seen.get("threads"), summary.get("threads") or {}),
        "driver, CUDA, ROCm": ", ".join(str(seen[name]) for name in ("driver", "cuda", "rocm") if seen.get(name)),
        "system": seen.get("system", ""),
        "Python": seen.get("python", ""),
        "packages": ", ".join(f"{name} {number}" for name, number in seen.get("packages", {}).items() if number),
        "commit": seen.get("git_commit", "") + (", with changes" if seen.get("git_changed") else ""),
    }
    return {name: text for name, text in said.items() if text}


def _threads(begun: dict[str, Any] | None, ended: dict[str, Any]) -> str:
    """How many threads a rank computed with, and how they waited for each other."""
    if not begun:
        return ""
    many = "1 thread a rank" if begun["threads"] == 1 else f"{begun['threads']} threads a rank"
    if "cores_used_by_others" not in begun:
        return f"{many}; {begun['waiting']}"
    others = f"{begun['cores_used_by_others']:.2f} of the cores were used by other processes"
    asleep = f"; asleep {ended['asleep_share']:.0%} of the time" if "asleep_share" in ended else ""
    return f"{many}, {begun['waiting']} while they waited for each other when the training began, as {others}{asleep}"


def runs(folder: str | Path | None = None) -> pd.DataFrame:
    """The runs in a folder, the newest first: what each trained, on what, and its main figures.

    Args:
        folder: left out, the project's `runs/`. Runs in folders within it, such as those of a sweep, are listed too.
    """
    root = Path(folder).expanduser() if folder else PROJECT / "runs"
    found = [Run(path.parent) for path in root.glob(f"**/{CONFIG}")]
    rows = {}
    for run in sorted(found, key=lambda run: run.environment.get("started") or 0, reverse=True):
        config, steps, row = run.config, len(run.steps), {}
        if steps:
            results = run.results
            row = {"images/s per device": results.throughput.value, "final loss": results["final loss"].value}
        rows[str(run.folder.relative_to(root.absolute()))] = {
            "started": run._started(),
            "model": Path(config.pretrained_model_name_or_path).name,
            "data": Path(config.dataset_name or config.train_data_dir).name,
            "resolution": config.resolution,
            "global batch": config.global_batch if config.num_processes else None,
            "steps": steps,
            "complete": bool(run.summary),
            **row,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")
