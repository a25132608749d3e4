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

s is --strength. The training script of the backbone does everything else and takes all other flags; nothing in it is
changed but the functions that are replaced here.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from benchmark import HelpFormatter, load_script
from diffusers import DiffusionPipeline
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
STRENGTHS = {"prior": 1.0, "dco": 1000.0, "dop": 1.0, "l2": 1e-6}
ANCHORED = ("dco", "dop")  # methods that need the frozen model's predictions
CLASS_BATCH = 4  # class pictures made at once

# (step, anchor, student, args) -> the loss, and for the log its reconstruction and its other term
LossTerms = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


def parse_args(input_args: Sequence[str] | None = None, script: ModuleType | None = None) -> argparse.Namespace:
    """The training script's arguments with ours among them; `script` is that script where it is loaded already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=list(STRENGTHS), required=True, help="Which loss.")
    add("--backbone", choices=["sd15", "sdxl", "sd3"], required=True, help="Which training script.")
    add("--strength", type=float, help=f"s, or the weight of the added term (default: {STRENGTHS}).")
    add("--class_data_dir", type=Path, help="prior: folder of the class pictures (default: OUT/class_images).")
    add("--num_class_images", type=int, default=100, help="prior: pictures to make of the class.")
    add("--sampling_steps", type=int, default=50, help="prior: denoising steps of a class picture.")
    add("--guidance_scale", type=float, default=7.5, help="prior: guidance of the class pictures.")
    own, rest = parser.parse_known_args(input_args)
    if any(flag.split("=")[0] in ("--anchor_weight", "--anchor_source", "--train_text_encoder") for flag in rest):
        parser.error("--anchor_weight, --anchor_source and --train_text_encoder have no meaning here: leave them out")
    own.script = script or load_script(ROOT / f"train_sap_lora_{own.backbone}.py")
    own.strength = STRENGTHS[own.method] if own.strength is None else own.strength
    weight = f"--anchor_weight={float(own.method in ANCHORED)}"  # above 0 the script predicts anchors
    args = argparse.Namespace(**vars(own.script.parse_args([*rest, weight])) | vars(own))
    if args.method == "prior" and (args.class_prompt is None or args.num_class_images < 1):
        parser.error("--method prior needs --class_prompt and at least one of --num_class_images")
    if args.method == "prior" and args.validation_data_dir is not None:
        parser.error("--validation_data_dir cannot go with --method prior, whose class pictures take its place")
    return args


def make_class_images(args: argparse.Namespace) -> Path:
    """The folder of class pictures of the untrained base; those that are there are kept."""
    folder = Path(args.class_data_dir or Path(args.output_dir) / "class_images")
    paths = [folder / f"{number:04}.png" for number in range(args.num_class_images)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if not missing:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
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
    return folder


def prior(script: ModuleType, args: argparse.Namespace) -> dict[str, Callable]:
    """Class pictures are encoded with the subject's, as pictures that are held out, so batches never hold them.

    Each micro-step gets a second one of as many class pictures, with noise and timesteps of its own. As pictures that
    are held out they are cropped in the middle and not mirrored.
    """
    folder, loss_terms, draw, of_class = make_class_images(args), script.loss_terms, script.draw_micro_step, {}

    class SubjectImages(script.SubjectImages):
        def __init__(self, args):
            super().__init__(argparse.Namespace(**vars(args) | {"validation_data_dir": str(folder)}))
            self.captions[self.count :] = [args.class_prompt] * (len(self) - self.count)

    def draw_micro_step(run, index, items):
        images, key = run.images, (run.args.seed, run.accelerator.process_index, index, "class")
        generator = script.keyed_generator(*key)
        numbers = torch.randint(images.count, len(images), (len(items),), generator=generator).tolist()
        others = [images[number, (*key, i)] for i, number in enumerate(numbers)]
        of_class[index] = draw(run, -1 - index, others)
        return draw(run, index, items)

    def with_class(step, anchor, student, args):
        loss, reconstruction, _ = loss_terms(step, None, student, args)
        class_loss, *_ = loss_terms(of_class.pop(step.index), None, student, args)
        return loss + args.strength * class_loss, reconstruction, class_loss

    return {"SubjectImages": SubjectImages, "draw_micro_step": draw_micro_step, "loss_terms": with_class}


def dco(script: ModuleType, args: argparse.Namespace) -> dict[str, Callable]:
    """-log sigmoid(-beta (L_student - L_frozen)) of each sample; the anchor's prompt is the subject's own."""

    class SubjectImages(script.SubjectImages):
        def caption_all(self, captions):
            super().caption_all(captions)
            self.anchor_captions = list(self.captions)

    def loss_terms(step, anchor, student, args):
        prediction = student(step.model_input, step.timesteps, step.conditioning, step.prompts)
        prediction, frozen = script.to_target_space(prediction, step), script.to_target_space(anchor, step)
        weights = step.sample_weights * step.mask
        errors = [(weights * (step.target - one) ** 2).flatten(1).mean(1) for one in (prediction, frozen)]
        loss = -F.logsigmoid(-args.strength * (errors[0] - errors[1])).mean()
        options = (frozen, 0.0, step.sample_weights, step.mask)
        _, *parts = script.semantic_anchor_loss(prediction, step.target, *options)
        return loss, *parts

    return {"SubjectImages": SubjectImages, "loss_terms": loss_terms}


def dop(script: ModuleType, args: argparse.Namespace) -> dict[str, LossTerms]:
    """student(class) is drawn to frozen(class); the subject's prompt is only regressed to its target."""
    subject_terms = script.loss_terms

    def loss_terms(step, anchor, student, args):
        loss, reconstruction, _ = subject_terms(step, None, student, args)
        prediction = student(step.model_input, step.timesteps, step.anchor_conditioning, step.prompts)
        change = script.to_target_space(prediction, step) - script.to_target_space(anchor, step)
        preservation = (step.sample_weights * change**2).mean()
        return loss + args.strength * preservation, reconstruction, preservation

    return {"loss_terms": loss_terms}


def l2(script: ModuleType, args: argparse.Namespace) -> dict[str, LossTerms]:
    """The squares of A and B, summed."""
    plain = script.loss_terms

    def loss_terms(step, anchor, student, args):
        loss, reconstruction, _ = plain(step, None, student, args)
        squares = sum(parameter.square().sum() for parameter in student.parameters() if parameter.requires_grad)
        return loss + args.strength * squares, reconstruction, squares

    return {"loss_terms": loss_terms}


METHODS = {"prior": prior, "dco": dco, "dop": dop, "l2": l2}


def main(args: argparse.Namespace) -> None:
    """Train as the script does, with the method's functions in place of its own."""
    args = argparse.Namespace(**vars(args))
    script = vars(args).pop("script")  # what is left is recorded in checkpoints
    functions = METHODS[args.method](script, args)
    unused = {"class_data_dir": None, "num_class_images": 100}  # flags of the script, too, which it warns of
    with patch.multiple(script, **functions):
        script.main(argparse.Namespace(**vars(args) | unused))


if __name__ == "__main__":
    arguments = parse_args()
    script = arguments.script
    try:
        main(arguments)
    except (script.UsageError, script.RunError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, script.UsageError) else 1)
