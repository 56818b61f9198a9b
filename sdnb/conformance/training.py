"""Trains a few steps in several ways, and compares: with the host, with a resumed run, in half precision."""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from sdnb.auditing.case import UNKNOWN, Finding, judged
from sdnb.launch.plan import prepare
from sdnb.machine.device import ran_out_of_memory
from sdnb.machine.device_kind import HOST, DeviceKind
from sdnb.machine.peaks import peak_tflops
from sdnb.models.flops import flop_per_image
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig
from sdnb.training.checkpoint_folder import Checkpoint, manifest_of
from sdnb.training.checkpoints import Checkpoints, load
from sdnb.training.loop import NoisyBatch, add_noise, train_step
from sdnb.training.setup import Training, build, start

STEPS, FEW, TWICE = 10, 5, 2  # of a comparison with the host; in half precision; of two ways on the device
SETTINGS: dict[str, Any] = dict(
    pretrained_model_name_or_path="tiny", dataset_name="openmoji-night", resolution=64, center_crop=True,
    random_flip=True, max_train_steps=STEPS, train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-4,
    lr_scheduler="linear", lr_warmup_steps=0, use_ema=True, seed=1, encoder_cache_gib=0.0, fold_micro_batches=1,
    mixed_precision="no", num_processes=1, device_isolation="ignore",
)  # fmt: skip
# How far a loss, and the norm of the gradients, may be from the host's float32, relative.
_LOSS = {"no": 1e-3, "fp16": 1e-2, "bf16": 3e-2}
_NORM = {"no": 1e-2, "fp16": 5e-2, "bf16": 0.1}
_SAME_DEVICE = 1e-3  # two ways of the same training on one device, which may use other kernels
_FIRST_SCALE, _BACKOFF = 2.0**40, 2.0**-6  # so large that gradients overflow, and again after the first reductions


class Trials:
    """Short trainings on one device, each in a folder of its own under `scratch`."""

    def __init__(self, scratch: Path, kind: DeviceKind, name: str) -> None:
        self.scratch, self.kind, self.name = scratch, kind, name
        self.exits = ExitStack()
        self.plan = prepare(TrainConfig(**SETTINGS, output_dir=str(scratch / "trial")))
        logging.getLogger("sdnb").propagate = False
        kind.compute_float32_exactly()

    def begin(self, **changes: Any) -> Training:
        """A training before its first step. It replaces the one before."""
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = self.scratch / f"trial-{len([*self.scratch.iterdir()])}"
        config = self.plan.config.updated(output_dir=str(folder), **changes)
        _, held = run_folder.begin(config, self.plan.environment)
        self.exits.enter_context(held)
        training = build(config, start(config), self.plan.examples)
        training.checkpoints = Checkpoints(training)
        return training

    def host(self) -> dict[str, Any]:
        """What `on_host` has kept."""
        return torch.load(self.scratch / "host.pt", map_location=HOST, weights_only=True)

    def prepared(self, training: Training) -> Callable[[Training, dict[str, Any]], NoisyBatch]:
        """In place of `add_noise`: the micro-batches of the host, one after the other."""
        batches = iter(self.host()["batches"])
        return lambda training, batch: tuple(values.to(training.accelerator.device) for values in next(batches))


def steps(training: Training, count: int, noisy: Callable[..., NoisyBatch] = add_noise) -> list[dict[str, Any]]:
    """The records of the next steps."""
    training.clock.restart()
    training.stats.restart()
    return [train_step(training, noisy) for _ in range(count)]


def on_host(trials: Trials) -> Finding:
    """Train on the host, and keep the micro-batches and the records for the device."""
    training, batches, encoded = trials.begin(), list[NoisyBatch](), list[Tensor]()

    def keep(training: Training, batch: dict[str, Any]) -> NoisyBatch:
        if not encoded:
            encoded.extend(training.encoders(batch))
        batches.append(add_noise(training, batch))
        return batches[-1]

    records = steps(training, STEPS, keep)
    kept = [{name: record[name] for name in ("loss", "grad_norm", "lr")} for record in records]
    torch.save(dict(batches=batches, encoded=encoded, records=kept), trials.scratch / "host.pt")
    wrong = [] if all(math.isfinite(record["loss"]) for record in records) else ["a loss is not finite"]
    return judged("training on the host", wrong, f"{STEPS} steps, loss {records[0]['loss']:.4f} at first")


