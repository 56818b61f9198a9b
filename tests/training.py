"""Trainings in the test's own process, on one rank, of a model and a data set that are small."""

import functools
import json

import common  # noqa: F401  # which adds the small model
from accelerate.state import AcceleratorState

from sdnb.cache import cache_root, made_once
from sdnb.data import openmoji
from sdnb.launch.plan import prepare
from sdnb.models import embedded
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.training import loop as training

training.measured_matmul_tflops = functools.cache(training.measured_matmul_tflops)  # takes as long as such a training


@functools.cache
def small_model():
    """Its folder."""
    return str(embedded.folder("small"))


@functools.cache
def small_data():
    """A data set of 13 images to train on and 6 that are held out."""

    def make(folder):
        for split, count in (("train", 13), ("validation", 6)):
            source = openmoji.folder(64) / split
            (folder / split).mkdir()
            lines = (source / "metadata.jsonl").read_text().splitlines()[:count]
            for line in lines:
                name = json.loads(line)["file_name"]
                (folder / split / name).write_bytes((source / name).read_bytes())
            (folder / split / "metadata.jsonl").write_text("\n".join(lines))

    return str(made_once(cache_root() / "thirteen", make))


def train(settings, **changes):
    """A training to its end; returns its run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = prepare(TrainConfig(**{**settings, **changes}))
    folder, held = run_folder.begin(plan.config, plan.environment)
    with held:
        training.train(plan.config.updated(output_dir=str(folder)), splits=plan.examples)
    return run_folder.RunFolder(folder)
