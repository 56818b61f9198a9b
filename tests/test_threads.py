"""How threads wait for each other: what decides it, and that libgomp does it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ROOT, wait_for

from sdnb.machine import threads

STAT = """cpu  9 9 9 9 9 9 9 9 0 0
cpu0 {0} 0 10 500 5 0 2 0 0 0
cpu1 100 0 0 800 0 0 0 {1} 0 0
cpu2 {2} 0 0 0 0 0 0 0 0 0
"""


def test_the_ranks_of_a_machine_share_its_cores():
    assert [threads.share(8, ranks) for ranks in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]


def test_the_cores_that_others_use(monkeypatch):
    """Of those that this process may run on, a virtual machine's stolen time included, and its own left out."""
    seen = iter([(0.0, (100, 0, 0), 1.0), (2.0, (200, 60, 999), 1.5), (4.0, (200, 60, 999), 3.5)])
    now = {}

    def next_moment():
        now["clock"], ticks, now["own"] = next(seen)
        now["stat"] = STAT.format(*ticks)

    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threads.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(threads.Path, "read_text", lambda _: now["stat"])
    monkeypatch.setattr(threads.time, "monotonic", lambda: now["clock"])
    monkeypatch.setattr(threads.time, "process_time", lambda: now["own"])
    next_moment()
    use = threads.CoreUse()
    next_moment()
    assert use.by_others() == pytest.approx((1.0 + 0.6 - 0.5) / 2)
    next_moment()
    assert use.by_others() == 0, "the clocks' ticks are coarse: it may have used more than there was"


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in threads.DECIDED_BY:
        monkeypatch.delenv(name, raising=False)


def test_they_sleep_while_others_use_the_cores(two_threads, monkeypatch, caplog):
    others = [0.0]
    monkeypatch.setattr(threads, "_SECONDS", 0.01)
    monkeypatch.setattr(threads.CoreUse, "by_others", lambda use: others[0] + len(use.cores) - 2)
    caplog.set_level("INFO", "sdnb")
    waits = threads.Waits("cpu")
    for use, asleep in ((0.9, True), (0.4, True), (0.1, False), (0.4, False), (0.9, True)):
        others[0] = use
        time.sleep(0.1)
        assert waits.asleep == asleep, use
    assert waits.now()["waiting"] == "asleep" and waits.now()["threads"] == 2
    assert 0 < waits.stop()["asleep_share"] < 1
    wait_for(lambda: not waits.asleep, within=5)
    assert len([line for line in caplog.messages if "sleep while they wait" in line]) == 1


@pytest.mark.parametrize(
    "device, count, variable, said",
    [
        ("cuda", 2, None, "the cuda device computes"),
        ("cpu", 1, None, "a single thread never waits"),
        ("cpu", 2, "OMP_WAIT_POLICY", "as set by OMP_WAIT_POLICY=1"),
        ("cpu", 2, "GOMP_SPINCOUNT", "as set by GOMP_SPINCOUNT=1"),
        ("cpu", 2, "KMP_BLOCKTIME", "as set by KMP_BLOCKTIME=1"),
    ],
)
def test_where_nothing_is_to_be_decided(two_threads, monkeypatch, device, count, variable, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    if variable:
        monkeypatch.setenv(variable, "1")
    waits = threads.Waits(device)
    assert waits.now() == {"threads": count, "waiting": said}
    assert waits.stop() == {} and not waits.asleep


def test_where_the_system_does_not_say_what_uses_its_cores(two_threads, monkeypatch):
    def not_there(_):
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(threads.Path, "read_text", not_there)
    assert "the load of the cores cannot be read" in threads.Waits("cpu").now()["waiting"]


def test_libgomp_has_its_threads_wait_so():
    """A thread that sleeps gives its core up whenever it waits, one that spins does not: its context switches tell."""
    shown = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True,
                           env={"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    switches = json.loads(shown.stdout)
    assert all(often >= 100 for often in switches["asleep"]) and all(seldom < 50 for seldom in switches["spinning"])


def count_switches():
    """How often the other thread of a team went to sleep in 100 pauses, each shorter than it spins, by how it waits."""
    waits = threads.Waits("cuda")
    waits._use = threads.CoreUse()
    before = {path.name for path in Path("/proc/self/task").iterdir()}
    numbers = torch.ones(1 << 18)
    (other,) = {path.name for path in Path("/proc/self/task").iterdir()} - before

    def switches():
        status = Path(f"/proc/self/task/{other}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    counted = {"asleep": [], "spinning": []}
    for _ in range(2):
        for how, change in (("spinning", waits._spin), ("asleep", waits._sleep)):
            change()
            began = switches()
            for _ in range(100):
                numbers.add_(1)
                time.sleep(0.0005)
            counted[how].append(switches() - began)
    return counted


if __name__ == "__main__":
    print(json.dumps(count_switches()))
