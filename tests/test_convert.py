# SPDX-License-Identifier: Apache-2.0
"""examples/convert_lora.py makes from a LoRA's diffusers file what the trainer writes beside it for other programs."""

import importlib
import runpy
import sys

import pytest
import torch
from runner import LORA_FILE, ROOT, assert_equal, flags, train
from safetensors.torch import load_file, save_file

FILE = ROOT / "examples" / "convert_lora.py"
KOHYA = "pytorch_lora_weights_kohya.safetensors"


def convert(monkeypatch, *words):
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", [str(FILE), *map(str, words)])
    return runpy.run_path(str(FILE), run_name="__main__")


@pytest.fixture(scope="module")
def trained(bases, photos, tmp_path_factory):
    """Folders with both files of a LoRA on UNet and text encoders."""
    folder = tmp_path_factory.mktemp("trained")
    more = ["--train_text_encoder", "--output_kohya_format", "--rank=4", "--skip_final_inference"]
    for name in ("sd15", "sdxl"):
        script = f"train_sap_lora_{name}"
        train(script, flags(bases[script], photos, folder / name, *more))
    return folder


def originals(tensors):
    """The names that diffusers' scripts have given these tensors at one time or another."""
    renamed = {}
    for name, tensor in tensors.items():
        down, up = (".lora.down.", ".lora.up.")
        if name.startswith("text_encoder"):
            down, up = (".lora_linear_layer.down.", ".lora_linear_layer.up.")
        renamed[name.replace(".lora_A.", down).replace(".lora_B.", up)] = tensor
    return renamed


@pytest.mark.parametrize("named", [dict, originals], ids=["peft", "originals"])
def test_it_is_the_trainers_own_file(trained, tmp_path, monkeypatch, named):
    save_file(named(load_file(trained / "sd15" / LORA_FILE)), tmp_path / LORA_FILE)
    convert(monkeypatch, tmp_path / LORA_FILE)
    assert_equal(load_file(tmp_path / KOHYA), load_file(trained / "sd15" / KOHYA))
    with pytest.raises(SystemExit, match="2"):  # what is there stays
        convert(monkeypatch, tmp_path / LORA_FILE)


def test_sdxl_has_its_own_names(trained, tmp_path, monkeypatch):
    save_file(load_file(trained / "sdxl" / LORA_FILE), tmp_path / LORA_FILE)
    made = convert(monkeypatch, tmp_path / LORA_FILE)
    script = importlib.import_module("train_sap_lora_sdxl")
    layers, alpha = made["layers_of"](load_file(tmp_path / LORA_FILE), {})
    assert_equal(load_file(tmp_path / KOHYA), script.kohya_state(layers, alpha, 2))
    # The tiny UNet has one layer a block, where published ones have two.
    assert_equal(script.kohya_state(layers, alpha, 1), load_file(trained / "sdxl" / KOHYA))


def test_alpha_of_another_trainers_file_counts():
    layers_of = runpy.run_path(str(FILE))["layers_of"]
    tensors = {f"unet.{name}.lora_B.weight": torch.ones(3, rank) for name, rank in (("a", 2), ("b", 4))}
    layers, alpha = layers_of(tensors, {"unet.lora_alpha": 8})
    scales = {name: tensor.mean().item() * alpha / tensor.shape[1] for name, tensor in layers["unet"].items()}
    assert scales == {"a.lora_B.weight": 8 / 2, "b.lora_B.weight": 8 / 4}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"transformer.x.lora_A.weight": torch.ones(1)}, "transformer.x.lora_A.weight is of no LoRA for SD1.5"),
        ({"unet.conv_in.weight": torch.ones(1)}, "unet.conv_in.weight is of no LoRA"),
        ({"unet.mid_block.to_k.lora_A.weight": torch.ones(1)}, "say it by --base"),
        (None, "cannot be converted: Error while deserializing header"),
    ],
)
def test_what_it_cannot_convert(tmp_path, monkeypatch, capsys, tensors, says):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    if tensors is not None:
        save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit, match="2"):
        convert(monkeypatch, tmp_path / "x.safetensors")
    assert says in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1
