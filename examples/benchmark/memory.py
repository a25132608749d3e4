# SPDX-License-Identifier: Apache-2.0
"""Estimate what training needs, without a GPU: a step at full size on meta tensors, of which every byte is counted.

Meta tensors have shapes and storages and no numbers. What is not in the estimate: the CUDA context (about half a GiB),
workspaces of the libraries, and what the allocator loses between its blocks.
"""

import dataclasses
import weakref
from collections.abc import Iterable
from unittest import mock

import torch
from diffusers.training_utils import cast_training_params
from models import BACKBONES, Backbone
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]
RANK = 4
BYTES_IN_4_BITS = 0.5 + 4 / 64  # a weight, and a float32 scale for each block of 64
CARDS = [8, 12, 16, 24]  # GB, as they are sold
BESIDE = 0.8e9  # bytes left for what the estimate does not see


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and not yet gone, and the most there were at once.

    `before` are tensors that were there before: views of them make nothing. Tensors on other devices than `device`, if
    one is named, do not count.
    """

    def __init__(self, before: Iterable[torch.Tensor] = (), device: str | None = None):
        super().__init__()
        self.live, self.peak, self.device = 0, 0, device
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self.device in (None, tensor.device.type):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@dataclasses.dataclass
class Footprint:
    """Bytes of one way to train one backbone."""

    backbone: str
    flags: str
    base: float
    adapters: int  # weights, gradients and AdamW's two states, all float32
    step: int  # the most that a step holds beside them
    anchor: int  # the most that the anchors' forward holds beside them

    @property
    def total(self) -> float:
        return self.base + self.adapters + max(self.step, self.anchor)


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_) -> torch.Tensor:
    """What GPUs compute attention with: no matrix of all pairs, which meta tensors would get."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def inputs_of(backbone: Backbone, batch: int, dtype: torch.dtype) -> dict:
    """Arguments of the denoiser's forward, for so many samples."""
    edge = backbone.resolution // 8
    conditioning = {name: torch.randn(batch, *shape, dtype=dtype) for name, shape in backbone.conditioning.items()}
    sample = torch.randn(batch, backbone.latent_channels, edge, edge, dtype=dtype)
    if backbone.script.endswith("sd3"):
        return {"hidden_states": sample, "timestep": torch.ones(batch), **conditioning}
    added = {}
    if "text_embeds" in conditioning:
        added = {
            "added_cond_kwargs": {"text_embeds": conditioning.pop("text_embeds"), "time_ids": torch.ones(batch, 6)}
        }
    return {"sample": sample, "timestep": torch.ones(batch), **conditioning, **added}


def footprint(name: str, checkpointing: bool, anchor_batch: int = 4, dtype: torch.dtype = torch.bfloat16) -> Footprint:
    """Bytes of bf16 training at batch 1 in the backbone's own resolution, from a forward and a backward pass."""
    backbone = BACKBONES[name, "full"]
    attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    with torch.device("meta"), attention:
        model = backbone.build(dtype, "meta")
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        cast_training_params(model, torch.float32)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        weights = list(model.parameters())
        before = [*weights, *model.buffers()]
        base = sum(weight.nbytes for weight in weights if not weight.requires_grad)
        adapters = 4 * sum(weight.nbytes for weight in weights if weight.requires_grad)
        with LiveBytes(before) as step, torch.autocast("cpu", dtype):
            model(**inputs_of(backbone, 1, dtype), return_dict=False)[0].float().square().mean().backward()
        model.requires_grad_(False)
        with LiveBytes(before) as anchor, torch.no_grad(), torch.autocast("cpu", dtype):
            model(**inputs_of(backbone, anchor_batch, dtype), return_dict=False)
    flags = "--mixed_precision bf16" + (" --gradient_checkpointing" if checkpointing else "")
    return Footprint(name, flags, base, adapters, step.peak, anchor.peak)


def in_4_bits(full: Footprint) -> Footprint:
    """The same with every linear layer of the base in 4 bits; one layer's unpacked weights are little beside it."""
    model = BACKBONES[full.backbone, "full"].build(torch.bfloat16, "meta")
    linear = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    base = full.base - linear + linear / 2 * BYTES_IN_4_BITS
    return dataclasses.replace(full, flags=f"{full.flags} --bnb_quantization_config_path nf4.json", base=base)


def estimate(name: str) -> list[dict]:
    """Footprints of one backbone with several flags."""
    rows = [footprint(name, checkpointing) for checkpointing in tqdm((False, True), desc=name, leave=False)]
    rows.append(in_4_bits(rows[-1]))
    return [dataclasses.asdict(row) | {"total": row.total} for row in rows]


def memory_table(rows: list[dict]) -> str:
    """Footprints as Markdown, with the smallest card that has room."""
    lines = [
        "| backbone | flags | base | adapters, AdamW | step | anchors | in all | card |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{row[part] / 1e9:.2f}" for part in ("base", "adapters", "step", "anchor", "total"))
        fitting = [card for card in CARDS if row["total"] + BESIDE <= card * 1e9]
        card = f"{fitting[0]} GB" if fitting else f"over {CARDS[-1]} GB"
        lines.append(f"| {row['backbone']} | `{row['flags']}` | {sizes} | {card} |")
    return "\n".join(lines) + "\n"
