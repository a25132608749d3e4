# SPDX-License-Identifier: Apache-2.0
"""Secrets stay where they are, and an upload holds what it should: against a stand-in for the hub on this machine."""

import ast
import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from runner import LORA_FILE, ROOT, flags

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
MARKS = {"flag": "hf_marked0flag0token", "HF_TOKEN": "hf_marked0environment", "WANDB_API_KEY": "a1b2c3d4e5" * 4}


class Hub(BaseHTTPRequestHandler):
    """The few calls of the hub's interface that making a repository and uploading to it need; keeps the bodies."""

    bodies: list[bytes] = []
    tokens: set[str] = set()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.bodies.append(body)
        self.tokens.add(self.headers.get("Authorization", ""))
        here = f"http://{self.headers['Host']}/me/sap"
        answer = {"url": here, "errors": [], "warnings": [], "commitUrl": f"{here}/commit/1", "commitOid": "1"}
        if "preupload" in self.path:
            files = [one["path"] for one in json.loads(body)["files"]]
            answer = {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        self.reply(answer)

    def do_GET(self):
        self.reply({"id": "me/sap", "sha": "1", "siblings": []})

    def reply(self, answer: dict) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    """The stand-in's address and what it was sent."""
    Hub.bodies, Hub.tokens = [], set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Hub
    server.shutdown()


def test_marked_secrets_reach_no_file_and_an_upload_holds_what_it_should(sd15, photos, tmp_path, hub):
    address, sent = hub
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    more = ["--report_to=all", "--push_to_hub", "--hub_model_id=me/sap", f"--hub_token={MARKS['flag']}"]
    more += ["--validation_prompt=a photo of sks dog", "--num_validation_images=1", "--checkpointing_steps=1"]
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": MARKS["HF_TOKEN"], "WANDB_API_KEY": MARKS["WANDB_API_KEY"], "WANDB_MODE": "offline"}
    environment |= {"WANDB_DIR": str(tmp_path / "wandb"), "HF_HUB_DISABLE_XET": "1"}
    (tmp_path / "wandb").mkdir()
    command = [sys.executable, str(ROOT / "train_sap_lora_sd15.py"), *flags(sd15, photos, output, *more)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts and path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    texts = {str(path): path.read_bytes() for path in files} | {"printed": (run.stdout + run.stderr).encode()}
    texts |= {f"upload {i}": body for i, body in enumerate(sent.bodies)}
    found = [(place, name) for place, text in texts.items() for name, mark in MARKS.items() if mark.encode() in text]
    assert found == []
    assert sent.tokens == {f"Bearer {MARKS['flag']}"}
    commit = next(body for body in sent.bodies if b'"key": "header"' in body or b'"key":"header"' in body)
    lines = [json.loads(line)["value"] for line in commit.decode().splitlines() if '"file"' in line]
    uploaded = {line["path"]: base64.b64decode(line["content"]) for line in lines}
    assert set(uploaded) == {LORA_FILE, KOHYA_FILE, "README.md", "image_0.png"}
    assert uploaded[LORA_FILE] == (output / LORA_FILE).read_bytes()


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), *ROOT.glob("examples/**/*.py")]), ids=lambda path: path.name
)
def test_pickles_are_never_loaded_as_code(path):
    """Each call of `torch.load` says weights_only=True, and nothing else unpickles."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            name = f"{node.func.value.id}.{node.func.attr}"
            assert name not in ("pickle.load", "pickle.loads", "joblib.load")
            if name == "torch.load":
                keywords = {word.arg: word.value for word in node.keywords}
                assert getattr(keywords.get("weights_only"), "value", None) is True, node.lineno
            if name in ("np.load", "numpy.load"):
                assert not any(word.arg == "allow_pickle" for word in node.keywords)
