"""The kinds of devices. None of them is here but the processor: torch's modules of the others are made up."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sdnb
from sdnb.errors import ConfigError
from sdnb.machine import device_kind, environment, nvml, vendors
from sdnb.machine.device_kind import DeviceKind, kind_here, kind_of
from sdnb.machine.environment import Devices, devices, resolved
from sdnb.metrics.step_clock import StepClock
from sdnb.settings.config import TrainConfig

SDNB = Path(sdnb.__file__).parent
ROOMS = sorted(path for path in SDNB.rglob("*.py") if path.relative_to(SDNB).parts[0] != "machine")


@pytest.fixture(autouse=True)
def ask_again():
    caches = (device_kind.kind_of, device_kind._entries, device_kind._extension_loads, nvml.nvml_of)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def names_of_kinds(source):
    """Where a source names a kind of device: as a text, or as a module of torch."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.partition(":")[0] in vendors.KINDS:
                yield node.lineno, node.value
        elif isinstance(node, ast.Attribute) and node.attr in {*vendors.KINDS, "accelerator"}:
            if ast.unparse(node.value) in ("torch", "torch.backends", "torch.version"):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if name.partition(".")[0] in ("pynvml", "torch_npu"))


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(SDNB)))
def test_only_the_room_of_machines_names_a_kind_of_device(path):
    assert not [*names_of_kinds(path.read_text())]


def test_that_test_finds_names():
    source = "x.to('cuda:0')\ntorch.backends.cuda.matmul\nif kind == 'npu': import pynvml\ntorch.accelerator.count()"
    assert len({line for line, _ in names_of_kinds(source)}) == 4 and len([*names_of_kinds(source)]) == 5
    assert not [*names_of_kinds("accelerator.device\nprint('the cpu is busy')\nenvironment.cpu_name()")]


