# SPDX-License-Identifier: Apache-2.0
"""Count the bytes of tensors that have shapes and storages and no numbers: what a GPU would need, known without one.

`tests/fake_gpu.py` counts a whole training of the scripts at full size like this; `tests/test_fake_gpu.py` makes the
table. What is not in it: the CUDA context (about half a GiB), workspaces of the libraries, what the allocator loses.
"""

import weakref
from collections.abc import Iterable

import torch
from models import BACKBONES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STAGES = {"texts": ["load_text_pipeline", "encode_texts"], "pictures": ["encode_images"],
          "training": ["load_denoiser", "train"]}  # fmt: skip
BYTES_IN_4_BITS = 0.5 + 4 / 64  # a weight, and a float32 scale for each block of 64
CARDS = [8, 12, 16, 24]  # GB, as they are sold
BESIDE = 0.8e9  # bytes left for what is not counted


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


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_) -> torch.Tensor:
    """What GPUs compute attention with: no matrix of all pairs, which meta tensors would get."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def saved_by_4_bits(backbone: str) -> float:
    """Bytes by which the denoiser in bf16 is smaller with its linear layers in 4 bits."""
    model = BACKBONES[backbone, "full"].build(torch.bfloat16, "meta")
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    return weights * (2 - BYTES_IN_4_BITS)


def memory_table(rows: list[tuple[str, str, dict[str, float]]]) -> str:
    """Backbones, flags and peaks of the scripts' functions (bytes) as Markdown, with the smallest card that fits."""
    lines = [f"| backbone | flags | {' | '.join(STAGES)} | card |", "|---" * (3 + len(STAGES)) + "|"]
    for backbone, flags, peaks in rows:
        stages = [max(peaks[name] for name in names) for names in STAGES.values()]
        fitting = [card for card in CARDS if max(stages) + BESIDE <= card * 1e9]
        sizes = " | ".join(f"{stage / 1e9:.2f}" for stage in stages)
        lines.append(f"| {backbone} | `{flags}` | {sizes} | {fitting[0] if fitting else f'over {CARDS[-1]}'} GB |")
    return "\n".join(lines) + "\n"
