"""The training itself, on one rank in this process, with the small model."""

import json
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch._dynamo.testing import CompileCounter
from training import small_model, train

from sdnb.compat import has_stances
from sdnb.data.loading import load_data
from sdnb.errors import ConfigError
from sdnb.machine import environment
from sdnb.machine.device_kind import kind_of
from sdnb.metrics.results import measure
from sdnb.metrics.step_clock import PHASES, StepClock
from sdnb.models.pipeline import load_parts
from sdnb.settings.config import TrainConfig
from sdnb.training import loop, setup
from sdnb.training.evaluation import HeldOutLoss
from sdnb.training.objective import draw_noise, dream, loss_of, target_of
from sdnb.training.setup import configure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """37 images on one rank, 2 × 2 a step: epochs of 10 steps, the last with one micro-batch of one image."""
    folder = tmp_path_factory.mktemp("train")
    from PIL import Image

    lines = []
    for index in range(37):
        Image.new("RGB", (80, 64), (index * 7 % 256, 0, 0)).save(folder / f"{index:02}.png")
        lines.append(json.dumps({"file_name": f"{index:02}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return train(
        dict(
            pretrained_model_name_or_path=small_model(), train_data_dir=str(folder), resolution=64, random_flip=True,
            train_batch_size=2, gradient_accumulation_steps=2, steps=21, learning_rate=1e-3, lr_warmup_steps=0,
            use_ema=True, seed=7, validation_prompts=["red heart"], validation_loss_steps=5,
            output_dir=str(folder / "run"),
        )
    )  # fmt: skip


def test_short_steps_and_the_images_trained_on(run):
    steps = run.steps
    assert list(steps.step) == list(range(1, 22))
    assert list(steps.epoch) == [0] * 10 + [1] * 10 + [2]
    assert list(steps.micro_batches) == ([2] * 9 + [1]) * 2 + [2]
    assert list(steps.images) == ([4] * 9 + [1]) * 2 + [4]
    assert steps[steps.epoch == 0].images.sum() == 37, "each image once an epoch"


def test_loss_and_train_loss(run):
    steps = run.steps
    full, short = steps[steps.micro_batches == 2], steps[steps.micro_batches == 1]
    assert (full.loss - full.train_loss).abs().max() < 1e-6
    assert (short.loss - 2 * short.train_loss).abs().max() < 1e-6, "the reference divides by 2 though there was 1"
    assert (short.loss - short.step_loss).abs().max() < 1e-6, "one micro-batch on one rank is the last"


def test_the_record_of_a_step(run):
    record = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert set(record) == {
        "step", "epoch", "micro_batches", "images", "loss", "train_loss", "step_loss", "grad_norm", "lr", "seconds",
        "phase_seconds", "encoded_images", "encoded_captions", "peak_memory_gib", "cpu_seconds", "others_share",
    }  # fmt: skip
    assert record["lr"] == 1e-3
    assert record["grad_norm"] > 0
    assert set(record["phase_seconds"]) == set(PHASES)
    assert sum(record["phase_seconds"].values()) == pytest.approx(record["seconds"], rel=0.01)


def test_what_else_the_run_folder_holds(run):
    assert TrainConfig.from_yaml(run.folder / "config.yaml").num_processes == 1
    assert torch.__version__.startswith(run.environment["packages"]["torch"].partition("+")[0])
    assert 1e5 < run.model["parameters"]["unet"] < 1e6 and not run.model["random_weights"], "of a folder"
    assert run.summary["world_size"] == 1 and 0.1 < run.summary["ranks"][0]["peak_memory_gib"] < 8
    assert "rank 0 INFO" in run.log
    assert list((run.folder / "logs").rglob("events.out.tfevents*"))


def test_no_held_out_images_is_said(run):
    assert run.validation.empty
    assert "WARNING no held-out loss" in run.log


def test_images_before_and_after(run):
    assert list(run.drawn.step) == [0, 10, 21], "before, after the first epoch of every five, at the end"
    assert (run.drawn.prompt == "red heart").all() and (run.drawn.seed == 7).all()
    files = [(run.folder / "samples" / file).read_bytes() for file in run.drawn.file]
    assert len(set(files)) == 3


def test_the_trained_pipeline_loads_and_draws(run):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(run.folder)
    image = pipeline("red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    untrained = load_parts(run.config).unet.state_dict()
    trained = pipeline.unet.state_dict()
    assert any(not torch.equal(trained[name], untrained[name]) for name in trained)


def test_what_is_saved_is_the_average_of_the_weights(settings, tmp_path):
    """The same training without EMA ends at other weights; the average lies between the start and those."""
    start = load_parts(TrainConfig(**settings)).unet.conv_in.weight
    ends = {}
    for use_ema in (False, True):
        run = train(settings, use_ema=use_ema, output_dir=str(tmp_path / f"ema-{use_ema}"))
        ends[use_ema] = load_parts(TrainConfig(**{**settings, "pretrained_model_name_or_path": str(run.folder)})).unet
    plain, average = (ends[use_ema].conv_in.weight - start for use_ema in (False, True))
    # After two steps with decays 0 (not yet) … (1 + 1) / (10 + 1): close to the weights, but not they.
    assert 0.5 < (average.norm() / plain.norm()).item() < 1.0


def test_the_same_seed_gives_the_same_training(settings, tmp_path):
    first = train(settings, output_dir=str(tmp_path / "a"), validation_loss_steps=1, validation_prompts=["sun"])
    second = train(settings, output_dir=str(tmp_path / "b"))
    other = train(settings, output_dir=str(tmp_path / "c"), seed=8)
    assert list(first.steps.loss) == list(second.steps.loss), "looking at it does not change it"
    assert list(first.steps.loss) != list(other.steps.loss)
    assert list(first.validation.step) == [0, 1, 2]
    assert (first.validation.images == 6).all()
    assert (first.validation.standard_error > 0).all()


def test_the_loss_falls(settings):
    """On images that are not trained on, in fifteen small steps, by many times its standard error."""
    how = dict(dataset_name="openmoji", train_batch_size=8, gradient_accumulation_steps=1, validation_loss_steps=15)
    run = train(settings, steps=15, **how)
    start, end = run.validation.itertuples()
    assert start.loss - end.loss > 5 * (start.standard_error + end.standard_error)


def test_a_training_that_diverges_is_said(settings):
    run = train(settings, learning_rate=1e30, steps=3)
    assert run.steps.loss.isna().any()
    assert "rank 0 WARNING step" in run.log and "the loss is not finite" in run.log
    measured = measure(run)
    assert measured["final loss"].text == "not finite"
    assert run.state == "diverged" and run.summary["diverged_at"] == 2
    assert "NaN" not in json.dumps(measured._repr_mimebundle_())
    assert "ERROR" not in run.log


def test_a_learning_rate_schedule(settings):
    run = train(settings, lr_scheduler="linear", lr_warmup_steps=2, steps=4, scale_lr=True, learning_rate=1e-4)
    assert list(run.steps.lr) == pytest.approx([0, 2e-4, 4e-4, 2e-4])


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="this torch scales losses on a GPU alone")
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_leaves_the_schedule_where_it_is(settings, monkeypatch, fused):
    """As in float16 on a GPU, and as in the reference."""
    plain_accelerator = setup.make_accelerator

    def scaling_accelerator(config):
        accelerator, first = plain_accelerator(config), iter([math.inf])
        accelerator.scaler = torch.amp.GradScaler("cpu")
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
        backward = accelerator.backward
        accelerator.backward = lambda loss: backward(loss * next(first, 1.0))
        return accelerator

    monkeypatch.setattr(setup, "make_accelerator", scaling_accelerator)
    run = train(settings, fused_optimizer=fused, lr_scheduler="linear", steps=4)
    assert list(run.steps.grad_norm.map(math.isfinite)) == [False, True, True, True]
    assert list(run.steps.lr) == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.5e-3])
    assert run.steps.loss.map(math.isfinite).all()


