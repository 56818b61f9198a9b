"""The command line: one flag per setting, with the reference's names."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic.fields import FieldInfo

from sdnb.errors import ConfigError
from sdnb.places import shipped
from sdnb.settings.config import TrainConfig, read_yaml
from sdnb.settings.fields import GROUPS, other_defaults

# Abbreviations that users of the reference write.
_SHORT = {"resume_from_checkpoint": ["--resume"], "validation_prompts": ["--validation_prompt"]}


def _help(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=46, width=120)


class Parser(argparse.ArgumentParser):
    """Raises ConfigError with a hint where argparse prints its usage and exits."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation is an error: a misspelt flag must not become another one.
        options.setdefault(
            "formatter_class", lambda prog: argparse.HelpFormatter(prog, max_help_position=46, width=120)
        )
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        if wrong := re.search(r"invalid choice: '(.*?)'(.*)", message):
            known = re.findall(r"[\w-]+", wrong[2].partition("choose from")[2])
        wrong = wrong or re.search(r"unrecognized arguments: ([^\s=]+)", message)
        near = wrong and [one for one in known if one.startswith(wrong[1])]
        near = near or (wrong and difflib.get_close_matches(wrong[1], known, n=1))
        hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists what there is"
        raise ConfigError(f"{message}; {hint}")


def parse(arguments: Sequence[str], lora: bool = False) -> TrainConfig:
    """Settings from the command line of `python -m sdnb.train`, such as that of diffusers' `train_text_to_image.py`;
    with `lora` of `python -m sdnb.train_lora` and `train_text_to_image_lora.py`. `--help` prints and exits. Raises
    ConfigError if a flag is unknown or lacks its value, or a setting is wrong."""
    module = f"sdnb.train{'_lora' if lora else ''}"
    parser = Parser(
        prog=f"python -m {module}",
        usage=f"python -m {module} --pretrained_model_name_or_path … --dataset_name … [--setting value …]\n"
        f"       accelerate launch [its own options] -m {module} --pretrained_model_name_or_path … …",
        description=DESCRIPTION,
    )
    add_settings(parser)
    if lora:
        parser.set_defaults(lora=True)
    return config_of(parser.parse_args(arguments))


DESCRIPTION = """Fine-tune Stable Diffusion with the settings of diffusers' train_text_to_image.py and
train_text_to_image_lora.py. The run folder, output_dir, gets the measurements and the trained weights."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, in groups, and a file of settings as the argument."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("file", nargs="?", help="a YAML file of settings, such as params/demo.yaml; flags override it")
    parser.add_argument("--steps", type=_int, metavar="INT", help="short for --max_train_steps")
    for group in GROUPS:
        shown = parser.add_argument_group(group.__name__.removesuffix("Settings").lower())
        for name, field in group.model_fields.items():
            shown.add_argument(f"--{name}", *_SHORT.get(name, ()), **_options(field))


def config_of(given: argparse.Namespace, **defaults: Any) -> TrainConfig:
    """The settings that `add_settings` has read. `defaults`: where they are not TrainConfig's. Raises ConfigError."""
    flags = {name: None if value == "None" else value for name, value in vars(given).items()}
    file = flags.pop("file", None)
    if file and not file.endswith((".yaml", ".yml")):  # a stray word, as in `--use_ema True`
        raise ConfigError(f"{file!r} is neither a flag nor a YAML file; --help lists the flags")
    settings = read_yaml(found(file)) if file else {}
    if "steps" in flags or "max_train_steps" in flags:
        settings = {name: value for name, value in settings.items() if name not in ("steps", "max_train_steps")}
    return TrainConfig(**{**defaults, **settings, **flags})


def found(file: str | Path) -> Path:
    """A parameter file by its path, or one that comes with sdnb. Raises ConfigError if there is neither."""
    path, ours = Path(file).expanduser(), shipped(str(file))
    if path.exists() or ours.exists():
        return path if path.exists() else ours
    known = ", ".join(f"params/{one.name}" for one in sorted(shipped("params").glob("[!a]*.yaml")))  # not accelerate's
    raise ConfigError(f"{file}: there is no such file, and none of this name comes with sdnb: {known}")


def command_line(settings: dict[str, Any]) -> list[str]:
    """The flags that give these settings, except for defaults. `parse` reads them back."""
    flags: list[str] = []
    others = other_defaults(settings.get("lora"))
    for name, value in settings.items():
        default = others.get(name, TrainConfig.model_fields[name].default)
        if value is None or value == default or (isinstance(value, list) and tuple(value) == default):
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def _options(field: FieldInfo) -> dict[str, Any]:
    """argparse's options for a setting. TrainConfig checks the values, because it knows more."""
    text = (field.description or "").replace("%", "%%")
    parts = _parts(field.annotation)
    if bool in parts:
        return dict(action=argparse.BooleanOptionalAction if field.default else "store_true", help=text)
    if not field.is_required() and field.default is not None:
        text += f" [{field.default}]"
    kinds = [kind.__name__.upper() for kind in (int, float) if kind in parts]
    choices = [part for part in parts if isinstance(part, str)]
    metavar = "{" + ",".join(choices) + "}" if choices else kinds[0] if kinds else "TEXT"
    several = dict(nargs="+") if tuple in parts else {}
    return dict(type=_int if metavar == "INT" else str, metavar=metavar, help=text, **several)


def _int(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return text  # TrainConfig says what is wrong with it


def _parts(annotation: Any) -> list[Any]:
    """The types in an annotation, and the texts that it allows."""
    origin = getattr(annotation, "__origin__", annotation)
    return [origin, *(part for argument in get_args(annotation) for part in _parts(argument))]
