"""The scripts in examples/slurm, run by stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from machines import MACHINES, network
from processes import ROOT, none_left, wait_for
from training import small_data, small_model

from sdnb.run import folder as run_folder
from sdnb.run.folder import RunFolder

SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sh"))
FLAGS = "--resolution=64 --train_batch_size=1 --gradient_accumulation_steps=1 --seed=7 --report_to=none"

# A job step runs its command on each machine, with one task there.
COMMANDS = {
    "srun": f"""
        for machine in {{0..{MACHINES - 1}}}; do
            SLURM_NODEID=$machine SLURM_PROCID=$machine ip netns exec $NAMESPACE-$machine "$@" &
        done
        status=0
        for task in $(jobs -p); do wait $task || status=$?; done
        exit $status""",
    "scontrol": """
        [ "$1" = requeue ] && echo "$2" >> $REQUEUED
        [ "$1 $2" = "show hostnames" ] && echo "$3" | tr , '\\n'""",
    "scancel": f"""
        [ "$*" = "--signal=TERM $SLURM_JOB_ID" ] || exit 1
        for machine in {{0..{MACHINES - 1}}}; do ip netns pids $NAMESPACE-$machine; done | xargs kill -TERM""",
}


@pytest.fixture(scope="module")
def net():
    with network() as made:
        yield made


@pytest.fixture
def slurm(net, tmp_path):
    """Runs a script as a job, and gives its process. It is ended with the test."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, does in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{does}\n")
        (commands / name).chmod(0o755)

    @contextmanager
    def sbatch(script, **variables):
        job = dict(
            PATH=f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}", PYTHONPATH=str(ROOT),
            SLURM_JOB_ID="77", SLURM_NNODES=str(MACHINES), SLURM_CPUS_PER_TASK="2",
            SLURM_JOB_NODELIST=",".join(net.address(machine) for machine in range(MACHINES)),
            NAMESPACE=net.name, REQUEUED=str(tmp_path / "requeued"),
            MODEL=small_model(), DATA=small_data(), OUTPUT=str(tmp_path / "run"), GPUS="1", PRECISION="no",
            ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="eth0",
        )  # fmt: skip
        with (tmp_path / "printed.txt").open("a") as printed:
            process = subprocess.Popen(
                ["bash", script, *FLAGS.split()], cwd=tmp_path, env={**os.environ, **job, **variables}, stdout=printed,
                stderr=printed,
            )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            for machine in range(MACHINES):
                for left in net.processes(machine):
                    left.kill()

    return sbatch


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_bash_reads_them(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    by, _, size = script.stem.partition("-")
    machines, gpus = size.split("x")
    said = script.read_text()
    for line in (f"#SBATCH --nodes={machines}\n", f"#SBATCH --gpus-per-node={gpus}\n", f"{by} "):
        assert line in said


def test_torchrun_on_four_machines(slurm, tmp_path):
    with slurm(ROOT / "examples/slurm/torchrun-4x8.sh", STEPS="2") as job:
        assert job.wait(200) == 0, (tmp_path / "printed.txt").read_text()[-3000:]
    run = RunFolder(tmp_path / "run")
    assert (run.summary["world_size"], run.summary["machines"], len(run.steps)) == (MACHINES, MACHINES, 2)
    assert not (tmp_path / "requeued").exists()


def test_a_job_whose_time_is_over_is_queued_again_and_resumes(slurm, tmp_path):
    script, folder, requeued = ROOT / "examples/slurm/accelerate-4x8.sh", tmp_path / "run", tmp_path / "requeued"
    with slurm(script, STEPS="1000") as job:
        wait_for(lambda: run_folder.last_step(folder) >= 2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) != 0
    assert requeued.read_text() == "77\n", (tmp_path / "printed.txt").read_text()[-3000:]
    stopped = run_folder.last_step(folder)
    assert (folder / f"checkpoint-{stopped}").exists() and RunFolder(folder).state == "interrupted"
    assert none_left(folder)
    with slurm(script, STEPS=str(stopped + 2)) as job:
        assert job.wait(200) == 0, (tmp_path / "printed.txt").read_text()[-3000:]
    run = RunFolder(folder)
    assert run.state == "complete" and len(run.steps) == stopped + 2
    assert run.environment["resumed"][0]["after_step"] == stopped
    assert requeued.read_text() == "77\n"
