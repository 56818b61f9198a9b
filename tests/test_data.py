import json
import os
import shutil
import subprocess
import threading

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from pretraining import captions
from sdnb.__main__ import main
from sdnb.data import openmoji
from sdnb.data.image_captions import first_caption
from sdnb.data.loading import load_data
from sdnb.data.training_set import TrainingSet
from sdnb.data.transforms import centre, crop, draw_corner, draw_mirrored, normalize, resize, to_tensor
from sdnb.errors import DataError
from sdnb.models.pipeline import load_parts
from sdnb.settings.config import TrainConfig


def config(**settings):
    return TrainConfig(**{"pretrained_model_name_or_path": "tiny", "resolution": 64, **settings})


def load_folder(folder, **settings):
    return load_data(config(train_data_dir=str(folder), **settings)).train


def test_the_embedded_set():
    splits = load_data(config(dataset_name="openmoji"))
    assert len(splits.train) == 833
    assert len(splits.held_out) == 1918 - 833
    assert not set(splits.train.captions) & set(splits.held_out.captions)
    assert splits.train.image(0).size == (64, 64)
    heart = [*splits.train.captions, *splits.held_out.captions].index("red heart")
    image = splits.train.image(heart) if heart < 833 else splits.held_out.image(heart - 833)
    red, green, blue = image.getpixel((32, 32))
    assert red > 200 and green < 120 and blue < 120, "a red heart is red in its middle"
    assert image.getpixel((0, 0)) == (255, 255, 255), "on white"


def test_the_embedded_set_has_no_skin_tone_variants():
    assert len(openmoji.named_drawings()) == 1918
    assert not [caption for _, caption in openmoji.named_drawings() if "skin tone" in caption]


def test_the_same_images_by_night():
    day, night = (load_data(config(dataset_name=name)) for name in (openmoji.PLAIN, openmoji.NIGHT))
    assert night.train.captions == [f"{caption}, night style" for caption in day.train.captions]
    assert len(night.held_out) == len(day.held_out)
    for row in (0, 100, 832):
        light, dark = (np.asarray(splits.train.image(row), dtype=float) for splits in (day, night))
        assert (light[0, 0] == 255).all() and tuple(dark[0, 0]) == openmoji._SKY
        assert dark.mean() < 0.6 * light.mean()
        outlines = light.max(2) == 0
        assert (dark[outlines] == openmoji._OUTLINE).all()


def test_what_the_embedded_model_was_trained_on():
    splits = load_data(config(dataset_name=str(captions.folder(64))))
    assert (len(splits.train), len(splits.held_out)) == (1918 - captions.NEVER_SEEN, captions.NEVER_SEEN)
    names, held_out = ({first_caption(one) for one in part.captions} for part in (splits.train, splits.held_out))
    day = load_data(config(dataset_name=openmoji.PLAIN))
    assert set(day.train.captions) <= names, "what the main job trains on, it has seen by day"
    assert held_out <= set(day.held_out.captions)
    several = {first_caption(one): one for one in splits.train.captions}
    assert several["blue heart"] == ["blue heart", "blue heart", "blue heart, day style", "blue heart, dark blue"]
    assert {"flag of France", "France, dark blue and red", "dark blue France"} <= set(several["France"])


def test_the_embedded_set_at_another_resolution():
    assert load_data(config(dataset_name="openmoji", resolution=32)).train.image(5).size == (32, 32)


def test_fewer_examples(image_folder):
    assert len(load_folder(image_folder(5), max_train_samples=3, seed=1)) == 3
    one, other = (load_folder(image_folder(9, name=name), max_train_samples=4).captions for name in ("a", "b"))
    assert list(one) == list(other), "without a seed too, on every rank and when it is resumed"
    with pytest.raises(DataError, match="max_train_samples = 9.* has 5"):
        load_folder(image_folder(5, name="more"), max_train_samples=9)


def test_a_data_set_by_folder_has_its_held_out_split(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / split / "a.png")
        (tmp_path / split / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "black"}\n')
    splits = load_data(config(dataset_name=str(tmp_path)))
    assert (len(splits.train), len(splits.held_out)) == (1, 1)


def write_metadata(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def test_an_image_that_does_not_decode_is_named(image_folder):
    folder = image_folder(3)
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:60])
    images = load_folder(folder)
    images.image(0)
    with pytest.raises(DataError, match=r"row 1.*001\.png.*cannot be used"):
        images.image(1)


