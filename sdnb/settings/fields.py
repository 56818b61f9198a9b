"""All settings, in the groups that `--help` shows. Names, defaults and meaning are those of diffusers'
`train_text_to_image.py`. A description says where a setting is not in that script."""

import ast
import textwrap
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic._internal._model_construction import ModelMetaclass

EMBEDDED_DATA = ("openmoji", "openmoji-night")  # see data/openmoji.py


def _number_from_text(value: Any) -> Any:
    # YAML 1.1 reads 1e-5 (no dot) as text.
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def flag_from_text(value: Any) -> Any:
    # `papermill -p center_crop true` passes the text "true"; only True and False arrive as booleans.
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _no_from_flag(value: Any) -> Any:
    # `no` is a boolean in YAML 1.1.
    return "no" if value is False else value


def _percent(value: Any) -> Any:
    return value.strip().removesuffix("%") if isinstance(value, str) else value


def _tracker(value: Any) -> Any:
    return "comet_ml" if value == "comet" else value


def several(value: Any) -> Any:
    """The texts of a notebook's parameter: of a list, of a list as `papermill -p` gives it (the text '["a", "b"]'), or
    of one text. Anything else as it is."""
    if isinstance(value, str):
        listed: Any = None
        if value.lstrip().startswith("["):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # a text that begins with a bracket
                listed = ast.literal_eval(value.strip())
        texts = isinstance(listed, list) and all(isinstance(one, str) for one in listed)
        return tuple(listed) if texts else (value,)
    return tuple(value) if isinstance(value, list) else value


Flag = Annotated[bool, BeforeValidator(flag_from_text)]
Real = Annotated[float, BeforeValidator(_number_from_text), Field(allow_inf_nan=False, ge=-1e30, le=1e30)]
Count = Annotated[int, Field(ge=1, le=10**9)]
BatchSize = Annotated[int, Field(ge=1, le=2**16)]
Texts = Annotated[tuple[str, ...], BeforeValidator(several)]


def setting(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class _Listed(ModelMetaclass):
    """`help()` of the settings lists them, and not the methods that they have from pydantic."""

    def __dir__(cls) -> list[str]:
        return [name for name in super().__dir__() if not (name.startswith("_") or hasattr(BaseModel, name))]


class Settings(BaseModel, metaclass=_Listed):
    """A group of settings. Where `affects_result` is true, another value gives other losses or other weights, so a
    checkpoint does not resume with it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    affects_result: ClassVar[bool] = False


# fmt: off
class ModelSettings(Settings):
    affects_result = True

    pretrained_model_name_or_path: str = setting(
        ..., "hub id, folder, or an embedded model: tiny, tiny-random, sd-v1-4-random, sd-v2-1-random")
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    variant: str | None = setting(None, "weights variant, such as fp16, of the VAE, the text encoder and the EMA")
    non_ema_revision: str | None = setting(None, "revision of the UNet to train; default: revision")
    prediction_type: Literal["epsilon", "v_prediction"] | None = setting(
        None, "what the UNet predicts; default: as the model's scheduler says")
    gradient_checkpointing: Flag = setting(False, "recompute activations: less memory, more time")
    enable_xformers_memory_efficient_attention: Flag = setting(False, "attention by the package xformers")


class LoraSettings(Settings):
    """Those of diffusers' `train_text_to_image_lora.py` only."""

    affects_result = True

    lora: Flag = setting(
        False, "train an adapter (LoRA) of the frozen UNet, like train_text_to_image_lora.py, and with its defaults")
    rank: Annotated[int, Field(ge=1, le=2**12)] = setting(4, "rank of the adapter's matrices")


class DataSettings(Settings):
    affects_result = True

    dataset_name: str | None = setting(
        None, "hub id, folder, or .parquet or .tar file of a data set, or a pattern such as train-{000..099}.tar; or "
        f"an embedded one: {', '.join(EMBEDDED_DATA)}")
    dataset_config_name: str | None = setting(None, "configuration of the data set")
    train_data_dir: str | None = setting(
        None, "folder of images with a metadata.jsonl; sub-folders train and validation are splits")
    image_column: str = setting("image", "column with the image")
    caption_column: str = setting("text", "column with the caption, or a list of captions")
    max_train_samples: Count | None = setting(None, "train on this many examples only")
    streaming: Flag = setting(
        False, "read the data set while training on it, as datasets.load_dataset does, for one that is larger than the "
        "disk (not in the reference)")
    shuffle_buffer: Count = setting(
        1000, "shuffle a stream in a buffer of this many examples (not in the reference)")
    resolution: int = setting(512, "side of the training images, in pixels", ge=16, le=8192, multiple_of=8)
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = setting("bilinear", "how images are resized")
    center_crop: Flag = setting(False, "crop the centre of each image; default: a random place")
    random_flip: Flag = setting(False, "mirror images at random, half of them")
    dataloader_num_workers: int = setting(0, "processes per rank that load data; 0: the rank loads them itself", ge=0)


class TrainingSettings(Settings):
    affects_result = True

    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = setting(None, "seed of all random numbers")
    train_batch_size: BatchSize = setting(16, "images in a micro-batch, per rank")
    gradient_accumulation_steps: BatchSize = setting(1, "micro-batches in an optimizer step")
    max_train_steps: Count | None = setting(None, "optimizer steps; overrides num_train_epochs")
    num_train_epochs: Count = setting(100, "passes over the data")
    learning_rate: Real = setting(1e-4, "learning rate after the warm-up", ge=0)
    scale_lr: Flag = setting(False, "multiply the learning rate by the global batch")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = setting("constant", "schedule of the learning rate")
    lr_warmup_steps: int = setting(500, "optimizer steps in which the learning rate rises", ge=0)
    use_8bit_adam: Flag = setting(False, "8-bit Adam of the package bitsandbytes")
    adam_beta1: Real = setting(0.9, "Adam's beta1", ge=0, lt=1)
    adam_beta2: Real = setting(0.999, "Adam's beta2", ge=0, lt=1)
    adam_weight_decay: Real = setting(1e-2, "weight decay", ge=0)
    adam_epsilon: Real = setting(1e-8, "Adam's epsilon", gt=0)
    max_grad_norm: Real = setting(1.0, "clip gradients to this norm", gt=0)
    use_ema: Flag = setting(False, "keep an exponential moving average (EMA) of the UNet's weights, and save the EMA")
    offload_ema: Flag = setting(False, "keep the EMA in host memory between steps")
    foreach_ema: Flag = setting(False, "update the EMA with torch's foreach operations")
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, BeforeValidator(_no_from_flag)] = setting(
        None, "default: as accelerate launch was told; from a notebook fp16 on a GPU, no on a CPU")
    allow_tf32: Flag = setting(False, "use TF32 for matrix products on NVIDIA GPUs since Ampere")
    whole_steps: Flag = setting(
        False, "make every optimizer step a full one: accumulation continues over the end of an epoch, and images that "
        "do not fill a last micro-batch are skipped in that epoch (not in the reference)")


