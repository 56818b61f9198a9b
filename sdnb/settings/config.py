"""TrainConfig: all settings of a run, validated before anything is loaded."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError, model_validator

from sdnb.errors import ConfigError
from sdnb.settings import fields
from sdnb.settings.epoch import Epoch

logger = logging.getLogger("sdnb")
F = TypeVar("F", bound=Callable[..., Any])


class TrainConfig(
    fields.RankSettings, fields.HubSettings, fields.OutputSettings, fields.ValidationSettings,
    fields.CheckpointSettings, fields.LossSettings, fields.SpeedSettings, fields.TrainingSettings, fields.DataSettings,
    fields.LoraSettings, fields.ModelSettings,
):  # fmt: skip
    """All settings of a run. Immutable. Raises ConfigError, which names every wrong setting and what would be right."""

    def __init__(self, **settings: Any) -> None:
        # `steps` is the notebook's short form.
        if "steps" in settings:
            steps = settings.pop("steps")
            if settings.setdefault("max_train_steps", steps) != steps:
                raise ConfigError("steps and max_train_steps are the same setting: give one of them")
        if gone := fields.RETIRED & settings.keys():
            logger.warning("these settings are gone and have no effect: %s", ", ".join(sorted(gone)))
        settings = {name: value for name, value in settings.items() if name not in gone}
        for name, value in settings.items():
            if value in ("", "null"):
                raise ConfigError(f"{name} = {value!r}: write None for no value (in a YAML file: null, without quotes)")
        try:
            super().__init__(**{**fields.other_defaults(settings.get("lora")), **settings})
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    @model_validator(mode="after")
    def _check_combinations(self) -> TrainConfig:
        if self.dataset_name is None and self.train_data_dir is None:
            raise ValueError(
                "no data: give dataset_name (a hub id, a folder, or an embedded one, such as openmoji) "
                "or train_data_dir (a folder of images with a metadata.jsonl)"
            )
        for name in ("train_data_dir", "dataset_config_name"):
            if self.dataset_name in fields.EMBEDDED_DATA and getattr(self, name) is not None:
                excluded = f"dataset_name = {self.dataset_name} and {name}"
                raise ValueError(f"{excluded} exclude each other: set one of them to None")
        if self.lora and self.use_ema:
            raise ValueError("use_ema is not defined for lora, as in the reference: set use_ema to False")
        if not self.lora and self.rank != fields.LoraSettings.model_fields["rank"].default:
            raise ValueError(f"rank = {self.rank} is the rank of an adapter: set lora = True, or leave rank out")
        if self.streaming and (self.dataset_name is None or self.dataset_name in fields.EMBEDDED_DATA):
            raise ValueError(
                "streaming = True needs a dataset_name that is a hub id, a folder, or .parquet or .tar files: "
                "a train_data_dir and embedded data are on the disk already"
            )
        if self.dream_training and self.prediction_type == "v_prediction":
            raise ValueError("dream_training is not defined for prediction_type = v_prediction: use only one of them")
        rank, machines = self.machine_rank, self.num_machines
        if rank >= machines:
            allowed = {1: "0", 2: "0 or 1"}.get(machines, f"0 to {machines - 1}")
            raise ValueError(
                f"machine_rank = {rank} is out of range: with num_machines = {machines} it must be {allowed}"
            )
        if machines > 1 and (self.main_process_ip is None or self.output_dir is None):
            raise ValueError(
                "num_machines > 1 needs main_process_ip, the address of machine 0, "
                "and output_dir, a folder that all machines share"
            )
        if self.num_processes and self.num_processes % machines:
            raise ValueError(
                f"num_processes = {self.num_processes} counts the ranks of all machines: it must be a multiple of "
                f"num_machines = {machines}"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """Settings from a YAML file of names and values; `overrides` take precedence. Raises ConfigError, which names
        the file, as `read_yaml` does, or if a setting is wrong."""
        current = {name: value for name, value in read_yaml(path).items() if name not in fields.RETIRED}
        try:
            return cls(**{**current, **overrides})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """The settings as YAML, without the token. `from_yaml` reads them back from a file."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude={"hub_token"}), sort_keys=False, allow_unicode=True)

    def updated(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})

    def measured_only(self, **changes: Any) -> TrainConfig:
        """A copy that trains once, from the start, and draws, reports and uploads nothing; with some more changes."""
        none = dict.fromkeys(("validation_prompts", "target_loss", "until", "resume_from_checkpoint"))
        return self.updated(**none, report_to="none", push_to_hub=False, repeats=1, **changes)

    @property
    def ranks(self) -> int:
        """All ranks. `num_processes` must be resolved."""
        assert self.num_processes is not None
        return self.num_processes

    @property
    def ranks_here(self) -> int:
        """Ranks on this machine. `num_processes` must be resolved."""
        return self.ranks // self.num_machines

    @property
    def meeting_port(self) -> int | None:
        """The port at which the ranks meet; None if a single machine may choose any."""
        return self.main_process_port or (29500 if self.num_machines > 1 else None)

    @property
    def global_batch(self) -> int:
        """Images in a full optimizer step, of all ranks. `num_processes` must be resolved."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.ranks

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate * (self.global_batch if self.scale_lr else 1)

    @property
    def adapter_rank(self) -> int | None:
        """The rank of the adapter that is trained; None if the whole UNet is."""
        return self.rank if self.lora else None

    @property
    def largest_norm(self) -> float:
        """The norm to which gradients are clipped. The reference's script for LoRA clips nothing: it gives
        `clip_grad_norm_` an iterator over the weights, and the optimizer has used that up."""
        return math.inf if self.lora else self.max_grad_norm

    def epoch(self, examples: int) -> Epoch:
        """How an epoch of so many examples divides into micro-batches and steps. `num_processes` must be resolved.
        Raises ConfigError if `whole_steps` is set and there are too few examples for one micro-batch."""
        batch, ranks = self.train_batch_size, self.ranks
        if self.whole_steps and examples < batch * ranks:
            raise ConfigError(
                f"whole_steps = True: {examples} examples do not fill a micro-batch of {batch} on each of {ranks} "
                "ranks: use a smaller train_batch_size, or turn whole_steps off"
            )
        return Epoch(examples, batch, self.gradient_accumulation_steps, ranks, self.whole_steps)

    def total_steps(self, examples: int | None) -> int:
        """Optimizer steps of the whole run. Raises ConfigError as `epoch` does, or if the number of examples is unknown
        and `max_train_steps` is not set."""
        if examples is None:
            if self.max_train_steps is None:
                raise ConfigError("max_train_steps: set it, because the number of examples of this stream is unknown")
            return self.max_train_steps
        epoch = self.epoch(examples)
        return self.max_train_steps or epoch.steps_in(self.num_train_epochs)

    def schedule_steps(self, examples: int | None) -> int:
        """Optimizer steps for which the learning-rate schedule is laid out. As in the reference (v0.26.3), epochs are
        counted as if one rank had all the data: with several ranks the schedule is longer than the run, unless
        `max_train_steps` is given."""
        if examples is None or self.max_train_steps:
            return self.total_steps(examples)
        return replace(self.epoch(examples), ranks=1).steps_in(self.num_train_epochs)

    def trajectory(self) -> dict[str, Any]:
        """The settings that affect the result: losses and weights, bit for bit. Paths are absolute."""
        names = [name for group in fields.GROUPS if group.affects_result for name in group.model_fields]
        settings = {name: getattr(self, name) for name in [*names, "num_processes"]}
        if not self.streaming:
            del settings["streaming"], settings["shuffle_buffer"]
        if self.lr_scheduler.startswith("constant"):  # a longer run only adds steps
            del settings["max_train_steps"], settings["num_train_epochs"]
        elif self.max_train_steps is not None:
            del settings["num_train_epochs"]
        for name in fields.LoraSettings.model_fields if not self.lora else ():
            del settings[name]
        for name in ("pretrained_model_name_or_path", "dataset_name", "train_data_dir"):
            if settings[name] is not None and Path(settings[name]).expanduser().exists():
                settings[name] = str(Path(settings[name]).expanduser().resolve())
        return settings


def takes_settings(**defaults: Any) -> Callable[[F], F]:
    """Give a function of `**settings` the names, defaults and descriptions of all settings, for `help()` and for
    completion in a notebook. `defaults`: where the function has others."""

    def described(function: F) -> F:
        settings = {**TrainConfig.model_fields, "steps": TrainConfig.model_fields["max_train_steps"]}
        parameters = []
        for name, field in settings.items():
            default = inspect.Parameter.empty if field.is_required() else defaults.get(name, field.default)
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
        returned = inspect.signature(function).return_annotation
        function.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
        about = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = f"{about}\n\nsteps is short for max_train_steps. The settings:\n{fields.listed()}"
        return function

    return described


TrainConfig.__doc__ = f"{TrainConfig.__doc__}\n{fields.listed()}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The names and values in a YAML file. Raises ConfigError if it cannot be read, or holds something else."""
    try:
        content = yaml.safe_load(Path(path).read_bytes()) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or not a date
        why = "its values are nested too deep" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path}: cannot be read as YAML: {why}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not names and values of settings")
    if other := [name for name in content if not isinstance(name, str)]:
        raise ConfigError(f"{path}: {other[0]!r} is not the name of a setting")
    return content


def _explain(error: ValidationError) -> str:
    """One line for each wrong setting."""
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
            given = given if len(given) <= 200 else f"{given[:200]}…"
            lines.append(f"{shown} = {given}: {detail['msg'][0].lower()}{detail['msg'][1:]}")
    return "\n".join(dict.fromkeys(lines))
