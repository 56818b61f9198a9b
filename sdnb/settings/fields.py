"""Every setting of a training, in the groups that `--help` shows. Names, defaults and meaning are those of diffusers'
`train_text_to_image.py`; what that script does not have is said to be so."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

# OpenMoji as it is, by night, and with several captions a picture; the module of that name tells of them.
EMBEDDED_DATA = ("openmoji", "openmoji-night", "openmoji-pretraining")


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


def _no_from_flag(value: Any) -> Any:
    # `no` is a boolean in YAML 1.1.
    return "no" if value is False else value


def _tracker(value: Any) -> Any:
    return "comet_ml" if value == "comet" else value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Flag = Annotated[bool, BeforeValidator(_flag_from_text)]
Real = Annotated[float, BeforeValidator(_number_from_text), Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]


def setting(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class Group(BaseModel):
    """Some of the settings. Where `decides_trajectory`, another value makes another training of it: a checkpoint cannot
    be resumed with it as if nothing had happened."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    decides_trajectory: ClassVar[bool] = False


class Model(Group):
    decides_trajectory = True

    pretrained_model_name_or_path: str = setting(
        ..., "hub id, folder, or an embedded model: tiny, tiny-random, sd-v1-4-random"
    )
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    variant: str | None = setting(None, "weights variant, such as fp16, of the VAE, the text encoder and the average")
    non_ema_revision: str | None = setting(None, "revision that the UNet to train comes from; left out, revision")
    prediction_type: Literal["epsilon", "v_prediction"] | None = setting(
        None, "what the UNet predicts; left out, what the model's scheduler says"
    )
    gradient_checkpointing: Flag = setting(False, "recompute activations: less memory, more time")
    enable_xformers_memory_efficient_attention: Flag = setting(False, "attention by the package xformers")


class Data(Group):
    decides_trajectory = True

    dataset_name: str | None = setting(
        None, f"hub id or folder of a data set, or an embedded one: {', '.join(EMBEDDED_DATA)}"
    )
    dataset_config_name: str | None = setting(None, "configuration of the data set")
    train_data_dir: str | None = setting(None, "folder of images with a metadata.jsonl")
    image_column: str = setting("image", "column that holds the image")
    caption_column: str = setting("text", "column that holds the caption, or a list of captions")
    max_train_samples: Count | None = setting(None, "train on this many examples only")
    resolution: int = setting(512, "side of the training pictures, in pixels", ge=16, multiple_of=8)
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = setting("bilinear", "how pictures are resized")
    center_crop: Flag = setting(False, "crop the centre; otherwise a random place")
    random_flip: Flag = setting(False, "mirror every other picture, at random")
    dataloader_num_workers: int = setting(0, "processes that load data, per rank; 0: the rank itself", ge=0)


class Training(Group):
    decides_trajectory = True

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
    use_8bit_adam: Flag = setting(False, "8-bit Adam of the package bitsandbytes")
    adam_beta1: Real = setting(0.9, "Adam's first decay", ge=0, lt=1)
    adam_beta2: Real = setting(0.999, "Adam's second decay", ge=0, lt=1)
    adam_weight_decay: Real = setting(1e-2, "weight decay", ge=0)
    adam_epsilon: Real = setting(1e-8, "Adam's epsilon", gt=0)
    max_grad_norm: Real = setting(1.0, "gradients are clipped to this norm", gt=0)
    use_ema: Flag = setting(False, "keep an exponential moving average of the weights, and save that")
    offload_ema: Flag = setting(False, "keep the average in the host's memory between steps")
    foreach_ema: Flag = setting(False, "update the average with torch's foreach operations")
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, BeforeValidator(_no_from_flag)] = setting(
        None, "left out: what accelerate launch was told; from a notebook fp16 on a GPU, no on a CPU"
    )
    allow_tf32: Flag = setting(False, "TF32 matrix products on NVIDIA GPUs since Ampere")
    whole_steps: Flag = setting(
        False,
        "every optimizer step has all its pictures: accumulation runs on over the end of an epoch, and pictures that "
        "do not fill a last micro-batch wait for another epoch (not in the reference)",
    )


