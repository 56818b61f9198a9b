"""Does sdnb train the same model as the reference? Runs both with the same settings, model and data. Compares the
`train_loss` of each optimizer step, and the weights at the end.

    python benchmarks/parity.py --reference PATH/train_text_to_image.py --python PATH/OF/AN/ENVIRONMENT/bin/python
    python benchmarks/parity.py --mixed_precision bf16 --reference …
    python benchmarks/parity.py --device cuda --mixed_precision fp16 --reference …
    python benchmarks/parity.py --mixed_precision fp16 --init_scale 4194304 --reference …

The reference is diffusers' `examples/text_to_image/train_text_to_image.py`, of tag v0.26.3 or later. The cases of LoRA
need `train_text_to_image_lora.py` beside it. Its environment needs torchvision, and for these cases peft.

On a GPU, only the cases with one rank run. The reference runs twice, because two runs of it can differ in the last bits
there. sdnb may differ from the reference by at most ten times as much as the reference differs from itself.

`--init_scale` runs both programs in float16 on the CPU, see float16.py. A scale of the loss that is too large makes the
gradients of the first steps overflow, so these steps are skipped. Both programs must skip the same steps and use the
same learning rates. Half precision rounds differently in other versions of torch, so run this program with `--python`.

`--flags` adds flags for sdnb. With `--flags="--encoder_cache_gib=0 --fold_micro_batches=1"`, for example, sdnb does the
same work as the reference. `--model small --record` writes the reference's losses to the folder where the tests read
them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import float16
from common import a_python, describe, file_of, variables, versions, write

STEPS = 24
# The largest allowed relative difference of a loss. In half precision it is one rounding: folded micro-batches are
# summed in another order.
TOLERANCE = {"no": 1e-4, "fp16": 2**-10, "bf16": 2**-7}
RECORDED_MODEL = "small"
_RECORDED = Path(__file__).resolve().parent.parent / "tests" / "data" / "parity"


@dataclass(frozen=True)
class Case:
    """A run to compare.

    Args:
        flags: in addition to model, data, folder and seed.
        later: True if v0.26.3 does not know one of the flags.
        changed: what later references do differently; sdnb does the same as v0.26.3.
    """

    flags: str
    data: str = "openmoji"
    ranks: int = 1
    later: bool = False
    changed: str = ""

    @property
    def lora(self) -> bool:
        return "--rank" in self.flags

    def script(self, reference: Path) -> Path:
        return reference.with_name("train_text_to_image_lora.py") if self.lora else reference

    def is_in(self, reference: Path) -> bool:
        """Whether the reference has the script and all flags of this case."""
        return self.script(reference).is_file() and (_is_later(reference) or not self.later)

    @property
    def arguments(self) -> list[str]:
        steps = [] if "--num_train_epochs" in self.flags else [f"--max_train_steps={STEPS}"]
        return [*self.flags.split(), *steps, "--resolution=64", "--seed=42"]


_CENTRED = "--center_crop --random_flip --train_batch_size=4 --learning_rate=1e-4 --lr_warmup_steps=0"
_LORA = f"{_CENTRED} --rank=4"
_ANYWHERE = "--random_flip --train_batch_size=2 --learning_rate=1e-4 --lr_warmup_steps=0"
CASES = {
    "one rank": Case(f"{_CENTRED} --gradient_accumulation_steps=2 --use_ema"),
    "two ranks": Case(f"{_CENTRED} --gradient_accumulation_steps=2 --use_ema", ranks=2),
    "pictures of many shapes, random crop, several captions": Case(_ANYWHERE, data="shapes"),
    "the same on two ranks, short epochs": Case(f"{_ANYWHERE} --gradient_accumulation_steps=4", data="shapes", ranks=2),
    "the same with two loading processes": Case(f"{_ANYWHERE} --dataloader_num_workers=2", data="shapes"),
    "epochs that end in a short step": Case(f"{_CENTRED} --gradient_accumulation_steps=4 --use_ema", data="shapes"),
    "min-SNR, noise offset, input perturbation": Case(
        f"{_CENTRED} --snr_gamma=5 --noise_offset=0.1 --input_perturbation=0.1"
    ),
    "velocity, cosine with warm-up, scaled learning rate": Case(
        "--center_crop --train_batch_size=4 --gradient_accumulation_steps=2 --prediction_type=v_prediction "
        "--lr_scheduler=cosine --lr_warmup_steps=5 --scale_lr --learning_rate=2e-5"
    ),
    "velocity with min-SNR on two ranks, polynomial": Case(
        "--random_flip --train_batch_size=2 --prediction_type=v_prediction --snr_gamma=3 --lr_scheduler=polynomial "
        "--lr_warmup_steps=3 --learning_rate=1e-4",
        data="shapes", ranks=2,
    ),
    "gradient checkpointing, other Adam, tight clipping": Case(
        f"{_CENTRED} --gradient_checkpointing --adam_beta1=0.8 --adam_beta2=0.95 --adam_weight_decay=0.1 "
        "--adam_epsilon=1e-6 --max_grad_norm=0.3"
    ),
    "some of the examples, restarts": Case(
        f"{_CENTRED} --max_train_samples=21 --lr_scheduler=cosine_with_restarts --gradient_accumulation_steps=2"
    ),
    "epochs on two ranks, linear": Case(
        "--center_crop --train_batch_size=2 --num_train_epochs=4 --gradient_accumulation_steps=2 --lr_scheduler=linear "
        "--lr_warmup_steps=2 --learning_rate=1e-4",
        data="shapes", ranks=2, changed="with num_train_epochs and several ranks, the schedule ends with the run "
        "(diffusers' pull request 8312). In v0.26.3 it has as many steps as one rank would take",
    ),
    "DREAM": Case(f"{_CENTRED} --dream_training --dream_detail_preservation=0.7", later=True),
    "DREAM with min-SNR on two ranks": Case(f"{_ANYWHERE} --dream_training --snr_gamma=5", ranks=2, later=True),
    "Lanczos interpolation, averaging by foreach": Case(
        f"{_ANYWHERE} --image_interpolation_mode=lanczos --use_ema --foreach_ema", data="shapes", later=True
    ),
    "LoRA": Case(f"{_LORA} --gradient_accumulation_steps=2"),
    "LoRA on two ranks": Case(f"{_LORA} --gradient_accumulation_steps=2", ranks=2),
    "LoRA of rank 16, min-SNR, noise offset, cosine": Case(
        f"{_CENTRED} --rank=16 --snr_gamma=5 --noise_offset=0.1 --lr_scheduler=cosine"
    ),
    "LoRA, norms above the limit, random crop, several captions": Case(
        f"{_ANYWHERE} --rank=4 --learning_rate=1e-2 --max_grad_norm=0.001 --gradient_accumulation_steps=4",
        data="shapes",
    ),
    "LoRA, velocity with min-SNR on two ranks, gradient checkpointing": Case(
        f"{_ANYWHERE} --rank=8 --prediction_type=v_prediction --snr_gamma=3 --gradient_checkpointing", data="shapes",
        ranks=2,
    ),
}  # fmt: skip


def make_model(name: str, folder: Path) -> None:
    """Write a model with random weights to a folder that the reference can read too."""
    from sdnb.models import embedded

    # Does not use the cache, because other versions of the libraries draw other weights.
    shutil.copytree(embedded.folder(name, str(folder.parent / "models")), folder)


def make_data(name: str, folder: Path) -> None:
    """Write a data set to a folder. `openmoji`: the embedded training images. `shapes`: 37 of them, wide, tall, small
    and large, each with two captions."""
    from PIL import Image

    from sdnb.data import openmoji

    source = openmoji.folder(64) / "train"
    if name == "openmoji":
        shutil.copytree(source, folder)
        return
    folder.mkdir()
    lines = []
    for index, line in enumerate((source / "metadata.jsonl").read_text().splitlines()[:37]):
        example = json.loads(line)
        size = [(64, 64), (100, 64), (64, 97), (150, 113), (48, 60)][index % 5]
        image = Image.open(source / example["file_name"]).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / example["file_name"])
        lines.append(json.dumps({**example, "text": [example["text"], f"a drawing of {example['text']}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def flags_of(case: Case, work: Path, output: Path) -> list[str]:
    """The flags of a case, the same for both programs."""
    model, data = work / "model", work / case.data
    return [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", f"--output_dir={output}",
            *case.arguments]  # fmt: skip


def train(
    python: str,
    program: list[str],
    case: Case,
    work: Path,
    output: Path,
    extra: tuple[str, ...] = (),
    device: str = "cpu",
    init_scale: float | None = None,
) -> None:
    """Run one program to its end, on the number of ranks of the case.

    Args:
        program: the arguments after `python`: the path of a script, or -m and a module.
        work: the folder with `model` and the data.
        init_scale: if given, the program runs in float16 on the CPU. See float16.py.

    Raises:
        RuntimeError: if it fails. The message has the end of its output.
    """
    from sdnb.launch.ranks import free_port

    launcher = (
        f"-m accelerate.commands.launch --multi_gpu --num_machines=1 --num_processes={case.ranks} "
        f"--mixed_precision=no --dynamo_backend=no --main_process_port={free_port()}".split()
        if case.ranks > 1
        else []
    )
    if init_scale is not None:
        program = [float16.__file__, str(init_scale), str(_steps_file(output)), *program]
        extra = (*extra, f"--checkpointing_steps={STEPS}")
    command = [python, *launcher, *program, *flags_of(case, work, output), *extra]
    own = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(work / "huggingface" / Path(python).name)}
    done = subprocess.run(command, env={**variables(device, work), **own}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def losses_of_reference(output: Path) -> list[float]:
    """The `train_loss` of each step, from its TensorBoard log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "logs" / "text2image-fine-tune"), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars("train_loss")]


