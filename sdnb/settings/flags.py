"""The command line: one flag per setting, with the reference's names."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from pydantic.fields import FieldInfo

from sdnb.errors import ConfigError
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import GROUPS

# Abbreviations that users of the reference write.
_SHORT = {"resume_from_checkpoint": ["--resume"], "validation_prompts": ["--validation_prompt"]}


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Settings from a command line, such as that of diffusers' `train_text_to_image.py`. `--help` prints and exits.
    Raises ConfigError if a flag is unknown or lacks its value, or a setting is wrong."""
    parser = _Parser(
        prog="python -m sdnb.train",
        usage="python -m sdnb.train --pretrained_model_name_or_path … --dataset_name … [--setting value …]\n"
        "       accelerate launch [its own options] -m sdnb.train --pretrained_model_name_or_path … …",
        description="Fine-tune Stable Diffusion with the settings of diffusers' train_text_to_image.py. The run "
        "folder, output_dir, gets the measurements and the trained pipeline.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,  # a misspelt flag must not become another one
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=46, width=120),
    )
    parser.add_argument("--steps", type=_int, metavar="INT", help="short for --max_train_steps")
    for group in GROUPS:
        shown = parser.add_argument_group(group.__name__.removesuffix("Settings").lower())
        for name, field in group.model_fields.items():
            shown.add_argument(f"--{name}", *_SHORT.get(name, ()), **_options(field))
    given = vars(parser.parse_args(arguments))
    return TrainConfig(**{name: None if value == "None" else value for name, value in given.items()})


def command_line(settings: dict[str, Any]) -> list[str]:
    """The flags that give these settings, except for defaults. `parse` reads them back."""
    flags: list[str] = []
    for name, value in settings.items():
        default = TrainConfig.model_fields[name].default
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        unknown = message.rpartition("unrecognized arguments: ")[2].split()[0].partition("=")[0]
        near = [flag for flag in flags if flag.startswith(unknown)] or difflib.get_close_matches(unknown, flags, n=1)
        near = near if "unrecognized" in message else []
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise ConfigError(f"{message}; {hint}")
