"""Replays steps of a sealed run: `sdnb verify RUN.sdnb.zip --replay 3`."""

import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN, Finding
from sdnb.errors import SdnbError
from sdnb.figures.live import Progress
from sdnb.launch.notebook import launch
from sdnb.launch.plan import prepare
from sdnb.machine.device_kind import kind_of
from sdnb.machine.environment import PROCESSOR
from sdnb.metrics.second_moment import explained, second_moment
from sdnb.run import files
from sdnb.run.folder import RunFolder
from sdnb.sealing.verify import opened
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import IDENTIFIED_BY_DIGEST
from sdnb.training.checkpoint_folder import numbered
from sdnb.training.checkpoints import fingerprint
from sdnb.training.replay import RESTORED

# Relative, of losses and norms. On the same CPU with the same versions, a step is the same to the bit.
ON_ANOTHER_CPU, ON_AN_ACCELERATOR = 1e-5, 5e-3
_EXACT = ("epoch", "images", "micro_batches", "lr")
_TO_A_TOLERANCE = ("loss", "train_loss", "step_loss", "grad_norm")
_SOFTWARE = ("torch", "diffusers", "transformers", "accelerate", "numpy")


def replay_findings(file: str | Path, run: RunFolder, count: int, say: Callable[[str], None] = print) -> list[Finding]:
    """Run randomly drawn steps of a sealed run again, each from the checkpoint in the run folder before it, and compare
    all steps on the way with the sealed records. Raises RunError if the file is no sealed run."""
    with opened(file) as sealed, tempfile.TemporaryDirectory(prefix="sdnb-replay-") as scratch:
        try:
            return _replayed(sealed.run, run, count, Path(scratch) / "replay", say)
        except SdnbError as error:
            return [Finding("replay", UNKNOWN, str(error).strip().partition("\n")[0])]


def _replayed(
    sealed: RunFolder, run: RunFolder, count: int, scratch: Path, say: Callable[[str], None]
) -> list[Finding]:
    steps, config = sealed.steps, sealed.config
    last = int(steps.step.max())
    seeded = [0] if config.seed is not None else []
    begins = sorted([step for step, _ in numbered(run.folder) if step < last] + seeded)
    if not begins:
        return [Finding("replay", UNKNOWN, f"there is no checkpoint in {run.folder}, and the run had no seed")]
    possible = range(begins[0] + 1, last + 1)
    ends = dict[int, int]()
    for step in sorted(random.SystemRandom().sample(possible, min(count, len(possible)))):
        ends[max(begin for begin in begins if begin < step)] = step
    # The sealed settings; only where the model and the data lie is what the run folder says.
    places = {name: getattr(run.config, name) for name in (*IDENTIFIED_BY_DIGEST, "cache_dir")}
    plan = prepare(config.measured_only(**places, output_dir=str(scratch), device_isolation="ignore"))
    here = {"data": plan.examples.train.digest(), "model": fingerprint(plan.config)["unet_digest"]}
    then = {"data": sealed.environment.get("data", {}).get("digest"), "model": sealed.model.get("unet_digest")}
    for name in here:
        if here[name] != then[name]:
            return [Finding("replay", UNKNOWN, f"the {name} here is {here[name]}, that of the run was {then[name]}")]
    if plan.environment["devices"]["type"] != sealed.environment.get("devices", {}).get("type"):
        why = "the run was made on another kind of device, which draws other random numbers"
        return [Finding("replay", UNKNOWN, why)]
    say(f"replaying steps {', '.join(f'{begin + 1} to {end}' for begin, end in ends.items())}")
    measured_at = [int(step) for step in sealed.validation.get("step", ())]
    again = launch(plan, _quiet, dict(source=str(run.folder), intervals=[*ends.items()], measured_at=measured_at))
    tolerance = _tolerance(sealed.environment, again.environment)
    found = [_compared("replay", again.steps, steps, _TO_A_TOLERANCE, tolerance, _EXACT)]
    if len(again.validation) and len(sealed.validation):
        found.append(_compared("replay: held-out loss", again.validation, sealed.validation, ("loss",), tolerance))
    if len(restored := files.read_lines(again.folder / RESTORED)):
        found.append(_restored(restored, steps, config))
    return found


def _restored(restored: pd.DataFrame, steps: pd.DataFrame, config: TrainConfig) -> Finding:
    """Whether the optimizer of each checkpoint has taken the steps, and remembers the gradients, of the records."""
    wrong = []
    for row in restored.itertuples():
        norms = steps.grad_norm[steps.step <= row.step].to_numpy(float)
        taken, expected = int(np.isfinite(norms).sum()), second_moment(norms, config)
        if row.optimizer_steps != taken:
            wrong.append(f"that of checkpoint-{row.step} has taken {row.optimizer_steps} steps, and not {taken}")
        elif not explained(row.moment, expected):
            times = row.moment / (expected or math.nan)
            wrong.append(f"that of checkpoint-{row.step} remembers {times:.4g} times the gradients")
    how = f"of {len(restored)} checkpoints, it has taken their steps and remembers their gradients"
    return Finding("replay: optimizer", FAILS if wrong else HOLDS, "; ".join(wrong[:2]) or how)


def _quiet(_: Progress) -> None:
    pass


def _tolerance(then: dict[str, Any], now: dict[str, Any]) -> float:
    """0 where a step must be the same to the bit."""
    if not kind_of(now["devices"]["type"]).is_host:
        return ON_AN_ACCELERATOR
    names, before, after = (PROCESSOR, "cpu_capability", "cpu_cores"), then.get("packages", {}), now["packages"]
    same = all(then.get(name) == now.get(name) for name in names) and all(
        before.get(name) == after.get(name) for name in _SOFTWARE
    )
    return 0.0 if same else ON_ANOTHER_CPU


def _compared(
    check: str, again: pd.DataFrame, before: pd.DataFrame, names: tuple[str, ...], tolerance: float,
    exact: tuple[str, ...] = (),
) -> Finding:  # fmt: skip
    recorded, wrong, largest = before.drop_duplicates("step").set_index("step"), [], 0.0
    seen = [step for step in again.step if step in recorded.index]
    for step, row in again.set_index("step").loc[seen].iterrows():
        for name in (*names, *exact):
            then, now = float(recorded.loc[step, name]), float(row[name])
            differs = 0.0 if then == now or (math.isnan(then) and math.isnan(now)) else abs(now - then) / abs(then or 1)
            largest = max(largest, differs)
            if not differs <= (0 if name in exact else tolerance):
                wrong.append(f"step {step}: {name} was {then:.8g}, and is {now:.8g}")
    if not seen:
        return Finding(check, UNKNOWN, "none of the replayed steps was recorded")
    agree = "the same to the bit" if not largest else f"the same to {largest:.1g}, and {tolerance:g} is allowed"
    how = f"steps {', '.join(map(str, dict.fromkeys(seen)))}: {agree}"
    if "seconds" in again:
        now, then = again.seconds.sum(), recorded.seconds.loc[seen].sum()
        how += f"; they took {now:.2f} s here, and {then:.2f} s then"
    return Finding(check, FAILS if wrong else HOLDS, "; ".join(wrong[:3]) or how)
