"""That the benchmarks run, in little; what they find is not looked at."""

import json
import subprocess
import sys

from conftest import ROOT


def test_the_parts_of_a_step(tmp_path):
    command = ["benchmarks/passes.py", "--only", "8 pictures: plain", "update", "--rounds", "2", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads((tmp_path / "passes-tiny-no.json").read_text())["runs"]
    assert [one["way"].partition(",")[0] for one in runs][:3] == ["UNet", "VAE", "text encoder"]
    assert all(len(one["milliseconds"]) == 2 and min(one["milliseconds"]) > 0 for one in runs)
    assert all(one["flop_per_image"] > 0 for one in runs if one["pictures"])
