import copy
import os
import re
import subprocess
import sys

import psutil
import pytest
import torch
from processes import ROOT
from transformers import CLIPTextConfig

from sdnb.cache import cache_root
from sdnb.errors import ConfigError
from sdnb.launch import memory
from sdnb.launch.failure import details_of
from sdnb.machine.device import ran_out_of_memory
from sdnb.machine.device_kind import kind_of
from sdnb.machine.environment import Devices
from sdnb.models import embedded
from sdnb.models.pipeline import model_folder
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig


def config(model="tiny", **settings):
    """On one rank, in float32, unless the settings say otherwise."""
    defaults = dict(resolution=64, train_batch_size=8, mixed_precision="no", num_processes=1)
    return TrainConfig(pretrained_model_name_or_path=model, dataset_name="openmoji", **{**defaults, **settings})


def sd(**settings):
    """The published measurement's settings, on one rank, without accumulation."""
    return config("sd-v1-4-random", **{"resolution": 512, "mixed_precision": "fp16", "use_ema": True, **settings})


def predict(settings, device="cpu", folded=1):
    return memory.predict(settings, device, folded)


MEASURED = [config(train_batch_size=32, **how) for how in ({}, dict(gradient_checkpointing=True), dict(lora=True))]


@pytest.fixture(scope="module")
def measured_gib(tmp_path_factory):
    """The peaks of real trainings of two steps, side by side. The C library is told to give back at once what is freed,
    so that it is the tensors that are measured."""
    embedded.folder("tiny")  # both would build it
    folders = [tmp_path_factory.mktemp("runs") / "run" for _ in MEASURED]
    command = [
        sys.executable, "-m", "sdnb.train", "--pretrained_model_name_or_path=tiny", "--dataset_name=openmoji",
        "--resolution=64", "--train_batch_size=32", "--max_train_steps=2", "--lr_warmup_steps=0", "--report_to=none",
        "--fold_micro_batches=1", "--encoder_cache_gib=0",
    ]  # fmt: skip
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    running = []
    try:
        for folder, settings in zip(folders, MEASURED):
            flags = [f"--{name}" for name in ("gradient_checkpointing", "lora") if getattr(settings, name)]
            with folder.with_suffix(".log").open("w") as log:
                starting = [*command, *flags, f"--output_dir={folder}"]
                running.append(subprocess.Popen(starting, cwd=ROOT, env=environment, stdout=log, stderr=log))
        assert [process.wait(timeout=200) for process in running] == [0, 0, 0], folders
    finally:
        for process in running:
            process.kill()
    return [run_folder.RunFolder(folder).summary["ranks"][0]["peak_memory_gib"] for folder in folders]


def test_activations_are_what_real_trainings_take(measured_gib):
    """To what two runs differ by."""
    whole, checkpointing, _ = (predict(settings).activations_gib for settings in MEASURED)
    assert measured_gib[0] - measured_gib[1] == pytest.approx(whole - checkpointing, abs=0.04)


def test_the_whole_is_what_a_real_training_takes(measured_gib, monkeypatch):
    """But for what the heap loses, which it does not here."""
    monkeypatch.setattr(memory, "_HEAP_SLACK_OF_ACTIVATIONS", 0)
    ratios = [measured / predict(settings).total_gib for measured, settings in zip(measured_gib, MEASURED)]
    assert all(0.88 < ratio < 1.1 for ratio in ratios), ratios


def test_stable_diffusion_as_it_was_published():
    process, state = psutil.Process(), torch.get_rng_state()
    before = process.memory_info().rss
    predicted = predict(sd(), "cuda")
    assert process.memory_info().rss - before < 0.3 * 2**30, "nothing of it is allocated"
    assert not list(cache_root(None).glob("models/sd-v1-4-random*")), "no weights are drawn"
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32
    fixed = (predicted.weights_gib, predicted.gradients_gib, predicted.optimizer_gib, predicted.average_gib)
    assert fixed == pytest.approx((3.20, 3.20, 6.40, 3.20), abs=0.01)
    assert predicted.encoders_gib == pytest.approx(2 * (83_653_863 + 123_060_480) / 2**30, rel=1e-3)
    assert str(predicted).startswith(f"{predicted.total_gib:.2f} GiB: weights 3.20, gradients 3.20, optimizer 6.40")
    # An attention matrix of 8 heads × 4096 × 4096 would take 0.25 GiB an image in each of five layers.
    more = predict(sd(train_batch_size=16), "cuda")
    assert 1.0 < (more.activations_gib - predicted.activations_gib) / 8 < 1.4


