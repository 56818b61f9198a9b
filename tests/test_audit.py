"""The auditor: what it finds in published logs, each fault put into an honest log, and no alarm for honest runs."""

import json
import random
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from made_runs import make_run
from test_importing import HEADER, WITH_A_GAP
from test_logs import SUITE, bar, header
from torch.utils.flop_counter import FlopCounterMode

import sdnb
from sdnb.__main__ import main
from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN
from sdnb.auditing.checks import (
    DEVICES,
    EACH_STEP,
    FINAL_LOSS,
    GLOBAL_BATCH,
    NO_DRIFT,
    NO_REPEATS,
    NO_SAVING,
    NO_SMOOTHING,
    NO_WARMUP,
    OWN_IMAGES,
    RATE,
    RECORDED,
    SECONDS_PER_STEP,
)  # fmt: skip
from sdnb.auditing.claim import LOSS, PER_DEVICE, SECONDS, TOGETHER, claim_of
from sdnb.auditing.reach import POSSIBLE, UNET_TFLOP
from sdnb.errors import ConfigError, RunError
from sdnb.run import files
from sdnb.run import folder as run_folder

FAULTS = {
    OWN_IMAGES, NO_SMOOTHING, NO_WARMUP, NO_SAVING, NO_REPEATS, DEVICES, GLOBAL_BATCH, EACH_STEP, NO_DRIFT,
}  # fmt: skip


def audited(tmp_path, text, *claims, name="console.log", **about):
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else "\n".join(text))
    return sdnb.audit(path, claims, **about)


def verdicts(audit):
    return {finding.check: finding.verdict for finding in audit.findings}


def why(audit, check):
    return next(finding.why for finding in audit.findings if finding.check == check)


# ---- claims


CLAIMS = {
    (PER_DEVICE, 17.88): [
        "17.88 images/s per GPU",
        "IPS 17.88",
        "17.88 IPS",
        "IPS of 17.88",
        "17.88 img/s/gpu on 8 GPUs",
        "17.88 samples per second per accelerator",
        "17.88 img/s per A100",
        "17.88 images/s/H100",
        "17.88 images/s per worker",
        "17.88 images/s on one GPU",
        "17.88 images/s for each GPU",
        "per GPU: 17.88 images/s",
        "per-GPU throughput: 17.88 images/s",
        "17.88 fps per GPU",
        "17.88 images/second/GPU",
        "17.88 images per GPU per second",
        "17.88images/s/GPU",
        "SD v1-4 17.88 images/s per GPU",
        "A100-80GB: 17.88 img/s per GPU",
        "17.88 images per second and GPU",
    ],
    (TOGETHER, 143.1): [
        "143.1 images/s",
        "143.1 images/sec with 8 GPUs",
        "143.1 images/s (8 GPUs)",
        "8 GPUs: 143.1 images/s",
        "143.1 images/s on 8xA100",
        "143.1 images/s at batch 8 and 512x512",
        "143.1 images per second in total",
        "1.431e2 images/s",
    ],
    (SECONDS, 2.04): [
        "2.04 s/it",
        "2.04s/it",
        "2.040 s/iter",
        "2.04 seconds per iteration",
        "2.04 sec/step",
        "2,040 ms/step",
    ],
    (SECONDS, 2): ["0.5 it/s", "0.5 steps per second"],
    (LOSS, 0.0456): [
        "loss 0.0456",
        "loss: 0.0456",
        "loss 0.0456 at step 101",
        "train_loss 0.0456",
        "step_loss=0.0456",
        "loss 4.56e-2",
    ],
}  # fmt: skip


@pytest.mark.parametrize("expected", CLAIMS)
def test_claims(expected):
    for text in CLAIMS[expected]:
        claim = claim_of(text)
        assert claim.kind == expected[0] and claim.value == pytest.approx(expected[1]), text


