# SPDX-License-Identifier: Apache-2.0
"""The method in a small script of its own, and the page that explains it."""

import os
import re
import subprocess
import sys

import pytest
from runner import LORA_FILE, ROOT

SCRIPT = ROOT / "examples" / "minimal_sap.py"
PAGE = (ROOT / "examples" / "paste_into_your_script.md").read_text(encoding="utf-8")


def run(output, *flags) -> tuple[float, float]:
    """Both terms of the loss at the end of a short run on the tiny world."""
    command = [sys.executable, str(SCRIPT), "--steps=40", f"--output_dir={output}", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    return tuple(float(re.search(rf"{term} ([\d.]+)", text)[1]) for term in ("reconstruction", "drift"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minimal")
    return folder, {w: run(folder / w, f"--anchor_weight={w}") for w in ("0", "1")}


def test_the_small_script_trains_and_writes(runs):
    folder, _ = runs
    assert (folder / "1" / LORA_FILE).is_file()
    assert (folder / "1" / "sample.png").is_file()
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 120


def test_it_learns_the_subject_and_the_anchor_keeps_it_from_drifting(runs, tmp_path):
    _, terms = runs
    assert terms["1"][1] < 0.7 * terms["0"][1]
    untrained = run(tmp_path, "--anchor_weight=1", "--learning_rate=0")
    assert terms["1"][0] < untrained[0]
    assert untrained[1] < 1e-3  # "sks ball" starts out as "ball"


def test_the_page_shows_lines_that_are_in_the_script():
    lines = {line.strip() for line in SCRIPT.read_text(encoding="utf-8").splitlines()}
    shown = [line[1:].strip() for block in re.findall(r"```diff\n(.*?)```", PAGE, re.S) for line in block.splitlines()
             if line[0] in "+ "]  # fmt: skip
    assert len(shown) == 7
    assert [line for line in shown if line not in lines] == []


def test_without_the_marked_lines_it_is_a_script_without_an_anchor():
    kept = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if "# SAP" not in line]
    source = "\n".join(kept)
    compile(source.replace("history.append(torch.stack([reconstruction, drift]).detach())", ""), "plain", "exec")
    assert "adapters_disabled" not in source
    assert "class_embeds" not in source


def test_the_functions_that_the_page_names_can_be_lifted():
    """Each runs in a namespace with nothing but the trainer's imports."""
    trainer = (ROOT / "train_sap_lora_sd15.py").read_text(encoding="utf-8")
    names = re.findall(r"^\| `(\w+)\([\w, ]+\)` \|", PAGE, re.M)
    assert set(names) == {"adapter_layers", "adapters_disabled", "anchor_caption", "evaluating", "predict_anchors",
                          "semantic_anchor_loss"}  # fmt: skip
    imports = "\n".join(re.findall(r"^(?:import|from) [^(\n]+$", trainer.split("\nlogger = ")[0], re.M))
    sources = [re.search(rf"(?:^@.*\n)?^def {name}\(.*?(?=\n\n\n)", trainer, re.M | re.S)[0] for name in names]
    space = {}
    exec(imports + "\n\n" + "\n\n\n".join(sources), space)
    assert space["anchor_caption"]("a photo of sks dog on a sofa", "sks", "a") == "a photo of a dog on a sofa"
    torch = space["torch"]
    model = torch.nn.Linear(2, 2)
    inputs = [(torch.ones(1, 2), torch.zeros(1), {})]
    anchors = space["predict_anchors"](model, lambda m, x, t, c: m(x), inputs, source="finetuned")
    loss, reconstruction, drift = space["semantic_anchor_loss"](torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    assert (loss.item(), reconstruction.item(), drift.item()) == (1.5, 1.0, 1.0)
    assert anchors[0].shape == (1, 2)
