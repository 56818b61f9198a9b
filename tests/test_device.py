"""What a device can do and what it uses. The GPU's energy counter is made up here: there is none."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sdnb.machine import device, nvml


def test_the_rate_that_is_reached_is_that_of_this_machine():
    """Not more than a core can do: two fused multiply-adds of 16 floats a cycle, at 6 GHz."""
    reached = device.measured_matmul_tflops(torch.device("cpu"), torch.float32)
    assert 0.001 < reached < torch.get_num_threads() * 2 * 2 * 16 * 6e9 / 1e12


class Counter:
    """Stands for the package of NVIDIA's management library."""

    millijoules = 5_000_000

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-abc": "the GPU"}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "the GPU"
        return self.millijoules


@pytest.fixture(autouse=True)
def ask_again():
    nvml.nvml_of.cache_clear()
    yield
    nvml.nvml_of.cache_clear()


def test_energy_is_read_from_the_counter(monkeypatch):
    counter = Counter()
    monkeypatch.setitem(sys.modules, "pynvml", counter)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    meter = device.EnergyMeter(torch.device("cuda", 0))
    # what is under way when it is asked still counts
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: setattr(counter, "millijoules", 5_001_500))
    assert meter.joules() == 1.5 and meter.joules() == 0


@pytest.mark.parametrize("package", [None, Counter()])
def test_where_there_is_no_counter_nothing_is_read(monkeypatch, package):
    monkeypatch.setitem(sys.modules, "pynvml", package)
    for where in (torch.device("cpu"), torch.device("cuda", 0)):
        meter = device.EnergyMeter(where)
        assert not meter and meter.joules() != meter.joules()
