import os

import pytest
import yaml

from sdnb.errors import ConfigError
from sdnb.launch import sweep
from sdnb.machine import environment
from sdnb.machine.environment import Devices, resolved
from sdnb.settings.config import TrainConfig
from sdnb.settings.notebook import from_notebook

MODEL_AND_DATA = dict(pretrained_model_name_or_path="tiny", dataset_name="openmoji")


def config(**settings):
    return TrainConfig(**MODEL_AND_DATA, **settings)


def test_it_cannot_be_changed():
    with pytest.raises(ValueError):
        config().seed = 3


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(stpes=3), "stpes: there is no such setting; did you mean steps?"),
        (dict(learningrate=1), "did you mean learning_rate?"),
        (dict(zzz=1), "zzz: there is no such setting; the settings are: adam_beta1"),
        (dict(steps="3"), "steps = '3'"),
        (dict(steps=0), "steps = 0"),
        (dict(steps=2.5), "steps = 2.5"),
        (dict(train_batch_size=True), "train_batch_size = True"),
        (dict(resolution=100), "resolution = 100"),
        (dict(resolution=2**14), "resolution = 16384: input should be less than or equal to 8192"),
        (dict(train_batch_size=10**6), "train_batch_size = 1000000"),
        (dict(gradient_accumulation_steps=10**6), "gradient_accumulation_steps = 1000000"),
        (dict(steps=10**30), "steps = 1000000000000000000000000000000"),
        (dict(learning_rate="fast"), "learning_rate = 'fast'"),
        (dict(learning_rate=float("nan")), "learning_rate = nan"),
        (dict(snr_gamma=1e308), "snr_gamma = 1e+308"),
        (dict(dataset_config_name=["a" * 10**6]), f"['{'a' * 198}…: "),
        (dict(adam_beta1=1), "adam_beta1 = 1"),
        (dict(center_crop="maybe"), "center_crop = 'maybe'"),
        (dict(mixed_precision="fp61"), "mixed_precision = 'fp61'"),
        (dict(mixed_precision=True), "mixed_precision = True"),
        (dict(lr_scheduler="cosin"), "lr_scheduler = 'cosin'"),
        (dict(steps=3, max_train_steps=4), "steps and max_train_steps are the same setting"),
        (dict(train_data_dir="x"), "dataset_name = openmoji and train_data_dir exclude each other"),
        (dict(dataset_config_name="x"), "dataset_name = openmoji and dataset_config_name exclude each other"),
        (dict(dataset_name=None), "no data: give dataset_name"),
        (dict(seed="null"), "seed = 'null': write None"),
        (dict(validation_prompts="null"), "validation_prompts = 'null': write None"),
        (dict(output_dir=""), "output_dir = ''"),
        (dict(pretrained_model_name_or_path=None), "pretrained_model_name_or_path = None"),
    ],
)
def test_a_wrong_setting_is_named(settings, said):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{**MODEL_AND_DATA, **settings})
    assert said in str(error.value)


def test_every_wrong_setting_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        config(stpes=3, resolution=7, seed=-1)
    assert all(name in str(error.value) for name in ("stpes", "resolution", "seed"))


def test_what_yaml_makes_of_numbers_and_no(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "{pretrained_model_name_or_path: tiny, dataset_name: openmoji, learning_rate: 1e-5, "
        "mixed_precision: no, center_crop: yes, validation_prompts: [a, b]}"
    )
    made = TrainConfig.from_yaml(file, steps=5)
    assert (made.learning_rate, made.mixed_precision, made.center_crop) == (1e-5, "no", True)
    assert made.validation_prompts == ("a", "b")
    assert made.max_train_steps == 5


