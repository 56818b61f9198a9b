"""What a notebook shows while a training runs."""

import re
from xml.etree import ElementTree

import IPython.display
import pytest
from made_runs import make_run

from sdnb.figures import live
from sdnb.report.run import Run
from sdnb.run import files


def records(steps, **changes):
    return [dict(step=step, seconds=2.0, images=32, loss=0.25, **changes) for step in range(1, steps + 1)]


def progress(so_far=(), total=100, run=None, **changes):
    made = live.Progress(run, total, **changes)
    made._known = None if run else ({}, 0.0)
    made.records = list(so_far)
    return made


def test_the_progress_line():
    line = progress(records(50)).line
    assert line == "██████████░░░░░░░░░░ step 50/100 · 1:40 left · loss 0.2500 · 16.0 images/s"
    more = dict(lr=1e-5, phase_seconds={"data": 0.5, "forward": 1.5}, peak_memory_gib=1.26)
    rates = "loss 0.2500 · lr 1e-05 · 16.0 images/s · data 25% · memory 1.3 GiB"
    assert progress(records(50, **more)).line.endswith(rates)
    assert "loss not finite" in progress([{**records(1)[0], "loss": None}]).line


def test_before_the_first_step_it_says_what_is_done():
    begun = progress()
    begun.doing = "loading the model"
    begun.began -= 12
    assert begun.line == "step 0/100 · loading the model · 12 s"
    resumed = progress(records(40), resumed_after=40)
    assert resumed.line.startswith("step 40/100 · starting: loading PyTorch"), (
        "the steps before say nothing about this machine now"
    )
    resumed.records += [dict(step=41, seconds=1.0, images=32, loss=0.25)]
    assert "step 41/100 · 0:59 left" in resumed.line and "32.0 images/s" in resumed.line


def test_utilisation_where_the_peak_of_the_device_is_known(tmp_path):
    run = Run(make_run(tmp_path / "run", device_peak_tflops=0.5))
    files.write(
        run.folder / "model.json", {"flop_per_image": dict(unet_training=3e9, vae_encoder=9e8, text_encoder=1e8)}
    )
    # 4e9 FLOP x 16 images/s, of 8 ranks with 0.5e12 FLOP/s each
    assert dict(progress(records(3), run=run).rates())["MFU"] == "1.6%"
    kept = records(3, encoded_images=0, encoded_captions=0)
    assert dict(progress(kept, run=run).rates())["MFU"] == "1.2%", "what was encoded before is no work"


def test_the_time_left():
    assert [live.clock(seconds) for seconds in (5, 65.4, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_the_figures_are_small_and_whole():
    assert live.figures(records(1), 100) == ""
    many = records(20_000)
    many[66 * 70]["loss"] = None
    many[-1]["images"] = 8
    drawn = live.figures(many, 20_000)
    assert len(drawn) < 60_000
    loss, seconds = ElementTree.fromstring(f"<both>{drawn}</both>")
    assert len(loss.findall("polyline")) == 4, "two curves, with a gap where the loss was not finite"
    assert 200 < len(seconds.findall("circle")) < 400


def test_the_axis_shows_what_is_done():
    """Of a long training, the first steps are not all in one line."""
    ends = [live._end_of_axis(step, 5000) for step in (2, 25, 26, 1500, 5000)]
    assert ends == [25, 25, 50, 1600, 5000]
    assert "step 25<" in live.figures(records(12), 5000)


def test_a_loss_that_is_never_finite_can_be_drawn():
    drawn = live.figures([{**one, "loss": None} for one in records(5)], 10)
    assert "polyline" not in drawn and "nan" not in drawn


@pytest.fixture
def display(monkeypatch):
    """Takes down what is shown, as a front end is sent it."""
    sent = []

    class Handle:
        def update(self, content, raw):
            sent.append(content)

    monkeypatch.setattr(IPython, "get_ipython", lambda: "a notebook")
    monkeypatch.setattr(IPython.display, "display", lambda *_, **__: Handle())
    return sent


def test_the_display_is_updated_once_a_second_at_most(display, monkeypatch):
    now = 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    show, running = live.Live(), progress(total=10)
    for record in records(9):
        running.records.append(record)
        running.log = ["log <b>"] if record["step"] == 1 else []
        show(running)
        now += 0.3
    assert [re.search(r"step (\d+)/", one["text/plain"])[1] for one in display] == ["1", "5", "9"]
    assert "log &lt;b&gt;" in display[0]["text/html"] and "<svg" in display[1]["text/html"]
    assert "log &lt;b&gt;" in display[2]["text/html"], "the latest lines stay"


def test_at_the_end_the_figures_of_the_cells_below_take_over(display):
    show, running = live.Live(), progress(records(4), total=10)
    running.log = ["12:00:00 rank 0 INFO saved", "12:00:01 rank 1 WARNING slow"]
    show(running)
    running.records, running.log, running.ended, running.doing = records(10), [], True, "complete"
    show(running)
    assert "<svg" not in display[-1]["text/html"] and "step 10/10 · complete" in display[-1]["text/plain"]
    assert "WARNING slow" in display[-1]["text/html"] and "INFO saved" not in display[-1]["text/html"]


def test_what_was_interrupted_stays_in_sight(display):
    show, running = live.Live(), progress(records(4), total=10)
    show(running)
    running.ended, running.doing = True, "interrupted"
    show(running)
    assert "<svg" in display[-1]["text/html"] and "step 4/10 · interrupted" in display[-1]["text/plain"]


def test_a_plain_script_has_the_line_alone(capsys):
    show, running = live.Live(), progress(records(1), total=10)
    show(running)
    first = running.line
    running.records, running.ended = records(10), True
    show(running)
    assert capsys.readouterr().out.split("\r") == ["", f"{first:<100}", f"{running.line:<100}\n"]


@pytest.mark.parametrize("each_step", [True, False])
def test_a_terminal_has_the_references_bar_with_the_rates(capsys, each_step):
    bar, running = live.Bar(each_step), progress(total=3, resumed_after=1)
    running.records, running.log = records(1, step_loss=0.1), ["12:00:00 rank 0 INFO resuming"]
    bar(running)
    for count in (2, 3):
        running.records, running.log = records(count, step_loss=0.1), []
        bar(running)
    running.ended = True
    bar(running)
    said = capsys.readouterr()
    assert said.out == "12:00:00 rank 0 INFO resuming\n"
    last = said.err.rstrip().rpartition("\r")[2]
    assert last.startswith("Steps: 100%") and "3/3" in last
    assert ("it/s" in last or "s/it" in last) == each_step
    assert "loss=0.2500" in last and "images/s=16.0" in last and "step_loss=0.1" in last