def test_an_image_with_deep_pixels_is_named(image_folder):
    folder = image_folder(1)
    Image.new("I;16", (64, 64), 40000).save(folder / "000.png")
    with pytest.raises(DataError, match="row 0.*deeper than 8 bits"):
        load_folder(folder).image(0)


def test_a_missing_caption_is_named(image_folder):
    folder = image_folder(2)
    write_metadata(folder, {"file_name": "000.png", "text": "a"}, {"file_name": "001.png", "text": None})
    with pytest.raises(DataError, match=r"row 1.*001\.png.*is None"):
        load_folder(folder)


def test_an_image_without_a_line_is_named(image_folder):
    folder = image_folder(2)
    write_metadata(folder, {"file_name": "000.png", "text": "a"})
    with pytest.raises(DataError, match=r"1 of 2 images have no caption: 001\.png"):
        load_folder(folder)


def test_a_folders_name_is_no_pattern(image_folder, tmp_path):
    folder = image_folder(2).rename(tmp_path / "pictures [1]*")
    assert len(load_folder(folder)) == 2


def test_linked_and_hidden_images(image_folder, tmp_path):
    folder = image_folder(2)
    (tmp_path / "elsewhere.png").write_bytes((folder / "001.png").read_bytes())
    (folder / "001.png").unlink()
    (folder / "001.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "000.png").write_bytes((folder / "000.png").read_bytes())
    assert len(load_folder(folder)) == 2


def test_lines_without_their_images_are_named_before_the_start(image_folder):
    folder = image_folder(1)
    write_metadata(folder, {"file_name": "000.png", "text": "a"}, {"file_name": "gone.png", "text": "b"}, {"text": "c"})
    with pytest.raises(
        DataError, match=r"2 of 3 images are missing: .*/images/gone\.png, row 2 has no file_name\. The"
    ):
        load_folder(folder)
    (folder / "000.png").rename(folder / "001.png")
    write_metadata(folder, *({"file_name": f"{n:03}.png", "text": "a"} for n in range(2, 9)))
    with pytest.raises(DataError, match=r"7 of 7 images are missing: .*/002\.png, .*/006\.png, …\. The folder"):
        load_folder(folder)


def test_names_that_count_from_the_folder_above(image_folder, tmp_path):
    """Each image has a line, so it does not lack a caption."""
    image_folder(1).rename(tmp_path / "train")
    write_metadata(tmp_path / "train", {"file_name": "train/000.png", "text": "a"})
    with pytest.raises(DataError, match=r"1 of 1 images are missing: .*/train/train/000\.png.*folder of a metadata"):
        load_folder(tmp_path)


def test_a_data_set_by_folder_without_its_image(image_folder):
    folder = image_folder(2)
    (folder / "001.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are missing: .*/001\.png"):
        load_data(config(dataset_name=str(folder)))


def test_images_in_other_columns_need_no_caption(image_folder):
    folder = image_folder(4)
    write_metadata(
        folder, {"file_name": "000.png", "mask_file_name": "001.png", "text": "a", "views_file_names": ["002.png"]},
        {"file_name": "002.png", "mask_file_name": "001.png", "text": "b", "views_file_names": ["000.png", "003.png"]},
    )  # fmt: skip
    assert len(load_folder(folder)) == 2
    assert load_folder(folder, image_column="mask").name_of(1).endswith("001.png)")


def test_what_is_no_image(image_folder):
    folder = image_folder(2)
    (folder / "001.png").unlink()
    os.mkfifo(folder / "001.png")
    with pytest.raises(DataError, match=r"001\.png is a FIFO, not an image"):
        load_folder(folder)


def test_links_that_lead_back(image_folder, caplog):
    folder = image_folder(2)
    (folder / "sub").mkdir()
    (folder / "sub" / "again").symlink_to(folder)
    assert len(load_folder(folder)) == 2
    assert "links to folders are not followed: sub/again" in caplog.text
    (folder / "001.png").unlink()
    (folder / "001.png").symlink_to("001.png")
    with pytest.raises(DataError, match=r"1 of 2 images are missing: .*/001\.png"):
        load_folder(folder)
    with pytest.raises(DataError, match="there is no such folder"):
        load_folder(folder / "001.png")


def test_a_single_parquet_file(image_folder, tmp_path):
    """As `datasets` writes it, and as others do, who do not say that the bytes are images."""
    files = sorted(image_folder(3).glob("*.png"))
    captions, content = [f"picture {number}" for number in range(3)], [file.read_bytes() for file in files]
    images = datasets.Dataset.from_dict({"image": [*map(str, files)], "text": captions})
    images.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    structs = [{"bytes": one, "path": None} for one in content]
    for name, column in (("bytes", content), ("structs", structs)):
        pyarrow.parquet.write_table(pyarrow.table({"image": column, "text": captions}), tmp_path / f"{name}.parquet")
    expected = [Image.open(file).convert("RGB").getpixel((0, 0)) for file in files]
    for name in ("train-00000-of-00001", "bytes", "structs"):
        loaded = load_data(config(dataset_name=str(tmp_path / f"{name}.parquet"))).train
        assert loaded.captions == captions
        assert [loaded.image(row).getpixel((0, 0)) for row in range(3)] == expected, name
    (tmp_path / "other.csv").write_text("image,text")
    with pytest.raises(DataError, match="is a file; give a .parquet file, a .tar"):
        load_data(config(dataset_name=str(tmp_path / "other.csv")))


def test_a_folder_of_parquet_files(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no images, but \.parquet files.* set dataset_name = "):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_sub_folders_are_splits(image_folder, tmp_path, name, caplog):
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 3), (name, 2)):
        image_folder(count, name=split).rename(data / split)
    splits = load_data(config(train_data_dir=str(data)))
    assert (len(splits.train), len(splits.held_out)) == (3, 2)
    assert not caplog.records
    image_folder(1, name="more").rename(data / "more")
    splits = load_data(config(train_data_dir=str(data)))
    assert (len(splits.train), splits.held_out) == (6, None)
    assert f"the images in {name}/ are trained on, too: more beside train/" in caplog.text


