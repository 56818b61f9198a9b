"""That the benchmarks run, in little; what they find is not looked at."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def benchmark(tmp_path):
    """Runs one, and gives the runs that it has written down, and its table."""

    def run(name, *options):
        command = [sys.executable, f"benchmarks/{name}.py", *options, "--label", "little", "--out", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (written,) = tmp_path.glob("*-little.json")
        return json.loads(written.read_text())["runs"], written.with_suffix(".md").read_text()

    return run


def test_the_parts_of_a_step(benchmark):
    runs, _ = benchmark("passes", "--only", "8 pictures: plain", "update", "--rounds", "2")
    assert [one["way"].partition(",")[0] for one in runs][:3] == ["UNet", "VAE", "text encoder"]
    assert all(len(one["milliseconds"]) == 2 and min(one["milliseconds"]) > 0 for one in runs)
    assert all(one["flop_per_image"] > 0 for one in runs if one["pictures"])


def test_speed(benchmark):
    runs, table = benchmark("speed", "--only", "all on", "--pairs", "1", "--steps", "2")
    assert [one["run"] for one in runs] == ["all on, first run", "all on"]
    assert all(one["images_per_second"] > 0 and one["peak_gib"] > 0.3 for one in runs)
    first = runs[0]["wall_seconds"] / runs[1]["wall_seconds"]
    assert f"×{first:.2f} ({first:.2f} to {first:.2f})" in table


def test_growth(benchmark):
    runs, table = benchmark("growth", "--vary", "num_processes", "--steps", "3")
    assert [one["value"] for one in runs] == [1, 2][: len(runs)]
    assert all(0.3 < one["predicted_gib"] < 3 and 0.3 < one["peak_gib"] < 3 for one in runs)
    assert table.count("| num_processes |") == len(runs)
