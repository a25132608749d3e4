# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA with a neighbour of the anchor's loss: the baselines, on the same data, noise and optimizer.

    python neighbours.py --method dco --backbone sd15 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --instance_data_dir dog \
        --instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog" --output_dir dco-dog

    prior   DreamBooth's prior preservation (arXiv 2208.12242, Eq. 2): regress on a batch of class pictures, too,
            which the base model makes first
    dco     direct consistency optimization (arXiv 2402.12004): -log sigmoid(-s (L_student - L_frozen)), both
            reconstruction losses on the subject's prompt
    dop     differential output preservation (ai-toolkit): student(class) is drawn to frozen(class) at the same z_t,
            which costs one more forward and backward
    l2      s times the squares of the LoRA's A and B (arXiv 2505.19519)

and, to learn whether they are worth having, changes of the anchor itself, whose w is --weight:

    share   for a share s of the samples the student sees the class prompt and learns nothing but the anchor
    rising  the anchor's weight rises with the noise, from none to twice w; s has no meaning (T-LoRA, arXiv
            2507.05964, finds that the noisiest timesteps overfit most)
    falling the anchor's weight falls with the noise, from twice w to none

s is --strength. The training script of the backbone does everything else and takes all other flags: it is given
another loss.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from benchmark import HelpFormatter, image_files, load_script, path
from diffusers import DiffusionPipeline
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
STRENGTHS = {"prior": 1.0, "dco": 1000.0, "dop": 1.0, "l2": 1e-6, "share": 0.25, "rising": 1.0, "falling": 1.0}
ANCHORED = ("share", "rising", "falling")
CLASS_BATCH = 4  # class pictures made at once


def parse_args(input_args: Sequence[str] | None = None, script: ModuleType | None = None) -> argparse.Namespace:
    """The training script's arguments with ours among them; `script` is that script where it is loaded already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=list(STRENGTHS), required=True, help="Which loss.")
    add("--backbone", choices=["sd15", "sdxl", "sd3"], required=True, help="Which training script.")
    add("--strength", type=float, help=f"s, or the weight of the added term (default: {STRENGTHS}).")
    add("--weight", type=float, default=0.5, help="share, rising, falling: w.")
    add("--class_data_dir", type=path, help="prior: folder of the class pictures (default: OUT/class_images).")
    add("--num_class_images", type=int, default=100, help="prior: pictures to make of the class.")
    add("--sampling_steps", type=int, default=50, help="prior: denoising steps of a class picture.")
    add("--guidance_scale", type=float, default=7.5, help="prior: guidance of the class pictures.")
    own, rest = parser.parse_known_args(input_args)
    if any(flag.split("=")[0] in ("--anchor_weight", "--anchor_source", "--train_text_encoder") for flag in rest):
        parser.error("--anchor_weight, --anchor_source and --train_text_encoder have no meaning here: leave them out")
    own.script = script or load_script(ROOT / f"train_sap_lora_{own.backbone}.py")
    own.strength = STRENGTHS[own.method] if own.strength is None else own.strength
    weight = 0.0
    if own.method in ANCHORED:
        weight = own.weight
    elif own.method == "dop":  # so that the script predicts anchors; the method's weight is s
        weight = 1.0
    args = argparse.Namespace(**vars(own.script.parse_args([*rest, f"--anchor_weight={weight}"])) | vars(own))
    if args.method == "prior" and (args.class_prompt is None or args.num_class_images < 1):
        parser.error("--method prior needs --class_prompt and at least one of --num_class_images")
    if args.method == "prior" and args.validation_data_dir is not None:
        parser.error("--validation_data_dir cannot go with --method prior, whose class pictures take its place")
    return args


def make_class_images(args: argparse.Namespace) -> Path:
    """The folder of class pictures of the untrained base, with captions; what is there is kept."""
    folder = Path(args.class_data_dir or path(args.output_dir) / "class_images")
    paths = [folder / f"{number:04}.png" for number in range(args.num_class_images)]
    missing = [number for number, file in enumerate(paths) if not file.is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        draw_class_images(args, paths, missing)
    for file in image_files(folder):
        if not file.with_suffix(".txt").exists():
            file.with_suffix(".txt").write_text(args.class_prompt, encoding="utf-8")
    return folder


def draw_class_images(args: argparse.Namespace, paths: Sequence[Path], missing: Sequence[int]) -> None:
    """Pictures of the class prompt by the base model, those of `paths` whose numbers are missing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": args.resolution, "width": args.resolution, "num_inference_steps": args.sampling_steps}
    options["guidance_scale"] = args.guidance_scale
    if hasattr(args, "max_sequence_length"):  # SD3
        options["max_sequence_length"] = args.max_sequence_length
    for start in tqdm(range(0, len(missing), CLASS_BATCH), desc="Class pictures"):
        numbers = missing[start : start + CLASS_BATCH]
        generators = [torch.Generator().manual_seed((args.seed or 0) * 100003 + number) for number in numbers]
        images = pipeline([args.class_prompt] * len(numbers), generator=generators, **options).images
        for number, image in zip(numbers, images, strict=True):
            partial = paths[number].with_name(f".{number}.{os.getpid()}")
            image.save(partial, format="PNG")
            os.replace(partial, paths[number])


def predict(script: ModuleType, step, student) -> torch.Tensor:
    """The student's prediction (B, C, h, w) for the subject's prompts, in the space of the target."""
    prediction = student(step.model_input, step.timesteps, step.conditioning, step.prompts)
    return script.to_target_space(prediction, step)


def squared_errors(step, prediction: torch.Tensor) -> torch.Tensor:
    """Of each element, weighed as the script weighs its reconstruction term, which is their mean."""
    return step.mask * step.sample_weights * (step.target - prediction) ** 2


