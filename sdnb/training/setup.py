"""Everything that a training step needs, made from the settings."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, utils
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.optimization import get_scheduler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from sdnb.compat import has_stances
from sdnb.data.loading import Splits, load_data
from sdnb.data.micro_batches import MicroBatches
from sdnb.data.stream import ImageStream
from sdnb.data.training_set import TrainingSet
from sdnb.errors import ConfigError, RunError
from sdnb.machine import onednn_linear
from sdnb.machine.device import WEIGHT_DTYPES
from sdnb.machine.device_kind import HOST, kind_here, kind_of
from sdnb.metrics.step_clock import StepClock
from sdnb.models.ema import EMA
from sdnb.models.encoders import Encoders
from sdnb.models.lora import add_adapter
from sdnb.models.pipeline import Parts, load_parts, start_of_ema
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.training.step_stats import StepStats
from sdnb.training.stopping import StopRequest, end_with_rank

logger = logging.getLogger("sdnb")


@dataclass
class Training:
    """What a step needs. `trained`: the UNet's weights, or those of its adapter. `step`: the number of the last one."""

    config: TrainConfig
    accelerator: Accelerator
    splits: Splits
    parts: Parts
    unet: torch.nn.Module
    trained: list[torch.nn.Parameter]
    optimizer: AcceleratedOptimizer
    schedule: AcceleratedScheduler
    ema: EMA | None
    encoders: Encoders
    batches: MicroBatches
    clock: StepClock
    stats: StepStats
    stop: StopRequest
    step: int = 0

    @property
    def folder(self) -> Path:
        return run_folder.path_of(self.config)

    @property
    def second_moment(self) -> float | None:
        """The sum of AdamW's averages of squared gradients, all weights together: what the optimizer was really given.
        None for an optimizer that keeps them in another form."""
        kept = [state.get("exp_avg_sq") for state in self.optimizer.state.values()]
        return sum(one.to(HOST).double().sum().item() for one in kept) if all(one is not None for one in kept) else None

    @property
    def total_steps(self) -> int:
        return self.config.total_steps(self.splits.train.count)


def start(config: TrainConfig) -> Accelerator:
    """Join the other ranks, log to the run folder, and seed all generators. Raises RunError if not all ranks joined."""
    accelerator = make_accelerator(config)
    handler = logging.FileHandler(run_folder.path_of(config) / run_folder.LOG)
    line = f"%(asctime)s rank {accelerator.process_index} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
    logger.handlers = [handler]  # replaces that of an earlier run in the same process
    logging.raiseExceptions = False  # on a full disk, tracebacks of the log would bury the error
    logger.setLevel(logging.INFO)
    # Two ranks that did not find each other both believe that they are alone, so they must count each other.
    counts = torch.tensor([1.0, accelerator.process_index], device=accelerator.device)
    joined, indices = map(int, accelerator.reduce(counts, reduction="sum").tolist())
    if not joined == accelerator.num_processes == config.num_processes:
        raise RunError(
            f"{config.num_processes} ranks were started, but {joined} joined "
            f"({accelerator.distributed_type.value}, world size {accelerator.num_processes})"
        )
    if indices != sum(range(joined)):
        raise RunError(f"the devices add up wrongly over ranks: 0 to {joined - 1} gave {indices}")
    if config.seed is not None:
        utils.set_seed(config.seed)
    return accelerator


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's Accelerator for this rank."""
    folder = run_folder.path_of(config)
    kind = kind_here()
    os.environ.update(kind.environment_for_accelerate())
    if config.allow_tf32:
        try:
            kind.use_tf32()
        except AttributeError:
            logger.warning("allow_tf32 has no effect: torch has no TF32 switch for %s devices", kind.type)
    patience = utils.InitProcessGroupKwargs(timeout=timedelta(hours=1))  # while one rank fills a cache, draws, or saves
    buckets = utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(
        # `MicroBatches` knows where a step ends.
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=1),
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        kwargs_handlers=[patience, buckets],
        project_config=utils.ProjectConfiguration(str(folder), str(folder / config.logging_dir)),
    )


