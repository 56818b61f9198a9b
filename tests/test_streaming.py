"""Data sets that are read while they are trained on: each example once, in an order that can be repeated."""

import functools
import io
import json
import tarfile
from collections import Counter

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from launching import at_step
from packaging.version import Version
from PIL import Image
from processes import processes_of
from test_checkpoints import STEPS, assert_same, power_off_after
from torch.utils.data import BatchSampler, DataLoader
from training import train

from sdnb.data import loading, openmoji
from sdnb.data.image_captions import Images
from sdnb.data.loading import load_data
from sdnb.data.micro_batches import MicroBatches
from sdnb.data.shards import expand_braces
from sdnb.data.stream import read_ahead
from sdnb.data.training_set import TrainingSet
from sdnb.errors import ConfigError, DataError, RunError
from sdnb.launch import notebook
from sdnb.launch.notebook import launch
from sdnb.launch.plan import prepare
from sdnb.models.pipeline import load_parts
from sdnb.settings.config import TrainConfig

COUNT = 13
SHARDS = (5, 4, 4)  # neither two nor three ranks can have as many of them


@functools.cache
def drawings(count=COUNT):
    """Names, files and captions. The images are not square, so that their crop is random."""
    folder = openmoji.folder(64) / "train"
    found = []
    for line in (folder / "metadata.jsonl").read_text().splitlines()[:count]:
        example = json.loads(line)
        file = io.BytesIO()
        Image.open(folder / example["file_name"]).resize((90, 70)).save(file, "PNG")
        found.append((example["file_name"].partition(".")[0], file.getvalue(), example["text"]))
    return found


def in_shards(examples, sizes=SHARDS):
    examples = iter(examples)
    return [[next(examples) for _ in range(size)] for size in sizes]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_tars(folder, split="train", extension="png", about=lambda caption: [("txt", caption.encode())], sizes=SHARDS):
    folder.mkdir(exist_ok=True)
    for number, shard in enumerate(in_shards(drawings(), sizes)):
        members = [
            (f"{key}.{ending}", content) for key, image, caption in shard
            for ending, content in [(extension, image), *about(caption)]
        ]  # fmt: skip
        write_tar(folder / f"{split}-{number:05}.tar", members)
    return folder


def write_parquet(folder):
    folder.mkdir()
    for number, shard in enumerate(in_shards(drawings())):
        images = [{"bytes": image, "path": f"{key}.png"} for key, image, _ in shard]
        rows = datasets.Dataset.from_dict({"image": images, "text": [caption for *_, caption in shard]})
        rows.cast_column("image", datasets.Image()).to_parquet(folder / f"train-{number:05}.parquet")
    return folder


@pytest.fixture(params=[write_tars, write_parquet])
def folder(request, tmp_path):
    return request.param(tmp_path / "shards")


def config(name, **settings):
    plain = dict(pretrained_model_name_or_path="tiny", resolution=64, streaming=True, shuffle_buffer=4, steps=9)
    return TrainConfig(**{**plain, "dataset_name": str(name), **settings})


def order_of(stream, epoch=0):
    stream.epoch = epoch
    return [example.caption for example in stream]


def test_an_epoch_has_each_example_once_in_an_order_of_its_own(folder):
    stream = load_data(config(folder, seed=1)).train
    first, second = order_of(stream), order_of(stream, 1)
    captions = [caption for *_, caption in drawings()]
    assert Counter(first) == Counter(second) == Counter(captions)
    assert len({*map(tuple, (first, second, captions))}) == 3
    again = load_data(config(folder, seed=1)).train
    assert order_of(again, 1) == second and order_of(again) == first
    assert order_of(load_data(config(folder, seed=2)).train) != first
    assert order_of(load_data(config(folder, seed=1, shuffle_buffer=9)).train) != first


