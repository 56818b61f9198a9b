"""Loads the data set that the settings name: from the hub, a folder, or the embedded ones."""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from sdnb.data import openmoji, shards
from sdnb.data.columns import describe, find_columns, is_file
from sdnb.data.image_captions import ImageCaptions
from sdnb.data.image_folder import HELD_OUT, check_captions, check_files, splits_of, text_captions
from sdnb.data.stream import ImageStream, first_examples
from sdnb.errors import DataError
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import EMBEDDED_DATA

HELD_OUT_IMAGES = 64  # that the held-out loss uses
VANISHED = "lambdalabs/pokemon-blip-captions"


@dataclass
class Splits:
    """The examples to train on, and those held out, if there are any."""

    train: ImageCaptions | ImageStream
    held_out: ImageCaptions | None


def load_data(config: TrainConfig) -> Splits:
    """The data set that the settings name. Raises DataError if it is missing, empty, or lacks a column or caption."""
    if config.streaming:
        return _stream(config)
    splits = _load_splits(config)
    train = splits["train"]
    if config.max_train_samples is not None:
        if config.max_train_samples > len(train):
            raise DataError(f"max_train_samples = {config.max_train_samples}, but {describe(config)} has {len(train)}")
        # The same ones on every rank and after a resume, also without a seed.
        train = train.shuffle(seed=config.seed or 0).select(range(config.max_train_samples))
    held_out_splits = (splits[name] for name in HELD_OUT if name in splits)
    held_out = next((split for split in held_out_splits if len(split)), None)
    examples = ImageCaptions(train, config, "train")
    return Splits(examples, ImageCaptions(held_out, config, "held out") if held_out is not None else None)


def _load_splits(config: TrainConfig) -> datasets.DatasetDict:
    name, folder = config.dataset_name, config.train_data_dir
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise DataError(f"train_data_dir {folder}: there is no such folder (the current folder is {Path.cwd()})")
    source = _source(config)
    images = splits_of(Path(folder).expanduser()) if name is None else {}
    captions = {split: text_captions(path, files) for split, (path, files) in images.items()}
    if captions and all(texts is not None for texts in captions.values()):
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_dict({config.image_column: [*map(str, images[split][1])],
                                                config.caption_column: texts})
             .cast_column(config.image_column, datasets.Image()) for split, texts in captions.items()}
        )  # fmt: skip
    folders = {split: path for split, (path, _) in images.items()}
    if name in EMBEDDED_DATA:
        rendered = openmoji.folder(config.resolution, config.cache_dir, name)
        folders = {split: rendered / split for split in openmoji.SPLITS}
    if folders:
        # With the files named, `datasets` does not search the folder for splits.
        files = {split: f"{glob.escape(str(path))}/**" for split, path in folders.items()}
        source = {"path": "imagefolder", "data_files": files}
    try:
        if len(images) > 1:  # one by one: their metadata may have different columns
            splits = datasets.DatasetDict(
                {split: datasets.load_dataset("imagefolder", data_files=files[split], split="train",
                                              cache_dir=config.cache_dir) for split in files}
            )  # fmt: skip
        else:
            splits = datasets.load_dataset(**source, cache_dir=config.cache_dir)
    except Exception as error:  # `datasets` and its builders raise dozens of types
        raise _not_loaded(config, error) from error
    if "train" not in splits or not len(splits["train"]):
        raise DataError(
            f"{describe(config)}: has no examples in a split named train; its splits are: {dict(splits.num_rows)}"
        )
    column, _ = find_columns(splits["train"].features, config)
    splits = datasets.DatasetDict({split: _with_images(rows, column) for split, rows in splits.items()})
    for split, rows in splits.items():
        (shards.check_images if shards.ARCHIVE in rows.features else check_files)(describe(config), rows, column)
        if split in images:
            check_captions(describe(config), *images[split], rows)
    return splits


def _source(config: TrainConfig) -> dict[str, Any]:
    """What `datasets` loads. Raises DataError if a shard is missing or cut short."""
    name = config.dataset_name
    files = shards.shards_of(describe(config), name) if name else []
    folder = Path(name).expanduser() if name else None
    tars = folder.rglob("*.tar") if folder is not None and folder.is_dir() else files
    shards.check_tars(describe(config), [*tars])
    if files:
        builder = shards.BUILDERS[Path(files[0]).suffix]
        named = [file if "://" in file else glob.escape(file) for file in files]
        return {"path": builder, "data_files": {"train": named}}
    return {"path": name, "name": config.dataset_config_name, "data_dir": config.train_data_dir}


def _stream(config: TrainConfig) -> Splits:
    source = _source(config)
    try:
        builder = datasets.load_dataset_builder(**source, cache_dir=config.cache_dir)
        splits = builder.as_streaming_dataset()
    except Exception as error:
        raise _not_loaded(config, error) from error
    if "train" not in splits:
        raise DataError(f"{describe(config)}: has no split named train; its splits are: {', '.join(splits)}")
    files = (builder.config.data_files or {}).get("train", [])
    count = shards.rows_of(describe(config), files)
    if count is None and "train" in (builder.info.splits or {}):
        count = builder.info.splits["train"].num_examples or None
    train = ImageStream(splits["train"], config, config.seed or 0, files, count)
    some = (first_examples(splits[name], config, HELD_OUT_IMAGES) for name in HELD_OUT if name in splits)
    return Splits(train, next(filter(None, some), None))


def _with_images(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    return rows.cast_column(column, datasets.Image()) if is_file(rows.features.get(column)) else rows


def _not_loaded(config: TrainConfig, error: BaseException) -> DataError:
    while error.__cause__ is not None:
        error = error.__cause__
    return DataError(f"{describe(config)} cannot be loaded: {error}\n{_advice(config)}")


def _advice(config: TrainConfig) -> str:
    if config.dataset_name == VANISHED:
        return (
            f"{VANISHED} was taken down from the hub. Use lambdalabs/naruto-blip-captions, the embedded "
            f"{openmoji.PLAIN} (both as dataset_name), or a folder of images with a metadata.jsonl (as train_data_dir)."
        )
    if config.dataset_name is not None:
        embedded = ", ".join(EMBEDDED_DATA)
        return f"Give a hub id, a folder or files that `datasets` can load, or an embedded one: {embedded}."
    return (
        'The folder needs images, and a metadata.jsonl with one line {"file_name": "a.png", '
        f'"{config.caption_column}": "its caption"}} per image, or a .txt file with the caption beside each image.'
    )