def test_gradients_are_clipped(settings, tmp_path):
    settings = {**settings, "learning_rate": 0.1, "adam_epsilon": 1e3, "adam_weight_decay": 0, "use_ema": False}
    still, loose, tight = (
        train(settings, output_dir=str(tmp_path / name), **changes)
        for name, changes in (
            ("still", dict(learning_rate=0)), ("loose", dict(max_grad_norm=1)), ("tight", dict(max_grad_norm=0.01))
        )
    )  # fmt: skip
    assert loose.steps.grad_norm[0] == tight.steps.grad_norm[0] > 1, "the norm recorded is that before clipping"
    moved = [run.steps.loss[1] - still.steps.loss[1] for run in (loose, tight)]
    assert moved[1] == pytest.approx(moved[0] / 100, rel=0.3), "with so large an epsilon a step goes as the gradient"


def test_bfloat16_on_the_cpu(settings):
    run = train(settings, mixed_precision="bf16", steps=1)
    assert 0.5 < run.steps.loss[0] < 2
    pipeline = StableDiffusionPipeline.from_pretrained(run.folder)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline("sun", height=64, width=64, num_inference_steps=1).images[0].size == (64, 64)


def scheduler(prediction_type="epsilon"):
    from diffusers import DDPMScheduler

    return DDPMScheduler(prediction_type=prediction_type)