def test_an_adapter_needs_little_besides_the_frozen_weights():
    predicted = predict(sd(lora=True, use_ema=False), "cuda")
    adapter = 797_184  # parameters: rank 4 × both sides of 128 projections
    assert predicted.gradients_gib == pytest.approx(4 * adapter / 2**30)
    assert predicted.optimizer_gib == pytest.approx(8 * adapter / 2**30)
    assert predicted.weights_gib == pytest.approx((2 * 859_520_964 + 4 * adapter) / 2**30)


def test_twice_the_batch_has_twice_the_activations():
    small, large = (predict(config(train_batch_size=size, gradient_accumulation_steps=2)) for size in (16, 32))
    assert large.activations_gib == pytest.approx(2 * small.activations_gib, rel=0.02)
    finer = predict(config(train_batch_size=16, gradient_accumulation_steps=2, resolution=128))
    assert finer.activations_gib > 3.8 * small.activations_gib


def test_precision():
    """A GPU's autocast keeps what the norms take in float32, a CPU's does not; both keep half-precision weights."""
    half = config(mixed_precision="bf16", train_batch_size=32)
    on_cpu, on_gpu = predict(half), predict(half, "cuda")
    assert on_cpu.activations_gib < predict(config(train_batch_size=32)).activations_gib
    assert on_gpu.activations_gib > 1.15 * on_cpu.activations_gib
    assert predict(half.updated(mixed_precision="fp16"), "cuda") == on_gpu
    assert on_gpu.encoders_gib == predict(config(), "cuda").encoders_gib / 2


def test_micro_batches_run_as_one_take_what_a_larger_one_takes():
    folded = predict(config(gradient_accumulation_steps=4), folded=4)
    assert folded == predict(config(train_batch_size=32))
    assert folded.total_gib > predict(config(gradient_accumulation_steps=4)).total_gib


def test_gradients_that_wait_take_room_beside_the_activations():
    at_once, waiting = predict(config()), predict(config(gradient_accumulation_steps=2))
    assert waiting.gradients_gib == at_once.gradients_gib and waiting.activations_gib > at_once.activations_gib
    ranks = predict(config(num_processes=2)), predict(config(num_processes=2, gradient_accumulation_steps=2))
    assert [one.gradients_gib / at_once.gradients_gib for one in ranks] == [1, 2]


def test_optimizer_and_average():
    whole = predict(config(use_ema=True), "cuda")
    assert whole.optimizer_gib == 2 * whole.weights_gib == 2 * whole.average_gib
    assert predict(config(use_8bit_adam=True), "cuda").optimizer_gib == whole.optimizer_gib / 4
    assert predict(config(use_ema=True, offload_ema=True), "cuda").average_gib == 0
    assert predict(config(use_ema=True, offload_ema=True)).average_gib == whole.average_gib, "it is there already"
    assert predict(config(), "cuda").average_gib == 0
    foreach = predict(config(train_batch_size=1, fused_optimizer=False), "cuda")
    assert foreach.activations_gib == foreach.weights_gib, "more than so small a batch takes"


def test_a_torch_whose_adamw_is_not_fused_on_a_gpu(monkeypatch):
    small = config(train_batch_size=1)
    fused, foreach = predict(small, "cuda"), predict(small.updated(fused_optimizer=False), "cuda")
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    assert (kind_of("cpu").has_fused_adam, kind_of("cuda").has_fused_adam) == (True, False)
    assert fused != predict(small, "cuda") == foreach
    monkeypatch.setattr(torch, "__version__", "2.5.0+cu124")
    assert kind_of("cuda").has_fused_adam and predict(small, "cuda") == fused


def test_a_model_in_a_folder():
    embedded, folder = predict(config()), predict(config(model_folder(config())))
    assert (folder.weights_gib, folder.activations_gib) == (embedded.weights_gib, embedded.activations_gib)


