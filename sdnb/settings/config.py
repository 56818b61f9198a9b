"""TrainConfig: the settings of one training, validated before anything is loaded; from a notebook or a YAML file."""

from __future__ import annotations

import ast
import difflib
import logging
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from sdnb.errors import ConfigError
from sdnb.settings.fields import EMBEDDED_DATA, GROUPS

logger = logging.getLogger("sdnb")

# The first line of a notebook's parameter cells: of the tagged cell, and of the one that papermill injects after it.
PARAMETERS_COMMENT = "# Parameters"

# Settings that stand for one choice: when papermill gives one of them, the others' defaults in the notebook make way.
ONE_CHOICE = (
    {"steps", "max_train_steps", "num_train_epochs"},
    {"dataset_name", "train_data_dir"},
)


class TrainConfig(*reversed(GROUPS)):
    """The settings of one training, validated; the groups that it is made of list them. Immutable.

    Raises:
        ConfigError: names every setting that is wrong, with what would be right.
    """

    def __init__(self, **settings: Any) -> None:
        # `steps` is the notebook's short form.
        if "steps" in settings:
            steps = settings.pop("steps")
            if settings.setdefault("max_train_steps", steps) != steps:
                raise ConfigError("steps and max_train_steps are the same setting: give one of them")
        for name, value in settings.items():
            if value in ("", "null"):
                raise ConfigError(f"{name} = {value!r}: write None for no value (in a YAML file: null, without quotes)")
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    @model_validator(mode="after")
    def _has_data(self) -> TrainConfig:
        if self.dataset_name is None and self.train_data_dir is None:
            raise ValueError(
                "no data: give dataset_name (a hub id, a folder, or an embedded one, such as openmoji) "
                "or train_data_dir (a folder of images with a metadata.jsonl)"
            )
        for name in ("train_data_dir", "dataset_config_name"):
            if self.dataset_name in EMBEDDED_DATA and getattr(self, name) is not None:
                raise ValueError(
                    f"dataset_name = {self.dataset_name} and {name} exclude each other: set one of them to None"
                )
        return self

    @model_validator(mode="after")
    def _go_together(self) -> TrainConfig:
        if self.dream_training and self.prediction_type == "v_prediction":
            raise ValueError("dream_training is not defined for prediction_type = v_prediction: leave one of them out")
        if self.cuda_graphs and self.compile_unet == "no":
            raise ValueError("cuda_graphs = True needs compile_unet = blocks, or whole")
        steps = self.gradient_accumulation_steps
        if self.cuda_graphs and (self.fold_micro_batches or steps) < steps:
            # the graphs' next run would overwrite the gradients that wait
            raise ValueError(
                f"cuda_graphs = True needs all {steps} micro-batches of a step to run as one: leave fold_micro_batches "
                f"out, or set it to {steps}"
            )
        if self.cuda_graphs and self.gradient_checkpointing and self.compile_unet == "blocks":
            # By torch's cudagraph_trees.py: a block that runs again within the backward pass begins a new generation of
            # graphs, which takes the memory of the gradients so far.
            raise ValueError("cuda_graphs = True with gradient_checkpointing needs compile_unet = whole")
        if self.machine_rank >= self.num_machines:
            raise ValueError(
                f"machine_rank = {self.machine_rank}: num_machines = {self.num_machines} machines are counted from 0"
            )
        if self.num_machines > 1 and (self.main_process_ip is None or self.output_dir is None):
            raise ValueError(
                "num_machines > 1 needs main_process_ip, the address of machine 0, "
                "and output_dir, a folder that all machines share"
            )
        if self.num_processes and self.num_processes % self.num_machines:
            raise ValueError(
                f"num_processes = {self.num_processes} counts the ranks of all machines together, and "
                f"num_machines = {self.num_machines} must have as many each"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """Settings from a YAML file of names and values; `overrides` take precedence.

        Raises:
            ConfigError: also where the file cannot be read, or is no mapping.
        """
        try:
            settings = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: holds {type(settings).__name__}, not names and values of settings")
        return cls(**{**settings, **overrides})

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], besides: Container[str] = ()) -> TrainConfig:
        """Settings from a notebook's variables: those with a setting's name, and every name that a parameter cell
        assigns, so that one which is no setting is an error. A parameter cell opens with the comment `# Parameters`,
        as the one that papermill injects does; other variables of the notebook are its own business.

        Args:
            namespace: the notebook's `globals()`. IPython keeps the cells' sources in its `In`.
            besides: names that a parameter cell may assign though they are no settings.
        """
        settings = {name: namespace[name] for name in [*cls.model_fields, "steps"] if name in namespace}
        if settings.get("hub_token"):
            raise ConfigError(
                "hub_token: a notebook keeps what its cells say, so a token must not stand in it: give it in the "
                "environment as HF_TOKEN, or log in once with `hf auth login`. Take it out of this notebook, and out "
                "of the one that papermill is writing; if either was shared, revoke the token."
            )
        for names in _parameter_cells(namespace.get("In", ())):
            for choice in ONE_CHOICE:
                if choice & names:
                    for name in choice - names:
                        settings.pop(name, None)
            settings.update({name: namespace[name] for name in names if name in namespace and name not in besides})
        return cls(**settings)

    def save(self, path: str | Path) -> None:
        """Write the settings as YAML, from which `from_yaml` makes an equal TrainConfig; but no token."""
        settings = self.model_dump(mode="json", exclude={"hub_token"})
        Path(path).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    def updated(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})

    def resolved(self, device_type: str, device_count: int, bf16: bool = True) -> TrainConfig:
        """A copy in which `mixed_precision` and `num_processes` are set for a machine.

        Args:
            device_type: torch's name, `cuda` or `cpu`.
            device_count: GPUs that are visible; of no meaning on a CPU.
            bf16: whether the device computes in bfloat16 with instructions of its own; a CPU without them is slow.

        Raises:
            ConfigError: if the machine cannot do what is asked for.
        """
        on_gpu = device_type != "cpu"
        precision = self.mixed_precision or ("fp16" if on_gpu else "no")
        ranks = self.num_processes or self.num_machines * (device_count if on_gpu else 1)
        if precision == "fp16" and not on_gpu:
            raise ConfigError("mixed_precision = fp16 needs a GPU, and this machine shows none: use no, or bf16")
        if precision == "bf16" and not bf16:
            if on_gpu:
                raise ConfigError("mixed_precision = bf16: this GPU does not compute in bfloat16: use fp16, or no")
            logger.warning(
                "mixed_precision = bf16: this CPU has no instructions for it, and is many times slower than in float32 "
                "(mixed_precision = no)"
            )
        if on_gpu and ranks > device_count * self.num_machines:
            raise ConfigError(
                f"num_processes = {ranks}, but this machine shows {device_count} GPUs: "
                f"use {device_count * self.num_machines}"
            )
        return self.updated(mixed_precision=precision, num_processes=ranks)

    @property
    def meeting_port(self) -> int | None:
        """The port that the ranks meet at; None where a machine alone may choose any."""
        return self.main_process_port or (29500 if self.num_machines > 1 else None)

    @property
    def ranks_here(self) -> int:
        """Ranks on this machine. Needs `num_processes` to be resolved."""
        return self.num_processes // self.num_machines

    @property
    def global_batch(self) -> int:
        """Pictures in a full optimizer step, all ranks together. Needs `num_processes` to be resolved."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_processes

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up, on any number of ranks."""
        return self.learning_rate * (self.global_batch if self.scale_lr else 1)

    def micro_batches_per_epoch(self, examples: int) -> int:
        """A rank's micro-batches in one epoch. accelerate fills the last round, so that every rank has as many; with
        `whole_steps` what does not fill a round is left out.

        Raises:
            ConfigError: if there are not enough examples for one.
        """
        if not self.whole_steps:
            return math.ceil(math.ceil(examples / self.train_batch_size) / self.num_processes)
        if examples < self.train_batch_size * self.num_processes:
            raise ConfigError(
                f"whole_steps = True: {examples} examples do not fill a micro-batch of {self.train_batch_size} on each "
                f"of {self.num_processes} ranks: use a smaller train_batch_size, or leave whole_steps out"
            )
        return examples // self.train_batch_size // self.num_processes

    def steps_per_epoch(self, examples: int) -> float:
        """Optimizer steps in one epoch. The epoch's end ends the accumulation, so the last step may be a short one;
        with `whole_steps` it does not, and an epoch may end within a step."""
        steps = self.micro_batches_per_epoch(examples) / self.gradient_accumulation_steps
        return steps if self.whole_steps else math.ceil(steps)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole training.

        Raises:
            ConfigError: if `whole_steps` is set and there are not enough examples for one.
        """
        micro_batches = self.micro_batches_per_epoch(examples)
        if self.max_train_steps:
            return self.max_train_steps
        if self.whole_steps:
            return max(1, self.num_train_epochs * micro_batches // self.gradient_accumulation_steps)
        return self.num_train_epochs * self.steps_per_epoch(examples)

    def schedule_steps(self, examples: int) -> int:
        """Optimizer steps that the learning rate's schedule is laid out for. As in the reference (v0.26.3), epochs are
        counted as if one rank had all the data: with several ranks it is longer than the training, unless
        `max_train_steps` is given."""
        return self.max_train_steps or self.updated(num_processes=1).total_steps(examples)

    def trajectory(self) -> dict[str, Any]:
        """The settings that decide how the training goes, bit for bit; where things are is said in full."""
        names = [name for group in GROUPS if group.decides_trajectory for name in group.model_fields]
        decides = {name: getattr(self, name) for name in [*names, "num_processes"]}
        if self.lr_scheduler.startswith("constant"):  # how long it goes on changes nothing of how it goes
            del decides["max_train_steps"], decides["num_train_epochs"]
        elif self.max_train_steps is not None:
            del decides["num_train_epochs"]
        for name in ("pretrained_model_name_or_path", "dataset_name", "train_data_dir"):
            if decides[name] is not None and Path(decides[name]).expanduser().is_dir():
                decides[name] = str(Path(decides[name]).expanduser().resolve())
        return decides


def _parameter_cells(cells: Any) -> list[set[str]]:
    """The names that each parameter cell assigns, for the cells of the notebook's latest execution from its top."""
    found: list[set[str]] = []
    for source in reversed(cells):
        comment = source.lstrip().partition("\n")[0].rstrip()
        if comment.startswith(PARAMETERS_COMMENT):
            found.insert(0, _assigned_names(source))
            if comment != PARAMETERS_COMMENT:  # the tagged cell; what stands before it is an earlier execution's
                break
    return found


def _assigned_names(source: str) -> set[str]:
    targets: list[ast.expr] = []
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # the notebook has shown it where it is
        return set()
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets.append(statement.target)
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _explain(error: ValidationError) -> str:
    """One line a wrong setting, in a reader's words."""
    known = [*TrainConfig.model_fields, "steps"]
    lines = []
    for detail in error.errors():
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are: {', '.join(sorted(known))}"
            lines.append(f"{name}: there is no such setting; {hint}")
        elif detail["type"] == "missing":
            lines.append(f"{name}: is missing; give {TrainConfig.model_fields[name].description}")
        elif not name:
            lines.append(str(detail["ctx"]["error"]))
        else:
            shown = "steps" if name == "max_train_steps" else name
            given = "…" if name == "hub_token" else repr(detail["input"])
            lines.append(f"{shown} = {given}: {detail['msg'][0].lower()}{detail['msg'][1:]}")
    return "\n".join(dict.fromkeys(lines))
