# SPDX-License-Identifier: Apache-2.0
"""The method in a small script of its own, and the page that explains it."""

import contextlib
import io
import json
import re
import runpy
import sys

import pytest
from runner import LORA_FILE, ROOT, reset

SCRIPT = ROOT / "examples" / "minimal_sap.py"
PAGE = (ROOT / "examples" / "paste_into_your_script.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def run(output, *flags) -> tuple[float, float]:
    """Both terms of the loss at the end of a short run on the tiny world."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [str(SCRIPT), "--steps=40", f"--output_dir={output}", *flags])
        reset()
        runpy.run_path(str(SCRIPT), run_name="__main__")
    found = (re.search(rf"{term} ([\d.]+)", printed.getvalue()) for term in ("reconstruction", "drift"))
    return tuple(float(one[1]) for one in found)


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
    marked = SCRIPT.read_text(encoding="utf-8").split("import argparse", 1)[1].count("# SAP")
    assert f"adds {marked} lines" in PAGE


def test_without_the_marked_lines_it_is_a_script_without_an_anchor():
    kept = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if "# SAP" not in line]
    source = "\n".join(kept)
    compile(source.replace("history.append(torch.stack([reconstruction, drift]).detach())", ""), "plain", "exec")
    assert "adapters_disabled" not in source
    assert "class_embeds" not in source


def functions() -> str:
    """What the page says to copy: its imports, and the functions of its table from the trainer."""
    trainer = (ROOT / "train_sap_lora_sd15.py").read_text(encoding="utf-8")
    names = re.findall(r"^\| `(\w+)\([\w, ]+\)` \|", PAGE, re.M)
    assert set(names) == {"adapter_layers", "adapters_disabled", "anchor_caption", "evaluating", "predict_anchors",
                          "semantic_anchor_loss"}  # fmt: skip
    sources = [re.search(rf"(?:^@.*\n)?^def {name}\(.*?(?=\n\n\n)", trainer, re.M | re.S)[0] for name in names]
    return "\n\n\n".join(["from __future__ import annotations", BLOCKS[0], *sources])


def test_the_functions_that_the_page_names_can_be_lifted():
    """Together they run in a namespace with nothing but the page's imports."""
    space = {}
    exec(functions(), space)
    assert space["anchor_caption"]("a photo of sks dog on a sofa", "sks", "a") == "a photo of a dog on a sofa"
    torch = space["torch"]
    model = torch.nn.Linear(2, 2)
    inputs = [(torch.ones(1, 2), torch.zeros(1), {})]
    for source in ("pretrained", "finetuned"):
        anchors = space["predict_anchors"](model.requires_grad_(False), lambda m, x, t, c: m(x), inputs, source=source)
        assert torch.equal(anchors[0], model(torch.ones(1, 2)))
    loss, reconstruction, drift = space["semantic_anchor_loss"](torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    assert (loss.item(), reconstruction.item(), drift.item()) == (1.5, 1.0, 1.0)


def pasted(kind: str, text_encoder: bool) -> str:
    """A script of the originals' shape with the page's blocks where the page says."""
    _, plain, with_encoder, sd3, flux, loss = BLOCKS
    argument = re.search(r"`(parser\.add_argument.*?)`", PAGE.replace("\n", " "))[1]
    blocks = {"imports and functions": functions(), "class embeddings": with_encoder if text_encoder else plain,
              "anchor": sd3 if kind == "sd3" else flux, "loss": loss, "argument": argument}  # fmt: skip

    def paste(found: re.Match) -> str:
        return "\n".join(found[1] + line for line in blocks[found[2]].strip("\n").split("\n"))

    shape = (ROOT / "tests" / "shape_of_originals.py").read_text(encoding="utf-8")
    source, count = re.subn(r"^( *)# paste: ([\w ]+)$", paste, shape, flags=re.M)
    assert count == len(blocks)
    return source


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"], ["--precondition_outputs=0"]])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_pages_blocks_run_in_a_script_of_the_originals_shape(kind, more, bases, tmp_path, monkeypatch, capsys):
    """With one prompt for both, the anchor is the student's own prediction until it learns, and then no longer."""
    script = tmp_path / "script.py"
    script.write_text(pasted(kind, "--train_text_encoder" in more), encoding="utf-8")

    def steps(script, *flags) -> list[dict]:
        reset()
        monkeypatch.setattr(sys, "argv", [str(script), str(bases["train_sap_lora_sd3"]), kind, *more, *flags])
        runpy.run_path(str(script), run_name="__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    anchored, plain = steps(script), steps(ROOT / "tests" / "shape_of_originals.py")
    assert [step["drift"] for step in plain] == [0, 0, 0]
    assert anchored[0] == plain[0]  # the same loss and gradients as without the anchor
    assert min(step["drift"] for step in anchored[1:]) > 1e-6
    assert anchored[1]["loss"] > plain[1]["loss"]  # of the same weights: what is new is w times the drift
    other = steps(script, "--class_prompt=a photo of a cat", "--max_train_steps=1")[0]
    assert other["drift"] > 1e-6
    assert other["gradients"] > 0
