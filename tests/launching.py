"""Launches a training, and follows it to its end: `python -m launching SETTINGS`, as JSON."""

import json
import sys

from sdnb.launch.notebook import launch
from sdnb.launch.plan import prepare
from sdnb.settings.config import TrainConfig

QUIET = {"show": lambda *_: None}


def start(settings, **changes):
    show = changes.pop("show", QUIET["show"])
    return launch(prepare(TrainConfig(**{**settings, **changes})), show=show)


def at_step(step, act):
    """A `show` that acts once, when a step is reached; it may pass over any one of them."""
    done = []

    def show(progress):
        if progress.step >= step and not done:
            done.append(progress.step)
            act()

    return show


if __name__ == "__main__":
    start(json.loads(sys.argv[1]))
