# SPDX-License-Identifier: Apache-2.0
"""Denoisers with random weights: those of SD1.5, SDXL and SD3-medium by their public sizes, and middling ones.

A `Backbone` says what a training script reads of a base pipeline: the denoiser's configuration, the shapes of its
conditioning, the channels and the scale of its latents, and its schedule.
"""

import dataclasses

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A denoiser of one script, by numbers alone."""

    script: str
    resolution: int  # pixels
    config: dict
    conditioning: dict[str, tuple[int, ...]]  # shapes of one prompt's embeddings
    latent_channels: int
    vae_config: dict

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.nn.Module:
        """The denoiser with random weights."""
        family = SD3Transformer2DModel if self.script.endswith("sd3") else UNet2DConditionModel
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                return family(**self.config)
        finally:
            torch.set_default_dtype(before)

    def scheduler(self) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
        """The diffusion process or flow that the family was trained with."""
        if self.script.endswith("sd3"):
            return FlowMatchEulerDiscreteScheduler(shift=3.0)
        return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the class's other defaults fit
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_TRANSFORMER = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD15 = ("train_sap_lora_sd15", 4, {"scaling_factor": 0.18215})
SDXL = ("train_sap_lora_sdxl", 4, {"scaling_factor": 0.13025})
SD3 = ("train_sap_lora_sd3", 16, {"scaling_factor": 1.5305, "shift_factor": 0.0609})


def backbone(family: tuple, resolution: int, config: dict, conditioning: dict) -> Backbone:
    script, channels, vae_config = family
    return Backbone(script, resolution, config, conditioning, channels, vae_config)


# "mid" keeps each family's layout and is narrow enough for a CPU, yet bound by its arithmetic, not by its launches.
BACKBONES = {
    ("sd15", "full"): backbone(SD15, 512, SD15_UNET, {"encoder_hidden_states": (77, 768)}),
    ("sdxl", "full"): backbone(SDXL, 1024, SDXL_UNET, {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)}),
    ("sd3", "full"): backbone(
        SD3, 1024, SD3_TRANSFORMER, {"encoder_hidden_states": (154, 4096), "pooled_projections": (2048,)}
    ),
    ("sd15", "mid"): backbone(
        SD15,
        256,
        SD15_UNET | {"sample_size": 32, "block_out_channels": (128, 256, 384, 384), "cross_attention_dim": 256},
        {"encoder_hidden_states": (77, 256)},
    ),
    ("sdxl", "mid"): backbone(
        SDXL,
        256,
        SDXL_UNET
        | {
            "sample_size": 32,
            "block_out_channels": (128, 256, 384),
            "transformer_layers_per_block": (1, 1, 3),
            "attention_head_dim": (2, 4, 6),
            "cross_attention_dim": 256,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 320,  # 128 and 6 times 32
        },
        {"encoder_hidden_states": (77, 256), "text_embeds": (128,)},
    ),
    ("sd3", "mid"): backbone(
        SD3,
        256,
        SD3_TRANSFORMER
        | {
            "sample_size": 32,
            "num_layers": 6,
            "num_attention_heads": 6,
            "caption_projection_dim": 384,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 256,
            "pos_embed_max_size": 48,
        },
        {"encoder_hidden_states": (154, 256), "pooled_projections": (256,)},
    ),
}
