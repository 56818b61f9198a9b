"""The same numbers as the reference: trajectories that it gave, recorded by benchmarks/parity.py, are given again."""

import json
from importlib.metadata import version

import parity
import pytest
from processes import two_ranks
from training import train

from sdnb.settings.flags import parse

RECORDED = sorted(parity.recorded_under(version("transformers")).glob("*.json"))
TODAY = int(version("transformers").split(".")[0]) >= 5


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    parity.make_model(parity.RECORDED_MODEL, folder / "model")
    for name in ("openmoji", "shapes"):
        parity.make_data(name, folder / name)
    return folder


def test_every_case_is_recorded():
    """On the versions of 2024, those that the reference of then has."""
    expected = {name for name, case in parity.CASES.items() if TODAY or not case.later}
    assert {json.loads(path.read_text())["case"] for path in RECORDED} == expected


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_references_trajectory(path, work, tmp_path):
    recorded = json.loads(path.read_text())
    assert all(recorded[name] for name in ("reference", "versions", "date", "command"))
    case = parity.CASES[recorded["case"]]
    flags = [*parity.flags_of(case, work, tmp_path / "run"), "--report_to=none", *["--lora"] * case.lora]
    if case.ranks > 1:
        with two_ranks(flags, tmp_path / "printed.txt") as ranks:
            assert [rank.wait(200) for rank in ranks] == [0, 0], (tmp_path / "printed.txt").read_text()
    else:
        train(parse(flags).model_dump())
    expected = recorded["train_loss"]
    assert len(expected) == parity.STEPS or "--num_train_epochs" in case.flags
    differences = parity.relative_differences(parity.losses_of_sdnb(tmp_path / "run"), expected)
    assert max(differences) <= parity.TOLERANCE["no"], dict(enumerate(differences, 1))


def test_a_difference_is_seen():
    assert max(parity.relative_differences([1.0, 2.0], [1.0, 2.001])) > parity.TOLERANCE["no"]
    with pytest.raises(ValueError, match="1 steps, and the reference 2"):
        parity.relative_differences([1.0], [1.0, 2.0])
