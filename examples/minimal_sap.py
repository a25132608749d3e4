# SPDX-License-Identifier: Apache-2.0
"""Semantic Anchoring Personalization in a small LoRA script for SD3: what is marked SAP is all that it adds.

    python examples/minimal_sap.py                      # on the tiny world, a minute on a CPU
    python examples/minimal_sap.py --anchor_weight 0    # plain DreamBooth-LoRA

Made to be read: one process, float32, no checkpoints. The real trainer is train_sap_lora_sd3.py;
sap_anchor.py beside this file is the same term for any other script.
"""

import argparse
import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer  # SAP
from PIL import Image, ImageOps
from tqdm import tqdm

WORLD = Path(__file__).resolve().parent / "tiny_world"


@contextlib.contextmanager  # SAP
def adapters_disabled(model):  # SAP
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]  # SAP
    try:  # SAP
        for layer in layers:  # SAP
            layer._disable_adapters = True  # SAP: the flag alone; disable_adapters() changes requires_grad too
        yield  # SAP
    finally:  # SAP
        for layer in layers:  # SAP
            layer._disable_adapters = False  # SAP


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(WORLD / "sd3"), help="SD3 pipeline.")
    parser.add_argument("--photos", type=Path, default=WORLD / "dataset" / "ball", help="Pictures of the subject.")
    parser.add_argument("--subject_prompt", default="a photo of sks ball", help="Subject prompt.")
    parser.add_argument("--class_prompt", default="a photo of a ball", help="Anchor prompt.")
    parser.add_argument(
        "--sample_prompt", default="a photo of a sks ball in the snow", help="What is drawn at the end."
    )
    parser.add_argument("--anchor_weight", type=float, default=0.5, help="w of the objective.")
    parser.add_argument("--resolution", type=int, default=64, help="Edge of the pictures in pixels.")
    parser.add_argument("--steps", type=int, default=300, help="Training steps.")
    parser.add_argument("--batch_size", type=int, default=4, help="Samples a step.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Learning rate.")
    parser.add_argument("--output_dir", default="outputs/minimal", help="Folder of the LoRA and the sample.")
    parser.add_argument("--seed", type=int, default=0, help="Seed.")
    return parser.parse_args(input_args)


@torch.no_grad()
def encode_prompt(pipeline, prompt):
    """Prompt embeddings (1, tokens, channels) and pooled ones (1, channels)."""
    return pipeline.encode_prompt(prompt, None, None, max_sequence_length=77)[::2]


@torch.no_grad()
def encode_photos(pipeline, folder, resolution):
    """Latents (pictures, channels, height, width)."""
    files, size = sorted(folder.glob("*.[jp][pn]*g")), (resolution, resolution)
    photos = [ImageOps.fit(Image.open(file).convert("RGB"), size) for file in files]
    latents = pipeline.vae.encode(pipeline.image_processor.preprocess(photos).to(pipeline.vae.device)).latent_dist.mean
    return (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor


def main(args):
    """Train; returns the two terms of the loss, averaged over the last fifth of the steps."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.model).to(device)
    embeds, pooled = encode_prompt(pipeline, args.subject_prompt)
    class_embeds, class_pooled = encode_prompt(pipeline, args.class_prompt)  # SAP
    latents = encode_photos(pipeline, args.photos, args.resolution)

    transformer = pipeline.transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(transformer)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer, history = torch.optim.AdamW(parameters, lr=args.learning_rate), []

    def predict(noisy, sigmas, embeds, pooled):
        embeds, pooled = embeds.expand(len(noisy), -1, -1), pooled.expand(len(noisy), -1)
        return transformer(noisy, embeds, pooled, sigmas.flatten() * 1000).sample

    for _ in tqdm(range(args.steps)):
        x0 = latents[torch.randint(len(latents), (args.batch_size,))]
        noise = torch.randn_like(x0)
        sigmas = torch.sigmoid(torch.randn(args.batch_size, 1, 1, 1, device=device))
        noisy, target = (1 - sigmas) * x0 + sigmas * noise, noise - x0
        prediction = predict(noisy, sigmas, embeds, pooled)
        with torch.no_grad(), adapters_disabled(transformer):  # SAP: same noisy latents, same time, class prompt
            anchor = predict(noisy, sigmas, class_embeds, class_pooled)  # SAP
        reconstruction, drift = F.mse_loss(prediction, target), F.mse_loss(prediction, anchor)  # SAP: drift
        loss = reconstruction + args.anchor_weight * drift  # SAP: Eq. 5
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.stack([reconstruction, drift]).detach())

    pipeline.save_lora_weights(args.output_dir, transformer_lora_layers=get_peft_model_state_dict(transformer))
    size = {"height": args.resolution, "width": args.resolution, "max_sequence_length": 77}
    picture = pipeline(args.sample_prompt, generator=torch.manual_seed(args.seed), guidance_scale=3.0, **size).images[
        0
    ]
    picture.save(Path(args.output_dir) / "sample.png")
    terms = torch.stack(history[-max(1, args.steps // 5) :]).mean(0).tolist()
    print(f"reconstruction {terms[0]:.4f}, drift {terms[1]:.4f}; written: {args.output_dir}")
    return terms


if __name__ == "__main__":
    main(parse_args())
