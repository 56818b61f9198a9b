"""Float16 with a scaled loss, as on a GPU. benchmarks/float16.py sets aside that it is refused on a CPU."""

import json
from pathlib import Path

import float16
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from test_checkpoints import power_off_after, records
from training import small_data, small_model, train

from sdnb.auditing.case import FAILS, HOLDS
from sdnb.launch.plan import prepare
from sdnb.launch.replay import _restored
from sdnb.metrics.results import measure
from sdnb.run import files
from sdnb.run.folder import RunFolder, begin
from sdnb.sealing.seal import seal
from sdnb.sealing.verify import verify
from sdnb.training.replay import RESTORED, replay

pytestmark = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="this torch scales losses on a GPU alone")

STEPS, TOO_LARGE, SMALL = 10, 2.0**22, 2.0**12
SAME_WORK = dict(encoder_cache_gib=0, fold_micro_batches=1, fused_optimizer=False)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def settings(settings):
    return {
        **settings, "mixed_precision": "fp16", "use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2,
        "steps": STEPS, "checkpointing_steps": STEPS,
    }  # fmt: skip


@pytest.fixture
def begin_with(monkeypatch):
    """Make trainings begin with a loss scale. Returns a list, which gets what float16.py records of each step."""

    def begin(scale):
        monkeypatch.undo()
        noted = []
        float16.scale_on_cpu(scale, noted.append, monkeypatch.setattr)
        float16.accept_on_cpu(monkeypatch.setattr)
        return noted

    return begin


def plain_loop(init_scale, settings):
    """The reference's algorithm in plain torch, without sdnb and accelerate. Returns the records of the steps, and the
    weights and averages at the end."""
    parts, folder = StableDiffusionPipeline.from_pretrained(small_model()), Path(small_data()) / "train"
    noise_scheduler = DDPMScheduler.from_pretrained(small_model(), subfolder="scheduler")
    unet = parts.unet.train()
    # Where weights need no gradients, torch computes a linear layer in another way.
    vae, text_encoder = (part.half().requires_grad_(False) for part in (parts.vae, parts.text_encoder))
    examples = []
    for line in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
        pixels = torch.tensor(np.array(Image.open(folder / line["file_name"]).convert("RGB"))).permute(2, 0, 1)
        tokens = parts.tokenizer(line["text"], padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
        examples.append(((pixels.contiguous() / 255 - 0.5) / 0.5, tokens))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings["learning_rate"], weight_decay=1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    scaler, ema = torch.amp.GradScaler("cpu", init_scale), EMAModel(unet.parameters())
    torch.manual_seed(settings["seed"])
    loader = torch.utils.data.DataLoader(examples, batch_size=2, shuffle=True)
    steps = []
    while len(steps) < STEPS:
        train_loss = 0.0
        for number, (pixels, tokens) in enumerate(loader, 1):
            with torch.no_grad():
                latents = vae.encode(pixels.half()).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),))
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                hidden_states = text_encoder(tokens)[0]
            with torch.autocast("cpu", torch.float16):
                prediction = unet(noisy, timesteps, hidden_states).sample
            loss = F.mse_loss(prediction.float(), noise.float())
            train_loss += loss.item() / 2
            scaler.scale(loss / 2).backward()
            if number % 2 and number < len(loader):
                continue
            before, learning_rate = scaler.get_scale(), schedule.get_last_lr()[0]
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            skipped = scaler.get_scale() < before
            if not skipped:
                schedule.step()
            ema.step(unet.parameters())  # also after a skipped step
            steps.append(dict(lr=learning_rate, scale=scaler.get_scale(), skipped=skipped, train_loss=train_loss))
            train_loss = 0.0
            if len(steps) == STEPS:
                break
    names = [name for name, _ in unet.named_parameters()]
    return steps, dict(unet.named_parameters()), dict(zip(names, ema.shadow_params))


def failed(run):
    """What verify finds wrong with a run. A CPU multiplies matrices in float16 slower than it convolves."""
    return {finding.check for finding in verify(seal(run), run).findings if finding.verdict == FAILS} - {"speed"}


def apart(weights, expected):
    """The largest difference of a weight, relative to its tensor's largest."""
    return max(((weights[name] - one).abs().max() / one.abs().max()).item() for name, one in expected.items())


