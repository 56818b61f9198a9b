"""What the encoders give is the same whether it is kept or not; what is kept is used, and nothing else is."""

import resource
import shutil
from pathlib import Path

import pytest
import torch
from training import train

from sdnb.data.loading import load_data
from sdnb.data.training_set import TrainingSet
from sdnb.machine import environment
from sdnb.models.encoders import Encoders
from sdnb.models.pipeline import load_parts, model_folder
from sdnb.settings.config import TrainConfig


@pytest.fixture
def settings(settings, image_folder, tmp_path):
    """11 images, wider than high, 2 × 2 a step: epochs of 3 steps."""
    return {
        **settings, "dataset_name": None, "train_data_dir": str(image_folder(11, (90, 70))), "random_flip": True,
        "cache_dir": str(tmp_path / "cache"), "steps": 7, "learning_rate": 1e-5,
    }  # fmt: skip


def tables(settings):
    return sorted((Path(settings["cache_dir"]) / "sdnb" / "encodings").glob("*.table"))


def encoders(settings, **changes):
    config = environment.resolved(TrainConfig(**{**settings, **changes}), environment.devices())
    parts, examples = load_parts(config), load_data(config).train
    made = Encoders(parts, examples, config, torch.device("cpu"))
    return made, TrainingSet(examples, parts.tokenizer, made.moments)


def gathered(examples, rows):
    batch = examples.collate([examples[row] for row in rows])
    return {**batch, "pixels": list(batch["pixels"])}


def micro_batch(encoders, examples, rows, seed=0):
    torch.manual_seed(seed)
    moments, hidden_states = encoders(gathered(examples, rows))
    draw = torch.rand(1)
    encoders.store_new()
    return moments, hidden_states, draw


def test_kept_or_not_the_encoders_give_the_same(settings):
    """As do all draws, and the order in memory that noise is drawn in."""
    kept, plain = encoders(settings), encoders(settings, encoder_cache_gib=0)
    for seed in range(3):  # the first time they are computed, later they are read
        one, other = (micro_batch(*which, [3, 1, 4, 1], seed) for which in (kept, plain))
        assert torch.allclose(one[0], other[0], atol=1e-5) and torch.allclose(one[1], other[1], atol=1e-5)
        assert one[0].stride() == other[0].stride()
        assert one[2] == other[2]


def test_each_view_and_caption_is_encoded_once(settings):
    kept, examples = encoders(settings)
    counts = []
    for seed in range(12):
        micro_batch(kept, examples, list(range(11)), seed)
        counts.append(kept.take_counts())
    assert counts[0] == (11, 11)
    assert sum(images for images, _ in counts) == 22 == examples.examples.views, "each image, and each of them mirrored"
    assert sum(captions for _, captions in counts) == 11
    anew, examples = encoders(settings)
    micro_batch(anew, examples, list(range(11)))
    assert anew.take_counts() == (0, 0), "a later run begins with them"


def test_what_a_step_computes_is_found_in_it_and_kept_after_it(settings):
    kept, examples = encoders(settings, random_flip=False)
    first = kept(gathered(examples, [0, 1, 2]))
    again = kept(gathered(examples, [2, 3, 0]))
    assert kept.take_counts() == (4, 4)
    for one, other in zip(first, again):
        assert torch.equal(one[[0, 2]], other[[2, 0]])
    for keep, computed in ((lambda: None, 3), (kept.store_new, 0)):
        keep()
        anew, examples = encoders(settings, random_flip=False)
        anew(gathered(examples, [0, 1, 2]))
        assert anew.take_counts() == (computed, computed)


def test_what_is_kept_is_the_same_in_any_company(settings, tmp_path):
    """To the bit: a run whose encodings another one has kept trains like one that began with none."""
    alone, together = (
        encoders(settings, random_flip=False, cache_dir=str(tmp_path / name)) for name in ("alone", "together")
    )
    one_by_one = [micro_batch(*alone, [row]) for row in range(7)]
    for which, column in enumerate(torch.cat(part) for part in list(zip(*one_by_one))[:2]):
        assert torch.equal(column, micro_batch(*together, list(range(7)))[which])


def test_kept_images_are_not_even_read(settings):
    kept, examples = encoders(settings, random_flip=False)
    before = micro_batch(kept, examples, [0, 1])
    shutil.rmtree(settings["train_data_dir"])
    after = micro_batch(kept, examples, [0, 1])
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    "change",
    [
        dict(resolution=32),
        dict(image_interpolation_mode="lanczos"),
        dict(mixed_precision="bf16"),
        dict(max_train_samples=5),
        dict(allow_tf32=True),
    ],
)
def test_what_they_depend_on_makes_other_tables(settings, change):
    encoders(settings)
    before = {path for path in tables(settings) if path.name.startswith("moments")}
    encoders(settings, **change)
    assert len({path for path in tables(settings) if path.name.startswith("moments")} - before) == 1


