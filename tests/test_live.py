"""What a notebook shows while a training runs."""

from xml.etree import ElementTree

import IPython.display
import pytest

from sdnb.figures import live


def records(steps, **changes):
    return [dict(step=step, seconds=2.0, images=32, loss=0.25, **changes) for step in range(1, steps + 1)]


def test_the_progress_line():
    assert live.progress([], 100) == "step 0/100 · starting"
    line = live.progress(records(50), 100)
    assert line == "██████████░░░░░░░░░░ step 50/100 · 1:40 left · loss 0.2500 · 16.0 images/s"
    assert live.progress(records(50, peak_memory_gib=1.26), 100) == f"{line} · peak 1.3 GiB"
    assert "loss not finite" in live.progress([{**records(1)[0], "loss": None}], 100)


def test_the_time_left():
    assert [live._clock(seconds) for seconds in (5, 65.4, 3725)] == ["0:05", "1:05", "1:02:05"]


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
    show = live.Live(total_steps=10)
    for step in range(1, 10):
        show(f"line {step}", "log <b>", records(step))
        now += 0.3
    assert [one["text/plain"] for one in display] == ["line 1", "line 5", "line 9"]
    assert "log &lt;b&gt;" in display[0]["text/html"] and "<svg" in display[1]["text/html"]


def test_at_the_end_the_figures_of_the_cells_below_take_over(display):
    show = live.Live(total_steps=10)
    show("line", "", records(4))
    show("line 10", "", records(10), True)
    assert "<svg" not in display[-1]["text/html"] and display[-1]["text/plain"] == "line 10"


def test_what_was_interrupted_stays_in_sight(display):
    show = live.Live(total_steps=10)
    show("line", "", records(4))
    show("interrupted", "", records(5), True)
    assert "<svg" in display[-1]["text/html"] and display[-1]["text/plain"] == "interrupted"


def test_a_plain_script_has_the_line_alone(capsys):
    show = live.Live(total_steps=10)
    show("line 1", "", records(1))
    show("line 10", "", records(10), True)
    assert capsys.readouterr().out.split("\r") == ["", f"{'line 1':<100}", f"{'line 10':<100}\n"]
