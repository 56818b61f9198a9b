"""The cards of the chip-evaluation suite, `params/suite/`, and what their runs show of a machine: function,
performance, stability. `notebooks/suite.ipynb` runs the cards as a sweep."""

import html
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sdnb.certifying.band import band_for
from sdnb.certifying.certificate import certify
from sdnb.errors import ConfigError, SdnbError
from sdnb.launch.sweep import run_each
from sdnb.metrics.result import Result
from sdnb.metrics.results import MFU_NAME, PAGE_MIME, Measurements, measure
from sdnb.places import runs_folder
from sdnb.report.run import Run
from sdnb.run.baselines import SUITE, Baseline, baselines
from sdnb.run.folder import problems_of
from sdnb.settings.config import TrainConfig, read_yaml
from sdnb.settings.fields import several
from sdnb.settings.flags import found

CARDS = "params/suite"
STEPS = 100  # that the suite looks at, for the rate and for the stability
# What may be another than the card's: a step is the same work.
_ASIDE = {
    "dataset_name", "dataset_config_name", "train_data_dir", "image_column", "caption_column", "steps",
    "max_train_steps", "seed", "output_dir", "cache_dir", "without_xformers", "dataloader_num_workers",
    "checkpointing_steps", "validation_loss_steps", "validation_prompts", "device_peak_tflops", "report_to",
}  # fmt: skip
_OF_THE_LOSS = ("pretrained_model_name_or_path", "lora", "rank", "train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Card:
    """A card with the settings of its run. `own`: those of the card. `target`: see suite.yaml."""

    settings: dict[str, Any]
    own: dict[str, Any]
    published: Baseline | None
    target: dict[str, float] | None

    @property
    def changed(self) -> list[str]:
        """The settings that are not the card's own."""
        return [name for name, value in self.settings.items() if self.own.get(name) != value]

    @property
    def other_work(self) -> list[str]:
        """Those of them that change the work of a step, so that published rates do not compare."""
        return [name for name in self.changed if name not in _ASIDE]


def cards(names: Sequence[str] | str | None = None, changes: dict[str, Any] | str | None = None) -> dict[str, Card]:
    """The cards with these names, or all, each with its settings and the `changes` to them; as text, they are YAML.
    Raises ConfigError if there is no such card, or a setting is wrong."""
    known, made = yaml.safe_load(SUITE.read_text()), {}
    changes = yaml.safe_load(changes) if isinstance(changes, str) else changes
    if not isinstance(changes or {}, dict):
        raise ConfigError(f"changes = {changes!r}: give names and values, such as {{steps: 21}}")
    if several_runs := {"repeats", "until"} & {*(changes or {})}:
        raise ConfigError(f"changes: {', '.join(several_runs)}: a card is run once")
    for name in several(names) if names else known:
        if name not in known:
            raise ConfigError(f"cards: there is no card {name}; the cards are: {', '.join(known)}")
        own = read_yaml(found(f"{CARDS}/{name}.yaml"))
        settings = {**own, **(changes or {})}
        try:
            TrainConfig(**settings)
        except ConfigError as error:
            raise ConfigError(f"{CARDS}/{name}.yaml with changes = {changes}: {error}") from None
        published = baselines().get(known[name].get("published"))
        made[name] = Card(settings, own, published, known[name].get("target"))
    return made


def run_cards(
    chosen: dict[str, Card], folder: str | Path | None = None, say: Callable[[str], None] = print
) -> "SuiteResults":
    """Run the cards that are not complete yet, one after the other, in `folder` (default: `runs/suite`). A card that
    this machine cannot hold fails, and does not stop the rest."""
    target = Path(folder).expanduser().absolute() if folder else runs_folder() / "suite"
    failed = run_each({name: card.settings for name, card in chosen.items()}, target, say)
    runs = {name: Run(target / name) for name in chosen if name not in failed}
    for run in runs.values():
        try:
            certify(run, band_for(run))
        except SdnbError as error:
            say(f"{run.folder.name}: not certified: {str(error).splitlines()[0]}")
    return SuiteResults(chosen, runs, failed)


@dataclass(frozen=True)
class SuiteResults:
    """What the complete runs of cards show, and why the others failed."""

    cards: dict[str, Card]
    runs: dict[str, Run]
    failed: dict[str, str]
    measured: dict[str, Measurements] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "measured", {name: measure(run) for name, run in self.runs.items()})

    @property
    def table(self) -> pd.DataFrame:
        """A row for each card; in each cell a line for each fact."""
        rows = {}
        for name, card in self.cards.items():
            if name in self.failed:
                rows[name] = [f"did not run: {self.failed[name]}", "", ""]
                continue
            run, measured = self.runs[name], self.measured[name]
            facts = (_function(card, run), _performance(card, run, measured), _stability(run))
            rows[name] = ["\n".join(some) for some in facts]
        return pd.DataFrame.from_dict(rows, orient="index", columns=["function", "performance", "stability"])

    def __repr__(self) -> str:
        lines = []
        for name, row in self.table.iterrows():
            lines += [str(name), *(f"  {column}: {line}" for column, text in row.items() for line in text.splitlines())]
        return "\n".join(lines)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        sections = []
        for name, row in self.table.iterrows():
            facts = "".join(
                f"<p><b>{column}</b><br>{'<br>'.join(map(html.escape, text.splitlines()))}</p>"
                for column, text in row.items() if text
            )  # fmt: skip
            sections.append(f"<h3>{html.escape(str(name))}</h3>{facts}")
        rates = map(_rate, self.measured.values())
        page = dict(
            kind="suite", name="suite", title=f"The suite: {len(self.runs)} of {len(self.cards)} cards ran",
            headline=[{**rate.row(), "name": f"{name}, {rate.name}"} for name, rate in zip(self.runs, rates)],
            reproduce=[_command(self.cards), "sdnb report suite.ipynb"],
        )  # fmt: skip
        return {"text/plain": repr(self), "text/html": "".join(sections), PAGE_MIME: page}


