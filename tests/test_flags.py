"""The command line: the reference's flags, all of them, with its defaults."""

import gc
import pydoc
import re
import sys

import pytest
import yaml

import sdnb
from sdnb.__main__ import main
from sdnb.errors import ConfigError
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import GROUPS
from sdnb.settings.flags import parse
from sdnb.settings.notebook import from_notebook

MODEL_AND_DATA = ["--pretrained_model_name_or_path=tiny", "--dataset_name=openmoji"]

# Every flag of train_text_to_image.py of diffusers v0.26.3 with its default, and the five that came later.
REFERENCE = dict(
    input_perturbation=0, revision=None, variant=None, dataset_config_name=None, train_data_dir=None,
    image_column="image", caption_column="text", max_train_samples=None, validation_prompts=None,
    output_dir="sd-model-finetuned", cache_dir=None, seed=None, resolution=512, center_crop=False, random_flip=False,
    train_batch_size=16, num_train_epochs=100, max_train_steps=None, gradient_accumulation_steps=1,
    gradient_checkpointing=False, learning_rate=1e-4, scale_lr=False, lr_scheduler="constant", lr_warmup_steps=500,
    snr_gamma=None, use_8bit_adam=False, allow_tf32=False, use_ema=False, non_ema_revision=None,
    dataloader_num_workers=0, adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=1e-2, adam_epsilon=1e-8,
    max_grad_norm=1.0, push_to_hub=False, hub_token=None, prediction_type=None, hub_model_id=None, logging_dir="logs",
    mixed_precision=None, report_to="tensorboard", local_rank=-1, checkpointing_steps=500, checkpoints_total_limit=None,
    resume_from_checkpoint=None, enable_xformers_memory_efficient_attention=False, noise_offset=0, validation_epochs=5,
    tracker_project_name="text2image-fine-tune", dream_training=False, dream_detail_preservation=1.0,
    image_interpolation_mode="bilinear", offload_ema=False, foreach_ema=False,
)  # fmt: skip


def test_the_defaults_are_the_references():
    made = parse(MODEL_AND_DATA)
    assert {name: getattr(made, name) for name in REFERENCE} == REFERENCE


def test_the_reference_command():
    line = (
        "--pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4 "
        "--dataset_name=lambdalabs/pokemon-blip-captions --use_ema --resolution=512 --center_crop --random_flip "
        "--train_batch_size=8 --gradient_accumulation_steps=4 --max_train_steps=101 --learning_rate=1e-05 "
        "--max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0 --output_dir=sd-pokemon-model"
    )
    made = parse(line.split())
    assert made.use_ema and made.center_crop and made.random_flip and not made.scale_lr
    assert (made.learning_rate, made.max_grad_norm, made.max_train_steps) == (1e-5, 1.0, 101)
    assert made.output_dir == "sd-pokemon-model"


def test_each_setting_is_a_flag_and_says_the_same(tmp_path):
    """What a settings file says, a command line can say."""
    values = dict(
        max_train_samples=7, variant="fp16", validation_prompts=["a cat", "b"], seed=3, snr_gamma=5.0, noise_offset=0.1,
        mixed_precision="bf16", prediction_type="epsilon", checkpoints_total_limit=2, lr_scheduler="cosine",
        report_to="comet", num_processes=2, main_process_port=29511, dream_training=True, target_loss=0.5,
    )  # fmt: skip
    flags = []
    for name, value in values.items():
        flags += [f"--{name}"] + ([] if value is True else value if isinstance(value, list) else [str(value)])
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump({"pretrained_model_name_or_path": "tiny", "dataset_name": "openmoji", **values})
    )
    made = parse([*MODEL_AND_DATA, *flags])
    assert made == TrainConfig.from_yaml(tmp_path / "settings.yaml")
    assert made.report_to == "comet_ml"


def test_none_is_no_value():
    assert parse([*MODEL_AND_DATA, "--output_dir=None", "--seed=None"]).output_dir is None


def test_steps_is_short_for_max_train_steps():
    assert parse([*MODEL_AND_DATA, "--steps=3"]).max_train_steps == 3


def test_help_has_every_setting_once_in_its_group(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for group in GROUPS:
        assert f"\n{group.__name__.removesuffix('Settings').lower()}:\n" in shown
    for name in TrainConfig.model_fields:
        assert sum(shown.count(f"\n  --{name}{end}") for end in (" ", "\n", ", --no-")) == 1
    assert "Undefined" not in shown


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--max_train_stpes=3"], "--max_train_stpes=3; did you mean --max_train_steps?"),
        (["--xyzzy"], "--help lists what there is"),
        (["--seed"], "--seed: expected one argument"),
        (["--steps=3", "--max_train_steps=4"], "steps and max_train_steps are the same setting"),
        (["--seed=x"], "seed = 'x'"),
        (["--train_batch_size=2.5"], "train_batch_size = '2.5'"),
        (["--lr_scheduler=cosin"], "lr_scheduler = 'cosin'"),
        (["--dream_training", "--prediction_type=v_prediction"], "dream_training is not defined for"),
        (["--num_machines=2"], "num_machines > 1 needs main_process_ip"),
        (
            ["--num_machines=2", "--main_process_ip=1.2.3.4", "--num_processes=3"],
            "must be a multiple of num_mach",
        ),
        (["--machine_rank=1"], "machine_rank = 1 is out of range: with num_machines = 1 it must be 0"),
    ],
)
def test_a_wrong_command_line_is_named(flags, said):
    with pytest.raises(ConfigError) as error:
        parse([*MODEL_AND_DATA, *flags])
    assert said in str(error.value)


