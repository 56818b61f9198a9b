"""A look before and after a run: the data set, what the VAE keeps of its images, what noise does to them, and what a
model draws."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from pandas.io.formats.style import Styler
from PIL import Image
from torch import Tensor

from sdnb.data.image_captions import ImageCaptions, first_caption
from sdnb.errors import DataError, RunError
from sdnb.figures.chart import Chart, grid_of, legend
from sdnb.figures.colours import BLUE, RED
from sdnb.machine.device import release_freed_memory
from sdnb.machine.device_kind import HOST, kind_here
from sdnb.metrics.results import PAGE_MIME
from sdnb.models.lora import merge_adapter
from sdnb.models.pipeline import Parts, assemble, load_parts
from sdnb.places import runs_folder
from sdnb.report.run import Run
from sdnb.run.folder import ADAPTER, SUMMARY, data_name, problems_of
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import several
from sdnb.tables import html_table
from sdnb.training.evaluation import psnr

LATEST = "latest"
TRAINED = ("model_index.json", ADAPTER)  # one of them is in the folder of a complete run


def survey(examples: ImageCaptions) -> pd.DataFrame:
    """A row for each image: `caption` (the first of several), `words`, `width`, `height`, `same_as` (the row of an
    earlier image with the same pixels, or None) and `problem` (why it cannot be used, or None)."""
    if not isinstance(examples, ImageCaptions):
        raise DataError("a stream cannot be explored as a whole: turn streaming off")
    first_with: dict[str, int] = {}
    rows = []
    for row in range(len(examples)):
        caption = first_caption(examples.captions[row])
        one = dict(caption=caption, words=len(caption.split()), width=None, height=None, same_as=None, problem=None)
        try:
            image = examples.image(row)
        except DataError as error:
            one["problem"] = str(error)
        else:
            pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            earlier = first_with.setdefault(pixels, row)
            one.update(width=image.width, height=image.height, same_as=None if earlier == row else earlier)
        rows.append(one)
    return pd.DataFrame(rows).astype({"width": "Int64", "height": "Int64", "same_as": "Int64"})


@dataclass(frozen=True)
class Overview:
    """A summary of `survey`, in a few rows. The page of its notebook is named after the data set."""

    config: TrainConfig
    found: dict[str, str]

    def __repr__(self) -> str:
        return "\n".join(f"{name:<40}{text}" for name, text in self.found.items())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        table = pd.DataFrame({"found": self.found.values()}, index=list(self.found))
        name = data_name(self.config)
        title = (
            f"{name}: {self.found['images']} images, looked at for {self.config.resolution}×{self.config.resolution}"
        )
        page = dict(kind="data set", name=f"{name}-explored", title=title)
        return {"text/plain": repr(self), "text/html": html_table(table, header=False), PAGE_MIME: page}


def overview(surveyed: pd.DataFrame, config: TrainConfig) -> Overview:
    """What `survey` found, for a training with these settings."""
    usable = surveyed[surveyed.problem.isna()]
    smaller = usable[["width", "height"]].min(axis=1) < config.resolution
    found = {
        "images": len(surveyed),
        "cannot be used": int(surveyed.problem.notna().sum()),
        "same as an earlier one": int(surveyed.same_as.notna().sum()),
        f"smaller than {config.resolution}, will be enlarged": int(smaller.sum()),
        "sizes": f"{usable.width.min()}×{usable.height.min()} to {usable.width.max()}×{usable.height.max()}",
        "distinct captions": surveyed.caption.nunique(),
        "empty captions": int((surveyed.words == 0).sum()),
        "words per caption": _words(surveyed.words),
    }
    return Overview(config, {name: str(text) for name, text in found.items()})


def _words(words: pd.Series) -> str:
    few, many = words.min(), words.max()
    return f"{few} in each" if few == many else f"{few} to {many}, median {words.median():g}"


def problems(surveyed: pd.DataFrame) -> Styler:
    """The images that cannot be used or are duplicates, with the full message of `survey`."""
    chosen = surveyed[surveyed.problem.notna() | surveyed.same_as.notna()]
    words = {"caption": "caption", "problem": "why it cannot be used", "same_as": "same as image"}
    table = chosen[[*words]].rename(columns=words).reset_index(names="image")
    return table.style.format(escape="html", na_rep="").hide(axis="index")


def sizes(surveyed: pd.DataFrame, resolution: int) -> Chart:
    """The sizes of the images, and the lengths of the captions."""
    usable = surveyed[surveyed.problem.isna()]
    shorter = usable[["width", "height"]].min(axis=1).astype(float)
    caption = (
        f"{(shorter < resolution).mean():.0%} of the images are smaller than the training resolution of {resolution} "
        f"pixels. Words per caption: {_words(surveyed.words)}."
    )
    chart = Chart("Images and captions", caption, 3.2, stacks=True)
    ((left, right),) = chart.panels(1, 2)
    left.hist(shorter, bins=30, color=BLUE)
    left.axvline(resolution, color=RED, ls="--", label=f"resolution {resolution}")
    left.set(xlabel="shorter side, pixels", ylabel="images")
    legend(left)
    right.hist(surveyed.words, bins=range(surveyed.words.max() + 2), color=BLUE, align="left")
    right.set(xlabel="words in a caption", ylabel="captions")
    return chart


@torch.no_grad()
def kept_by_vae(parts: Parts, examples: ImageCaptions, rows: Sequence[int]) -> Chart:
    """Images as the training sees them, and after the VAE has encoded and decoded them: no training of the UNet can
    draw finer details than that. The caption has the peak signal-to-noise ratio of all, in dB."""
    pixels = torch.stack([examples.pixels(row) for row in rows])
    back = parts.vae.decode(parts.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return grid_of(
        [_to_images(pixels), _to_images(back), _to_images((pixels - back).abs() - 1)], "What the VAE keeps",
        f"Peak signal-to-noise ratio {psnr(pixels, back):.1f} dB. At 25 dB images look nearly the same.",
        columns=[first_caption(examples.captions[row]) for row in rows],
        rows=["as trained", "encoded, decoded", "difference"],
    )  # fmt: skip


@torch.no_grad()
def noised(parts: Parts, examples: ImageCaptions, row: int, timesteps: Sequence[int], seed: int) -> Chart:
    """An image with the noise of some timesteps, decoded, and below it the first three channels of its latents: the
    input from which the UNet predicts the noise."""
    scaling = parts.vae.config.scaling_factor
    latents = parts.vae.encode(examples.pixels(row)[None]).latent_dist.mode() * scaling
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    several = parts.noise_scheduler.add_noise(latents, noise, torch.tensor(timesteps))
    decoded = parts.vae.decode(several / scaling).sample.clamp(-1, 1)
    signal = parts.noise_scheduler.alphas_cumprod[list(timesteps)].sqrt()
    caption = "; ".join(f"timestep {step}: {share:.0%} image" for step, share in zip(timesteps, signal))
    return grid_of(
        [_to_images(decoded), _to_images((several[:, :3] / 2).clamp(-1, 1))],
        f"Noise on “{first_caption(examples.captions[row])}”", f"{caption}.",
        columns=[f"timestep {step}" for step in timesteps], rows=["decoded", "latents"],
    )  # fmt: skip


def find_run(wanted: str | Path | None, config: TrainConfig) -> Run | None:
    """The run in a folder. For `latest`, the newest complete run in `runs_folder` that started with the same model;
    None if there is none, or for None. Raises RunError if the folder has no run."""
    if wanted is None:
        return None
    if wanted != LATEST:
        return Run(wanted)
    model, ended = config.pretrained_model_name_or_path, {}
    for path in runs_folder().glob(f"**/{SUMMARY}"):
        seen, _ = problems_of(partial(_model_and_end, path.parent))  # a damaged run does not hide the others
        if seen and seen[0] == model and _is_trained(path.parent):
            ended[path.parent] = seen[1]
    return Run(max(ended, key=ended.__getitem__)) if ended else None


def _model_and_end(folder: Path) -> tuple[str, float]:
    run = Run(folder)
    return run.config.pretrained_model_name_or_path, run.summary["ended"]


def draw(
    config: TrainConfig, prompts: Sequence[str] | str, run: Run | None = None, seed: int = 0,
    guidance_scale: float = 7.5, num_inference_steps: int = 30,
) -> Chart:  # fmt: skip
    """What the model of the settings draws, and below it what a run of it draws from the same noise. Raises RunError if
    the run has no pipeline yet."""
    prompts = several(prompts)
    pipelines = {"untrained": assemble(config, load_parts(config))}
    if run is not None:
        pipelines[f"trained: {run.folder.name}"] = _trained(run)
    side, rows = config.resolution, []
    options = dict(height=side, width=side, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps)
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(kind_here().type)
        drawn = [pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options) for prompt in prompts]
        rows.append([one.images[0] for one in drawn])
        pipeline.to(HOST)
    release_freed_memory()  # of an accelerator, for a run that starts while this notebook is open
    how = f"Seed {seed}, {num_inference_steps} steps, guidance {guidance_scale:g}."
    return grid_of(rows, "Images of the same prompts and noise", how, columns=prompts, rows=list(pipelines))


def _is_trained(folder: Path) -> bool:
    return any((folder / name).exists() for name in TRAINED)


def _trained(run: Run) -> StableDiffusionPipeline:
    """The pipeline of a run. Raises RunError if it has none yet."""
    if not _is_trained(run.folder):
        raise RunError(f"{run.folder}: has no trained pipeline; it is saved at the end of a run")
    if run.config.lora:
        parts = load_parts(run.config)
        merge_adapter(parts.unet, run.folder / ADAPTER)
        return assemble(run.config, parts)
    unchecked = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline.from_pretrained(run.folder, use_safetensors=True, **unchecked)


def _to_images(pixels: Tensor) -> list[Image.Image]:
    """Images [several, 3, height, width], -1 to 1."""
    rounded = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(one.numpy()) for one in rounded.permute(0, 2, 3, 1).contiguous()]
