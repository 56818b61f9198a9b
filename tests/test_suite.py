"""The cards of the chip-evaluation suite: their settings are its commands, and the notebook that runs them."""

import re
import shlex

import pytest
import yaml
from executed import papermill
from processes import ROOT
from training import small_data, small_model

from sdnb.errors import ConfigError
from sdnb.launch import suite
from sdnb.report.page import write_page
from sdnb.run.baselines import SUITE
from sdnb.run.folder import RunFolder
from sdnb.settings.config import TrainConfig, read_yaml
from sdnb.settings.flags import parse

CARDS = sorted(path for path in (ROOT / "params" / "suite").glob("*.yaml") if path.stem != "embedded")
# What a card adds to the command, and where the suite's text and logs say another number of steps than its command.
ADDED = {"encoder_cache_gib", "fold_micro_batches", "fused_optimizer", "without_xformers", "validation_loss_steps",
         "num_processes", "max_train_steps", "output_dir"}  # fmt: skip


def command_in(card):
    """The flags of the command in a card's comment."""
    text = card.read_text().partition("The suite's command:\n")[2]
    lines = [line.lstrip("# ") for line in text.splitlines()]
    until = next(index for index, line in enumerate(lines) if not line.endswith("\\"))
    words = shlex.split(" ".join(line.rstrip("\\") for line in lines[: until + 1]))
    return words[next(index for index, word in enumerate(words) if word.endswith(".py")) + 1 :]


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_a_card_is_the_suites_command(card):
    """Verbatim, but for the model and a tracker that is not installed here."""
    settings = read_yaml(card)
    model = settings["pretrained_model_name_or_path"]
    flags = [flag.replace("$MODEL_NAME", model) for flag in command_in(card)]
    expected = parse([flag for flag in flags if not re.match("--(report_to|hub_model_id)", flag)],
                     lora=card.stem.startswith("lora"))  # fmt: skip
    made = TrainConfig(**settings)
    differ = {name for name, value in made.model_dump().items() if value != getattr(expected, name)}
    assert differ <= ADDED, differ


def test_each_card_has_its_published_figures():
    known = yaml.safe_load(SUITE.read_text())
    assert sorted(known) == [path.stem for path in CARDS]
    for name, card in suite.cards().items():
        text = (ROOT / suite.CARDS / f"{name}.yaml").read_text()
        if card.published:
            assert (
                f"{card.published.seconds_per_step:.3f} s/it" in text
                and f"{card.published.images_per_second:g}" in text
            )
            assert card.published.devices_used == card.settings["num_processes"]
            assert card.published.resolution == card.settings["resolution"]
        if card.target:
            assert f"under {card.target['loss']:g} after step {card.target['after']}" in text


@pytest.mark.parametrize(
    "names, changes, said",
    [
        (["sd14"], None, "there is no card sd14; the cards are: sd14-512-8, "),
        (None, {"stepz": 3}, "sd14-512-8.yaml with changes = {'stepz': 3}: stepz: there is no such setting"),
        (None, "[3]", "changes = [3]: give names and values"),
        (None, {"repeats": 3}, "changes: repeats: a card is run once"),
    ],
)
def test_a_wrong_choice(names, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        suite.cards(names, changes)


def test_the_notebook(tmp_path):
    """A card with another model is run once; one that this machine cannot hold does not stop the rest."""
    embedded = yaml.safe_load((ROOT / "params" / "suite" / "embedded.yaml").read_text())["changes"]
    changes = {**embedded, "pretrained_model_name_or_path": small_model(), "dataset_name": small_data(), "steps": 4}
    done = papermill(tmp_path / "suite.ipynb", "-p", "output_dir", str(tmp_path / "runs"), "-y",
                     yaml.safe_dump(dict(changes=changes, cards=["lora-sd15-256-1"])),
                     notebook="notebooks/suite.ipynb")  # fmt: skip
    assert done.returncode == 0, done.stderr
    page, headline, problem = write_page(tmp_path / "suite.ipynb")
    text = page.read_text()
    assert len(headline) == 1 and not problem
    for said in (
        "trained: 4 steps", "not judged: it is of another pretrained", "as the suite computes",
        "spread of the first 4 losses", "no band to compare it with", "not certified: there is no band",
    ):  # fmt: skip
        assert said in text, said
    run = RunFolder(tmp_path / "runs" / "lora-sd15-256-1")
    assert run.config.lora and run.config.resolution == 64 and len(run.steps) == 4

    said = []
    chosen = suite.cards(["lora-sd15-256-1"], changes) | suite.cards(["sd21-960-8"])
    results = suite.run_cards(chosen, tmp_path / "runs", said.append)
    assert said[0] == "1 of 2: lora-sd15-256-1: complete already"
    assert "mixed_precision = fp16 needs an accelerator" in results.failed["sd21-960-8"]
    assert "did not run: " in results.table.function["sd21-960-8"] and "did not run" in repr(results)


def test_a_target_is_judged_by_the_cards_own_work():
    lora, four = suite.cards(["lora-sd15-256-1", "sd15-960-4x8"], {"dataset_name": "openmoji"}).values()
    (four_small,) = suite.cards(["sd15-960-4x8"], {"resolution": 256}).values()
    assert (lora.other_work, four_small.other_work) == ([], ["resolution"])
    run = type("Run", (), {"state": "complete", "certificate": {}})()
    steps = RunFolder(ROOT / "sdnb" / "run" / "published" / "sd-v1-4-8-gpus-2024").steps
    for card, count, loss, said in (
        (four, 5001, 0.01, "not judged: it is of another resolution"),
        (four_small, 5001, 0.01, "target: met: last step_loss 0.0100, under 0.015 is asked for"),
        (lora, 2000, 0.07, "target: met: mean of 20 train_loss 0.0700, under 0.079 is asked for, on another data set"),
        (lora, 2000, 0.08, "target: not met: mean of 20 train_loss 0.0800"),
        (lora, 1999, 0.07, "target (mean of 20 train_loss under 0.079): not reached, as it is judged after step 2000"),
    ):
        run.steps = steps.iloc[[0] * count].assign(train_loss=loss, step_loss=loss)
        assert said in "\n".join(suite._function(card, run))
