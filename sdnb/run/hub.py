"""Uploads the trained pipeline or adapter to the Hugging Face hub, with a card that shows its images, settings and
measurements. The token comes from `hub_token`, the environment (HF_TOKEN) or the hub's own login, in this order."""

import html
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

from sdnb.errors import RunError
from sdnb.metrics.results import measure
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig

TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training", "sdnb"]
CARD = "README.md"
# The pipeline, its images and its measurements; no checkpoint, and nothing that names the machine or its user.
UPLOADED = [CARD, "model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", run_folder.ADAPTER,
            f"{run_folder.SAMPLES}/*", run_folder.STEPS, run_folder.VALIDATION]  # fmt: skip
NOT_UPLOADED = ["checkpoint-*", ".*", "logs/*"]


def create(config: TrainConfig) -> str:
    """Create the repository, or find it, and return its full name, owner/name. Before the training, so that a missing
    permission does not waste one. Raises RunError if that is impossible."""
    name = config.hub_model_id or run_folder.path_of(config).name
    try:
        return create_repo(name, exist_ok=True, token=_token(config)).repo_id
    except Exception as error:  # the hub's client raises its own types, those of its HTTP library, and OSError
        raise RunError(
            f"push_to_hub: the repository {name} cannot be created: {error}\nSet the environment variable HF_TOKEN to "
            "a token with write access, or run `hf auth login`; or turn push_to_hub off."
        ) from error


def publish(run: run_folder.RunFolder, config: TrainConfig, repository: str) -> None:
    """Write the card into the run folder, and upload the files that `UPLOADED` names. Raises RunError if the upload
    fails. The run folder has the pipeline in any case."""
    card(run).save(run.folder / CARD)
    try:
        upload_folder(repo_id=repository, folder_path=run.folder, commit_message="End of training",
                      allow_patterns=UPLOADED, ignore_patterns=NOT_UPLOADED, token=_token(config))  # fmt: skip
    except Exception as error:
        opened = f"run = folder.RunFolder({str(run.folder)!r})"
        again = f"from sdnb.run import folder, hub; {opened}; hub.publish(run, run.config, {repository!r})"
        raise RunError(
            f"the training is complete and saved, but its upload to {repository} failed: {error}\n"
            f"Try again with: python -c {shlex.quote(again)}"
        ) from error


def _token(config: TrainConfig) -> str | None:
    return config.hub_token.get_secret_value() if config.hub_token else None


def card(run: run_folder.RunFolder) -> ModelCard:
    """The model card of a complete run."""
    config, environment, drawn = run.config, run.environment, run.drawn
    model, data = config.pretrained_model_name_or_path, config.dataset_name or config.train_data_dir or ""
    about = ModelCardData(
        base_model=model if _on_hub(model) else None, datasets=[data] if _on_hub(data) else None,
        license="creativeml-openrail-m" if _on_hub(model) else None,
        library_name="diffusers", pipeline_tag="text-to-image", tags=[*TAGS, *["lora"] * config.lora],
    )  # fmt: skip
    packages = environment["packages"]
    shown = dict(
        adapter="An adapter (LoRA) of " if config.lora else "", model=_name(model), data=_name(data),
        steps=len(run.steps),
        images=[] if drawn.empty else drawn[(drawn.step == drawn.step.max()) & (drawn.scale == 1)].to_dict("records"),
        results=[vars(row) for row in measure(run).results],
        ranks=config.num_processes, device=environment["devices"]["names"][0],
        versions=", ".join(f"{name} {packages[name]}" for name in ("torch", "diffusers", "transformers", "accelerate")),
        settings={name: _name(value) for name, value in config.trajectory().items() if value is not None},
    )  # fmt: skip
    return ModelCard.from_template(about, template_path=str(Path(__file__).with_name("card.md.j2")), **_escaped(shown))


def _escaped(value: Any) -> Any:
    """Texts escaped for Markdown and HTML; file names stay."""
    if isinstance(value, dict):
        return {_escaped(name): text if name == "file" else _escaped(text) for name, text in value.items()}
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{sign}" if sign in "|[]`*_\\" else sign for sign in escaped)


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).expanduser().exists()


def _name(value: Any) -> Any:
    """A folder's name only: its path is private."""
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value
