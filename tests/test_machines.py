"""Four machines with two ranks each: real processes, and a network between them that loses frames, or a machine."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
from launching import start
from machines import MACHINES, network
from processes import none_left, wait_for
from training import small_data, small_model

from sdnb.run import folder as run_folder
from sdnb.run.folder import RunFolder
from sdnb.settings.flags import command_line as flags_of

RANKS, STEPS = 2 * MACHINES, 12
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "eth0"}
RECORDED = ["step", "epoch", "images", "loss", "train_loss", "step_loss", "lr", "grad_norm"]


@pytest.fixture(scope="module")
def net():
    with network() as made:
        yield made


def settings(folder):
    return dict(
        pretrained_model_name_or_path=small_model(), dataset_name=small_data(), resolution=64, center_crop=True,
        train_batch_size=1, learning_rate=1e-3, lr_warmup_steps=0, max_train_steps=STEPS, checkpointing_steps=4, seed=7,
        report_to="none", output_dir=str(folder),
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_machine(net, tmp_path_factory):
    """The same training with as many ranks on one machine."""
    return start(settings(tmp_path_factory.mktemp("one_machine")), num_processes=RANKS)


def by_accelerate(net, machine, folder, *flags):
    return net.inside(
        machine, sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision=no",
        "--dynamo_backend=no", f"--num_machines={MACHINES}", f"--machine_rank={machine}",
        f"--main_process_ip={net.address(0)}", "--main_process_port=29500", f"--num_processes={RANKS}",
        "-m", "sdnb.train", *flags_of(settings(folder)), *flags,
    )  # fmt: skip


def by_sdnb(net, machine, folder, *flags):
    where = dict(num_machines=MACHINES, machine_rank=machine, main_process_ip=net.address(0), num_processes=RANKS)
    return net.inside(
        machine, sys.executable, "-m", "sdnb", "train", *flags_of({**settings(folder), **where}), *flags
    )  # fmt: skip


class Machines:
    """A command that runs on each of them."""

    def __init__(self, commands, folder):
        self.printed = [folder / f"machine-{machine}.txt" for machine in range(MACHINES)]
        self.running = []
        for command, printed in zip(commands, self.printed):
            with printed.open("w") as file:
                self.running.append(subprocess.Popen(command, stdout=file, stderr=file, env=ENVIRONMENT))

    def wait(self, within=150):
        """The exit statuses."""
        end = time.time() + within
        return [process.wait(end - time.time()) for process in self.running]

    def said(self, machine):
        return self.printed[machine].read_text()


@contextmanager
def started(net, by, folder, *flags):
    """The training on all machines."""
    try:
        yield Machines([by(net, machine, folder, *flags) for machine in range(MACHINES)], folder.parent)
    finally:
        for machine in range(MACHINES):
            kill(net, machine)


def kill(net, machine):
    for process in net.processes(machine):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def reach(step, folder):
    wait_for(lambda: run_folder.last_step(folder) >= step)


def same(run, other):
    return run.steps[RECORDED].equals(other.steps[RECORDED])


def test_four_machines_train_as_one(net, one_machine, tmp_path):
    with started(net, by_accelerate, tmp_path / "run") as machines:
        assert machines.wait() == [0] * MACHINES, machines.said(0)[-3000:]
    run = RunFolder(tmp_path / "run")
    assert (run.summary["world_size"], run.summary["machines"]) == (RANKS, MACHINES)
    assert list(run.steps.images) == [RANKS] * STEPS
    checksums = {tuple(rank["checksum"]) for rank in run.summary["ranks"]}
    assert checksums == {tuple(rank["checksum"]) for rank in one_machine.summary["ranks"]} and len(checksums) == 1
    assert same(run, one_machine)
    assert none_left(run.folder)


def test_a_machine_that_is_killed_ends_the_others_and_the_run_resumes(net, one_machine, tmp_path):
    """It resumes over a network that loses one frame in a hundred."""
    folder = tmp_path / "run"
    with started(net, by_accelerate, folder) as machines:
        reach(5, folder)
        kill(net, 2)
        statuses = machines.wait(within=60)
        assert 0 not in statuses
        lost = f"machine 2 \\(.*, {re.escape(net.address(2))}\\) has ended"
        for machine in (0, 1, 3):
            assert re.search(f"error: {lost}", machines.said(machine)), machines.said(machine)[-3000:]
    assert none_left(folder)
    failure = RunFolder(folder).failure
    assert failure["rank"] == 4 and re.match(lost, failure["what"])
    assert 5 <= run_folder.last_step(folder) < STEPS

    net.loss, net.lost = 0.01, 0
    try:
        with started(net, by_accelerate, folder, "--resume_from_checkpoint=latest") as machines:
            assert machines.wait() == [0] * MACHINES, machines.said(0)[-3000:]
    finally:
        net.loss = 0.0
    resumed = RunFolder(folder)
    assert resumed.state == "complete" and resumed.environment["resumed"][0]["after_step"] == 4
    assert same(resumed, one_machine)
    assert net.lost > 100
    lossy, others = (run.steps.seconds[4:].median() for run in (resumed, one_machine))
    print(f"{net.lost} frames lost: {lossy:.3f} s a step; {others:.3f} s on one machine")


def test_a_machine_that_no_frame_reaches_ends_the_others(net, tmp_path):
    folder = tmp_path / "run"
    with started(net, by_sdnb, folder, "--max_train_steps=5000") as machines:
        reach(2, folder)
        net.unplugged = {3}
        try:
            statuses = machines.wait(within=60)
        finally:
            net.unplugged = set()
        assert statuses == [1] * MACHINES
        for machine in (0, 1, 2):
            assert re.search(
                f"error: rank 6 failed: machine 3 \\(.*, {re.escape(net.address(3))}\\) cannot be reached",
                machines.said(machine),
            ), machines.said(machine)[-3000:]
    assert none_left(folder)
