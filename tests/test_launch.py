"""Launching, with real processes: they join, they fail, they are interrupted, and none is left."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import QUIET, at_step, start
from processes import Forked, none_left, processes_of, wait_for

from sdnb.errors import ConfigError, DataError, ModelError, RunError
from sdnb.figures.live import Progress
from sdnb.launch import notebook
from sdnb.launch.notebook import launch
from sdnb.launch.plan import Plan, prepare
from sdnb.launch.ranks import free_port
from sdnb.models import pipeline as models
from sdnb.models.pipeline import model_folder
from sdnb.report.run import Run
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.training.stopping import StopRequest

pytestmark = pytest.mark.usefixtures("forked_ranks")


def together(plans):
    """Launched at once. Where one of them fails, or the test's time is over, none is waited for."""
    with ThreadPoolExecutor() as pool:
        try:
            launched = [pool.submit(launch, plan, **QUIET) for plan in plans]
            for ended in as_completed(launched):
                ended.result()
            return [one.result() for one in launched]
        except BaseException:
            for plan in plans:
                for process in (processes := processes_of(plan.config.output_dir)):
                    process.send_signal(signal.SIGUSR1)
                time.sleep(1)
                print(f"{len(processes)} processes of {plan.config.output_dir}:")
                print((Path(plan.config.output_dir) / "train.log").read_text())
                for process in processes:
                    process.kill()
            raise


def test_two_ranks_train_as_one(settings, image_folder):
    """After this process has computed with torch, so that a fork of it would hang."""
    torch.ones(500, 500) @ torch.ones(500, 500)
    folder = image_folder(37)

    def ask():
        for process in processes_of(settings["output_dir"]):
            process.send_signal(signal.SIGUSR1)

    mine = dict(dataset_name=None, train_data_dir=str(folder), num_processes=2, steps=12)
    run = start(settings, **mine, show=at_step(1, ask))
    assert run.summary["world_size"] == 2
    assert run.summary["distributed_type"] == "MULTI_CPU"
    checksums = [rank["checksum"] for rank in run.summary["ranks"]]
    assert checksums[0] == checksums[1]
    # 19 batches of 2 make 10 rounds of 2 ranks: 5 steps of 8 images an epoch, 3 of the 40 images repeats.
    assert list(run.steps.micro_batches) == [2] * 12
    assert list(run.steps.images) == [8] * 12
    assert list(run.steps.epoch) == [0] * 5 + [1] * 5 + [2] * 2
    log = run.log
    assert "rank 0 INFO" in log and "rank 1 INFO" in log
    assert log.count("(most recent call first)") >= 3, "both ranks and their launcher said where they were, and went on"
    assert "sdnb/training/loop.py" in log
    assert none_left(run.folder)


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_machines_train_as_one(settings, tmp_path, ranks):
    """Each launches its own ranks; they meet at machine 0's address, and that keeps the run folder."""
    machines = [
        prepare(
            TrainConfig(**{
                **settings, "num_machines": 2, "machine_rank": rank, "num_processes": ranks,
                "main_process_ip": "127.0.0.1", "main_process_port": port, "output_dir": str(tmp_path / "shared"),
            })
        )
        for port in [free_port()] for rank in (0, 1)
    ]  # fmt: skip
    first, second = together(machines)
    assert first.folder == second.folder
    assert first.summary["world_size"] == ranks
    assert list(first.steps.images) == [4 * ranks] * 2
    assert len({tuple(rank["checksum"]) for rank in first.summary["ranks"]}) == 1
    assert {f"rank {rank} INFO" in first.log for rank in range(ranks)} == {True}
    assert none_left(first.folder)


def test_a_run_after_a_run_and_two_at_once(settings, tmp_path):
    settings = {**settings, "gradient_accumulation_steps": 1}
    plans = [
        prepare(TrainConfig(**{**settings, "num_processes": 2, "output_dir": str(tmp_path / name)}))
        for name in ("a", "b")
    ]
    both = together(plans)
    assert list(both[0].steps.loss) == list(both[1].steps.loss)
    again = start(settings, num_processes=2, output_dir=str(tmp_path / "c"))
    assert list(again.steps.loss) == list(both[0].steps.loss)
    assert abs(again.steps.loss - again.steps.step_loss).max() > 1e-4, "the mean over two ranks is not that of one"


