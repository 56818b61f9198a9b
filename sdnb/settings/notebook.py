"""Settings from the parameter cells of a notebook."""

import ast
from collections.abc import Container, Mapping
from typing import Any

from sdnb.errors import ConfigError
from sdnb.places import shipped
from sdnb.settings.config import TrainConfig, read_yaml
from sdnb.settings.fields import flag_from_text

# The first line of a parameter cell: of the notebook's own, and of the one that papermill injects after it.
PARAMETERS_COMMENT = "# Parameters"

# Papermill adds these with --inject-paths.
_PAPERMILLS = {"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}

# What makes the notebook's own parameters those of its demo, and what they then say about it.
_DEMO = ("pretrained_model_name_or_path", "dataset_name", "resolution")
_GOALS = ("target_loss", "validation_prompts")

# Settings that exclude each other: when papermill gives one, the notebook's defaults for the others do not count.
ONE_CHOICE = ({"steps", "max_train_steps", "num_train_epochs"}, {"dataset_name", "train_data_dir"})


def from_notebook(namespace: Mapping[str, Any], besides: Container[str] = ()) -> TrainConfig:
    """Settings from a notebook's variables: every variable with a setting's name, and every name that a parameter cell
    assigns. So a misspelt parameter is an error, and other variables of the notebook are ignored. Raises ConfigError if
    a parameter is no setting, or its value is wrong.

    Args:
        namespace: the notebook's `globals()`. IPython keeps the cells' sources in its `In`.
        besides: names that a parameter cell may assign although they are no settings.
    """
    settings = {name: namespace[name] for name in [*TrainConfig.model_fields, "steps"] if name in namespace}
    if settings.get("hub_token"):
        raise ConfigError(
            "hub_token: an executed notebook keeps its parameters, so do not put a token into one. Set HF_TOKEN in the "
            "environment, or run `hf auth login` once. Remove the token from this notebook, and from the output file "
            "of papermill. If either was shared, revoke the token."
        )
    cells = _parameter_cells(namespace.get("In", ()))
    for assigned in cells:
        names = {name for name in assigned - _PAPERMILLS if name not in besides}
        for choice in ONE_CHOICE:
            if choice & names:
                for name in choice - names:
                    settings.pop(name, None)
        settings.update({name: namespace[name] for name in names if name in namespace})
    given = set[str]().union(*cells[1:])
    if "lora" in given and flag_from_text(settings["lora"]) is True and "use_ema" not in given:
        settings.pop("use_ema", None)  # the notebook's own default is for the whole UNet
    return TrainConfig(**_without_the_demos_goals(settings, given))


def _without_the_demos_goals(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The notebook's own target and prompts are those of its demo: they say nothing about other models and data, unless
    they were given for them."""
    demo = read_yaml(shipped("params/demo.yaml"))
    if all(settings.get(name) == demo[name] for name in _DEMO):
        return settings
    return {**settings, **{name: None for name in _GOALS if name not in given and settings.get(name) == demo[name]}}


def _parameter_cells(cells: Any) -> list[set[str]]:
    """The names that each parameter cell assigns, in the notebook's latest execution from its top."""
    found: list[set[str]] = []
    for source in reversed(cells):
        comment = source.lstrip().partition("\n")[0].rstrip()
        if comment.startswith(PARAMETERS_COMMENT):
            found.insert(0, _assigned_names(source))
            if comment != PARAMETERS_COMMENT:  # the notebook's own cell: what is before it was an earlier execution
                break
    return found


def _assigned_names(source: str) -> set[str]:
    targets: list[ast.expr] = []
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # the notebook has shown it already
        return set()
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets.append(statement.target)
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
