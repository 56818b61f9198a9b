"""`accelerate launch … -m sdnb.train` in place of the reference's script, on two CPU ranks, as real processes."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import ROOT, Forked, free_port, none_left, processes_of, two_ranks, wait_for

from sdnb.errors import ConfigError
from sdnb.launch import command_line
from sdnb.report.run import Run
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.settings.flags import command_line as flags_of

# The reference command of the published result; the model, the data, the resolution and the steps are smaller here.
REFERENCE = (
    "--pretrained_model_name_or_path=tiny --dataset_name=openmoji --use_ema --resolution=64 --center_crop "
    "--random_flip --train_batch_size=8 --gradient_accumulation_steps=4 --max_train_steps=2 --learning_rate=1e-05 "
    "--max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0"
)


def launch(*flags, **options):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision=no",
        f"--config_file={ROOT / 'params' / 'accelerate-8gpu.yaml'}", "--num_processes=2",
        f"--main_process_port={free_port()}", "-m", "sdnb.train", *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, **options,
    )  # fmt: skip


def test_the_reference_command(tmp_path):
    process = launch(*REFERENCE.split(), f"--output_dir={tmp_path / 'run'}")
    shown, said = process.communicate(timeout=250)
    assert process.returncode == 0, said
    run = run_folder.RunFolder(tmp_path / "run")
    assert (run.summary["world_size"], run.summary["distributed_type"]) == (2, "MULTI_CPU")
    assert list(run.steps.images) == [64, 64]
    assert run.config.mixed_precision == "no" and run.config.num_processes == 2
    assert (run.folder / "model_index.json").exists() and list((run.folder / "logs").rglob("events*"))
    assert "Steps: 100%" in said and "step_loss=" in said, "the reference's progress bar, and once"
    assert len(re.findall(r"2 optimizer steps of 64, on cpu.*, 2 ranks", said)) == 1
    assert "images/s per CPU rank" in shown and str(run.folder) in shown


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--max_train_stesp=3"],
            "error: unrecognized arguments: --max_train_stesp=3; did you mean --max_train_steps?",
        ),
        (["--resume_from_checkpoint=checkpoint-7"], "error: resume_from_checkpoint = checkpoint-7: no such checkpoint"),
    ],
)
def test_a_mistake_is_said_once_and_shortly(tmp_path, flags, said):
    with two_ranks(
        [*REFERENCE.split(), f"--output_dir={tmp_path / 'run'}", *flags], tmp_path / "printed.txt"
    ) as running:
        status = 2 if "unrecognized" in said else 1
        assert running[0].wait(100) == status
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may wait for the other, until the launcher ends it
            assert running[1].wait(3) == status
    errors = (tmp_path / "printed.txt").read_text()
    assert errors.count(said) == 1
    assert "Traceback" not in errors


def test_what_accelerate_launch_says_of_the_ranks(monkeypatch):
    config = TrainConfig(
        pretrained_model_name_or_path="tiny", dataset_name="openmoji", resolution=64, train_batch_size=2
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    settled = command_line._as_launched(config, world=4)
    assert (settled.num_processes, settled.ranks_here, settled.machine_rank) == (4, 2, 1)
    with pytest.raises(ConfigError, match="num_processes = 8, num_machines = 1, but this is one of 4 ranks"):
        command_line._as_launched(config.updated(num_processes=8), world=4)
    with pytest.raises(ConfigError, match="fp16 needs an accelerator"):
        command_line._as_launched(config.updated(mixed_precision="fp16"), world=4)


def test_interrupted_before_there_is_a_run(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "parse", interrupted)
    monkeypatch.setattr(command_line, "_end", lambda message, status: sys.exit(f"{status} {message}"))
    with pytest.raises(SystemExit, match="^130 interrupted$"):
        command_line.main()
    gc.enable()


def test_a_rank_that_fails_says_why(tmp_path, image_folder):
    folder = image_folder(12)
    for index in range(12):
        (folder / f"{index:03}.png").write_bytes(b"no image")
    Image.new("RGB", (64, 64)).save(folder / "000.png")
    process = launch(
        *(flag for flag in REFERENCE.split() if "dataset" not in flag), f"--train_data_dir={folder}",
        f"--output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    errors = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    assert errors.count("the image cannot be used") == 1
    assert run_folder.RunFolder(tmp_path / "run").failure["what"] == "DataError"


def test_a_killed_launcher_leaves_no_rank(tmp_path):
    folder = tmp_path / "run"
    process = launch(*(flag for flag in REFERENCE.split() if "steps" not in flag), "--max_train_steps=500",
                     "--gradient_accumulation_steps=1", f"--output_dir={folder}")  # fmt: skip
    try:
        wait_for((folder / run_folder.STEPS).exists, within=200)
        assert len(processes_of(folder)) == 3, "the launcher and two ranks"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert none_left(folder, within=15)


def test_the_command_that_repeats_a_run_on_two_ranks_gives_the_same_losses(settings, tmp_path):
    steps = settings.pop("steps")
    flags = flags_of({**settings, "max_train_steps": steps})
    with two_ranks(flags, tmp_path / "printed") as ranks:
        assert [rank.wait(200) for rank in ranks] == [0, 0], (tmp_path / "printed").read_text()[-3000:]
    run = Run(settings["output_dir"])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    again = subprocess.run(
        run.reproduce()[-1], shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=250,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    repeated = Run(tmp_path / "again")
    assert repeated.summary["world_size"] == 2
    assert repeated.steps.loss.tolist() == run.steps.loss.tolist()


@pytest.mark.parametrize(
    "number, status, said",
    [
        (signal.SIGTERM, 143, r"stopped after step \d+: by SIGTERM"),
        (signal.SIGINT, 130, "interrupted; the measurements are"),
    ],
)
def test_sdnb_train_on_two_ranks_is_stopped(settings, tmp_path, number, status, said):
    del settings["output_dir"]
    del settings["steps"]
    flags = flags_of({**settings, "max_train_steps": 5000, "num_processes": 2})
    with (tmp_path / "printed").open("w") as file:
        process = Forked([sys.executable, "-m", "sdnb", "train", *flags], stdout=file, stderr=file, cwd=tmp_path,
                         env={**os.environ, "SDNB_RUNS": str(tmp_path / "here")}, start_new_session=True)  # fmt: skip
    try:
        (steps,) = wait_for(lambda: [*tmp_path.glob(f"here/*/{run_folder.STEPS}")])
        process.send_signal(number)
        assert process.wait(60) == status
    finally:
        process.kill()
    printed = (tmp_path / "printed").read_text()
    assert re.search(said, printed) and "Traceback" not in printed
    assert none_left(steps.parent)
    assert Run(steps.parent).state == "interrupted"
