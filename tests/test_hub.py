"""The upload, to a hub that this test plays: what is asked of it, and that the token goes nowhere else."""

import json
import os
import shlex
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from training import small_model

from sdnb.errors import RunError
from sdnb.run import folder as run_folder
from sdnb.run import hub
from sdnb.settings.config import TrainConfig

TOKEN = "hf_thisisasecretofthetests0000"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as creating a repository and committing small files needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.server.refuses:
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path.endswith("/repos/create"):
            name = json.loads(body)["name"]
            return self.answer(200, {"url": f"{self.server.url}/me/{name}", "name": f"me/{name}", "id": f"me/{name}"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            return self.answer(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/x/commit/" + "0" * 40}
            )
        return self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization"), b""))
        self.answer(404, {"error": "Entry not found"})

    do_HEAD = do_GET

    def answer(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_):
        pass


@contextmanager
def a_hub(refuses=False):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.refuses = [], refuses
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environment_of(server):
    """It has no token of its own."""
    own = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return {**own, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}


def push(server, folder, *flags):
    flags = [
        f"--pretrained_model_name_or_path={small_model()}", "--dataset_name=openmoji", "--resolution=64",
        "--train_batch_size=2", "--max_train_steps=2", "--checkpointing_steps=1", "--push_to_hub",
        "--hub_model_id=a-model", f"--output_dir={folder}", *flags,
    ]  # fmt: skip
    command = [sys.executable, "-m", "sdnb.train", *flags]
    return subprocess.run(command, env=environment_of(server), capture_output=True, text=True)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A training that was uploaded: what the hub has seen, what it printed, and its run."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    with a_hub() as server:
        done = push(server, folder, f"--hub_token={TOKEN}", "--seed=7", "--validation_prompts", "a | b", "<script>")
    assert done.returncode == 0, done.stderr
    return server.seen, done.stdout + done.stderr, run_folder.RunFolder(folder)


def committed(seen):
    (commit,) = [body for path, _, body in seen if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    return {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}


def names_no_machine(files):
    return not [name for name in files if "checkpoint" in name or name.startswith(("logs", ".", "train", "environ"))]


def test_the_pipeline_is_uploaded_and_the_token_stays_secret(pushed):
    seen, printed, run = pushed
    assert {sent for _, sent, _ in seen if sent} == {f"Bearer {TOKEN}"}, "it is used"
    files = committed(seen)
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors", "metrics.jsonl",
            "samples/step-000002-0.png"} <= set(files)  # fmt: skip
    assert names_no_machine(files)
    written = b"".join(path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written
    assert TOKEN not in printed


def test_an_upload_that_failed_is_made_up_for_by_what_the_error_says(pushed, monkeypatch):
    run = pushed[2]
    monkeypatch.setattr(hub, "upload_folder", lambda **_: 1 / 0)
    with pytest.raises(RunError, match="complete and saved, but its upload to me/a-model failed: division") as error:
        hub.publish(run, run.config, "me/a-model")
    again = shlex.split(str(error.value).partition("Try again with: ")[2])
    assert again[0] == "python"
    with a_hub() as server:
        own = {**environment_of(server), "HF_TOKEN": TOKEN}
        done = subprocess.run([sys.executable, *again[1:]], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = committed(server.seen)
    assert files.keys() == committed(pushed[0]).keys() and names_no_machine(files)


def test_a_refusal_comes_before_the_training(tmp_path):
    with a_hub(refuses=True) as server:
        done = push(server, tmp_path / "run")
    assert done.returncode == 1
    assert "push_to_hub: the repository a-model cannot be created" in done.stderr and "HF_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_folder.RunFolder(tmp_path / "run").steps.empty


def test_the_card(pushed):
    run = pushed[2]
    text = str(hub.card(run))
    head = yaml.safe_load(text.split("---")[1])
    assert head["pipeline_tag"] == "text-to-image" and "sdnb" in head["tags"]
    assert "base_model" not in head, "an embedded model is none of the hub's"
    assert "![a \\| b](samples/step-000002-0.png)" in text
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "| images/s per CPU rank |" in text and "| train\\_batch\\_size | 2 |" in text
    assert str(run.folder.parent) not in text and run.environment["host"] not in text


def test_models_and_data_of_the_hub_are_named():
    assert hub._on_hub("CompVis/stable-diffusion-v1-4") and not hub._on_hub("/models/sd") and not hub._on_hub("tiny")


def test_a_token_of_the_settings_goes_first():
    config = dict(pretrained_model_name_or_path="tiny", dataset_name="openmoji")
    assert hub._token(TrainConfig(**config)) is None, "then the hub's client looks for one itself"
    assert hub._token(TrainConfig(**config, hub_token=TOKEN)) == TOKEN
