"""Launches a training, and follows it to its end: `python -m launching SETTINGS`, as JSON."""

import json
import sys

from sdnb.launch import notebook as launch
from sdnb.settings.config import TrainConfig

if __name__ == "__main__":
    launch.launch(launch.prepare(TrainConfig(**json.loads(sys.argv[1]))), show=lambda *_: None)