def test_other_images_under_the_same_names_make_other_tables(settings):
    from PIL import Image

    kept, examples = encoders(settings)
    before = micro_batch(kept, examples, [0])
    Image.new("RGB", (90, 70), "white").save(Path(settings["train_data_dir"]) / "000.png")
    after = micro_batch(*encoders(settings), [0])
    assert not torch.allclose(before[0], after[0], atol=1e-3)


def test_other_weights_make_other_tables(settings, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder(TrainConfig(**settings)), folder)
    mine = {**settings, "pretrained_model_name_or_path": str(folder)}
    before = micro_batch(*encoders(mine), [0])
    parts = load_parts(TrainConfig(**mine))
    parts.vae.quant_conv.weight.data *= 2
    parts.vae.save_pretrained(folder / "vae")
    after = micro_batch(*encoders(mine), [0])
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.equal(before[1], after[1]), "the text encoder is what it was"


def test_a_torn_row_is_computed_again(settings):
    """Also where nothing said so before the images of the batch were loaded."""
    everything = list(range(11))
    kept, examples = encoders(settings, random_flip=False)
    before = micro_batch(kept, examples, everything)
    for path in tables(settings):
        content = bytearray(path.read_bytes())
        row_bytes = (len(content) - 64) // 11 - 8
        for row in (5, 10):
            begins = len(content) - (11 - row) * row_bytes
            content[begins + 40 : begins + 80] = bytes(40)
        path.write_bytes(content)
    again, examples = encoders(settings, random_flip=False)
    assert not gathered(examples, everything)["loaded"]
    for torn in (2, 0):
        after = micro_batch(again, examples, everything)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
        assert again.take_counts() == (torn, torn)


def test_what_cannot_be_written_is_encoded_again(settings, caplog):
    kept, examples = encoders(settings, random_flip=False)
    before = micro_batch(kept, examples, [0, 1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        for _ in range(2):
            micro_batch(kept, examples, [2, 3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = micro_batch(kept, examples, [0, 1])
    assert torch.equal(before[0], after[0]) and kept.take_counts() == (2 + 2 * 2, 2 + 2 * 2)
    assert caplog.text.count("some encodings cannot be stored") == 1


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(center_crop=False), "the crop is random"),
        (dict(encoder_cache_gib=0), "encoder_cache_gib is 0"),
        (dict(encoder_cache_gib=1e-4), "encoder_cache_gib is 0.0001"),
    ],
)
def test_where_nothing_is_kept_it_is_said(settings, change, said):
    run = train(settings, steps=1, **change)
    assert said in run.log and not tables(settings)
    assert run.steps.encoded_images[0] == run.steps.images[0]


def test_a_second_run_trains_the_same_without_encoding(settings, tmp_path):
    plain = train(settings, encoder_cache_gib=0, output_dir=str(tmp_path / "plain"))
    first = train(settings, output_dir=str(tmp_path / "first"))
    second = train(settings, output_dir=str(tmp_path / "second"))
    assert first.steps.encoded_images.sum() > 11 and second.steps.encoded_images.sum() == 0
    assert list(first.steps.loss) == list(second.steps.loss), "bit for bit"
    assert list(first.steps.loss) == pytest.approx(list(plain.steps.loss), rel=1e-5)


def test_folding_changes_nothing_but_the_time(settings, tmp_path):
    """Short steps and a short micro-batch among them; three of four leave one over."""
    settings = {**settings, "gradient_accumulation_steps": 4, "encoder_cache_gib": 0, "center_crop": False}
    apart, *folded = (
        train(settings, fold_micro_batches=fold, output_dir=str(tmp_path / str(fold))) for fold in (1, 2, 3, 4)
    )
    assert set(apart.steps.images) == {8, 3}
    for run in folded:
        for name in ("loss", "train_loss", "step_loss", "grad_norm", "images", "micro_batches"):
            assert list(run.steps[name]) == pytest.approx(list(apart.steps[name]), rel=1e-4), (run, name)


def test_whole_steps_run_on_over_the_end_of_an_epoch(settings):
    run = train(settings, whole_steps=True)
    assert list(run.steps.images) == [4] * 7
    assert list(run.steps.epoch) == [0, 0, 0, 1, 1, 2, 2], "5 micro-batches an epoch, one image left for another"
