"""What the tests share. They use real models (small), real processes and real files, and no network."""

import json
import os
import signal
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what they expect, to the bit in places, is what a CPU computes
for _name in ("PYTHONUNBUFFERED", "SDNB_RUNS"):  # a user has them rarely; without the first, prints wait in buffers
    os.environ.pop(_name, None)
os.environ["OMP_NUM_THREADS"] = "1"  # a test worker for each core, and some tests start two ranks

# A shell turns interrupts off for what it starts in the background, nohup hang-ups, and the tests' own processes would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Caches of the tests' own, which all workers share; set before anything reads them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="sdnb-tests-")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
    os.environ["HF_HOME"] = f"{_CACHE.name}/huggingface"


@pytest.fixture
def image_folder(tmp_path):
    """Makes an image folder: of `count` images of a size, or of given files with given metadata lines."""
    from PIL import Image

    def make(count=0, size=(64, 64), name="images"):
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for index in range(count):
            Image.new("RGB", size, (index * 37 % 256, index * 91 % 256, 128)).save(folder / f"{index:03}.png")
            lines.append(json.dumps({"file_name": f"{index:03}.png", "text": f"picture {index}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return folder

    return make


@pytest.fixture
def settings(tmp_path):
    """Settings of a training that takes a second."""
    from training import small_data, small_model

    return dict(
        pretrained_model_name_or_path=small_model(),
        dataset_name=small_data(),
        resolution=64,
        center_crop=True,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_warmup_steps=0,
        learning_rate=1e-3,
        steps=2,
        seed=7,
        report_to="none",
        output_dir=str(tmp_path / "run"),
    )


@pytest.fixture
def forked_ranks(monkeypatch):
    """What a test launches begins with all loaded, which saves it seconds; else it is the same."""
    import subprocess
    from types import SimpleNamespace

    from processes import Forked

    from sdnb.launch import notebook

    monkeypatch.setattr(notebook, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Forked}))
