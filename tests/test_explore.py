"""Looking at data, at what the VAE keeps, at noise, and at what is drawn; and the notebook that does."""

import json
import re

import nbformat
import numpy as np
import pytest
from executed import outputs, papermill
from PIL import Image
from training import train

from sdnb.data.loading import load_data
from sdnb.errors import RunError
from sdnb.models.pipeline import load_parts
from sdnb.report import explore
from sdnb.report.page import write_page
from sdnb.report.run import Run
from sdnb.settings.config import TrainConfig


def config(**settings):
    return TrainConfig(**{"pretrained_model_name_or_path": "tiny", "resolution": 64, "center_crop": True, **settings})


@pytest.fixture
def broken(image_folder):
    """Six images: one is no image, one is there twice, and one is small."""
    folder = image_folder(6)
    (folder / "003.png").write_bytes(b"no image")
    (folder / "004.png").write_bytes((folder / "001.png").read_bytes())
    Image.new("RGB", (40, 90)).save(folder / "005.png")
    return folder


def test_a_survey_finds_what_is_wrong(broken):
    surveyed = explore.survey(load_data(config(train_data_dir=str(broken))).train)
    assert len(surveyed) == 6
    assert list(surveyed.index[surveyed.problem.notna()]) == [3]
    assert "003.png" in surveyed.problem[3]
    assert surveyed.same_as.dropna().to_dict() == {4: 1}
    assert (surveyed.width[5], surveyed.height[5]) == (40, 90)
    said = explore.overview(surveyed, config(train_data_dir=str(broken))).found
    assert (said["images"], said["cannot be used"], said["same as an earlier one"]) == ("6", "1", "1")
    assert said["smaller than 64, will be enlarged"] == "1" and said["sizes"] == "40×64 to 64×90"
    assert said["words per caption"] == "2 in each"
    assert "20% of the images are smaller" in explore.sizes(surveyed, 64).alt
    listed = explore.problems(surveyed).to_html()
    assert "Repair the file" in listed and "picture 4" in listed and "picture 2" not in listed


def test_where_nothing_can_be_used(image_folder):
    folder = image_folder(2)
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")
    surveyed = explore.survey(load_data(config(train_data_dir=str(folder))).train)
    assert explore.overview(surveyed, config(train_data_dir=str(folder))).found["cannot be used"] == "2"
    explore.sizes(surveyed, 64).svg()


def test_what_the_vae_keeps_and_what_noise_does():
    settings = config(dataset_name="openmoji")
    examples, parts = load_data(settings).train, load_parts(settings)
    kept = explore.kept_by_vae(parts, examples, [0, 5])
    assert re.search(r"ratio -?\d+\.\d dB", kept.alt) and len(kept.axes) == 6
    noised = explore.noised(parts, examples, 0, [0, 999], seed=1)
    assert "timestep 0: 100% image; timestep 999: " in noised.alt
    clean, noise = (np.asarray(axes.get_images()[0].get_array()) for axes in noised.axes[:2])
    assert clean.shape == noise.shape == (64, 64, 3) and (clean != noise).any()


def test_drawing_beside_the_untrained_model(settings):
    run = train(settings, learning_rate=1e-2)
    chart = explore.draw(run.config, ["sun"], Run(run.folder), seed=3, num_inference_steps=2)
    before, after = (np.asarray(axes.get_images()[0].get_array()) for axes in chart.axes)
    assert (before != after).any() and "Seed 3, 2 steps" in chart.alt
    again = explore.draw(run.config, ["sun"], seed=3, num_inference_steps=2)
    assert (np.asarray(again.axes[0].get_images()[0].get_array()) == before).all()
    for given, count in (("sun", 1), ('["sun", "sea"]', 2)):
        assert len(explore.draw(run.config, given, num_inference_steps=2).axes) == count
    (run.folder / "model_index.json").unlink()
    with pytest.raises(RunError, match="has no trained pipeline"):
        explore.draw(run.config, ["sun"], Run(run.folder))


def test_which_run_is_meant(monkeypatch, tmp_path):
    monkeypatch.setenv("SDNB_RUNS", str(tmp_path / "runs"))
    assert explore.find_run(None, config(dataset_name="openmoji")) is None
    assert explore.find_run("latest", config(dataset_name="openmoji")) is None
    for name, model, ended in (("old", "tiny", 1), ("new", "tiny", 2), ("other", "sd-v1-4-random", 3)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        made = config(pretrained_model_name_or_path=model, dataset_name="openmoji", num_processes=1)
        (folder / "config.yaml").write_text(made.to_yaml())
        (folder / "summary.json").write_text(json.dumps({"ended": ended}))
        (folder / "model_index.json").touch()
    (damaged := tmp_path / "runs" / "damaged").mkdir()
    for name in ("config.yaml", "summary.json", "model_index.json"):
        (damaged / name).write_text("[")
    assert explore.find_run("latest", config(dataset_name="openmoji")).folder.name == "new"
    with pytest.raises(RunError, match="there is no run here"):
        explore.find_run(tmp_path, config(dataset_name="openmoji"))


def test_the_notebook(tmp_path, broken):
    given = ["-p", "train_data_dir", str(broken), "-p", "trained", "None", "-p", "prompts", "sun"]
    done = papermill(tmp_path / "out.ipynb", *given, notebook="notebooks/explore.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unknown parameter" not in done.stderr
    assert len(outputs(nbformat.read(tmp_path / "out.ipynb", 4), "image/svg+xml")) == 4
    page, *_ = write_page(tmp_path / "out.ipynb")
    assert "003.png" in page.read_text()
