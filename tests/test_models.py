import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from sdnb.errors import ModelError
from sdnb.models import embedded
from sdnb.models import pipeline as models
from sdnb.settings.config import TrainConfig


def config(model="tiny", **settings):
    return TrainConfig(pretrained_model_name_or_path=model, dataset_name="openmoji", resolution=64, **settings)


@pytest.fixture
def model_folder(tmp_path):
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(models.source(config()), tmp_path / "model"))


def test_the_embedded_model():
    parts = models.load(config())
    names = [type(part).__name__ for part in vars(parts).values()]
    assert names == ["CLIPTokenizer", "CLIPTextModel", "AutoencoderKL", "UNet2DConditionModel", "DDPMScheduler"]
    millions = sum(parameter.numel() for parameter in parts.unet.parameters()) / 1e6
    assert 9 < millions < 12
    pictures = torch.zeros(1, 3, 64, 64)
    assert parts.vae.encode(pictures).latent_dist.mean.shape == (1, 4, 16, 16)
    assert all(parameter.dtype == torch.float32 for parameter in parts.unet.parameters())
    assert parts.unet.training and all(parameter.requires_grad for parameter in parts.unet.parameters())
    assert not any(
        parameter.requires_grad for part in (parts.vae, parts.text_encoder) for parameter in part.parameters()
    )


@pytest.mark.parametrize("name", ["tiny", "tiny-random"])
def test_the_embedded_model_is_the_same_wherever_it_is_built(tmp_path, monkeypatch, name):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    once = embedded.folder(name, str(tmp_path / "a"))
    assert not seeded, "a GPU's generator is the training's"
    again = embedded.folder(name, str(tmp_path / "b"))
    files = [path.relative_to(once) for path in once.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert all((once / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_loading_and_building_draw_nothing_from_the_trainings_generator(tmp_path):
    state = torch.get_rng_state()
    models.load(config(cache_dir=str(tmp_path)))
    assert torch.equal(state, torch.get_rng_state())


def test_its_tokenizer_knows_the_captions_words():
    tokenizer = models.load(config()).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("Red Heart").input_ids) == [
        "<|startoftext|>", "red</w>", "heart</w>", "<|endoftext|>",
    ]  # fmt: skip
    long = tokenizer("word " * 100, truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert len(long) == 24
    assert tokenizer.decode(tokenizer("snow ☃ ünïcode").input_ids, skip_special_tokens=True).startswith("snow")


def test_byte_pairs_are_learnt_most_frequent_first():
    words = {"aab": 3, "ab": 2, "b": 9}
    assert embedded.learn_merges(words, 10)[:2] == [("a", "b</w>"), ("a", "ab</w>")]


def test_the_flop_of_stable_diffusion():
    """The published figures for SD v1-4 at 512×512: 0.8033 and 2.407 TFLOP for the UNet, 1.117 VAE, 0.0133 text."""
    architecture = embedded.SD_V1_4
    with torch.device("meta"):
        parts = models.Parts(
            tokenizer=type("Tokenizer", (), {"model_max_length": 77}),
            text_encoder=CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"])),
            vae=models.AutoencoderKL(**architecture["vae"]),
            unet=models.UNet2DConditionModel(**architecture["unet"]),
            noise_scheduler=None,
        )
    assert sum(parameter.numel() for parameter in parts.unet.parameters()) == 859_520_964
    flop = {name: count / 1e12 for name, count in models.flop_per_image(parts, 512).items()}
    assert flop == pytest.approx(
        {"unet_forward": 0.8033, "unet_training": 2.407, "vae_encoder": 1.117, "text_encoder": 0.0133}, rel=1e-3
    )


@pytest.mark.parametrize(
    "name, said", [("tinny", "did you mean tiny"), ("./model", "no such folder"), ("a/b/c", "tiny")]
)
def test_a_name_that_is_no_model(name, said):
    with pytest.raises(ModelError, match=said):
        models.load(config(name))


def test_a_hub_model_without_a_network():
    with pytest.raises(ModelError, match="some/model.*cannot be loaded"):
        models.load(config("some/model"))


def test_an_incomplete_folder_says_what_is_missing(model_folder):
    shutil.rmtree(model_folder / "vae")
    with pytest.raises(ModelError, match=r"has no vae/.*unet"):
        models.load(config(str(model_folder)))


def test_a_folder_without_vocabulary(model_folder):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (model_folder / "tokenizer" / name).unlink(missing_ok=True)  # transformers' major versions read different ones
    with pytest.raises(ModelError, match="tokenizer"):
        models.load(config(str(model_folder)))


def test_weights_that_are_no_safetensors_are_not_read(model_folder):
    weights = model_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"its unet cannot be loaded.*\n.*safetensors"):
        models.load(config(str(model_folder)))


def test_damaged_weights(model_folder):
    weights = model_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="its unet cannot be loaded"):
        models.load(config(str(model_folder)))


def test_a_hub_model_that_was_downloaded_before(model_folder, tmp_path):
    """The hub's cache, as a download leaves it, without a network."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "0123abc"
    shutil.copytree(model_folder, snapshot)
    (tmp_path / "hub" / "models--some--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--some--model" / "refs" / "main").write_text("0123abc")
    hub = config("some/model", cache_dir=str(tmp_path / "hub"))
    assert models.source(hub) == str(snapshot)
    parts = models.load(hub)
    assert torch.equal(parts.unet.conv_in.weight, models.load(config()).unet.conv_in.weight)
    assert models.pipeline(hub, parts).unet is parts.unet