def test_a_stream_has_the_images_and_captions_of_the_whole(folder, tmp_path):
    pattern = sorted(folder.iterdir())[0].with_stem("train-{00000..00002}")
    stream = load_data(config(pattern, cache_dir=str(tmp_path / "cache"))).train
    assert not [*(tmp_path / "cache").rglob("*.arrow")], "nothing is copied"
    whole = load_data(config(pattern, streaming=False, cache_dir=str(tmp_path / "cache"))).train
    assert load_data(config(folder)).train.digest() == stream.digest()
    assert len(whole) == COUNT and whole.captions == [caption for *_, caption in drawings()]
    for example in stream:
        row = whole.captions.index(example.caption)
        assert stream.resized(example).tobytes() == whole.resized(row).tobytes()
        assert stream.resized_size(example) == whole.resized_size(row) == whole.resized(row).size


def trained_on(examples, ranks, epochs, **settings):
    """For each rank and epoch the examples of its micro-batches, of which a step has two."""
    Accelerator(cpu=True)
    made = []
    for rank in range(ranks):
        rows = TrainingSet(examples, None)
        rows.collate = lambda draws: {"pixels": [], "captions": [draw.caption for draw in draws]}
        loader = DataLoader(
            rows, batch_sampler=BatchSampler(examples, 2, settings.get("whole_steps", False)), collate_fn=rows.collate
        )
        loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
        batches, epoch_of = MicroBatches(loader, 2, **settings), [[] for _ in range(epochs)]
        while (epoch := batches.epoch) < epochs:
            for batch, _ in batches.of_a_step():
                epoch_of[epoch].append(batch["captions"])
                epoch = min(batches.epoch, epochs - 1)
        made.append(epoch_of)
    return made


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_share_an_epoch(folder, ranks):
    stream = load_data(config(folder, seed=1)).train
    epoch_size = config(folder, train_batch_size=2, num_processes=ranks).epoch(COUNT)
    for epoch, of_ranks in enumerate(zip(*trained_on(stream, ranks, 2))):
        assert [len(batches) for batches in of_ranks] == [epoch_size.micro_batches] * ranks
        rounds = [caption for one in zip(*of_ranks) for batch in one for caption in batch]
        expected = order_of(stream, epoch)
        assert rounds[:COUNT] == expected, "all once, in their order"
        assert rounds[COUNT:] == expected[: epoch_size.images - COUNT], "as accelerate fills the last round"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_share_an_epoch_of_whole_micro_batches(folder, ranks):
    stream = load_data(config(folder, seed=1)).train
    for epoch, of_ranks in enumerate(zip(*trained_on(stream, ranks, 2, whole_steps=True))):
        rounds = [caption for one in zip(*of_ranks) for batch in one for caption in batch]
        assert rounds == order_of(stream, epoch)[: COUNT // (2 * ranks) * 2 * ranks]


def test_too_few_for_a_whole_micro_batch(tmp_path):
    stream = load_data(config(write_tars(tmp_path / "tars", sizes=(1,)))).train
    with pytest.raises(DataError, match="too few examples for one micro-batch"):
        trained_on(stream, 1, 1, whole_steps=True)


@pytest.fixture
def streamed(settings, folder):
    """Everything random there is."""
    return {
        **settings, "dataset_name": str(folder), "streaming": True, "shuffle_buffer": 4, "center_crop": False,
        "random_flip": True, "use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "noise_offset": 0.1,
        "steps": STEPS,
    }  # fmt: skip


@pytest.mark.parametrize(
    "folder, how",
    [
        (write_tars, {}),
        (write_parquet, dict(dataloader_num_workers=2)),
        (write_tars, dict(center_crop=True, whole_steps=True)),
    ],
    indirect=["folder"],
)
def test_resuming_anywhere_is_exact(streamed, tmp_path, how):
    streamed = {**streamed, **how}
    whole = train(streamed, output_dir=str(tmp_path / "whole"))
    kept = train(streamed, output_dir=str(tmp_path / "kept"), checkpointing_steps=1)
    assert_same(kept, whole)
    assert whole.steps.epoch.max() == 2 and "the encoders run for every micro-batch" in kept.log
    for step in (1, 2, 4, 6):
        folder = power_off_after(kept, step, tmp_path / f"from-{step}")
        assert_same(train(streamed, output_dir=str(folder), resume_from_checkpoint="latest"), whole)


@pytest.mark.parametrize("folder", [write_tars], indirect=True)
def test_what_is_replayed_is_not_decoded(streamed, tmp_path, monkeypatch):
    kept = train(streamed, checkpointing_steps=1, steps=4)
    folder, decoded, image = power_off_after(kept, 3, tmp_path / "resumed"), [], Images.image
    monkeypatch.setattr(Images, "image", lambda self, row: decoded.append(row) or image(self, row))
    train(streamed, output_dir=str(folder), resume_from_checkpoint="latest", steps=4)
    assert len(decoded) == COUNT - 3 * 4, "only the last image of the epoch was left"


@pytest.mark.parametrize("folder", [write_tars], indirect=True)
def test_two_ranks_one_of_them_killed(streamed, tmp_path, forked_ranks, monkeypatch):
    monkeypatch.setattr(notebook, "POLL_SECONDS", 0.05)
    streamed = {**streamed, "num_processes": 2}
    whole = launch(prepare(TrainConfig(**streamed)), show=lambda *_: None)
    folder = tmp_path / "killed"
    killed = TrainConfig(**{**streamed, "output_dir": str(folder), "checkpointing_steps": 1})
    with pytest.raises(RunError, match="it was killed by SIGKILL"):
        launch(prepare(killed), show=at_step(4, lambda: max(processes_of(folder), key=lambda one: one.pid).kill()))
    plan = prepare(killed.updated(resume_from_checkpoint="latest"))
    assert plan.resumes_after >= 3
    assert_same(launch(plan, show=lambda *_: None), whole)
    assert whole.steps.images[:2].tolist() == [8, 8]


def test_a_stream_of_unknown_length(settings, tmp_path):
    tars = write_tars(tmp_path / "tars")
    streamed = {**settings, "dataset_name": str(tars), "streaming": True}
    with pytest.raises(ConfigError, match="max_train_steps: set it, because the number of examples .* is unknown"):
        prepare(TrainConfig(**{**streamed, "steps": None}))
    plan = prepare(TrainConfig(**{**streamed, "steps": 6}))
    assert plan.examples.train.count is None
    assert plan.facts["an epoch"] == "ends with the stream; its length is unknown"
    assert plan.facts["data"] == f"{tars}: a stream to train on, 0 held out"
    images, captions, total = plan.sample_examples(3)
    assert captions == [caption for *_, caption in drawings(3)] and images[0].size == (90, 70) and total is None
    run = train(streamed, steps=6)
    assert run.steps.epoch.tolist() == [0, 0, 0, 0, 1, 1] and run.steps.images.tolist() == [4, 4, 4, 1, 4, 4]
    assert run.environment["data"]["images"] is None and "an unknown number of images to train on" in run.log
    assert run.environment["data"]["digest"].startswith("stream of 3 shards")


def test_parquet_files_know_their_length(settings, tmp_path):
    streamed = {**settings, "dataset_name": str(write_parquet(tmp_path / "p")), "streaming": True, "steps": None}
    plan = prepare(TrainConfig(**streamed, num_train_epochs=3))
    assert plan.examples.train.count == COUNT and plan.config.total_steps(COUNT) == 12
    assert plan.facts["the training"] == "12 steps, 3.0 epochs"


@pytest.mark.parametrize("folder", [write_tars], indirect=True)
def test_another_stream_is_not_resumed(streamed, folder):
    train(streamed, checkpointing_steps=1, steps=2)
    for change in (dict(shuffle_buffer=5), dict(streaming=False)):
        with pytest.raises(RunError, match=next(iter(change))):
            prepare(TrainConfig(**{**streamed, **change}, resume_from_checkpoint="latest"))
    first, *others = sorted(folder.iterdir())
    first.write_bytes(others[0].read_bytes())
    with pytest.raises(RunError, match="the data: stream of 3 shards"):
        prepare(TrainConfig(**streamed, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("streaming", [True, False])
def test_the_only_column_with_images_and_that_with_texts_are_found(tmp_path, streaming, caplog):
    def named(**fields):
        return lambda caption: [("json", json.dumps({**fields, "caption": caption}).encode())]

    caplog.set_level("INFO")
    for number, (about, settings) in enumerate([
        (lambda caption: [("txt", caption.encode()), ("json", b'{"a": "b"}')], {}),
        (named(score=0.5), {}),
        (named(url="there"), dict(caption_column="json.caption")),
    ]):  # fmt: skip
        tars = write_tars(tmp_path / f"tars-{number}", extension=("jpg", "webp", "png")[number], about=about)
        examples = load_data(config(tars, streaming=streaming, **settings)).train
        found = order_of(examples) if streaming else examples.captions
        assert Counter(found) == Counter(caption for *_, caption in drawings())
    assert "image_column = jpg: there is no column image" in caplog.text
    with pytest.raises(DataError, match=r"caption_column = text: .* it has: .*png.*json\.(url|caption), json\."):
        load_data(config(tars, streaming=streaming))


def test_held_out_images_are_loaded_and_no_more(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "HELD_OUT_IMAGES", 6)
    write_tars(tmp_path / "tars", split="validation")
    streamed = {**settings, "dataset_name": str(write_tars(tmp_path / "tars")), "streaming": True}
    splits = load_data(TrainConfig(**streamed))
    assert splits.held_out.captions == [caption for *_, caption in drawings(6)]
    run = train(streamed, validation_loss_steps=1)
    assert run.validation.images.tolist() == [6, 6, 6] and (run.validation.loss > 0).all()


def test_images_in_other_columns_are_not_decoded(tmp_path):
    """A broken image in another column stops nothing, and an empty held-out split is none."""
    (tmp_path / "data").mkdir()
    images = [{"bytes": image, "path": f"{key}.png"} for key, image, _ in drawings()]
    masks = [{"bytes": b"broken", "path": "mask.png"}] * COUNT
    rows = datasets.Dataset.from_dict({"image": images, "mask": masks, "text": [text for *_, text in drawings()]})
    rows = rows.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    rows.to_parquet(tmp_path / "data" / "train-0.parquet")
    rows.select([]).to_parquet(tmp_path / "data" / "test-0.parquet")
    splits = load_data(config(tmp_path / "data", streaming=True))
    assert len([*splits.train]) == COUNT and splits.held_out is None


def test_lists_of_captions_are_captions(tmp_path):
    (tmp_path / "data").mkdir()
    images = [{"bytes": image, "path": f"{key}.png"} for key, image, _ in drawings()]
    columns = {"image": images, "id": ["x"] * COUNT, "captions": [[text, "another"] for *_, text in drawings()]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "data" / "train-0.parquet")
    with pytest.raises(DataError, match="caption_column = text: .* has no such column; it has: image, id, captions"):
        load_data(config(tmp_path / "data", streaming=False))
    loaded = load_data(config(tmp_path / "data", streaming=False, caption_column="captions"))
    assert loaded.train.caption(0) == columns["captions"][0]


def test_a_number_of_examples(folder):
    stream = load_data(config(folder, max_train_samples=6)).train
    assert stream.count == 6
    assert sorted(order_of(stream, 1)) == sorted(order_of(stream)) == sorted(caption for *_, caption in drawings(6))
    with pytest.raises(DataError, match=f"max_train_samples = 50, but .* has {COUNT} examples"):
        order_of(load_data(config(folder, max_train_samples=50)).train)


def test_ranges_in_braces():
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{0..1}/{2..3}.tar") == ["0/2.tar", "0/3.tar", "1/2.tar", "1/3.tar"]
    assert expand_braces("{a,b}.tar") == ["{a,b}.tar"]


@pytest.mark.parametrize("streaming", [True, False])
def test_files_that_are_missing_or_cut_short(tmp_path, streaming):
    tars = write_tars(tmp_path / "tars")
    with pytest.raises(DataError, match=r"1 of 4 files are missing: .*train-00003\.tar"):
        load_data(config(tars / "train-{00000..00003}.tar", streaming=streaming))
    with pytest.raises(DataError, match="there is no file"):
        load_data(config(tars / "test-*.tar", streaming=streaming))
    second = tars / "train-00001.tar"
    for kept in (1024, 1500):  # after two members, and in one
        second.write_bytes(second.read_bytes()[:kept])
        for name in (tars, tars / "*.tar", second):
            with pytest.raises(DataError, match=r"1 of \d files are cut short: .*train-00001\.tar"):
                load_data(config(name, streaming=streaming))


def test_a_parquet_file_that_is_cut_short(tmp_path):
    second = write_parquet(tmp_path / "files") / "train-00001.parquet"
    second.write_bytes(second.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"train-00001\.parquet cannot be read"):
        load_data(config(second.parent))


@pytest.mark.parametrize("streaming", [True, False])
def test_what_cannot_be_used_is_named(tmp_path, streaming):
    members = [(f"{key}.{ending}", content) for key, image, caption in drawings(6)
               for ending, content in (("jpg", image), ("txt", caption.encode()))]  # fmt: skip
    names = [name for name, _ in members]

    def load(*changed):
        write_tar(tmp_path / "a.tar", changed)
        examples = load_data(config(tmp_path / "a.tar", streaming=streaming)).train
        return [examples.image(row) for row in (examples if streaming else range(len(examples)))]

    assert len(load(*members)) == 6
    with pytest.raises(DataError, match=rf"{names[10]} in .*a\.tar.*: the image cannot be used"):
        load(*members[:10], (names[10], b"no image"), members[11])
    with pytest.raises(DataError, match=rf"{names[10]} in .*a\.tar.*: the caption in column txt is None"):
        load(*members[:11])
    if Version(datasets.__version__).major < 3:
        return  # it raises a KeyError then
    key = names[10].partition(".")[0]
    expected = (
        rf"{key} in .*a\.tar: there is no image" if streaming else rf"1 of 6 images are missing.*: {key} in .*a\.tar"
    )
    with pytest.raises(DataError, match=expected):
        load(*members[:10], members[11])


def test_what_can_be_streamed(image_folder):
    for data in (dict(dataset_name="openmoji"), dict(dataset_name=None, train_data_dir=str(image_folder(1)))):
        with pytest.raises(ConfigError, match="streaming = True needs a dataset_name"):
            config("", **data)


def test_reading_ahead():
    read = []
    ahead = read_ahead((read.append(number) or number for number in range(100)), 5)
    assert [next(ahead) for _ in range(10)] == [*range(10)]
    ahead.close()
    assert read == [*range(len(read))] and 10 <= len(read) <= 15
    assert [*read_ahead(range(3), 5)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        [*read_ahead((1 // number for number in (1, 0, 1)), 5)]


def test_each_worker_loads_its_own(folder):
    """Examples are read by the rank, and decoded by its loading processes."""
    settings = config(folder, seed=1, center_crop=True)
    stream, tokenizer = load_data(settings).train, load_parts(settings).tokenizer
    made = []
    for workers in (0, 3):
        rows = TrainingSet(stream, tokenizer)
        loader = DataLoader(
            rows, batch_sampler=BatchSampler(stream, 2, False), collate_fn=rows.collate, num_workers=workers
        )
        made.append([torch.stack([*batch["pixels"]]) for batch in loader])
    assert len(made[0]) == 7
    assert all(torch.equal(one, other) for one, other in zip(*made))
