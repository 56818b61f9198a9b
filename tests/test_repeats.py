"""A training that is repeated: what is reported is the spread between its runs."""

import json
import shutil

import pytest
from made_runs import make_run
from training import small_data, small_model

import sdnb
from sdnb.errors import ConfigError
from sdnb.launch import notebook
from sdnb.metrics.results import PAGE_MIME, RESULTS_MIME
from sdnb.report.page import write_page
from sdnb.run import files, repeats
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.settings.flags import parse

SECONDS = (0.50, 0.52, 0.48, 0.51, 0.60)


def completed(folder, seconds=0.5):
    make_run(folder, seconds=seconds, noise=0.01, num_processes=1)
    summary = dict(world_size=1, total_seconds=30.0, ranks=[{"peak_memory_gib": 1.0}])
    files.write(folder / run_folder.SUMMARY, summary)
    return folder


@pytest.fixture
def repeated(tmp_path):
    folder = tmp_path / "repeated"
    names = [f"repeat-{number}" for number in range(1, 6)]
    for name, seconds in zip(names, SECONDS):
        completed(folder / name, seconds)
    repeats.begin(folder, names)
    return folder


def test_what_the_runs_say_together(repeated):
    found = repeats.repeats_in(repeated)
    rates = [32 / seconds for seconds in SECONDS]
    assert found.rates == pytest.approx(rates, rel=0.01)
    assert found.median == pytest.approx(32 / 0.51, rel=0.01) and found.middle.folder.name == "repeat-4"
    assert found.without_extremes == pytest.approx(sum(32 / one for one in (0.50, 0.51, 0.52)) / 3, rel=0.01)
    deviation = (sum((rate - sum(rates) / 5) ** 2 for rate in rates) / 4) ** 0.5
    assert found.mean.high - found.mean.value == pytest.approx(2.776 * deviation / 5**0.5, rel=0.05), "t of 4 degrees"


def test_the_page_leads_with_the_runs(repeated):
    page, headline, problem = write_page(repeated)
    assert headline[0]["name"] == "images/s per CPU rank, median of 5 runs" and not problem
    assert (
        headline[1]["name"].startswith("images/s per CPU rank, mean of") or headline[1]["name"] == "spread between runs"
    )
    text = page.read_text()
    assert "slowest to fastest" in text and "as MLPerf computes it" in text
    run = sdnb.Run(repeated / "repeat-2")
    assert "--repeats=5" in run.reproduce()[-1]
    names = [row["name"] for row in run.results._repr_mimebundle_()[RESULTS_MIME]]
    assert names[0].endswith("median of 5 runs") and "images/s per CPU rank" in names, "its own is there, too"


def test_a_comparison_is_between_runs(repeated, tmp_path):
    completed(tmp_path / "single", 0.5)
    compared = sdnb.compare([tmp_path / "single", repeated])
    rate = compared.measured["repeated/repeat-4" if "repeated/repeat-4" in compared.measured else "repeated"].throughput
    assert rate == repeats.repeats_in(repeated).mean
    assert "no significant difference" in compared.statements[0], "one of the repeats is far slower"


def test_fewer_than_two_are_no_repeats(repeated):
    for number in (2, 3, 4, 5):
        (repeated / f"repeat-{number}" / run_folder.SUMMARY).unlink()
    assert repeats.repeats_in(repeated) is None
    assert sdnb.Run(repeated / "repeat-1").results.results[0].name == "images/s per CPU rank"
    assert repeats.repeats_in(repeated.parent) is None


class Launches:
    """In place of real trainings: run folders with the next of these times."""

    def __init__(self, monkeypatch, times):
        self.times, self.launch = list(times), notebook.launch
        monkeypatch.setattr(notebook, "launch", self)

    def __call__(self, plan, show=None):
        if plan.config.repeats > 1 or plan.config.until:
            return self.launch(plan, show)
        folder = run_folder.path_of(plan.config)
        shutil.rmtree(folder, ignore_errors=True)
        return sdnb.Run(completed(folder, self.times.pop(0)))


class Plan:
    def __init__(self, **settings):
        self.config = TrainConfig(
            pretrained_model_name_or_path="tiny", dataset_name="openmoji", num_processes=1, **settings
        )


@pytest.mark.parametrize(("settings", "times", "left"), [
    (dict(repeats=3), [0.5, 0.51, 0.52, 0.53], 1),
    (dict(until="5%"), [0.5, 0.51, 0.505, 0.5, 0.5], 2),
    (dict(until=1, repeats=4), [0.5, 0.7, 0.6, 0.9, 0.5], 1),
])  # fmt: skip
def test_how_often_it_is_repeated(monkeypatch, tmp_path, settings, times, left):
    launches = Launches(monkeypatch, times)
    monkeypatch.setattr(notebook, "replace", lambda plan, config: Plan(**{**settings, "repeats": 1, "until": None,
                                                                       "output_dir": config.output_dir}))  # fmt: skip
    plan = Plan(**settings, output_dir=str(tmp_path / "all"))
    run = notebook._repeat(plan, None)
    assert len(launches.times) == left
    assert run.folder.parent == tmp_path / "all" and "median of" in run.results.results[0].name
    again = notebook._repeat(plan, None)
    assert len(launches.times) == left and again.folder == run.folder, "complete runs are kept"


def test_the_settings():
    assert parse(["--pretrained_model_name_or_path=tiny", "--dataset_name=openmoji", "--until", "1.5%"]).until == 1.5
    with pytest.raises(ConfigError, match="repeats"):
        TrainConfig(pretrained_model_name_or_path="tiny", dataset_name="openmoji", repeats=0)


def test_a_repeated_training(tmp_path, capsys):
    settings = dict(
        pretrained_model_name_or_path=small_model(), train_data_dir=small_data(), resolution=64, train_batch_size=2,
        gradient_accumulation_steps=1, steps=3, num_processes=1, report_to="none",
    )  # fmt: skip
    run = sdnb.train(**settings, repeats=2, output_dir=str(tmp_path / "all"))
    losses = [list(sdnb.Run(tmp_path / "all" / f"repeat-{number}").steps.loss) for number in (1, 2)]
    assert len(losses[0]) == 3 and run.folder.name in ("repeat-1", "repeat-2")
    page = run._repr_mimebundle_()[PAGE_MIME]
    assert page["settings"]["repeats"] == 1
    assert json.loads((tmp_path / "all" / "repeats.json").read_text())["runs"] == ["repeat-1", "repeat-2"]
