"""Makes a band: the same training with several seeds, one after the other. `sdnb certify --make-band SETTINGS.yaml`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdnb.certifying.band import BANDS, LEAST_SEEDS, band_of, settings_for
from sdnb.errors import ConfigError, RunError
from sdnb.figures.live import Bar
from sdnb.launch.notebook import launch
from sdnb.launch.plan import prepare
from sdnb.places import runs_folder, workspace
from sdnb.run import folder as run_folder
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
        run = run_folder.RunFolder(folder)
        if _asked_for(run.config) != _asked_for(one):
            raise RunError(f"{folder}: a run with other settings is here; move it away")
        runs.append(run)
    say("measuring the saved weights")
    target = path or workspace() / BANDS / f"{name}.yaml"
    band_of(runs).write(target)
    return target


def _asked_for(config: TrainConfig) -> dict[str, Any]:
    """The settings that a user gives; the others depend on the machine."""
    resolved = dict(num_processes=1, mixed_precision="no")
    lengths = (config.max_train_steps, config.num_train_epochs, config.validation_loss_steps)
    return {**config.updated(**resolved).trajectory(), "lengths": lengths}
