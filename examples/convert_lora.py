# SPDX-License-Identifier: Apache-2.0
"""Make the file that ComfyUI, A1111 and Forge read from a LoRA of SD1.5 or SDXL as diffusers has it.

    python examples/convert_lora.py sap-dog/pytorch_lora_weights.safetensors

Also from LoRAs of diffusers' scripts. Writes pytorch_lora_weights_kohya.safetensors beside it, by the trainers' own
functions, so this file stays in their repository. SD3 needs no such file.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the trainers are


def peft_key(key: str) -> str:
    """peft's name of a tensor, from any that diffusers has given it."""
    names = {key.replace(".processor.", "."): None}
    if ".lora_linear_layer." in key:
        names = convert_state_dict_to_peft(names)
    (key,) = convert_unet_state_dict_to_peft(names)
    return key.replace("magnitude_vector.weight", "magnitude_vector")


def layers_of(tensors: dict[str, Tensor], settings: dict) -> tuple[dict[str, dict[str, Tensor]], int]:
    """For each part of the pipeline its tensors by peft's names, and the alpha that they are scaled for."""
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if "lora_A." in name or ".down." in name]
    alpha = max(ranks, default=1)
    layers = {}
    for name, tensor in tensors.items():
        component, _, key = name.partition(".")
        if component not in ("unet", "text_encoder", "text_encoder_2") or "lora" not in key:
            raise ValueError(f"{name} is of no LoRA for SD1.5 or SDXL in diffusers' form")
        if component != "unet":
            key = f"text_model.{key.removeprefix('text_model.')}"  # transformers 5.6 leaves it out
        key = peft_key(key)
        if ".lora_B." in key:
            tensor = tensor * (settings.get(f"{component}.lora_alpha", tensor.shape[1]) / alpha)
        layers.setdefault(component, {})[key] = tensor
    return layers, alpha


def base_of(tensors: dict[str, Tensor]) -> str:
    """Which base a LoRA is for, by layers that only one of them has."""
    names = " ".join(tensors)
    if ".transformer_blocks.1." in names or "text_encoder_2." in names:
        return "sdxl"
    if ".down_blocks.0.attentions." in names or ".up_blocks.3.attentions." in names:
        return "sd15"
    raise ValueError("its layers do not tell whether it is for SD1.5 or SDXL: say it by --base")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="DIFFUSERS_FILE")
    parser.add_argument("--base", choices=["sd15", "sdxl"], help="where the file's layers do not tell it")
    args = parser.parse_args()
    output = args.file.with_name(f"{args.file.stem}_kohya.safetensors")
    if output.exists():
        parser.error(f"{output} is there already: move it first")
    try:
        with safe_open(args.file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        layers, alpha = layers_of(found, settings)
        script = importlib.import_module(f"train_sap_lora_{args.base or base_of(found)}")
    except (SafetensorError, OSError, ValueError) as error:
        parser.error(f"{args.file} cannot be converted: {error}")
    with script.replacing(output) as partial:
        script.write_safetensors(script.kohya_state(layers, alpha), partial, {"ss_network_module": "networks.lora"})
    print(f"written: {output}")