def prior(script: ModuleType, step, anchor: None, student, run) -> dict[str, torch.Tensor]:
    """Each micro-step gets a second one of as many class pictures, with noise and timesteps of its own.

    They are the pictures that are held out, so batches never hold them, and are cropped in the middle, not mirrored.
    """
    args, images = run.args, run.images
    reconstruction = squared_errors(step, predict(script, step, student)).mean()
    if step.index < 0:  # of a picture that is held out, for the log
        return {"loss": reconstruction, "loss/reconstruction": reconstruction}
    key = (args.seed, run.accelerator.process_index, step.index, "class")
    generator = script.keyed_generator(*key)
    numbers = torch.randint(images.count, len(images), (len(step.pictures),), generator=generator).tolist()
    items = [images[number, (*key, i)] for i, number in enumerate(numbers)]
    of_class = script.draw_micro_step(run, -1 - step.index, items)
    class_term = squared_errors(of_class, predict(script, of_class, student)).mean()
    loss = reconstruction + args.strength * class_term
    return {"loss": loss, "loss/reconstruction": reconstruction, "loss/class": class_term}


def dco(script: ModuleType, step, anchor: None, student, run) -> dict[str, torch.Tensor]:
    """-log sigmoid(-s (L_student - L_frozen)) of each sample; the frozen model sees the subject's own prompt."""
    with torch.no_grad(), script.adapters_disabled(student):
        frozen = predict(script, step, student)
    prediction = predict(script, step, student)
    errors = squared_errors(step, prediction)
    advantage = (errors - squared_errors(step, frozen)).flatten(1).mean(1)
    loss = -F.logsigmoid(-run.args.strength * advantage).mean()
    change = (step.sample_weights * (prediction - frozen) ** 2).mean()
    return {"loss": loss, "loss/reconstruction": errors.mean(), "loss/change": change}


def dop(script: ModuleType, step, anchor: torch.Tensor, student, run) -> dict[str, torch.Tensor]:
    """student(class) is drawn to frozen(class); the subject's prompt is only regressed to its target."""
    reconstruction = squared_errors(step, predict(script, step, student)).mean()
    of_class = student(step.model_input, step.timesteps, step.anchor_conditioning, step.prompts)
    change = script.to_target_space(of_class, step) - script.to_target_space(anchor, step)
    preservation = (step.sample_weights * change**2).mean()
    loss = reconstruction + run.args.strength * preservation
    return {"loss": loss, "loss/reconstruction": reconstruction, "loss/preservation": preservation}


def l2(script: ModuleType, step, anchor: None, student, run) -> dict[str, torch.Tensor]:
    """The squares of A and B, summed."""
    reconstruction = squared_errors(step, predict(script, step, student)).mean()
    squares = sum(parameter.square().sum() for parameter in student.parameters() if parameter.requires_grad)
    loss = reconstruction + run.args.strength * squares
    return {"loss": loss, "loss/reconstruction": reconstruction, "loss/l2": squares}


def share(script: ModuleType, step, anchor: torch.Tensor, student, run) -> dict[str, torch.Tensor]:
    """Samples that are drawn by a key see the class prompt in the place of their own, and no photo is their target."""
    key = (run.args.seed, run.accelerator.process_index, step.index, "share")
    draws = torch.rand(len(step.prompts), generator=script.keyed_generator(*key))
    of_class = (draws < run.args.strength).to(step.target.device)
    conditioning = {}
    for name, own in step.conditioning.items():
        chosen = of_class.reshape(-1, *[1] * (own.ndim - 1))
        conditioning[name] = torch.where(chosen, step.anchor_conditioning[name], own)
    mask = step.mask * ~of_class[:, None, None, None]
    return script.loss_terms(dataclasses.replace(step, conditioning=conditioning, mask=mask), anchor, student, run)


def by_noise(falling: bool, script: ModuleType, step, anchor: torch.Tensor, student, run) -> dict[str, torch.Tensor]:
    """The anchor's weight is w times twice the share of noise in the sample, or, falling, of what is no noise.

    The mean of either over the timesteps that are drawn is w.
    """
    prediction = predict(script, step, student)
    reconstruction = squared_errors(step, prediction).mean()
    noise = step.timesteps.float()[:, None, None, None] / run.scheduler.config.num_train_timesteps
    weight = 2 * noise
    if falling:
        weight = 2 * (1 - noise)
    change = (prediction - script.to_target_space(anchor, step)) ** 2
    anchor_term = (weight * step.sample_weights * change).mean()
    loss = reconstruction + run.args.anchor_weight * anchor_term
    return {"loss": loss, "loss/reconstruction": reconstruction, "loss/anchor": anchor_term}


METHODS = {
    "prior": prior,
    "dco": dco,
    "dop": dop,
    "l2": l2,
    "share": share,
    "rising": functools.partial(by_noise, False),
    "falling": functools.partial(by_noise, True),
}


def main(args: argparse.Namespace) -> None:
    """Train as the script does, with the method's loss in place of its own."""
    args = argparse.Namespace(**vars(args))
    script = vars(args).pop("script")  # what is left is recorded in checkpoints
    if args.method == "prior":
        args.validation_data_dir = str(make_class_images(args))
    # Flags of the script, too, which it warns of.
    args.class_data_dir = None
    args.num_class_images = 100
    script.main(args, functools.partial(METHODS[args.method], script))


if __name__ == "__main__":
    arguments = parse_args()
    script = arguments.script
    try:
        main(arguments)
    except (script.UsageError, script.RunError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, script.UsageError) else 1)