def _steps_file(output: Path) -> Path:
    """What float16.py records of a run."""
    return output.with_suffix(".jsonl")


def compare_scaled(ours: Path, theirs: Path) -> dict[str, Any]:
    """What is compared of two runs with a scaled loss: skipped steps, learning rates, and the last step's weights. The
    weights that are saved at the end are averages, with `use_ema`."""
    expected, got = ([json.loads(line) for line in _steps_file(run).read_text().splitlines()] for run in (theirs, ours))
    skipped = [", ".join(str(number) for number, step in enumerate(run, 1) if step["skipped"]) or "none"
               for run in (expected, got)]  # fmt: skip
    last, found = f"checkpoint-{STEPS}", {}
    if (theirs / last).exists():
        found["last_weights"] = weights_differ(ours / last, theirs / last)
    return dict(
        steps={"reference": expected, "sdnb": got}, same_steps=got == expected,
        skipped=skipped[0] if len({*skipped}) == 1 else f"{skipped[0]}; sdnb: {skipped[1]}",
        learning_rates="the same" if [step["lr"] for step in got] == [step["lr"] for step in expected] else "differ",
        **found,
    )  # fmt: skip


def losses_of_sdnb(output: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def relative_differences(ours: list[float], theirs: list[float]) -> list[float]:
    """|ours - theirs| / |theirs| of each step.

    Raises:
        ValueError: if the numbers of steps differ.
    """
    if len(ours) != len(theirs) or not theirs:
        raise ValueError(f"sdnb logged {len(ours)} steps, and the reference {len(theirs)}")
    return [abs(one - other) / abs(other) for one, other in zip(ours, theirs)]


def weights_differ(ours: Path, theirs: Path) -> float:
    """The largest difference of a weight between two saved UNets or adapters, relative to its tensor's largest."""
    from safetensors.torch import load_file

    whole, adapter = "unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
    name = whole if (theirs / whole).exists() else adapter
    one, other = load_file(ours / name), load_file(theirs / name)
    return max(((one[key] - other[key]).abs().max() / other[key].abs().max().clamp(min=1e-8)).item() for key in other)


def _is_later(reference: Path) -> bool:
    return "--dream_training" in reference.read_text()


def recorded_under(transformers_version: str) -> Path:
    """The folder of the losses that were recorded with a version of transformers. Version 4 draws random numbers when
    it loads a model, version 5 does not. The reference loads the model after it has set the seed, so its losses depend
    on this version."""
    return _RECORDED / f"transformers-{transformers_version.split('.')[0]}"


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())


