"""LoRA: what is trained, saved and drawn. That it is the reference's training is in test_parity."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from processes import ROOT
from safetensors.torch import load_file, save_file
from test_checkpoints import power_off_after, records
from test_flags import MODEL_AND_DATA, REFERENCE
from training import train

from sdnb.auditing.case import FAILS
from sdnb.certifying.saved_weights import quantities_of
from sdnb.errors import ConfigError, RunError
from sdnb.figures import run_plots
from sdnb.machine import environment
from sdnb.models.lora import add_adapter, merge_adapter
from sdnb.models.pipeline import assemble, load_parts
from sdnb.report import explore
from sdnb.report.run import Run
from sdnb.run import hub
from sdnb.run.folder import ADAPTER
from sdnb.sealing.seal import seal
from sdnb.sealing.verify import verify
from sdnb.settings.config import TrainConfig
from sdnb.settings.flags import command_line, parse
from sdnb.settings.notebook import from_notebook
from sdnb.training import setup

# The defaults of train_text_to_image_lora.py that are others, and its own two flags. It lacks some of the other's.
OF_LORA = dict(output_dir="sd-model-finetuned-lora", validation_epochs=1, num_validation_images=4, rank=4)
LACKING = ("input_perturbation", "use_ema", "non_ema_revision", "offload_ema", "foreach_ema", "dream_training",
           "dream_detail_preservation", "tracker_project_name")  # fmt: skip

# The command of the chip-evaluation suite, with the embedded model and data.
OF_THE_SUITE = """
  --pretrained_model_name_or_path=tiny
  --dataset_name=openmoji
  --dataloader_num_workers=8
  --resolution=256
  --center_crop
  --random_flip
  --train_batch_size=8
  --gradient_accumulation_steps=4
  --max_train_steps=5000
  --learning_rate=1e-04
  --max_grad_norm=1
  --lr_scheduler=cosine
  --lr_warmup_steps=0
  --output_dir=pokemon
  --hub_model_id=pokemon-lora
  --report_to=wandb
  --checkpointing_steps=50000
  --validation_epochs=50000
  --validation_prompt
  A+pokemon+with+blue+eyes.
  --report_to=wandb
  --seed=1337
  --mixed_precision=fp16
  --image_column=image
  --caption_column=text
