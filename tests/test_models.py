import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from sdnb.errors import ModelError
from sdnb.models import embedded
from sdnb.models import pipeline as models
from sdnb.models.flops import flop_per_image
from sdnb.models.pipeline import Parts, assemble, load_parts, model_folder
from sdnb.settings.config import TrainConfig


def config(model="tiny", **settings):
    return TrainConfig(pretrained_model_name_or_path=model, dataset_name="openmoji", resolution=64, **settings)


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(model_folder(config()), tmp_path / "model"))


def test_the_embedded_model():
    parts = load_parts(config())
    names = [type(part).__name__ for part in vars(parts).values()]
    assert names == ["CLIPTokenizer", "CLIPTextModel", "AutoencoderKL", "UNet2DConditionModel", "DDPMScheduler"]
    millions = sum(parameter.numel() for parameter in parts.unet.parameters()) / 1e6
    assert 9 < millions < 12
    images = torch.zeros(1, 3, 64, 64)
    assert parts.vae.encode(images).latent_dist.mean.shape == (1, 4, 16, 16)
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
    load_parts(config(cache_dir=str(tmp_path)))
    assert torch.equal(state, torch.get_rng_state())


def test_its_tokenizer_knows_the_captions_words():
    tokenizer = load_parts(config()).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("Red Heart").input_ids) == [
        "<|startoftext|>", "red</w>", "heart</w>", "<|endoftext|>",
    ]  # fmt: skip
    long = tokenizer("word " * 100, truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert len(long) == 24
    assert tokenizer.decode(tokenizer("snow ☃ ünïcode").input_ids, skip_special_tokens=True).startswith("snow")


@pytest.mark.parametrize(("name", "resolution", "forward", "training", "lora", "vae_encoder", "text_encoder"), [
    ("sd-v1-4-random", 256, 0.1801, 0.5373, 0.3620, 0.2727, 0.0133),
    ("sd-v1-4-random", 512, 0.8033, 2.407, 1.714, 1.117, 0.0133),  # the published figures, but for LoRA
    ("sd-v1-4-random", 768, 2.148, 6.441, 4.887, 2.609, 0.0133),
    ("sd-v1-4-random", 960, 3.900, 11.70, 9.270, 4.230, 0.0133),
    ("sd-v2-1-random", 256, 0.1811, 0.5393, 0.3630, 0.2727, 0.0451),
    ("sd-v2-1-random", 512, 0.8043, 2.409, 1.715, 1.117, 0.0451),
    ("sd-v2-1-random", 768, 2.149, 6.443, 4.888, 2.609, 0.0451),
    ("sd-v2-1-random", 960, 3.901, 11.70, 9.271, 4.230, 0.0451),
])  # fmt: skip
def test_the_flop_of_stable_diffusion(name, resolution, forward, training, lora, vae_encoder, text_encoder):
    """In TFLOP for an image. The parameters are those of the models on the hub."""
    architecture = embedded.ARCHITECTURES[name]
    with torch.device("meta"):
        parts = Parts(
            tokenizer=type("Tokenizer", (), {"model_max_length": 77}),
            text_encoder=CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"])),
            vae=models.AutoencoderKL(**architecture["vae"]),
            unet=models.UNet2DConditionModel(**architecture["unet"]),
            noise_scheduler=None,
        )
    counts = {"sd-v1-4-random": (859_520_964, 123_060_480), "sd-v2-1-random": (865_910_724, 340_387_840)}[name]
    assert counts == tuple(part.num_parameters() for part in (parts.unet, parts.text_encoder))
    flop = {part: count / 1e12 for part, count in flop_per_image(parts, resolution).items()}
    assert flop == pytest.approx(
        dict(unet_forward=forward, unet_training=training, vae_encoder=vae_encoder, text_encoder=text_encoder),
        rel=1e-3,
    )
    assert flop_per_image(parts, resolution, adapter_rank=4)["unet_training"] / 1e12 == pytest.approx(lora, rel=1e-3)


def test_the_flop_of_an_adapter():
    """A frozen layer has no gradient of its weights, which is a third of its training; and what is before the first
    adapter has no backward pass."""
    parts = load_parts(config())
    whole, adapter = (flop_per_image(parts, 64, rank) for rank in (None, 4))
    of_adapter = adapter["unet_forward"] - whole["unet_forward"]
    assert 0 < of_adapter < 0.02 * whole["unet_forward"]
    assert 1.9 < (adapter["unet_training"] - 3 * of_adapter) / whole["unet_forward"] < 2
    assert whole["unet_training"] / whole["unet_forward"] == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize(
    "name, said", [("tinny", "did you mean tiny"), ("./model", "no such folder"), ("a/b/c", "tiny")]
)
def test_a_name_that_is_no_model(name, said):
    with pytest.raises(ModelError, match=said):
        load_parts(config(name))


def test_a_hub_model_without_a_network():
    with pytest.raises(ModelError, match="some/model.*cannot be loaded"):
        load_parts(config("some/model"))


def test_an_incomplete_folder_says_what_is_missing(copied):
    shutil.rmtree(copied / "vae")
    with pytest.raises(ModelError, match=r"has no vae/.*unet"):
        load_parts(config(str(copied)))


def change(folder, file, **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


SAFETY = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": [None, None]}


@pytest.mark.parametrize(
    "file, values, said",
    [
        ("model_index.json", dict(_class_name="StableDiffusionXLPipeline"), "is a StableDiffusionXLPipeline; only"),
        ("model_index.json", dict(_class_name="FluxPipeline"), "is a FluxPipeline; only"),
        ("model_index.json", dict(_class_name=["my_pipeline", "MyPipeline"]), "my_pipeline.*only"),
        ("model_index.json", dict(text_encoder=["transformers", "XLMRobertaModel"]), "text_encoder is a XLMRobertaM"),
        ("model_index.json", SAFETY, "no safety_checker/, which its model_index.json names"),
        ("unet/config.json", dict(in_channels=9), "9 input channels, but the VAE's latents have 4.*inpainting"),
        ("unet/config.json", dict(addition_embed_type="text_time"), "needs inputs.*addition_embed_type = text_time"),
        ("unet/config.json", dict(num_class_embeds=1000), "needs inputs.*num_class_embeds = 1000"),
        ("unet/config.json", dict(cross_attention_dim=999), "takes captions 999 wide, but its text_encoder gives"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_it_is_loaded(copied, file, values, said, monkeypatch):
    change(copied, file, **values)
    monkeypatch.setattr(models, "_load", lambda *_, **__: pytest.fail("it loads something"))
    with pytest.raises(ModelError, match=said) as raised:
        load_parts(config(str(copied)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_of_a_variant_only(copied, part):
    (weights,) = (copied / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(ModelError, match=f"its {part} has only weights of a variant: set variant = fp16"):
        load_parts(config(str(copied)))


def test_sharded_weights_are_of_no_variant(copied):
    folder = copied / "text_encoder"
    CLIPTextModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="300KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    load_parts(config(str(copied)))


@pytest.mark.parametrize("name", ["model.safetensors", "v1-5-pruned.ckpt"])
def test_a_single_file_says_how_to_make_it_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(ModelError, match=f"is a single file; .*from_single_file.*{name}.*save_pretrained"):
        load_parts(config(str(tmp_path / name)))


def downloaded(folder, hub):
    """The hub's cache, as the download of some/model leaves it. Returns the folder in it."""
    snapshot = hub / "models--some--model" / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    (hub / "models--some--model" / "refs").mkdir()
    (hub / "models--some--model" / "refs" / "main").write_text("0123abc")
    return snapshot


def test_a_downloaded_model_that_cannot_be_trained(copied, tmp_path):
    change(copied, "model_index.json", _class_name="StableDiffusionXLPipeline")
    downloaded(copied, tmp_path / "hub")
    with pytest.raises(ModelError, match="some/model: is a StableDiffusionXLPipeline"):
        model_folder(config("some/model", cache_dir=str(tmp_path / "hub")))


def test_a_folder_without_vocabulary(copied):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copied / "tokenizer" / name).unlink(missing_ok=True)  # transformers' major versions read different ones
    with pytest.raises(ModelError, match="tokenizer"):
        load_parts(config(str(copied)))


def test_weights_that_are_no_safetensors_are_not_read(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"its unet cannot be loaded.*\n.*safetensors"):
        load_parts(config(str(copied)))


def test_damaged_weights(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="its unet cannot be loaded"):
        load_parts(config(str(copied)))


def test_a_hub_model_that_was_downloaded_before(copied, tmp_path):
    """Without a network."""
    snapshot = downloaded(copied, tmp_path / "hub")
    hub = config("some/model", cache_dir=str(tmp_path / "hub"))
    assert model_folder(hub) == str(snapshot)
    parts = load_parts(hub)
    assert torch.equal(parts.unet.conv_in.weight, load_parts(config()).unet.conv_in.weight)
    assert assemble(hub, parts).unet is parts.unet
