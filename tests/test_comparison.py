"""Runs side by side, of any origin: what differs, and whether it is more than chance."""

import json
import math
import re
import subprocess
import sys

import nbformat
import pytest
from made_runs import make_run
from PIL import Image
from processes import ROOT

from sdnb.errors import ConfigError, RunError
from sdnb.figures import comparison_plots
from sdnb.metrics.results import PAGE_MIME
from sdnb.metrics.throughput import Estimate, ratio_of
from sdnb.report.page import write_page
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.run.baselines import PUBLISHED, baselines, published
from sdnb.run.comparison import compare


@pytest.fixture
def three(tmp_path):
    return [
        make_run(tmp_path / "runs" / "a"),
        make_run(tmp_path / "runs" / "b", learning_rate=1e-3, torch="2.14.1"),
        make_run(tmp_path / "runs" / "c", seconds=0.4, prompts=("sun", "moon")),
    ]


def test_what_differs_is_said_and_nothing_else(three):
    compared = compare(three)
    assert list(compared.settings.index) == ["learning_rate"]
    assert list(compared.settings.loc["learning_rate"]) == ["0.0001", "0.001", "0.0001"]
    assert list(compared.environments.index) == ["torch"]


def test_the_ratio_and_whether_it_is_chance(three):
    compared = compare(three)
    ab, ac, bc = compared.statements
    assert ab.startswith("b trains") and "no significant difference" in ab
    assert ac.startswith("c trains 1.2") and "a significant difference" in ac and "as a (95 % confidence" in ac
    assert bc.startswith("c trains 1.2") and "as b" in bc
    throughput = compared.results.loc["images/s per device"]
    assert "[" not in throughput["a"] and "[×1.2" in throughput["c"]
    assert "[×0." in compared.results.loc["seconds per step"]["c"]


def test_the_interval_of_a_ratio():
    same = ratio_of(Estimate(10, 9.8, 10.2), Estimate(10, 9.8, 10.2))
    assert same.value == 1
    assert math.log(same.high) == pytest.approx(math.sqrt(2) * 0.02)
    assert math.isnan(ratio_of(Estimate(10, 9, 11), Estimate(10, math.nan, math.nan)).low)


def test_with_a_run_that_sdnb_did_not_train(three):
    compared = compare(["published", three[0]])
    label = PUBLISHED.name
    assert list(compared.runs) == [label, "a"]
    assert compared.settings.loc["use_ema"][label] == "True"
    assert "adam_beta1" not in compared.settings.index, "what is not known differs from nothing"
    assert "do not do the same work" in compared.statements[0].lower(), "before any ranking"
    assert "It is unknown whether" in compared.statements[1]
    assert compared.results.loc["images/s per device"][label] == "14.35"
    assert "do not do the same work" in comparison_plots.throughputs(compared).caption
    assert compared.environments.loc["devices"][label] == "8 × GPU, kind unknown"
    for draw in (
        comparison_plots.throughputs,
        comparison_plots.losses,
        comparison_plots.step_times,
        comparison_plots.samples,
    ):
        draw(compared).svg()


def test_the_figures(three):
    compared = compare(three[0].parent)
    assert list(compared.runs) == ["a", "b", "c"], "a folder of runs"
    assert "c trains the most" in comparison_plots.throughputs(compared).get_supxlabel()
    named = comparison_plots.losses(compared).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in named] == ["a", "b", "c"]
    assert re.search(r"c 0\.(40|39)\d s", comparison_plots.step_times(compared).get_supxlabel())
    as_text = comparison_plots.swept(compare(json.dumps([str(one) for one in three])), '["learning_rate"]')
    assert as_text.get_supxlabel().startswith("The most is ")
    assert "c trains the most" in comparison_plots.swept(compared, []).get_supxlabel()
    with pytest.raises(ConfigError, match="swept = learningrate: there is no such setting"):
        comparison_plots.swept(compared, "learningrate")
    images = comparison_plots.samples(compared)
    assert len(images.axes) == 3, "a row for each run, of the one prompt that all have"
    assert images.get_supxlabel() == "From the same seed."