@pytest.mark.parametrize("text", [
    "fast", "17.88", "8 or 9 images/s", "8 images/s or 9 images/s", "0 images/s", "17.88 parsecs",
    "images/s a GPU", "1.2k images/s", "-17.88 images/s", ">17 images/s", "val loss 0.05",
    "17,88 images/s per GPU", "17.88±0.1 images/s", "1 019.5 images/s", "MFU 43%",
    "9" * 400 + " images/s",
])  # fmt: skip
def test_claims_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="give one number with its unit"):
        claim_of(text)


def test_claims_of_a_machine():
    with pytest.raises(ConfigError, match="of one device or of all"):
        claim_of("143 images/s per node")


def test_the_rounding_of_a_claim():
    assert claim_of("17.88 IPS").rounding == pytest.approx(0.005) and claim_of("1,020 images/s").rounding == 0.5


# ---- what it must find in the suite's logs


def test_march_2024_on_eight_gpus(tmp_path):
    audit = audited(tmp_path, WITH_A_GAP, "17.88 images/s per GPU", "loss 0.0456", gpus=8)
    found = verdicts(audit)
    assert not audit.holds
    assert {check for check, verdict in found.items() if verdict == FAILS} == {
        RATE, FINAL_LOSS, OWN_IMAGES, NO_SMOOTHING, NO_REPEATS,
    }  # fmt: skip
    for figure in ("14.3", "13.95 over the whole training", "13.36 with the saving", "256 / 1.79 s/it"):
        assert figure in why(audit, RATE)
    assert "354 micro-batches of 8, not 404" in why(audit, OWN_IMAGES)
    assert "mean of all 101 steps is 2.01 s" in why(audit, NO_SMOOTHING)
    assert "one micro-batch of one rank at step 101; the mean of the last step is 0.05" in why(audit, FINAL_LOSS)
    assert found[DEVICES] == found[GLOBAL_BATCH] == HOLDS and found[EACH_STEP] == found[NO_DRIFT] == UNKNOWN


def test_march_2024_on_32_gpus_contradicts_its_log(tmp_path):
    states = bar(100, lambda step: 14.6 if step == 1 else 10.77)
    audit = audited(tmp_path, header(steps=100) + "\n".join(states), "2.962 images/s per GPU", "10.804 s/it", gpus=32)
    assert verdicts(audit)[DEVICES] == FAILS and verdicts(audit)[SECONDS_PER_STEP] == HOLDS
    assert why(audit, DEVICES) == "32 devices are claimed; the log has 8 processes and a global batch of 256"