def compare(
    reference: Path,
    python: str,
    names: list[str],
    work: Path,
    model: str,
    device: str = "cpu",
    precision: str = "no",
    flags: Sequence[str] = (),
    init_scale: float | None = None,
) -> Iterator[tuple[str, dict]]:
    """Run the cases with both programs, sdnb with additional `flags`. Skips the cases that the reference does not know.

    Returns:
        The name and the result of each case, as soon as it is complete.

    Raises:
        RuntimeError, ValueError: if a run fails, or the numbers of steps differ.
    """
    # v0.26.3 resizes bilinearly and has no flag for it. Later versions have a flag with another default.
    bilinear = ("--image_interpolation_mode=bilinear",) if _is_later(reference) else ()
    make_model(model, work / "model")
    for name in ("openmoji", "shapes"):
        make_data(name, work / name)
    for name in names:
        case = CASES[name]
        if not case.is_in(reference):
            continue
        theirs, ours = work / f"{slug(name)}-reference", work / f"{slug(name)}-sdnb"
        extra = () if "image_interpolation_mode" in case.flags else bilinear
        in_precision = () if precision == "no" else (f"--mixed_precision={precision}",)
        script, own = [str(case.script(reference))], ["-m", f"sdnb.train{'_lora' if case.lora else ''}"]
        runs = [(python, script, theirs, (*extra, *in_precision)), (sys.executable, own, ours, (*in_precision, *flags))]
        if device == "cuda":
            runs.append((python, script, again := theirs.with_name(f"{theirs.name}-again"), (*extra, *in_precision)))
        with ThreadPoolExecutor(len(runs) if device == "cuda" else 1) as together:
            started = [
                together.submit(train, with_python, program, case, work, output, given, device, init_scale)
                for with_python, program, output, given in runs
            ]
            for one in started:
                one.result()
        expected, got = losses_of_reference(theirs), losses_of_sdnb(ours)
        differences = relative_differences(got, expected)
        own_spread = {}
        if device == "cuda":
            own_spread["largest_again"] = max(relative_differences(losses_of_reference(again), expected))
            own_spread["weights_again"] = weights_differ(again, theirs)
        scaled = compare_scaled(ours, theirs) if init_scale is not None else {}
        result = dict(
            reference=expected, sdnb=got, largest=max(differences), weights=weights_differ(ours, theirs),
            command=" ".join([*(["accelerate launch --num_processes=2"] if case.ranks > 1 else ["python"]),
                              f"{case.script(reference).name} --pretrained_model_name_or_path=MODEL "
                              f"--train_data_dir={case.data}", *case.arguments, *extra, *in_precision]),
            **own_spread, **scaled,
        )  # fmt: skip
        print(f"\n{name}\n{'step':>4} {'reference':>12} {'sdnb':>12} {'difference':>11}")
        for step, (one, other, difference) in enumerate(zip(expected, got, differences), 1):
            print(f"{step:>4} {one:12.8f} {other:12.8f} {difference:11.1e}")
        print(f"largest {max(differences):.1e}, weights at the end {result['weights']:.1e}")
        print(f"the reference compared with itself: {own_spread}" if own_spread else "", flush=True)
        yield name, result


