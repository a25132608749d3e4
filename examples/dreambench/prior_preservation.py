# SPDX-License-Identifier: Apache-2.0
"""DreamBooth-LoRA with prior preservation for Stable Diffusion 1.x and 2.x: the baseline that the anchor replaces.

    python prior_preservation.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog" \
        --output_dir prior-dog

The base model makes class pictures first; each step then regresses on a batch of the subject and a batch of the class
(DreamBooth, arXiv 2208.12242, Eq. 2). Small on purpose, one process: it is here to be compared with. Random state is
keyed by seed and step, so a run that was stopped goes on from its last checkpoint as if it had not been.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tqdm import tqdm

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
LORA_FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Base pipeline: hub name or local folder.")
    add("--instance_data_dir", type=Path, required=True, help="Folder of the subject's pictures.")
    add("--instance_prompt", required=True, help="Subject prompt.")
    add("--class_prompt", required=True, help="Prompt of the class pictures.")
    add("--output_dir", type=Path, required=True, help="Folder of the LoRA, the class pictures and the checkpoints.")
    add("--num_class_images", type=int, default=100, help="Class pictures that the base model makes.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the class pictures' loss.")
    add("--resolution", type=int, default=512, help="Edge of the square that pictures are brought to.")
    add("--train_batch_size", type=int, default=1, help="Subject pictures a step; as many of the class are added.")
    add("--max_train_steps", type=int, default=500, help="Steps.")
    add("--learning_rate", type=float, default=1e-4, help="Learning rate, constant.")
    add("--rank", type=int, default=4, help="Rank of the LoRA.")
    add("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    add("--sampling_steps", type=int, default=50, help="Denoising steps of the class pictures.")
    add("--guidance_scale", type=float, default=7.5, help="Guidance of the class pictures.")
    add("--seed", type=int, default=0, help="Seed.")
    add("--resume_from_checkpoint", choices=["latest"], help="Go on from the last checkpoint.")
    args = parser.parse_args(input_args)
    if not args.instance_data_dir.is_dir() or not image_files(args.instance_data_dir):
        parser.error(f"--instance_data_dir: there are no pictures in {args.instance_data_dir}")
    return args


def image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def make_class_images(args: argparse.Namespace, pipeline: StableDiffusionPipeline) -> list[Path]:
    """Class pictures of the untrained base; those that are there already are kept."""
    folder = args.output_dir / "class_images"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(args.num_class_images)]
    for number, path in enumerate(tqdm(paths, desc="Class pictures")):
        if not path.is_file():
            generator = torch.Generator().manual_seed(args.seed * 100003 + number)
            options = {"num_inference_steps": args.sampling_steps, "guidance_scale": args.guidance_scale}
            size = {"height": args.resolution, "width": args.resolution}
            pipeline(args.class_prompt, generator=generator, **options, **size).images[0].save(path)
    return paths


@torch.no_grad()
def encode_images(args: argparse.Namespace, pipeline: StableDiffusionPipeline, files: list[Path]) -> torch.Tensor:
    """Scaled latents (pictures, channels, height, width): centre crops, the posterior's mean."""
    size = (args.resolution, args.resolution)
    pictures = [ImageOps.fit(ImageOps.exif_transpose(Image.open(file)).convert("RGB"), size) for file in files]
    pixels = VaeImageProcessor().preprocess(pictures).to(pipeline.vae.device)
    latents = [pipeline.vae.encode(one[None]).latent_dist.mean for one in pixels]
    return torch.cat(latents) * pipeline.vae.config.scaling_factor


@torch.no_grad()
def encode_prompt(pipeline: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    """Prompt embeddings (1, tokens, channels)."""
    return pipeline.encode_prompt(prompt, pipeline.device, 1, False)[0]


def loss_of(unet, scheduler: DDPMScheduler, latents: torch.Tensor, embeds: torch.Tensor, generator) -> torch.Tensor:
    """Mean squared error of the prediction, the scheduler's prediction type honoured."""
    count, device = len(latents), latents.device
    noise = torch.randn(latents.shape, generator=generator).to(device)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator).to(device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    kind = scheduler.config.prediction_type
    target = scheduler.get_velocity(latents, noise, timesteps) if kind == "v_prediction" else noise
    prediction = unet(noisy, timesteps, embeds.expand(count, -1, -1)).sample
    return F.mse_loss(prediction.float(), target.float())


def lora_of(unet) -> dict[str, torch.Tensor]:
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))


def save_checkpoint(args: argparse.Namespace, unet, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The LoRA as diffusers reads it, with the optimizer's moments, in a folder that is renamed when whole."""
    final = args.output_dir / f"checkpoint-{step}"
    partial = args.output_dir / f".{final.name}.partial"
    StableDiffusionPipeline.save_lora_weights(partial, unet_lora_layers=lora_of(unet))
    states = optimizer.state_dict()["state"]
    moments = {f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}
    save_file(moments, partial / "optimizer.safetensors")
    partial.rename(final)


def resume(args: argparse.Namespace, unet, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint, if there is one; the step to go on from."""
    steps = sorted(int(path.name.split("-")[1]) for path in args.output_dir.glob("checkpoint-*"))
    if args.resume_from_checkpoint is None or not steps:
        return 0
    folder = args.output_dir / f"checkpoint-{steps[-1]}"
    lora = {key.removeprefix("unet."): value for key, value in load_file(folder / LORA_FILE).items()}
    lora = {key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): v for key, v in lora.items()}
    set_peft_model_state_dict(unet, lora)
    states: dict[int, dict] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, name = key.split(".")
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return steps[-1]


def train(args: argparse.Namespace, pipeline: StableDiffusionPipeline) -> None:
    """DreamBooth: the subject's pictures and the class pictures, one loss each."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    subject = encode_images(args, pipeline, image_files(args.instance_data_dir))
    known = encode_images(args, pipeline, make_class_images(args, pipeline))
    subject_embeds, class_embeds = (encode_prompt(pipeline, p) for p in (args.instance_prompt, args.class_prompt))

    unet = pipeline.unet.requires_grad_(False)
    torch.manual_seed(args.seed)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS))
    cast_training_params(unet)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-2)
    start = resume(args, unet, optimizer)
    for step in tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, desc="Steps"):
        generator = torch.Generator().manual_seed(args.seed * 1000003 + step)
        batch = [torch.randint(len(x), (args.train_batch_size,), generator=generator) for x in (subject, known)]
        loss = loss_of(unet, scheduler, subject[batch[0]], subject_embeds, generator)
        loss = loss + args.prior_loss_weight * loss_of(unet, scheduler, known[batch[1]], class_embeds, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.checkpointing_steps == 0:
            save_checkpoint(args, unet, optimizer, step + 1)
    StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=lora_of(unet))


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, safety_checker=None)
    pipeline.to(device).set_progress_bar_config(disable=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train(args, pipeline)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
