import base64
import copy
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from made_runs import FakeRun, published_run
from PIL import Image

from sdnb.figures import chart as chart_module
from sdnb.figures import run_plots
from sdnb.figures.chart import CHART_MIME, Chart
from sdnb.metrics.results import measure
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.run.baselines import PUBLISHED
from sdnb.settings.config import TrainConfig


@pytest.fixture
def measured():
    run = FakeRun(published_run())
    run.validation = pd.DataFrame(dict(step=[0, 101], loss=[0.2, 0.1], standard_error=[0.01, None], images=[64, 64]))
    return measure(run)


def labels(figure):
    return figure.axes[0].get_legend_handles_labels()[1]


def test_the_loss(measured):
    figure = run_plots.loss(measured)
    assert labels(figure)[:2] == ["each step", "mean of 10 steps"]
    assert "target 0.0456" in labels(figure) and "64 held-out images, 95 % interval" in labels(figure)
    assert figure.axes[0].get_xlabel() == "optimizer step"
    assert "ends at 0.1000" in figure.get_supxlabel()
    figure.svg()


def test_without_a_target_there_is_no_line(measured):
    run = FakeRun(published_run(), target=None)
    assert not [label for label in labels(run_plots.loss(measure(run))) if "target" in label]


def test_step_times_mark_the_short_steps(measured):
    figure = run_plots.step_times(measured)
    points = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert len(points["short step"].get_xdata()) == 25
    assert len(points["full step"].get_xdata()) == 76
    assert np.allclose(points["short step"].get_ydata(), 2 * 0.558)
    assert "25 of 101 steps are short; 10 are warm-up" in figure.get_supxlabel()
    assert "warm-up" in labels(figure)
    assert figure.axes[0].get_ylabel() == "seconds"


def test_where_the_time_goes(measured):
    figure = run_plots.where_time_goes(measured)
    assert len(figure.axes[0].patches) == 7
    assert "14.3 %" in figure.axes[0].texts[0].get_text()


def test_a_run_of_one_step_can_be_drawn():
    measured = measure(FakeRun(published_run()[:1]))
    for draw in (run_plots.loss, run_plots.step_times, run_plots.where_time_goes):
        draw(measured).svg()


def test_images_with_captions_that_look_like_formulas():
    figure = run_plots.examples([Image.new("RGB", (8, 8))] * 2, ["costs $5 or $6", "x" * 300], total=9)
    figure.svg()
    assert figure.axes[0].get_title() == "costs $5 or $6"
    assert figure.get_supxlabel() == "2 of 9 images."


def test_samples_stand_under_their_prompt(tmp_path):
    made = TrainConfig(pretrained_model_name_or_path="tiny", dataset_name="openmoji")
    (tmp_path / run_folder.CONFIG).write_text(made.to_yaml())
    files.write(tmp_path / run_folder.MODEL, {"random_weights": True})
    run = run_folder.RunFolder(tmp_path)
    assert run_plots.samples(run) is None
    (tmp_path / "samples").mkdir()
    for step in (0, 5):
        for index, prompt in enumerate(("a", "b")):
            Image.new("RGB", (8, 8)).save(tmp_path / "samples" / f"{step}-{index}.png")
            record = dict(file=f"{step}-{index}.png", step=step, prompt=prompt, seed=3, num_inference_steps=20)
            files.append(tmp_path / "samples" / "samples.jsonl", {**record, "guidance_scale": 7.5})
    figure = run_plots.samples(run)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a", "b"]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["before", "after step 5"]
    assert "Seed 3" in figure.get_supxlabel() and "random weights" in figure.alt


def test_the_scales_of_an_adapter_and_several_seeds_stay_in_the_figure(tmp_path):
    """Of many steps the last one is shown whole."""
    files.write(tmp_path / run_folder.MODEL, {})
    (tmp_path / run_folder.CONFIG).write_text(
        TrainConfig(pretrained_model_name_or_path="tiny", dataset_name="openmoji", lora=True).to_yaml()
    )
    (tmp_path / "samples").mkdir()
    for step, scale in [*((step, 1.0) for step in range(31)), (30, 0.0), (30, 0.5)]:
        for seed in (3, 4):
            name = f"{step}-{scale}-{seed}.png"
            Image.new("RGB", (8, 8)).save(tmp_path / "samples" / name)
            record = dict(file=name, step=step, prompt="a", seed=seed, scale=scale, num_inference_steps=2)
            files.append(tmp_path / "samples" / "samples.jsonl", {**record, "guidance_scale": 7.5})
    run = run_folder.RunFolder(tmp_path)
    figure = run_plots.samples(run)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a (3)", "a (4)"]
    assert [" ".join(axes.get_ylabel().split()) for axes in figure.axes[::2]] == [
        "before", "after step 14", "after step 29", "after step 30, adapter × 0", "after step 30, adapter × 0.5",
        "after step 30",
    ]  # fmt: skip
    assert "Seeds 3 to 4" in figure.get_supxlabel()
    assert list(run.drawn.scale[-6:]) == [0, 0, 0.5, 0.5, 1, 1]


