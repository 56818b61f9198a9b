"""The embedded model draws: what its card says of it is measured here, on less."""

import numpy as np
import pytest
import torch
from PIL import Image
from training import train

from pretraining import captions
from pretraining.retrieval import retrieval
from sdnb.data import openmoji
from sdnb.data.loading import load_data
from sdnb.models import embedded
from sdnb.models.pipeline import assemble, load_parts
from sdnb.settings.config import TrainConfig
from sdnb.training import evaluation


@pytest.fixture(scope="module")
def config():
    return TrainConfig(
        pretrained_model_name_or_path="tiny", dataset_name=str(captions.folder(64)), resolution=64, center_crop=True
    )


@pytest.fixture(scope="module")
def parts(config):
    return load_parts(config)


def test_the_weights_that_ship():
    files = list(embedded.TRAINED_WEIGHTS.iterdir())
    assert {file.name for file in files} == {
        "README.md", "unet.safetensors", "vae.safetensors", "text_encoder.safetensors", "vocab.json", "merges.txt",
    }  # fmt: skip
    assert sum(file.stat().st_size for file in files) < 30e6


@torch.no_grad()
@pytest.mark.parametrize("dataset_name", [None, openmoji.NIGHT])
def test_its_vae_keeps_images_that_it_has_not_seen(config, parts, dataset_name):
    held_out = load_data(config.updated(dataset_name=dataset_name or config.dataset_name)).held_out
    pixels = torch.stack([held_out.pixels(row) for row in range(0, len(held_out), len(held_out) // 64)])
    back = parts.vae.decode(parts.vae.encode(pixels).latent_dist.mode()).sample
    assert evaluation.psnr(pixels, back) > 25


def test_its_latents_have_unit_variance(config, parts):
    examples = load_data(config).train
    pixels = torch.stack([examples.pixels(row) for row in range(0, len(examples), 40)])
    with torch.no_grad():
        latents = parts.vae.encode(pixels).latent_dist.mode() * parts.vae.config.scaling_factor
    assert 0.9 < latents.std() < 1.1


def test_it_draws_what_a_caption_names(config, parts):
    share, drawn = retrieval(assemble(config, parts), load_data(config).train, count=24)
    assert share > 0.6 and len(drawn) == 24


def test_random_weights_do_not(config):
    random = config.updated(pretrained_model_name_or_path="tiny-random")
    share, _ = retrieval(assemble(random, load_parts(random)), load_data(config).train, count=10)
    assert share < 0.5


def test_a_short_training_changes_the_style(settings):
    run = train(
        settings, pretrained_model_name_or_path="tiny", dataset_name=openmoji.NIGHT, steps=40, train_batch_size=16,
        gradient_accumulation_steps=1, learning_rate=1e-3, random_flip=True, use_ema=True, validation_loss_steps=40,
        validation_prompts=[f"{subject}, night style" for subject in ("grinning face", "cat face", "blue circle")],
        validation_epochs=50, validation_guidance_scale=2.0, max_train_samples=256,
    )  # fmt: skip
    before, after = run.validation.loss.iloc[[0, -1]]
    assert after < 2 / 3 * before, "on images that are not trained on"
    tops = [np.asarray(Image.open(run.folder / "samples" / file), float)[:4].mean((0, 1)) for file in run.drawn.file]
    paper, sky = np.mean(tops[:3], 0), np.mean(tops[-3:], 0)  # before the first step, and after the last one
    assert paper.min() > 240 and sky.mean() < paper.mean() - 50, "white paper before, a darker sky after"
    assert sky[2] > sky[0] + 30, f"and a bluer one: {tops}"
    assert not run.model["random_weights"]
