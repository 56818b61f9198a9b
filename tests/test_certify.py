"""Certificates: a run that trained as its settings say lies inside the band of other seeds, and a cheat does not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from cheats import CHEATS, NO_CACHE
from made_runs import make_run
from training import small_data, small_model, train

import sdnb
from sdnb.__main__ import main
from sdnb.certifying import quantities
from sdnb.certifying.band import FALSE_ALARMS, Band, band_for, deciding_settings, made_with, read_band
from sdnb.certifying.certificate import CERTIFIED, NOT_CERTIFIED, TOO_FEW, UNKNOWN, certify
from sdnb.certifying.saved_weights import quantities_of
from sdnb.compat import has_stances
from sdnb.errors import ConfigError, RunError
from sdnb.launch.bands import band_of
from sdnb.metrics.results import PAGE_MIME
from sdnb.places import shipped
from sdnb.run import files
from sdnb.run import folder as run_folder
from sdnb.run.folder import RunFolder
from sdnb.settings.config import TrainConfig

DATA = Path(__file__).parent / "data"
BAND, HONEST = DATA / "band.yaml", DATA / "honest-seeds.yaml"  # of the settings below, from 20 seeds each
SETTINGS = dict(
    pretrained_model_name_or_path="tiny", dataset_name="openmoji-night", resolution=64, center_crop=True,
    random_flip=True, steps=101, train_batch_size=2, gradient_accumulation_steps=2, learning_rate=3e-4,
    lr_warmup_steps=0, use_ema=True, validation_loss_steps=25, report_to="none", num_processes=1,
    device_isolation="ignore",
)  # fmt: skip
CPU = {"precision": "no", "device": "cpu"}
# What betrays each of them. Without its draws, the VAE's posterior of this model is as good as its mean.
BETRAYED_BY = {
    "no_ema": quantities.AVERAGED,
    "no_clipping": quantities.GIVEN,
    "dropped_micro_batches": "held-out loss after step 101",
    "frozen_block": quantities.UNMOVED,
    "half_the_timesteps": "loss, steps 27 to 101",
    "repeated_data": quantities.SAVED,
    "without_resampling": None,
    "lower_precision": quantities.BEFORE,
    "smaller_resolution": "held-out loss after step 101",
    "learning_rate_of_zero": quantities.UNMOVED,
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_training_that_is_not_what_it_says(name, monkeypatch, tmp_path):
    CHEATS[name](monkeypatch)
    cache = {"encoder_cache_gib": 0} if name in NO_CACHE else {}
    run = train(SETTINGS, seed=100, output_dir=str(tmp_path / "run"), **cache)
    monkeypatch.undo()
    certificate = certify(run, read_band(BAND))
    if BETRAYED_BY[name] is None:
        assert certificate.verdict == CERTIFIED, certificate
    else:
        assert certificate.verdict == NOT_CERTIFIED, certificate
        assert BETRAYED_BY[name] in certificate.outside, certificate


def alarms(band, honest):
    """Of these honest seeds, how many have a quantity outside the band."""
    return sum(
        any(not low <= values[seed] <= high for name, values in honest.quantities.items()
            for low, high in [band.limits(name, band.made_with)])
        for seed in range(len(honest.seeds))
    )  # fmt: skip


def test_twenty_honest_seeds():
    band, honest = read_band(BAND), read_band(HONEST)
    assert len(honest.seeds) >= 20 and not {*band.seeds} & {*honest.seeds}
    assert band.settings == honest.settings and band.quantities.keys() == honest.quantities.keys()
    assert alarms(band, honest) <= 1


@pytest.mark.skipif(not has_stances(), reason="the packages of early 2024 give a seed other images")
def test_the_recorded_seeds_are_what_a_training_gives(tmp_path):
    """The seeds were recorded on another machine, whose last digits differ."""
    run = train(SETTINGS, seed=101, output_dir=str(tmp_path / "run"))
    honest = read_band(HONEST)
    assert not honest.differences(run)
    place = honest.seeds.index(101)
    found = quantities_of(run, 101)
    for name, values in honest.quantities.items():
        assert found[name] == pytest.approx(values[place], rel=0.02), name
    certificate = certify(run, read_band(BAND))
    assert certificate.verdict == CERTIFIED, certificate
    assert run.certificate["verdict"] == CERTIFIED and run.certificate["false_alarms"] == FALSE_ALARMS
    assert "certified" in [badge["text"] for badge in sdnb.Run(run.folder)._repr_mimebundle_()[PAGE_MIME]["badges"]]


def test_how_often_an_honest_run_is_outside():
    """Simulated bands of 20 seeds, each with 20 more, of as many quantities: the stated rate of false alarms."""
    draw, names = np.random.default_rng(1), [f"quantity {number}" for number in range(25)]
    outside, count = 0, 500
    for _ in range(count):
        values = np.exp(draw.normal(0, 0.05, (25, 40)))
        bands = [Band({}, CPU, 101, 10, [*range(20)], dict(zip(names, part.tolist())))
                 for part in (values[:, :20], values[:, 20:])]  # fmt: skip
        outside += alarms(*bands)
    assert 0.5 * FALSE_ALARMS < outside / (20 * count) < 1.3 * FALSE_ALARMS


def a_band_of(run, **changes):
    """As if eight seeds had given nearly what this run gave."""
    found = {**quantities.recorded_quantities(run, 40), "distance of conv_in": 1.0}
    draw = np.random.default_rng(1)
    spread = {name: (value * np.exp(draw.normal(0, 0.01, 8))).tolist() for name, value in found.items()}
    settings = {**deciding_settings(run), **changes}
    return Band(settings, made_with(run), 40, 10, [*range(8)], spread, "band.yaml")


@pytest.fixture
def made(tmp_path):
    folder = make_run(tmp_path / "run", num_processes=1)
    lines = [json.loads(line) | {"grad_norm": 0.5} for line in (folder / run_folder.STEPS).read_text().splitlines()]
    (folder / run_folder.STEPS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFolder(folder)


def test_a_run_that_is_too_short(made):
    band = a_band_of(made)
    lines = (made.folder / run_folder.STEPS).read_text().splitlines(keepends=True)
    (made.folder / run_folder.STEPS).write_text("".join(lines[:39]))
    certificate = certify(made, band)
    assert certificate.verdict == TOO_FEW and "39 of the band's 40 steps" in repr(certificate)


def test_a_run_that_did_not_record_enough(made):
    certificate = certify(made, a_band_of(made))
    assert certificate.verdict == UNKNOWN and "distance of conv_in" in repr(certificate)
    band = a_band_of(made)
    band.quantities["held-out loss after step 10"] = [0.1] * 8
    assert "set validation_loss_steps = 10" in repr(certify(made, band))


def test_a_run_that_diverged(made):
    band = a_band_of(made)
    lines = [json.loads(line) for line in (made.folder / run_folder.STEPS).read_text().splitlines()]
    lines[20]["loss"] = None
    (made.folder / run_folder.STEPS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    certificate = certify(made, band)
    assert certificate.verdict == NOT_CERTIFIED and "loss of step 21 is not finite" in certificate.reasons[0]


def test_other_settings(made):
    with pytest.raises(ConfigError, match=r"learning_rate: 0.5 in the band, 0.0001 in the run"):
        certify(made, a_band_of(made, learning_rate=0.5))


def test_the_same_step_on_more_ranks(made, tmp_path):
    """How the images of a step are divided among ranks and micro-batches is free."""
    more = make_run(tmp_path / "more", num_processes=4, train_batch_size=4, gradient_accumulation_steps=2)
    assert deciding_settings(RunFolder(more)) == deciding_settings(made)
    other = make_run(tmp_path / "other", num_processes=4, train_batch_size=8, gradient_accumulation_steps=2)
    assert deciding_settings(RunFolder(other)) != deciding_settings(made)


def test_a_comparison_does_not_judge_another_training(made, tmp_path):
    other = make_run(tmp_path / "other", seconds=0.1, num_processes=1)
    assert "a significant difference" in sdnb.compare([made.folder, other]).statements[0]
    files.write(other / run_folder.CERTIFICATE, dict(verdict=NOT_CERTIFIED, reasons=["x"], quantities=[], seeds=8,
                                                     band="b"))  # fmt: skip
    statement = sdnb.compare([made.folder, other]).statements[0]
    assert "not judged" in statement and "other: its training is not certified" in statement
    page = sdnb.Run(other)._repr_mimebundle_()[PAGE_MIME]
    assert {"text": NOT_CERTIFIED, "kind": "bad"} in page["badges"] and "x" in page["facts"]["convergence"]


def test_the_shipped_band_is_that_of_the_demo(tmp_path):
    band = read_band(shipped("params/bands/demo.yaml"))
    demo = TrainConfig.from_yaml(shipped("params/demo.yaml"), num_processes=1)
    made = tmp_path / "run"
    made.mkdir()
    (made / run_folder.CONFIG).write_text(demo.to_yaml())
    files.write(made / run_folder.MODEL, {"unet_digest": band.settings["model"]})
    files.write(made / run_folder.ENVIRONMENT, {"data": {"digest": band.settings["data"]}})
    assert not band.differences(RunFolder(made)) and band_for(RunFolder(made)).file == "params/bands/demo.yaml"
    assert len(band.seeds) == 20 and band.steps == demo.max_train_steps


def test_no_band_fits(made, capsys):
    with pytest.raises(ConfigError, match="nearest is .*demo.yaml; it differs in"):
        band_for(made)
    with pytest.raises(SystemExit) as ended:
        main(["certify"])
    assert ended.value.code == 2 and "give a run to certify, or --make-band" in capsys.readouterr().err


def test_a_file_that_is_no_band(tmp_path):
    (tmp_path / "band.yaml").write_text("seeds: [1, 2]\nsteps: 3\n")
    with pytest.raises(ConfigError, match="is no band as `sdnb certify --make-band` writes it"):
        read_band(tmp_path / "band.yaml")


def test_making_a_band(tmp_path, monkeypatch, forked_ranks, capsys):
    settings = dict(
        pretrained_model_name_or_path=small_model(), dataset_name=small_data(), resolution=64, center_crop=True,
        train_batch_size=2, lr_warmup_steps=0, steps=4, num_processes=1,
    )  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("SDNB_RUNS", str(tmp_path / "runs"))
    command = [
        "certify",
        "--make-band",
        str(tmp_path / "mine.yaml"),
        "--seeds",
        "8",
        "--band",
        str(tmp_path / "b.yaml"),
    ]
    main(command)
    band = read_band(tmp_path / "b.yaml")
    assert band.seeds == [*range(1, 9)] and band.steps == 4 and len(band.quantities["distance of conv_in"]) == 8
    capsys.readouterr()
    main(command)
    assert "seed 1" not in capsys.readouterr().out, "complete runs are kept"
    main(["certify", str(tmp_path / "runs/bands/mine/seed-3"), "--band", str(tmp_path / "b.yaml")])
    assert "\ncertified" in capsys.readouterr().out
    with pytest.raises(RunError, match="needs at least 8 seeds"):
        band_of([RunFolder(tmp_path / "runs/bands/mine/seed-1")])
    shutil.rmtree(tmp_path / "runs/bands/mine/seed-1/unet")
    with pytest.raises(SystemExit) as ended:
        main(["certify", str(tmp_path / "runs/bands/mine/seed-1"), "--band", str(tmp_path / "b.yaml")])
    assert ended.value.code == 1 and "its saved weights cannot be loaded" in capsys.readouterr().err
