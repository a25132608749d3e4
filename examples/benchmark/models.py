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
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
CLIP_G |= {"num_hidden_layers": 32, "hidden_act": "gelu"}
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"feed_forward_proj": "gated-gelu"}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
SD3_VAE = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
SD3_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
# What the public bases write into the `config.json` of each part, as far as sizes go.
PARTS = {
    "sd15": {"text_encoder": CLIP_L, "unet": SD15_UNET, "vae": VAE},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "unet": SDXL_UNET, "vae": VAE},
    "sd3": {
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5_XXL,
        "transformer": SD3_TRANSFORMER,
        "vae": VAE | SD3_VAE,
    },
}
SD15 = ("train_sap_lora_sd15", 4, {"scaling_factor": 0.18215})
SDXL = ("train_sap_lora_sdxl", 4, {"scaling_factor": 0.13025})
SD3 = ("train_sap_lora_sd3", 16, {"scaling_factor": 1.5305, "shift_factor": 0.0609})


def backbone(family: tuple, resolution: int, config: dict, conditioning: dict) -> Backbone:
    script, channels, vae_config = family
    return Backbone(script, resolution, config, conditioning, channels, vae_config)


# "mid" keeps each family's layout and is narrow enough for a CPU, yet bound by its arithmetic, not by its launches;
# "tiny" is for a look whether all goes through.
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
    ("sd15", "tiny"): backbone(
        SD15,
        64,
        SD15_UNET | {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32, "norm_num_groups": 8},
        {"encoder_hidden_states": (77, 32)},
    ),
    ("sdxl", "tiny"): backbone(
        SDXL,
        64,
        SDXL_UNET
        | {
            "block_out_channels": (32, 32, 64),
            "transformer_layers_per_block": 1,
            "attention_head_dim": (1, 1, 2),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,  # 32 and 6 times 8
        },
        {"encoder_hidden_states": (77, 32), "text_embeds": (32,)},
    ),
    ("sd3", "tiny"): backbone(
        SD3,
        64,
        SD3_TRANSFORMER
        | {
            "num_layers": 2,
            "num_attention_heads": 1,
            "caption_projection_dim": 64,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
        },
        {"encoder_hidden_states": (154, 64), "pooled_projections": (64,)},
    ),
}