def test_following_a_run_that_is_resumed(settings, tmp_path):
    """What was recorded beyond the checkpoint is recorded again, and what the attempt before logged is not shown."""
    config = TrainConfig(**{**settings, "num_processes": 1, "mixed_precision": "no"})
    folder, _held = run_folder.begin(config, {"host": "a"})
    records = [dict(step=step, loss=0.5, images=4, seconds=1.0) for step in range(1, 13)]
    for record in records[:10]:
        files.append(folder / run_folder.STEPS, record)
    seen = []

    def show(progress):
        seen.append([one["step"] for one in progress.records])
        if not progress.ended:
            run_folder.go_back(folder, 6)
            for record in records[6:]:
                files.append(folder / run_folder.STEPS, record)

    process = SimpleNamespace(poll=iter([None, 0]).__next__)
    notebook._follow(process, Progress(Run(folder), 12), files.Tail(folder / run_folder.LOG), show, StopRequest())
    assert seen == [list(range(1, 11)), list(range(1, 13))]


def test_a_rank_that_cannot_go_on_says_why(settings, image_folder):
    folder = image_folder(12)
    (folder / "007.png").write_bytes(b"no image")
    with pytest.raises(RunError) as error:
        start(settings, dataset_name=None, train_data_dir=str(folder), num_processes=2, steps=20)
    assert "failed: DataError" in str(error.value) and "007.png" in str(error.value)
    assert "Traceback" not in str(error.value), "what a user can put right needs none"
    assert none_left(Path(settings["output_dir"]))


