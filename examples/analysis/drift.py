# SPDX-License-Identifier: Apache-2.0
"""How far personalisation drifts from the base model: Figures 2 and 8 of the SAP paper, for any LoRA's checkpoints.

    python drift.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog" \
        --resolution 512 --run "w = 0=loras/sd15-w0-pretrained-seed0/dog" \
        --run "w = 0.5=loras/sd15-w0.5-pretrained-seed0/dog" --final_step 500 --output_dir drift

Every LoRA sees the same evaluation set: each picture of the subject, with the same noises, at the same timesteps.
With y the network's output (noise, v, or the velocity of a flow) and ||.|| the L2 norm of one sample, averaged:

    (a) reconstruction  || target - y_theta(z_t, c_sbj) ||
    (b) drift           || y_theta(z_t, c_sbj) - y_base(z_t or z_t^cls, c_cls) ||
    (c) objective       Eq. 5: squares of (a) and, with weight w, of (b) at one z_t; means over elements

Step 0 is the base model on the subject's prompt. Writes drift.csv and drift.png; what was measured once is kept.
"""

import argparse
import copy
import csv
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)

PIPELINES = {
    one.__name__: one for one in (StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline)
}
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
LORA_FILE = "pytorch_lora_weights.safetensors"
BASE = "base"  # stands for the file of step 0
OUTPUTS = {"epsilon": "noise", "v_prediction": "v", "flow": "velocity"}
MEASURES = ("reconstruction", "same", "class")  # (a), (b) at one z_t, (b) with the anchor at z_t^cls


class UsageError(ValueError):
    """Bad input, said in one sentence."""


# -------------------------------------------------------------------------------------------------------- command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of a flag where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        empty = action.default is None or action.default is False
        return action.help if empty else super()._get_help_string(action)


def path(text: str) -> Path:
    """A flag's value as a path, in which "~" is the home folder."""
    return Path(text).expanduser()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a contradiction ends it before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser)
    add_set_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        check_args(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="MODEL", help="base model: the anchor, and step 0")
    add("--run", action="append", required=True, metavar="LABEL=FOLDER", dest="runs",
        help="a run's folder, with checkpoint-STEP folders or LoRA files whose names end in the step; repeat it for "
        "more runs; runs of one label (seeds) become one line with a band")  # fmt: skip
    add("--final_step", type=int, metavar="STEP", help=f"step of {LORA_FILE} in the run's folder; else it is left out")
    add("--output_dir", type=path, required=True, metavar="FOLDER", help="gets drift.csv and drift.png")
    add("--anchor_weight", type=float, default=0.5, metavar="W", help="w of the objective (c), for every run")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the weights")
    add("--batch_size", type=int, default=8, metavar="N", help="samples at a time")


def add_set_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation set").add_argument
    add("--instance_data_dir", type=path, required=True, metavar="FOLDER", help="pictures of the subject")
    add("--instance_prompt", required=True, metavar="TEXT", help='c_sbj: "a photo of sks dog"')
    add("--class_prompt", required=True, metavar="TEXT", help='c_cls: "a photo of a dog"')
    add("--resolution", type=int, required=True, metavar="PIXELS", help="side of the centre crop, as in training")
    add("--num_timesteps", type=int, default=10, metavar="N", help="timesteps, evenly spread over the noise schedule")
    add("--num_noises", type=int, default=2, metavar="N", help="noises of each picture at each timestep")
    add("--seed", type=int, default=0, help="of the noises and of generated class pictures")
    add("--max_sequence_length", type=int, default=77, metavar="N", help="SD3: tokens of T5, as in training")
    add("--anchor_latents", choices=["same", "class"], default="same",
        help="where (b) takes its anchor: at the student's z_t, as Eq. 5, or at z_t^cls, as Figure 2: a class "
        "picture with the same noise")  # fmt: skip
    add("--class_data_dir", type=path, metavar="FOLDER", help="class pictures; else the base model makes them")
    add("--num_class_images", type=int, metavar="N", help="how many it makes; as many as there are of the subject")
    add("--num_inference_steps", type=int, default=50, metavar="N", help="sampling steps of class pictures")
    add("--guidance_scale", type=float, default=7.5, metavar="S", help="guidance of class pictures")