def test_as_many_micro_batches_as_fit():
    settings = config(gradient_accumulation_steps=6, train_batch_size=32)
    totals = {count: predict(settings, folded=count).total_gib for count in (1, 2, 3, 6)}
    assert sorted(totals.values()) == list(totals.values())
    for count, total_gib in totals.items():
        assert memory.folded_that_fits(settings, "cpu", total_gib + 1e-6) == count
    below_six = predict(settings, folded=6).total_gib - 1e-6
    assert memory.folded_that_fits(settings, "cpu", below_six) == 3, "4 and 5 are no divisors"
    assert memory.folded_that_fits(settings, "cpu", 0.1) == 1


def said_gib(text, remedy):
    return re.search(rf"(?:: |; ){re.escape(remedy)}: ([\d.]+) GiB(, enough)?", text).groups()


def test_what_does_not_fit_says_what_would_help():
    settings = config(train_batch_size=64, use_ema=True)
    memory.require_fit(settings, "cpu", predict(settings).total_gib + 1e-6)
    free_gib = predict(settings).total_gib - 0.2  # torch's build decides how much that is
    with pytest.raises(ConfigError) as error:
        memory.require_fit(settings, "cpu", free_gib)
    text = str(error.value)
    said = f"predicted peak {predict(settings).total_gib:.1f} GiB per rank, and {free_gib:.1f} GiB are free"
    assert text.startswith(said)
    for remedy, changes, enough in (
        ("gradient_checkpointing = True", {"gradient_checkpointing": True}, ", enough"),
        ("train_batch_size = 32 with gradient_accumulation_steps = 2",
         {"train_batch_size": 32, "gradient_accumulation_steps": 2}, ", enough"),
        ("mixed_precision = bf16", {"mixed_precision": "bf16"}, ", enough"),
    ):  # fmt: skip
        assert said_gib(text, remedy) == (f"{predict(settings.updated(**changes)).total_gib:.1f}", enough)
    assert not re.search("8bit|offload|fused|fold", text), "those help on a GPU, or where micro-batches are folded"


def test_what_may_not_fit_on_a_gpu_is_a_warning(caplog):
    """Its constants are estimates there. Only a limit that the user has set is kept."""
    settings = sd(gradient_accumulation_steps=4, fused_optimizer=False)
    memory.require_fit(settings, "cuda", 20, folded=2)
    (text,) = caplog.messages
    assert text.startswith("predicted peak ") and "20.0 GiB are free" in text and text.endswith("so the run starts")
    with pytest.raises(ConfigError, match="20.0 GiB are what memory_gib allows"):
        memory.require_fit(settings.updated(memory_gib=20.0), "cuda", 20, folded=2)
    for remedy, changes, folded in (
        ("fold_micro_batches = 1", {}, 1),
        ("use_8bit_adam = True", {"use_8bit_adam": True}, 2),
        ("offload_ema = True", {"offload_ema": True}, 2),
    ):
        total_gib = predict(settings.updated(**changes), "cuda", folded).total_gib
        assert said_gib(text, remedy) == (f"{total_gib:.1f}", None), "not enough alone"
    assert said_gib(text, "all of these")[1] == ", enough"
    assert "mixed_precision = " not in text and "fused_optimizer" not in text, "nothing is won by these"


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_names_the_settings_that_help(error):
    settings = config(train_batch_size=64, gradient_accumulation_steps=4, fold_micro_batches=2, num_processes=1)
    try:
        raise error
    except Exception as caught:
        said, trace = details_of(caught, settings.updated(mixed_precision="no")), details_of(caught, None)
    assert said.startswith("memory ran out: ") and "Traceback" not in said and "Traceback" in trace
    assert said.partition("What would help: ")[2].split("; ") == [
        "fold_micro_batches = 1", "gradient_checkpointing = True",
        "train_batch_size = 32 with gradient_accumulation_steps = 8", "mixed_precision = bf16",
    ]  # fmt: skip


def test_memory_that_really_runs_out():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert ran_out_of_memory(raised.value) and not ran_out_of_memory(RuntimeError("shapes do not fit"))


def machine(total_gib, free_gib):
    return Devices("cpu", ("a CPU",), (total_gib,), (free_gib,), True)


