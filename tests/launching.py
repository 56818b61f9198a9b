"""Launches a training, and follows it to its end: `python -m launching SETTINGS`, as JSON."""

import json
import sys

from sdnb.launch.notebook import launch
from sdnb.launch.plan import prepare
from sdnb.settings.config import TrainConfig

if __name__ == "__main__":
    launch(prepare(TrainConfig(**json.loads(sys.argv[1]))), show=lambda *_: None)
