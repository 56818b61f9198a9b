"""What disturbs a measurement is recorded, said on the page, and keeps a comparison from a verdict."""

import contextlib
import math
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from made_runs import FakeRun, make_run, records
from processes import wait_for
from training import small_data, small_model, train

import sdnb
import sdnb.__main__
from sdnb.errors import RunError
from sdnb.machine import nvml, witness
from sdnb.machine.device import EnergyMeter
from sdnb.machine.device_kind import DeviceKind
from sdnb.machine.witness import Witness, what_else_runs
from sdnb.metrics.isolation import disturbances
from sdnb.metrics.results import PAGE_MIME, measure
from sdnb.run import files
from sdnb.run import folder as run_folder

COMPUTE = """
import os, sys, time
until = time.monotonic() + 100
while os.path.exists(sys.argv[1]) and time.monotonic() < until:
    for _ in range(10**6): pass
"""


@contextlib.contextmanager
def busy(count=2):
    """Processes that use a core each, and are no children of this one. They end with the `with`."""
    with tempfile.NamedTemporaryFile() as flag:
        start = [sys.executable, "-c", COMPUTE, flag.name]
        detach = "import os, sys; os.fork() or (os.setsid(), os.execv(sys.argv[1], sys.argv[1:]))"
        for _ in range(count):
            subprocess.run([sys.executable, "-c", detach, *start], check=True)

        def computing():
            seen = [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [""])[-1] == flag.name]
            return sum(one.cpu_times().user > 0.3 for one in seen) == count

        wait_for(computing)
        yield


@pytest.fixture
def settings(tmp_path):
    return dict(
        pretrained_model_name_or_path=small_model(), train_data_dir=small_data(), resolution=64, train_batch_size=2,
        gradient_accumulation_steps=1, max_train_steps=6, output_dir=str(tmp_path / "run"), num_processes=1,
        report_to="none",
    )  # fmt: skip


def test_a_run_beside_busy_processes_says_so(settings, tmp_path):
    with busy():
        run = train(settings)
    assert run.steps.others_share.mean() > 0.1 and (run.steps.cpu_seconds > 0).all()
    assert run.environment["what_else_ran"]["share_of_cores"] > 0.1
    assert "WARNING other processes use" in run.log
    shown = sdnb.Run(run.folder)
    (reason,) = shown.results.disturbed
    assert reason.startswith("other processes used") and reason.endswith("of the cores")
    assert {"text": reason, "kind": "bad"} in shown._repr_mimebundle_()[PAGE_MIME]["badges"]
    make_run(tmp_path / "quiet")
    compared = sdnb.compare([tmp_path / "quiet", run.folder])
    (statement,) = [said for said in compared.statements if " times as many " in said]
    assert "It is not judged whether that is chance (run: other processes" in statement
    assert "significant" not in statement


def test_a_run_can_refuse_a_busy_machine(settings):
    with (
        busy(),
        pytest.raises(RunError, match=r"device_isolation = error: other processes use \d+% of the cores: "),
    ):
        train(settings, device_isolation="error")
    with busy():
        run = train(settings, device_isolation="ignore", resume_from_checkpoint="latest")
    assert not measure(run).disturbed and "what_else_ran" not in run.environment


def test_what_else_runs_names_the_busiest():
    with busy():
        others = what_else_runs(with_siblings=False)
    assert others.share > 0.1 and others.names
    # the other tests' processes may be busier
    assert len(others.names) == 3 or any(name.startswith("python") for name in others.names)
    assert str(others).startswith("other processes use ") and others.names[0] in str(others)


def test_what_children_use_is_the_runs_own():
    """As the processes that load images do."""
    own = Witness(torch.device("cpu"), of_machine=True)
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert own.spent().own > 0.4
    finally:
        child.kill()
        child.wait()
    assert own.spent().own < 0.4, "it has ended, and is not counted twice"


def test_the_use_of_a_machine_is_counted_once(monkeypatch):
    monkeypatch.setattr(witness.CoreUse, "spent", lambda self: (2.0, 3.0, 0.5))
    first, second = (Witness(torch.device("cpu"), of_machine) for of_machine in (True, False))
    assert (
        first.spent()[:2] == (2.0, 3.0)
        and first.spent().own == pytest.approx(0.5, abs=0.1)
        and first.spent().cores == len(first._use.cores)
    )
    assert second.spent()[1] == second.spent().cores == 0