def test_noise_offset_and_perturbation():
    latents = torch.zeros(2, 4, 8, 8)
    noise, added = draw_noise(latents)
    assert added is noise
    noise, _ = draw_noise(latents, noise_offset=10.0)
    assert noise.mean((2, 3)).std() > 3, "each channel of each image is shifted"
    noise, added = draw_noise(latents, input_perturbation=0.1)
    assert 0.08 < (added - noise).std() < 0.12


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type):
    """arXiv 2303.09556: min(SNR, γ) / SNR for the noise, min(SNR, γ) / (SNR + 1) for the velocity."""
    made = scheduler(prediction_type)
    timesteps = torch.tensor([10, 900])
    prediction, target = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    snr = made.alphas_cumprod[timesteps] / (1 - made.alphas_cumprod[timesteps])
    expected = snr.clamp(max=5) / (snr + (prediction_type == "v_prediction"))
    assert loss_of(prediction, target, made, timesteps, 5.0) == pytest.approx(expected.mean().item(), rel=1e-5)
    assert loss_of(prediction, target, made, timesteps, None) == 1


def test_what_is_predicted():
    latents, noise, timesteps = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0), torch.tensor([500])
    assert target_of(scheduler(), latents, noise, timesteps) is noise
    made = scheduler("v_prediction")
    alpha = made.alphas_cumprod[500]
    velocity = target_of(made, latents, noise, timesteps)
    assert velocity.flatten()[0] == pytest.approx((alpha.sqrt() * 2 - (1 - alpha).sqrt()).item(), rel=1e-5)