def _command(chosen: dict[str, Card]) -> str:
    first = next(iter(chosen.values()))
    given = {"cards": [*chosen], "changes": {name: first.settings[name] for name in first.changed}}
    return f"papermill notebooks/suite.ipynb suite.ipynb -y {shlex.quote(json.dumps(given))}"


def _function(card: Card, run: Run) -> Iterator[str]:
    state = "trained" if run.state == "complete" else run.state
    yield f"{state}: {len(run.steps)} steps"
    verdict, _ = problems_of(partial(run.certificate.get, "verdict"))
    yield verdict or "not certified: there is no band of these settings (sdnb certify --make-band)"
    if card.target is None:
        yield "the suite gives no target"
        return
    limit, after, of = card.target["loss"], int(card.target["after"]), int(card.target.get("of", 1))
    differ = [name for name in _OF_THE_LOSS if name in card.changed]
    if card.settings["resolution"] != card.target.get("resolution", card.own["resolution"]):
        differ.append("resolution")
    what = f"mean of {of} train_loss" if of > 1 else "last step_loss"
    if differ:
        yield f"target ({what} under {limit:g} after step {after}): not judged: it is of another {', '.join(differ)}"
    elif len(run.steps) < after:
        yield f"target ({what} under {limit:g}): not reached, as it is judged after step {after}"
    else:
        loss = run.steps["train_loss" if of > 1 else "step_loss"].tail(of).mean()
        other = ", on another data set" if "dataset_name" in card.changed or "train_data_dir" in card.changed else ""
        yield f"target: {'met' if loss < limit else 'not met'}: {what} {loss:.4f}, under {limit:g} is asked for{other}"


def _rate(measured: Measurements) -> Result:
    return next(row for row in measured.results if row.name.startswith("images/s per"))


def _performance(card: Card, run: Run, measured: Measurements) -> Iterator[str]:
    rate = _rate(measured)
    yield f"{rate.name}: {rate.text}"
    seconds = run.steps.seconds.head(STEPS).mean()
    ips = run.config.global_batch / seconds / run.config.ranks
    yield f"as the suite computes: {seconds:.3f} s/it, the mean of {min(STEPS, len(run.steps))} steps; IPS {ips:.2f}"
    if card.published:
        ratio = f"[×{ips / card.published.images_per_second:.2f}]"
        compared = f"not comparable: another {', '.join(card.other_work)}" if card.other_work else ratio
        yield f"published: IPS {card.published.images_per_second:g} on {card.published.devices}; {compared}"
    if run.config.enable_xformers_memory_efficient_attention and not run.environment["packages"].get("xformers"):
        yield "with torch's own attention in the place of xformers"
    mfu = measured.value_of(MFU_NAME)
    yield f"MFU: {mfu:.1%}" if math.isfinite(mfu) else "MFU: unknown: the peak of the device is not known"


def _stability(run: Run) -> Iterator[str]:
    losses = run.steps.loss.head(STEPS)
    scatter = losses.diff().abs().mean() / losses.mean()
    yield f"spread of the first {len(losses)} losses: neighbours differ by {scatter:.1%} of their mean"
    quantities = {one["name"]: one for one in run.certificate.get("quantities", ())}
    if one := quantities.get("scatter of the loss between steps"):
        inside = one["value"] is not None and one["low"] <= one["value"] <= one["high"]
        value = "not finite" if one["value"] is None else f"{one['value']:.3f}"
        yield f"{'inside' if inside else 'OUTSIDE'} the band: {value}, {one['low']:.3f} to {one['high']:.3f}"
    else:
        yield "no band to compare it with"