def test_splits_with_different_columns(image_folder, tmp_path):
    for split in ("train", "validation"):
        image_folder(2, name=split)
    write_metadata(tmp_path / "validation", *({"file_name": f"00{n}.png", "text": "a", "more": n} for n in (0, 1)))
    splits = load_data(config(train_data_dir=str(tmp_path)))
    assert (len(splits.train), len(splits.held_out)) == (2, 2)


def test_images_in_an_archive(image_folder, tmp_path):
    folder = image_folder(3)
    (tmp_path / "zipped").mkdir()
    shutil.make_archive(str(tmp_path / "zipped" / "images"), "zip", folder)
    zipped, plain = load_folder(tmp_path / "zipped"), load_folder(folder)
    assert zipped.captions[:] == plain.captions[:]
    assert (zipped.pixels_uint8(2) == plain.pixels_uint8(2)).all()
    assert zipped.pixels_digest() == plain.pixels_digest()


def test_captions_that_are_images(image_folder):
    with pytest.raises(DataError, match="caption_column = image: it holds images, not captions"):
        load_folder(image_folder(1), caption_column="image")


def test_images_that_a_run_has_drawn_are_no_data(image_folder):
    folder = image_folder(2)
    for samples in (folder / "samples", folder / "runs" / "one" / "samples"):
        samples.mkdir(parents=True)
        (samples / "step_2_0.png").write_bytes((folder / "000.png").read_bytes())
        for file in ("config.yaml", "environment.json"):  # a run that ends while it draws has no list of them yet
            (samples.parent / file).touch()
    assert len(load_folder(folder)) == 2


def test_postscript_is_refused_by_its_content(image_folder, monkeypatch):
    """Pillow would start Ghostscript."""
    folder = image_folder(1)
    Image.new("RGB", (8, 8)).save(folder / "000.eps")
    (folder / "000.eps").rename(folder / "000.png")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DataError, match=r"000\.png.*EPS is a program"):
        load_folder(folder).image(0)


