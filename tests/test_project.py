"""That the project's files agree with each other."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import ROOT

from sdnb.settings.config import TrainConfig

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements():
    every = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    return {canonicalize_name(one.name): one for one in map(Requirement, every)}


def constraints(python):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    applying = [
        one for one in map(Requirement, lines) if not one.marker or one.marker.evaluate({"python_version": python})
    ]
    return {canonicalize_name(one.name): one for one in applying}


def test_every_dependency_has_an_exact_version_in_its_range():
    exact = constraints("3.11")
    for name, requirement in requirements().items():
        assert name in exact, f"{name} is not in constraints.txt"
        (version,) = exact[name].specifier
        assert version.operator == "=="
        assert requirement.specifier.contains(version.version), f"{exact[name]} is outside of {requirement}"


def test_python_3_10_has_versions_too():
    assert requirements().keys() <= constraints("3.10").keys()
    assert "3.10" in PROJECT["requires-python"]


def test_torch_from_2_1_up():
    """From the version of the published measurement."""
    torch = requirements()["torch"].specifier
    assert torch.contains("2.1.0") and torch.contains("2.14.1") and not torch.contains("2.0.1")


def test_no_torchvision():
    assert "torchvision" not in (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text()


def test_conda_takes_the_same_lists():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-c constraints.txt", "-e .[test]"]
    assert "python=3.11" in environment["dependencies"]


def test_what_is_tested_is_what_the_constraints_say():
    from importlib.metadata import version

    python = "{}.{}".format(*__import__("sys").version_info)
    for name in ("diffusers", "transformers", "accelerate", "datasets", "papermill"):
        assert constraints(python)[name].specifier.contains(version(name))


REFERENCE_COMMAND = """
    --pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4 --dataset_name=lambdalabs/pokemon-blip-captions
    --use_ema --resolution=512 --center_crop --random_flip --train_batch_size=8 --gradient_accumulation_steps=4
    --max_train_steps=101 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0
    --output_dir=sd-pokemon-model
"""


def test_reference_yaml_is_the_reference_command():
    given = dict(flag.partition("=")[::2] for flag in re.findall(r"--(\S+)", REFERENCE_COMMAND))
    command = {name: yaml.safe_load(value) if value else True for name, value in given.items()}
    command["learning_rate"] = float(command["learning_rate"])
    expected = TrainConfig(
        **command, mixed_precision="fp16", num_processes=8,
        encoder_cache_gib=0, fold_micro_batches=1, fused_optimizer=False,
    )  # fmt: skip
    assert TrainConfig.from_yaml(ROOT / "params" / "reference.yaml") == expected
    accelerate = yaml.safe_load((ROOT / "params" / "accelerate-8gpu.yaml").read_text())
    assert (accelerate["num_processes"], accelerate["mixed_precision"]) == (8, "fp16")
    assert accelerate["downcast_bf16"] == "no", "a text, not a boolean"


def test_fast_yaml_is_the_same_training():
    """But for where it goes; what differs is how it is computed."""
    reference, fast = (TrainConfig.from_yaml(ROOT / "params" / f"{name}.yaml") for name in ("reference", "fast"))
    then, now = reference.trajectory(), fast.trajectory()
    differ = {name for name in then if then[name] != now[name]}
    assert differ == {"allow_tf32"}
    assert fast.encoder_cache_gib and fast.fold_micro_batches == 4 and fast.fused_optimizer
    assert fast.compile_unet == "blocks"


def notebook_cells():
    return json.loads((ROOT / "notebooks" / "train.ipynb").read_text())["cells"]


def test_demo_yaml_is_the_notebooks_default():
    (cell,) = [cell for cell in notebook_cells() if "parameters" in cell["metadata"].get("tags", ())]
    namespace = {}
    exec("".join(cell["source"]), namespace)
    defaults = {name: value for name, value in namespace.items() if not name.startswith("__")}
    assert TrainConfig(**defaults) == TrainConfig.from_yaml(ROOT / "params" / "demo.yaml")
    assert "".join(cell["source"]).startswith("# Parameters ")


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")]


def test_whoever_reads_runs_does_not_wait_for_torch():
    rooms = "sdnb.report.run, sdnb.report.page, sdnb.figures.comparison_plots, sdnb.logs.importing"
    loaded = f"import sys, {rooms}; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "sdnb.run.comparison" in modules and not {"torch", "diffusers", "transformers"} & set(modules)


def test_make_help_lists_every_target():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert "train" in targets.split()
    assert [target for target in targets.split() if not re.search(rf"^{target}\s+\w", said, re.M)] == []


def test_an_old_python_is_refused(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    made = subprocess.run(
        ["make", "lint", f"VENV={tmp_path}/venv", f"PYTHON={tmp_path}/python"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode and "is older than Python 3.10" in made.stdout
