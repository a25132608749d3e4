# SPDX-License-Identifier: Apache-2.0
"""The method in a small script of its own, and the page that explains it."""

import ast
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


def run(output, *flags) -> tuple[float, float]:
    """Both terms of the loss at the end of a short run on the tiny world."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [str(SCRIPT), "--steps=40", f"--output_dir={output}", *flags])
        reset()
        runpy.run_path(str(SCRIPT), run_name="__main__")
    found = (re.search(rf"{term} ([\d.]+)", printed.getvalue()) for term in ("reconstruction", "drift"))
    return tuple(float(one[1]) for one in found)


def test_the_small_script_learns_the_subject_and_the_anchor_keeps_it_from_drifting(tmp_path):
    terms = {w: run(tmp_path / w, f"--anchor_weight={w}") for w in ("0", "1")}
    assert (tmp_path / "1" / LORA_FILE).is_file()
    assert (tmp_path / "1" / "sample.png").is_file()
    assert terms["1"][1] < 0.7 * terms["0"][1]
    untrained = run(tmp_path / "untrained", "--anchor_weight=1", "--learning_rate=0")
    assert terms["1"][0] < untrained[0]
    assert untrained[1] < 1e-3  # "sks ball" starts out as "ball"
    other = run(tmp_path / "other", "--learning_rate=0", "--class_prompt=a photo of a red star")
    assert other[1] > 0.01  # the anchor is that of the class prompt


def test_without_the_marked_lines_it_is_a_script_without_an_anchor():
    kept = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if "# SAP" not in line]
    source = "\n".join(kept)
    compile(source.replace("history.append(torch.stack([reconstruction, drift]).detach())", ""), "plain", "exec")
    assert "adapters_disabled" not in source
    assert "class_embeds" not in source


# ---- The page ----


def functions() -> str:
    """What the page says to lift: its imports, and the functions that it names, from the trainer."""
    trainer = (ROOT / "train_sap_lora_sd15.py").read_text(encoding="utf-8")
    passage = PAGE.split("Those functions stand at the top of", 1)[1].split("```", 1)[0]
    names = {"adapter_layers", "adapters_disabled", "anchor_caption", "evaluating", "predict_anchors",
             "semantic_anchor_loss"}  # fmt: skip
    assert names <= set(re.findall(r"`(\w+)`", passage))
    sources = []
    for node in ast.parse(trainer).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            sources.append("\n".join(trainer.splitlines()[first - 1 : node.end_lineno]))
    imports = re.findall(r"```python\n(.*?)```", PAGE, re.S)[-1]
    source = "\n\n\n".join(["from __future__ import annotations", imports, *sources])
    assert sorted(re.findall(r"^def (\w+)", source, re.M)) == sorted(names)  # each once, and nothing else
    return source


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


def additions(script: str) -> list[tuple[str, str, str]]:
    """What the page adds to a script, in order: "Above" or "Below", the start of a line there, the lines."""
    general, own = re.split(r"^## (?:What to add|Script by script|Tried)$", PAGE, flags=re.M)[1:3]
    shown = re.search(rf"`{script}`[^`]*(?:`[^`\n]+`[^`]*)*?:\n\n((?:```python\n.*?```\n+)+)", own, re.S)[1]
    anchor, *step_four = re.findall(r"```python\n(.*?)```", shown, re.S)
    found = []
    for part in re.split(r"^\*\*(?=\d\.)", general, flags=re.M)[1:]:
        number, where, start = re.match(r"(\d)\.\*\* (Above|Below) `(.+?)`", part).groups()
        lines = re.search(r"```python\n(.*?)```", part, re.S)
        if number == "3":
            found.append((where, start, anchor))
        elif number == "4" and step_four:
            found.append((where, start, step_four[0]))
        else:
            found.append((where, start, lines[1]))
    assert len(found) == 5
    return found


def paste(source: str, script: str) -> str:
    """A script with the page's additions."""
    lines = source.splitlines()
    for where, start, added in additions(script):
        (place,) = [index for index, line in enumerate(lines) if line.lstrip().startswith(start)]
        indent = " " * (len(lines[place]) - len(lines[place].lstrip()))
        place += where == "Below"
        lines[place:place] = [indent + line for line in added.splitlines()]
    return "\n".join(lines) + "\n"


SCRIPTS = re.findall(r"^\| `(train_dreambooth_lora_\w+\.py)` \|", PAGE, re.M)


def test_every_script_of_the_page_has_its_lines():
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        compile(block, "page", "exec")
    assert len(SCRIPTS) == 8
    counts = {script: sum(len(added.splitlines()) for _, _, added in additions(script)) for script in SCRIPTS}
    assert counts["train_dreambooth_lora_qwen_image.py"] == 8
    assert max(counts.values()) <= 13
    for script in SCRIPTS:
        assert "SemanticAnchor(" in additions(script)[2][2]
        assert "anchor.drift(" in additions(script)[3][2]


KINDS = [("sd3", []), ("sd3", ["--train_text_encoder"]), ("sd3", ["--precondition_outputs=0"]), ("flux", []),
         ("flux", ["--train_text_encoder"]), ("qwen_image", []), ("z_image", []), ("sdxl_advanced", []),
         ("sdxl_advanced", ["--train_text_encoder", "--snr_gamma=5"])]  # fmt: skip


@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_the_pages_lines_run_in_a_script_of_the_originals_shape(kind, more, bases, tmp_path, monkeypatch, capsys):
    """With one prompt for both, the anchor is the student's own prediction until it learns, and then no longer."""
    shape, script = ROOT / "tests" / "shape_of_originals.py", tmp_path / "script.py"
    script.write_text(paste(shape.read_text(encoding="utf-8"), f"train_dreambooth_lora_{kind}.py"), encoding="utf-8")
    monkeypatch.syspath_prepend(ROOT / "examples")  # the copy beside the script

    def steps(script, *flags) -> list[dict]:
        reset()
        monkeypatch.setattr(sys, "argv", [str(script), str(bases["train_sap_lora_sd3"]), kind, *more, *flags])
        runpy.run_path(str(script), run_name="__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    anchored, plain = steps(script), steps(shape)
    drift = [step["drift"] for step in anchored]
    assert drift[0] == 0
    assert anchored[0]["loss"] == plain[0]["loss"]  # the same loss and gradients as without the anchor
    assert anchored[0]["gradients"] == plain[0]["gradients"]
    assert min(drift[1:]) > 1e-6
    weighted = pytest.approx(0.5 * drift[1], rel=1e-3, abs=5e-7)
    assert anchored[1]["loss"] - plain[1]["loss"] == weighted  # of the same weights: what is new is w times the drift
    other = steps(script, "--class_prompt=a photo of a cat", "--max_train_steps=1")[0]
    assert other["drift"] > 1e-6
    assert other["gradients"] > 0
