"""Throughput: images per second with a confidence interval, and what a progress bar shows."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit
from tqdm import tqdm

from sdnb.metrics.steady import autocorrelation, inflation
from sdnb.settings.config import TrainConfig

SMOOTHING = 0.3  # of tqdm's progress bar


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if not 0 < self.value < 0.995 else min(9, 2 - math.floor(math.log10(self.value)))
        interval = f" ({self.low:.{digits}f} to {self.high:.{digits}f})" if math.isfinite(self.low) else ""
        return f"{self.value:.{digits}f}{interval}"

    def scaled(self, factor: float) -> "Estimate":
        return Estimate(*(factor * part for part in (self.value, self.low, self.high)))


def images_per_second(images: np.ndarray, seconds: np.ndarray) -> Estimate:
    """Σ images / Σ seconds over steps, with its 95 % confidence interval, see `ratio_of_sums`."""
    return ratio_of_sums(images, seconds)


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Σ numerators / Σ denominators over steps, with its two-sided confidence interval.

    The variance is that of a ratio estimate (Cochran, Sampling Techniques, 1977, section 6.3). It includes the
    autocorrelation of the residuals as that of an autoregression of order 1: n of them say as much as n/inflation
    independent ones (Thiébaux and Zwiers, Journal of Climate and Applied Meteorology 23, 1984). With fewer than three
    steps the interval is NaN.
    """
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    n, ratio = len(numerators), numerators.sum() / denominators.sum()
    if n < 3:
        return Estimate(ratio, math.nan, math.nan)
    residuals = numerators - ratio * denominators
    inflated = inflation(autocorrelation(residuals / denominators))  # relative: steps may be of several sizes
    error = math.sqrt(residuals @ residuals * inflated * n / (n - 1)) / denominators.sum()
    margin = stdtrit(max(2.0, n / inflated - 1), (1 + confidence) / 2) * error
    low = ratio - margin
    return Estimate(ratio, max(low, 0.0) if (numerators >= 0).all() else low, ratio + margin)


def ratio_of(one: Estimate, other: Estimate) -> Estimate:
    """The ratio of two independent estimates, with its 95 % confidence interval by the delta method: the variance of
    its logarithm is the sum of theirs. NaN if one of the intervals is unknown."""
    ratio = one.value / other.value
    margin = math.hypot(*((each.high - each.low) / 2 / each.value for each in (one, other)))
    return Estimate(ratio, ratio * math.exp(-margin), ratio * math.exp(margin))


def smoothed_seconds_per_step(seconds: np.ndarray) -> float:
    """The s/it that tqdm's progress bar shows after the last of these steps: a moving average with smoothing 0.3."""
    now = 0.0
    # All parameters of the average are given, because TQDM_… in the environment would set the others.
    bar = tqdm(total=len(seconds) + 1, file=io.StringIO(), disable=False, smoothing=SMOOTHING, mininterval=0.1,
               maxinterval=10.0, miniters=None)  # fmt: skip
    bar._time = lambda: now
    bar.start_t = bar.last_print_t = now
    bar.refresh = lambda *_, **__: None  # only its average is wanted, and drawing it takes time
    for step in seconds:
        now += step
        bar.update(1)
    rate = bar.format_dict["rate"] or len(seconds) / now
    bar.close()
    return 1 / rate


def seconds_per_micro_batch(shown: float, micro_batches: Sequence[int]) -> float:
    """Seconds per micro-batch, from the s/it that tqdm shows after steps of so many micro-batches. All micro-batches
    are assumed to take the same time, and the average is linear in it."""
    return shown / smoothed_seconds_per_step(np.asarray(micro_batches, float))


def flop_of(per_image: dict[str, float], images: Any, encoded_images: Any, encoded_captions: Any) -> dict[str, Any]:
    """Floating-point operations by part of the model, for so many images trained on and encoded, or for a column of
    them. `per_image`: as `describe_model` counts them."""
    return {
        "UNet forward and backward": per_image["unet_training"] * images,
        "VAE": per_image["vae_encoder"] * encoded_images,
        "text encoder": per_image["text_encoder"] * encoded_captions,
    }


def nominal_ips(steps: pd.DataFrame, config: TrainConfig) -> float:
    """Images per second and GPU, as trainers publish it: global batch / smoothed seconds per step at the last step but
    one / GPUs. It counts every step as a full one. NaN if there is only one step."""
    if len(steps) < 2:
        return math.nan
    return config.global_batch / smoothed_seconds_per_step(steps.seconds.iloc[:-1]) / config.ranks