@pytest.mark.parametrize(
    "content",
    ["- a list", "a: [", "3", "resolution: 64\nname: M\xfcller", "seed: " + 5000 * "[", "1: 2", "null: 3", "? [a]\n: b",
     "seed: 2026-13-45", "no_such_setting: 1", "resolution: many"],
)  # fmt: skip
def test_a_settings_file_that_is_none(tmp_path, content):
    file = tmp_path / "settings.yaml"
    file.write_bytes(content.encode("latin1"))
    with pytest.raises(ConfigError, match=r"settings\.yaml: "):
        TrainConfig.from_yaml(file)
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        sweep.load(file)


def test_what_is_saved_makes_the_same_again(tmp_path):
    made = config(steps=3, validation_prompts=["ä", "no"], snr_gamma=5.0, mixed_precision="no")
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == made
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == set(TrainConfig.model_fields) - {"hub_token"}


def machine(kind, count=1, **what):
    return Devices(
        kind, ("a device",) * count, (80.0,) * count, (80.0,) * count, **{"bf16": True, "fp16": kind != "cpu", **what}
    )


def test_the_machine_settles_what_is_left_open():
    cpu, gpus = resolved(config(), machine("cpu")), resolved(config(), machine("cuda", 8))
    assert (cpu.mixed_precision, cpu.num_processes) == ("no", 1)
    assert (gpus.mixed_precision, gpus.num_processes) == ("fp16", 8)
    assert resolved(config(mixed_precision="no", num_processes=2), machine("cuda", 8)).mixed_precision == "no"


def test_what_the_machine_cannot_do():
    with pytest.raises(ConfigError, match="fp16 needs an accelerator.*use no"):
        resolved(config(mixed_precision="fp16"), machine("cpu"))
    with pytest.raises(ConfigError, match="bfloat16: use fp16"):
        resolved(config(mixed_precision="bf16"), machine("cuda", bf16=False))
    with pytest.raises(ConfigError, match="shows 1 GPU: use 1"):
        resolved(config(num_processes=2), machine("cuda"))


def test_more_loading_processes_than_the_cores_can_run():
    many = 16 * len(os.sched_getaffinity(0))
    environment.require(config(dataloader_num_workers=many))
    with pytest.raises(ConfigError, match=rf"dataloader_num_workers = {many + 1}: .* at most 16 per core, so {many}"):
        environment.require(config(dataloader_num_workers=many + 1))


@pytest.mark.parametrize("setting", ["output_dir", "train_data_dir", "cache_dir", "pretrained_model_name_or_path"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("a\0b", "cannot be the name of a folder"), (" ", "' ' cannot"), ("caf\udce9", "cannot be the name"),
        ("~nobody-here/x", "no user of this name"), ("a/" + "b" * 300, "too long"), ("a/" * 3000, "too long"),
    ],
)  # fmt: skip
def test_what_no_folder_can_be_named(setting, path, said):
    made = TrainConfig(**{**MODEL_AND_DATA, "dataset_name": "x", setting: path})
    with pytest.raises(ConfigError, match=rf"^{setting}: .*{said}") as error:
        environment.require(made)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "given, prompts",
    [
        ('["a cat", "a dog"]', ("a cat", "a dog")),
        ("['a cat', 'a dog']", ("a cat", "a dog")),
        ("a cat", ("a cat",)),
        ("[a cat]", ("[a cat]",)),
        ('["a cat"] and a dog', ('["a cat"] and a dog',)),
        ("[1, 2]", ("[1, 2]",)),
        (["a cat"], ("a cat",)),
    ],
)
def test_a_list_that_papermill_gives_as_text(given, prompts):
    assert config(validation_prompts=given).validation_prompts == prompts


def test_a_cpu_that_only_imitates_bfloat16_is_warned_of(caplog):
    for precision, bf16, warned in (("bf16", True, False), ("no", False, False), ("bf16", False, True)):
        assert resolved(config(mixed_precision=precision), machine("cpu", bf16=bf16)).mixed_precision == precision
        assert ("many times slower" in caplog.text) == warned