class SpeedSettings(Settings):
    """The same training in less time. None of it is in the reference."""

    encoder_cache_gib: Real = setting(
        10.0, "size limit, in GiB, of the on-disk cache of VAE and text-encoder outputs. If everything fits, each "
        "image, its mirror image and each caption is encoded once and reused by later runs. 0 turns the cache off; a "
        "random crop does too", ge=0)
    fold_micro_batches: Count | None = setting(
        None, "run this many micro-batches as one batch. 1 disables it; default: as many as fit in memory, in fp16 1")
    memory_gib: Real | None = setting(
        None, "memory in GiB that a rank may use; a run that needs more is refused. Default: what is free", gt=0)
    fused_optimizer: Flag = setting(True, "update the weights in one pass over memory, and the EMA in another")
    without_xformers: Flag = setting(
        False, "where xformers is not installed, do what enable_xformers_memory_efficient_attention asks for with "
        "torch's own attention, which contains its kernel")
    compile_unet: Annotated[Literal["no", "blocks", "whole"], BeforeValidator(_no_from_flag)] = setting(
        "no", "torch.compile of the UNet's transformer blocks, or of the whole UNet")


class LossSettings(Settings):
    affects_result = True

    snr_gamma: Real | None = setting(None, "min-SNR weighting of the loss (arXiv 2303.09556); 5 is recommended", gt=0)
    noise_offset: Real = setting(0.0, "scale of the noise offset", ge=0)
    input_perturbation: Real = setting(0.0, "scale of the input perturbation; 0.1 is recommended", ge=0)
    dream_training: Flag = setting(False, "DREAM (arXiv 2312.00210): one more forward pass for a better target")
    dream_detail_preservation: Real = setting(1.0, "DREAM's exponent p", gt=0)


class CheckpointSettings(Settings):
    checkpointing_steps: Count = setting(500, "save a checkpoint after every so many steps")
    checkpoints_total_limit: Count | None = setting(None, "keep at most this many checkpoints, the newest ones")
    resume_from_checkpoint: str | None = setting(
        None, "resume from a checkpoint in output_dir: its name, such as checkpoint-500, or latest")
    resume_with_changes: Flag = setting(
        False, "resume even if settings that affect the result have changed (not in the reference)")


