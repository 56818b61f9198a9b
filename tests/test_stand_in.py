"""The stand-in for an accelerator: that it waits, counts, computes and fails as one does, and that its faults show."""

import concurrent.futures
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import stand_in_checks
import stand_in_trainings  # noqa: F401
import torch

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="torch has no backends in Python before 2.13"
)


@pytest.fixture(scope="module")
def on_npu():
    """Runs a check by name, where there are two devices of 1 GiB; the second argument is a fault or None. It forks a
    process that has loaded all and has not used a device."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, initializer=_load) as process:
        yield lambda *arguments: process.submit(stand_in_checks.in_fork, stand_in_checks.run, *arguments).result()


def _load():
    os.environ |= {"STAND_IN_DEVICES": "2", "STAND_IN_MEMORY_GIB": "1"}
    sys.path.insert(0, str(Path(__file__).parent / "stand_in"))
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import torch_npu  # noqa: F401
    import transformers  # noqa: F401


@pytest.mark.parametrize("check", stand_in_checks.CHECKS)
def test_it(on_npu, check):
    on_npu(check, None)


@pytest.mark.parametrize("fault", stand_in_checks.FAULTS)
def test_a_fault_shows(on_npu, fault):
    with pytest.raises(AssertionError, match="AssertionError"):
        on_npu(stand_in_checks.FAULTS[fault], fault)
