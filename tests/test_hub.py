"""The upload, to a hub that this test plays: what is asked of it, and that the token goes nowhere else."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from training import train

from sdnb import hub, run_folder
from sdnb.config import TrainConfig

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


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.refuses = [], False
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(server, folder, *flags):
    """The environment has no token of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return subprocess.run(
        [sys.executable, "-m", "sdnb.train", "--pretrained_model_name_or_path=tiny", "--dataset_name=openmoji",
         "--resolution=64", "--train_batch_size=2", "--max_train_steps=2", "--checkpointing_steps=1", "--push_to_hub",
         "--hub_model_id=a-model", f"--output_dir={folder}", *flags],
        env={**environment, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def committed(server):
    (commit,) = [body for path, _, body in server.seen if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    return {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}


def test_the_pipeline_is_uploaded_and_the_token_stays_secret(server, tmp_path):
    folder = tmp_path / "run"
    done = push(server, folder, f"--hub_token={TOKEN}", "--validation_prompts", "red heart", "a <script> | [x](y)")
    assert done.returncode == 0, done.stderr
    assert {sent for _, sent, _ in server.seen if sent} == {f"Bearer {TOKEN}"}, "it is used"
    files = committed(server)
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors", "metrics.jsonl",
            "samples/step-000002-0.png"} <= set(files)  # fmt: skip
    assert not [name for name in files if "checkpoint" in name or name.startswith(("logs", ".", "train", "environ"))]
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written
    assert TOKEN not in done.stdout + done.stderr


def test_a_refusal_comes_before_the_training(server, tmp_path):
    server.refuses = True
    done = push(server, tmp_path / "run")
    assert done.returncode == 1
    assert "push_to_hub: the repository a-model cannot be made" in done.stderr and "HF_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_folder.RunFolder(tmp_path / "run").steps.empty


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(
        dict(
            pretrained_model_name_or_path="tiny", dataset_name="openmoji", resolution=64, train_batch_size=2, steps=3,
            seed=7, report_to="none", validation_prompts=["a | b", "<script>"], validation_epochs=50,
            output_dir=str(tmp_path_factory.mktemp("hub") / "run"),
        )
    )  # fmt: skip


def test_the_card(run):
    text = hub.card(run)
    head = yaml.safe_load(text.split("---")[1])
    assert head["pipeline_tag"] == "text-to-image" and "sdnb" in head["tags"]
    assert "base_model" not in head, "an embedded model is none of the hub's"
    assert "![a \\| b](samples/step-000003-0.png)" in text
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "| images/s per CPU rank |" in text and "| train\\_batch\\_size | 2 |" in text
    assert str(run.folder.parent) not in text and run.environment["host"] not in text


def test_models_and_data_of_the_hub_are_named():
    assert hub._on_hub("CompVis/stable-diffusion-v1-4") and not hub._on_hub("/models/sd") and not hub._on_hub("tiny")


def test_a_token_of_the_settings_goes_first():
    config = dict(pretrained_model_name_or_path="tiny", dataset_name="openmoji")
    assert hub._token(TrainConfig(**config)) is None, "then the hub's client looks for one itself"
    assert hub._token(TrainConfig(**config, hub_token=TOKEN)) == TOKEN