def test_the_held_out_loss_is_the_same_every_time_and_draws_nothing(settings):

    config = TrainConfig(**settings)
    parts, splits = load_parts(config), load_data(config)
    state = torch.get_rng_state()
    first, second = (HeldOutLoss(splits.held_out, parts, 2, torch.device("cpu"))(parts.unet) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert 0.5 < first["loss"] < 2


def test_the_clock_adds_up(monkeypatch):
    moments = iter([1.0, 1.25, 1.75, 2.0, 4.0, 9.0, 9.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = StepClock(kind_of("cpu"))
    clock.end_phase("data")
    clock.end_phase("forward")
    seconds, phases = clock.read()
    assert seconds == 1.0
    assert phases == {**dict.fromkeys(PHASES, 0.0), "data": 0.25, "forward": 0.5, "other": 0.25}
    clock.end_phase("data")
    clock.restart()
    seconds, phases = clock.read()
    assert seconds == phases["other"] == 0.5, "what came before the restart belongs to no step"


def test_the_tracker_has_the_losses_and_the_images(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "logs" / "text2image-fine-tune"), size_guidance={"scalars": 0}).Reload()
    logged = [event.value for event in events.Scalars("train_loss")]
    assert logged == pytest.approx(list(run.steps.train_loss), rel=1e-6)
    assert [event.step for event in events.Images("validation")] == [0, 10, 21]


def test_the_images_are_drawn_with_the_average(settings, tmp_path):
    """What is drawn at the end is what the saved pipeline draws, and that has the average."""
    from diffusers import StableDiffusionPipeline

    run = train(settings, use_ema=True, validation_prompts=["sun"], validation_epochs=50)
    last = run.drawn.iloc[-1]
    pipeline = StableDiffusionPipeline.from_pretrained(run.folder)
    drawn = pipeline(
        "sun", height=64, width=64, num_inference_steps=int(last.num_inference_steps),
        guidance_scale=float(last.guidance_scale), generator=torch.Generator().manual_seed(int(last.seed)),
    ).images[0]  # fmt: skip
    assert Image.open(run.folder / "samples" / last.file).tobytes() == drawn.tobytes()


def test_dream_puts_what_was_missed_into_both():
    """With a UNet that finds nothing, all of the noise is missed."""
    made, latents, noise = scheduler(), torch.ones(2, 4, 2, 2), torch.full((2, 4, 2, 2), 3.0)
    timesteps = torch.tensor([0, 999])
    noisy = made.add_noise(latents, noise, timesteps)
    rectified, target = dream(
        lambda *_, return_dict: (torch.zeros_like(noise),), made, noisy, timesteps, None, noise, noise, 2.0
    )
    deviation = (1 - made.alphas_cumprod[timesteps]).sqrt()
    assert torch.allclose(target[:, 0, 0, 0], 3 + 3 * deviation**2, atol=1e-6)
    assert torch.allclose((rectified - noisy)[:, 0, 0, 0], 3 * deviation**3, atol=1e-6)


def test_dream_needs_a_model_that_predicts_noise(settings, tmp_path):
    """Which prediction_type is left to the model's scheduler to say."""
    parts = load_parts(TrainConfig(**settings))
    parts.noise_scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ConfigError, match="this one predicts a velocity"):
        configure(parts, TrainConfig(**settings, dream_training=True), torch.device("cpu"))


def test_what_a_scheduler_cannot_train_is_refused(settings):
    parts = load_parts(TrainConfig(**settings))
    parts.noise_scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ConfigError, match="scheduler says sample: set it to epsilon"):
        configure(parts, TrainConfig(**settings), torch.device("cpu"))


def test_where_the_average_is_kept_does_not_change_it(settings, tmp_path):
    plain, *others = (
        train(settings, use_ema=True, output_dir=str(tmp_path / str(number)), **how)
        for number, how in enumerate(({}, dict(offload_ema=True), dict(foreach_ema=True)))
    )
    weights = [
        load_parts(TrainConfig(**{**settings, "pretrained_model_name_or_path": str(run.folder)})).unet.state_dict()
        for run in (plain, *others)
    ]
    for other in weights[1:]:
        assert all(torch.allclose(weights[0][name], other[name], atol=1e-7) for name in other)


