# SPDX-License-Identifier: Apache-2.0
"""Uploads: the files that a run wrote and nothing else, when they are due, and what is said of a hub that is away."""

import base64
import importlib
import json
import shlex
import socket
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from runner import LORA_FILE, flags, left_in, lora, train
from test_secrets import Hub

import train_sap_lora_sd15 as sap

SCRIPTS = ["train_sap_lora_sd15", "train_sap_lora_sdxl", "train_sap_lora_sd3"]
PUSH = ["--push_to_hub", "--hub_model_id=me/sap"]


class Away(Hub):
    """A hub that makes repositories, and hangs up when something is sent to them."""

    def do_POST(self):
        if "repos/create" in self.path:
            super().do_POST()
        else:
            self.connection.close()


def serve(kind: type[Hub]) -> ThreadingHTTPServer:
    kind.bodies, kind.tokens = [], set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def use_hub(monkeypatch):
    """Have the hub's library, online, ask a server on this machine."""

    def use(port: int) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sap.create_repo.__self__, "endpoint", f"http://127.0.0.1:{port}")

    return use


@pytest.fixture
def hub(use_hub):
    server = serve(Hub)
    use_hub(server.server_port)
    yield Hub
    server.shutdown()


def uploaded(hub: type[Hub]) -> dict[str, bytes]:
    """The files that a stand-in received, by name."""
    files = {}
    for body in hub.bodies:
        for line in body.splitlines():
            found = json.loads(line) if line.startswith(b'{"key"') else {}
            if found.get("key") == "file":
                files[found["value"]["path"]] = base64.b64decode(found["value"]["content"])
    return files


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_upload_holds_what_the_run_wrote_and_nothing_else(script, bases, photos, tmp_path, hub):
    module = importlib.import_module(script)
    neighbours = ["image_dog/image_0.png", "image_7.png", "old/pytorch_lora_weights_v1.safetensors", "notes.txt",
                  "pytorch_lora_weights_old.safetensors", "README.md", "image_dog.png", "sub/README.md"]  # fmt: skip
    for name in neighbours:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    more = ["--validation_prompt=a sks dog", "--num_validation_images=1", "--checkpointing_steps=1", *PUSH]
    train(script, flags(bases[script], photos, tmp_path, *more, steps=1))
    expected = {LORA_FILE, "README.md", "image_0.png"} | ({module.KOHYA_FILE} if not script.endswith("sd3") else set())
    assert set(uploaded(hub)) == expected
    assert all(content != b"mine" for content in uploaded(hub).values())
    for name in neighbours:
        place = tmp_path / "earlier-1" if name in ("README.md", "image_7.png") else tmp_path
        assert (place / name).read_text() == "mine"


def test_the_card_names_the_repository_with_its_owner(sd15, photos, tmp_path, hub):
    train(SCRIPTS[0], flags(sd15, photos, tmp_path / "sap", "--push_to_hub", steps=1))
    assert "load_lora_weights('me/sap'" in uploaded(hub)["README.md"].decode()


def test_a_finished_run_that_was_not_uploaded_is(sd15, photos, tmp_path, hub, monkeypatch, caplog):
    command = flags(sd15, photos, tmp_path, "--resume_from_checkpoint=latest")
    train(SCRIPTS[0], command)
    assert uploaded(hub) == {}
    (tmp_path / "image_9.png").write_text("put there since")
    monkeypatch.setattr(sap, "prepare", lambda *_, **__: pytest.fail("a model was loaded"))
    train(SCRIPTS[0], [*command, *PUSH])
    assert set(uploaded(hub)) == {LORA_FILE, sap.KOHYA_FILE, "README.md"}
    assert "nothing is left" in caplog.text


def test_a_run_that_was_killed_before_its_card_is_not_finished(sd15, photos, tmp_path, monkeypatch):
    """The LoRA and its record are written at the end of training; what comes then is made up."""
    command = flags(sd15, photos, tmp_path, "--resume_from_checkpoint=latest", "--checkpointing_steps=2")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sap, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(SCRIPTS[0], command)
    assert lora(tmp_path)
    assert "README.md" not in left_in(tmp_path)
    train(SCRIPTS[0], command)
    assert "README.md" in left_in(tmp_path)
    assert not (tmp_path / "earlier-1").exists()


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("kind", ["refused", "dropped", "hanging"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_hub_that_does_not_answer_is_told_before_anything_is_loaded(
    script, kind, bases, photos, tmp_path, use_hub, monkeypatch
):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "HUB_TIMEOUT", 0.5)
    monkeypatch.setattr(module, "prepare", lambda *_, **__: pytest.fail("a model was loaded"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        use_hub(closed_port() if kind == "refused" else listening.getsockname()[1])
        if kind == "dropped":
            threading.Thread(target=lambda: listening.accept()[0].close(), daemon=True).start()
        with pytest.raises(module.UsageError, match="--push_to_hub: "):
            train(script, flags(bases[script], photos, tmp_path, *PUSH))


def test_an_upload_that_breaks_off_leaves_all_and_a_command_that_can_be_pasted(sd15, photos, tmp_path, use_hub):
    server = serve(Away)
    use_hub(server.server_port)
    output = tmp_path / "my dog"
    with pytest.raises(sap.RunError, match="^The upload failed: .*; all is written. To try again: hf upload") as told:
        train(SCRIPTS[0], flags(sd15, photos, output, *PUSH, steps=1))
    server.shutdown()
    words = shlex.split(str(told.value).split("To try again: ")[1])
    assert words[:6] == ["hf", "upload", "me/sap", str(output), ".", "--include"]
    assert {output / word for word in words[6:]} == set(sap.found(output, sap.RESULTS))
    assert (output / sap.FINISHED_FILE).is_file()
    assert lora(output)


@pytest.mark.parametrize("folder", [".", "my dog"])
def test_a_card_has_names_also_for_folders_without_one(folder, sd15, photos, tmp_path, monkeypatch):
    output = tmp_path / "my dog"
    output.mkdir()
    monkeypatch.chdir(output if folder == "." else tmp_path)
    args = sap.parse_args(flags("base", photos, Path(folder)))
    args.pretrained_model_name_or_path = "."
    sap.write_model_card(args, [], None)
    card = (output / "README.md").read_text()
    assert "load_lora_weights('my dog'" in card
    assert f"from_pretrained('{Path.cwd().name}'" in card
    assert "base_model" not in card