def test_an_epoch_of_the_published_run():
    """833 images on eight ranks: 14 micro-batches, so 4 optimizer steps an epoch and 26 epochs for 101 steps."""
    made = config(train_batch_size=8, gradient_accumulation_steps=4, num_processes=8, steps=101)
    assert made.global_batch == 256
    assert made.epoch(833).micro_batches == 14
    assert made.epoch(833).steps == 4
    assert made.total_steps(833) == 101
    assert config(num_train_epochs=3, train_batch_size=8, num_processes=8).total_steps(833) == 3 * 14


def test_whole_steps_run_on_over_the_end_of_an_epoch():
    settings = dict(train_batch_size=8, gradient_accumulation_steps=4, num_processes=8, whole_steps=True)
    made = config(**settings)
    assert made.epoch(833).micro_batches == 13, "the 833rd image waits for another epoch"
    assert made.epoch(833).steps == 3.25
    assert config(**settings, num_train_epochs=4).total_steps(833) == 13
    assert config(**settings, num_train_epochs=3).total_steps(833) == 9
    with pytest.raises(ConfigError, match="63 examples do not fill a micro-batch of 8 on each of 8 ranks"):
        made.epoch(63)


def notebook(*cells, **variables):
    return {"In": ["", *cells, "config = from_notebook(globals())"], **variables}


TAGGED = "# Parameters of this run\nsteps = 101\ndataset_name = 'openmoji'\npretrained_model_name_or_path = 'tiny'"


def test_a_notebooks_parameters():
    made = from_notebook(notebook(TAGGED, steps=101, **MODEL_AND_DATA))
    assert made.max_train_steps == 101


def test_the_notebooks_other_variables_are_its_own():
    namespace = notebook("total = 3.0", TAGGED, "config = 1", steps=1, total=3.0, config=1, **MODEL_AND_DATA)
    assert from_notebook(namespace).max_train_steps == 1


def test_an_unknown_parameter_of_papermills():
    namespace = notebook(TAGGED, "# Parameters\nstpes = 3\n", steps=101, stpes=3, **MODEL_AND_DATA)
    with pytest.raises(ConfigError, match="did you mean steps"):
        from_notebook(namespace)


def test_what_papermill_adds_to_the_parameters():
    added = dict(PAPERMILL_INPUT_PATH="a", PAPERMILL_OUTPUT_PATH="b")
    cell = "# Parameters\nPAPERMILL_INPUT_PATH = 'a'\nPAPERMILL_OUTPUT_PATH = 'b'\n"
    assert from_notebook(notebook(TAGGED, cell, steps=101, **MODEL_AND_DATA, **added)).max_train_steps == 101


def test_a_mistake_that_was_mended_is_forgotten():
    wrong = TAGGED.replace("steps", "stpes")
    namespace = notebook(wrong, TAGGED, steps=101, stpes=101, **MODEL_AND_DATA)
    assert from_notebook(namespace).max_train_steps == 101


@pytest.mark.parametrize(
    "injected, expected",
    [
        (dict(max_train_steps=7), dict(max_train_steps=7)),
        (dict(num_train_epochs=2), dict(max_train_steps=None, num_train_epochs=2)),
        (dict(train_data_dir="images"), dict(dataset_name=None, train_data_dir="images")),
        (dict(steps=5, num_train_epochs=2), dict(max_train_steps=5, num_train_epochs=2)),
    ],
)
def test_a_given_setting_replaces_the_notebooks_default_for_the_same_choice(injected, expected):
    cell = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in injected.items())
    made = from_notebook(notebook(TAGGED, cell, **{"steps": 101, **MODEL_AND_DATA, **injected}))
    assert {name: getattr(made, name) for name in expected} == expected


def test_a_config_yaml_of_version_0_1_is_a_parameter_file(caplog):
    cell = "# Parameters\nsteps = 7\nchannels_last = False\nonednn_linear = True"
    made = from_notebook(notebook(TAGGED, cell, **MODEL_AND_DATA, steps=7, channels_last=False, onednn_linear=True))
    assert made.max_train_steps == 7
    assert "these settings are gone and have no effect: channels_last, onednn_linear" in caplog.text
