# SPDX-License-Identifier: Apache-2.0
"""How the trainers write a LoRA: pure functions, to be lifted into the three scripts.

`layers` is `{part of the pipeline: {peft key: tensor}}`, as `lora_layers(run)` gives it.
"""

import hashlib
import json
import re
from pathlib import Path

import safetensors.torch
import torch

KOHYA_PARTS = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "magnitude_vector": "dora_scale"}
SGM_BLOCK = r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)"
SGM_SLOTS = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}
SGM_NAMES = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv1": "in_layers.2", "conv2": "out_layers.3",
             "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection", "time_embedding": "time_embed",
             "add_embedding": "label_emb.0", "linear_1": "0", "linear_2": "2"}  # fmt: skip


def diffusers_tensors(layers: dict, rank: int, alpha: float) -> dict[str, torch.Tensor]:
    """The file for `load_lora_weights`: one style for all keys, as diffusers decides by the first of them.

    The scale alpha / rank is in `lora_B`, because most programs that read this file know no alpha but the rank.
    """
    tensors = {f"{part}.{key}": tensor for part, state in layers.items() for key, tensor in state.items()}
    return {re.sub("_vector$", "_vector.weight", key): tensor * (alpha / rank) if ".lora_B." in key else tensor
            for key, tensor in tensors.items()}  # fmt: skip


def kohya_tensors(layers: dict, rank: int, alpha: float, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """The file for kohya's tools and for what reads their files."""
    state = {}
    for part, tensors in layers.items():
        for key, tensor in tensors.items():
            module, kind = key.split(".lora_")
            name = f"{prefixes[part]}_{module.replace('.', '_')}"
            if kind == "A.weight":
                state[f"{name}.alpha"] = torch.tensor(len(tensor) * alpha / rank)  # readers divide by its own rank
            elif kind == "magnitude_vector":  # one an output, with the axes of the layer's weight
                tensor = tensor[:, None] if tensor.ndim == 1 else tensor.transpose(0, 1).contiguous()
            state[f"{name}.{KOHYA_PARTS[kind]}"] = tensor
    return state


def sgm_key(key: str, per_block: int) -> str:
    """A key of SDXL's UNet with Stability's (and sd-scripts') names, which count layers through all blocks."""

    def block(found: re.Match) -> str:
        side, index, kind, layer = found.groups()
        if side == "mid":
            return f"middle_block.{SGM_SLOTS[kind] or 2 * int(layer)}"
        row = int(index) * (per_block + 1) + (per_block if kind.endswith("samplers") else int(layer))
        return f"{'input' if side == 'down' else 'output'}_blocks.{row + (side == 'down')}.{SGM_SLOTS[kind]}"

    module, kind = key.replace("downsamplers.0.conv", "downsamplers.0.op").split(".lora_")
    return f"{'.'.join(SGM_NAMES.get(name, name) for name in re.sub(SGM_BLOCK, block, module).split('.'))}.lora_{kind}"


def lora_metadata(version: str, architecture: str, title: str, model: str, rank: int, alpha: float, trigger: str,
                  images: int, size: int, prediction: str) -> dict[str, str]:  # fmt: skip
    """What A1111, Forge, sd-scripts and ModelSpec 1.0.1 look for. No date: equal runs write equal bytes."""
    entries = {"base_model_version": version, "v2": version.startswith("sd_v2"), "network_module": "networks.lora",
               "network_dim": rank, "network_alpha": alpha, "output_name": title, "sd_model_name": Path(model).name,
               "tag_frequency": json.dumps({title: {trigger: images}}), "resolution": (size, size)}  # fmt: skip
    spec = {"sai_model_spec": "1.0.1", "architecture": f"{architecture}/lora", "implementation": "diffusers",
            "title": title, "trigger_phrase": trigger, "prediction_type": prediction,
            "resolution": f"{size}x{size}"}  # fmt: skip
    return {f"ss_{k}": str(v) for k, v in entries.items()} | {f"modelspec.{k}": v for k, v in spec.items()}


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file whose bytes follow from its content: the library writes metadata in a random order.

    Its hash is the one of sd-scripts, A1111 and ModelSpec: SHA-256 of all that follows the header.
    """
    data = memoryview(safetensors.torch.save(tensors))
    start = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[start:]).hexdigest()
    metadata = metadata | {"format": "pt", "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(bytes(data[8:start]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
    with path.open("wb") as file:
        file.writelines([len(text).to_bytes(8, "little"), text, data[start:]])


# ---- SD3 for sd-scripts and Forge: not needed by the other programs, which read the diffusers file ----

MMDIT_QKV = {"attn.to_{}": "x_block.attn.qkv", "attn2.to_{}": "x_block.attn2.qkv",
             "attn.add_{}_proj": "context_block.attn.qkv"}  # fmt: skip
MMDIT_NAMES = {"attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj", "ff": "x_block.mlp",
               "attn.to_add_out": "context_block.attn.proj", "ff_context": "context_block.mlp",
               "net.0.proj": "fc1", "net.2": "fc2"}  # fmt: skip


def mmdit_layers(layers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SD3's layers with Stability's names, under which q, k and v are one layer, whose rank is the sum of theirs."""
    layers, fused = dict(layers), {}
    for block in {key.split(".")[1] for key in layers if key.startswith("transformer_blocks.")}:
        for pattern, name in MMDIT_QKV.items():
            keys = [f"transformer_blocks.{block}.{pattern.format(letter)}.lora_" for letter in "qkv"]
            downs = [layers.pop(f"{key}A.weight") for key in keys if f"{key}A.weight" in layers]
            ups = [layers.pop(f"{key}B.weight", None) for key in keys]
            if downs:  # zeros for what of q, k and v has no LoRA
                rows = torch.zeros(max(len(up) for up in ups if up is not None), 0)
                fused[f"joint_blocks.{block}.{name}.lora_A.weight"] = torch.cat(downs)
                up = torch.block_diag(*(rows if up is None else up for up in ups))
                fused[f"joint_blocks.{block}.{name}.lora_B.weight"] = up
    for key, tensor in layers.items():
        for ours, theirs in MMDIT_NAMES.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        fused[key.replace("transformer_blocks.", "joint_blocks.")] = tensor
    return fused
