"""Makes a band: the same training with several seeds, one after the other. `sdnb certify --make-band SETTINGS.yaml`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdnb.certifying.band import BANDS, LEAST_SEEDS, LEAST_STEPS, Band, deciding_settings, made_with, settings_for
from sdnb.certifying.saved_weights import quantities_of
from sdnb.errors import ConfigError, RunError
from sdnb.figures.live import Bar
from sdnb.launch.notebook import launch
from sdnb.launch.plan import prepare
from sdnb.places import runs_folder, workspace
from sdnb.run import folder as run_folder
from sdnb.run.folder import RunFolder
from sdnb.settings.config import TrainConfig


def make_band(
    config: TrainConfig, name: str, seeds: int, path: Path | None = None, say: Callable[[str], None] = print
) -> Path:
    """Train with the seeds from 1 on, and write the band; default: `params/bands/<name>.yaml`. Runs that are complete
    are kept, so the same call goes on where it was interrupted. Raises SdnbError if a training fails, or a run in the
    folder has other settings."""
    if seeds < LEAST_SEEDS:
        raise ConfigError(f"seeds = {seeds}: a band needs at least {LEAST_SEEDS}")
    runs = []
    for seed in range(1, seeds + 1):
        folder = runs_folder() / "bands" / name / f"seed-{seed}"
        one = settings_for(config, seed, folder)
        if not (folder / run_folder.SUMMARY).exists():
            say(f"seed {seed} of {seeds}")
            launch(prepare(one.updated(resume_from_checkpoint="latest")), Bar(each_step=False))
        run = RunFolder(folder)
        if _asked_for(run.config) != _asked_for(one):
            raise RunError(f"{folder}: a run with other settings is here; move it away")
        runs.append(run)
    say("measuring the saved weights")
    target = path or workspace() / BANDS / f"{name}.yaml"
    band_of(runs).write(target)
    return target


def band_of(runs: Sequence[RunFolder]) -> Band:
    """The band of trainings with the same settings and different seeds. Raises RunError if that is not what they are,
    or there are too few."""
    if len(runs) < LEAST_SEEDS:
        raise RunError(f"a band needs at least {LEAST_SEEDS} seeds, and these are {len(runs)}")
    first, steps = runs[0], len(runs[0].steps)
    if steps < LEAST_STEPS:
        raise RunError(f"{first.folder}: has {steps} steps; a band needs at least {LEAST_STEPS}")
    for run in runs:
        if run.state != "complete" or len(run.steps) != steps:
            raise RunError(f"{run.folder}: is {run.state}, with {len(run.steps)} steps; the others have {steps}")
        if deciding_settings(run) != deciding_settings(first):
            raise RunError(f"{run.folder}: has other settings or data than {first.folder}")
    measured = [quantities_of(run, steps) for run in runs]
    names = [name for name in measured[0] if all(math.isfinite(one.get(name, math.nan)) for one in measured)]
    return Band(
        deciding_settings(first), made_with(first), steps, first.config.validation_loss_steps,
        [run.config.seed or 0 for run in runs],
        {name: [float(f"{one[name]:.7g}") for one in measured] for name in names},
    )  # fmt: skip


def _asked_for(config: TrainConfig) -> dict[str, Any]:
    """The settings that a user gives; the others depend on the machine."""
    resolved = dict(num_processes=1, mixed_precision="no")
    lengths = (config.max_train_steps, config.num_train_epochs, config.validation_loss_steps)
    return {**config.updated(**resolved).trajectory(), "lengths": lengths}