def test_an_empty_folder(image_folder):
    folder = image_folder(0)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="needs images, and a metadata"):
        load_folder(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        load_folder(tmp_path / "nowhere")


def test_a_wrong_column_name_says_which_there_are(image_folder):
    with pytest.raises(DataError, match="caption_column = caption.*it has: image, text"):
        load_folder(image_folder(1), caption_column="caption")
    with pytest.raises(DataError, match="image_column = picture.*it has: image, text"):
        load_folder(image_folder(1, name="again"), image_column="picture")
    with pytest.raises(DataError, match="holds .*not images"):
        load_folder(image_folder(1, name="third"), image_column="text")


def test_the_vanished_data_set_names_what_to_use_instead():
    with pytest.raises(DataError) as error:
        load_data(config(dataset_name="lambdalabs/pokemon-blip-captions"))
    assert all(name in str(error.value) for name in ("naruto-blip-captions", "openmoji", "train_data_dir"))


def test_resize_keeps_the_shape_as_torchvision_does():
    # torchvision's Resize(64) makes the shorter side 64 and cuts the longer one to an integer.
    assert resize(Image.new("RGB", (100, 70)), 64).size == (int(64 * 100 / 70), 64)
    assert resize(Image.new("RGB", (70, 100)), 64).size == (64, int(64 * 100 / 70))
    same = Image.new("RGB", (64, 90))
    assert resize(same, 64) is same


def coordinates(width, height):
    """An image whose pixels tell where they were."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x, y, 0) for y in range(height) for x in range(width)])
    return image


def loaded(examples, rows):
    """As a training loads them."""
    (batch,) = torch.utils.data.DataLoader(examples, batch_sampler=[rows], collate_fn=examples.collate)
    return torch.stack([*batch["pixels"]])


def training_set(folder, threads=0, **settings):
    examples = load_folder(folder, **settings)
    return TrainingSet(examples, load_parts(examples.settings).tokenizer, threads=threads)


def test_the_centre_crop(image_folder):
    assert centre((100, 64), 64) == (18, 0)
    assert centre((64, 69), 64) == (0, 2), "2.5 rounds to 2"
    folder = image_folder(1)
    coordinates(100, 64).save(folder / "000.png")
    examples = training_set(folder, center_crop=True)
    assert loaded(examples, [0])[0, :, 0, 0].tolist() == [18, 0, 0]
    assert torch.equal(examples.examples.pixels_uint8(0), loaded(examples, [0])[0])


def test_the_random_crop_draws_row_then_column():
    torch.manual_seed(3)
    top, left = int(torch.randint(0, 70 - 64 + 1, (1,))), int(torch.randint(0, 100 - 64 + 1, (1,)))
    torch.manual_seed(3)
    assert draw_corner((100, 70), 64) == (left, top)
    state = torch.get_rng_state()
    assert draw_corner((64, 64), 64) == (0, 0)
    assert torch.equal(state, torch.get_rng_state()), "nothing to choose, nothing drawn"


def test_the_random_crop_is_where_it_was_drawn(image_folder):
    folder = image_folder(1)
    coordinates(100, 70).save(folder / "000.png")
    examples = training_set(folder)
    for seed in range(5):
        torch.manual_seed(seed)
        corner = draw_corner((int(64 * 100 / 70), 64), 64)
        torch.manual_seed(seed)
        drawn = examples[0]
        assert drawn.corner == corner
        whole = resize(coordinates(100, 70), 64)
        expected = np.asarray(whole)[corner[1] : corner[1] + 64, corner[0] : corner[0] + 64].transpose(2, 0, 1)
        assert np.array_equal(next(iter(examples.collate([drawn])["pixels"])), expected)


@pytest.mark.parametrize("center_crop", [True, False])
def test_a_skipped_batch_draws_the_same_numbers(image_folder, center_crop):
    examples = training_set(image_folder(3, (90, 70)), random_flip=True, center_crop=center_crop)
    states = []
    for skipped in (0, 1):
        torch.manual_seed(5)
        examples.begin_epoch(0, skipped)
        first = examples.collate([examples[0], examples[1]])
        assert (first == {}) == bool(skipped)
        second = loaded(examples, [2])
        states.append((torch.get_rng_state(), second))
    assert all(torch.equal(one, other) for one, other in zip(*states))


@pytest.mark.parametrize("center_crop", [True, False])
def test_threads_load_the_same_in_the_same_order(image_folder, center_crop):
    folder = image_folder(9, (90, 70))
    batches = []
    for threads in (0, 4):
        examples = training_set(folder, threads, random_flip=True, center_crop=center_crop)
        torch.manual_seed(1)
        batches.append([loaded(examples, rows) for rows in ([8, 1, 5], [0, 2, 3, 4, 6, 7])])
    assert all(torch.equal(one, other) for one, other in zip(*batches))


@pytest.mark.parametrize("center_crop", [True, False])
def test_images_are_loaded_at_the_same_time(image_folder, monkeypatch, center_crop):
    examples = training_set(image_folder(3, (90, 70)), 3, center_crop=center_crop)
    together, image = threading.Barrier(3, timeout=30), examples.examples.image

    def wait_for_the_others(row):
        together.wait()
        return image(row)

    monkeypatch.setattr(examples.examples, "image", wait_for_the_others)
    assert loaded(examples, [0, 1, 2]).shape == (3, 3, 64, 64)


@pytest.mark.parametrize("center_crop", [True, False])
def test_what_a_thread_cannot_load_is_named(image_folder, center_crop):
    folder = image_folder(3)
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:60])
    examples = training_set(folder, 2, center_crop=center_crop)
    with pytest.raises(DataError, match=r"row 1.*001\.png.*cannot be used"):
        loaded(examples, [0, 1, 2])


def test_the_interpolation_is_the_one_asked_for():
    pixels = torch.randint(0, 256, (80, 100, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    made = {
        mode: np.asarray(resize(image, 64, mode), dtype=int)
        for mode in ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
    }
    assert (made["bilinear"] == np.asarray(resize(image, 64))).all()
    assert (made["nearest"] == made["nearest_exact"]).all()
    assert len({made[mode].sum() for mode in made}) == 6


def test_pixels_and_flip():
    image = coordinates(64, 64)
    flipped = 0
    for seed in range(20):
        torch.manual_seed(seed)
        expected = torch.rand(1) < 0.5
        torch.manual_seed(seed)
        levels = crop(image, (0, 0), draw_mirrored(), 64)
        assert levels.shape == (3, 64, 64) and levels.dtype == torch.uint8
        assert levels[0, 0, 0] == (63 if expected else 0)
        assert levels[2].max() == 0
        flipped += bool(expected)
    assert 3 < flipped < 17


def test_levels_become_what_torchvision_makes_of_them():
    levels = torch.arange(256, dtype=torch.uint8)
    expected = (levels.float() / 255 - 0.5) / 0.5  # ToTensor, then Normalize([0.5], [0.5])
    assert torch.equal(normalize(levels), expected) and (normalize(levels[[0, 255]]) == torch.tensor([-1, 1])).all()
    assert torch.equal(to_tensor(Image.new("RGB", (2, 1), (0, 51, 255)))[:, 0, 1], expected[[0, 51, 255]])


def test_one_of_several_captions_is_drawn(image_folder):
    folder = image_folder(1)
    write_metadata(folder, {"file_name": "000.png", "text": ["red heart", "blue heart"]})
    images = training_set(folder)
    seen = {tuple(images.collate([images[0]])["input_ids"][0].tolist()) for _ in range(30)}
    assert len(seen) == 2


@pytest.fixture
def with_texts(image_folder):
    """Captions in .txt files beside the images, as kohya's scripts want them."""
    folder = image_folder(3)
    (folder / "metadata.jsonl").unlink()
    for index in range(3):
        (folder / f"{index:03}.txt").write_text(f"a picture, {index} ✓\n")
    return folder


def test_captions_in_text_files(with_texts):
    examples = load_data(config(train_data_dir=str(with_texts))).train
    assert examples.captions == ["a picture, 0 ✓", "a picture, 1 ✓", "a picture, 2 ✓"]
    assert examples.image(1).getpixel((0, 0)) == (37, 91, 128)


def test_captions_in_text_files_become_a_metadata_file(with_texts, capsys):
    before = load_data(config(train_data_dir=str(with_texts))).train
    main(["captions", str(with_texts)])
    assert f"written: {with_texts / 'metadata.jsonl'}" in capsys.readouterr().out
    after = load_data(config(train_data_dir=str(with_texts))).train
    assert after.captions == before.captions and after.digest() == before.digest()
    assert [after.image(row).tobytes() for row in range(3)] == [before.image(row).tobytes() for row in range(3)]
    with pytest.raises(SystemExit, match="1"):
        main(["captions", str(with_texts)])
    assert "has a metadata file already" in capsys.readouterr().err


def test_an_image_without_its_text_file_is_named(with_texts):
    (with_texts / "001.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images have no caption: 001\.png\. Others have a \.txt file"):
        load_data(config(train_data_dir=str(with_texts)))


def test_captions_in_text_files_of_two_splits(with_texts, tmp_path):
    folder = tmp_path / "splits"
    shutil.copytree(with_texts, folder / "train")
    shutil.copytree(with_texts, folder / "validation")
    splits = load_data(config(train_data_dir=str(folder)))
    assert len(splits.train) == len(splits.held_out) == 3
