# SPDX-License-Identifier: Apache-2.0
"""A training script with the names that diffusers' SD3 and Flux scripts give to things, on a tiny base.

Where it says `# paste: ...` test_paste.py puts the blocks of examples/paste_into_your_script.md. It runs as it is too:
then it is DreamBooth-LoRA.
"""

# paste: imports and functions

import argparse
import json

import torch
from accelerate import Accelerator
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig

DENOISER_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(cpu=True)
    unwrap_model = accelerator.unwrap_model  # noqa: F841 (for what is pasted)
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.base)
    text_encoder_one, text_encoder_two = pipeline.text_encoder, pipeline.text_encoder_2
    tokenizer_one, tokenizer_two = pipeline.tokenizer, pipeline.tokenizer_2
    text_encoders, tokenizers = [text_encoder_one, text_encoder_two], [tokenizer_one, tokenizer_two]
    transformer = pipeline.transformer
    if args.kind == "flux":
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
            axes_dims_rope=(4, 4, 8), num_attention_heads=2, guidance_embeds=True,
            joint_attention_dim=transformer.config.joint_attention_dim,
            pooled_projection_dim=transformer.config.pooled_projection_dim,
        )  # fmt: skip
    for model in (transformer, *text_encoders, pipeline.text_encoder_3):
        model.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, target_modules=DENOISER_TARGETS, init_lora_weights="gaussian"))
    if args.train_text_encoder:
        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        text_encoder_one.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"))

    def encode_prompt(text_encoders, tokenizers, prompt, max_sequence_length):
        assert len(text_encoders) == len(tokenizers) == 2
        options = {"max_sequence_length": max_sequence_length, "do_classifier_free_guidance": False}
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(prompt, None, None, **options)
        text_ids = [torch.zeros(prompt_embeds.shape[1], 3)] if args.kind == "flux" else []
        return prompt_embeds, pooled_prompt_embeds, *text_ids

    @torch.no_grad()
    def compute_text_embeddings(prompt, text_encoders, tokenizers):
        return encode_prompt(text_encoders, tokenizers, prompt, args.max_sequence_length)

    if not args.train_text_encoder:
        embeddings = compute_text_embeddings(args.instance_prompt, text_encoders, tokenizers)
    # paste: class embeddings
    trained = [p for model in (transformer, text_encoder_one) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    transformer, text_encoder_one, optimizer = accelerator.prepare(transformer, text_encoder_one, optimizer)
    vae_scale_factor, guidance = 8, torch.ones(2)

    for _ in range(args.max_train_steps):
        if args.train_text_encoder:
            embeddings = encode_prompt(text_encoders, tokenizers, args.instance_prompt, args.max_sequence_length)
        prompt_embeds, pooled_prompt_embeds = (one.expand(2, *one.shape[1:]) for one in embeddings[:2])
        model_input, noise = torch.randn(2, 2, 16, 8, 8)
        sigmas = torch.rand(2, 1, 1, 1)
        timesteps, weighting = 1000 * sigmas.flatten(), 1 / (sigmas + 0.1)
        noisy_model_input = (1 - sigmas) * model_input + sigmas * noise
        inputs = {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled_prompt_embeds}
        if args.kind == "sd3":
            model_pred = transformer(noisy_model_input, timestep=timesteps, **inputs, return_dict=False)[0]
            if args.precondition_outputs:
                model_pred = model_pred * (-sigmas) + noisy_model_input
            target = model_input if args.precondition_outputs else noise - model_input
        else:
            latent_image_ids = FluxPipeline._prepare_latent_image_ids(2, 4, 4, accelerator.device, torch.float32)
            packed_noisy_model_input = FluxPipeline._pack_latents(noisy_model_input, *model_input.shape)
            inputs |= {"txt_ids": embeddings[2], "img_ids": latent_image_ids, "guidance": guidance}
            options = {"timestep": timesteps / 1000, "return_dict": False}
            model_pred = transformer(packed_noisy_model_input, **inputs, **options)[0]
            model_pred = FluxPipeline._unpack_latents(model_pred, 64, 64, vae_scale_factor)
            target = noise - model_input
        drift = torch.zeros(())
        # paste: anchor
        loss = (weighting * (model_pred.float() - target.float()) ** 2).mean()
        # paste: loss
        accelerator.backward(loss)
        gradients = sum(parameter.grad.abs().sum().item() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"loss": loss.item(), "drift": drift.item(), "gradients": gradients}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("kind", choices=["sd3", "flux"])
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--precondition_outputs", type=int, default=1)
    parser.add_argument("--instance_prompt", default="a photo of a dog")
    parser.add_argument("--class_prompt", default="a photo of a dog")
    parser.add_argument("--max_sequence_length", type=int, default=16)
    parser.add_argument("--max_train_steps", type=int, default=3)
    # paste: argument
    main(parser.parse_args())
