"""TrainConfig: every setting of a training, validated before anything is loaded."""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError

# The first line of a notebook's parameter cells: of the tagged cell, and of the one that papermill injects after it.
PARAMETERS_COMMENT = "# Parameters"

# Settings that stand for one choice: when papermill gives one of them, the others' defaults in the notebook make way.
ONE_CHOICE = (
    {"steps", "max_train_steps", "num_train_epochs"},
    {"dataset_name", "train_data_dir"},
)


def _number_from_text(value: Any) -> Any:
    # YAML 1.1 reads 1e-5 (no dot) as text.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _flag_from_text(value: Any) -> Any:
    # `papermill -p center_crop true` passes the text "true"; only True and False arrive as booleans.
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _precision_from_flag(value: Any) -> Any:
    # `no` is a boolean in YAML 1.1.
    return "no" if value is False else value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Flag = Annotated[bool, BeforeValidator(_flag_from_text)]
Real = Annotated[float, BeforeValidator(_number_from_text), Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]


def setting(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class TrainConfig(BaseModel):
    """The settings of one training. Names, defaults and meaning are those of diffusers' `train_text_to_image.py`;
    what that script does not have stands at the end. Immutable.

    Raises:
        ConfigError: names every setting that is wrong, with what would be right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Model
    pretrained_model_name_or_path: str = setting(..., "hub id, folder, or an embedded model: tiny, sd-v1-4-random")
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    variant: str | None = setting(None, "weights variant, such as fp16")
    prediction_type: Literal["epsilon", "v_prediction"] | None = setting(
        None, "what the UNet predicts; left out, what the model's scheduler says"
    )

    # Data
    dataset_name: str | None = setting(None, "hub id or folder of a data set, or the embedded openmoji")
    dataset_config_name: str | None = setting(None, "configuration of the data set")
    train_data_dir: str | None = setting(None, "folder of images with a metadata.jsonl")
    image_column: str = setting("image", "column that holds the image")
    caption_column: str = setting("text", "column that holds the caption, or a list of captions")
    max_train_samples: Count | None = setting(None, "train on this many examples only")
    cache_dir: str | None = setting(None, "folder for downloaded and embedded models and data")
    resolution: int = setting(512, "side of the training pictures, in pixels", ge=16, multiple_of=8)
    center_crop: Flag = setting(False, "crop the centre; otherwise a random place")
    random_flip: Flag = setting(False, "mirror every other picture, at random")
    dataloader_num_workers: int = setting(0, "processes that load data, per rank; 0: the rank itself", ge=0)

    # Training
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = setting(None, "seed of everything random in the training")
    train_batch_size: Count = setting(16, "pictures in a micro-batch, per rank")
    gradient_accumulation_steps: Count = setting(1, "micro-batches in an optimizer step")
    max_train_steps: Count | None = setting(None, "optimizer steps; overrides num_train_epochs")
    num_train_epochs: Count = setting(100, "passes over the data")
    learning_rate: Real = setting(1e-4, "initial learning rate, after the warm-up", ge=0)
    scale_lr: Flag = setting(False, "multiply the learning rate by the global batch")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = setting("constant", "schedule of the learning rate")
    lr_warmup_steps: int = setting(500, "optimizer steps in which the learning rate rises", ge=0)
    adam_beta1: Real = setting(0.9, "Adam's first decay", ge=0, lt=1)
    adam_beta2: Real = setting(0.999, "Adam's second decay", ge=0, lt=1)
    adam_weight_decay: Real = setting(1e-2, "weight decay", ge=0)
    adam_epsilon: Real = setting(1e-8, "Adam's epsilon", gt=0)
    max_grad_norm: Real = setting(1.0, "gradients are clipped to this norm", gt=0)
    use_ema: Flag = setting(False, "keep an exponential moving average of the weights, and save that")
    gradient_checkpointing: Flag = setting(False, "recompute activations: less memory, more time")
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, BeforeValidator(_precision_from_flag)] = setting(
        None, "left out: fp16 on a GPU, no on a CPU"
    )
    allow_tf32: Flag = setting(False, "TF32 matrix products on NVIDIA GPUs since Ampere")

    # Loss
    snr_gamma: Real | None = setting(None, "min-SNR weighting of the loss (arXiv 2303.09556); 5 is recommended", gt=0)
    noise_offset: Real = setting(0.0, "scale of the noise offset", ge=0)
    input_perturbation: Real = setting(0.0, "scale of the input perturbation; 0.1 is recommended", ge=0)

    # Output
    output_dir: str | None = setting(None, "the run folder; left out, a new one under runs/")
    validation_prompts: Texts | None = setting(None, "prompts that are drawn before and after the training")
    report_to: Literal["tensorboard", "none"] = setting("tensorboard", "where the loss is logged besides metrics.jsonl")
    logging_dir: str = setting("logs", "the tracker's folder in the run folder")
    tracker_project_name: str = setting("text2image-fine-tune", "project name for the tracker")

    # What the reference does not have
    num_processes: Count | None = setting(None, "ranks; left out, one per GPU, or one")
    validation_loss_steps: int = setting(0, "measure the loss on held-out pictures every so many steps; 0: never", ge=0)
    target_loss: Real | None = setting(None, "the loss that the training is to end under", gt=0)

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
                "no data: give dataset_name (a hub id, a folder, or the embedded openmoji) "
                "or train_data_dir (a folder of images with a metadata.jsonl)"
            )
        if self.dataset_name == "openmoji" and self.train_data_dir is not None:
            raise ValueError("dataset_name = openmoji and train_data_dir exclude each other: set one of them to None")
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
    def from_notebook(cls, namespace: Mapping[str, Any]) -> TrainConfig:
        """Settings from a notebook's variables: those with a setting's name, and every name that a parameter cell
        assigns, so that one which is no setting is an error. A parameter cell opens with the comment `# Parameters`,
        as the one that papermill injects does; other variables of the notebook are its own business.

        Args:
            namespace: the notebook's `globals()`. IPython keeps the cells' sources in its `In`.
        """
        settings = {name: namespace[name] for name in [*cls.model_fields, "steps"] if name in namespace}
        for names in _parameter_cells(namespace.get("In", ())):
            for choice in ONE_CHOICE:
                if choice & names:
                    for name in choice - names:
                        settings.pop(name, None)
            settings.update({name: namespace[name] for name in names if name in namespace})
        return cls(**settings)

    def save(self, path: str | Path) -> None:
        """Write the settings as YAML, from which `from_yaml` makes an equal TrainConfig."""
        Path(path).write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def updated(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})

    def resolved(self, device_type: str, device_count: int, bf16: bool = True) -> TrainConfig:
        """A copy in which `mixed_precision` and `num_processes` are set for a machine.

        Args:
            device_type: torch's name, `cuda` or `cpu`.
            device_count: GPUs that are visible; of no meaning on a CPU.
            bf16: whether the device computes in bfloat16.

        Raises:
            ConfigError: if the machine cannot do what is asked for.
        """
        on_gpu = device_type != "cpu"
        precision = self.mixed_precision or ("fp16" if on_gpu else "no")
        ranks = self.num_processes or (device_count if on_gpu else 1)
        if precision == "fp16" and not on_gpu:
            raise ConfigError("mixed_precision = fp16 needs a GPU, and this machine shows none: use no, or bf16")
        if precision == "bf16" and not bf16:
            raise ConfigError("mixed_precision = bf16: this GPU does not compute in bfloat16: use fp16, or no")
        if on_gpu and ranks > device_count:
            raise ConfigError(
                f"num_processes = {ranks}, but this machine shows {device_count} GPUs: use {device_count}"
            )
        return self.updated(mixed_precision=precision, num_processes=ranks)

    @property
    def global_batch(self) -> int:
        """Pictures in a full optimizer step, all ranks together. Needs `num_processes` to be resolved."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_processes

    def micro_batches_per_epoch(self, examples: int) -> int:
        """A rank's micro-batches in one epoch: accelerate fills the last round, so that every rank has as many."""
        return math.ceil(math.ceil(examples / self.train_batch_size) / self.num_processes)

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps in one epoch. The epoch's end ends the accumulation, so the last step may be a short one."""
        return math.ceil(self.micro_batches_per_epoch(examples) / self.gradient_accumulation_steps)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole training."""
        return self.max_train_steps or self.num_train_epochs * self.steps_per_epoch(examples)


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
            lines.append(f"{shown} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}")
    return "\n".join(dict.fromkeys(lines))
