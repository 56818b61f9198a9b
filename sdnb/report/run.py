"""A run to look at: `sdnb.Run(folder)`, and the table of all runs: `sdnb.runs()`."""

import base64
import html
import io
import re
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from sdnb.errors import RunError
from sdnb.figures import run_plots
from sdnb.figures.chart import Chart
from sdnb.machine.environment import PROCESSOR, software_of
from sdnb.metrics.results import PAGE_MIME, Measurements, measure, time_by_part
from sdnb.metrics.step_clock import PHASES
from sdnb.places import runs_folder
from sdnb.run.folder import CERTIFIED, CONFIG, NOT_CERTIFIED, RunFolder, data_name, problems_of
from sdnb.run.repeats import measured_of, names_in
from sdnb.settings.config import TrainConfig
from sdnb.settings.flags import command_line

_ON_CARDS = ("images/s per", "nominal IPS", "final loss", "held-out loss", "peak memory")
_MOST_WARNINGS = 20
# The location of a run, and what it resumed from, do not change it.
_NOT_REPEATED = {"output_dir", "cache_dir", "resume_from_checkpoint", "hub_token", "push_to_hub"}


class Run(RunFolder):
    """A run by its folder, complete or not. Each property reads its file again. Raises RunError if the folder has no
    run; and from what needs steps, if there are none yet."""

    @property
    def results(self) -> Measurements:
        """The results table: images/s, losses, memory and times. `run.results["final loss"].value` is a number."""
        if self.steps.empty:
            raise RunError(f"{self.folder}: no step has been recorded yet")
        return measured_of(self)

    @property
    def frame(self) -> pd.DataFrame:
        """The steps as a table of numbers, one row for each: the columns of `steps`, `short`, `steady`, `running_loss`,
        and the time of each phase, such as `forward_seconds`."""
        if self.steps.empty:
            return self.steps
        marked = self.results.steps
        phases = pd.DataFrame(list(marked.get("phase_seconds", ())), columns=PHASES).add_suffix("_seconds")
        return marked.drop(columns="phase_seconds", errors="ignore").join(phases).set_index("step")

    def plot_loss(self) -> Chart:
        """The loss of each step, its running mean, and the held-out loss."""
        return run_plots.loss(self.results)

    def plot_step_times(self) -> Chart:
        """The wall time of each step, and why some were slow."""
        return run_plots.step_times(self.results)

    def plot_phases(self) -> Chart:
        """Where the time of a step goes. Raises RunError if that was not recorded: sdnb did not make the run."""
        measured = self.results
        if not any(measured.steps.get("phase_seconds", ())):
            raise RunError(f"{self.folder}: the phases of its steps were not recorded")
        return run_plots.where_time_goes(measured)

    def samples(self) -> Chart | None:
        """The images that it drew from the same noise during the training; None if it drew none."""
        return run_plots.samples(self)

    @property
    def title(self) -> str:
        """The run in one line: model, data, size, device, date."""
        config, named = self.config, self.environment.get("devices", {}).get("names")
        ranks = f"{config.num_processes} × " if (config.num_processes or 1) > 1 else ""
        devices = f"{ranks}{named[0]}" if named else self.devices
        size = f"{config.resolution}×{config.resolution}" if "resolution" in self.known_settings else ""
        what = f"{Path(config.pretrained_model_name_or_path).name} on {data_name(config)}"
        if "imported" in self.environment:  # the name of the log says more than «unknown»
            what = f"{self.environment['imported'].get('from', 'a log')}: {what}"
        return _joined(what, size, f"{len(self.steps)} steps", devices, self._started())

    def _started(self) -> str:
        began = self.environment.get("started")
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)) if began else "unknown date"

    def reproduce(self) -> list[str]:
        """The commands that repeat the run, in a clone of the project if it was made by one. None for a run that sdnb
        did not make."""
        environment = self.environment
        if "imported" in environment or (
            "reproduce" not in environment and {"part_of", "pretraining"} & {*environment}
        ):
            return []  # the latter two were pretraining runs of version 0.1
        settings = self.config.model_dump(mode="json", exclude=_NOT_REPEATED)
        if self.folder.name in (repeated := names_in(self.folder.parent)):
            settings["repeats"] = len(repeated)
        command = f"sdnb train {shlex.join([*command_line(settings), '--output_dir=again'])}"
        commit = environment.get("git_commit")
        clone = [f"git checkout {commit}", "make .venv/.installed && . .venv/bin/activate"] if commit else []
        return [*clone, *environment.get("reproduce", [command])]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        page = dict(
            kind="run", name=self.folder.name, title=self.title, state=self.state, failure=self._failure(),
            badges=self._badges(), facts=self._facts(), time=self._time(), warnings=self._warnings(),
            settings={name: value for name, value in self.known_settings.items() if name not in _NOT_REPEATED},
            differ=self._differ(), imported="imported" in self.environment,
            machine=_machine(self), reproduce=self.reproduce(),
            changed=bool(self.environment.get("git_changed")),
        )  # fmt: skip
        return {"text/plain": repr(self), "text/html": self._card(), PAGE_MIME: page}

    def _failure(self) -> str:
        """Which rank failed and why, and the end of the log; empty if none did."""
        if not (failed := self.failure) or self.state != "failed":
            return ""
        log_end = "\n".join(self.log.rstrip().splitlines()[-20:])
        return f"rank {failed['rank']} failed: {failed['what']}\n{failed['details'].rstrip()}\n\n{log_end}"

    def _facts(self) -> dict[str, str]:
        """What was run."""
        config, model, steps = self.config, self.model, self.steps
        data = self.environment.get("data", {})
        counts = model.get("parameters", {})
        parameters = f"{counts['unet']:,} parameters in the UNet" if counts else ""
        adapter = f"{counts['lora']:,} more in its adapter (LoRA), which were trained" if "lora" in counts else ""
        revision = f"revision {model['revision']}" if "revision" in model else ""
        digest = f"digest of its weights {model['unet_digest'][:16]}" if "unet_digest" in model else ""
        started = "random weights" if model.get("random_weights") else ""
        known = self.known_settings
        size = f" of {config.resolution}×{config.resolution}" if "resolution" in known else ""
        precision = f", {config.mixed_precision}" if config.mixed_precision not in (None, "no") else ", float32"
        precision = precision if "mixed_precision" in known else ""
        ranks = f" × {config.num_processes} ranks" if (config.num_processes or 1) > 1 else ""
        return {
            "model": _joined(config.pretrained_model_name_or_path, parameters, adapter, started, revision, digest),
            "data": _joined(config.dataset_name or config.train_data_dir, data.get("digest")),
            "step": f"{config.train_batch_size} images × {config.gradient_accumulation_steps} micro-batches{ranks} "
            f"= {config.global_batch} images{size}{precision}",
            "trained": f"{len(steps)} steps, {steps.images.sum():,} images" if len(steps) else "no step",
            **self._convergence(),
        }  # fmt: skip

    def _convergence(self) -> dict[str, str]:
        """What the certificate says; empty if there is none."""
        if not (certificate := self.certificate):
            return {}
        compared = f"{len(certificate['quantities'])} quantities, {certificate['seeds']} seeds, {certificate['band']}"
        return {"convergence": f"{certificate['verdict']}: {'; '.join([*certificate['reasons'], compared])}"}

    def _badges(self) -> list[dict[str, str]]:
        """What a reader must know beside the number, each with its kind: good, or bad."""
        found = []
        if len(self.steps) and self.config.target_loss is not None:
            met = self.results["target"].value
            texts = {1.0: ("target met", "good"), 0.0: ("target not met", "bad")}
            text, kind = texts.get(met, (f"target: {self.results['target'].text.partition(':')[0]}", ""))
            found.append({"text": text, "kind": kind})
        if len(self.steps) and self.results.value_of("steady state") == 0:
            found.append({"text": "no steady state", "kind": "bad"})
        found += [{"text": reason, "kind": "bad"} for reason in (self.results.disturbed if len(self.steps) else ())]
        if certificate := self.certificate:
            kind = {CERTIFIED: "good", NOT_CERTIFIED: "bad"}.get(certificate["verdict"], "")
            found.append({"text": certificate["verdict"], "kind": kind})
        if self.model.get("random_weights"):
            found.append({"text": "random weights: the loss means nothing", "kind": "bad"})
        if self.environment.get("git_changed"):
            found.append({"text": "uncommitted changes", "kind": "bad"})
        if resumed := self.environment.get("resumed"):
            found.append({"text": f"resumed after step {resumed[-1]['after_step']}", "kind": "good"})
        return found

    def _differ(self) -> list[str]:
        """The settings that are not the defaults."""
        defaults = {name: field.default for name, field in TrainConfig.model_fields.items()}
        known = self.known_settings
        return [name for name in known if name not in _NOT_REPEATED and getattr(self.config, name) != defaults[name]]

    def _time(self) -> list[tuple[str, float]]:
        """Where the total time went, in order: a notebook's file sorts the names of a dictionary."""
        resumed = self.environment.get("resumed")  # its earlier steps are no part of the total
        return [] if resumed or self.steps.empty else [*time_by_part(self.steps, self.summary).items()]

    def _warnings(self) -> list[str]:
        found = re.findall(r" rank \d+ (?:WARNING|ERROR) (.*)", self.log)
        return list(dict.fromkeys(found))[:_MOST_WARNINGS]

    def _card(self) -> str:
        rows = [row for row in self.results.results if row.name.startswith(_ON_CARDS)] if len(self.steps) else []
        tile = "<div style='margin-right:1.6em'><small>{}</small><br><b>{}</b></div>"
        tiles = "".join(tile.format(html.escape(row.name), html.escape(row.text)) for row in rows)
        return (
            "<div style='display:flex;gap:1em;border:1px solid #8888;border-radius:6px;padding:.8em'>"
            f"{self._thumbnail()}<div><b>{html.escape(self.title)}</b> ({self.state})"
            f"<div style='display:flex;flex-wrap:wrap;margin:.5em 0'>{tiles}</div>"
            f"<code>{html.escape(str(self.folder))}</code></div></div>"
        )

    def _thumbnail(self) -> str:
        drawn, _ = problems_of(partial(getattr, self, "drawn"))
        image = self.sample(drawn.file.iloc[-1]) if drawn is not None and not drawn.empty else None
        if image is None:
            return ""
        small = io.BytesIO()
        image.thumbnail((128, 128))
        image.save(small, "PNG")
        encoded = base64.b64encode(small.getvalue()).decode()
        prompt = html.escape(drawn.prompt.iloc[-1])
        return f"<img alt='last image: {prompt}' style='height:96px' src='data:image/png;base64,{encoded}'>"