def check_args(args: argparse.Namespace) -> None:
    """Check all that can be checked without a model; fill in `images`, `class_images` and `loras`."""
    if args.pretrained_model_name_or_path.startswith("~"):
        args.pretrained_model_name_or_path = str(path(args.pretrained_model_name_or_path))
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UsageError(f"--output_dir: {args.output_dir} is not a folder.")
    for name in ("num_timesteps", "num_noises", "batch_size", "num_class_images", "num_inference_steps", "resolution"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    if args.class_data_dir and args.anchor_latents == "same":
        raise UsageError("--class_data_dir is read with --anchor_latents class only; add that or leave it out.")
    args.images = list_images(args.instance_data_dir, "--instance_data_dir")
    args.class_images = list_images(args.class_data_dir, "--class_data_dir") if args.class_data_dir else []
    args.loras = [lora for run in args.runs for lora in list_loras(run, args.final_step)]
    try:
        index = DiffusionPipeline.load_config(args.pretrained_model_name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"--pretrained_model_name_or_path cannot be loaded: {reason}") from error
    if index["_class_name"] not in PIPELINES:
        raise UsageError(
            f"--pretrained_model_name_or_path is a {index['_class_name']}; give one of {', '.join(PIPELINES)}."
        )


def list_images(folder: Path, flag: str) -> list[Path]:
    """The pictures of a folder, by name."""
    named = [file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
    files = sorted(file for file in named if file.is_file())  # a pipe would be waited for
    if not files:
        raise UsageError(f"{flag}: {folder} has no pictures; give a folder with some.")
    return files


# --------------------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class Lora:
    """One LoRA file of a run."""

    label: str
    folder: Path
    step: int
    file: Path


def list_loras(run: str, final_step: int | None) -> list[Lora]:
    """The LoRA files of `LABEL=FOLDER` by step.

    Found are FOLDER/*-STEP/pytorch_lora_weights.safetensors, FOLDER/*-STEP.safetensors (or *stepSTEP.safetensors)
    and, with `final_step`, FOLDER/pytorch_lora_weights.safetensors. The last "=" divides label and folder.

    Raises:
        UsageError: where there are none, a step occurs twice, or a file is not a LoRA.
    """
    label, _, name = run.rpartition("=")
    folder = path(name)
    if not label or not folder.is_dir():
        raise UsageError(f"--run {run}: give LABEL=FOLDER, where the folder exists.")
    files = [file for file in folder.glob("*.safetensors") if file.name != LORA_FILE]
    named = [(file.stem, file) for file in files] + [
        (file.parent.name, file) for file in folder.glob(f"*/{LORA_FILE}")
    ]
    numbered = [(re.search(r"(?:-|step)(\d+)$", name), file) for name, file in named]
    loras = [Lora(label, folder, int(number[1]), file) for number, file in numbered if number]
    if (folder / LORA_FILE).is_file() and final_step not in (None, *(lora.step for lora in loras)):
        loras.append(Lora(label, folder, final_step, folder / LORA_FILE))
    loras.sort(key=lambda lora: lora.step)
    steps = [lora.step for lora in loras]
    if not loras:
        last = f"; give the step of its {LORA_FILE} with --final_step" if (folder / LORA_FILE).is_file() else ""
        raise UsageError(
            f"--run {run}: no checkpoint-STEP folder with {LORA_FILE} and no file *-STEP.safetensors{last}."
        )
    if len(set(steps)) < len(steps):
        raise UsageError(f"--run {run}: two files have the same step; keep one trainer's files in a folder.")
    for lora in loras:
        check_lora(lora.file)
    return loras


def check_lora(file: Path) -> None:
    """Read a file and raise `UsageError` if it is no LoRA, or not finite."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            odd = [name for name in names if not tensors.get_tensor(name).isfinite().all()]
    except (SafetensorError, OSError) as error:
        raise UsageError(f"--run: {file} cannot be read ({error}); remove or replace it.") from error
    if not any("lora" in name.lower() for name in names):
        raise UsageError(f"--run: {file} has no LoRA layers; remove it from the folder.")
    if odd:
        raise UsageError(f"--run: {file} holds numbers that are not finite, in {odd[0]}; remove it from the folder.")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def settings_of(args: argparse.Namespace) -> dict:
    """All that a measurement depends on, beside the LoRA."""
    names = ("pretrained_model_name_or_path", "instance_prompt", "class_prompt", "resolution", "num_timesteps")
    names += ("num_noises", "seed", "max_sequence_length", "anchor_latents", "num_class_images", "dtype")
    names += ("num_inference_steps", "guidance_scale")
    settings = {name: getattr(args, name) for name in names}
    settings["images"] = [sha256(file) for file in args.images]
    settings["class_images"] = [sha256(file) for file in args.class_images]
    return settings


def read_measured(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What was measured before: LoRA's hash -> numbers.

    Raises:
        UsageError: where it was measured on another evaluation set.
    """
    file, settings = args.output_dir / "measured.json", settings_of(args)
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    changed = [name for name in settings if found["settings"].get(name) != settings[name]]
    if changed:
        raise UsageError(
            f"--output_dir: {args.output_dir} has measurements of another {', '.join(changed)}; choose another."
        )
    return found["measured"]


def write_measured(args: argparse.Namespace, measured: dict) -> None:
    """Replace the file at once: a crash leaves the old one."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    partial = args.output_dir / "measured.json.tmp"
    partial.write_text(json.dumps({"settings": settings_of(args), "measured": measured}, indent=1) + "\n")
    os.replace(partial, args.output_dir / "measured.json")


# ----------------------------------------------------------------------------------------------------------- the model


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """The base pipeline on its device, without the parts that its index leaves empty."""
    index = DiffusionPipeline.load_config(args.pretrained_model_name_or_path)
    parts = {name: None for name, value in index.items() if value == [None, None]}
    if index["_class_name"] == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "requires_safety_checker": False}  # it would blacken class pictures
    parts["dtype"] = getattr(torch, args.dtype)
    pipeline = PIPELINES[index["_class_name"]].from_pretrained(args.pretrained_model_name_or_path, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device)


def training_scheduler(pipeline: DiffusionPipeline) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The noise schedule that the base model was trained with.

    Raises:
        UsageError: where it is neither a flow nor counted in timesteps (EDM).
    """
    config = pipeline.scheduler.config
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if "sigma_data" in config or config.prediction_type not in ("epsilon", "v_prediction"):
        raise UsageError("--pretrained_model_name_or_path: only noise, v and flow models can be measured, not EDM.")
    return DDPMScheduler.from_config(config)


def output_name(scheduler) -> str:
    """What the network predicts, in a word."""
    return OUTPUTS[scheduler.config.get("prediction_type", "flow")]


def encode_prompt(pipeline, prompt: str, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The denoiser's conditioning (1, ...) on a prompt, by the text encoders as they are now."""
    options = {"device": pipeline._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if isinstance(pipeline, StableDiffusion3Pipeline):
        options |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": args.max_sequence_length}
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(prompt, **options)
        return {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(prompt, **options)
        side = args.resolution
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=pooled.dtype, device=pooled.device)
        return {"encoder_hidden_states": prompt_embeds, "text_embeds": pooled, "time_ids": time_ids}
    return {"encoder_hidden_states": pipeline.encode_prompt(prompt, **options)[0]}


def denoise(pipeline, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: dict) -> torch.Tensor:
    """The raw prediction (B, C, h, w)."""
    conditioning = {name: tensor.expand(len(noisy), *tensor.shape[1:]) for name, tensor in conditioning.items()}
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return pipeline.transformer(noisy, timestep=timesteps, **conditioning, return_dict=False)[0]
    embeds = conditioning.pop("encoder_hidden_states")
    return pipeline.unet(noisy, timesteps, embeds, added_cond_kwargs=conditioning or None, return_dict=False)[0]


# ------------------------------------------------------------------------------------------------------ evaluation set


@dataclasses.dataclass
class EvaluationSet:
    """N noisy pictures with the anchors' predictions, float32 on the CPU."""

    noisy: torch.Tensor  # (N, C, h, w)
    timesteps: torch.Tensor  # (N,)
    target: torch.Tensor  # (N, C, h, w), noise, v or velocity
    anchors: dict[str, torch.Tensor]  # "same" and perhaps "class" -> (N, C, h, w)


def make_evaluation_set(args: argparse.Namespace, pipeline, scheduler) -> EvaluationSet:
    """Noise the pictures and predict the anchors; the pipeline must have no LoRA yet."""
    latents = encode_images(pipeline, args.images, args.resolution)
    shape = (args.num_noises, *latents.shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).flatten(0, 1)
    size = scheduler.config.num_train_timesteps
    grid = ((torch.arange(args.num_timesteps) + 0.5) * size / args.num_timesteps).long()
    indices = grid.repeat_interleave(len(noise))
    noise = noise.repeat(args.num_timesteps, 1, 1, 1)
    noisy, timesteps, target = diffuse(scheduler, tile(latents, len(noise)), noise, indices)
    conditioning = encode_prompt(pipeline, args.class_prompt, args)
    anchors = {"same": predict(args, pipeline, noisy, timesteps, conditioning, "Anchors")}
    if args.anchor_latents == "class":
        latents = encode_images(pipeline, args.class_images or class_images(args, pipeline), args.resolution)
        class_noisy, _, _ = diffuse(scheduler, tile(latents, len(noise)), noise, indices)
        anchors["class"] = predict(args, pipeline, class_noisy, timesteps, conditioning, "Anchors at z_t^cls")
    return EvaluationSet(noisy, timesteps, target, anchors)


def tile(latents: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat pictures (n, ...) in turn until there are `count`."""
    return latents[torch.arange(count) % len(latents)]


def class_images(args: argparse.Namespace, pipeline) -> list[Path]:
    """Class pictures by the base model, in OUTPUT_DIR/class_images; those that are there already are kept."""
    folder = args.output_dir / "class_images"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i}.png" for i in range(args.num_class_images or len(args.images))]
    for i, file in enumerate(tqdm(files, desc="Class pictures", leave=False)):
        if not file.is_file():
            picture = pipeline(
                args.class_prompt,
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=torch.Generator().manual_seed(args.seed + i),
            ).images[0]
            partial = file.with_suffix(".tmp")
            picture.save(partial, format="png")
            os.replace(partial, file)
    return files


def encode_images(pipeline, files: list[Path], side: int) -> torch.Tensor:
    """Centre crops -> the means of their latents (n, C, h, w), as the denoiser sees them.

    By a float32 copy of the VAE, since some overflow in half precision.
    """
    vae = pipeline.vae if pipeline.vae.dtype == torch.float32 else copy.deepcopy(pipeline.vae).float()
    latents = []
    for file in files:
        picture = ImageOps.fit(ImageOps.exif_transpose(Image.open(file)).convert("RGB"), (side, side))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        latents.append(vae.encode(pixels.to(vae.device)).latent_dist.mode().cpu())
    return (torch.cat(latents) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def diffuse(
    scheduler, latents: torch.Tensor, noise: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z_t, t and the network's target for latents and noise (N, C, h, w) at positions (N,) of the schedule."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = scheduler.sigmas[indices][:, None, None, None]
        return (1 - sigmas) * latents + sigmas * noise, scheduler.timesteps[indices], noise - latents
    predicts_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, indices) if predicts_v else noise
    return scheduler.add_noise(latents, noise, indices), indices, target


def predict(args, pipeline, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning, title: str) -> torch.Tensor:
    """The network's output (N, C, h, w) for all samples, float32 on the CPU."""
    dtype, device = conditioning["encoder_hidden_states"].dtype, pipeline._execution_device
    outputs = []
    for start in tqdm(range(0, len(noisy), args.batch_size), desc=title, leave=False):
        batch = slice(start, start + args.batch_size)
        output = denoise(pipeline, noisy[batch].to(device, dtype), timesteps[batch].to(device), conditioning)
        outputs.append(output.float().cpu())
    return torch.cat(outputs)


# ------------------------------------------------------------------------------------------------------------ measures


def distances(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Of (N, C, h, w): the L2 norm of a sample's difference, averaged over samples; the mean squared difference."""
    difference = (one - other).flatten(1)
    return difference.norm(dim=1).mean().item(), difference.square().mean().item()


def measure(args: argparse.Namespace, pipeline, evaluation: EvaluationSet, title: str) -> dict[str, float]:
    """All numbers of the pipeline as it is now."""
    conditioning = encode_prompt(pipeline, args.instance_prompt, args)
    student = predict(args, pipeline, evaluation.noisy, evaluation.timesteps, conditioning, title)
    numbers = {}
    for name, other in {"reconstruction": evaluation.target, **evaluation.anchors}.items():
        numbers[f"{name}_l2"], numbers[f"{name}_mse"] = distances(student, other)
    return numbers


def expected(record: logging.LogRecord) -> bool:
    """A filter without diffusers' warning that a LoRA has nothing for a text encoder: most LoRAs have not."""
    said = record.getMessage()
    return not (said.startswith("No LoRA keys associated") and "prefix='text_encoder" in said)


def load_lora(pipeline, file: Path) -> None:
    """Load a LoRA; `UsageError` where it does not fit the base."""
    with safe_open(file, framework="pt") as tensors:
        trains_text = any("text_encoder" in key or key.startswith("lora_te") for key in tensors.keys())  # noqa: SIM118
    logger = logging.getLogger("diffusers.loaders.lora_base")
    if not trains_text:
        logger.addFilter(expected)
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    except (RuntimeError, ValueError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UsageError(f"--run: {file} does not fit the base model; is it another model's LoRA?") from error
    finally:
        logger.removeFilter(expected)
    if not pipeline.get_list_adapters():
        raise UsageError(f"--run: {file} has no layer that fits the base model; is it another model's LoRA?")


@torch.no_grad()
def measure_all(args: argparse.Namespace, measured: dict, todo: dict[str, Path]) -> None:
    """Measure the LoRAs in `todo` (hash -> file), and first the base; `measured` is written after each."""
    pipeline = load_pipeline(args)
    scheduler = training_scheduler(pipeline)
    evaluation = make_evaluation_set(args, pipeline, scheduler)
    measured[BASE] = measure(args, pipeline, evaluation, "Base model") | {"output": output_name(scheduler)}
    write_measured(args, measured)
    for key, file in tqdm(todo.items(), desc="LoRAs"):
        load_lora(pipeline, file)
        measured[key] = measure(args, pipeline, evaluation, file.parent.name)
        write_measured(args, measured)
        pipeline.unload_lora_weights()


def make_rows(args: argparse.Namespace, measured: dict, keys: dict[Path, str]) -> list[dict]:
    """drift.csv: one row for each LoRA, and for each run a row of step 0."""
    start = {(lora.label, lora.folder): Lora(lora.label, lora.folder, 0, Path(BASE)) for lora in args.loras}
    loras = sorted([*start.values(), *args.loras], key=lambda lora: (args.labels[lora.label], lora.folder, lora.step))
    rows = []
    for lora in loras:
        numbers = {name: value for name, value in measured[keys[lora.file]].items() if name != "output"}
        numbers["objective"] = numbers["reconstruction_mse"] + args.anchor_weight * numbers["same_mse"]
        rows.append({"label": lora.label, "run": lora.folder, "step": lora.step, "file": lora.file, **numbers})
    return rows


def write_csv(args: argparse.Namespace, rows: list[dict]) -> None:
    with (args.output_dir / "drift.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


# -------------------------------------------------------------------------------------------------------------- figure


def panels(args: argparse.Namespace, output: str) -> dict[str, tuple[str, str]]:
    """Column of drift.csv -> title and axis label of its panel."""
    target = {"noise": r"\epsilon", "v": "v", "velocity": "u"}[output]
    student = rf"{target}_\theta(z_t, c_{{sbj}})"
    anchor_input = "z_t" if args.anchor_latents == "same" else "z_t^{cls}"
    same = (
        "anchor at the same $z_t$, as Eq. 5" if args.anchor_latents == "same" else "anchor at $z_t^{cls}$, as Fig. 2"
    )
    norm = f"L2 norm of {output}, mean over samples"
    weight = f"{args.anchor_weight:g}"
    return {
        "reconstruction_l2": (rf"(a) $\|{target} - {student}\|_2$" + "\nreconstruction", norm),
        f"{args.anchor_latents}_l2": (
            rf"(b) $\|{student} - {target}_{{base}}({anchor_input}, c_{{cls}})\|_2$" + f"\ndrift; {same}",
            norm,
        ),
        "objective": (
            f"(c) objective of Eq. 5, w = {weight}" + f"\nMSE of (a) + {weight} MSE of (b) at one $z_t$",
            f"mean squared {output}",
        ),
    }


def curves(rows: list[dict], label: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) that all runs of a label have, and the column's values (runs, S) there."""
    runs = {}
    for row in rows:
        if row["label"] == label:
            runs.setdefault(row["run"], {})[row["step"]] = row[column]
    steps = sorted(set.intersection(*(set(run) for run in runs.values())))
    return np.array(steps), np.array([[run[step] for step in steps] for run in runs.values()])


def draw(args: argparse.Namespace, rows: list[dict], output: str) -> None:
    """drift.png: a panel a measure and a line a label; a band from the least to the greatest run."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for axis, (column, (title, label)) in zip(axes, panels(args, output).items(), strict=True):
        for name in args.labels:
            steps, values = curves(rows, name, column)
            text = name if len(values) == 1 else f"{name} ({len(values)} runs)"
            (line,) = axis.plot(steps, values.mean(0), marker="o", markersize=3, label=text)
            if len(values) > 1:
                axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="training step", ylabel=label)
        axis.locator_params(nbins=5)  # more labels would overlap
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(args.output_dir / "drift.png", dpi=130)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    """Measure what is new, then write the table and draw."""
    args.labels = {label: number for number, label in enumerate(dict.fromkeys(lora.label for lora in args.loras))}
    keys = {lora.file: sha256(lora.file) for lora in args.loras} | {Path(BASE): BASE}
    measured = read_measured(args)
    todo = {key: file for file, key in keys.items() if key not in measured and key != BASE}
    if todo or BASE not in measured:
        measure_all(args, measured, todo)
    rows = make_rows(args, measured, keys)
    write_csv(args, rows)
    draw(args, rows, measured[BASE]["output"])
    print(f"{args.output_dir / 'drift.csv'}\n{args.output_dir / 'drift.png'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UsageError as error:
        print(f"drift.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