def test_a_token_is_shown_nowhere(tmp_path):
    made = parse([*MODEL_AND_DATA, "--hub_token=hf_secret"])
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    shown = [repr(made), str(made), str(made.model_dump()), made.model_dump_json(), str(made.trajectory())]
    assert not any("hf_secret" in text for text in [*shown, (tmp_path / "config.yaml").read_text()])
    assert made.updated(seed=1).hub_token.get_secret_value() == "hf_secret", "and is there to be used"
    with pytest.raises(ConfigError) as error:
        TrainConfig(pretrained_model_name_or_path="tiny", dataset_name="openmoji", hub_token=["hf_secret"])
    assert "hub_token" in str(error.value) and "hf_secret" not in str(error.value)


def test_a_token_in_a_notebook_is_refused():
    cell = "# Parameters of this run\nhub_token = 'hf_secret'"
    namespace = {"In": [cell], "hub_token": "hf_secret", "pretrained_model_name_or_path": "tiny"}
    with pytest.raises(ConfigError, match="HF_TOKEN") as error:
        from_notebook(namespace)
    assert "hf_secret" not in str(error.value)


def test_an_abbreviation_is_an_error_with_a_hint_but_for_two_that_are_in_use():
    with pytest.raises(ConfigError, match="unrecognized arguments: --step; did you mean --steps"):
        parse(["--pretrained_model_name_or_path=tiny", "--dataset_name=openmoji", "--step", "5"])
    with pytest.raises(ConfigError, match="did you mean --gradient_accumulation_steps"):
        parse(["--pretrained_model_name_or_path=tiny", "--dataset_name=openmoji", "--gradient_acc=5"])
    made = parse(["--pretrained_model_name_or_path=tiny", "--dataset_name=openmoji", "--resume=latest",
                  "--validation_prompt", "a sun"])  # fmt: skip
    assert made.resume_from_checkpoint == "latest" and made.validation_prompts == ("a sun",)


def test_a_parameter_file_and_flags_that_override_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("pretrained_model_name_or_path: tiny\ndataset_name: openmoji\nsteps: 7\nuse_ema: true\nseed: 3\n")
    made = parse([str(file), "--max_train_steps=9", "--seed=4"])
    assert (made.max_train_steps, made.seed, made.use_ema) == (9, 4, True)
    assert parse(["params/demo.yaml", "--steps", "5"]).max_train_steps == 5, "one that comes with sdnb"
    with pytest.raises(ConfigError, match=r"demo\.yml: there is no such file.* comes with sdnb: .*params/demo\.yaml"):
        parse(["params/demo.yml"])
    with pytest.raises(ConfigError, match="'True' is neither a flag nor a YAML file"):
        parse([*MODEL_AND_DATA, "--use_ema", "True"])


def test_help_lists_the_settings_in_their_groups():
    """Not what they inherit from pydantic."""
    said = pydoc.render_doc(TrainConfig, renderer=pydoc.plaintext)
    assert re.search(r"Training\n.*\n? *.*train_batch_size = 16: ", said, re.S)
    assert "model_dump" not in said and "model_config" not in said
    said = pydoc.render_doc(sdnb.train, renderer=pydoc.plaintext)
    assert "train_batch_size=16" in said and "train_batch_size = 16: " in said and "steps=None" in said


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["trian"], 2, "did you mean train?"),
        (["train"], 2, "there are no settings.* sdnb train params/demo.yaml"),
        (["train", *MODEL_AND_DATA, "--steps", "ten"], 2, "steps = 'ten': input should be a valid integer"),
        (["report", "nothing.ipynb"], 1, "nothing.ipynb: cannot be read"),
        (["report", "a", "--format", "jsn"], 2, "did you mean json?"),
        (["runs", "nowhere"], 1, "nowhere: there is no such folder"),
        (["compare", "published"], 1, "a comparison needs two runs"),
        (["import", "nothing.log", "--exmples", "3"], 2, "unrecognized arguments: --exmples 3"),
    ],
)
def test_wrong_usage_and_failures_have_their_status_and_one_line(capsys, monkeypatch, arguments, status, said):
    monkeypatch.setattr("os._exit", sys.exit)  # of a rank
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    gc.enable()  # a rank does without until it trains
    errors = capsys.readouterr().err
    assert ended.value.code == status
    assert re.search(said, errors) and len(errors.splitlines()) == 1 and errors.startswith("error: ")


def test_a_shell_completes_commands_and_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert "--train_batch_size" in script and "captions" in script