def parity(trials: Trials) -> Finding:
    """The same micro-batches give the host's losses, norms and learning rates."""
    training, host = trials.begin(), trials.host()
    batch, _ = next(training.batches.of_a_step())
    encoded = max(_difference(here.cpu(), there) for here, there in zip(training.encoders(batch), host["encoded"]))
    wrong = [f"the encoders differ by {encoded:.1e}"] if not encoded <= _NORM["no"] else []
    records = steps(training, STEPS, trials.prepared(training))
    wrong += _unlike(records, host["records"], "no")
    right = f"largest relative differences in {STEPS} steps: {_said(records, host['records'])}, encoders {encoded:.1e}"
    return judged("parity with the host", wrong, right)


def resume(trials: Trials) -> Finding:
    """A run that is saved and loaded goes on as if it had not been interrupted."""
    training = trials.begin()
    steps(training, TWICE)
    training.checkpoints.save(TWICE)
    source = training.folder / f"checkpoint-{TWICE}"
    expected = steps(training, TWICE)
    again = trials.begin()
    if problem := load(again, Checkpoint(source, TWICE, manifest_of(source))):
        return judged("resume", [problem], "")
    again.step = TWICE
    resumed = steps(again, TWICE)
    differs = max(_largest(resumed, expected, name) for name in ("loss", "grad_norm"))
    wrong = [] if differs <= _LOSS["no"] else [f"the steps after a resume differ by {differs:.1e}"]
    same = "the same to the bit" if differs == 0 else f"the same to {differs:.1e}: some kernels add up in any order"
    return judged("resume", wrong, f"{TWICE} steps after a checkpoint are {same}")


def ways(trials: Trials) -> Finding:
    """With kept encodings and folded micro-batches the losses are those of the plain way."""
    plain = steps(trials.begin(), TWICE)
    quick = steps(
        trials.begin(encoder_cache_gib=1.0, fold_micro_batches=2, cache_dir=str(trials.scratch / "cache")), TWICE
    )
    loss, norm = (_largest(quick, plain, name) for name in ("loss", "grad_norm"))
    said = f"{TWICE} steps differ from the plain way: loss {loss:.1e}, norm of the gradients {norm:.1e}"
    return judged("kept and folded", [] if loss <= _SAME_DEVICE and norm <= _NORM["no"] else [said], said)


def overflow(trials: Trials) -> Finding:
    """In float16 a step whose gradients overflow changes no weight and no learning rate, and halves the scale of the
    loss, as accelerate and the reference do; the average counts the step. Later steps are as in float32."""
    if not trials.kind.fp16:
        return Finding("fp16 with overflow", UNKNOWN, f"{trials.name} does not offer float16")
    training = trials.begin(mixed_precision="fp16")
    scaler, noisy, host = training.accelerator.scaler, trials.prepared(training), trials.host()["records"]
    scaler.load_state_dict({**scaler.state_dict(), "scale": _FIRST_SCALE, "backoff_factor": _BACKOFF})
    wrong, taken, skipped, rates = list[str](), list[int](), 0, list[float]()
    for step in range(1, STEPS + 1):
        if len(taken) == 3:
            break
        before, scale, average = _checksum(training), scaler.get_scale(), training.ema.optimization_step
        (record,) = steps(training, 1, noisy)
        rates.append(record["lr"])
        if math.isfinite(record["grad_norm"]):
            taken.append(step)
            if _checksum(training) == before:
                wrong.append(f"step {step} changed no weight")
            continue
        skipped += 1
        if _checksum(training) != before:
            wrong.append(f"step {step} overflowed, and changed the weights")
        if not scaler.get_scale() < scale:
            wrong.append(f"step {step} overflowed, and the scale of the loss stayed {scale:.3g}")
        if training.schedule.get_last_lr()[0] != record["lr"]:
            wrong.append(f"step {step} overflowed, and changed the learning rate")
        if training.ema.optimization_step != average + 1:
            wrong.append(f"step {step} overflowed, and the average did not count it")
    if not skipped or len(taken) < 3:
        wrong.append(f"{skipped} steps were skipped and {len(taken)} taken, with a loss scaled by {_FIRST_SCALE:.3g}")
    if not wrong and rates[-1] != host[len(taken) - 1]["lr"]:
        wrong.append(f"after {len(taken)} taken steps the learning rate is not that of step {len(taken)}")
    right = f"{skipped} steps overflowed and were skipped, {len(taken)} were taken"
    return judged("fp16 with overflow", wrong[:3], f"{right}; weights, learning rate and average agree")