def table(results: dict[str, dict]) -> str:
    """The differences between the two programs, one row per case. On a GPU also those between the reference's two
    runs."""
    columns = {
        "largest": "largest relative difference of train_loss",
        "weights": "largest difference of a weight at the end",
    }
    if any("largest_again" in result for result in results.values()):
        columns |= {f"{name}_again": f"{text}, the reference compared with itself" for name, text in columns.items()}
    if any("skipped" in result for result in results.values()):
        columns |= {"last_weights": "before averaging", "skipped": "skipped steps", "learning_rates": "learning rates"}
    lines = [f"| case | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for name, result in results.items():
        cells = (result.get(column, "") for column in columns)
        lines.append(f"| {name} | {' | '.join(one if isinstance(one, str) else f'{one:.1e}' for one in cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, dict], title: str, tolerance: float, path: str) -> None:
    """Plot the losses and their differences, one row per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(results), 2, figsize=(10, 2.1 * len(results)), squeeze=False, layout="constrained")
    figure.suptitle(title)
    for (curves, apart), (name, result) in zip(grid, results.items()):
        steps = range(1, len(result["reference"]) + 1)
        curves.plot(steps, result["reference"], color="#0072B2", linewidth=3, alpha=0.4, label="reference")
        curves.plot(steps, result["sdnb"], color="#D55E00", linewidth=1, label="sdnb")
        curves.set_title(name, fontsize=9, loc="left")
        curves.set_ylabel("train_loss")
        apart.semilogy(steps, [max(one, 1e-9) for one in relative_differences(result["sdnb"], result["reference"])],
                       color="#D55E00", marker=".")  # fmt: skip
        apart.axhline(tolerance, color="#8A8A8A", linestyle="--")
        apart.set_ylim(1e-9, 1e-2)
        apart.set_title("relative difference (dashed: tolerance)", fontsize=9, loc="left")
    grid[0][0].legend(frameon=False, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="path of its train_text_to_image.py")
    parser.add_argument(
        "--python", type=a_python, default=sys.executable, help="Python that runs the reference, with torchvision"
    )
    parser.add_argument("--name", default="reference", help="name of the reference in the results, such as v0.26.3")
    parser.add_argument("--model", choices=("tiny-random", RECORDED_MODEL), default="tiny-random")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="some of: " + "; ".join(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixed_precision", choices=list(TOLERANCE), default="no")
    parser.add_argument("--init_scale", type=float, help="the loss scale at the start, in float16 on the CPU")
    parser.add_argument("--flags", default="", help="additional flags for sdnb")
    parser.add_argument("--record", action="store_true", help="save the reference's losses for the tests")
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no such case: {'; '.join(unknown)}. The cases are: {'; '.join(CASES)}")
    if not options.reference.is_file():
        parser.error(f"--reference {options.reference}: no such file")
    how = (options.model, options.device, options.mixed_precision)
    if options.record and how != (RECORDED_MODEL, "cpu", "no"):
        parser.error(f"--record: the tests need losses of --model {RECORDED_MODEL} on the CPU in float32")
    if (options.init_scale is not None) != (how[1:] == ("cpu", "fp16")):
        parser.error("--mixed_precision fp16 on the CPU and --init_scale need each other")
    if options.device == "cuda":
        options.cases = [name for name in options.cases if CASES[name].ranks == 1]
    on, precision, flags = options.device, options.mixed_precision, options.flags.split()
    with tempfile.TemporaryDirectory(prefix="sdnb-parity-") as work:
        results, failed = {}, ""
        try:
            sides = options.reference.absolute(), options.python
            settings = (options.model, on, precision, flags, options.init_scale)
            for name, result in compare(*sides, options.cases, Path(work), *settings):
                results[name] = result
        except (RuntimeError, ValueError) as error:
            failed = f"error: {options.cases[len(results)]}: {error}"
    if not results:
        sys.exit(failed or "error: the reference does not know any of these cases")
    made_by = dict(reference=options.name, versions=versions(options.python))
    changed = {name: CASES[name].changed for name in results if _is_later(options.reference) and CASES[name].changed}
    installed = ", ".join(f"{package} {version}" for package, version in made_by["versions"].items())
    notes = [f"{name}: this reference behaves differently: {what}." for name, what in changed.items()]
    text = "\n\n".join([f"The reference's environment: {installed}.", table(results), *notes])
    title, names = options.name, ["parity", options.name]
    if options.model == RECORDED_MODEL:
        title += ", the tests' model"
        names.append(options.model)
    if (on, precision) != ("cpu", "no"):
        title += f" on the {on.upper()}, mixed_precision {precision}"
        names += [on, precision]
    if options.init_scale is not None:
        title += f", loss scale {options.init_scale:g}"
    sdnb = f"sdnb with `{options.flags}`" if flags else "sdnb"
    about = describe(f"{sdnb} compared with train_text_to_image.py of {title}", **made_by)
    write(file_of(options, *names), text, about, flags=options.flags, cases=results)
    plot(results, f"sdnb compared with the reference, {title}", TOLERANCE[precision], f"{file_of(options, *names)}.png")
    if options.record:
        recorded_here = recorded_under(made_by["versions"]["transformers"])
        recorded_here.mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            if _is_later(options.reference) and not CASES[name].later:  # for these, v0.26.3 is the reference
                continue
            recorded = dict(
                case=name, **made_by, date=about["date"], command=result["command"], train_loss=result["reference"]
            )  # fmt: skip
            (recorded_here / f"{slug(name)}.json").write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"\n{text}")
    # On a GPU the reference itself differs from run to run. Allow ten times this, because it comes from one pair only.
    limits = {name: max(TOLERANCE[precision], 10 * result.get("largest_again", 0)) for name, result in results.items()}
    apart = [name for name in results if results[name]["largest"] > limits[name] and name not in changed]
    others = [name for name in results if not results[name].get("same_steps", True) and name not in changed]
    problems = [failed] if failed else []
    problems += [f"error: the difference exceeds the tolerance: {'; '.join(apart)}"] if apart else []
    problems += [f"error: other steps were skipped, or the rates differ: {'; '.join(others)}"] if others else []
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
