"""The training that made the embedded model: it goes on where it was interrupted, and what it makes can be read."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from pretraining import stages
from pretraining.trainer import STATE
from sdnb.errors import ConfigError, DataError, RunError
from sdnb.models import embedded
from sdnb.report.run import Run
from sdnb.settings.config import TrainConfig

VAE = dict(vae_steps=6, vae_batch_size=4, vae_learning_rate=1e-3)


def quiet(*_):
    pass


def interrupted_after(step):
    def show(progress):
        if len(progress.records) == step:
            raise KeyboardInterrupt

    return show


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data set with two splits; each image has two captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("validation", 4)):
        (folder / split).mkdir()
        lines = []
        for index in range(count):
            Image.new("RGB", (64, 64), (index * 20, 90, 128)).save(folder / split / f"{index:02}.png")
            lines.append(json.dumps({"file_name": f"{index:02}.png", "text": [f"picture {index}", "a picture"]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def config(images, folder, **changes):
    settings = dict(
        pretrained_model_name_or_path="tiny-random", dataset_name=str(images), resolution=64, center_crop=True,
        random_flip=True, mixed_precision="no", lr_scheduler="cosine", lr_warmup_steps=1, train_batch_size=4,
        learning_rate=1e-3, steps=6, validation_loss_steps=3, checkpointing_steps=2, seed=3, output_dir=str(folder),
    )  # fmt: skip
    return TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    asked = config(images, tmp_path_factory.mktemp("trained"), validation_prompts=["picture 1"])
    vae = stages.train_vae(asked, **VAE, show=quiet)
    return asked, vae, stages.train_unet(asked, vae, quiet)


def weights(run):
    return [file.read_bytes() for file in sorted(run.folder.glob("**/*.safetensors"))]


def what_happened(run):
    return run.steps.drop(columns=["seconds", "phase_seconds", "peak_memory_gib"])


def test_both_learn_and_leave_runs_like_any_other(trained):
    _, vae, unet = trained
    for run in (vae, unet):
        assert run.steps.step.tolist() == [1, 2, 3, 4, 5, 6] and run.validation.step.tolist() == [3, 6]
        assert run.steps.loss.iloc[-1] < run.steps.loss.iloc[0] and run.summary
        assert run.results.throughput.value > 0
        assert not (run.folder / STATE).exists()
    assert (vae.validation.psnr > 5).all() and vae.validation.psnr.nunique() == 2
    assert unet.drawn.step.tolist() == [3, 6]
    pipeline = StableDiffusionPipeline.from_pretrained(unet.folder, safety_checker=None)
    assert pipeline.vae.config.scaling_factor != 1.0
    assert "pretraining/pretrain.ipynb" in unet.reproduce()[-2] and '"vae_steps": 6' in unet.reproduce()[-2]
    assert vae.reproduce() == unet.reproduce()


def test_it_goes_on_as_if_nothing_had_happened(trained, images, tmp_path):
    _, whole_vae, whole_unet = trained
    asked = config(images, tmp_path, validation_prompts=["picture 1"])
    with pytest.raises(KeyboardInterrupt):
        stages.train_vae(asked, **VAE, show=interrupted_after(5))
    torch.rand(7)
    vae = stages.train_vae(asked, **VAE, show=quiet)
    with pytest.raises(KeyboardInterrupt):
        stages.train_unet(asked, vae, interrupted_after(3))
    unet = stages.train_unet(asked, vae, quiet)
    for whole, resumed in ((whole_vae, vae), (whole_unet, unet)):
        assert what_happened(resumed).equals(what_happened(whole))
        assert resumed.validation.equals(whole.validation)
        assert weights(resumed) == weights(whole)
    assert [one["after_step"] for one in vae.environment["resumed"]] == [4]


def test_what_is_complete_is_not_trained_again(trained):
    asked, _, unet = trained
    before = unet.steps
    assert stages.train_unet(asked, stages.train_vae(asked, **VAE, show=quiet), quiet).steps.equals(before)


def test_other_settings_need_another_folder(trained):
    asked, vae, _ = trained
    with pytest.raises(RunError, match=r"learning_rate was 0.001, now 0.01\. Give another output_dir"):
        stages.train_unet(asked.updated(learning_rate=1e-2), vae, quiet)
    with pytest.raises(RunError, match="steps was 6, now 9"):
        stages.train_unet(asked.updated(max_train_steps=9), vae, quiet)


def test_interrupted_before_anything_was_kept_it_begins_again(images, tmp_path):
    asked = config(images, tmp_path)
    with pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps it, and with it all that its frames hold
        stages.train_vae(asked, **VAE, show=interrupted_after(1))
    assert kept.tb
    assert stages.train_vae(asked, **VAE, show=quiet).steps.step.tolist() == [1, 2, 3, 4, 5, 6]


def test_two_at_once_do_not_write_into_one_folder(images, tmp_path):
    asked = config(images, tmp_path)

    def another(*_):
        stages.train_vae(asked, **VAE, show=quiet)

    with pytest.raises(RunError, match="another run is using this folder"):
        stages.train_vae(asked, **VAE, show=another)


def test_a_loss_that_is_not_finite_ends_it(images, tmp_path):
    with pytest.raises(RunError, match=r"the loss of step \d is not finite"):
        stages.train_vae(config(images, tmp_path), 6, 4, 1e20, quiet)
    assert len(Run(tmp_path / "vae").steps) < 6


def test_what_it_cannot_do_is_said(images, image_folder, tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs an accelerator|does not scale its loss"):
        stages.train_vae(config(images, tmp_path, mixed_precision="fp16"), **VAE, show=quiet)
    with pytest.raises(ConfigError, match="needs steps, validation_loss_steps and a seed"):
        stages.train_vae(config(images, tmp_path, seed=None), **VAE, show=quiet)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps, dream_training: pretraining does not use them"):
        both = config(images, tmp_path, gradient_accumulation_steps=2, dream_training=True)
        stages.train_vae(both, **VAE, show=quiet)
    for ignored in (dict(num_processes=2), dict(center_crop=False), dict(allow_tf32=True)):
        with pytest.raises(ConfigError, match=next(iter(ignored))):
            stages.train_vae(config(images, tmp_path, **ignored), **VAE, show=quiet)
    one_split = config(images, tmp_path, dataset_name=None, train_data_dir=str(image_folder(3)))
    with pytest.raises(DataError, match="no held-out images"):
        stages.train_vae(one_split, **VAE, show=quiet)


def test_a_style_changes_the_colours_and_nothing_else():
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    grey = stages.in_style("grey", pixels)
    assert torch.allclose(grey[:, 0], grey[:, 1]) and grey.std() > 0
    for style in stages.STYLES:
        outline, paper = (stages.in_style(style, torch.full((1, 3, 1, 1), value)) for value in (-1.0, 1.0))
        assert outline.min() >= -1 and paper.max() <= 1 and (paper > outline).all(), "lines stay darker than the paper"


def test_what_ships_is_what_was_trained(trained, tmp_path, monkeypatch):
    _, _, unet = trained
    stages.export(unet, tmp_path / "tiny")
    monkeypatch.setattr(embedded, "TRAINED_WEIGHTS", tmp_path / "tiny")
    assert sum(file.stat().st_size for file in (tmp_path / "tiny").iterdir()) < 30e6
    shipped, own = (
        StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        for folder in (embedded.folder("tiny", str(tmp_path / "cache")), unet.folder)
    )
    for part in ("vae", "unet", "text_encoder"):
        for one, other in zip(getattr(shipped, part).parameters(), getattr(own, part).parameters()):
            assert one.dtype == torch.float32 and torch.equal(one, other.half().float())
    assert shipped.vae.config.scaling_factor == own.vae.config.scaling_factor
    assert shipped.tokenizer("red heart").input_ids == own.tokenizer("red heart").input_ids