class Speed(Group):
    """The same training in less time; none of it is in the reference."""

    encoder_cache_gib: Real = setting(
        10.0,
        "keep what the VAE and the text encoder give for each picture and caption, in the cache folder, if all of it "
        "takes no more than so many GiB; 0: run them every time. Of no effect where the crop is random",
        ge=0,
    )
    fold_micro_batches: Count | None = setting(
        None,
        "run so many micro-batches of a step as one larger batch; 1: none; left out, the largest part of a step, all "
        "or a half or a third, that fits in most of the memory",
    )
    memory_gib: Real | None = setting(
        None, "memory that a rank may count on, in GiB, before it is refused; left out, what its device has free", gt=0
    )
    fused_optimizer: Flag = setting(True, "AdamW, and the average, each in one pass over the weights")
    onednn_linear: Flag = setting(
        True, "in float32 on an AVX-512 processor that is not Intel's, the UNet's linear layers by oneDNN, not by MKL"
    )
    keep_freed_memory: Flag = setting(
        True, "on a CPU, memory that tensors leave stays with the process, and need not be had anew in every step"
    )
    channels_last: Flag = setting(False, "keep the UNet's tensors with the channels last")
    compile_unet: Annotated[Literal["no", "blocks", "whole"], BeforeValidator(_no_from_flag)] = setting(
        "no", "torch.compile of the UNet's transformer blocks, or of all of it"
    )
    cuda_graphs: Flag = setting(
        False, "with compile_unet, and a step run as one batch: launch the kernels as CUDA graphs"
    )


class Loss(Group):
    decides_trajectory = True

    snr_gamma: Real | None = setting(None, "min-SNR weighting of the loss (arXiv 2303.09556); 5 is recommended", gt=0)
    noise_offset: Real = setting(0.0, "scale of the noise offset", ge=0)
    input_perturbation: Real = setting(0.0, "scale of the input perturbation; 0.1 is recommended", ge=0)
    dream_training: Flag = setting(False, "DREAM (arXiv 2312.00210): a further forward pass for a better target")
    dream_detail_preservation: Real = setting(1.0, "DREAM's exponent p", gt=0)


class Checkpoints(Group):
    checkpointing_steps: Count = setting(500, "keep the whole state of the training every so many steps")
    checkpoints_total_limit: Count | None = setting(None, "keep this many checkpoints, the newest")
    resume_from_checkpoint: str | None = setting(
        None, "go on from a checkpoint in output_dir: its name, such as checkpoint-500, or latest"
    )
    resume_with_changes: Flag = setting(
        False, "resume although settings differ that decide how the training goes (not in the reference)"
    )


class Validation(Group):
    validation_prompts: Texts | None = setting(None, "prompts that are drawn before, during and after the training")
    validation_epochs: Count = setting(5, "draw them at the end of every so many epochs")
    validation_guidance_scale: Real = setting(7.5, "how strongly prompts guide these (not in the reference)", ge=0)
    validation_loss_steps: int = setting(
        0, "measure the loss on held-out pictures every so many steps; 0: never (not in the reference)", ge=0
    )
    device_peak_tflops: Real | None = setting(
        None, "peak of the device in TFLOP/s, for MFU; left out, what is known of it (not in the reference)", gt=0
    )
    target_loss: Real | None = setting(None, "loss that the training is to end under (not in the reference)", gt=0)


class Output(Group):
    output_dir: str | None = setting("sd-model-finetuned", "the run folder; in a notebook, None: a new one under runs/")
    cache_dir: str | None = setting(None, "folder for downloaded and embedded models and data")
    report_to: Annotated[Literal["tensorboard", "wandb", "comet_ml", "all", "none"], BeforeValidator(_tracker)] = (
        setting("tensorboard", "tracker that the loss and the pictures go to, besides the run folder")
    )
    logging_dir: str = setting("logs", "TensorBoard's folder in the run folder")
    tracker_project_name: str = setting("text2image-fine-tune", "project name for the tracker")


class Hub(Group):
    push_to_hub: Flag = setting(False, "upload the trained pipeline, with a model card")
    hub_model_id: str | None = setting(None, "repository to upload to; left out, the run folder's name")
    hub_token: SecretStr | None = setting(
        None, "token for the upload; better: the variable HF_TOKEN, or the hub's own login. It is never written down"
    )


class Ranks(Group):
    num_processes: Count | None = setting(
        None, "ranks, on all machines together; left out, one per GPU, or one; under accelerate launch, its own"
    )
    num_machines: Count = setting(1, "machines that train together, when launched from a notebook")
    machine_rank: int = setting(0, "which of them this is; 0 keeps the run folder", ge=0)
    main_process_ip: str | None = setting(None, "address of machine 0")
    main_process_port: Annotated[int, Field(ge=1, lt=2**16)] | None = setting(
        None, "port on machine 0; left out, 29500, and with one machine any free one"
    )
    local_rank: int = setting(-1, "of no effect: the launcher's own variable says it")


GROUPS = (Model, Data, Training, Speed, Loss, Checkpoints, Validation, Output, Hub, Ranks)
