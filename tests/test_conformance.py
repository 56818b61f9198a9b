"""`sdnb check`: on the processor, on the stand-in for an accelerator, and on accelerators that do one thing wrong."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from executed import papermill
from processes import ROOT, wait_for

from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN, Finding
from sdnb.compat import torch_since
from sdnb.conformance import check, device, training
from sdnb.conformance.check import CHECKS, NOT_KNOWN, NOT_TRUSTED, NUMBERS, TRUSTED, Conformance
from sdnb.errors import ConfigError
from sdnb.machine import environment
from sdnb.report.in_process import executed
from sdnb.report.page import write_page
from sdnb.run import folder as run_folder

needs_stand_in = pytest.mark.skipif(not torch_since(2, 13), reason="torch before 2.13 has no devices in Python")


def on_stand_in(fault=None, devices=2):
    """The environment of a process that has stand-ins for NPUs."""
    path = os.pathsep.join([str(ROOT / "tests" / "stand_in"), str(ROOT)])
    more = {"STAND_IN_FAULT": fault} if fault else {}
    return {**os.environ, "PYTHONPATH": path, "STAND_IN_DEVICES": str(devices), "GLOO_SOCKET_IFNAME": "lo", **more}


def checked(*arguments, env=None):
    """What `sdnb check` says: a verdict, and why, by check; and of each number."""
    command = [sys.executable, "-m", "sdnb", "check", "--format", "json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    told = json.loads(done.stdout[done.stdout.index("{") :]) if "{" in done.stdout else pytest.fail(done.stderr[-3000:])
    assert done.returncode == any(one["verdict"] == FAILS for one in told["findings"])
    return {one["check"]: (one["verdict"], one["why"]) for one in told["findings"]}, told["numbers"]


def test_on_the_processor():
    found, numbers = checked()
    assert {name for name, (verdict, _) in found.items() if verdict != HOLDS} <= {
        "fp16", "training in fp16", "fp16 with overflow", "peak", "MFU", "power", "bf16", "training in bf16", "compile",
    }, found  # fmt: skip
    assert not [why for verdict, why in found.values() if verdict == FAILS]
    assert found["resume"][1].endswith("the same to the bit")
    assert numbers["images/s and seconds per step"] == numbers["losses and weights in float32"] == TRUSTED
    assert numbers["MFU"] == numbers["losses and weights in fp16"] == NOT_KNOWN


COMPARED = [*check._WITH_HOST, "MFU"]  # half of the checks, so that no test takes long


@needs_stand_in
@pytest.mark.parametrize("names", (COMPARED, [name for name in CHECKS if name not in COMPARED]), ids=("with", "alone"))
def test_on_two_stand_ins(names):
    found, numbers = checked("--only", *names, env=on_stand_in())
    verdicts = {name: verdict for name, (verdict, _) in found.items() if name in names}
    assert verdicts == {name: UNKNOWN if name in ("peak", "MFU", "power", "compile") else HOLDS for name in names}
    trusted = {number for number, checks in NUMBERS.items() if all(verdicts.get(name) == HOLDS for name in checks)}
    assert trusted == {number for number, verdict in numbers.items() if verdict == TRUSTED}
    if names == COMPARED:
        assert "4 steps overflowed and were skipped" in found["fp16 with overflow"][1]
    else:
        assert "2 ranks" in found["all ranks"][1] and {"phases of a step", "peak memory"} < trusted


@needs_stand_in
@pytest.mark.parametrize(
    ("fault", "fails", "says"),
    [
        ("no_synchronize", "synchronization", "a synchronization came back 0.0"),
        ("host_clock", "events", "of the time from the hand-over of work to its end"),
        ("stale_copy", "copies", "that the host wrote later"),
        ("memory_in_mib", "memory", "of 256 MiB raised the peak by 244.1 MiB"),
        ("peak_not_reset", "memory", "after a reset the peak is"),
        ("never_frees", "memory", "after a reset the peak is"),
        ("generator_not_restored", "random numbers", "with a state restored, other numbers come"),
        ("seed_ignored", "random numbers", "the same seed gives other numbers"),
        ("bf16_claimed", "bf16", "relative error"),
        ("wrong_norm", "fp16", "norm: relative error 1"),
        ("scaler_never_skips", "fp16 with overflow", "overflowed, and changed the weights"),
        ("saturates", "fp16", "a product that overflows is not infinite"),
        ("weights_in_half", "parity with the host", "loss differs by"),
        ("lost_rank", "all ranks", "2 ranks were started, but 1 joined"),
        ("wrong_sum", "all ranks", "the devices add up wrongly over ranks: 0 to 1 gave"),
    ],
)
def test_a_wrong_accelerator_fails_the_check_that_is_made_for_it(fault, fails, says):
    found, _ = checked("--only", fails, env=on_stand_in(fault))
    verdict, why = found[fails]
    assert verdict == FAILS and says in why, why


@needs_stand_in
def test_an_approximation_is_named():
    found, _ = checked("--only", "float32", env=on_stand_in("gelu_by_tanh"))
    verdict, why = found["float32"]
    assert verdict == HOLDS and why.endswith("; GELU is approximated, as by tanh")


@needs_stand_in
@pytest.mark.parametrize("ranks", (1, 2))
def test_the_notebook_on_an_accelerator(tmp_path, ranks):
    out = tmp_path / "train.ipynb"
    done = papermill(
        out, "-p", "steps", "4", "-p", "output_dir", str(tmp_path / "run"), "-p", "train_batch_size", "2",
        "-p", "gradient_accumulation_steps", "2", "-p", "validation_loss_steps", "2",
        "-y", '{"validation_prompts": null}', env=on_stand_in(devices=ranks),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = run_folder.RunFolder(tmp_path / "run")
    assert run.state == "complete" and run.config.mixed_precision == "fp16" and run.config.ranks == ranks
    assert run.devices == f"{ranks} × Stand-in NPU 0"
    assert "images/s per NPU" in (tmp_path / "run" / run_folder.RESULTS).read_text()
    phases = run.steps.phase_seconds.iloc[-1]
    assert all(phases[name] > 0 for name in ("forward", "backward", "optimizer", "ema"))
    assert sum(phases.values()) == pytest.approx(run.steps.seconds.iloc[-1], rel=0.02)
    assert len({tuple(rank["checksum"]) for rank in run.summary["ranks"]}) == 1
    assert all(0.1 < rank["peak_memory_gib"] < 1 for rank in run.summary["ranks"])
    assert "not measured, as torch does not tell it of this kind of device: clock, power" in run.log


def test_each_number_relies_on_checks_and_each_check_is_for_a_number():
    assert {*CHECKS, check._HOST} == {*device.CHECKS, *training.CHECKS, "all ranks"}
    assert {*training.CHECKS} > check._WITH_HOST
    with pytest.raises(ConfigError, match="only = luck: there is no such check. The checks are: synchronization,"):
        check.check(only=["luck"])


def made(*findings):
    return Conformance(tuple(Finding(*one) for one in findings), environment.capture())


def test_what_can_be_trusted(tmp_path):
    said = made(
        ("synchronization", HOLDS, "s"), ("copies", HOLDS, "c"), ("events", FAILS, "0.2"), ("power", UNKNOWN, "p")
    )
    numbers = said.numbers
    assert tuple(numbers.loc["images/s and seconds per step"]) == (TRUSTED, "all 2 of its checks hold")
    assert tuple(numbers.loc["phases of a step"]) == (NOT_TRUSTED, "events")
    assert tuple(numbers.loc["power, and images per joule"]) == (NOT_KNOWN, "power")
    assert tuple(numbers.loc["a resumed run"]) == (NOT_KNOWN, "random numbers, resume"), "they were not made"
    page, *_ = write_page(tmp_path, notebook=executed("check", {"checked": said}))
    text = page.read_text()
    assert "2 hold" in text and "1 do not hold" in text and "✗ does not hold" in text and "cannot be trusted" in text


def test_a_check_that_hangs_or_dies_is_a_finding_and_the_others_are_made(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "from sdnb.conformance import device\n"
        "device.CHECKS['events'] = lambda tried: os.kill(os.getpid(), 11)\n"
        "device.CHECKS['copies'] = lambda tried: time.sleep(600)\n"
    )
    monkeypatch.setattr(check, "_MOST_SECONDS", 25)  # torch takes seconds to load
    names = ["synchronization", "events", "copies", "random numbers"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = {one.check: one for one in check._tried(tmp_path, {"PYTHONPATH": path}, names)}
    assert [found[name].verdict for name in names] == [HOLDS, FAILS, FAILS, HOLDS]
    assert found["events"].why.startswith("its process ended with SIGSEGV")
    assert found["copies"].why.startswith("its process hung, and was ended after 25 s")


def test_a_process_that_cannot_start_is_a_finding(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('libfoo.so is missing', flush=True)\nimport os; os._exit(3)")
    (found,) = check._tried(tmp_path, {"PYTHONPATH": str(tmp_path)}, ["copies", "memory"])
    assert tuple(found.__dict__.values()) == ("the device", FAILS, "its process ended; it said: libfoo.so is missing")


def test_ranks_that_hang_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_MOST_SECONDS", 0)
    found = check._ranks(tmp_path, environment.devices())
    assert (found.verdict, found.why) == (FAILS, "the ranks hung, and were ended after 0 s")


def test_sdnb_check_ends_with_all_that_it_has_started():
    process = subprocess.Popen(
        [sys.executable, "-m", "sdnb", "check", "--only", "parity with the host"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    started = []

    def tries():
        started[:] = psutil.Process(process.pid).children(recursive=True)
        return any("sdnb.conformance.stage" in one.cmdline() for one in started)

    try:
        wait_for(tries)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        wait_for(lambda: not any(one.is_running() for one in started), within=10)
    finally:
        process.kill()
        process.wait()
