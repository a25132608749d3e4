# SPDX-License-Identifier: Apache-2.0
"""The Colab notebook, executed from its first cell to its last on the tiny world."""

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


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook and its output folder after a short run, as on a machine without a GPU."""
    output = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with_parameters(notebook, TINY_WORLD=True, STEPS=3, OUTPUT=str(output))
    notebook.metadata.kernelspec["name"] = "python3"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    return notebook, output


def test_it_trains_compares_and_exports(executed):
    notebook, output = executed
    grid = np.asarray(Image.open(output / "grid.png").convert("RGB"))
    assert grid.std() > 20
    exports = sorted(file.name for file in (output / "export").iterdir())
    assert exports == ["sap-ball-sd15-comfyui-a1111.safetensors", "sap-ball-sd15-diffusers.safetensors"]
    assert zipfile.ZipFile(output / "sap-ball-sd15.zip").namelist()
    kohya = load_file(output / "export" / exports[0])
    assert all(key.startswith("lora_unet") for key in kohya)
    lora = {w: load_file(output / f"w{w}" / "pytorch_lora_weights.safetensors") for w in ("0", "0.5")}
    assert any((lora["0"][key] != lora["0.5"][key]).any() for key in lora["0"])
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "accelerate launch train_sap_lora_sd15.py" in printed


def run_cells(*numbers, **values):
    """The variables after some code cells, with other settings."""
    notebook = with_parameters(nbformat.read(NOTEBOOK, as_version=4), **values)
    variables = {"WORLD": ROOT / "examples" / "tiny_world", "Path": Path}
    for number in (1, *numbers):
        exec(notebook.cells[number].source, variables)
    return variables


@pytest.mark.parametrize(("name", "prompt"), [("elephant", "a photo of an elephant"), ("dog", "a photo of a dog")])
def test_the_class_has_its_article(name, prompt):
    words, _ = run_cells(7, CLASS_NAME=name)["command"](0.5)
    assert f"--class_prompt={prompt}" in words


def test_a_notebook_by_itself_asks_for_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="address of their git repository into REPOSITORY"):
        run_cells(3)


def test_it_is_committed_without_outputs_and_valid():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count] == []
    assert notebook.metadata.accelerator == "GPU"