def build(config: TrainConfig, accelerator: Accelerator, splits: Splits | None = None) -> Training:
    """Load the model, and the data if `splits` does not have it, and prepare both for this rank's device. Raises
    SdnbError if they cannot be used."""
    device = accelerator.device
    # One rank fills the caches first; on each machine, as a machine may have caches of its own.
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        logger.info("loading the model and the data")
        parts = load_parts(config)
        splits = splits or load_data(config)
        encoders = Encoders(parts, splits.train, config, device)
        fused = config.fused_optimizer or config.foreach_ema
        ema = EMA(start_of_ema(config, parts), config.offload_ema, fused) if config.use_ema else None
    configure(parts, config, device)
    trained = [parameter for parameter in parts.unet.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(config, device)(
        trained, lr=config.peak_learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay, eps=config.adam_epsilon,
    )  # fmt: skip
    schedule = schedule_of(config, optimizer, splits.train.count)
    unet, optimizer, schedule = accelerator.prepare(parts.unet, optimizer, schedule)
    # On a CPU, threads that load would take cores from the step. Worker processes load without threads.
    kind = kind_of(device.type)
    in_threads = not kind.is_host and not config.dataloader_num_workers
    threads = max(1, len(os.sched_getaffinity(0)) // config.ranks_here) if in_threads else 0
    examples = TrainingSet(splits.train, parts.tokenizer, encoders.moments, threads)
    rows = splits.train if isinstance(splits.train, ImageStream) else RandomSampler(examples)
    loader = DataLoader(
        examples, batch_sampler=BatchSampler(rows, config.train_batch_size, drop_last=config.whole_steps),
        collate_fn=examples.collate, num_workers=config.dataloader_num_workers, worker_init_fn=end_with_rank,
    )  # fmt: skip
    # The encoders move the batches to the device: accelerate would wait there for all pending work.
    loader = accelerator.prepare_data_loader(loader, device_placement=False)
    if ema is not None:
        ema.settle(device)
    stop = StopRequest(run_folder.path_of(config) / run_folder.FAILURE if config.ranks > 1 else None)
    return Training(
        config, accelerator, splits, parts, unet, trained, optimizer, schedule, ema, encoders,
        batches=MicroBatches(loader, config.gradient_accumulation_steps, config.whole_steps, kind),
        clock=StepClock(kind),
        stats=StepStats(accelerator, config.gradient_accumulation_steps, encoders, stop),
        stop=stop,
    )  # fmt: skip


def schedule_of(config: TrainConfig, optimizer: torch.optim.Optimizer, examples: int | None) -> LambdaLR:
    """The schedule of the learning rate, which accelerate advances once per rank in each step."""
    return get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps * config.ranks,
        num_training_steps=config.schedule_steps(examples) * config.ranks,
    )  # fmt: skip


def configure(parts: Parts, config: TrainConfig, device: torch.device) -> None:
    """Make the parts compute as the settings say. Raises ConfigError if they cannot."""
    scheduler, unet = parts.noise_scheduler, parts.unet
    if config.prediction_type is not None:
        scheduler.register_to_config(prediction_type=config.prediction_type)
    predicts = scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise ConfigError(f"prediction_type: the model's scheduler says {predicts}: set it to epsilon, or v_prediction")
    if config.dream_training and predicts != "epsilon":
        raise ConfigError("dream_training is defined for models that predict the noise; this one predicts a velocity")
    if config.lora:
        add_adapter(unet.to(device, WEIGHT_DTYPES[config.mixed_precision or "no"]), config.rank)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention and find_spec("xformers") is None:
        logger.info("xformers is not installed: torch's own attention runs in its place")
    elif config.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(f"enable_xformers_memory_efficient_attention: {error}") from error
    if onednn_linear.pays(device, WEIGHT_DTYPES[config.mixed_precision or "no"]):
        onednn_linear.convolve(unet)
    if config.compile_unet != "no":
        _compile(unet, config)


def optimizer_class(config: TrainConfig, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """The AdamW that the settings name, fused if torch has that for the device."""
    if config.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit
    if config.fused_optimizer and kind_of(device.type).has_fused_adam:
        return partial(torch.optim.AdamW, fused=True)
    return torch.optim.AdamW


def _compile(unet: UNet2DConditionModel, config: TrainConfig) -> None:
    torch._dynamo.config.cache_size_limit = 64  # blocks of one kind have different shapes
    # Under DDP, torch cuts a compiled module at the gradient buckets, so that their reduction starts before the
    # backward pass ends. Blocks are small enough already: a large one of SD v1-4 became four graphs. And torch 2.1
    # cannot cut a checkpointed module.
    torch._dynamo.config.optimize_ddp = config.compile_unet == "whole" and not config.gradient_checkpointing
    set_stance(config, "default")
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for module in blocks if config.compile_unet == "blocks" else [unet]:
        module.compile(dynamic=False)


def set_stance(config: TrainConfig, stance: str) -> None:
    """When the UNet runs compiled, if it is to be compiled and torch can be told: see `torch.compiler.set_stance`."""
    if config.compile_unet != "no" and has_stances():
        torch.compiler.set_stance(stance)


def settle_buckets(training: Training) -> None:
    """Let DDP arrange its gradient buckets before the first step after a checkpoint. It does so after the first
    backward pass, in the order in which the gradients came. The place in a bucket decides in which order more than two
    ranks add up a gradient. So the last digits of the first step would not be those of an uninterrupted run."""
    unet, device = training.unet, training.accelerator.device
    if isinstance(unet, DistributedDataParallel):
        latents = torch.zeros(1, unet.module.config.in_channels, 8, 8, device=device)
        hidden_states = torch.zeros(1, 1, training.parts.text_encoder.config.hidden_size, device=device)
        set_stance(training.config, "force_eager")  # no step has this size
        unet(latents, torch.zeros(1, device=device), hidden_states, return_dict=False)[0].sum().backward()
        unet.zero_grad()
        set_stance(training.config, "default")
