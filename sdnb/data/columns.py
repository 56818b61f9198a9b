"""Finds the columns of a data set that have the images and their captions."""

import logging
from collections.abc import Iterator
from typing import Any

import datasets

from sdnb.errors import DataError
from sdnb.settings.fields import DataSettings

logger = logging.getLogger("sdnb")
_BYTES = (datasets.Value("binary"), datasets.Value("large_binary"))
_TEXTS = (datasets.Value("string"), datasets.Value("large_string"))
_SEVERAL = tuple(datasets.Sequence(kind) for kind in _TEXTS)


def describe(settings: DataSettings) -> str:
    """The data set's name in a message."""
    return f"data set {settings.dataset_name}" if settings.dataset_name else f"train_data_dir {settings.train_data_dir}"


def find_columns(features: datasets.Features | None, settings: DataSettings) -> tuple[str, str]:
    """The columns with the images and with the captions: those that the settings name. If there is none of a default
    name, but only one column with images, or with texts, it is that one. `json.caption` is the field `caption` of the
    column `json`. Raises DataError if a column is missing, or holds something else."""
    if features is None:
        raise DataError(f"{describe(settings)}: does not say which columns it has, so it cannot be streamed")
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    # A WebDataset's own columns are __key__ and __url__.
    texts = [name for name, kind in features.items() if kind in _TEXTS + _SEVERAL and not name.startswith("__")]
    fields = [*_fields(features)]
    image = _column("image_column", features, [*features], images, settings)
    caption = _column("caption_column", features, [*features, *fields], texts or fields, settings)
    if not isinstance(features[image], datasets.Image) and not is_file(features[image]):
        raise DataError(f"{describe(settings)}: column {image} holds {features[image]}, not images")
    if isinstance(features.get(caption), datasets.Image):
        raise DataError(f"{describe(settings)}: caption_column = {caption}: it holds images, not captions")
    return image, caption


def is_file(kind: Any) -> bool:
    """Whether a column holds files, which may be images. A parquet file that `datasets` did not write does not say that
    its bytes are images."""
    return kind in _BYTES or (isinstance(kind, dict) and {*kind} == {"bytes", "path"})


def value_of(row: dict[str, Any], column: str) -> Any:
    """The value in a column, or in a field of one."""
    if column in row:
        return row[column]
    name, _, field = column.partition(".")
    return (row[name] or {}).get(field)


def _fields(features: datasets.Features) -> Iterator[str]:
    """The texts in columns that have several fields."""
    for name, kind in features.items():
        if isinstance(kind, dict):
            yield from (f"{name}.{field}" for field, inner in kind.items() if inner in _TEXTS)


def _column(
    setting: str, features: datasets.Features, possible: list[str], found: list[str], settings: DataSettings
) -> str:
    column = getattr(settings, setting)
    if column in possible:
        return column
    if column == type(settings).model_fields[setting].default and len(found) == 1:
        logger.warning("%s = %s: there is no column %s, and no other of its kind", setting, found[0], column)
        return found[0]
    missing_metadata = "" if len(features) > 1 else " A folder needs a metadata.jsonl for captions."
    raise DataError(
        f"{setting} = {column}: {describe(settings)} has no such column; it has: {', '.join(possible)}. "
        f"Set {setting} to one of these.{missing_metadata}"
    )