def test_a_machine_settles_how_much_is_folded():
    settings = config(gradient_accumulation_steps=4, train_batch_size=32, num_processes=2)
    totals = [predict(settings, folded=count).total_gib for count in (1, 2, 4)]
    for count, total_gib in zip((1, 2, 4), totals):
        machine_gib = 2 * total_gib / 0.8 + 1e-3  # two ranks share it, and four fifths of a part are taken
        settled, predicted = memory.settle(settings, machine(machine_gib, machine_gib))
        assert settled.fold_micro_batches == count and predicted.total_gib == total_gib
    for asked, done in ((3, 3), (8, 4)):
        settled, _ = memory.settle(settings.updated(fold_micro_batches=asked), machine(100, 100))
        assert settled.fold_micro_batches == done, "what is asked for goes first; a step has four"
    settled, _ = memory.settle(settings, machine(100, 2 * totals[1] + 1e-3))
    assert settled.fold_micro_batches == 2, "and no more than is free"
    with pytest.raises(ConfigError, match=r"0.4 GiB are free(.|\n)*If you know better, set memory_gib"):
        memory.settle(settings, machine(100, 0.8))


def test_the_published_training_is_folded_whole_on_gpus_of_80_gb():
    """Alone, and where the buckets of DDP come on top; on half as much memory, not at all. In float16 other steps than
    the reference's might be skipped, so one must ask for it."""
    sizes = dict(train_batch_size=8, gradient_accumulation_steps=4)
    for ranks, gib, folded in ((1, 79.1, 4), (8, 79.1, 4), (1, 39.4, 1)):
        gpus = Devices("cuda", ("a GPU",) * ranks, (gib,) * ranks, (gib - 0.5,) * ranks, True)
        settled, _ = memory.settle(sd(**sizes, num_processes=ranks, mixed_precision="bf16"), gpus)
        assert settled.fold_micro_batches == folded
        for asked, done in ((None, 1), (4, 4)):
            asking = sd(**sizes, num_processes=ranks, fold_micro_batches=asked, memory_gib=79.0)
            assert memory.settle(asking, gpus)[0].fold_micro_batches == done


def test_memory_that_no_rank_uses_does_not_count():
    on_gpus = config(num_processes=2), "cuda", (80.0, 60.0, 3.0)
    assert memory.per_rank(*on_gpus) == 60
    on_two_machines = config(num_processes=4, num_machines=2, main_process_ip="10.0.0.1", output_dir="run")
    assert memory.per_rank(on_two_machines, "cuda", (80.0, 60.0, 3.0)) == 60
    assert memory.per_rank(on_two_machines, "cpu", (24.0,)) == 12, "two ranks share a machine"


def test_what_a_rank_may_count_on_can_be_said():
    settings = config(gradient_accumulation_steps=4, train_batch_size=32)
    lowest = predict(settings).total_gib
    settled, predicted = memory.settle(settings.updated(memory_gib=lowest), machine(100, 0.4))
    assert settled.fold_micro_batches == 1 and predicted.total_gib == lowest, "though less is free"
    with pytest.raises(ConfigError, match=r"0\.3 GiB are what memory_gib allows"):
        memory.settle(settings.updated(memory_gib=0.3), machine(100, 100))


def test_a_model_that_cannot_be_predicted_is_trained_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr(memory, "predict", lambda *_: 1 / 0)
    settled, predicted = memory.settle(config(gradient_accumulation_steps=4), machine(100, 100))
    assert settled.fold_micro_batches == 1 and predicted is None
    assert "cannot be predicted: ZeroDivisionError" in caplog.text


def test_a_dry_run_leaves_the_architectures_as_they_are(tmp_path, monkeypatch):
    """Some versions of transformers change the dictionary that they make a configuration of."""
    from_dict = CLIPTextConfig.from_dict

    def changing(dictionary, **options):
        dictionary["attn_implementation"] = None
        return from_dict({name: value for name, value in dictionary.items() if name != "attn_implementation"})

    monkeypatch.setattr(CLIPTextConfig, "from_dict", changing)
    before = copy.deepcopy(embedded.ARCHITECTURES)
    predict(config(cache_dir=str(tmp_path), resolution=32))
    assert before == embedded.ARCHITECTURES
