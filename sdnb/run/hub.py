"""The trained pipeline on the Hugging Face hub, with a card that shows its pictures, settings and measurements.

The token comes from `hub_token`, the environment (HF_TOKEN) or the hub's own login, in this order.
"""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, create_repo, upload_folder

from sdnb.errors import RunError
from sdnb.metrics import results as metrics
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig

TAGS = ("stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training", "sdnb")
CARD = "README.md"
# The pipeline, its pictures and its measurements; no checkpoint, and nothing that names the machine or its user.
UPLOADED = (CARD, "model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", f"{run_folder.SAMPLES}/*",
            run_folder.STEPS, run_folder.VALIDATION)  # fmt: skip
NOT_UPLOADED = ("checkpoint-*", ".*", "logs/*")


def create(config: TrainConfig) -> str:
    """Make the repository, or find it: before the training, so that a missing permission does not cost one.

    Returns:
        Its full name, owner/name.

    Raises:
        RunError: if that cannot be done.
    """
    name = config.hub_model_id or Path(config.output_dir).name
    try:
        return create_repo(name, exist_ok=True, token=_token(config)).repo_id
    except Exception as error:  # the hub's client raises its own, its HTTP library's, and OSError
        raise RunError(
            f"push_to_hub: the repository {name} cannot be made: {error}\nGive a token that may write as the "
            "environment variable HF_TOKEN, or log in with `hf auth login`; or leave push_to_hub out."
        ) from error


def publish(run: run_folder.RunFolder, config: TrainConfig, repository: str) -> None:
    """Write the card into the run folder and upload what `UPLOADED` names.

    Raises:
        RunError: if it cannot be uploaded; the pipeline is in the run folder all the same.
    """
    (run.folder / CARD).write_text(card(run))
    try:
        upload_folder(
            repo_id=repository,
            folder_path=run.folder,
            commit_message="End of training",
            allow_patterns=list(UPLOADED),
            ignore_patterns=list(NOT_UPLOADED),
            token=_token(config),
        )
    except Exception as error:
        raise RunError(
            f"the training is complete and saved, but its upload to {repository} failed: {error}\n"
            f"Try again with: {_again(run, repository)}"
        ) from error


def _again(run: run_folder.RunFolder, repository: str) -> str:
    program = (
        "from sdnb.run import folder, hub; "
        f"run = folder.RunFolder({str(run.folder)!r}); hub.publish(run, run.config, {repository!r})"
    )
    return f"python -c {shlex.quote(program)}"


def _token(config: TrainConfig) -> str | None:
    return config.hub_token.get_secret_value() if config.hub_token else None


def card(run: run_folder.RunFolder) -> str:
    """The model card of a complete run, in Markdown."""
    config, measured = run.config, metrics.measure(run)
    model, data = config.pretrained_model_name_or_path, config.dataset_name or config.train_data_dir
    about = ModelCardData(
        base_model=model if _on_hub(model) else None,
        datasets=[data] if _on_hub(data) else None,
        license="creativeml-openrail-m" if _on_hub(model) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(TAGS),
    )
    devices, packages = run.environment["devices"], run.environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "diffusers", "transformers", "accelerate"))
    return "\n".join(
        [
            f"---\n{about.to_yaml()}\n---\n",
            "# Text-to-image fine-tuning\n",
            f"{_text(_name(model))} fine-tuned on {_text(_name(data))} for {len(run.steps)} optimizer steps.\n",
            *_pictures(run),
            "## Measured\n",
            _table(("", "Result", "How it is measured"), [(row.name, row.text, row.how) for row in measured.results]),
            f"On {config.num_processes} × {_text(devices['names'][0])}, {versions}. A line for each step is in "
            f"`{run_folder.STEPS}`.\n",
            "## Settings\n",
            _table(("Setting", "Value"), [(name, _name(value)) for name, value in config.trajectory().items()
                                          if value is not None]),
            "## Use\n",
            "```python\nfrom diffusers import StableDiffusionPipeline\n\n"
            'pipeline = StableDiffusionPipeline.from_pretrained("…")\npicture = pipeline("…").images[0]\n```\n',
        ]
    )  # fmt: skip


def _pictures(run: run_folder.RunFolder) -> list[str]:
    drawn = run.drawn
    if drawn.empty:
        return []
    last = drawn[drawn.step == drawn.step.max()]
    return [
        *(f"![{_text(row.prompt)}]({run_folder.SAMPLES}/{row.file})" for row in last.itertuples()),
        f"\nDrawn after step {last.step.iloc[0]}: {'; '.join(_text(prompt) for prompt in last.prompt)}.\n",
    ]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines) + "\n"


def _text(value: Any) -> str:
    """A value as text that Markdown and HTML take as such."""
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{sign}" if sign in "|[]`*_\\" else sign for sign in escaped)


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).expanduser().exists()


def _name(value: Any) -> Any:
    """A folder by its own name: the path to it is nobody's business."""
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value
