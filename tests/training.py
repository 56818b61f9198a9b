"""Trains on one rank, in the test's own process."""

from accelerate.state import AcceleratorState

from sdnb import launch, run_folder
from sdnb import train as training
from sdnb.config import TrainConfig


def train(settings, **changes):
    """A training to its end; returns its run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = launch.prepare(TrainConfig(**{**settings, **changes}))
    folder = run_folder.begin(plan.config, plan.environment)
    training.train(plan.config.updated(output_dir=str(folder)))
    return run_folder.RunFolder(folder)