@pytest.mark.parametrize(
    "asked, package",
    [
        (dict(use_8bit_adam=True), "bitsandbytes"),
        (dict(enable_xformers_memory_efficient_attention=True), "xformers"),
        (dict(report_to="wandb"), "wandb"),
        (dict(report_to="comet"), "comet-ml"),
    ],
)
def test_a_package_that_is_not_there_is_named_with_its_install_command(settings, monkeypatch, asked, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        environment.require(TrainConfig(**{**settings, **asked}))


def test_the_schedule_of_epochs_on_several_ranks_is_the_references_and_said_to_be(settings, caplog):
    """v0.26.3 counts the epochs' steps as if one rank had all the data."""
    made = TrainConfig(
        **{**settings, "steps": None, "num_train_epochs": 3, "num_processes": 2, "lr_scheduler": "cosine"}
    )
    assert (made.total_steps(40), made.schedule_steps(40)) == (15, 30)
    assert made.updated(max_train_steps=15).schedule_steps(40) == 15
    two = SimpleNamespace(
        num_processes=2,
        is_main_process=True,
        device=torch.device("cpu"),
        distributed_type=SimpleNamespace(value="MULTI_CPU"),
    )
    for config, said in ((made.updated(max_train_steps=15), 0), (made, 1)):
        splits, steps = SimpleNamespace(train=SimpleNamespace(count=40), held_out=None), config.total_steps(40)
        loop._log_start(SimpleNamespace(config=config, accelerator=two, splits=splits, step=0, total_steps=steps))
        assert caplog.text.count("laid out for 30 steps") == said


def test_what_is_compiled_in_blocks_is_not_cut_again_for_several_ranks(settings, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: None)
    for how, cut in (
        (dict(compile_unet="blocks"), False),
        (dict(compile_unet="whole"), True),
        (dict(compile_unet="whole", gradient_checkpointing=True), False),
    ):
        config = TrainConfig(**settings, **how, mixed_precision="no")
        configure(load_parts(config), config, torch.device("cpu"))
        assert torch._dynamo.config.optimize_ddp == cut


@pytest.mark.skipif(not has_stances(), reason="torch 2.1 makes ten graphs of it")
@pytest.mark.parametrize("checkpointing", (False, True))
def test_compiled_as_a_whole_the_unet_is_one_graph(settings, monkeypatch, checkpointing):
    """Within accelerate's autocast, which it is prepared for after it is set up."""
    graphs, compile_with = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compile_with(module, backend=graphs))
    config = TrainConfig(**settings, compile_unet="whole", gradient_checkpointing=checkpointing, mixed_precision="bf16")
    parts = load_parts(config)
    configure(parts, config, torch.device("cpu"))
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    unet = accelerator.prepare(parts.unet.train())
    tokens = torch.zeros(1, 77, parts.text_encoder.config.hidden_size)
    prediction = unet(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), tokens, return_dict=False)[0]
    accelerator.backward(prediction.sum())
    assert graphs.frame_count == 1
    assert parts.unet.conv_in.weight.grad is not None


@pytest.mark.skipif(not has_stances(), reason="torch compiles for each size of a batch before 2.6")
def test_what_is_compiled_trains_the_same_and_only_whole_steps_are_compiled_for(settings, image_folder, tmp_path):
    """5 images: epochs of a whole step and one of a single image. Images are drawn in yet another size. The UNet
    has one block to compile."""
    folder = shutil.copytree(small_model(), tmp_path / "model")
    config = dict(load_parts(TrainConfig(**settings)).unet.config)
    config |= dict(down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None, up_block_types=("UpBlock2D",))
    UNet2DConditionModel.from_config({**config, "block_out_channels": (16,)}).save_pretrained(folder / "unet")
    settings |= dict(pretrained_model_name_or_path=str(folder), dataset_name=None, steps=4)
    settings["train_data_dir"] = str(image_folder(5))
    plain = train(settings, output_dir=str(tmp_path / "plain"))
    graphs = []
    for steps, prompts in ((1, []), (4, ["sun"])):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        run = train(
            settings, compile_unet="blocks", steps=steps, validation_prompts=prompts,
            output_dir=str(tmp_path / f"compiled-{steps}"),
        )  # fmt: skip
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert list(run.steps.images) == [4, 1, 4, 1] and len(run.drawn) == 3
    assert graphs[0] == graphs[1] > 0
    assert list(run.steps.loss) == pytest.approx(list(plain.steps.loss), rel=1e-4)


def test_a_tracker_that_cannot_start(settings):
    with pytest.raises(ConfigError, match="report_to = tensorboard, logging_dir = /proc/none: cannot be started"):
        train(settings, report_to="tensorboard", logging_dir="/proc/none")