def test_a_ranks_exception_comes_with_its_traceback(settings, tmp_path):
    """A text encoder that does not fit the UNet: torch's own error, deep inside a rank."""
    model = Path(shutil.copytree(model_folder(TrainConfig(**settings)), tmp_path / "model"))
    unet = json.loads((model / "unet" / "config.json").read_text())
    wider = [96] * len(unet["down_block_types"])  # a single number would be compared before the launch
    (model / "unet" / "config.json").write_text(json.dumps({**unet, "cross_attention_dim": wider}))
    made = models.UNet2DConditionModel.from_config(json.loads((model / "unet" / "config.json").read_text()))
    made.save_pretrained(model / "unet")
    with pytest.raises(RunError) as error:
        start(settings, pretrained_model_name_or_path=str(model), num_processes=2)
    said = str(error.value)
    assert "RuntimeError" in said and "Traceback (most recent call last)" in said and "sdnb/training/loop.py" in said
    assert "0 steps" in said
    assert none_left(Path(settings["output_dir"]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_rank_ends_the_run_and_keeps_what_was_measured(settings, ranks):
    folder = Path(settings["output_dir"])

    def kill_the_last_rank():
        os.kill(max(process.pid for process in processes_of(folder)), signal.SIGKILL)

    began = time.time()
    with pytest.raises(RunError, match="killed by SIGKILL") as error:
        start(settings, num_processes=ranks, steps=2000, show=at_step(3, kill_the_last_rank))
    assert time.time() - began < 90
    assert "What would help: fold_micro_batches = 1; gradient_checkpointing = True; train_batch_size = 1 with" in str(
        error.value
    )
    assert "steps) and the log are in" in str(error.value)
    assert len(run_folder.RunFolder(folder).steps) >= 3
    assert none_left(folder)


def test_an_interrupt_ends_every_rank(settings):
    folder = Path(settings["output_dir"])
    moment = []

    def interrupt():
        moment.append(time.time())
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        start(settings, num_processes=2, steps=2000, show=at_step(2, interrupt))
    assert time.time() - moment[0] < 20
    assert none_left(folder, within=2)
    assert len(run_folder.RunFolder(folder).steps) >= 2


def test_the_death_of_the_one_who_launched_ends_every_rank(settings):
    """These ranks are not forked from what has loaded all already, they are started as a notebook starts them."""
    folder = Path(settings["output_dir"])
    launcher = Forked([sys.executable, "-m", "launching", json.dumps({**settings, "num_processes": 2, "steps": 2000})])
    try:
        wait_for(lambda: launcher.poll() is not None or (folder / run_folder.STEPS).exists())
        assert len(processes_of(folder)) >= 3
    finally:
        launcher.kill()
        launcher.wait()
    assert none_left(folder, within=40)  # they keep a checkpoint


def test_ranks_that_do_not_join_are_an_error(settings, monkeypatch):
    """As accelerate's launcher leaves CPU ranks without ACCELERATE_USE_CPU: each trains alone. Before accelerate 1.0 it
    joined them all the same."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    if int(version("accelerate").partition(".")[0]) < 1:
        assert start(settings, num_processes=2).summary["world_size"] == 2
        return
    with pytest.raises(RunError, match="2 ranks were started, but 1 joined"):
        start(settings, num_processes=2)


def test_ports(settings):
    """Not from those that a system gives to whoever asks, and one that is taken is named before anything waits."""
    assert 20_000 <= free_port() < 30_000
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"main_process_port = {port}: the ranks cannot meet there: .*in use"):
            start(settings, num_processes=2, main_process_port=port)
    assert not Path(settings["output_dir"]).exists()


def test_what_is_wrong_is_found_before_anything_is_launched(settings, tmp_path):
    for changes, error in (
        (dict(mixed_precision="fp16"), ConfigError),
        (dict(pretrained_model_name_or_path="tinny"), ModelError),
        (dict(dataset_name=str(tmp_path / "nowhere")), DataError),
        (dict(whole_steps=True, train_batch_size=1000), ConfigError),
        (dict(cache_dir=__file__), ConfigError),
    ):
        with pytest.raises(error):
            prepare(TrainConfig(**{**settings, **changes}))
    assert not Path(settings["output_dir"]).exists()


def test_the_ranks_of_a_machine_share_its_cores(settings):
    asked = TrainConfig(**{**settings, "num_processes": 4, "num_machines": 2, "main_process_ip": "10.0.0.1"})
    for config, threads in ((asked, "4"), (asked.updated(num_machines=1), "2"), (asked.updated(num_processes=2), "8")):
        plan = Plan(config, {"cpu_cores": 8, "devices": {"type": "cpu"}}, examples=None, predicted=None)
        assert notebook._process_environment(plan)["OMP_NUM_THREADS"] == threads


def test_a_process_that_forks_ranks_for_gpus_does_not_use_these_itself(settings):
    plan = Plan(
        TrainConfig(**{**settings, "num_processes": 2}), {"cpu_cores": 8, "devices": {"type": "cuda"}},
        examples=None, predicted=None,
    )  # fmt: skip
    assert notebook._process_environment(plan) == {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OMP_NUM_THREADS": "4"}


def test_the_plan_says_what_will_run(settings):
    how = dict(train_batch_size=8, gradient_accumulation_steps=4, num_processes=2, dataset_name="openmoji")
    made = TrainConfig(**{**settings, **how})
    plan = prepare(made)
    assert plan.facts["global batch"].startswith("64 = 8 × 4")
    # 833 / 8 = 105 batches, 53 rounds of two ranks: 13 full steps and one of a single micro-batch; 848 - 833 repeats.
    assert (
        "53 micro-batches per rank, 14 optimizer steps, 1 of them short; 848 images, 15 of them"
        in plan.facts["an epoch"]
    )
    assert plan.facts["precision"].startswith("no")
    assert re.fullmatch(r"[\d.]+ GiB per rank predicted, [\d.]+ GiB free", plan.facts["memory"])
    assert plan.facts["micro-batches"] == "4 of a step run as one batch"
    assert "833 to train on, 1085 held out" in plan.facts["data"]
    images, captions, total = plan.sample_examples(6)
    assert len(images) == len(captions) == 6 and total == 833


def test_settings_are_data_in_the_plans_html(settings, image_folder):
    folder = image_folder(2, name="<script>alert(1)</script>".replace("/", ""))
    plan = prepare(TrainConfig(**{**settings, "dataset_name": None, "train_data_dir": str(folder)}))
    assert "<script>" not in plan._repr_html_()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mounted)], capture_output=True)
    if made.returncode:
        pytest.skip("only root can mount a file system")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def fill(disk, free_bytes):
    there = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"0" * (there - free_bytes))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_and_stays_full(settings, small_disk, ranks):
    fill(small_disk, 40 * 1024)
    folder = small_disk / "run"
    with pytest.raises(RunError) as error:
        start(settings, output_dir=str(folder), num_processes=ranks, steps=2000)
    said = str(error.value)
    assert said.startswith(f"{folder}: cannot be written: No space left on device. Its ranks have ended\n")
    assert "Traceback" not in said and none_left(folder)
    measured = len(run_folder.RunFolder(folder).steps)
    assert measured > 10 and f"({measured} steps)" in said
    assert not [path for path in folder.iterdir() if re.match(r"\..*\.[0-9a-f]{8}$", path.name)], "files written aside"


def test_a_disk_that_is_full_from_the_start(settings, small_disk):
    plan = prepare(TrainConfig(**{**settings, "output_dir": str(small_disk / "run")}))
    fill(small_disk, 0)
    with pytest.raises(RunError, match=r"config\.yaml: cannot be written: No space left on device"):
        launch(plan, **QUIET)
    (small_disk / "filler").unlink()
    run_folder.begin(plan.config, plan.environment)  # nothing that is left there blocks it


def test_nobody_else_can_use_the_folder_of_a_run(settings):
    refused = []

    def start_again():
        again = TrainConfig(**{**settings, "resume_from_checkpoint": "latest", "learning_rate": 0.5})
        with pytest.raises(RunError, match="another run is using this folder"):
            run_folder.begin(again, {})
        refused.append(run_folder.RunFolder(settings["output_dir"]).config.learning_rate)

    start(settings, num_processes=2, steps=200, show=at_step(1, start_again))
    assert refused == [settings["learning_rate"]], "it changed nothing"
    _, held = run_folder.begin(TrainConfig(**settings, resume_from_checkpoint="latest"), {})
    held.close()