def test_a_figure_shows_itself_and_says_in_words_what_it_shows(measured):
    data, about = run_plots.loss(measured)._repr_mimebundle_()
    assert data["image/svg+xml"].startswith("<svg ") and "<metadata>" not in data["image/svg+xml"]
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    for kind in ("image/svg+xml", "image/png"):
        assert about[kind]["alt"].startswith("Loss of each optimizer step. The running mean ends at 0.1000")


def test_the_ink_of_a_figure_is_the_pages(measured):
    svg = run_plots.step_times(measured).svg()
    assert "var(--ink, #1c2430)" in svg and "var(--soft, #5b6675)" in svg
    assert not re.search(r"[^,] #(000000|1c2430|5b6675|ffffff)", svg), "neither fixed ink nor fixed paper"


def test_thousands_of_steps_stay_a_small_figure():
    many = measure(FakeRun(pd.concat([published_run()] * 60, ignore_index=True).assign(step=range(1, 6061))))
    assert len(run_plots.step_times(many).svg()) < 500_000


def test_a_slow_step_is_named(measured):
    run = FakeRun(published_run())
    run.steps.loc[48, "seconds"] = 9.0
    run.steps.at[48, "phase_seconds"] = {**run.steps.phase_seconds[48], "data": 7.0}
    chart = run_plots.step_times(measure(run))
    assert [text.get_text() for text in chart.axes[0].texts] == ["49: data took longer"]
    assert "1 took much longer than similar steps" in chart.alt


def test_names_of_slow_steps_do_not_cover_each_other(measured):
    run = FakeRun(published_run())
    for row in (40, 41, 44, 45, 80):
        run.steps.loc[row, "seconds"] = 9.0 + row / 1000
        run.steps.at[row, "phase_seconds"] = {**run.steps.phase_seconds[row], "data": 7.0}
    chart = run_plots.step_times(measure(run))
    places = [text.get_window_extent() for text in chart.axes[0].texts]
    assert len(places) == 5
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


def test_a_page_has_it_wide_and_narrow_with_its_words_as_text(measured):
    run = FakeRun(published_run())
    for row in (40, 41, 80):
        run.steps.loc[row, "seconds"] = 9.0 + row / 1000
        run.steps.at[row, "phase_seconds"] = {**run.steps.phase_seconds[row], "data": 7.0}
    chart = run_plots.step_times(measure(run))
    page = chart._repr_mimebundle_()[0][CHART_MIME]
    assert page["title"] == "Wall time of each optimizer step" and "3 took much longer" in page["caption"]
    widths = [float(re.search(r'width="([\d.]+)pt"', page[name])[1]) / 72 for name in ("wide", "narrow")]
    assert widths == pytest.approx([chart_module.WIDTH, chart_module.NARROW])
    assert chart.get_figwidth() == chart_module.WIDTH and chart.words[0].get_visible(), "the chart itself is as it was"
    narrow = copy.deepcopy(chart)
    narrow.for_page()
    places = [text.get_window_extent() for text in narrow.axes[0].texts if text.get_visible()]
    assert len(places) >= 2
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


def test_panels_are_below_each_other_in_a_narrow_window():
    beside = Chart("a", "b", 3.0, stacks=True)
    ((left, right),) = beside.panels(1, 2)
    left.plot([1, 2])
    right.plot([2, 1])
    narrow = copy.deepcopy(beside)
    narrow.for_page()
    narrow.draw_without_rendering()
    upper, lower = (axes.get_position() for axes in narrow.axes)
    assert upper.y0 > lower.y1 and upper.width > 0.7


def test_a_log_that_shows_few_steps():
    measured = measure(run_folder.RunFolder(PUBLISHED))
    chart = run_plots.loss(measured)
    assert chart.caption == "The log has 3 of 101 losses; that of step 101 is 0.0560."
    assert "median" not in run_plots.step_times(measured).caption, "of a single step after the warm-up"