"""


@pytest.fixture
def settings(settings):
    return {**settings, "lora": True, "rank": 2, "learning_rate": 1e-2, "steps": 4, "num_validation_images": 1}


def adapter_of(run):
    # A copy: safetensors of 2024 maps the file, and a resumed run writes it again.
    return {name: weights.clone() for name, weights in load_file(run.folder / ADAPTER).items()}


def test_the_defaults_are_the_references():
    made = parse(MODEL_AND_DATA, lora=True)
    expected = {name: value for name, value in REFERENCE.items() if name not in LACKING} | OF_LORA
    assert {name: getattr(made, name) for name in expected} == expected
    assert made == parse([*MODEL_AND_DATA, "--lora"])
    assert made == TrainConfig(pretrained_model_name_or_path="tiny", dataset_name="openmoji", lora="true")


def test_the_command_of_the_suite():
    made = parse([flag.replace("+", " ") for flag in OF_THE_SUITE.split()], lora=True)
    assert (made.lr_scheduler, made.validation_prompts, made.rank) == ("cosine", ("A pokemon with blue eyes.",), 4)
    assert parse(command_line(made.model_dump())) == made


def test_a_notebooks_own_average_is_of_whole_models():
    given = dict(pretrained_model_name_or_path="tiny", dataset_name="openmoji", use_ema=True, lora=True)
    own = "# Parameters of this run\nuse_ema = True"
    assert not from_notebook({**given, "In": [own, "# Parameters\nlora = True"]}).use_ema
    assert from_notebook({**given, "lora": "false", "In": [own, "# Parameters\nlora = 'false'"]}).use_ema
    for cells in ([f"{own}\nlora = True"], [own, "# Parameters\nlora = True\nuse_ema = True"]):
        with pytest.raises(ConfigError, match="use_ema is not defined for lora"):
            from_notebook({**given, "In": cells})


def test_a_rank_without_an_adapter():
    with pytest.raises(ConfigError, match="rank = 8 is the rank of an adapter: set lora = True"):
        parse([*MODEL_AND_DATA, "--rank=8"])


def test_only_the_adapter_is_trained(settings, monkeypatch):
    kept = []
    monkeypatch.setattr(setup, "add_adapter", lambda unet, rank: kept.append(unet) or add_adapter(unet, rank))
    run = train(settings, max_grad_norm=1e-3)
    begun = dict(load_parts(run.config).unet.named_parameters())
    (unet,) = kept
    trained = {name: weights for name, weights in unet.named_parameters() if weights.requires_grad}
    frozen = {name.replace(".base_layer", ""): one for name, one in unet.named_parameters() if name not in trained}
    assert all(torch.equal(frozen[name], weights) for name, weights in begun.items()) and len(frozen) == len(begun)
    assert {name.partition(".lora_")[0].rpartition(".attn")[2][2:] for name in trained} == {
        "to_q", "to_k", "to_v", "to_out.0"
    }  # fmt: skip
    assert run.model["parameters"]["lora"] == sum(weights.numel() for weights in adapter_of(run).values())
    assert {path.name for path in run.folder.glob("*.safetensors")} == {ADAPTER} and not (run.folder / "unet").exists()
    # As in the reference, nothing is clipped, whatever max_grad_norm says.
    squares = (0.001 * 0.999 ** np.arange(3, -1, -1)) @ run.steps.grad_norm.to_numpy() ** 2
    assert run.steps.grad_norm.min() > 2e-3 and run.summary["second_moment"] == pytest.approx(squares, rel=1e-4)
    assert "gradients are not clipped" in run.log


def test_drawn_with_a_part_of_the_adapter(settings):
    """Drawn three times at the end; by the file that it saved, any pipeline draws the same."""
    run = train(settings, validation_prompts=["sun"], learning_rate=0.3, seed=3)
    drawn = run.drawn
    assert list(drawn[drawn.step == 4].scale) == [0, 0.5, 1]
    before, none, half, whole = [run.sample(file).tobytes() for file in [drawn.file[0], *drawn[drawn.step == 4].file]]
    assert before == none and len({none, half, whole}) == 3
    labels = {" ".join(axes.get_ylabel().split()) for axes in run_plots.samples(run).axes}
    assert labels >= {"before", *(f"after step 4{scale}" for scale in (", adapter × 0", ", adapter × 0.5", ""))}
    parts = load_parts(run.config)
    pipelines = [assemble(run.config, load_parts(run.config)), assemble(run.config, parts)]
    pipelines[0].load_lora_weights(str(run.folder), weight_name=ADAPTER)
    merge_adapter(parts.unet, run.folder / ADAPTER)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    how = dict(latents=latents, num_inference_steps=2, output_type="latent", guidance_scale=2.0)
    one, other = (pipeline("sun", **how).images for pipeline in pipelines)
    base = assemble(run.config, load_parts(run.config))("sun", **how).images
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert (base - one).abs().max() > 1e-2
    chart = explore.draw(run.config, ["sun"], Run(run.folder), num_inference_steps=1)
    assert len(chart.axes) == 2


@pytest.mark.parametrize("how", [dict(), dict(mixed_precision="bf16"), dict(center_crop=False, random_flip=True)])
def test_resuming_is_exact(settings, tmp_path, how):
    settings |= dict(lr_scheduler="cosine", **how)
    whole = train(settings, checkpointing_steps=3)
    stopped = str(power_off_after(whole, 3, tmp_path / "stopped"))
    resumed = train(settings, checkpointing_steps=3, output_dir=stopped, resume_from_checkpoint="latest")
    assert "resuming after step 3" in resumed.log
    assert records(resumed) == records(whole)
    assert (resumed.folder / ADAPTER).read_bytes() == (whole.folder / ADAPTER).read_bytes()
    assert all(weights.dtype == torch.float32 for weights in adapter_of(resumed).values())


@pytest.mark.parametrize("names", ["diffusers", "PEFT"])
def test_the_references_own_checkpoint(settings, names):
    """v0.26.3 saves an adapter with diffusers' names in a checkpoint, later versions with PEFT's."""
    settings |= dict(checkpointing_steps=2)
    whole = train(settings)
    folder = whole.folder / "checkpoint-2"
    for name in ("checkpoint.json", "place_0.pt"):
        (folder / name).unlink()
    if names == "PEFT":
        weights = load_file(folder / ADAPTER)
        renamed = {"lora.down": "lora_A", "lora.up": "lora_B"}
        save_file(
            {name.replace(old, renamed[old]): one for name, one in weights.items() for old in renamed if old in name},
            folder / ADAPTER,
        )
    shutil.rmtree(whole.folder / "checkpoint-4")
    before = adapter_of(whole)
    resumed = train({**settings, "resume_from_checkpoint": "checkpoint-2"})
    assert "resuming after step 2" in resumed.log and "does not contain its position" in resumed.log
    moved = [(adapter_of(resumed)[name] - one).abs().max() for name, one in before.items()]
    assert 0 < max(moved) < 0.05, "two steps in another order"


def test_an_adapter_of_another_rank_is_not_resumed(settings, tmp_path):
    settings |= dict(checkpointing_steps=2)
    train(settings)
    with pytest.raises(RunError, match="rank: 2 in the checkpoint, 3 now"):
        train({**settings, "rank": 3, "resume_from_checkpoint": "latest"})
    (tmp_path / "run" / "checkpoint-4" / "checkpoint.json").unlink()
    with pytest.raises(RunError, match="is of another adapter: another rank, or another model"):
        train({**settings, "rank": 3, "resume_from_checkpoint": "checkpoint-4"})


def test_frozen_weights_are_in_half_precision_and_trained_ones_are_not(settings):
    config = TrainConfig(**settings, mixed_precision="bf16")
    parts = load_parts(config)
    setup.configure(parts, config, torch.device("cpu"))
    dtypes = {(weights.dtype, weights.requires_grad) for weights in parts.unet.parameters()}
    assert dtypes == {(torch.bfloat16, False), (torch.float32, True)}


def test_what_can_be_checked_of_a_run(settings, tmp_path):
    run = train(settings, validation_loss_steps=2, checkpointing_steps=2, num_processes=1)
    found = quantities_of(run, 4)
    assert found["tensors of weights that did not move"] == 0
    assert found["held-out loss of the saved weights"] == pytest.approx(run.validation.loss.iloc[-1], rel=1e-5)
    assert found["squared gradients in the optimizer, over the recorded"] == pytest.approx(1, abs=1e-4)
    file = seal(run, tmp_path / "run.sdnb.zip")
    assert not [finding for finding in verify(file).findings if finding.verdict == FAILS]
    card = str(hub.card(run))
    assert "An adapter (LoRA) of" in card and "pipeline.load_lora_weights" in card and "- lora" in card


def test_in_place_of_the_references_script(settings, tmp_path):
    flags = [flag for flag in command_line(TrainConfig(**settings).model_dump()) if flag != "--lora"]
    command = [sys.executable, "-m", "sdnb.train_lora", *flags, "--max_train_steps=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / ADAPTER).exists()


def test_xformers_is_replaced_only_if_asked(settings):
    asked = {**settings, "enable_xformers_memory_efficient_attention": True}
    with pytest.raises(
        ConfigError, match=r"pip install xformers; or set without_xformers: torch's own attention, which"
    ):
        environment.require(TrainConfig(**asked))
    run = train(asked, without_xformers=True, steps=1)
    assert "torch's own attention runs in its place" in run.log