def half_precision(trials: Trials, precision: str) -> Finding:
    """The losses are near the host's in float32."""
    check = f"training in {precision}"
    if not getattr(trials.kind, precision):
        return Finding(check, UNKNOWN, f"{trials.name} does not offer it")
    training, host = trials.begin(mixed_precision=precision), trials.host()["records"]
    if precision == "fp16":  # no step is to be skipped
        scaler = training.accelerator.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**10})
    records = steps(training, FEW, trials.prepared(training))
    right = f"largest relative differences in {FEW} steps from float32 on the host: {_said(records, host)}"
    return judged(check, _unlike(records, host, precision), right)


def compiled(trials: Trials) -> Finding:
    """Compiled blocks give the losses of the plain ones."""
    training, host = trials.begin(compile_unet="blocks"), trials.host()["records"]
    try:
        records = steps(training, TWICE, trials.prepared(training))
    except Exception as error:  # a compiler raises many types
        if ran_out_of_memory(error):
            raise
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        return Finding("compile", UNKNOWN, f"torch.compile does not work for this kind of device: {first[:200]}")
    wrong = _unlike(records, host[:TWICE], "no")
    return judged(
        "compile", wrong, f"{TWICE} steps differ by {_largest(records, host[:TWICE], 'loss'):.1e} from the host's"
    )


def utilisation(trials: Trials) -> Finding:
    """The floating-point operations of the steps need less than the peak."""
    precision = trials.kind.default_precision
    if (peak := peak_tflops(trials.name, precision)) is None:
        return Finding("MFU", UNKNOWN, f"the peak of {trials.name} is unknown")
    training = trials.begin(mixed_precision=precision)
    records = steps(training, 1 + TWICE)[1:]
    images, seconds = (sum(record[name] for record in records) for name in ("images", "seconds"))
    flop = flop_per_image(training.parts, training.config.resolution)["unet_training"]
    share = flop * images / seconds / peak / 1e12
    said = f"{share:.2%} of the peak, with a model that is far too small to use it"
    return judged("MFU", [] if 0 < share < 1 else [said], said)


def _unlike(records: list[dict[str, Any]], host: list[dict[str, Any]], precision: str) -> list[str]:
    wrong = []
    for name, allowed in (("loss", _LOSS), ("grad_norm", _NORM)):
        if not (found := _largest(records, host, name)) <= allowed[precision]:
            wrong.append(f"{name} differs by {found:.1e}, and {allowed[precision]:g} is allowed")
    if any(here["lr"] != there["lr"] for here, there in zip(records, host)):
        wrong.append("the learning rates differ")
    return wrong


def _largest(records: list[dict[str, Any]], others: list[dict[str, Any]], name: str) -> float:
    """The largest relative difference; infinite if a value is not finite."""
    differ = [abs(one[name] / other[name] - 1) for one, other in zip(records, others)]
    return max((value if math.isfinite(value) else math.inf) for value in differ)


def _said(records: list[dict[str, Any]], host: list[dict[str, Any]]) -> str:
    loss, norm = (_largest(records, host, name) for name in ("loss", "grad_norm"))
    return f"loss {loss:.1e}, norm of the gradients {norm:.1e}"


def _difference(here: Tensor, there: Tensor) -> float:
    return ((here.double() - there.double()).abs().max() / there.double().abs().max()).item()


def _checksum(training: Training) -> list[float]:
    sums = torch.stack([parameter.detach().abs().sum() for parameter in training.trained])
    return sums.to(HOST).tolist()


CHECKS: dict[str, Callable[[Trials], Finding]] = {
    "training on the host": on_host,
    "parity with the host": parity, "resume": resume, "kept and folded": ways, "fp16 with overflow": overflow,
    "training in fp16": lambda trials: half_precision(trials, "fp16"),
    "training in bf16": lambda trials: half_precision(trials, "bf16"), "compile": compiled, "MFU": utilisation,
}  # fmt: skip