def _joined(*facts: str | None) -> str:
    return ", ".join(fact for fact in facts if fact)


def _machine(run: RunFolder) -> dict[str, str]:
    environment, summary = run.environment, run.summary
    devices = environment.get("devices", {})
    gib = devices.get("memory_gib")
    units = {PROCESSOR: "", "cpu_capability": "", "cpu_cores": " cores", "memory_gib": " GiB"}
    cpu = [f"{environment[name]}{unit}" for name, unit in units.items() if environment.get(name)]
    software = [f"{name} {version}" for name, version in software_of(environment).items()]
    packages = [f"{name} {number}" for name, number in environment.get("packages", {}).items() if number]
    facts = {
        "devices": run.devices + (f", {gib[0]} GiB" if gib else ""),
        "CPU": ", ".join(cpu),
        "threads": _threads(environment.get("threads"), summary.get("threads") or {}),
        "driver": ", ".join(software),
        "system": environment.get("system", ""),
        "Python": environment.get("python", ""),
        "packages": ", ".join(packages),
        "commit": environment.get("git_commit", "") + (", with changes" if environment.get("git_changed") else ""),
    }
    return {name: text for name, text in facts.items() if text}


def _threads(begun: dict[str, Any] | None, ended: dict[str, Any]) -> str:
    """How many threads a rank used, and how they waited for each other."""
    if not begun:
        return ""
    many = "1 thread per rank" if begun["threads"] == 1 else f"{begun['threads']} threads per rank"
    if "cores_used_by_others" not in begun:
        return f"{many}; {begun['waiting']}"
    others = f"other processes used {begun['cores_used_by_others']:.2f} cores"
    asleep = f"; asleep {ended['asleep_share']:.0%} of the time" if "asleep_share" in ended else ""
    return f"{many}, {begun['waiting']} while waiting at the start, when {others}{asleep}"