class Event:
    """Of a device that did nothing for 5 ms between two of them."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 5.0


def module(**more):
    """What torch has for a device."""
    offered = dict(
        is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda index: f"Foo {index + 1}00",
        get_device_properties=lambda index: SimpleNamespace(total_memory=64 * 2**30),
        mem_get_info=lambda index: ((60 - index) * 2**30, 64 * 2**30), Event=Event,
        max_memory_allocated=lambda device: 5, max_memory_reserved=lambda device: 7,
        get_rng_state=lambda: torch.tensor([1]), is_initialized=lambda: True,
    )  # fmt: skip
    return SimpleNamespace(**{name: offer for name, offer in {**offered, **more}.items() if offer is not None})


@pytest.fixture
def foo(monkeypatch):
    def offers(**more):
        monkeypatch.setattr(torch, "foo", module(**more), raising=False)
        accelerator = SimpleNamespace(
            is_available=lambda: True, current_accelerator=lambda: SimpleNamespace(type="foo")
        )
        monkeypatch.setattr(torch, "accelerator", accelerator, raising=False)
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        kind_of.cache_clear()  # what a kind has found out
        return kind_here()

    return offers


def test_a_kind_that_only_torch_knows(foo):
    kind = foo(is_bf16_supported=lambda: True)
    assert devices() == Devices("foo", ("Foo 100", "Foo 200"), (64.0, 64.0), (60.0, 59.0), True, False)
    assert kind.peak_bytes(0) == (5, 7) and kind.rng_state() == 1 and kind.event().elapsed_time(None) == 5
    assert kind.missing(0) == ["clock, power and temperature", "energy"]
    assert kind.environment_for_accelerate() == {"ACCELERATE_TORCH_DEVICE": "foo:0"}
    settled = resolved(TrainConfig(dataset_name="x", pretrained_model_name_or_path="y", output_dir="z"), devices())
    assert (settled.mixed_precision, settled.num_processes) == ("bf16", 1), "accelerate neither scales nor reduces"
    with pytest.raises(ConfigError, match=r"shows 2 devices, and accelerate starts a single rank.*\(foo\): use 1"):
        resolved(settled.updated(num_processes=2), devices())
    with pytest.raises(
        ConfigError, match="fp16 on Foo 100: fp16 is not available on this device with this torch and accel"
    ):
        resolved(settled.updated(mixed_precision="fp16"), devices())


def test_where_there_is_no_accelerator(foo, monkeypatch):
    foo()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert kind_here().is_host
    monkeypatch.delattr(torch, "accelerator")  # torch before 2.6
    assert kind_here().is_host


def test_a_kind_that_serves_one_process_is_asked_by_another(foo, monkeypatch):
    """Else the process that starts the ranks would keep it from them."""
    kind = foo(is_initialized=lambda: False)
    told = []

    def answers(*command):
        told.append(command)
        return 'a banner\n{"type": "foo", "names": ["Foo"], "memory_gib": [8.0], "free_gib": [7.5], "bf16": true}'

    monkeypatch.setattr(environment, "output_of", answers)
    assert devices().names == ("Foo 100", "Foo 200") and not told
    monkeypatch.setattr(kind, "asked_apart", True)
    assert devices() == Devices("foo", ("Foo",), (8.0,), (7.5,), True)
    assert told == [(sys.executable, "-m", "sdnb.machine.ask")]
    monkeypatch.setattr(environment, "output_of", lambda *command: "it failed")
    assert devices().names == ("Foo 100", "Foo 200"), "then this process asks"


def test_what_the_other_process_says():
    told = subprocess.run([sys.executable, "-m", "sdnb.machine.ask"], capture_output=True, text=True, check=True).stdout
    assert json.loads(told)["names"] == [vendors.cpu_name()]


def test_a_kind_of_which_torch_tells_little(foo):
    names = ("get_device_name", "get_device_properties", "mem_get_info", "max_memory_allocated", "Event")
    kind = foo(**dict.fromkeys(names))
    assert devices() == Devices("foo", ("foo", "foo"), (0.0, 0.0), (0.0, 0.0), False, False)
    assert kind.peak_bytes(0) == (0, 7) and kind.event() is None
    lacking = ("memory", "phases of a step (it has no timing events)")
    assert kind.missing(0) == [*lacking, "clock, power and temperature", "energy"]
    with pytest.raises(AttributeError):
        kind.use_tf32()


def test_phases_are_the_devices_and_nobodys_without_events(foo):
    def phases(kind):
        clock = StepClock(kind)
        clock.end_phase("forward")
        return clock.read()

    seconds, of_device = phases(foo())
    assert of_device["forward"] == 0.005
    seconds, unknown = phases(foo(Event=None))
    assert unknown["other"] == seconds and unknown["forward"] == 0, "the host's clock would time the hand-over"
    seconds, of_host = phases(kind_of("cpu"))
    assert 0 < of_host["forward"] <= seconds


class Bar(DeviceKind):
    noun = "bar"


def test_a_vendors_own_package_adds_a_kind(monkeypatch, foo, caplog):
    def broken():
        raise ImportError("libbaz.so is missing")

    points = [SimpleNamespace(name="foo", load=lambda: Bar), SimpleNamespace(name="baz", load=broken)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points * (group == "sdnb.accelerators"))
    assert foo().noun == "bar" and isinstance(kind_of("foo"), Bar)
    assert "the entry point baz" in caplog.text and "libbaz.so is missing" in caplog.text


def test_an_extension_that_cannot_be_loaded_is_warned_of(monkeypatch, tmp_path, caplog):
    (tmp_path / "torch_mlu.py").write_text("raise OSError('libcnrt.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert kind_here().is_host
    assert "torch_mlu is installed, and cannot be loaded: libcnrt.so" in caplog.text


def test_kinds_that_were_not_recorded():
    assert not kind_of(None).is_known and not kind_of("unknown").is_known and kind_of(None).noun == "rank"
    assert kind_of(device_kind.SOME_GPU).noun == "GPU" and not kind_of(device_kind.SOME_GPU).is_host
    assert [kind_of(type).noun for type in ("cuda", "npu", "mlu", "cpu")] == ["GPU", "NPU", "MLU", "CPU rank"]


FREE = {"GPU-aa": 40 * 2**30, "MIG-bb": 9 * 2**30, "by number 1": 70 * 2**30}


class Nvml:
    """A machine with two GPUs, the second of which is cut into slices."""

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in FREE:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"by number {index}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(free=FREE[handle])


def gpus(monkeypatch, *properties):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: properties[getattr(device, "index", device)]
    )
    return kind_of("cuda").free_gib()


def test_what_is_free_on_gpus_and_slices_of_them(monkeypatch):
    """CUDA_VISIBLE_DEVICES may name them in any order: each is found by what torch says of it."""
    whole, piece = (SimpleNamespace(uuid=uuid, total_memory=gib * 2**30) for uuid, gib in (("aa", 80), ("bb", 10)))
    assert gpus(monkeypatch, piece, whole) == (9.0, 40.0)
    nvml.nvml_of.cache_clear()
    small = SimpleNamespace(uuid="aa", total_memory=20 * 2**30)
    assert gpus(monkeypatch, small) == (20.0,), "not more than torch has"


def test_what_is_free_where_torch_does_not_tell_the_uuid(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda device: 1 - device.index)
    before_2_5 = [SimpleNamespace(total_memory=80 * 2**30)] * 2
    assert gpus(monkeypatch, *before_2_5) == (70.0, 80.0), "the driver does not know number 0"