@pytest.mark.parametrize(
    ("how", "scale", "of_loss", "of_weights"),
    [
        (SAME_WORK, TOO_LARGE, 0, 0),
        (dict(fold_micro_batches=1), TOO_LARGE, 2**-12, 0.1),
        (dict(), SMALL, 2**-12, 0.1),
    ],
    ids=["the same work", "cached, fused", "cached, fused, folded"],
)
def test_the_references_algorithm(settings, begin_with, how, scale, of_loss, of_weights):
    expected, weights, averages = plain_loop(scale, settings)
    noted = begin_with(scale)
    run = train(settings, **how)
    assert noted == [{name: step[name] for name in ("lr", "scale", "skipped")} for step in expected]
    assert sum(step["skipped"] for step in expected) >= 2 or scale == SMALL
    assert list(measure(run).steps.skipped) == [step["skipped"] for step in expected]
    assert list(run.steps.lr) == [step["lr"] for step in expected]
    losses = np.array([step["train_loss"] for step in expected])
    assert np.abs(run.steps.train_loss / losses - 1).max() <= max(of_loss, 1e-7)  # the sum of two is rounded
    checkpoint = run.folder / f"checkpoint-{STEPS}"
    for folder, trained in (("unet", weights), ("unet_ema", averages)):
        assert apart(load_file(checkpoint / folder / WEIGHTS), trained) <= of_weights
    saved = load_file(run.folder / "unet" / WEIGHTS)
    assert apart(saved, averages) <= of_weights and apart(saved, weights) > 1e-2


def test_folded_gradients_overflow_at_a_smaller_scale(settings, begin_with, tmp_path):
    skipped = {}
    for folded in (1, 2):
        begin_with(TOO_LARGE)
        run = train(settings, fold_micro_batches=folded, output_dir=str(tmp_path / str(folded)))
        skipped[folded] = list(measure(run).steps.skipped)
    assert 2 <= sum(skipped[1]) <= sum(skipped[2]) <= sum(skipped[1]) + 1


def test_what_is_said_of_skipped_steps(settings, begin_with, tmp_path):
    noted = begin_with(TOO_LARGE)
    run = train(settings)
    count = sum(step["skipped"] for step in noted)
    assert 2 <= count < STEPS and run.steps.grad_norm.isna().sum() == count
    measured = measure(run)
    assert measured["skipped steps"].text == f"{count} of {STEPS}" and run.state == "complete"
    assert run.log.count("skipped, as its gradients overflowed") == count
    assert f"loss scale: {noted[count - 1]['scale']:g}" in run.log
    assert failed(run) == set()


def test_a_run_in_which_every_step_is_skipped(settings, begin_with):
    begin_with(2.0**60)
    run = train(settings, steps=2)
    assert measure(run)["skipped steps"].text == "2 of 2" and list(run.steps.lr) == [0, 0]
    assert failed(run) == set()


@pytest.mark.parametrize("lora", [dict(), dict(lora=True, use_ema=False, learning_rate=1e-2)], ids=["", "LoRA"])
def test_resuming_between_skipped_steps_is_exact(settings, begin_with, tmp_path, lora):
    settings |= dict(checkpointing_steps=2, **lora)
    begin_with(2.0**32 if lora else TOO_LARGE * 4)
    whole = train(settings)
    assert list(measure(whole).steps.skipped[1:3]) == [True, True] and not measure(whole).steps.skipped.all()
    stopped = str(power_off_after(whole, 2, tmp_path / "stopped"))
    resumed = train(settings, output_dir=stopped, resume_from_checkpoint="latest")
    assert "resuming after step 2" in resumed.log and records(resumed) == records(whole)
    for file in whole.folder.rglob(f"checkpoint-{STEPS}/**/*.safetensors"):
        assert (resumed.folder / file.relative_to(whole.folder)).read_bytes() == file.read_bytes(), file


def test_replaying_from_between_skipped_steps(settings, begin_with, tmp_path):
    begin_with(TOO_LARGE)
    run = train(settings, checkpointing_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = prepare(run.config.measured_only(output_dir=str(tmp_path / "again")))
    again, held = begin(plan.config, plan.environment)
    with held:
        replay(plan.config, str(run.folder), [(2, 5)], [])
    restored = files.read_lines(again / RESTORED)
    assert list(restored.optimizer_steps) == [0]
    assert _restored(restored, run.steps, run.config).verdict == HOLDS
    assert _restored(restored.assign(moment=1e-9), run.steps, run.config).verdict == FAILS
    replayed, before = RunFolder(again).steps, run.steps.iloc[2:5].reset_index()
    for name in ("loss", "lr", "grad_norm"):
        np.testing.assert_array_equal(replayed[name].astype(float), before[name].astype(float))
