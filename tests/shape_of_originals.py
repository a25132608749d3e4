# SPDX-License-Identifier: Apache-2.0
"""A training script with the names that diffusers' scripts give to things, on small denoisers.

Prompts go to them as tensors (SD3, FLUX), as a list (Z-Image), in a dict (SDXL), with a mask (Qwen-Image).

test_paste.py adds the lines of examples/paste_into_your_script.md. It runs as it is too: then it is DreamBooth-LoRA.
"""

import argparse
import json
from collections.abc import Sequence

import diffusers
import torch
from accelerate import Accelerator
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.training_utils import offload_models  # noqa: F401 (for what is pasted)
from peft import LoraConfig
from torch import Tensor

WIDTH = 96  # of the base's prompt embeddings
POOLED_WIDTH = 72
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def make_denoiser(kind: str, pipeline: StableDiffusion3Pipeline) -> torch.nn.Module:
    if kind == "sd3":
        return pipeline.transformer
    if kind == "flux":
        widths = {"joint_attention_dim": WIDTH, "pooled_projection_dim": POOLED_WIDTH, "axes_dims_rope": (4, 4, 8)}
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True, **HEADS, **widths)
    if kind == "qwen_image":
        widths = {"joint_attention_dim": WIDTH, "axes_dims_rope": (4, 4, 8)}
        return QwenImageTransformer2DModel(num_layers=1, **HEADS, **widths)
    if kind == "z_image":
        widths = {"dim": 32, "cap_feat_dim": WIDTH, "axes_dims": [4, 4, 8], "axes_lens": [256, 8, 8]}
        model = ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, **widths)
        model.x_pad_token.data.zero_()  # left as memory has it
        model.cap_pad_token.data.zero_()
        return model
    time_ids = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    blocks |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH}
    return UNet2DConditionModel(
        in_channels=16, out_channels=16, projection_class_embeddings_input_dim=POOLED_WIDTH + 48, **time_ids, **blocks
    )


def predict(kind: str, denoiser, noisy: Tensor, timesteps: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
    """The student's prediction for two samples of one prompt."""
    if kind == "z_image":
        captions = [embeddings[0], embeddings[0]]
        predictions = denoiser(list(noisy.unsqueeze(2)), 1 - timesteps / 1000, captions, return_dict=False)[0]
        return -torch.stack(predictions).squeeze(2)
    prompt_embeds = embeddings[0].expand(2, -1, -1)
    if kind == "sdxl_advanced":
        added = {"time_ids": torch.rand(2, 6), "text_embeds": embeddings[1].expand(2, -1)}
        return denoiser(noisy, timesteps, prompt_embeds, added_cond_kwargs=added).sample
    inputs = {"hidden_states": noisy, "timestep": timesteps, "encoder_hidden_states": prompt_embeds}
    if kind in ("sd3", "flux"):
        inputs["pooled_projections"] = embeddings[1].expand(2, -1)
    if kind == "sd3":
        return denoiser(**inputs, return_dict=False)[0]
    inputs |= {"hidden_states": FluxPipeline._pack_latents(noisy, *noisy.shape), "timestep": timesteps / 1000}
    if kind == "flux":
        image_ids = FluxPipeline._prepare_latent_image_ids(2, 4, 4, noisy.device, torch.float32)
        inputs |= {"txt_ids": embeddings[2], "img_ids": image_ids, "guidance": torch.ones(2)}
    else:
        inputs |= {"encoder_hidden_states_mask": embeddings[1], "img_shapes": [(1, 4, 4)] * 2}
    return FluxPipeline._unpack_latents(denoiser(**inputs, return_dict=False)[0], 64, 64, 8)


def main(args: argparse.Namespace) -> None:
    diffusers.utils.logging.set_verbosity_error()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    text_encoding_pipeline = pipeline = StableDiffusion3Pipeline.from_pretrained(args.base)
    text_encoder_one, tokenizer_one = pipeline.text_encoder, pipeline.tokenizer
    text_encoder_two, tokenizer_two = pipeline.text_encoder_2, pipeline.tokenizer_2
    text_encoder_three, tokenizer_three = pipeline.text_encoder_3, pipeline.tokenizer_3
    three = args.kind == "sd3"
    text_encoders = [text_encoder_one, text_encoder_two] + [text_encoder_three] * three
    tokenizers = [tokenizer_one, tokenizer_two] + [tokenizer_three] * three
    denoiser = make_denoiser(args.kind, pipeline)
    for model in (denoiser, *text_encoders, text_encoder_three):
        model.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"))
    if args.train_text_encoder:
        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        text_encoder_one.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"))
    unet = transformer = denoiser  # noqa: F841 (for what is pasted)

    def encode_prompt(text_encoders, tokenizers, prompt, fourth):
        assert len(text_encoders) == len(tokenizers) == 2 + three
        assert fourth == (args.clip_skip if args.kind == "sdxl_advanced" else args.max_sequence_length)
        options = {"max_sequence_length": 16, "do_classifier_free_guidance": False}
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(prompt, None, None, **options)
        text_ids = [torch.zeros(prompt_embeds.shape[1], 3)] if args.kind == "flux" else []
        return prompt_embeds, pooled_prompt_embeds, *text_ids

    @torch.no_grad()
    def compute_text_embeddings(prompt, text_encoding_pipeline):
        options = {"max_sequence_length": 16, "do_classifier_free_guidance": False}
        prompt_embeds = text_encoding_pipeline.encode_prompt(prompt, None, None, **options)[0]
        return list(prompt_embeds) if args.kind == "z_image" else (prompt_embeds, None)

    def instance_embeddings():
        if args.kind in ("z_image", "qwen_image"):
            return compute_text_embeddings(args.instance_prompt, text_encoding_pipeline)
        fourth = args.clip_skip if args.kind == "sdxl_advanced" else args.max_sequence_length
        return encode_prompt(text_encoders, tokenizers, args.instance_prompt, fourth)

    # Handle class prompt for prior-preservation.
    trained = [p for model in (denoiser, text_encoder_one) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    denoiser = accelerator.prepare(denoiser)

    for _ in range(args.max_train_steps):
        embeddings = instance_embeddings()
        model_input, noise = torch.randn(2, 2, 16, 8, 8)
        sigmas = torch.rand(2, 1, 1, 1)
        timesteps, weighting = 1000 * sigmas.flatten(), 1 / (sigmas + 0.1)
        noisy_model_input = (1 - sigmas) * model_input + sigmas * noise
        target = noise - model_input
        model_pred = predict(args.kind, denoiser, noisy_model_input, timesteps, embeddings)
        if args.kind == "sd3" and args.precondition_outputs:
            model_pred = model_pred * (-sigmas) + noisy_model_input
            target = model_input
        mse_loss_weights = weighting.flatten()
        loss = (weighting * (model_pred.float() - target.float()) ** 2).mean()
        accelerator.backward(loss)
        gradients = sum(parameter.grad.abs().sum().item() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        logs = {"loss": loss.item(), "gradients": gradients}
        print(json.dumps(logs))
        assert len(mse_loss_weights) == 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("kind", choices=["sd3", "flux", "qwen_image", "z_image", "sdxl_advanced"])
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--precondition_outputs", type=int, default=1)
    parser.add_argument("--snr_gamma", type=float)
    parser.add_argument("--clip_skip", type=int)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--instance_prompt", default="a photo of a dog")
    parser.add_argument("--class_prompt", default="a photo of a dog")
    parser.add_argument("--max_sequence_length", type=int, default=16)
    parser.add_argument("--max_train_steps", type=int, default=2)
    main(parser.parse_args())
