"""To look at before and after a training: a data set, what the VAE keeps of its pictures, what noise does to them, and
what a model draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from pandas.io.formats.style import Styler
from PIL import Image
from torch import Tensor

from sdnb.data import image_captions as data
from sdnb.errors import DataError, RunError
from sdnb.figures.chart import BLUE, RED, Chart, grid_of, legend
from sdnb.machine.device import give_back_freed_memory
from sdnb.machine.environment import PROJECT
from sdnb.models import pipeline as models
from sdnb.report.run import Run
from sdnb.run.folder import SUMMARY
from sdnb.settings.config import TrainConfig
from sdnb.train.evaluation import psnr

LATEST = "latest"
PIPELINE = "model_index.json"


def survey(examples: data.ImageCaptions) -> pd.DataFrame:
    """A row for each picture: `caption` (the first of several), `words`, `width`, `height`, `same_as` (the row of an
    earlier picture with the same pixels) and `problem` (why it cannot be used), both None where there is none."""
    first_with: dict[str, int] = {}
    rows = []
    for row in range(len(examples)):
        caption = data.first_caption(examples.captions[row])
        one = dict(caption=caption, words=len(caption.split()), width=None, height=None, same_as=None, problem=None)
        try:
            picture = examples.picture(row)
        except DataError as error:
            one["problem"] = str(error)
        else:
            pixels = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
            earlier = first_with.setdefault(pixels, row)
            one.update(width=picture.width, height=picture.height, same_as=None if earlier == row else earlier)
        rows.append(one)
    return pd.DataFrame(rows).astype({"width": "Int64", "height": "Int64", "same_as": "Int64"})


def overview(surveyed: pd.DataFrame, resolution: int) -> pd.DataFrame:
    """What `survey` has found, in a few rows."""
    usable = surveyed[surveyed.problem.isna()]
    smaller = usable[usable[["width", "height"]].min(axis=1) < resolution]
    said = {
        "pictures": len(surveyed),
        "cannot be used": int(surveyed.problem.notna().sum()),
        "the same as an earlier one": int(surveyed.same_as.notna().sum()),
        f"smaller than {resolution}, to be enlarged": len(smaller),
        "sizes": f"{usable.width.min()}×{usable.height.min()} to {usable.width.max()}×{usable.height.max()}",
        "different captions": surveyed.caption.nunique(),
        "empty captions": int((surveyed.words == 0).sum()),
        "words in a caption": f"median {surveyed.words.median():g}, {surveyed.words.min()} to {surveyed.words.max()}",
    }
    return pd.DataFrame({"found": said})


def troubles(surveyed: pd.DataFrame) -> Styler:
    """The pictures that cannot be used and those that are there twice, and what `survey` says of them in full."""
    chosen = surveyed[surveyed.problem.notna() | surveyed.same_as.notna()][["caption", "problem", "same_as"]]
    return chosen.style.format(escape="html", na_rep="")


def sizes(surveyed: pd.DataFrame, resolution: int) -> Chart:
    """How large the pictures are, and how long the captions."""
    usable = surveyed[surveyed.problem.isna()]
    shorter = usable[["width", "height"]].min(axis=1).astype(float)
    caption = (
        f"{(shorter < resolution).mean():.0%} of the pictures are smaller than the {resolution} pixels that they are "
        f"trained at; half of the captions have more than {surveyed.words.median():g} words."
    )
    chart = Chart("Pictures and captions", caption, 3.2)
    ((left, right),) = chart.panels(1, 2)
    left.hist(shorter, bins=30, color=BLUE)
    left.axvline(resolution, color=RED, ls="--", label=f"resolution {resolution}")
    left.set(xlabel="shorter side, pixels", ylabel="pictures")
    legend(left)
    right.hist(surveyed.words, bins=range(surveyed.words.max() + 2), color=BLUE, align="left")
    right.set(xlabel="words in a caption")
    return chart


@torch.no_grad()
def kept_by_vae(parts: models.Parts, examples: data.ImageCaptions, rows: Sequence[int]) -> Chart:
    """Pictures as the training sees them, and what is left of them when the VAE has encoded and decoded them: no
    training of the UNet can draw finer than that. With the peak signal-to-noise ratio of all, in dB."""
    pixels = torch.stack([examples.pixels(row) for row in rows])
    back = parts.vae.decode(parts.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return grid_of(
        [[_picture(one) for one in pixels], [_picture(one) for one in back],
         [_picture((one - other).abs() - 1) for one, other in zip(pixels, back)]],
        "What the VAE keeps", f"Peak signal-to-noise ratio {psnr(pixels, back):.1f} dB; more is better, 25 dB look nearly the same.",  # noqa
        columns=[data.first_caption(examples.captions[row]) for row in rows],
        rows=["as trained", "encoded, decoded", "difference"],
    )  # fmt: skip


@torch.no_grad()
def noised(parts: models.Parts, examples: data.ImageCaptions, row: int, timesteps: Sequence[int], seed: int) -> Chart:
    """A picture with the noise of some timesteps, decoded, over its latents' first three channels: what the UNet is
    given when it is to find the noise."""
    scaling = parts.vae.config.scaling_factor
    latents = parts.vae.encode(examples.pixels(row)[None]).latent_dist.mode() * scaling
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    several = parts.noise_scheduler.add_noise(
        latents.expand(len(timesteps), -1, -1, -1), noise.expand(len(timesteps), -1, -1, -1), torch.tensor(timesteps)
    )
    decoded = parts.vae.decode(several / scaling).sample.clamp(-1, 1)
    signal = parts.noise_scheduler.alphas_cumprod[list(timesteps)].sqrt()
    caption = "; ".join(f"timestep {step}: {share:.0%} of the picture" for step, share in zip(timesteps, signal))
    return grid_of(
        [[_picture(one) for one in decoded], [_picture((one[:3] / 2).clamp(-1, 1)) for one in several]],
        f"Noise on “{data.first_caption(examples.captions[row])}”", f"{caption}.",
        columns=[f"timestep {step}" for step in timesteps], rows=["decoded", "latents"],
    )  # fmt: skip


def retrieved(share: float, drawn: Sequence[tuple[str, Image.Image, Image.Image]]) -> Chart:
    """Some of what `evaluate.retrieval` has drawn, under the pictures that the captions are of."""
    captions, pictures, drawings = zip(*drawn)
    said = f"{share:.0%} of the drawings are nearer to their own picture than to nine others; chance is 10 %."
    return grid_of([list(pictures), list(drawings)], "Captions drawn again", said, columns=captions,
                   rows=["picture", "drawn"])  # fmt: skip


def find_run(wanted: str | Path | None, config: TrainConfig) -> Run | None:
    """The run of a folder; of `latest`, the newest in the project's `runs/` that is complete and began with the model
    of the settings, None if there is none; None of None.

    Raises:
        RunError: if the folder holds no run.
    """
    if wanted is None:
        return None
    if wanted != LATEST:
        return Run(wanted)
    found = [Run(path.parent) for path in (PROJECT / "runs").glob(f"**/{SUMMARY}")]
    same = [run for run in found if (run.folder / PIPELINE).exists()
            and run.config.pretrained_model_name_or_path == config.pretrained_model_name_or_path]  # fmt: skip
    return max(same, key=lambda run: run.summary["ended"], default=None)


def draw(
    config: TrainConfig,
    prompts: Sequence[str],
    run: Run | None = None,
    seed: int = 0,
    guidance_scale: float = 7.5,
    num_inference_steps: int = 30,
) -> Chart:
    """What the model of the settings draws, and under it what a run of it draws from the same noise.

    Raises:
        RunError: if the run has no pipeline yet.
    """
    pipelines = {"untrained": models.pipeline(config, models.load(config))}
    if run is not None:
        pipelines[f"trained: {run.folder.name}"] = _trained(run)
    rows = []
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        rows.append([
            pipeline(
                prompt, height=config.resolution, width=config.resolution, guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps, generator=torch.Generator().manual_seed(seed),
            ).images[0]
            for prompt in prompts
        ])  # fmt: skip
        pipeline.to("cpu")
    give_back_freed_memory()  # on a GPU, for what is trained while this notebook is open
    how = f"Seed {seed}, {num_inference_steps} steps, guidance {guidance_scale:g}."
    return grid_of(rows, "Pictures of the same prompts and noise", how, columns=prompts, rows=list(pipelines))


def _trained(run: Run) -> StableDiffusionPipeline:
    if not (run.folder / PIPELINE).exists():
        raise RunError(f"{run.folder}: has no trained pipeline; it is saved when a run has come to its end")
    unchecked = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline.from_pretrained(run.folder, use_safetensors=True, **unchecked)


def _picture(pixels: Tensor) -> Image.Image:
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
