"""SIGTERM and SIGHUP, as Slurm, Kubernetes and a terminal that closes send them, to real processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import at_step, start
from processes import ROOT, Forked, none_left, two_ranks, wait_for

from sdnb.errors import Stopped
from sdnb.run import folder as run_folder
from sdnb.settings.flags import command_line as flags_of
from sdnb.training.checkpoint_folder import numbered
from sdnb.training.step_stats import StepStats
from sdnb.training.stopping import StopRequest, end_with_rank

pytestmark = pytest.mark.usefixtures("forked_ranks")

WAITING = """
import signal, sys, threading
from pathlib import Path
from sdnb.training.stopping import StopRequest
if "ignored" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with StopRequest(Path(sys.argv[1])) as stop:
    print("ready", flush=True)
    while not stop.signal or "once" not in sys.argv:
        threading.Event().wait(0.05)
    print(stop.signal, flush=True)
    if "fails" in sys.argv:
        raise RuntimeError("lost its peer")
"""


def flags(settings, steps=2000):
    return flags_of({**{name: value for name, value in settings.items() if name != "steps"}, "max_train_steps": steps})


def checkpoint_of(folder):
    """The step of its only checkpoint: the last one recorded, but not of the run."""
    assert none_left(folder, within=40)  # they have half a minute
    ((step, _),) = numbered(folder)
    assert step == run_folder.last_step(folder)
    assert 1 < step < 2000
    assert not run_folder.RunFolder(folder).failure
    return step


def losses(folder, first):
    steps = run_folder.RunFolder(folder).steps
    return steps[steps.step >= first].loss.tolist()


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGHUP), (2, signal.SIGTERM)])
def test_a_run_that_is_stopped_keeps_a_checkpoint_and_goes_on_to_the_bit(settings, tmp_path, ranks, number):
    settings["num_processes"], folder = ranks, Path(settings["output_dir"])
    with pytest.raises(
        Stopped, match=rf"stopped after step \d+: by {number.name}. .*/checkpoint-\d+ is complete"
    ) as error:
        start(settings, steps=2000, show=at_step(2, lambda: os.kill(os.getpid(), number)))
    step = checkpoint_of(folder)
    assert error.value.status == 128 + number
    assert f"stopped after step {step}: by {number.name}" in run_folder.RunFolder(folder).log
    start(settings, steps=step + 2, resume_from_checkpoint="latest")
    start(settings, steps=step + 2, output_dir=str(tmp_path / "uninterrupted"))
    assert losses(folder, 1) == losses(tmp_path / "uninterrupted", 1)


def test_a_group_of_processes_that_all_get_the_signal(settings, tmp_path):
    """Slurm sends it to each process of a job, also to those that load images. `timeout` sends it twice."""
    folder, printed = Path(settings["output_dir"]), tmp_path / "printed"
    with printed.open("w") as file:
        process = Forked(
            [sys.executable, "-m", "sdnb.train", *flags({**settings, "dataloader_num_workers": 1})],
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or (folder / run_folder.STEPS).exists())
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.1)
        assert process.wait(60) == 143, printed.read_text()
    finally:
        process.kill()
    step = checkpoint_of(folder)
    assert f"stopped after step {step}: by SIGTERM" in printed.read_text()


def _loads_images(ready):
    end_with_rank(0)
    ready.set()
    time.sleep(60)


def test_of_its_signals_a_loading_process_heeds_that_of_its_rank_alone():
    """Python ends such processes with SIGTERM when a rank ends, and waits for them."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_loads_images, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(10)
    for name in ("TERM", "HUP", "USR2"):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    process.join(1)
    assert process.is_alive()
    process.terminate()
    process.join(5)
    assert process.exitcode == 0


def test_ranks_agree_on_the_step_when_one_of_them_gets_the_signal(settings, tmp_path):
    folder = Path(settings["output_dir"])
    with two_ranks(flags(settings), tmp_path / "printed") as ranks:
        wait_for(lambda: ranks[0].poll() is not None or (folder / run_folder.STEPS).exists())
        os.kill(ranks[1].pid, signal.SIGTERM)
        assert [rank.wait(60) for rank in ranks] == [143, 143], (tmp_path / "printed").read_text()
    assert (tmp_path / "printed").read_text().count(f"stopped after step {checkpoint_of(folder)}: by SIGTERM") == 1


def test_a_signal_that_comes_while_the_ranks_agree_counts_for_the_next_step():
    """Else one rank would stop alone, and wait for the others for ever."""
    stop = StopRequest()

    def reduce(sums, reduction):
        stop.signal = signal.SIGHUP
        return sums.clone()

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, reduce=reduce, is_local_main_process=True, is_main_process=True
    )
    encoders = SimpleNamespace(take_counts=lambda: (0, 0), store_new=lambda: None)
    stats, told = StepStats(accelerator, 1, encoders, stop), []
    for _ in range(2):
        stats.add(torch.tensor([0.5]), 1)
        stats.read(torch.tensor(1.0))
        told.append(stats.signal)
    assert told == [0, signal.SIGHUP]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_launcher_has_gone_keeps_a_checkpoint(settings, ranks):
    """This one is killed, without a chance to say anything."""
    folder = Path(settings["output_dir"])
    launcher = Forked(
        [sys.executable, "-m", "launching", json.dumps({**settings, "num_processes": ranks, "steps": 2000})]
    )
    try:
        wait_for(lambda: launcher.poll() is not None or (folder / run_folder.STEPS).exists())
    finally:
        launcher.kill()
        launcher.wait()
    checkpoint_of(folder)


def waiting(*arguments):
    process = subprocess.Popen([sys.executable, "-c", WAITING, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_the_process_at_once(tmp_path, second):
    with waiting(str(tmp_path / "failure.json")) as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(second)
        assert process.wait(5) == 128 + second


def test_an_error_after_the_launchers_signal_is_a_consequence(tmp_path):
    """It must not be reported in place of the rank that failed first."""
    with waiting(str(tmp_path / "failure.json"), "once", "fails") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM


def test_what_stops_and_what_does_not(tmp_path):
    failure = tmp_path / "failure.json"
    with waiting(str(failure), "once", "ignored") as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert process.stdout.read() == "15\n"
    failure.touch()
    with waiting(str(failure)) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 1, "another rank has failed"


def test_a_sweep_that_is_stopped_ends_its_notebook(settings, tmp_path):
    common = {name: value for name, value in settings.items() if name not in ("output_dir", "seed")}
    (grid := tmp_path / "grid.yaml").write_text(json.dumps({**common, "steps": 2000, "grid": {"seed": [1, 2]}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "sdnb", "sweep", str(grid), "--output_dir", str(tmp_path / "sweep")], cwd=ROOT
    )
    folder = tmp_path / "sweep" / "seed=1"
    try:
        wait_for(lambda: process.poll() is not None or (folder / run_folder.STEPS).exists())
        process.terminate()
        assert process.wait(10) == 143
    finally:
        process.kill()
        process.wait()
    checkpoint_of(folder)
    assert not (tmp_path / "sweep" / "seed=2").exists()