class Nvml:
    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: "the GPU")
    nvmlDeviceGetCurrentClocksThrottleReasons = staticmethod(lambda handle: 0x20 | 0x04)
    nvmlDeviceGetComputeRunningProcesses = staticmethod(lambda handle: [SimpleNamespace(pid=1), SimpleNamespace(pid=2)])


def test_the_state_of_a_gpu(monkeypatch):
    nvml.nvml_of.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    for name, value in (("clock_rate", 1410), ("power_draw", 400_000), ("temperature", 71)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: 1 / 0)  # what a device lacks is left out
    seen = Witness(torch.device("cuda", 0), True)
    assert seen.gpu() == {"clock_mhz": 1410, "power_w": 400, "temperature_c": 71, "slowed_by": ["heat"]}
    assert seen.other_processes() == 2 and Witness(torch.device("cpu"), True).gpu() == {}
    monkeypatch.setattr(torch.version, "hip", "6.2", raising=False)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda _: 700)
    assert seen._kind.state(torch.device("cuda", 0))["power_w"] == 700, "AMD's library has W, NVIDIA's mW"


def test_what_a_vendors_package_cannot_tell_ends_no_run(monkeypatch, caplog):
    for name in ("state", "slowed_by", "other_processes"):
        monkeypatch.setattr(DeviceKind, name, lambda kind, device: 1 / 0)
    monkeypatch.setattr(DeviceKind, "energy_counter", lambda kind, device: iter([5.0, 7.5]).__next__)
    monkeypatch.setattr(DeviceKind, "synchronize", lambda kind, device: None)
    device = torch.device("xpu")  # without a number, as accelerate has that of a single rank
    seen = Witness(device, True)
    assert [seen.gpu(), seen.slowed_by(), seen.other_processes(), seen.gpu()] == [{}, [], 0, {}]
    assert caplog.text.count("state of xpu:0 cannot be read: ZeroDivisionError") == 1
    meter = EnergyMeter(device)
    assert meter.joules() == 2.5
    assert math.isnan(meter.joules()) and math.isnan(meter.joules())
    assert caplog.text.count("the energy counter of xpu:0 cannot be read any more") == 1


def of_a_gpu(**columns):
    return records([4] * 40, 1).assign(**columns)


CUDA = {"devices": {"type": "cuda"}}


@pytest.mark.parametrize(("steps", "environment", "said"), [
    (of_a_gpu(others_share=0.2), CUDA, []),
    (of_a_gpu(others_share=0.2), {"devices": {"type": "cpu"}}, ["other processes used 20% of the cores"]),
    (of_a_gpu(others_share=0.7), CUDA, ["other processes used 70% of the cores"]),
    (of_a_gpu(slowed_gpus=[0] * 30 + [2] * 10), CUDA, ["a GPU slowed itself down in 25% of the steps"]),
    (of_a_gpu(gpu=[{"clock_mhz": 1410 if step < 25 else 1200} for step in range(40)]), CUDA,
     ["the GPU's clock fell from 1410 to 1200 MHz"]),
    (of_a_gpu(gpu=[{"clock_mhz": 1410}] * 40), CUDA, []),
    (of_a_gpu(), {**CUDA, "what_else_ran": {"gpu_processes": 3}},
     ["other processes computed on the GPU: 3 at the start"]),
    (of_a_gpu(), {}, []),
])  # fmt: skip
def test_disturbances(steps, environment, said):
    assert disturbances(steps, environment) == said


def test_an_old_run_has_no_such_columns():
    assert not measure(FakeRun(records([4] * 20, 1))).disturbed
    assert pd.isna(measure(FakeRun(records([4] * 20, 1))).value_of("other processes"))


def test_a_run_that_diverged_is_no_result(tmp_path, capsys):
    for name in ("one", "other", "bad"):
        folder = make_run(tmp_path / name)
        summary = dict(world_size=8, total_seconds=30.0, ranks=[{"peak_memory_gib": 1.0}])
        files.write(folder / run_folder.SUMMARY, {**summary, **({"diverged_at": 7} if name == "bad" else {})})
    assert sdnb.Run(tmp_path / "bad").state == "diverged"
    compared = sdnb.compare(tmp_path)
    assert [*compared.runs] == ["one", "other"] and "bad: its loss was not finite" in compared.problems[0]
    with pytest.raises(SystemExit, match="diverged, as the page's title says"):
        sdnb.__main__.main(["report", str(tmp_path / "bad"), str(tmp_path / "page.html")])
    assert "<title>diverged: " in (tmp_path / "page.html").read_text()