def runs(folder: str | Path | None = None) -> pd.DataFrame:
    """The runs in a folder and its subfolders, newest first: model, data, and main results. Default: all runs,
    see `runs_folder`. If a file of a run cannot be read, its row names the file, in the column `problem`."""
    root = Path(folder).expanduser().absolute() if folder else runs_folder()
    rows = []
    for path in root.glob(f"**/{CONFIG}"):
        run = Run(path.parent)
        row, problem = problems_of(partial(_row, run))
        environment, _ = problems_of(partial(getattr, run, "environment"))
        name = str(run.folder.relative_to(root))
        rows.append(
            (environment.get("started") or 0, {"run": name, **(row or {}), **({"problem": problem} if problem else {})})
        )
    newest_first = [row for _, row in sorted(rows, key=lambda one: one[0], reverse=True)]
    return pd.DataFrame(newest_first, columns=None if newest_first else ["run"]).set_index("run")


def _row(run: Run) -> dict[str, Any]:
    config, steps = run.config, len(run.steps)
    row = {
        "started": run._started(),
        "model": Path(config.pretrained_model_name_or_path).name,
        "data": data_name(config),
        "resolution": config.resolution,
        "global batch": config.global_batch if config.num_processes else None,
        "steps": steps,
        "state": run.state,
    }
    if steps:
        results = measure(run)  # its own, also if it is one of several
        row |= {"images/s per device": results.throughput.value, "final loss": results.value_of("final loss")}
    return row
