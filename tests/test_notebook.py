# SPDX-License-Identifier: Apache-2.0
"""The Colab notebook, executed from its first cell to its last on the tiny world."""

import subprocess
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from runner import ROOT
from safetensors.torch import load_file

NOTEBOOK = ROOT / "examples" / "notebooks" / "sap_lora_colab.ipynb"


def with_parameters(notebook, **values):
    """The notebook with other values in its parameter cell; every name must be one that it has."""
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    names = {line.split(" = ")[0] for line in cell.source.splitlines() if " = " in line}
    assert set(values) <= names
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    return notebook


def test_it_trains_compares_and_exports_and_shows_what_the_trainer_says(tmp_path):
    """As on a machine without a GPU."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with_parameters(notebook, TINY_WORLD=True, STEPS=3, OUTPUT=str(tmp_path))
    notebook.metadata.kernelspec["name"] = "python3"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert grid.std() > 20
    exports = sorted(file.name for file in (tmp_path / "export").iterdir())
    assert exports == ["sap-ball-sd15-comfyui-a1111.safetensors", "sap-ball-sd15-diffusers.safetensors"]
    assert zipfile.ZipFile(tmp_path / "sap-ball-sd15.zip").namelist()
    kohya = load_file(tmp_path / "export" / exports[0])
    assert all(key.startswith("lora_unet") for key in kohya)
    lora = {w: load_file(tmp_path / f"w{w}" / "pytorch_lora_weights.safetensors") for w in ("0", "0.5")}
    assert any((lora["0"][key] != lora["0.5"][key]).any() for key in lora["0"])
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    printed = "".join(out.get("text", "") for out in outputs)
    assert "python train_sap_lora_sd15.py" in printed
    assert "Each picture is seen 2.4 times" in printed  # which the trainer warns of
    assert "No LoRA keys associated" not in printed and "Steps:" not in printed
    widths = {w: Image.open(tmp_path / f"curves-w{w}.png").width for w in ("0", "0.5")}
    assert widths["0.5"] > 1.8 * widths["0"]  # without an anchor there is no distance to it


def run_cells(*numbers, **values):
    """The variables after some code cells, with other settings."""
    notebook = with_parameters(nbformat.read(NOTEBOOK, as_version=4), **values)
    variables = {"WORLD": ROOT / "examples" / "tiny_world", "Path": Path}
    for number in (1, *numbers):
        exec(notebook.cells[number].source, variables)
    return variables


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"CLASS_NAME": "elephant"}, {"--class_prompt=a photo of an elephant"}),
        ({"CLASS_NAME": "dog"}, {"--class_prompt=a photo of a dog"}),
        ({"BACKBONE": "sdxl"}, {"--anchor_batch_size=1", "--use_8bit_adam", "--resolution=1024"}),  # in 16 GB
    ],
)
def test_the_command_follows_the_parameters(values, expected):
    words, _ = run_cells(7, **values)["command"](0.5)
    assert expected <= set(words)


def test_photos_of_an_iphone_count(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.HEIC", format="PNG")  # a plain Pillow reads no HEIC
    run_cells(3, 5, PHOTOS=str(tmp_path))
    assert "1 photos" in capsys.readouterr().out


def test_a_notebook_by_itself_clones_the_repository_and_asks_for_nothing(tmp_path, monkeypatch):
    """From the address on top; with what HEIC photos need."""
    published = tmp_path / "published"
    published.mkdir()
    (published / "train_sap_lora_sd15.py").write_text("")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=x"]):
        subprocess.run(["git", *identity, *words], cwd=published, check=True)
    run, installed = subprocess.run, []

    def without_pip(words, **options):
        if "pip" in words:
            installed.extend(words)
        else:
            run(words, **options)

    monkeypatch.setattr(subprocess, "run", without_pip)
    (tmp_path / "colab").mkdir()
    monkeypatch.chdir(tmp_path / "colab")
    with pytest.raises(SystemExit, match="REPOSITORY above"):
        run_cells(3)  # nobody has written the address yet
    run_cells(3, REPOSITORY=f"file://{published}")
    assert Path("train_sap_lora_sd15.py").is_file() and Path.cwd().name == "sap-lora-repository"
    assert {"requirements.txt", "pillow-heif", "matplotlib"} <= set(installed)
    monkeypatch.chdir(tmp_path / "colab")
    run_cells(3, REPOSITORY="file:///gone")  # run again, it takes what is there


def test_it_is_committed_without_outputs_and_valid():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count] == []
    assert notebook.metadata.accelerator == "GPU"
