# SPDX-License-Identifier: Apache-2.0
"""The real models' block structures, a few channels wide: every layer has its real name and a shape of its own."""

import functools
import math

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SD15_UNET = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (4, 8, 12, 12),
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
}
SDXL_UNET = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "block_out_channels": (4, 8, 12),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 14,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}
UNETS = {"sd15": SD15_UNET, "sd2": SD15_UNET | {"use_linear_projection": True}, "sdxl": SDXL_UNET}
TRANSFORMERS = {"sd3": {}, "sd35": {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}}  # both medium
TEXT_LAYERS = {"sd15": [12], "sd2": [23], "sdxl": [12, 32], "sd3": [12, 32], "sd35": [12, 32]}
BASES = tuple(TEXT_LAYERS)


def build(base: str) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that may hold a LoRA."""
    torch.manual_seed(0)
    if base in UNETS:
        parts = {"unet": UNet2DConditionModel(sample_size=8, norm_num_groups=2, **UNETS[base])}
    else:
        sizes = {"sample_size": 4, "num_layers": 24, "attention_head_dim": 4, "num_attention_heads": 2}
        sizes |= {"joint_attention_dim": 14, "caption_projection_dim": 8, "pooled_projection_dim": 10}
        parts = {"transformer": SD3Transformer2DModel(pos_embed_max_size=2, **sizes, **TRANSFORMERS[base])}
    for index, layers in enumerate(TEXT_LAYERS[base]):
        size = {"hidden_size": 6 + 2 * index, "intermediate_size": 10, "num_attention_heads": 2, "vocab_size": 9}
        config = CLIPTextConfig(num_hidden_layers=layers, max_position_embeddings=7, projection_dim=4, **size)
        kind = CLIPTextModelWithProjection if index or base.startswith("sd3") else CLIPTextModel
        parts[f"text_encoder_{index + 1}" if index else "text_encoder"] = kind(config)
    return parts


parts = functools.cache(build)


@functools.cache
def weights(base: str) -> dict[str, torch.Tensor]:
    """The weight of every linear and convolutional layer, by its name as diffusers' files have it."""
    found = {}
    for part, model in parts(base).items():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection")):
                    name = f"text_model.{name}"  # which transformers 5.6 dropped
                found[f"{part}.{name}"] = module.weight.detach()
    return found


def trained(base: str, endings: tuple[str, ...], rank: int, alpha: float, use_dora: bool = False):
    """A random LoRA on the layers with these endings: what the trainer holds, and its change of each weight.

    Returns `{part: {peft key: tensor}}` and `{layer: change}`. DoRA's change is m * (W + s BA) / ||W + s BA|| - W,
    with one norm an output (eq. 5 of arXiv 2402.09353, which is what peft does).
    """
    generator, layers, changes = torch.Generator().manual_seed(rank), {}, {}
    for layer, weight in weights(base).items():
        if not layer.endswith(endings):
            continue
        part, name = layer.split(".", 1)
        kernel = weight.shape[2:]
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / math.sqrt(weight[0].numel())
        up = torch.randn(weight.shape[0], rank, *(1 for _ in kernel), generator=generator)
        change = alpha / rank * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        found = layers.setdefault(part, {})
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if use_dora:
            norm = torch.linalg.vector_norm(weight + change, dim=tuple(range(1, weight.ndim)), keepdim=True)
            size = norm * (0.5 + torch.rand(norm.shape, generator=generator))
            change = size / norm * (weight + change) - weight
            found[f"{name}.lora_magnitude_vector"] = size.transpose(0, 1) if kernel else size[:, 0]
        changes[layer] = change
    return layers, changes