class ValidationSettings(Settings):
    validation_prompts: Texts | None = setting(None, "prompts to draw before, during and after the training")
    num_validation_images: Annotated[int, Field(ge=1, le=1000)] = setting(
        1, "images to draw of each prompt, from consecutive seeds; with lora 4 (a flag of train_text_to_image_lora.py)")
    validation_epochs: Count = setting(5, "draw them after every so many epochs; with lora 1")
    validation_guidance_scale: Real = setting(7.5, "guidance scale for drawing them (not in the reference)", ge=0)
    validation_loss_steps: int = setting(
        0, "measure the loss on held-out images every so many steps; 0: never (not in the reference)", ge=0)
    device_peak_tflops: Real | None = setting(
        None, "peak TFLOP/s of the device, for MFU; default: from its data sheet (not in the reference)", gt=0)
    repeats: Count = setting(
        1, "train so many times, one after the other, and report the spread between the runs (not in the reference)")
    until: Annotated[Real | None, BeforeValidator(_percent)] = setting(
        None, "repeat until the interval of the runs' mean is this narrow, in percent to each side; up to 20 times, or "
        "`repeats` times (not in the reference)", gt=0)
    device_isolation: Literal["warn", "error", "ignore"] = setting(
        "warn", "if other processes use the machine: say so, refuse to start, or do nothing (not in the reference)")
    target_loss: Real | None = setting(None, "report whether the final loss is below this (not in the reference)", gt=0)


class OutputSettings(Settings):
    output_dir: str | None = setting(
        "sd-model-finetuned", "the run folder; in a notebook, None makes a new one under runs/; with lora "
        "sd-model-finetuned-lora")
    cache_dir: str | None = setting(None, "folder for downloaded and embedded models and data")
    report_to: Annotated[Literal["tensorboard", "wandb", "comet_ml", "all", "none"], BeforeValidator(_tracker)] = (
        setting("tensorboard", "tracker that gets the loss and the drawn images; the run folder has them in any case"))
    logging_dir: str = setting("logs", "TensorBoard's folder in the run folder")
    tracker_project_name: str = setting("text2image-fine-tune", "project name for the tracker")


class HubSettings(Settings):
    push_to_hub: Flag = setting(False, "upload the trained pipeline, with a model card")
    hub_model_id: str | None = setting(None, "repository to upload to; default: the run folder's name")
    hub_token: SecretStr | None = setting(
        None, "token for the upload, stored nowhere; HF_TOKEN or `hf auth login` are safer")


class RankSettings(Settings):
    num_processes: Count | None = setting(
        None, "ranks on all machines together; default: one per GPU, or one; accelerate launch sets its own")
    num_machines: Count = setting(1, "machines that train together, when launched from a notebook")
    machine_rank: int = setting(0, "number of this machine, from 0; machine 0 writes the run folder", ge=0)
    main_process_ip: str | None = setting(None, "address of machine 0")
    main_process_port: Annotated[int, Field(ge=1, lt=2**16)] | None = setting(
        None, "port on machine 0; default: 29500, or any free port on a single machine")
    local_rank: int = setting(-1, "accepted and ignored: the launcher sets it in the environment")


GROUPS: tuple[type[Settings], ...] = (
    ModelSettings, LoraSettings, DataSettings, TrainingSettings, SpeedSettings, LossSettings, CheckpointSettings,
    ValidationSettings, OutputSettings, HubSettings, RankSettings,
)
# fmt: on


def other_defaults(lora: Any) -> dict[str, Any]:
    """The defaults of `train_text_to_image_lora.py` that are others than those above, if `lora` is set."""
    if flag_from_text(lora) is not True:
        return {}
    return {"output_dir": "sd-model-finetuned-lora", "num_validation_images": 4, "validation_epochs": 1}


def listed() -> str:
    """All settings in their groups, with their defaults and meaning."""
    lines = []
    for group in GROUPS:
        lines.append(f"\n{group.__name__.removesuffix('Settings')}")
        for name, field in group.model_fields.items():
            default = "" if field.is_required() else f" = {field.default!r}"
            text = f"{name}{default}: {field.description}"
            lines += textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent=" " * 8)
    return "\n".join(lines)


# What names the model and the data. On another machine they may lie elsewhere: their digests tell whether they are the
# same.
IDENTIFIED_BY_DIGEST = frozenset({
    "pretrained_model_name_or_path", "revision", "variant", "non_ema_revision", "dataset_name", "dataset_config_name",
    "train_data_dir", "image_column", "caption_column",
})  # fmt: skip

# Settings of version 0.1 that are gone: they changed no result, so a run folder that has them can still be read.
RETIRED = frozenset({"onednn_linear", "keep_freed_memory", "channels_last", "cuda_graphs"})