def test_june_2024(tmp_path):
    audit = sdnb.audit("suite-2024-06-v1-4-8-gpus")
    assert [claim.text for claim in audit.case.claims] == ["15.69 images/s per GPU", "2.040 s/it"]
    assert (
        verdicts(audit)[OWN_IMAGES] == verdicts(audit)[NO_WARMUP] == FAILS
        and verdicts(audit)[SECONDS_PER_STEP] == HOLDS
    )
    assert "354 micro-batches of 8, not 404; in 206.0 s that is 13.74 images/s" in why(audit, OWN_IMAGES)
    same = sdnb.audit(
        None, ["15.69 images/s per GPU", "2.040 s/it"], gpus=8, steps=101, examples=833, train_batch_size=8,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    assert why(same, OWN_IMAGES) == why(audit, OWN_IMAGES)
    whole = audited(tmp_path, HEADER + SUITE, "4.664 images/s per GPU", "6.861 s/it", gpus=8)
    assert {RATE, OWN_IMAGES, NO_WARMUP} <= {check for check, one in verdicts(whole).items() if one == FAILS}
    assert "4.08 over the whole training" in why(whole, RATE) and verdicts(whole)[NO_SAVING] == HOLDS


def test_the_repeats_on_32_gpus():
    audit = sdnb.audit("suite-2024-06-v1-5-32-gpus")
    assert verdicts(audit)[NO_REPEATS] == FAILS and "(18.7%) are repeats" in why(audit, NO_REPEATS)
    assert verdicts(audit)[OWN_IMAGES] == verdicts(audit)[RATE] == HOLDS and verdicts(audit)[NO_WARMUP] == UNKNOWN


@pytest.mark.parametrize(("claim", "fault"), [
    ("13.95 images/s per GPU", {NO_WARMUP}), ("13.36 images/s per GPU", {NO_WARMUP, NO_SAVING}),
    ("15.92 images/s per GPU", {NO_WARMUP, OWN_IMAGES}), ("107 images/s", {NO_WARMUP, NO_SAVING}),
])  # fmt: skip
def test_how_a_figure_was_computed(tmp_path, claim, fault):
    audit = audited(tmp_path, WITH_A_GAP, claim, gpus=8)
    assert {check for check, one in verdicts(audit).items() if one == FAILS} == {RATE, NO_REPEATS, *fault}


def test_a_figure_that_no_way_gives(tmp_path):
    audit = audited(tmp_path, WITH_A_GAP, "25 images/s per GPU", gpus=8)
    assert "No way to compute it from this log gives it" in why(audit, RATE)
    assert verdicts(audit)[OWN_IMAGES] == verdicts(audit)[NO_SMOOTHING] == UNKNOWN


def test_an_honest_log_of_which_only_head_and_tail_are_kept(tmp_path):
    draw = random.Random(1)
    states = bar(96, lambda step: 2.0 * draw.uniform(0.99, 1.01))
    text = header(**HONEST) + "\n".join([*states[:6], *states[-6:]])
    audit = audited(tmp_path, text, "8.02 images/s per GPU", gpus=2)
    assert audit.holds, "one reading of the bar is not known to 0.5 %"


def test_a_step_that_a_console_log_does_not_show(tmp_path):
    text = "\n".join(line for line in honest().split("\n") if " 40/96 " not in line)
    audit = audited(tmp_path, text, CLAIM, gpus=2)
    assert verdicts(audit)[EACH_STEP] == UNKNOWN and "the log shows nothing of step 40" in why(audit, EACH_STEP)


def test_two_claims_of_a_kind(tmp_path):
    with pytest.raises(ConfigError, match="8 images/s per GPU and 16 images/s: audit one after the other"):
        audited(tmp_path, honest(), "8 images/s per GPU", "16 images/s")


def test_a_damaged_run_folder(tmp_path):
    folder = own(tmp_path)
    (folder / run_folder.ENVIRONMENT).write_text('{"devices": 5}')
    with pytest.raises(RunError, match="a file has values that sdnb did not write"):
        sdnb.audit(folder)


# ---- each fault put into an honest log: 96 steps of 2 s, of 32 images, without short steps and repeats

HONEST = dict(examples=512, ranks=2, batch=8, accumulation=2, steps=96)
CLAIM = "8.0 images/s per GPU"


def honest(seconds=lambda step: 2.0, more=(), **changes):
    draw = random.Random(0)
    states = bar(96, lambda step: seconds(step) * draw.uniform(0.98, 1.02))
    return header(**{**HONEST, **changes}) + "\n".join([*states, *more])


def closing(elapsed):
    clock = f"{elapsed // 60:02d}:{elapsed % 60:02d}"
    return f"Steps: 100%|█████| 96/96 [{clock}<00:00,  {elapsed / 96:.2f}s/it, lr=1e-5, step_loss=0.1]"


def test_an_honest_log_gives_no_alarm(tmp_path):
    audit = audited(tmp_path, honest(), CLAIM, gpus=2)
    found = verdicts(audit)
    assert audit.holds and {found[fault] for fault in FAULTS} == {HOLDS} and found[POSSIBLE] == UNKNOWN


MUTATIONS = {
    OWN_IMAGES: (honest(examples=496), CLAIM, {}),
    NO_SMOOTHING: (honest(lambda step: 2.0 if step < 90 else 1.6), "10 images/s per GPU", {}),
    NO_WARMUP: (honest(lambda step: 60.0 if step == 1 else 2.0), "6.13 images/s per GPU", {}),
    NO_SAVING: (honest(more=[closing(232)]), "6.62 images/s per GPU", {}),
    NO_REPEATS: (honest(examples=500), CLAIM, {}),
    DEVICES: (honest(), CLAIM, {"gpus": 4}),
    GLOBAL_BATCH: (honest().replace("accumulation) = 32", "accumulation) = 64"), CLAIM, {}),
    NO_DRIFT: (honest(lambda step: 1.9 if step < 30 else 2.0), "8.1 images/s per GPU", {}),
    RATE: (honest(), "9 images/s per GPU", {}),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_in_an_honest_log_is_found(tmp_path, fault):
    text, claim, about = MUTATIONS[fault]
    audit = audited(tmp_path, text, claim, **{"gpus": 2, **about})
    assert verdicts(audit)[fault] == FAILS and not audit.holds, audit


def lines(steps):
    return [json.dumps({"step": step, "timestamp": 1.7e9 + 2 * step, "loss": 0.1}) for step in steps]


@pytest.mark.parametrize(("steps", "verdict", "said"), [
    (range(1, 41), HOLDS, "steps 1 to 40, each once"),
    ([step for step in range(1, 41) if step not in (7, 8)], FAILS, "without steps 7, 8"),
    ([*range(1, 21), *range(15, 41)], FAILS, "6 of the steps logged again"),
])  # fmt: skip
def test_missing_and_repeated_steps(tmp_path, steps, verdict, said):
    facts = dict(examples=64, num_processes=1, train_batch_size=8, gradient_accumulation_steps=1)
    audit = audited(tmp_path, lines(steps), name="a.jsonl", **facts)
    assert verdicts(audit)[EACH_STEP] == verdict and said in why(audit, EACH_STEP)


@pytest.mark.parametrize(("claim", "device", "verdict", "said"), [
    ("8.0 images/s per GPU", "NVIDIA A100-SXM4-80GB", HOLDS, "87.3 is published for A100"),
    ("40 images/s per GPU", "NVIDIA A100-SXM4-80GB", FAILS, "above the most that is published for A100, 87.3"),
    ("140 images/s per GPU", "NVIDIA A100-SXM4-80GB", FAILS, "above the peak of A100, 312"),
    ("40 images/s per GPU", "a chip without published figures", UNKNOWN, "it needs a known model"),
])  # fmt: skip
def test_more_than_a_device_can_do(tmp_path, claim, device, verdict, said):
    named = honest() + "\nLoaded unet as UNet2DConditionModel from `unet` subfolder of models/stable-diffusion-v1-4.\n"
    audit = audited(tmp_path, named, claim, gpus=2, device=device, resolution=512)
    assert verdicts(audit)[POSSIBLE] == verdict and said in why(audit, POSSIBLE)


@pytest.mark.parametrize(("claim", "verdict"), [("loss 0.1", HOLDS), ("loss 0.08", FAILS)])
def test_a_claimed_loss(tmp_path, claim, verdict):
    text = honest(batch=16, accumulation=1)  # else the bar shows one of a step's two losses
    assert verdicts(audited(tmp_path, text, claim, gpus=2))[FINAL_LOSS] == verdict


def test_the_flop_of_the_unet():
    """Counted again, in the architecture of Stable Diffusion 2."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
            block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
            down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        )  # fmt: skip
        latents, text = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 1024)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.empty(1, dtype=torch.long), text, return_dict=False)[0].sum().backward()
    assert unet.num_parameters() == 865_910_724
    assert counter.get_total_flops() / 1e12 == pytest.approx(UNET_TFLOP["v2"][512], rel=1e-4)


# ---- runs of sdnb


def own(tmp_path, **settings):
    return make_run(tmp_path / "own", noise=0.02, **{"num_processes": 2, "max_train_steps": 40, **settings})


def change(folder, number, **changes):
    path = folder / run_folder.STEPS
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[number] |= changes
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_an_own_run_and_what_was_done_to_it(tmp_path):
    folder = own(tmp_path)
    files.write(folder / run_folder.SUMMARY, dict(world_size=2, total_seconds=30.0, ranks=[{"peak_memory_gib": 1.0}]))
    run_folder.write_results(folder)
    assert sdnb.audit(folder, gpus=2).holds
    recorded = json.loads((folder / run_folder.RESULTS).read_text())
    recorded["results"][0]["value"] *= 1.1
    (folder / run_folder.RESULTS).write_text(json.dumps(recorded))
    raised = sdnb.audit(folder)
    assert verdicts(raised)[RECORDED] == verdicts(raised)[RATE] == FAILS
    run_folder.write_results(folder)
    change(folder, 20, images=9999)
    assert verdicts(sdnb.audit(folder))[GLOBAL_BATCH] == FAILS
    change(folder, 20, images=64, step=20)
    assert why(sdnb.audit(folder), EACH_STEP) == "without step 21; twice step 20"


def honest_runs():
    path = run_folder.Path(__file__).parent / "data" / "own-runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("number", range(len(honest_runs())))
def test_no_false_alarm_for_a_real_run(tmp_path, number):
    """Records of trainings of the embedded model, with batches, ranks and lengths of many kinds."""
    kept, folder = honest_runs()[number], tmp_path / "own"
    folder.mkdir()
    for name in (run_folder.CONFIG, run_folder.ENVIRONMENT, run_folder.SUMMARY, run_folder.RESULTS):
        (folder / name).write_text(json.dumps(kept[name]))  # JSON is YAML, too
    fields = kept["fields"]
    for values in kept["steps"]:
        files.append(folder / run_folder.STEPS, dict(zip(fields, values)))
    audit = sdnb.audit(folder, gpus=kept[run_folder.CONFIG]["num_processes"])
    assert audit.holds, audit
    assert sum(finding.verdict == HOLDS for finding in audit.findings) >= 9


# ---- the command


def test_the_command(tmp_path, capsys):
    (tmp_path / "its.log").write_text(WITH_A_GAP)
    arguments = ["audit", str(tmp_path / "its.log"), "--claim", "17.88 images/s per GPU", "--gpus", "8"]
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--page", str(tmp_path / "page.html")])
    shown = capsys.readouterr().out
    assert shown.index("global batch            8 images × 4") < shown.index(f"{OWN_IMAGES}  does not hold")
    page = (tmp_path / "page.html").read_text()
    for text in ("17.88", "14.3", "✗ does not hold", "354 micro-batches", "? cannot be known", "progress bar, all"):
        assert text in page
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--format", "json"])
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] is False and {one["check"]: one["verdict"] for one in told["findings"]}[NO_REPEATS] == FAILS
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--format", "markdown"])
    assert f"| {OWN_IMAGES} | does not hold |" in capsys.readouterr().out
    (tmp_path / "honest.log").write_text(honest())
    main(["audit", str(tmp_path / "honest.log"), "--claim", CLAIM, "--page", str(tmp_path / "page.html")])


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (["missing.log"], 1, "no such file"),
    (["published", "--claim", "fast"], 2, "give one number with its unit"),
    (["--claim", "2.040 s/it"], 2, "there is no log: .* give --examples, --gradient_accumulation_steps"),
    ([], 2, "there is no log"),
    (["published", "--gpus", "0"], 2, "'0' is no number from 1"),
    (["--claim", "2 s/it", "--gpus", "8", "--steps", "3000000", "--examples", "833", "--train_batch_size", "8",
      "--gradient_accumulation_steps", "4"], 1, "steps = 3,000,000"),
])  # fmt: skip
def test_mistakes(arguments, status, said, capsys):
    with pytest.raises(SystemExit, match=str(status)):
        main(["audit", *arguments])
    assert re.search(said, capsys.readouterr().err)


def test_a_run_without_steps(tmp_path):
    folder = own(tmp_path)
    (folder / run_folder.STEPS).unlink()
    with pytest.raises(RunError, match="has no step to audit"):
        sdnb.audit(folder)


def test_the_published_run_by_its_name():
    audit = sdnb.audit("published")
    assert "17.88" in str(audit) and verdicts(audit)[OWN_IMAGES] == FAILS
