"""What the records of a run tell of its training: how the loss fell, and how noisy the gradients were."""

import math

import numpy as np

from sdnb.metrics.second_moment import second_moment
from sdnb.run.folder import RunFolder

BEFORE = "held-out loss before the training"
SAVED = "held-out loss of the saved weights"
UNMOVED = "tensors of weights that did not move"
ROUNDED = "share of weights that half precision can hold"
AVERAGED = "saved weights are an average, not the last step's"
GIVEN = "squared gradients in the optimizer, over the recorded"
_BEGIN = 0.25  # of the steps, in which the loss falls


def recorded_quantities(run: RunFolder, steps: int) -> dict[str, float]:
    """Those that need only the records."""
    records, held_out = run.steps[:steps], run.validation
    losses, images = (records[name].to_numpy(float) for name in ("loss", "images"))
    norms = records.get("grad_norm", records.loss * math.nan).to_numpy(float)
    found, early = {}, math.ceil(_BEGIN * steps)
    for part in (slice(0, early), slice(early, steps)):
        where = f"steps {part.start + 1} to {part.stop}"
        found[f"loss, {where}"] = float(losses[part] @ images[part] / images[part].sum())
        known = norms[part][np.isfinite(norms[part])]  # in float16, gradients overflow now and then
        found[f"gradient norm, {where}"] = math.exp(float(np.log(known).mean())) if len(known) else math.nan
    later = losses[early:]
    found["scatter of the loss between steps"] = float(np.abs(np.diff(later)).mean() / later.mean())
    if len(run.steps) == steps and run.summary.get("second_moment"):
        found[GIVEN] = run.summary["second_moment"] / second_moment(norms, run.config)
    for step, loss in zip(held_out.get("step", ()), held_out.get("loss", ())):
        if step <= steps:
            found[f"held-out loss after step {step:.0f}" if step else BEFORE] = float(loss)
    return found
