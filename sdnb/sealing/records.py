"""Whether the records of a sealed run agree with its settings and with each other."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from sdnb.auditing.case import FAILS, UNKNOWN, Finding, judged
from sdnb.machine.environment import version_of
from sdnb.metrics.results import Measurements, examples_of
from sdnb.metrics.second_moment import explained, second_moment
from sdnb.metrics.steps import first_not_finite, was_skipped
from sdnb.run import folder as run_folder
from sdnb.run.folder import RunFolder
from sdnb.sealing.seal import CHECKPOINTS, FIGURES, Sealed, is_of_this_version
from sdnb.settings.config import TrainConfig

_SAME = 1e-9  # of a number that is computed again


def records(sealed: Sealed, steps: pd.DataFrame, config: TrainConfig) -> Finding:
    numbers, wrong = steps.step.astype(int), []
    if twice := sorted(number for number, count in Counter(numbers).items() if count > 1):
        wrong.append(f"step {twice[0]} occurs twice")
    if missing := sorted({*range(1, len(numbers) + 1)} - {*numbers}):
        wrong.append(f"step {missing[0]} is missing")
    if not wrong and not numbers.is_monotonic_increasing:
        wrong.append("the steps are not in order")
    expected = config.max_train_steps
    if examples := examples_of(sealed.run.environment):
        expected = config.total_steps(examples)
    committed = [made["total_steps"] for made in sealed.json(CHECKPOINTS).values() if "total_steps" in made]
    for other in {expected, *committed[-1:]} - {None, len(steps)}:
        wrong.append(f"there are {len(steps)} steps, and {other} were to be done")
    return judged("records", wrong, f"{len(steps)} steps, each once, as the settings ask for")


def work(run: RunFolder, steps: pd.DataFrame, config: TrainConfig) -> Finding:
    if not (examples := examples_of(run.environment)):
        return Finding("work of each step", UNKNOWN, "the number of images in the data set was not recorded")
    epoch = config.epoch(examples)
    wrong = [
        f"step {step} has {images} images in {micro} micro-batches; by the settings {epoch.images_in(step)} in "
        f"{epoch.micro_batches_in(step)}"
        for step, images, micro in zip(steps.step, steps.images, steps.micro_batches)
        if (images, micro) != (epoch.images_in(step), epoch.micro_batches_in(step))
    ]
    wrong += [
        f"step {step} encoded {encoded} images of {images}"
        for step, images, encoded in zip(steps.step, steps.images, steps.get("encoded_images", steps.images))
        if not 0 <= encoded <= images
    ]
    more = [f"and so in {len(wrong) - 1} more"] if len(wrong) > 1 else []
    how = f"{examples} images, {config.ranks} ranks, {config.global_batch} images a step"
    return judged("work of each step", [*wrong[:1], *more], how)


def figures(sealed: Sealed, measured: Measurements) -> Finding:
    """Whether the stated figures follow from the records. Another version of sdnb may define them otherwise."""
    computed, here = {row.name: row.row() for row in measured.results}, version_of("sdnb")
    wrong, unknown = [], []
    for name in (run_folder.RESULTS, FIGURES):
        stated = sealed.json(name)
        if not stated or stated.get("sdnb") != here:
            unknown.append(f"{name} is of sdnb {stated.get('sdnb')}, and here is {here}" if stated else f"no {name}")
            continue
        rows = {row["name"]: row for row in stated["results"]}
        wrong += [f"{name} has {row}, which does not follow from the records" for row in rows if row not in computed]
        wrong += [f"{name} has no {row}" for row in computed if row not in rows]
        wrong += [
            f"{name} says {row}: {part} = {rows[row].get(part)}; from the records it is {computed[row][part]}"
            for row in computed if row in rows
            for part in ("value", "low", "high", "n", "text") if not is_same(rows[row].get(part), computed[row][part])
        ]  # fmt: skip
    if unknown and not wrong:
        return Finding("figures", UNKNOWN, "; ".join(unknown))
    return judged("figures", wrong[:2], f"all {len(computed)} follow from the records")


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_SAME)
    return bool(one == other)


def losses(steps: pd.DataFrame, config: TrainConfig) -> Finding:
    """`train_loss` is the loss, over the micro-batches of a full step."""
    expected = steps.loss * steps.micro_batches / config.gradient_accumulation_steps
    bad = steps.step[~np.isclose(steps.train_loss, expected, rtol=1e-6, equal_nan=True)]
    wrong = [f"loss and train_loss of step {bad.iloc[0]} contradict each other"] if len(bad) else []
    return judged("losses", wrong, "loss and train_loss agree")


def gradients(run: RunFolder, steps: pd.DataFrame, config: TrainConfig) -> Finding:
    kept = run.summary.get("second_moment")
    if kept is None and not config.use_8bit_adam and is_of_this_version(run):
        return Finding("gradients", FAILS, "the optimizer's memory of them is missing, and this version records it")
    expected = second_moment(steps.grad_norm.to_numpy(float), config)
    if kept is None or (not math.isfinite(kept) and first_not_finite(steps)):
        return Finding("gradients", UNKNOWN, "the optimizer's memory of them was not recorded, or the run diverged")
    how = f"what AdamW remembers of them is {kept / (expected or math.nan):.6f} times what the recorded norms give"
    return judged("gradients", [] if explained(kept, expected) else [how], how)


def _schedule(config: TrainConfig, examples: int) -> Callable[[int], float]:
    """What the learning rate is multiplied with, after so many advances of the schedule."""
    if config.lr_scheduler == "constant":
        return lambda _: 1.0
    import torch  # now, as it takes seconds

    from sdnb.training.setup import schedule_of

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.peak_learning_rate)
    return schedule_of(config, optimizer, examples).lr_lambdas[0]


def learning_rate(run: RunFolder, steps: pd.DataFrame, config: TrainConfig) -> Finding:
    if not (examples := examples_of(run.environment)):
        return Finding("learning rate", UNKNOWN, "the number of images in the data set was not recorded")
    schedule = _schedule(config, examples)
    before = np.concatenate([[0], np.cumsum(~was_skipped(steps, config))[:-1]])
    expected = [config.peak_learning_rate * schedule(int(count) * config.ranks) for count in before]
    bad = steps.step[~np.isclose(steps.lr, expected, rtol=1e-6, atol=1e-15)]
    wrong = [f"that of step {step} is not what the settings give, nor are those of {len(bad) - 1} more"
             for step in bad.iloc[:1]]  # fmt: skip
    return judged("learning rate", wrong, f"{config.lr_scheduler}, from {config.peak_learning_rate:g}")
