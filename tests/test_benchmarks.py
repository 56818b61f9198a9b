"""Whether the benchmarks run, with few steps. Their results are not checked."""

import json
import shutil
import subprocess
import sys

import contention
import psutil
import pytest
from processes import ROOT, wait_for


@pytest.fixture
def benchmark(tmp_path):
    """Runs a benchmark. Returns the runs in its results, and its table."""

    def run(name, *options):
        command = [sys.executable, f"benchmarks/{name}.py", *options, "--label", "little", "--out", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (written,) = tmp_path.glob("*-little.json")
        return json.loads(written.read_text())["runs"], written.with_suffix(".md").read_text()

    return run


def test_the_parts_of_a_step(benchmark):
    runs, _ = benchmark("passes", "--model", "small", "--only", "8 images: plain", "update", "--rounds", "2")
    assert [one["way"].partition(",")[0] for one in runs][:3] == ["UNet", "VAE", "text encoder"]
    assert all(len(one["milliseconds"]) == 2 and min(one["milliseconds"]) > 0 for one in runs)
    assert all(one["flop_per_image"] > 0 for one in runs if one["images"])


def test_speed(benchmark):
    runs, table = benchmark("speed", "--model", "small", "--only", "all on", "--pairs", "1", "--steps", "2")
    assert [one["run"] for one in runs] == ["all on, first run", "all on"]
    assert all(one["images_per_second"] > 0 and one["peak_gib"] > 0.3 for one in runs)
    first = runs[0]["wall_seconds"] / runs[1]["wall_seconds"]
    assert f"×{first:.2f} ({first:.2f} to {first:.2f})" in table


def test_growth(benchmark):
    runs, table = benchmark("growth", "--model", "small", "--vary", "num_processes", "--steps", "3")
    assert [one["value"] for one in runs] == [1, 2][: len(runs)]
    assert all(0.3 < one["predicted_gib"] < 3 and 0.3 < one["peak_gib"] < 3 for one in runs)
    assert table.count("| num_processes |") == len(runs)


def test_contention(benchmark, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    runs, table = benchmark("contention", "--model", "small", "--pairs", "1", "--steps", "2", "--busy", "0")
    assert [one["way"] for one in runs] == ["OpenMP default", "watched"]
    assert runs[0]["threads"]["waiting"] == "as set by GOMP_SPINCOUNT=300000"
    assert runs[1]["threads"]["waiting"] in ("spinning", "asleep") and 0 <= runs[1]["asleep_share"] <= 1
    assert f"×{runs[1]['images_per_second'] / runs[0]['images_per_second']:.2f}" in table


def test_faults(benchmark):
    count = "2" if shutil.which("cc") else "0"
    runs, table = benchmark("faults", "--kills", "2", "--errors", count, "--ranks", "1", "--launches", "0")
    assert runs["kills"][0]["kills"] == 2 and runs["kills"][0]["trainings"] >= 1
    assert all(sum(one["said"].values()) == 2 and one["operations"][0] > 100 for one in runs["errors"])
    assert "Nothing was lost, changed or left behind." in table


def test_the_busy_processes_compute_and_end():
    with contention.beside(2):
        children = psutil.Process().children()
        busy = [process for process in children if contention.COMPUTE in process.cmdline()]
        assert len(busy) == 2
        wait_for(lambda: all(process.cpu_times().user > 0.1 for process in busy))
    assert not any(process.is_running() for process in busy)