def test_of_several_seeds_the_first_is_compared(tmp_path):
    made = [make_run(tmp_path / name) for name in ("one", "other")]
    for scale, seed, colour in ((0.5, 0, "blue"), (1.0, 0, "red"), (1.0, 1, "green")):
        name = f"{colour}.png"
        Image.new("RGB", (8, 8), colour).save(made[0] / run_folder.SAMPLES / name)
        files.append(
            made[0] / run_folder.SAMPLES_LIST,
            dict(step=41, prompt="sun", file=name, seed=seed, scale=scale, num_inference_steps=2, guidance_scale=1.0),
        )
    images = comparison_plots.samples(compare(made))
    assert images.get_supxlabel() == "From the same seed."
    shown = [axes.images[0].get_array()[0, 0, :3].tolist() for axes in images.axes]
    assert shown == [[255, 0, 0], [255, 0, 0]]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    compared = compare([make_run(tmp_path / "one" / "run"), make_run(tmp_path / "two" / "run")])
    assert list(compared.runs) == ["one/run", "two/run"]


def test_many_runs_leave_the_page_readable(tmp_path):
    """The ends at the top, the statements about each two folded, and no legend over the curves."""
    compared = compare(
        [make_run(tmp_path / name, seconds) for name, seconds in zip("abcde", (0.5, 0.4, 0.6, 0.3, 0.5))]
    )
    shown = compared._repr_mimebundle_()
    about, text = shown[PAGE_MIME], shown["text/html"]
    assert [one["name"] for one in about["headline"]] == ["fastest: d", "slowest: c"]
    assert "<details><summary>All 10 statements" in text and text.index("<table") < text.index("<details>")
    for draw in (comparison_plots.losses, comparison_plots.step_times):
        chart = draw(compared)
        chart.draw_without_rendering()
        (axes,) = chart.axes
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_mistakes(three, tmp_path):
    with pytest.raises(RunError, match="needs two runs, and there is only"):
        compare([three[0]])
    with pytest.raises(RunError, match="no such folder"):
        compare(tmp_path / "nothing")
    with pytest.raises(RunError, match="there is no run here"):
        compare([three[0], tmp_path])
    with pytest.raises(RunError, match="given twice"):
        compare([three[0], three[0]])
    (three[2] / run_folder.STEPS).unlink()
    with pytest.raises(RunError, match="c: has no steps"):
        compare(three)


def test_the_notebook_and_its_page(three, tmp_path):
    out = tmp_path / "comparison.ipynb"
    listed = "[" + ", ".join(f'"{one}"' for one in ["published", *three]) + "]"
    command = [sys.executable, "-m", "papermill", "notebooks/compare.ipynb", str(out), "-p", "runs", listed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = [
        output.data for cell in nbformat.read(out, 4).cells for output in cell.get("outputs", ()) if "data" in output
    ]
    assert sum("image/png" in data or "image/svg+xml" in data for data in shown) == 4
    page, *_ = write_page(out)
    text = page.read_text()
    assert "a significant difference" in text and "learning_rate" in text


def test_published_measurements_by_name():
    listed = published()
    assert listed.loc["suite-2024-06-v1-4-8-gpus", "images trained/s"] == pytest.approx(354 * 8 / 101 / 2.040)
    assert listed.loc["suite-2024-06-v1-5-32-gpus", "images trained/s"] == pytest.approx(3.732, abs=1e-3)
    for name, one in baselines().items():
        facts = listed.loc[name]
        assert facts["source"].startswith("https://") and facts["hardware"] == f"{one.devices_used} × {one.device}"
        if one.seconds_per_step:
            per_device = one.config.train_batch_size * one.config.gradient_accumulation_steps
            assert per_device / one.seconds_per_step == pytest.approx(one.images_per_second, abs=5e-3), "as published"
    names = ["published", "suite-2024-06-v1-4-8-gpus", "mlperf-5.0-b200"]
    compared = compare(names)
    assert compared.results.loc["images/s per device"].tolist() == [
        "14.35", "13.74, whole training [×0.96]", "274.40 [×19.12]",
    ]  # fmt: skip
    assert (
        "unknown" in compared.environments.loc["devices"].iloc[0]
        and "B200" in compared.environments.loc["devices"].iloc[2]
    )
    assert "pretrained_model_name_or_path differ" in compared.caveat
    assert any("mlperf-5.0-b200 differs" in said and "UNet alone" in said for said in compared.statements)
    for figure in (comparison_plots.throughputs, comparison_plots.losses, comparison_plots.step_times):
        assert figure(compared) is not None
    assert comparison_plots.samples(compared) is None
