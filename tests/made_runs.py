"""Runs that no training made: records as they would be, and run folders that hold them."""

import random

import numpy as np
import pandas as pd
from PIL import Image

from sdnb.metrics.step_clock import PHASES
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig


def config(**settings):
    return TrainConfig(
        pretrained_model_name_or_path="tiny", dataset_name="openmoji",
        **{"train_batch_size": 8, "gradient_accumulation_steps": 4, "num_processes": 8, **settings},
    )  # fmt: skip


def records(micro_batches, seconds_per_micro_batch, images_per_micro_batch=64, loss=0.1):
    micro_batches = np.asarray(micro_batches)
    return pd.DataFrame(
        dict(
            step=np.arange(len(micro_batches)) + 1,
            micro_batches=micro_batches,
            images=micro_batches * images_per_micro_batch,
            loss=loss,
            step_loss=loss,
            seconds=micro_batches * seconds_per_micro_batch,
            phase_seconds=[dict.fromkeys(PHASES, 0.1)] * len(micro_batches),
        )
    )


def published_run():
    """What the published log comes from: 14 micro-batches an epoch, so steps of 4, 4, 4 and 2, at 0.558 s each."""
    return records(([4, 4, 4, 2] * 26)[:101], 0.558)


class FakeRun:
    """Eight GPUs cannot be had here: what their run folder would say."""

    def __init__(self, steps, target=0.0456, summary=None, **settings):
        self.config = config(target_loss=target, mixed_precision="fp16", **settings)
        self.steps, self.validation = steps, pd.DataFrame()
        self.environment = {"started": 0, "devices": {"type": "cuda", "names": ["NVIDIA A100-SXM4-80GB"]}}
        self.model = {
            "random_weights": False,
            "flop_per_image": {"unet_training": 2.407e12, "vae_encoder": 1.117e12, "text_encoder": 0.0133e12},
        }
        self.summary = summary or {}


def make_run(folder, seconds=0.5, torch="2.13.0", noise=0.1, prompts=("sun",), seed=0, **settings):
    """A run folder as a training leaves it: 40 steps, of seconds that scatter."""
    draw = random.Random(folder.name)
    folder.mkdir(parents=True)
    made = config(**settings)
    (folder / run_folder.CONFIG).write_text(made.to_yaml())
    files.write(
        folder / run_folder.ENVIRONMENT,
        dict(devices=dict(type="cpu", names=["a CPU"]), packages=dict(torch=torch), python="3.11", started=0.0),
    )
    files.write(folder / run_folder.MODEL, {"random_weights": False})
    for step in range(1, 41):
        record = dict(
            step=step, epoch=0, micro_batches=4, images=made.global_batch, loss=1 / step, train_loss=1 / step,
            step_loss=0.1, lr=1e-5, seconds=seconds * (1 + noise * draw.uniform(-1, 1)),
            phase_seconds=dict.fromkeys(PHASES, seconds / 7),
        )  # fmt: skip
        files.append(folder / run_folder.STEPS, record)
    (folder / run_folder.SAMPLES).mkdir()
    for prompt in prompts:
        Image.new("RGB", (8, 8), "red").save(folder / run_folder.SAMPLES / f"{prompt}.png")
        files.append(
            folder / run_folder.SAMPLES_LIST,
            dict(step=40, prompt=prompt, file=f"{prompt}.png", seed=seed, num_inference_steps=2, guidance_scale=1.0),
        )
    return folder
