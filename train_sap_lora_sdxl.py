# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "accelerate>=1.10", "bitsandbytes>=0.45; sys_platform != 'darwin'", "datasets>=4.0", "diffusers>=0.42",
#     "filelock", "huggingface_hub>=1.0", "peft>=0.20", "pillow>=10.1", "safetensors>=0.5", "tensorboard",
#     "torch>=2.7", "tqdm", "transformers>=5.0", "wandb",
# ]
# ///
"""Personalise Stable Diffusion XL with a LoRA that stays anchored to what the model predicts for the class.

    accelerate launch train_sap_lora_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir dog \
        --instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog" --max_train_steps 500 \
        --train_batch_size 1 --rank 16 --learning_rate 1e-4 --output_dir sap-dog

The method is "Semantic Anchoring for Robust Personalization in Text-to-Image Diffusion Models" (arXiv 2511.22245):

    ||target - pred(z_t, subject prompt)||^2 + w ||pred(z_t, subject prompt) - pred_pretrained(z_t, class prompt)||^2

Below: the method, micro-steps, training, the subject's pictures, the base in stages, files, pictures made, command
line, run. All that is random in a micro-step depends on (seed, rank, micro-step) alone: a resumed run is the same run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import secrets
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# They tell of packages that nothing here needs, when they are imported, and of each attempt to reach the hub.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
for stream in ("stdout", "stderr"):
    if getattr(sys, stream) is None:  # started with it closed: without this the next file would take its number
        setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115 (open as long as the process)

import diffusers
import numpy as np
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, init_empty_weights
from accelerate.utils import LoggerType, ProjectConfiguration, broadcast_object_list, gather_object, tqdm
from diffusers import AutoencoderKL, BitsAndBytesConfig
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params, find_nearest_bucket, free_memory, parse_buckets_string
from diffusers.utils import convert_all_state_dict_to_peft, convert_unet_state_dict_to_peft, make_image_grid
from filelock import FileLock, Timeout
from huggingface_hub import ModelCardData, create_repo, get_session, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

logger = logging.getLogger("sap_lora")


# ---- The method: these functions can be lifted into any other diffusers + peft training script ----


def semantic_anchor_loss(
    prediction: Tensor, target: Tensor, anchor: Tensor | None = None, anchor_weight=0.5, sample_weights=1.0, mask=1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eq. 5 of arXiv 2511.22245: ||target - prediction||^2 + w ||prediction - anchor||^2, as means over elements.

    Prediction and anchor (B, C, h, w) come from the same noisy latents and timesteps, and through the same output
    map; `sample_weights` (broadcastable to them) multiplies both terms. Then Eq. 5 means the same for every
    parameterisation. Without an anchor it is DreamBooth's loss. `mask` (broadcastable) weighs the reconstruction
    alone: where it is low the photo teaches little and the anchor holds.

    Returns the loss, its reconstruction term and its anchor term (not yet multiplied by w; None without an anchor).
    """
    reconstruction = (mask * sample_weights * (target.float() - prediction.float()) ** 2).mean()
    if anchor is None:
        return reconstruction, reconstruction, None
    anchor_distance = (sample_weights * (prediction.float() - anchor.float()) ** 2).mean()
    return reconstruction + anchor_weight * anchor_distance, reconstruction, anchor_distance


@torch.no_grad()
def predict_anchors(
    model: nn.Module,
    denoise: Callable[..., Tensor],
    inputs: Sequence[tuple[Tensor, Tensor, dict[str, Tensor]]],
    batch_size: int = 4,
    source: str = "pretrained",
    adapters: Sequence[BaseTunerLayer] | None = None,
) -> list[Tensor]:
    """The anchors of Eq. 5, arXiv 2511.22245: eps_theta'(z_t, c_cls, t), for several coming micro-steps at once.

    Call it in the precision in which the student computes, inside autocast if that is: else the rounding differs.

    Args:
        model: the denoiser with its adapters, not wrapped by DDP.
        denoise: `denoise(model, model_input, timesteps, conditioning)` gives the prediction, shaped as `model_input`.
        inputs: for each micro-step the model input (B, C, h, w) and timesteps (B,) that the student sees too, and the
            conditioning on the class prompt, a dict of tensors (B, ...). Sizes may differ between micro-steps.
        batch_size: samples in one forward; it changes the result by rounding only.
        source: "pretrained", or "finetuned" for the ablation of section 5.2, with adapters on, their dropout off.
        adapters: the model's `adapter_layers`, if they were collected before.

    Returns for each micro-step the raw prediction (B, C, h, w).
    """
    by_size: dict[torch.Size, list[int]] = {}
    for i, (model_input, _, _) in enumerate(inputs):
        by_size.setdefault(model_input.shape[1:], []).append(i)
    if source == "finetuned":
        as_source = evaluating(model)
    else:
        as_source = adapters_disabled(adapters or model)
    anchors = {}
    with as_source:
        for members in by_size.values():
            model_inputs = torch.cat([inputs[i][0] for i in members])
            timesteps = torch.cat([inputs[i][1] for i in members])
            names = inputs[members[0]][2]
            conditioning = {name: torch.cat([inputs[i][2][name] for i in members]) for name in names}
            predictions = []
            for first in range(0, len(model_inputs), batch_size):
                part = slice(first, first + batch_size)
                of_part = {name: tensor[part] for name, tensor in conditioning.items()}
                predictions.append(denoise(model, model_inputs[part], timesteps[part], of_part))
            samples = [len(inputs[i][0]) for i in members]
            anchors.update(zip(members, torch.cat(predictions).split(samples), strict=True))
    return [anchors[i] for i in range(len(inputs))]


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The adapter layers of `model` (unwrapped, with peft layers), found by one walk over its modules.

    Raises `ValueError` for what `adapters_disabled` could not switch off: whole modules in the adapter
    (`modules_to_save`), merged adapters, or trained parameters outside of the adapter layers.
    """
    layers = []
    adapter_parts = set()  # such as "lora_A", inside of layers
    for name, module in model.named_modules():  # parents come first
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(f"the adapter of {name} is merged into the weights: call unmerge_adapter() first")
            layers.append(module)
            adapter_parts.update(module.adapter_layer_names)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"the adapter holds all of {name} (modules_to_save), which cannot be switched off")
        elif adapter_parts.isdisjoint(name.split(".")) and any(p.requires_grad for p in module.parameters(False)):
            raise ValueError(f"{name} trains but is no adapter: without adapters this is not the pretrained model")
    return layers


@contextlib.contextmanager
def adapters_disabled(adapters: nn.Module | Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Inside, a model with peft layers computes what it did before adapters were added, bit for bit.

    `adapters` is the model, or its `adapter_layers`, which saves a walk over thousands of modules at each call. Only
    a flag of each layer changes, and it is put back in any case: neither `requires_grad` nor the active adapters move,
    as they do with peft's `disable_adapters()` and `enable_adapters()`. Never run a backward pass inside.
    """
    layers = adapters
    if isinstance(adapters, nn.Module):
        layers = adapter_layers(adapters)
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in evaluation mode, without dropout; afterwards it is as it was."""
    training = module.training
    try:
        module.eval()
        yield
    finally:
        module.train(training)


def anchor_caption(caption: str, subject_token: str, class_token: str = "") -> str:
    """The caption of the class: `subject_token`, as a whole word, becomes `class_token` or goes.

    `anchor_caption("a photo of sks dog", "sks")` is "a photo of dog", with `class_token="a"` "a photo of a dog".
    Raises `ValueError` if the caption, which it quotes, does not hold the token.
    """
    pattern = rf"(?<!\w){re.escape(subject_token)}(?!\w)"
    replaced, count = re.subn(pattern, lambda _: class_token, caption)
    if not count:
        raise ValueError(f'the caption "{caption}" does not hold the word "{subject_token}"')
    return " ".join(replaced.split())


# ---- What is special to this base ----

PIPELINE_CLASS = diffusers.StableDiffusionXLPipeline
DENOISER_CLASS = diffusers.UNet2DConditionModel
DENOISER = "unet"
TRAINABLE_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
BASE_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler")
FOREIGN_PARTS = ("text_encoder_3", "transformer")
BASE_KIND = "this script trains Stable Diffusion XL; Stable Diffusion 1.x, 2.x and SD3 have scripts of their own"
UNUSED_PARTS = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
EDM_SCHEDULERS = (diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler)  # Playground v2.5, CosXL
DENOISER_TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
LATENT_STRIDE = 8  # pixels an edge of a latent stands for
FINAL_SAMPLING = {"num_inference_steps": 25}
REPEATED_BLOCK = "BasicTransformerBlock"
RESOLUTION = 1024
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4
OUTPUT_DIR = "lora-dreambooth-model"
TRACKER = "dreambooth-lora-sd-xl"

# ---- What is not ----

TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
KOHYA_PARTS = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "magnitude_vector": "dora_scale"}
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
TRAINING_FILE = "training_state.pt"
STATE_FILE = "trainer_state.json"
FINISHED_FILE = "finished_run.json"
METRICS_FILE = "metrics.jsonl"
SYSTEM_FILES = (".", "Thumbs.db", "desktop.ini")
STATE_FORMAT = 3  # of checkpoints; it goes up when older ones can no longer be read
HUB_TIMEOUT = 60  # seconds without an answer
# What huggingface_hub's HTTP client raises where there is no answer: httpx's or httpx2's, by its version.
NetworkError = HfHubHTTPError.__bases__[0]
PAPER = "https://arxiv.org/abs/2511.22245"
LR_SCHEDULERS = [name.value for name in SchedulerType if name != SchedulerType.PIECEWISE_CONSTANT]


class UsageError(ValueError):
    """What the user can mend: the message names the flag or the file, what is wrong and what to do."""

    status = 2


class RunError(Exception):
    """What ended a run under way: the message says what, and what is left on the disk."""

    status = 1


def printable(text) -> str:
    """`text` for a terminal, without the control characters that captions and names of files may hold."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@contextlib.contextmanager
def explained(what, *more):
    """Inside, or in a function that it decorates, what libraries raise becomes one sentence after `what`.

    Only what they raise for files, values and connections that they cannot use, and `more`: a bug of ours stays a
    traceback.
    """
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, LookupError, SafetensorError, NetworkError, *more) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{what}: {reason}") from error


# ---- Micro-steps: one batch each, from its draws to its losses ----


@dataclasses.dataclass(frozen=True)
class Run:
    """All that training reads, once the stages are through."""

    args: Namespace
    accelerator: Accelerator
    images: SubjectImages
    embeddings: dict[str, dict[str, Tensor]]  # of each prompt the conditioning (1, ...), on the CPU
    sampling_inputs: dict[str, dict[str, Tensor]]  # for the prompts of validation
    vae: AutoencoderKL  # on the CPU, unless random crops need it in each micro-step
    posteriors: dict[tuple[int, bool], Tensor]  # of each picture and its mirror image (1, 2 C, h, w), on the CPU
    student: Student
    scheduler: diffusers.SchedulerMixin
    record: dict  # of `describe_run`
    signals: StopRequests
    loss_of: Callable[..., dict[str, Tensor]] | None = None  # what `main` was given in the place of `loss_terms`
    given_up: set[str] = dataclasses.field(default_factory=set)  # what was told to have failed
    base_pictures: dict[str, list] = dataclasses.field(default_factory=dict)  # for grids, by prompt, once made

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


@dataclasses.dataclass
class MicroStep:
    """One batch of B samples, drawn and noised, everything in float32 on the device."""

    index: int
    pictures: list[int]
    prompts: list[str]
    conditioning: dict[str, Tensor]  # on the subject prompts; without embeddings if text encoders train
    anchor_conditioning: dict[str, Tensor]  # on the class prompts; empty without anchor
    mask: Tensor | float  # (B, 1, h, w), what weighs the reconstruction
    noisy_latents: Tensor  # (B, C, h, w)
    model_input: Tensor  # (B, C, h, w), the noisy latents as the denoiser wants them
    timesteps: Tensor  # (B,)
    skip: Tensor | float  # (B, 1, 1, 1), how much of the noisy latents is in the denoiser's answer
    scale: Tensor | float  # (B, 1, 1, 1), and how much of its prediction
    target: Tensor  # (B, C, h, w)
    sample_weights: Tensor | float  # (B, 1, 1, 1)


class Student(nn.Module):
    """The model in training: the denoiser, with the text encoders if they train too.

    As one module it is prepared, synchronised by DDP and accumulated once, whatever trains.
    """

    def __init__(self, denoiser, text_pipeline=None):
        super().__init__()
        self.denoiser = denoiser
        self.text_pipeline = text_pipeline
        self.text_encoders = nn.ModuleDict()
        if text_pipeline is not None:
            self.text_encoders.update({name: getattr(text_pipeline, name) for name in TRAINABLE_TEXT_ENCODERS})
        self.adapted = {DENOISER: denoiser, **self.text_encoders}  # what has a LoRA, by its name in the pipeline
        self.adapters = adapter_layers(denoiser)

    def forward(self, model_input, timesteps, conditioning, prompts) -> Tensor:
        """The raw prediction (B, C, h, w) for the subject's B prompts."""
        if self.text_pipeline is not None:
            conditioning = conditioning | encode_prompts(self.text_pipeline, prompts, model_input.device)
        return denoise(self.denoiser, model_input, timesteps, conditioning)

    def trained(self) -> dict[str, nn.Parameter]:
        """All that the optimizer changes."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def keyed_generator(*key) -> torch.Generator:
    """A CPU generator whose numbers depend on the key alone, such as (seed, rank, micro-step), on every device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def to_device(tensor, device) -> Tensor:
    """`tensor` on the device, on CUDA without waiting for what that still computes: from pinned memory.

    Elsewhere a plain copy: on MPS one that does not wait can read memory that is already free (pytorch #189690).
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def draw_latents(run, items, generator) -> Tensor:
    """Sample the posterior of each item anew: scaled latents (B, C, h, w) in float32."""
    if run.images.cacheable:
        parameters = torch.cat([run.posteriors[item["index"], item["flipped"]] for item in items])
    else:
        with torch.no_grad():
            pixel_values = to_device(torch.stack([item["pixel_values"] for item in items]), run.device)
            parameters = run.vae.to(run.device).encode(pixel_values).latent_dist.parameters
    posterior = DiagonalGaussianDistribution(to_device(parameters, run.device))
    noise = to_device(torch.randn(posterior.mean.shape, generator=generator), run.device)
    return scale_latents(posterior.mean + posterior.std * noise, run.vae)


def look_up_embeddings(run, prompts) -> dict[str, Tensor]:
    """The conditioning (B, ...) on B prompts from those encoded beforehand, each sample with its own."""
    found = [run.embeddings[prompt] for prompt in prompts]
    return {name: to_device(torch.cat([one[name] for one in found]), run.device) for name in found[0]}


def mask_weights(run, items, size) -> Tensor | float:
    """What the reconstruction weighs in each place, (B, 1, h, w) or for all (B, 1, 1, 1): 1 inside the masks,
    `--unmasked_weight` outside, and nothing in samples that see the class prompt."""
    weights = 1.0
    if run.images.masks and items[0]["index"] < run.images.count:  # pictures that are held out have none
        masks = [run.images.mask(item["index"], item["flipped"], item["centering"], size) for item in items]
        inside = torch.stack(masks)
        weights = inside + run.args.unmasked_weight * (1 - inside)
    if run.args.class_share > 0:
        shows_subject = torch.tensor([float(not item["of_class"]) for item in items])
        weights = weights * shows_subject[:, None, None, None]
    if isinstance(weights, Tensor):
        weights = to_device(weights, run.device)
    return weights


def min_snr_weights(scheduler, timesteps, gamma) -> Tensor | float:
    """Min-SNR weights (B, 1, 1, 1) of arXiv 2303.09556 for noise or v prediction; 1 where `gamma` is None.

    Noise: min(snr, gamma) / snr, written so that it is 1, not 0 / 0, at zero SNR. v: min(snr, gamma) / (snr + 1).
    """
    if gamma is None:
        return 1.0
    snr = diffusers.training_utils.compute_snr(scheduler, timesteps)[:, None, None, None]
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def is_edm(scheduler) -> bool:
    """Whether a training scheduler counts noise in sigmas, as EDM does (arXiv 2206.00364)."""
    return not isinstance(scheduler, diffusers.DDPMScheduler)


def edm_coefficients(scheduler, sigmas) -> tuple[Tensor, Tensor, Tensor]:
    """c_in, c_skip and c_out of EDM's table 1 (arXiv 2206.00364), shaped as `sigmas`.

    With noisy latents z the denoised ones are c_skip z + c_out F(c_in z), F being the denoiser's raw prediction.
    """
    if isinstance(scheduler, EDM_SCHEDULERS):
        one = torch.ones_like(sigmas)
        zero = torch.zeros_like(sigmas)
        c_in = scheduler.precondition_inputs(one, sigmas)
        c_skip = scheduler.precondition_outputs(one, zero, sigmas)
        return c_in, c_skip, scheduler.precondition_outputs(zero, one, sigmas)
    c_in = (sigmas**2 + 1).rsqrt()  # a variance-preserving model, in whose scale z has unit variance
    if scheduler.config.prediction_type == "v_prediction":
        return c_in, c_in**2, -sigmas * c_in
    return c_in, torch.ones_like(sigmas), -sigmas


def diffuse(run, latents, noise, generator) -> dict[str, Tensor]:
    """The fields of a `MicroStep` that latents and noise (B, C, h, w) give at timesteps drawn from `generator`."""
    scheduler = run.scheduler
    draws = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    if is_edm(scheduler):
        return diffuse_edm(run, latents, noise, draws)
    timesteps = to_device(draws, run.device)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    return {
        "noisy_latents": noisy_latents,
        "model_input": noisy_latents,
        "timesteps": timesteps,
        "skip": 0.0,
        "scale": 1.0,
        "target": target,
        "sample_weights": min_snr_weights(scheduler, timesteps, run.args.snr_gamma),
    }


def diffuse_edm(run, latents, noise, draws) -> dict[str, Tensor]:
    """The same in EDM's parameterisation, at the places `draws` (B,) of the scheduler's table.

    The target is the latents. 1 / c_out^2 weighs their error as EDM's paper does; on another base 1 / sigma^2 weighs
    it as one of the noise.
    """
    scheduler = run.scheduler
    sigmas = to_device(scheduler.sigmas[draws], run.device)[:, None, None, None]
    c_in, c_skip, c_out = edm_coefficients(scheduler, sigmas)
    noisy_latents = latents + sigmas * noise
    sample_weights = sigmas**-2
    if isinstance(scheduler, EDM_SCHEDULERS):
        sample_weights = c_out**-2
    return {
        "noisy_latents": noisy_latents,
        "model_input": c_in * noisy_latents,
        "timesteps": to_device(scheduler.timesteps[draws], run.device),
        "skip": c_skip,
        "scale": c_out,
        "target": latents,
        "sample_weights": sample_weights,
    }


def size_conditioning(images, items) -> Tensor:
    """SDXL's `time_ids` (B, 6) of B samples: original (h, w), crop corner (top, left) and target (h, w), in pixels.

    The corner is counted in the picture (or its mirror image) when it is resized to cover its window.
    """
    rows = []
    for item in items:
        index = item["index"]
        height, width = images.covering[index]
        window_height, window_width = images.windows[index]
        left, top = item["centering"]
        corner = [round((height - window_height) * top), round((width - window_width) * left)]
        rows.append([*images.sizes[index], *corner, window_height, window_width])
    return torch.tensor(rows, dtype=torch.float32)


def draw_micro_step(run, index, items) -> MicroStep:
    """Draw latents, noise and timesteps of one batch. They depend on (seed, rank, index) and the pictures alone."""
    generator = keyed_generator(run.args.seed, run.accelerator.process_index, index)
    latents = draw_latents(run, items, generator)
    noise = to_device(torch.randn(latents.shape, generator=generator), run.device)
    prompts = [item["prompt"] for item in items]
    time_ids = to_device(size_conditioning(run.images, items), run.device)
    conditioning = {"time_ids": time_ids}
    if not run.args.train_text_encoder:
        conditioning |= look_up_embeddings(run, prompts)
    anchor_conditioning = {}
    if run.args.anchor_weight > 0:
        anchor_conditioning |= look_up_embeddings(run, [item["anchor_prompt"] for item in items])
        anchor_conditioning["time_ids"] = time_ids
    return MicroStep(
        index=index,
        pictures=[item["index"] for item in items],
        prompts=prompts,
        conditioning=conditioning,
        anchor_conditioning=anchor_conditioning,
        mask=mask_weights(run, items, latents.shape[-2:]),
        **diffuse(run, latents, noise, generator),
    )


def to_target_space(prediction, step) -> Tensor:
    """The one map of raw predictions, of student and anchor, to what the target is: noise, v, or EDM's latents."""
    return step.skip * step.noisy_latents + step.scale * prediction.float()


def anchors_of(run, steps) -> list[Tensor | None]:
    """The anchor of each of these micro-steps, from few forwards; None for each at w = 0."""
    args = run.args
    if args.anchor_weight == 0:
        return [None] * len(steps)
    inputs = [(step.model_input, step.timesteps, step.anchor_conditioning) for step in steps]
    return predict_anchors(
        run.student.denoiser, denoise, inputs, args.anchor_batch_size, args.anchor_source, run.student.adapters
    )


def loss_terms(step, anchor, student, run) -> dict[str, Tensor]:
    """Student forward and objective of one micro-step: "loss", which is trained on, and what else is logged."""
    prediction = to_target_space(student(step.model_input, step.timesteps, step.conditioning, step.prompts), step)
    if anchor is not None:
        anchor = to_target_space(anchor, step)
    loss, reconstruction, anchor_distance = semantic_anchor_loss(
        prediction, step.target, anchor, run.args.anchor_weight, step.sample_weights, step.mask
    )
    terms = {"loss": loss, "loss/reconstruction": reconstruction}
    if anchor is not None:
        terms["loss/anchor"] = anchor_distance
    return terms


def whole_groups(start, stop, size) -> Iterator[range]:
    """Groups of micro-steps that hold those from `start` to `stop`, counted from the first one of the run.

    `list(whole_groups(5, 10, 4))` is `[range(4, 8), range(8, 12)]`: a resumed run puts the same samples into the same
    anchor forward as the run that was not interrupted, and rounds alike.
    """
    for first in range(start - start % size, stop, size):
        yield range(first, first + size)


def micro_steps(run, start) -> Iterator[tuple[MicroStep, Tensor | None]]:
    """All micro-steps of the run from `start` on, each with its anchor (None without anchor)."""
    args = run.args
    stop = args.max_train_steps * args.gradient_accumulation_steps
    size = 1
    if args.anchor_weight > 0:
        size = max(1, args.anchor_batch_size // args.train_batch_size)
    if args.anchor_source == "finetuned":  # it must see the weights of its own optimizer step
        size = math.gcd(size, args.gradient_accumulation_steps)
    groups = list(whole_groups(start, stop, min(size, stop)))
    rank = run.accelerator.process_index
    draws = run.images.draws(rank, run.accelerator.num_processes, groups[0].start, groups[-1].stop)
    with contextlib.closing(run.images.batches(draws)) as batches:
        for group in groups:
            steps = [draw_micro_step(run, index, next(batches)) for index in group]
            if args.offload:  # where crops are drawn anew, the VAE has worked for the whole group
                run.vae.to("cpu")
            for step, anchor in zip(steps, anchors_of(run, steps), strict=True):
                if start <= step.index < stop:
                    yield step, anchor


# ---- Training ----


class StopRequests:
    """Ctrl-C, SIGTERM (a scheduler, a spot machine's notice) and SIGHUP (a closed terminal) as requests to stop.

    Inside the `with` block one ends the program at once. While `deferring` is set it is only kept in `received`, for
    `train` to see, and another one a second later ends the program: until then it may be the same, passed on by a
    launcher.
    """

    def __init__(self):
        self.deferring = False
        self.received = 0
        self.arrival = 0.0
        self.previous = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self.previous[number] = signal.signal(number, self.handle) or signal.SIG_DFL
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        asked_before = self.received != 0 and time.monotonic() - self.arrival > 1
        if asked_before or not self.deferring:
            logger.warning(f"{signal.Signals(number).name}: stopped at once, nothing more is kept")
            sys.exit(128 + number)
        if self.received == 0:
            self.received = number
            self.arrival = time.monotonic()


def agreed_signal(run) -> int:
    """The signal that asked any rank to stop, or 0; several ranks ask one another."""
    received = run.signals.received
    if run.accelerator.num_processes > 1:
        received = int(run.accelerator.gather(torch.tensor([received], device=run.device)).max())
    return received


def make_optimizer(run) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Prodigy over the adapters, with a rate and a weight decay for each kind of module."""
    args = run.args
    prodigy = args.optimizer == "prodigy"
    groups = []
    for name, module in run.student.adapted.items():
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        group = {"params": trained, "lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
        if name != DENOISER:
            group["weight_decay"] = args.adam_weight_decay_text_encoder
            if not prodigy:
                group["lr"] = args.text_encoder_lr
        groups.append(group)
    options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if prodigy:
        from prodigyopt import Prodigy

        for name in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup"):
            options[name] = getattr(args, f"prodigy_{name}")
        return Prodigy(groups, **options)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    if run.device.type == "cuda" and run.accelerator.scaler is None:  # with which it would not tell of skipped steps
        options["fused"] = True
    return torch.optim.AdamW(groups, **options)


class LoraState:
    """The weights that train, as a checkpoint holds them."""

    def __init__(self, student):
        self.parameters = student.trained()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state):
        """Copy the weights of a checkpoint; raises `ValueError` if they are not those of this run's layers."""
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in self.parameters.items()}
        if found != wanted:
            raise ValueError("its LoRA has other layers, another rank or another precision")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])


@dataclasses.dataclass
class StepLog:
    """What one optimizer step has to tell."""

    step: int
    terms: dict[str, Tensor]  # means over its micro-steps, on the device: the host runs ahead and fetches them later
    values: dict[str, float]
    pictures: list[int]


@dataclasses.dataclass
class Training:
    """What changes while a run trains."""

    student: nn.Module  # prepared by accelerate: under DDP
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    parts: dict  # what a checkpoint holds: all that has `state_dict` and `load_state_dict`, by name
    begun: float  # by `time.monotonic`
    start: int  # the optimizer step after which this process began
    step: int  # the last one that is done
    saved: int  # the last one that a checkpoint holds
    skipped: int = 0  # the last steps in a row that fp16's scaler skipped, as their gradients overflowed
    waiting: list[StepLog] = dataclasses.field(default_factory=list)  # for the log
    cost: dict[str, float] = dataclasses.field(default_factory=dict)  # of `measure_cost`, after the last step
    images: list[Image.Image] = dataclasses.field(default_factory=list)  # of the last validation


def start_training(run, checkpoint, start) -> Training:
    """Optimizer, schedule and the prepared student, as they are at the start or as a checkpoint has them."""
    args = run.args
    student, optimizer = run.accelerator.prepare(run.student, make_optimizer(run))
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer.optimizer,
        num_warmup_steps=args.lr_warmup_steps,  # in optimizer steps, all of them
        num_training_steps=max(args.max_train_steps, args.lr_warmup_steps + 1),  # polynomial divides by what is left
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    parts = {"lora": LoraState(run.student), "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    if run.accelerator.scaler is not None:  # of fp16
        parts["scaler"] = run.accelerator.scaler
    begun = time.monotonic()
    training = Training(student, optimizer, lr_scheduler, parts, begun, start=start, step=start, saved=start)
    if checkpoint is not None:
        load_checkpoint(run, training, checkpoint)
    return training


def train(run, training) -> int:
    """Run the optimizer steps that are left; returns the signal that asked to stop before their end, or 0."""
    args = run.args
    accelerator = run.accelerator
    accumulation = args.gradient_accumulation_steps
    loss_of = run.loss_of or loss_terms
    progress = tqdm(total=args.max_train_steps, initial=training.step, desc="Steps")
    # Both are closed before an error is told.
    with contextlib.closing(micro_steps(run, training.step * accumulation)) as coming, progress:
        while training.step < args.max_train_steps:
            seen = []
            pictures = []
            for step, anchor in itertools.islice(coming, accumulation):
                seed_dropout(run, step.index)
                with accelerator.accumulate(training.student):
                    terms = loss_of(step, anchor, training.student, run)
                    accelerator.backward(terms["loss"])
                seen.append(terms)
                pictures += step.pictures
                if run.signals.received and accelerator.num_processes == 1:
                    break
            if len(seen) < accumulation:  # asked to stop, and no other rank waits for the rest of the step
                break
            means = {name: torch.stack([terms[name].detach() for terms in seen]).mean() for name in seen[0]}
            update(run, training, means, pictures)
            signal_number = after_update(run, training, progress)
            if signal_number:
                break
        log_steps(run, training, progress)
    return agreed_signal(run)


def seed_dropout(run, micro_step):
    """Key the global generator, which LoRA dropout draws from, to the micro-step."""
    if run.args.lora_dropout == 0:
        return
    generator = keyed_generator(run.args.seed, run.accelerator.process_index, micro_step, "dropout")
    torch.manual_seed(generator.initial_seed())


def update(run, training, terms, pictures):
    """One step of the optimizer and of the schedule; raises `RunError` if fp16's scaler skips all steps.

    The schedule waits for a step that the scaler skipped, as its gradients overflowed.
    """
    optimizer = training.optimizer
    run.accelerator.clip_grad_norm_(list(run.student.trained().values()), run.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    values = {"lr": training.lr_scheduler.get_last_lr()[0]}
    if optimizer.step_was_skipped:
        training.skipped += 1
    else:
        training.skipped = 0
        training.lr_scheduler.step()
    if run.accelerator.scaler is not None:
        values["skipped"] = training.skipped
    training.step += 1
    training.waiting.append(StepLog(training.step, terms, values, pictures))
    if training.skipped >= min(30, run.args.max_train_steps):
        raise not_finite(run, f"the gradients of {training.skipped} steps in a row overflowed: nothing was learned")


def after_update(run, training, progress) -> int:
    """Log, validate and save where that is due; returns the signal that asked to stop, or 0.

    Pictures come before the checkpoint of their step: a run that is killed in between makes them again.
    """
    args = run.args
    step = training.step
    signal_number = 0
    if run.accelerator.num_processes == 1 or step % 8 == 0:  # ranks that ask one another wait for their devices
        signal_number = agreed_signal(run)
    validating = validation_is_due(args, step) and not signal_number
    saving = step % args.checkpointing_steps == 0
    if validating or saving or step % args.logging_steps == 0:
        log_steps(run, training, progress)
    if validating:
        training.images = validate(run, args.validation_prompts, "validation", step)
        log_held_out(run, step)
    if saving:
        save_checkpoint(run, training)
    return signal_number


def train_and_keep(run, training):
    """Train; however that ends, what was trained is on the disk before a signal or an error ends the program."""
    run.signals.deferring = True
    try:
        signal_number = train(run, training)
    except UsageError as damage:  # a picture that was whole when the run began
        keep(run, training)
        raise RunError(how_to_go_on(run, training, str(damage))) from damage
    except (
        RunError,
        SystemExit,
    ):  # numbers that are not finite, a full disk, a second signal: there is nothing to keep
        raise
    except BaseException as error:  # out of memory, a bug: it is shown as what it is
        keep(run, training)
        logger.warning(how_to_go_on(run, training, type(error).__name__))
        raise
    if signal_number and training.saved < training.step:
        save_checkpoint(run, training)
    if run.accelerator.is_main_process and training.step > 0:
        write_results(run, training.step)
    signal_number = signal_number or agreed_signal(run)
    run.signals.deferring = False
    if signal_number:
        run.accelerator.end_training()
        logger.warning(how_to_go_on(run, training, signal.Signals(signal_number).name))
        sys.exit(128 + signal_number)


def keep(run, training):
    """Write what was trained before an error: alone all of it, among several ranks what needs no other one."""
    free_memory()
    if training.step == 0 or not run.accelerator.is_main_process:
        return
    if run.accelerator.num_processes == 1 and training.saved < training.step:
        save_checkpoint(run, training)
    write_results(run, training.step)


def how_to_go_on(run, training, reason) -> str:
    """What ended the training, what is left of it, and how to continue."""
    steps = f"step {training.step} of {run.args.max_train_steps}"
    files = written(Path(run.args.output_dir))
    advice = "To go on, add --resume_from_checkpoint latest to the same command"
    return f"{reason}: stopped after {steps}. {advice}. Written: {files}"


def log_steps(run, training, progress):
    """Fetch and log the terms of the steps that wait, as means over ranks; raise `RunError` at a NaN."""
    waiting = training.waiting
    training.waiting = []
    if not waiting:
        return
    on_device = torch.stack([torch.stack(list(row.terms.values())) for row in waiting])
    fetched = run.accelerator.reduce(on_device, "mean").tolist()
    for row, numbers in zip(waiting, fetched, strict=True):
        terms = dict(zip(row.terms, numbers, strict=True))
        if not math.isfinite(terms["loss"]):
            names = sorted({run.images.names[index] for index in row.pictures})
            raise not_finite(run, f"the loss of step {row.step} is {terms['loss']}, with {', '.join(names[:8])}")
        if row.step == run.args.max_train_steps:
            training.cost = measure_cost(run, training)
        values = terms | row.values | training.cost
        progress.update(1)
        progress.set_postfix({name.removeprefix("loss/"): f"{value:.4g}" for name, value in values.items()})
        log(run, values, row.step)


def measure_cost(run, training) -> dict[str, float]:
    """Seconds a step, with its share of pictures and checkpoints; on CUDA also the peak of its memory, in GiB."""
    seconds = time.monotonic() - training.begun
    cost = {"seconds_per_step": seconds / (training.step - training.start)}
    if run.device.type == "cuda":
        cost["peak_memory_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
    return cost


def log(run, values, step):
    """Give values to the trackers and, whatever they are, a line to `metrics.jsonl`."""
    with giving_up(run, "a tracker"):
        run.accelerator.log(values, step=step)
    if run.accelerator.is_main_process:
        with giving_up(run, "metrics.jsonl"):
            with (Path(run.args.output_dir) / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")


@contextlib.contextmanager
def giving_up(run, what):
    """Inside, what only shows how a run does may fail, by a full disk, memory, a sampler: told once, it goes on."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
        free_memory()
        if what not in run.given_up:
            run.given_up.add(what)
            logger.warning(f"{what} failed, training goes on without: {type(error).__name__}: {error}")


def not_finite(run, what) -> RunError:
    """The error for numbers that are not finite: what they are of, likely causes, and what is left."""
    causes = f"--learning_rate {run.args.learning_rate:g} may be too high; the base may be damaged"
    if run.accelerator.scaler is not None:
        causes += "; --mixed_precision fp16 overflows where bf16 does not"
    kept = [path.name for path in list_checkpoints(Path(run.args.output_dir))]
    return RunError(f"{what}. Likely causes: {causes}. No file changed; checkpoints: {', '.join(kept) or 'none'}")


@torch.no_grad()
def log_held_out(run, step):
    """Log the terms on the pictures of `--validation_data_dir`, at noise and timesteps that stay the same."""
    images = run.images
    held_out = range(images.count, len(images))
    if not held_out:
        return
    found = []
    loss_of = run.loss_of or loss_terms
    with evaluating(run.student):
        for number in range(8 * len(held_out)):  # each picture eight times
            item = images[held_out[number % len(held_out)], (run.args.seed, "held out", number)]
            drawn = draw_micro_step(run, -1 - number, [item])
            (anchor,) = anchors_of(run, [drawn])
            found.append(loss_of(drawn, anchor, run.student, run))
    means = {name: torch.stack([terms[name] for terms in found]).mean().item() for name in found[0]}
    if not math.isfinite(means["loss"]):
        raise not_finite(run, f"the loss on --validation_data_dir at step {step} is {means['loss']}")
    log(run, {name.replace("loss/", "val/"): value for name, value in means.items() if name != "loss"}, step)


def validation_is_due(args, step) -> bool:
    """Whether pictures are made after this step: every --validation_steps, or at the end of due epochs."""
    makes_pictures = bool(args.validation_prompts) and args.num_validation_images > 0
    if args.validation_data_dir is None and not makes_pictures:
        return False
    if args.validation_steps is not None:
        return step % args.validation_steps == 0
    epoch, position = divmod(step - 1, args.steps_per_epoch)
    ends = position == args.steps_per_epoch - 1 or step == args.max_train_steps
    return ends and epoch % args.validation_epochs == 0


# ---- The subject's pictures and captions, and which of them each micro-step sees ----

# What Pillow raises for damaged pictures, beside the errors that `explained` knows.
READING_ERRORS = (SyntaxError, AttributeError, TypeError, Image.DecompressionBombError)


def list_folder(folder) -> list[Path]:
    """What is in a folder, by name, without what operating systems leave there."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(SYSTEM_FILES)]


def normal_form(name) -> str:
    """A file's name as others may spell it: macOS writes an accent as a letter of its own, most programs do not."""
    return unicodedata.normalize("NFC", name)


def open_picture(source) -> Image.Image:
    """A file or a dataset's picture, upright by its EXIF orientation; `ValueError` for a pipe, which may never end."""
    if isinstance(source, Path):
        if not source.is_file():
            raise ValueError("it is no regular file")
        source = Image.open(source)
    return ImageOps.exif_transpose(source)


def read_image(source) -> Image.Image:
    """A picture as RGB: 16 bits and floats from 0 to 1 brought to 8 bits, transparency over white."""
    image = open_picture(source)
    if image.mode == "F" and image.getextrema()[1] <= 1:
        image = image.point(lambda value: value * 255)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_text(path) -> str:
    """The text of a UTF-8 file, with or without the mark that Windows puts before it; empty if there is no file."""
    with explained(f"{path} is not UTF-8 text (save it as UTF-8), or cannot be read"):
        return path.read_text(encoding="utf-8-sig").rstrip() if path.is_file() else ""


def caption_in(found) -> str | None:
    """A caption as a file or a column holds it, or None where that holds nothing or blanks."""
    if found is None:
        return None
    if not isinstance(found, str):
        raise ValueError(f"a caption must be text, not {found!r}")
    found.encode()  # raises where JSON names half a letter
    return found.strip() or None


def read_folder(name, field) -> tuple[list[Path], list[str | None]]:
    """The pictures of a folder, and captions from `metadata.jsonl` or from NAME.txt beside NAME.jpg."""
    folder = Path(name)
    metadata = folder / "metadata.jsonl"
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    with explained(f"{folder} cannot be read"):
        listed = [path for path in list_folder(folder) if path != metadata]
        files = [path for path in listed if path.is_file() and path.suffix.lower() in readable]
    texts = {normal_form(path.stem): path for path in listed if path.suffix == ".txt"}
    skipped = [path.name for path in listed if path not in files and path.suffix != ".txt"]
    if skipped:
        advice = "for HEIC export JPEG, or pip install pillow-heif"
        logger.warning(f"{folder}: not pictures, skipped: {', '.join(skipped)}; {advice}")
    if not files:
        raise UsageError(f"{folder} holds no picture")
    captions = {}
    for path in files:
        text = texts.get(normal_form(path.stem), path.with_suffix(".txt"))
        captions[normal_form(path.name)] = caption_in(read_text(text))
    read_metadata(metadata, field or "text", captions)
    return files, [captions[normal_form(path.name)] for path in files]


def read_metadata(path, field, captions):
    """Put the captions of a `metadata.jsonl` into `captions`, by the pictures' names, which it must have."""
    form = f'{{"file_name": "00.jpg", "{field}": "a caption"}}'
    told = set()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        with explained(f"{path}, line {number}: not the line of a picture, of the form {form}", TypeError):
            if line.strip():
                row = json.loads(line)
                name = normal_form(str(Path(row["file_name"])))
                if name not in captions or name in told:
                    raise ValueError(f"{name} is no picture of this folder, or has a line already")
                told.add(name)
                captions[name] = caption_in(row[field])


def read_dataset(args) -> tuple[Sequence[Image.Image], list[str | None]]:
    """Pictures (decoded when indexed) and captions of `--dataset_name`, a name on the hub or a folder on disk."""
    import datasets  # costs a second at start-up, and most runs read a folder

    path = Path(args.dataset_name)
    with explained(f"--dataset_name {args.dataset_name} cannot be loaded"):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(args.dataset_name)
        else:
            dataset = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset["train"]
    for flag in ("image_column", "caption_column"):
        column = getattr(args, flag)
        if column is not None and column not in dataset.column_names:
            raise UsageError(f"--{flag} {column} is not one of the columns {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise UsageError(f"{args.dataset_name} holds no picture")
    captions = [None] * len(dataset)
    columns = f"--image_column {args.image_column} or --caption_column {args.caption_column}"
    with explained(columns, TypeError, NotImplementedError):
        if args.caption_column is not None:
            captions = [caption_in(caption) for caption in dataset[args.caption_column]]
        return dataset.cast_column(args.image_column, datasets.Image())[args.image_column], captions


def check_mask(mask, size):
    """Raise `ValueError` for a mask that is not of the photo's size (height, width), black, or inverted."""
    white = np.asarray(mask).mean() / 255
    if mask.size != size[::-1]:
        sizes = f"{mask.width} x {mask.height} pixels, and the photo, turned as its EXIF says, {size[1]} x {size[0]}"
        raise ValueError(f"it has {sizes}")
    if white == 0 or white > 0.9:
        raise ValueError(f"{white:.0%} of it is white, for the subject; is it inverted, or opaque?")


class SubjectImages:
    """The subject's pictures with their captions and anchor captions, and the order in which a run sees them.

    An item depends on nothing but the draw (index, key) that asks for it. Pictures are opened when they are needed
    and not kept; at the start each is opened once, so that a damaged one is found before a model is loaded. Those
    held out come last and change nothing for the others.
    """

    def __init__(self, args):
        self.args = args
        if args.instance_data_dir is None:
            images, captions = read_dataset(args)
            self.names = [f"picture {index}" for index in range(len(images))]
        else:
            images, captions = read_folder(args.instance_data_dir, args.caption_column)
            self.names = [path.name for path in images]
        self.count = len(images)  # to train on
        self.images = images
        if args.validation_data_dir is not None:
            held_out, their_captions = read_folder(args.validation_data_dir, args.caption_column)
            self.names += [path.name for path in held_out]
            self.images = ConcatDataset([images, held_out])
            captions += their_captions
        self.caption_all(captions)
        self.sizes = self.read_sizes()  # (height, width)
        self.masks = self.read_masks()
        buckets = [(args.resolution, args.resolution)]
        if args.aspect_ratio_buckets is not None:
            buckets = parse_buckets_string(args.aspect_ratio_buckets)
        elif args.use_aspect_ratio_buckets:
            buckets = diffusers.training_utils.generate_aspect_ratio_buckets(args.resolution, LATENT_STRIDE)
        self.windows = []  # what of a picture is seen, (height, width)
        self.covering = []  # the size of a picture that is resized to just cover its window
        for height, width in self.sizes:
            window = buckets[find_nearest_bucket(height, width, buckets)]
            scale = max(window[0] / height, window[1] / width)
            self.windows.append(window)
            self.covering.append((round(height * scale), round(width * scale)))
        in_buckets = args.aspect_ratio_buckets is not None or args.use_aspect_ratio_buckets
        nothing_is_cut = self.covering[: self.count] == self.windows[: self.count]
        centred = args.center_crop or in_buckets or nothing_is_cut
        self.cacheable = centred or args.cache_latents
        self.fixed_centering = [(0.5, 0.5)] * len(self)  # where latents are cached, and pictures held out
        for index in range(0 if centred else self.count):
            crop = torch.rand(2, generator=keyed_generator(args.seed, "crop", index))
            self.fixed_centering[index] = tuple(crop.tolist())
        self.batches_per_epoch = len(self.epoch(0))

    def caption_all(self, captions):
        """Give every picture its caption, or the instance prompt, and the anchor's caption."""
        args = self.args
        anchored = args.anchor_weight > 0
        missing = captions.count(None)
        if missing < len(captions):
            stands_in = ", --instance_prompt stands in for the others" if missing else ""
            logger.info(f"Captions: found for {len(captions) - missing} of {len(captions)} pictures{stands_in}")
        token = args.subject_token
        to_derive = args.class_prompt is None or args.class_prompt_lacks is not None
        if anchored and token is None and to_derive:
            token = customary_identifier([caption or "" for caption in captions])
        if anchored and args.class_prompt is None and token is None:
            raise UsageError(CLASS_PROMPT_NEEDED)
        if token is not None and args.subject_token is None:
            logger.info(f'Anchors:  the captions without "{token}"; --subject_token to say it better')
        if anchored and token is None and len(set(captions) - {None}) > 1:
            advice = "which draws out what they add: with --subject_token each has an anchor of its own"
            logger.warning(f'The captions differ and all are anchored to "{args.class_prompt}", {advice}')
        if anchored and args.class_prompt is None and missing:
            raise UsageError(f"--class_prompt is needed for the {missing} pictures without a caption")
        self.captions = [caption or args.instance_prompt for caption in captions]
        self.anchor_captions = [args.class_prompt or ""] * len(captions)
        if anchored and token is not None:
            for index, caption in enumerate(captions):
                must_hold_it = args.subject_token is not None or args.class_prompt is None
                named = must_hold_it or token in IDENTIFIER.findall(caption or "")
                if caption is not None and named:
                    with explained("--subject_token"):
                        self.anchor_captions[index] = class_caption(caption, token, args.class_token or "")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index) -> Image.Image:
        """One picture; raises `UsageError`, with its name, if it cannot be read."""
        place = self.args.instance_data_dir or self.args.dataset_name
        if index >= self.count:
            place = self.args.validation_data_dir
        with explained(
            f"{self.names[index]} of {place} cannot be read as a picture, mend or remove it", *READING_ERRORS
        ):
            return read_image(self.images[index])

    def read_sizes(self) -> list[tuple[int, int]]:
        """Read each picture once, for its size (height, width); warn of those that cannot be meant."""
        sizes = []
        empty = []
        trained = set()
        both = []
        for index in tqdm(range(len(self)), desc="Reading pictures", leave=False):
            image = self.read(index)
            sizes.append((image.height, image.width))
            if all(low == high for low, high in image.getextrema()):
                empty.append(self.names[index])
            content = fingerprint(image)
            if index < self.count:
                trained.add(content)
            elif content in trained:
                both.append(self.names[index])
        if empty:
            logger.warning(f"Of one colour, is that meant? {', '.join(empty)}")
        if both:
            logger.warning(f"--validation_data_dir: {', '.join(both)} are among the pictures to train on, too")
        return sizes

    def __getitem__(self, draw) -> dict:
        """Crop, mirror and caption of one sample as drawn from its key; pixels only where latents are not cached."""
        index, key = draw
        left, top, flip, drop = torch.rand(4, generator=keyed_generator(*key)).tolist()
        trains = index < self.count  # those held out are always seen alike
        flipped = trains and self.args.random_flip and flip < 0.5
        centering = (left, top)
        if self.cacheable or not trains:
            centering = self.fixed_centering[index]
        item = {"index": index, "flipped": flipped, "centering": centering, "pixel_values": None}
        if not self.cacheable:
            item["pixel_values"] = self.pixel_values(index, flipped, centering)
        dropped = trains and drop < self.args.caption_dropout
        item["prompt"] = "" if dropped else self.captions[index]
        item["anchor_prompt"] = "" if dropped else self.anchor_captions[index]
        item["of_class"] = False
        if trains and self.args.class_share > 0:
            draw = torch.rand(1, generator=keyed_generator(*key, "class share")).item()
            item["of_class"] = draw < self.args.class_share
        if item["of_class"]:
            item["prompt"] = item["anchor_prompt"]
        return item

    def pixel_values(self, index, flipped, centering) -> Tensor:
        """One picture resized to cover its window and cropped, at left and top for (0, 0): (3, h, w) in [-1, 1]."""
        method = self.args.image_interpolation_mode.replace("nearest_exact", "nearest").upper()
        image = self.fit(self.read(index), index, flipped, centering, method)
        return VaeImageProcessor(do_resize=False).preprocess(image)[0]

    @functools.lru_cache(maxsize=256)  # noqa: B019 (the pictures live as long as the run)
    def mask(self, index, flipped, centering, size) -> Tensor:
        """The mask of a picture, cropped as that is, for latents of a size (h, w): (1, h, w), 1 on the subject."""
        mask = self.fit(self.masks[index], index, flipped, centering, "BOX")
        return nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.asarray(mask, np.float32) / 255)[None], size)

    def fit(self, image, index, flipped, centering, method) -> Image.Image:
        """A picture, or its mask, mirrored if need be, resized to cover its window and cropped."""
        if flipped:
            image = ImageOps.mirror(image)
        return ImageOps.fit(image, self.windows[index][::-1], method=Image.Resampling[method], centering=centering)

    def read_masks(self) -> list[Image.Image]:
        """For each picture the grey one of its name in `--mask_dir`, or what `--alpha_mask` sees in it; none at all
        without these flags. Raises `UsageError` for one that is missing, left over, misshapen, black or inverted."""
        if self.args.mask_dir is not None:
            sources = self.mask_files(Path(self.args.mask_dir))
        elif self.args.alpha_mask:
            sources = [self.images[index] for index in range(self.count)]
        else:
            return []
        masks = []
        for index, source in enumerate(sources):
            with explained(f"--mask_dir or --alpha_mask: the mask of {self.names[index]}", *READING_ERRORS):
                image = open_picture(source)
                mask = image.convert("RGBA").getchannel("A") if self.args.alpha_mask else image.convert("L")
                check_mask(mask, self.sizes[index])
            masks.append(mask)
        return masks

    def mask_files(self, folder) -> list[Path]:
        """For each picture to train on its file in `--mask_dir`; raises `UsageError` for one without the other."""
        files = {}
        with explained(f"--mask_dir {folder}"):
            for path in list_folder(folder):
                stem = normal_form(path.stem)
                if stem in files:
                    raise ValueError(f"{files[stem].name} and {path.name} are two masks for one photo")
                files[stem] = path
        stems = [normal_form(Path(name).stem) for name in self.names[: self.count]]
        alone = sorted(files.keys() ^ set(stems))
        if alone:
            raise UsageError(f"--mask_dir {folder}: a mask or a photo without the other: {', '.join(alone)}")
        return [files[stem] for stem in stems]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as above)
    def epoch(self, number) -> list[list[int]]:
        """The batches of one epoch, lists of picture indices, the same on all ranks.

        An epoch deals every picture (`repeats` times) to batches of one size: pictures of one window make batches
        together, and the last batch of a window is filled up from its first pictures, so all batches weigh the same.
        """
        generator = keyed_generator(self.args.seed, "epoch", number)
        size = self.args.train_batch_size
        batches = []
        for window in sorted(set(self.windows[: self.count])):
            members = [index for index in range(self.count) if self.windows[index] == window] * self.args.repeats
            order = torch.randperm(len(members), generator=generator).tolist()
            dealt = itertools.cycle(members[place] for place in order)
            for _ in range(math.ceil(len(members) / size)):
                batches.append(list(itertools.islice(dealt, size)))
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]

    def draws(self, rank, ranks, start, stop) -> Iterator[list[tuple[int, tuple]]]:
        """For each micro-step of one rank the draws (index, key) of its batch; the ranks take the batches in turn."""
        for micro_step in range(start, stop):
            number, position = divmod(micro_step * ranks + rank, self.batches_per_epoch)
            batch = self.epoch(number)[position]
            yield [(index, (self.args.seed, rank, micro_step, place)) for place, index in enumerate(batch)]

    def batches(self, draws) -> Iterator[list[dict]]:
        """The items of each batch of draws. Threads, which Pillow lets run side by side, crop those of coming ones."""
        workers = 0 if self.cacheable else self.args.dataloader_num_workers
        waiting = collections.deque()
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for batch in draws:
                waiting.append(pool.map(self.__getitem__, batch))
                if len(waiting) > 2 * workers:
                    yield list(waiting.popleft())
            for items in waiting:
                yield list(items)


# ---- The parts of the base, in stages: text encoders, then the VAE, then the denoiser ----

LATENT_SCALE = ("scaling_factor",)  # of the VAE's configuration
KNOWN_MODELS = (DENOISER_CLASS.__name__, "CLIPTextModel", "CLIPTextModelWithProjection")


def check_base(args):
    """Read the base's index, configurations and, in a local folder, headers; raise `UsageError` if they do not fit."""
    base = args.pretrained_model_name_or_path
    flag = f"--pretrained_model_name_or_path {base}"
    folder = Path(base)
    if folder.is_file():
        convert = f"{PIPELINE_CLASS.__name__}.from_single_file({base!r}).save_pretrained({folder.stem!r})"
        command = f'python -c "import diffusers; diffusers.{convert}"'
        raise UsageError(f"{flag} is a single file: make a folder of it, once, and pass that: {command}")
    trouble = "cannot be used" if folder.exists() else "is no folder, and the hub has it not"
    with explained(f"{flag} {trouble}", TypeError, AttributeError, RuntimeError):
        check_index(flag, PIPELINE_CLASS.load_config(base, revision=args.revision))
        if folder.is_dir():
            for name in BASE_PARTS:
                check_folder(folder / name, args.variant)
        config = DENOISER_CLASS.load_config(base, subfolder=DENOISER, revision=args.revision)
        check_denoiser(args, config)
        if training_scheduler(args).config.num_train_timesteps < 2:
            raise ValueError("its scheduler has one timestep")
    flag, source, files = vae_source(args)
    with explained(f"{flag} {source} cannot be used"):
        vae_config = AutoencoderKL.load_config(source, **files)
        for name in LATENT_SCALE:
            if not isinstance(vae_config.get(name, 1.0), float | int):
                raise ValueError(f"its VAE's {name} is no number")
        reads = config["in_channels"]
        makes = vae_config["latent_channels"]
        if reads != makes:  # inpainting, editing, a VAE of another kind of base
            latents = f"the VAE's latents have {makes} channels and the {DENOISER} of {base} reads {reads}"
            raise ValueError(f"{latents}; bases for inpainting or editing cannot be trained")


def check_index(flag, index):
    """Raise `UsageError` if a pipeline, by its `model_index.json`, is not of the kind that this script trains."""
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[1]}
    wrong = [f"with {name}" for name in FOREIGN_PARTS if name in parts]
    wrong += [f"without {name}" for name in BASE_PARTS if name not in parts]
    for name in (DENOISER, *TRAINABLE_TEXT_ENCODERS):
        if name in parts and parts[name] not in KNOWN_MODELS:
            wrong.append(f"with {parts[name]}")
    if wrong:
        raise UsageError(f"{flag} is a {index.get('_class_name')} {', '.join(wrong)}: {BASE_KIND}")


def check_denoiser(args, config):
    """Raise `ValueError` for a denoiser that reads other embeddings than the text encoders make, `UsageError` for one
    without a layer of `--lora_layers`."""
    base = args.pretrained_model_name_or_path
    width = 0
    for name in TRAINABLE_TEXT_ENCODERS:
        text_config = transformers.CLIPTextConfig.from_pretrained(base, subfolder=name, revision=args.revision)
        width += text_config.hidden_size
    reads = config.get("cross_attention_dim", width)
    if reads != width:
        raise ValueError(f"its {DENOISER} reads {reads} numbers a token and its text encoders make {width}")
    if args.lora_layers is not None:
        with init_empty_weights():
            names = [f".{name}" for name, _ in DENOISER_CLASS.from_config(config).named_modules()]
        for layer in args.lora_layers.split(","):
            if not any(name.endswith(f".{layer.strip()}") for name in names):
                raise UsageError(f"--lora_layers: no layer of the {DENOISER} ends in {layer.strip()}")


def check_folder(folder, variant):
    """Look for the files of one part of the base; of weights only the headers are read, but whole they must be."""
    kind = folder.name.split("_")[0]
    configuration = f"{kind}_config.json" if kind in ("tokenizer", "scheduler") else "config.json"
    if not (folder / configuration).is_file():
        raise ValueError(f"{folder / configuration} is missing; get the folder again")
    if configuration != "config.json":
        return
    weights = [path for path in list_folder(folder) if path.suffix == ".safetensors" and path.is_file()]
    variants = {re.sub(r"-\d+-of-\d+", "", path.stem).partition(".")[2] for path in weights}
    if not weights:
        raise ValueError(f"{folder} holds no weights in the safetensors format")
    if variants.isdisjoint(("", variant)):
        raise ValueError(f"{folder} has only {weights[0].name}, see --variant")
    for path in weights:
        with explained(f"--pretrained_model_name_or_path: {path} is damaged, get it again"), safe_open(path, "pt"):
            pass


def base_files(args, accelerator) -> dict:
    """How to load the frozen base: never from pickles, which could run code, and in the run's precision. What trains
    is float32, and so is the VAE: some overflow in half precision."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    return {"revision": args.revision, "variant": args.variant, "use_safetensors": True, "dtype": dtype}


def vae_source(args) -> tuple[str, str, dict]:
    """The flag that names the VAE, its folder or repository, and which of the files there are meant."""
    if args.pretrained_vae_model_name_or_path is not None:
        return "--pretrained_vae_model_name_or_path", args.pretrained_vae_model_name_or_path, {}
    files = {"subfolder": "vae", "revision": args.revision, "variant": args.variant}
    return "--pretrained_model_name_or_path", args.pretrained_model_name_or_path, files


def load_part(kind, flag, source, **files) -> nn.Module:
    """A frozen model, of `--variant` where it has that; raises `UsageError` if weights are missing: the library would
    make them up."""
    with explained(f"{flag} {source} cannot be loaded", RuntimeError):
        try:
            model, info = kind.from_pretrained(source, **files, output_loading_info=True)
        except OSError:
            if files.pop("variant", None) is None:
                raise
            model, info = kind.from_pretrained(source, **files, output_loading_info=True)
    wrong = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if wrong:
        lacks = f"{kind.__name__} lacks {len(wrong)} weights, such as {wrong[0]}"
        raise UsageError(f"{flag} {source}: {lacks}; get it again")
    return model.requires_grad_(False)


def load_text_pipeline(args, accelerator, images) -> PIPELINE_CLASS:
    """The base without denoiser and VAE: tokenizers, text encoders, `encode_prompt` and the scheduler."""
    base = args.pretrained_model_name_or_path
    files = base_files(args, accelerator)
    kinds = PIPELINE_CLASS.load_config(base, revision=args.revision)
    parts = {DENOISER: None, "vae": None}
    for name in TRAINABLE_TEXT_ENCODERS:
        kind = getattr(transformers, kinds[name][1])
        parts[name] = load_part(kind, "--pretrained_model_name_or_path", base, subfolder=name, **files)
    with explained(f"--pretrained_model_name_or_path {base} cannot be loaded"):
        pipeline = PIPELINE_CLASS.from_pretrained(base, **parts, **UNUSED_PARTS, **files)
    check_tokenizers(pipeline)
    if args.train_text_encoder or not args.offload:
        pipeline.to(accelerator.device)
    return pipeline


def check_tokenizers(pipeline):
    """Raise `UsageError` for a tokenizer with tokens that its text encoder does not know."""
    for name in TRAINABLE_TEXT_ENCODERS:
        tokens = len(getattr(pipeline, name.replace("text_encoder", "tokenizer")))
        rows = getattr(pipeline, name).get_input_embeddings().num_embeddings
        if tokens > rows:
            raise UsageError(
                f"the tokenizer of the base or of --tokenizer_name has {tokens} tokens, {name} knows {rows}"
            )


def encode_prompts(pipeline, prompts, device) -> dict[str, Tensor]:
    """The denoiser's conditioning (B, ...) on B prompts; gradients reach text encoders that train.

    An empty prompt (caption dropout) gives what the sampler takes for one: zeros, where the pipeline says so.
    """
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    if pipeline.config.force_zeros_for_empty_prompt:
        kept = to_device(torch.tensor([float(prompt != "") for prompt in prompts]), device).to(embeds.dtype)
        embeds = embeds * kept[:, None, None]
        pooled = pooled * kept[:, None]
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def encode_for_sampling(pipeline, prompt) -> dict[str, Tensor]:
    """What the pipeline's call takes in place of a prompt, for pictures with classifier-free guidance."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, pipeline.encode_prompt(prompt, device=pipeline.device), strict=True))


def denoise(model, model_input, timesteps, conditioning) -> Tensor:
    """The denoiser's raw prediction, shaped as `model_input` (B, C, h, w), in the dtype of its weights."""
    states = conditioning["encoder_hidden_states"]
    added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
    return model(model_input.to(states.dtype), timesteps, states, added_cond_kwargs=added, return_dict=False)[0]


def training_scheduler(args) -> diffusers.SchedulerMixin:
    """The diffusion process of the base: EDM if it is one, or is to be trained as one. Raises `UsageError` if it
    predicts something else than noise or v, or if `--snr_gamma` would weigh EDM a second time."""
    base = args.pretrained_model_name_or_path
    config = diffusers.DDPMScheduler.load_config(base, subfolder="scheduler", revision=args.revision)
    kind = diffusers.DDPMScheduler
    if args.do_edm_style_training:
        kind = diffusers.EulerDiscreteScheduler
    for edm in EDM_SCHEDULERS:
        if config["_class_name"] == edm.__name__:
            kind = edm
    if kind in EDM_SCHEDULERS and args.snr_gamma is not None:
        raise UsageError(f"--snr_gamma cannot go with {base}: EDM has weights of its own; leave it out")
    scheduler = kind.from_config(config)
    predicts = scheduler.config.prediction_type
    if "shift" in config:  # as those of flow matching have it
        predicts = "flow"
    if predicts not in ("epsilon", "v_prediction"):
        raise UsageError(f"--pretrained_model_name_or_path {base}: its scheduler's prediction_type is {predicts}")
    return scheduler


def scale_latents(latents, vae, inverse=False) -> Tensor:
    """Latents as the VAE samples them, brought to the scale the denoiser was trained on, or back.

    Where the VAE has a mean and a standard deviation of each channel, as Playground v2.5's does, they count too.
    """
    mean = 0.0
    std = 1.0
    if vae.config.latents_mean is not None and vae.config.latents_std is not None:
        mean = to_device(torch.tensor(vae.config.latents_mean)[:, None, None], latents.device)
        std = to_device(torch.tensor(vae.config.latents_std)[:, None, None], latents.device)
    scale = vae.config.scaling_factor / std
    if inverse:
        return latents / scale + mean
    return (latents - mean) * scale


@torch.no_grad()
def encode_texts(args, pipeline, images) -> tuple[dict, dict]:
    """First stage: what the text encoders, as they are, make of every prompt, for training and for sampling.

    Raises `UsageError` for a prompt whose anchor is the same to them: the word for the subject is cut off.
    """
    telling = logging.getLogger(PIPELINE_CLASS.__module__)
    telling.setLevel(logging.NOTSET)
    anchors = images.anchor_captions if args.anchor_weight > 0 else images.captions
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part]
    for caption, anchor in zip(images.captions, anchors, strict=True):
        same = [read(caption, truncation=True) == read(anchor, truncation=True) for read in tokenizers]
        if all(same) and caption != anchor:
            same_words = f'to the text encoders "{caption}" is the same as "{anchor}"'
            raise UsageError(f"--instance_prompt or captions: {same_words}; say the subject earlier")
    kept = set(anchors)
    if not args.train_text_encoder:
        kept.update(images.captions)
    if args.caption_dropout > 0:
        kept.add("")
    embeddings = {}
    for prompt in tqdm(sorted({*kept, *images.captions}), desc="Encoding prompts", leave=False):
        found = encode_prompts(
            pipeline, [prompt], pipeline.device
        )  # also where it is not kept, to tell what is cut off
        if prompt in kept:
            embeddings[prompt] = {name: tensor.cpu() for name, tensor in found.items()}
    sampling_inputs = {}
    for prompt in {*args.validation_prompts, args.final_validation_prompt} - {None}:
        found = encode_for_sampling(pipeline, prompt)
        sampling_inputs[prompt] = {name: tensor.cpu() for name, tensor in found.items()}
    telling.setLevel(logging.ERROR)  # what of a prompt is cut off is told once, not in each step
    return embeddings, sampling_inputs


@torch.no_grad()
def encode_images(args, device, images) -> tuple[AutoencoderKL, dict]:
    """Second stage: the VAE and the posterior of every picture (and mirror image); none where crops are drawn anew."""
    flag, source, files = vae_source(args)
    vae = load_part(AutoencoderKL, flag, source, **files, use_safetensors=True, dtype=torch.float32).to(device)
    posteriors = {}
    pictures = range(len(images) if images.cacheable else 0)
    for index in tqdm(pictures, desc="Encoding pictures", leave=False):
        for flipped in {False, args.random_flip}:
            pixel_values = images.pixel_values(index, flipped, images.fixed_centering[index])
            parameters = vae.encode(pixel_values[None].to(device)).latent_dist.parameters
            if not parameters.isfinite().all():
                raise UsageError(f"{flag}: its VAE makes numbers of {images.names[index]} that are not finite")
            posteriors[index, flipped] = parameters.cpu()
    if images.cacheable or args.offload:
        vae.to("cpu")
    return vae, posteriors


@contextlib.contextmanager
def vae_at_work(run) -> Iterator[AutoencoderKL]:
    """The VAE on the device; afterwards it rests on the CPU, unless each micro-step needs it."""
    yield run.vae.to(run.device)
    if run.images.cacheable or run.args.offload:
        run.vae.to("cpu")


def load_denoiser(args, accelerator, images) -> nn.Module:
    """Third stage: the frozen denoiser, in the run's precision."""
    files = base_files(args, accelerator)
    config = quantization_config(args, files["dtype"])
    if config is not None:  # quantised weights are quantised on the device, and stay there
        files |= {"quantization_config": config, "device_map": {"": accelerator.device}}
    base = args.pretrained_model_name_or_path
    denoiser = load_part(DENOISER_CLASS, "--pretrained_model_name_or_path", base, subfolder=DENOISER, **files)
    if config is None:
        denoiser.to(accelerator.device)
    elif config.load_in_8bit:
        # bitsandbytes' CUDA kernel ignores strides, and what a UNet's proj_in gets may be a transposed view.
        for layer in denoiser.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(lambda _, inputs: tuple(one.contiguous() for one in inputs))
    round_once(denoiser, files["dtype"])
    if args.enable_xformers_memory_efficient_attention:
        denoiser.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if args.compile:
        # Student, anchors and validation times the widths of a UNet: more graphs than dynamo makes of one function.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in denoiser.modules():
            if type(block).__name__ == REPEATED_BLOCK:
                block.compile(dynamic=len(set(images.windows)) > 1)
    return denoiser


def round_once(denoiser, dtype):
    """In half precision have norm and activation in the residual blocks of a UNet rounded once, not one by one."""
    if dtype == torch.float32:
        return
    for block in denoiser.modules():
        if isinstance(block, ResnetBlock2D):
            block.forward = torch.autocast(denoiser.device.type, dtype)(block.forward)


def lora_targets(args) -> list[str]:
    """Endings of the denoiser's layers that get a LoRA."""
    if args.lora_layers is None:
        return DENOISER_TARGETS
    return [layer.strip() for layer in args.lora_layers.split(",")]


def add_adapters(args, modules):
    """Add LoRA layers to the modules of these names, always in float32: half precision loses small updates."""
    torch.manual_seed(args.seed)  # a LoRA starts at random: at the same place on all ranks
    for name, module in modules.items():
        flag = "--lora_layers" if name == DENOISER else "--train_text_encoder"
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_dora=args.use_dora,
            init_lora_weights="gaussian",
            target_modules=lora_targets(args) if name == DENOISER else TEXT_ENCODER_TARGETS,
        )
        with explained(flag):
            module.add_adapter(config)
        cast_training_params(module, torch.float32)
        if not args.use_dora:  # peft does that in float32
            compute_as_base(module)
        module.train()


def compute_as_base(module):
    """Have linear LoRA layers, whose weights are float32, compute in the precision of the base around them.

    peft would cast their inputs, which are larger than their weights, and keep these for the backward pass.
    """

    def forward(layer, inputs) -> Tensor:
        return nn.functional.linear(inputs, layer.weight.to(inputs.dtype))

    for adapter in adapter_layers(module):
        layers = [adapter.lora_A["default"], adapter.lora_B["default"]]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            adapter.cast_input_dtype_enabled = False
            for layer in layers:
                layer.forward = functools.partial(forward, layer)


def load_init_lora(args, modules):
    """Start from the LoRA of `--init_lora`, of the same layers and rank, in any form that diffusers reads.

    In float32: `load_lora_weights` rounds what it reads to the precision of the base.
    """
    errors = (RuntimeError, TypeError, AttributeError)
    with explained(f"--init_lora {args.init_lora}: its rank and layers must be those of this run", *errors):
        state, settings = read_lora(args, modules[DENOISER].config)
        wrong = [key for key in state if key.split(".")[0] not in modules]
        for name, module in modules.items():
            found = {key.removeprefix(f"{name}."): one for key, one in state.items() if key.startswith(f"{name}.")}
            convert = convert_unet_state_dict_to_peft if name == DENOISER else convert_all_state_dict_to_peft
            scale = settings.get(f"{name}.lora_alpha", 1) / settings.get(f"{name}.r", 1)
            weights = {}
            for key, tensor in convert(found).items():
                if not hasattr(module, "text_model"):
                    key = key.removeprefix("text_model.")
                weights[key] = tensor.float()
                if ".lora_B." in key:
                    weights[key] *= scale * args.rank / args.lora_alpha
            result = set_peft_model_state_dict(module, weights)
            wrong += result.unexpected_keys
            wrong += [key for key in result.missing_keys if ".lora_" in key]
        if wrong:
            raise ValueError(f"only one of them has {wrong[0]}")


def read_lora(args, unet_config) -> tuple[dict[str, Tensor], dict]:
    """The tensors of `--init_lora`, kohya's alphas multiplied in, and what diffusers noted of the adapter."""
    state, *notes = PIPELINE_CLASS.lora_state_dict(
        args.init_lora, use_safetensors=True, unet_config=unet_config, return_lora_metadata=True
    )
    if len(notes) > 1:  # SD3 knows no file of kohya's
        for name, alpha in (notes[0] or {}).items():
            down = name.removesuffix(".alpha")
            if down not in state:
                down += ".lora.down.weight"
            up = down.replace(".down.", ".up.")
            state[up] = state[up].float() * (alpha / len(state[down]))
    return state, notes[-1] or {}


def prepare(args, accelerator, images, **more) -> Run:
    """Go through the stages, each of which lets go of what the next one does not need before that loads anything."""
    pipeline = load_text_pipeline(args, accelerator, images)
    embeddings, sampling_inputs = encode_texts(args, pipeline, images)
    encoders = {}
    if args.train_text_encoder:
        encoders = {name: getattr(pipeline, name) for name in TRAINABLE_TEXT_ENCODERS}
    else:
        pipeline = None
    free_memory()
    vae, posteriors = encode_images(args, accelerator.device, images)
    free_memory()
    denoiser = load_denoiser(args, accelerator, images)
    modules = {DENOISER: denoiser, **encoders}
    add_adapters(args, modules)
    if args.gradient_checkpointing:
        for encoder in encoders.values():  # by its new name, or that of older transformers
            enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
    if args.init_lora is not None:
        load_init_lora(args, modules)
    student = Student(denoiser, pipeline)
    return Run(args, accelerator, images, embeddings, sampling_inputs, vae, posteriors, student, **more)


# ---- Files: the LoRA, checkpoints, and what makes two runs the same ----


@contextlib.contextmanager
def replacing(final) -> Iterator[Path]:
    """Where to write a file or folder that then takes the place of `final`; raises `RunError` if the disk refuses.

    Until it is whole and on the disk, what was there stays.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
        tidy(final)
        yield partial
        for path in (*partial.glob("*"), partial):
            flush(path)
        os.replace(partial, final)
        flush(final.parent)
    except OSError as error:
        folder = next(path for path in final.parents if not path.name.startswith("."))
        kept = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
        reason = f"{str(error).splitlines()[0]}: free some space, or copy the folder to another disk"
        raise RunError(f"{final} cannot be written, {reason}; checkpoints that are whole: {kept}") from error
    finally:
        with contextlib.suppress(OSError):
            tidy(final)


def flush(path):
    """Have the system write a file, or the names in a folder: else a rename may outlive a power cut that the content
    does not."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not every network file system can
            os.fsync(descriptor)
        os.close(descriptor)


def tidy(final):
    """Leave nothing beside `final` of a write that was cut short."""
    partial = final.with_name(f".{final.name}.partial")
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def tidying():
    """Inside, files are moved away or removed; what the disk refuses is told once, and the run goes on."""
    try:
        yield
    except (OSError, RunError) as error:
        warn_once(f"This stays where it is, and the run goes on: {error}")


@functools.cache
def warn_once(sentence):
    """Warn, unless the same has been said before."""
    logger.warning(sentence)


def lora_layers(run) -> dict[str, dict[str, Tensor]]:
    """The LoRA of each adapted module as peft names it, in float32 on the CPU; only if all of it is finite.

    Text encoders' keys get the `text_model.` that transformers 5.6 dropped: other programs look for it.
    """
    layers = {}
    for name, module in run.student.adapted.items():
        prefix = ""
        if name != DENOISER and not hasattr(module, "text_model"):
            prefix = "text_model."
        layers[name] = {}
        for key, tensor in get_peft_model_state_dict(module, save_embedding_layers=False).items():
            if not tensor.isfinite().all():
                raise not_finite(run, f"the LoRA of {name} is no longer finite")
            layers[name][prefix + key] = tensor.detach().float().cpu().contiguous()
    return layers


def write_safetensors(tensors, path, metadata):
    """Write a file whose bytes follow from its content: the library writes metadata in a random order.

    Its hash is the one of sd-scripts, A1111 and ModelSpec: SHA-256 of all that follows the header.
    """
    data = memoryview(safetensors.torch.save(tensors))
    start = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[start:]).hexdigest()
    metadata = metadata | {"format": "pt", "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(bytes(data[8:start]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
    with path.open("wb") as file:
        file.writelines([len(text).to_bytes(8, "little"), text, data[start:]])


def write_lora(run, folder):
    """Write the LoRA for `load_lora_weights`, with one style for all keys: diffusers decides by the first of them.

    The scale alpha / rank is in `lora_B`: most programs that read this file know no alpha but the rank.
    """
    args = run.args
    tensors = {}
    metadata = {}
    for name, layers in lora_layers(run).items():
        for key, tensor in layers.items():
            if ".lora_B." in key:
                tensor = tensor * (args.lora_alpha / args.rank)
            if key.endswith("magnitude_vector"):
                key += ".weight"
            tensors[f"{name}.{key}"] = tensor
        # Every other field of LoraConfig breaks some older peft.
        settings = {"r": args.rank, "lora_alpha": args.rank}
        if args.use_dora:
            settings["use_dora"] = True
        settings["target_modules"] = lora_targets(args) if name == DENOISER else TEXT_ENCODER_TARGETS
        metadata |= {f"{name}.{key}": setting for key, setting in settings.items()}
    with replacing(folder / LORA_FILE) as partial:
        write_safetensors(tensors, partial, {"lora_adapter_metadata": json.dumps(metadata)})


def kohya_state(layers, alpha, depth=2) -> dict[str, Tensor]:
    """A LoRA with the keys of kohya's tools, which ComfyUI and A1111 read too, text encoder included.

    `layers` are as `lora_layers` has them: for each part of the pipeline, tensors by peft's names. `depth` is the
    UNet's `layers_per_block`. `diffusers.utils.convert_state_dict_to_kohya` takes the rank for alpha and misses
    DoRA's and SD1.5's key names.
    """
    state = {}
    for component, tensors in layers.items():
        for key, tensor in tensors.items():
            module, part = key.split(".lora_")
            if part == "magnitude_vector":  # one an output, with the axes of the layer's weight
                tensor = tensor[:, None] if tensor.ndim == 1 else tensor.transpose(0, 1).contiguous()
            name = kohya_name(component, module, depth)
            state[f"{name}.{KOHYA_PARTS[part]}"] = tensor
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


def kohya_name(component, module, depth) -> str:
    """What kohya's tools call a module of a part of the pipeline: the UNet's have Stability's names."""
    if component == DENOISER:
        module = stability_name(module, depth)
    return f"{KOHYA_PREFIXES[component]}_{module.replace('.', '_')}"


def write_kohya_lora(run, folder):
    """Write the LoRA for ComfyUI, A1111, Forge and kohya's tools."""
    state = kohya_state(lora_layers(run), run.args.lora_alpha, run.student.denoiser.config.layers_per_block)
    with replacing(folder / KOHYA_FILE) as partial:
        write_safetensors(state, partial, lora_metadata(run))


def lora_metadata(run) -> dict[str, str]:
    """What A1111, Forge, sd-scripts and ModelSpec 1.0.1 look for. No date, no path: equal runs write equal bytes."""
    args = run.args
    version, architecture = base_version(run)
    title = folder_name(args.output_dir)
    trigger = args.instance_prompt
    size = args.resolution
    entries = {"base_model_version": version, "v2": version.startswith("sd_v2"), "network_module": "networks.lora",
               "network_dim": args.rank, "network_alpha": args.lora_alpha, "output_name": title,
               "sd_model_name": folder_name(args.pretrained_model_name_or_path), "resolution": (size, size),
               "tag_frequency": json.dumps({title: {trigger: run.images.count}})}  # fmt: skip
    spec = {"sai_model_spec": "1.0.1", "architecture": f"{architecture}/lora", "implementation": "diffusers",
            "title": title, "trigger_phrase": trigger, "resolution": f"{size}x{size}",
            "prediction_type": run.scheduler.config.prediction_type.removesuffix("_prediction")}  # fmt: skip
    metadata = {f"modelspec.{key}": value for key, value in spec.items()}
    for key, value in entries.items():
        metadata[f"ss_{key}"] = str(value)
    return metadata


def folder_name(path) -> str:
    """The last name of a path, or of a repository, also for `.`, and in letters that every file may hold."""
    return printable(Path(path).resolve().name)


def base_version(run) -> tuple[str, str]:
    """How sd-scripts and ModelSpec name the base."""
    return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"


STABILITY_BLOCK = r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)"
STABILITY_SLOTS = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}
STABILITY_NAMES = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv1": "in_layers.2", "linear_1": "0",
                   "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
                   "time_embedding": "time_embed", "add_embedding": "label_emb.0", "linear_2": "2"}  # fmt: skip


def stability_name(module, depth) -> str:
    """The name of a module of SDXL's UNet, of `depth` layers a block, in Stability's code (and sd-scripts'), which
    counts layers through all blocks."""

    def block(found) -> str:
        side, index, kind, layer = found.groups()
        slot = STABILITY_SLOTS[kind]
        if side == "mid":
            return f"middle_block.{slot or 2 * int(layer)}"
        position = depth if kind.endswith("samplers") else int(layer)
        row = int(index) * (depth + 1) + position
        if side == "down":
            return f"input_blocks.{row + 1}.{slot}"
        return f"output_blocks.{row}.{slot}"

    module = re.sub(STABILITY_BLOCK, block, module.replace("downsamplers.0.conv", "downsamplers.0.op"))
    return ".".join(STABILITY_NAMES.get(name, name) for name in module.split("."))


def write_loras(run, folder):
    """Write the LoRA in each form that is wanted; DoRA in kohya's is read rightly by OneTrainer alone."""
    write_lora(run, folder)
    if run.args.output_kohya_format or not (run.args.use_dora or run.args.no_kohya_file):
        write_kohya_lora(run, folder)


def write_results(run, step):
    """Write what the run is for, and a record of it, in place of what it wrote when it ended at an earlier step."""
    folder = Path(run.args.output_dir)
    for name in read_record(folder / FINISHED_FILE).get("files", ()):
        if name != LORA_FILE:
            (folder / name).unlink(missing_ok=True)
    write_loras(run, folder)
    write_state(folder / FINISHED_FILE, run, step, found(folder, RESULTS))


RESULTS = (LORA_FILE, KOHYA_FILE, "image_[0-9]*.png", "README.md")
LOGS = (METRICS_FILE, "validation/*-[0-9]*.png", f"logs/{TRACKER}")


def found(folder, names) -> list[Path]:
    """What is in a folder under some names, or patterns of names."""
    return list(itertools.chain.from_iterable(sorted(folder.glob(name)) for name in names))


def written(folder) -> str:
    """What there is of a run's results, for a message."""
    return ", ".join(map(str, found(folder, RESULTS))) or "nothing yet"


def set_aside(output_dir, checkpoint, step):
    """Move what is not this run's, and has a name that it writes, into `earlier-N`; call it before trackers start.

    If it goes on from the checkpoint of a step in this folder, its own are the checkpoints up to there, the logs, and
    the results that it recorded.
    """
    own = set()
    if checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve():
        recorded = read_state(output_dir / FINISHED_FILE).get("files", ())
        own.update(list_checkpoints(output_dir, step + 1), found(output_dir, (*LOGS, FINISHED_FILE, *recorded)))
    numbered = (output_dir / f"earlier-{number}" for number in itertools.count(1))
    place = next(path for path in numbered if not os.path.lexists(path))
    for path in [*list_checkpoints(output_dir), *found(output_dir, (*RESULTS, *LOGS, FINISHED_FILE))]:
        if path not in own:
            with tidying():
                place.mkdir(exist_ok=True)
                os.replace(path, place / path.name)
                logger.warning(f"{path} is not of this run: it was moved into {place}")


def cut_metrics(output_dir, step):
    """Keep of `metrics.jsonl` the lines up to the step that a run goes on from."""
    path = output_dir / METRICS_FILE
    if not path.is_file():
        return
    kept = ""
    with tidying(), replacing(path) as partial:  # no link is followed
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, LookupError):  # a line that was cut short
                if json.loads(line)["step"] <= step:
                    kept += line
        partial.write_text(kept, encoding="utf-8")


def save_checkpoint(run, training):
    """Write a checkpoint, all of it or nothing, and only then remove those over the limit."""
    output_dir = Path(run.args.output_dir)
    final = output_dir / f"checkpoint-{training.step}"
    if run.accelerator.is_main_process:
        parts = {name: part.state_dict() for name, part in training.parts.items()}
        content = io.BytesIO()  # torch's writer of files hides why a disk refuses
        torch.save({"step": training.step, "parts": parts}, content)
        with replacing(final) as partial:
            partial.mkdir()
            write_loras(run, partial)
            (partial / TRAINING_FILE).write_bytes(content.getbuffer())
            write_state(partial / STATE_FILE, run, training.step, sorted(partial.iterdir()))
        logger.info(f"Checkpoint: {final}")
        limit = run.args.checkpoints_total_limit
        if limit is not None:
            for path in list_checkpoints(output_dir, training.step + 1)[:-limit]:
                remove_checkpoint(path, run.record)
    training.saved = training.step
    run.accelerator.wait_for_everyone()


def remove_checkpoint(path, record):
    """Remove the files that a checkpoint of this run names, and its folder if nothing else is in it."""
    state = read_record(path / STATE_FILE)
    if state.get("run") == record:
        with tidying():
            for name in (*state["files"], STATE_FILE):
                (path / name).unlink(missing_ok=True)
            path.rmdir()


def load_checkpoint(run, training, checkpoint):
    """Put the run where `save_checkpoint` found it; raises `UsageError` if it does not fit, or holds Python code."""
    damage = (RuntimeError, EOFError, TypeError, AttributeError, pickle.UnpicklingError)
    with explained(f"--resume_from_checkpoint {checkpoint}: {TRAINING_FILE} is refused", *damage):
        state = torch.load(checkpoint / TRAINING_FILE, map_location="cpu", weights_only=True)
        if state["step"] != training.step:
            raise ValueError(f"it is of step {state['step']}, {STATE_FILE} of step {training.step}")
        for name, part in training.parts.items():
            part.load_state_dict(state["parts"][name])


def write_state(path, run, step, files):
    """Write what a folder holds of a run: the step, the seed, a hash of each file, and the record of the run."""
    state = {"format": STATE_FORMAT, "global_step": step, "seed": run.args.seed, "run": run.record}
    state["files"] = {file.name: fingerprint(file) for file in files}
    with replacing(path) as partial:
        partial.write_text(json.dumps(state, indent=1), encoding="utf-8")


def read_record(path) -> dict:
    """What `write_state` wrote; empty if it is not there, or has been changed into what no run writes."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        state = json.loads(path.read_text(encoding="utf-8") if path.is_file() else "")
        counts = (state["global_step"] - 1, state["seed"])
        whole = all(type(count) is int and 0 <= count < 2**63 for count in counts)
        plain = all(Path(name).name == name for name in state["files"])
        kinds = (type(state["run"]), type(state["files"]))
        if whole and plain and kinds == (dict, dict):
            return state
    return {}


def read_state(path) -> dict:
    """What `read_record` reads; empty if the files beside it are not those that it is of."""
    state = read_record(path)
    if state.get("format") == STATE_FORMAT:
        for name, digest in state["files"].items():
            file = path.with_name(name)
            if not file.is_file() or fingerprint(file) != digest:
                return {}
    return state


def list_checkpoints(output_dir, before=math.inf) -> list[Path]:
    """What is named as a checkpoint in an output folder, in the order of steps."""
    steps = {}
    for path in output_dir.glob("checkpoint-*"):
        if re.fullmatch("checkpoint-[1-9][0-9]*", path.name):
            steps[path] = int(path.name.removeprefix("checkpoint-"))
    return sorted((path for path in steps if steps[path] < before), key=steps.get)


def find_checkpoint(args) -> tuple[Path | None, dict]:
    """The checkpoint that `--resume_from_checkpoint` means ("latest", a name or a path), and its state."""
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None, {}
    flag = f"--resume_from_checkpoint {wanted}"
    output_dir = Path(args.output_dir)
    places = [output_dir / wanted, Path(wanted)]
    if wanted == "latest":
        places = list_checkpoints(output_dir)[::-1]
    for path in places:
        state = read_state(path / STATE_FILE)
        if state and state.get("format") != STATE_FORMAT:
            formats = f"format {state.get('format', 1)}, and this script reads {STATE_FORMAT}"
            advice = "go on with the version that wrote it, or start a new run in another --output_dir"
            raise UsageError(f"{flag}: {path} has {formats}: {advice}")
        if state:
            return path, state
        if wanted == "latest":
            logger.warning(f"{path} is not complete, or damaged: it is skipped (those of diffusers' scripts are, too)")
    if wanted != "latest":
        raise UsageError(f"{flag}: no complete checkpoint of this script there or in {output_dir}")
    return None, {}


def fingerprint(source) -> str:
    """A short hash of a file, or of the pixels of a picture that comes from a dataset."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, Path):
        with source.open("rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
    else:
        digest.update(repr((source.mode, source.size)).encode())
        digest.update(source.tobytes())
    return digest.hexdigest()


def describe_run(args, accelerator, images) -> dict:
    """What the result of a run depends on, as JSON has it: flags, models (local ones by their files), pictures."""
    free = {"steps_per_epoch", "validation_prompts", "class_prompt_lacks"}
    free |= {flag.name[2:] for flag in KNOWN_FLAGS if isinstance(flag, Free)}
    record = {f"--{name}": found for name, found in vars(args).items() if name not in free}
    record["--mixed_precision"] = accelerator.mixed_precision
    record["--num_processes"] = accelerator.num_processes
    if args.lr_scheduler.startswith("constant"):
        del record["--max_train_steps"]
    for flag in ("--pretrained_model_name_or_path", "--tokenizer_name", "--pretrained_vae_model_name_or_path"):
        folder = Path(record.get(flag) or "")
        if record.get(flag) and folder.is_dir():
            record[flag] = f"a folder with the content {folder_fingerprint(folder, args.variant)}"
    names = images.names[: images.count]
    record["the pictures"] = names
    for i, name in enumerate(names):
        record[f"the content of {name}"] = fingerprint(images.images[i])
        record[f"the captions of {name}"] = [images.captions[i], images.anchor_captions[i]]
    for name, mask in zip(names, images.masks, strict=False):
        record[f"the mask of {name}"] = fingerprint(mask)
    return json.loads(json.dumps(record))


def folder_fingerprint(folder, variant) -> str:
    """A short hash of the settings and weights that are loaded from a pipeline's folder, or from one part's.

    System files, other formats and weights of another variant do not count.
    """
    parts = [folder / part for part in BASE_PARTS if (folder / part).is_dir()]
    content = hashlib.blake2b(digest_size=16)
    for part in parts or [folder]:
        for path in sorted(part.glob("[!.]*")):
            weights = path.stem.partition(".")[2].partition("-")[0] in ("", variant)
            if path.suffix in (".safetensors", ".json", ".txt", ".model") and weights:
                content.update(f"{path.relative_to(folder)} {fingerprint(path)}".encode())
    return content.hexdigest()


def differences(was, now) -> str:
    """How the records of two runs differ, in a few words. Entries that one does not know are left out."""
    names = [name for name in now if name in was and was[name] != now[name]]
    return "; ".join(f"{name} was {was[name]}, is {now[name]}" for name in names[:3])


# ---- Pictures made, card, upload ----


@torch.no_grad()
def sample_images(run, prompt, **sampling) -> list[Image.Image]:
    """Pictures of the model as it is, from `--seed`: denoised in the run's precision, decoded in float32."""
    args = run.args
    student = run.student
    inputs = run.sampling_inputs[prompt]
    parts = dict.fromkeys(inspect.signature(PIPELINE_CLASS).parameters)
    parts |= {DENOISER: student.denoiser, "scheduler": sampling_scheduler(run)}
    pipeline = PIPELINE_CLASS(**parts)
    pipeline.vae_scale_factor = 2 ** (len(run.vae.config.block_out_channels) - 1)  # the VAE comes later
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(args.seed)
    options = {"height": args.resolution, "width": args.resolution, "output_type": "latent", **sampling}
    if args.validation_inference_steps is not None:
        options["num_inference_steps"] = args.validation_inference_steps
    if args.validation_guidance_scale is not None:
        options["guidance_scale"] = args.validation_guidance_scale
    latents = []
    with evaluating(student):
        if student.text_pipeline is not None:
            inputs = encode_for_sampling(student.text_pipeline, prompt)
        inputs = {name: tensor.to(run.device) for name, tensor in inputs.items()}
        for _ in tqdm(range(args.num_validation_images), desc="Pictures", leave=False):
            if not run.signals.received:  # who asked to stop may not wait for all of them
                latents.append(pipeline(**inputs, **options, generator=generator).images)
    with vae_at_work(run) as vae:
        decoded = [vae.decode(scale_latents(one.float(), vae, inverse=True)).sample for one in latents]
    return [VaeImageProcessor().postprocess(pixels, output_type="pil")[0] for pixels in decoded]


def sampling_scheduler(run) -> diffusers.SchedulerMixin:
    """The sampler of upstream's validation, or the base's own where it is EDM."""
    kind = type(run.scheduler) if is_edm(run.scheduler) else diffusers.DPMSolverMultistepScheduler
    return fitting_sampler(kind, run.scheduler.config)


def fitting_sampler(kind, config) -> diffusers.SchedulerMixin:
    """A sampler with the base's configuration, which may be of another one: what it cannot take is left out, and the
    noise and what is predicted stay."""
    try:
        sampler = kind.from_config(config)
        sampler.set_timesteps(10)
    except (ValueError, TypeError, LookupError, RuntimeError, ImportError):
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
        sampler = kind(**{name: config[name] for name in names})
    return sampler


def validate(run, prompts, tag, step, **sampling) -> list[Image.Image]:
    """Make pictures on the main process, until a request to stop; show them to the trackers under `tag`, and whoever
    looks into the folder as one grid, a row a prompt. Returns those of the first prompt."""
    rows = {}
    if run.accelerator.is_main_process and run.args.num_validation_images > 0:
        for prompt in prompts:
            with giving_up(run, "pictures"):
                rows[prompt] = sample_images(run, prompt, **sampling)
    rows = {prompt: pictures for prompt, pictures in rows.items() if pictures}
    if rows:
        with giving_up(run, "pictures in trackers"):
            show_to_trackers(run, rows, tag, step)
        with giving_up(run, "the grid of pictures"):
            write_grid(run, rows, f"{tag}-{step:06}.png", f"Step {step}, w = {run.args.anchor_weight:g}", **sampling)
    free_memory()
    run.accelerator.wait_for_everyone()
    return next(iter(rows.values()), [])


def show_to_trackers(run, rows, tag, step):
    """Log pictures to the trackers that take any."""
    layouts = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
    for tracker in run.accelerator.trackers:
        for number, pictures in enumerate(rows.values()):
            name = f"{tag}/{number}" if number else tag
            if tracker.name in layouts:
                pixels = np.stack([np.asarray(picture) for picture in pictures])
                tracker.log_images({name: pixels}, step=step, **layouts[tracker.name])


def write_grid(run, rows, name, title, **sampling):
    """One picture to look at: photos, what the base makes of the first prompt (made once), a row a prompt."""
    prompt, pictures = next(iter(rows.items()))
    if prompt not in run.base_pictures:
        with adapters_disabled(run.student):
            run.base_pictures[prompt] = sample_images(run, prompt, **sampling)
    photos = []
    for index in range(min(run.images.count, len(pictures))):
        photos.append(ImageOps.fit(read_image(run.images.images[index]), pictures[0].size))
    path = Path(run.args.output_dir) / "validation" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid({f"{title}. Photos:": photos, f"Base model: {prompt}": run.base_pictures[prompt], **rows}).save(path)


def labelled_grid(rows) -> Image.Image:
    """Pictures of one size in rows, each row behind a cell with its label."""
    columns = max(map(len, rows.values()))
    size = next(iter(rows.values()))[0].size
    font = ImageFont.load_default(max(10, size[0] // 16))
    cells = []
    for label, pictures in rows.items():
        cell = Image.new("RGB", size, "white")
        ImageDraw.Draw(cell).text((4, 4), textwrap.fill(printable(label), 26), "black", font)
        blank = [Image.new("RGB", size, "white")] * (columns - len(pictures))
        cells += [cell, *pictures, *blank]
    return make_image_grid(cells, len(rows), columns + 1)


def write_model_card(args, pictures, prompt, repo_id=None):
    """Write README.md, which the hub shows as the model's page, and the pictures it shows."""
    folder = Path(args.output_dir)
    base = args.pretrained_model_name_or_path
    on_hub = base.count("/") == 1 and not Path(base).exists()
    if not on_hub:
        base = folder_name(base)  # no path of this machine belongs into a card
    shown = " ".join(args.instance_prompt.replace("`", "'").split())
    licence, tags, absent = describe_base(args)
    if args.use_dora:
        tags = [*tags, "dora"]
    widget = []
    for i, picture in enumerate(pictures):
        name = f"image_{i}.png"
        widget.append({"text": prompt, "output": {"url": name}})
        with replacing(folder / name) as partial:
            picture.save(partial, format="PNG")
    data = ModelCardData(
        base_model=base if on_hub else None,
        instance_prompt=args.instance_prompt,
        library_name="diffusers",
        license=licence,
        tags=["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", *tags],
        widget=widget or None,
    )
    anchor = "w = 0, without anchor"
    if args.anchor_weight > 0:
        anchor = f"w = {args.anchor_weight:g}, class prompt `{args.class_prompt or 'one for each caption'}`"
    encoders = "trained too" if args.train_text_encoder else "not trained"
    pipeline = PIPELINE_CLASS.__name__
    lora = repo_id or args.hub_model_id or folder_name(args.output_dir)
    text = f"""---
{data.to_yaml()}
---

# LoRA for `{shown}`

A LoRA of rank {args.rank} for {base}, trained with [Semantic Anchoring Personalization]({PAPER}):
{anchor}.
Text encoders: {encoders}.

## Use

```python
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained({", ".join([repr(base), *absent])}, dtype=torch.float16)
pipeline.load_lora_weights({lora!r}, weight_name={LORA_FILE!r})
image = pipeline.to("cuda")({(prompt or args.instance_prompt)!r}).images[0]
```
"""
    with replacing(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")


def describe_base(args) -> tuple[str, list[str], list[str]]:
    """The licence of the base, the hub's tags for its kind, and arguments without which it does not load."""
    if "playground" in args.pretrained_model_name_or_path.lower():
        return "playground-v2dot5-community", ["playground", "playground-diffusers"], []
    return "openrail++", ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"], []


def make_repository(args) -> str:
    """Make the repository on the hub, if it is not there, before any work is done; returns its full name."""
    get_session().timeout = HUB_TIMEOUT
    with explained("--push_to_hub"):
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id


def upload(args, repo_id):
    """Upload the files that the finished run recorded; logs, checkpoints and anything else stay here."""
    folder = Path(args.output_dir)
    files = list(read_record(folder / FINISHED_FILE)["files"])
    again = shlex.join(["hf", "upload", repo_id, args.output_dir, ".", "--include", *files])
    try:
        with explained("The upload failed"):
            upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, token=args.hub_token)
    except UsageError as error:
        raise RunError(f"{error}; all is written. To try again: {again}") from error


# ---- Command line ----


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag, with the names of argparse; without a type it is a switch. A run is resumed with the same value."""

    name: str
    help: str
    type: Callable | None = None
    default: object = None
    choices: Sequence[str] | None = None
    nargs: str | None = None
    required: bool = False


class Free(Flag):
    """A flag that may change when a run is resumed: places, speed, output, what pictures and captions say."""


class Unused(Free):
    """A flag of prior preservation, accepted for old command lines."""


def value(kind, words, fits) -> Callable[[str], object]:
    """A type for argparse: values of a kind that fit, which is what `words` describe."""

    def read(text) -> object:
        with contextlib.suppress(ValueError, RuntimeError):
            found = kind(text)
            if fits(found):
                return found
        raise argparse.ArgumentTypeError(f"must be {words}, not {text!r}")

    read.__name__ = kind.__name__  # argparse puts it into its messages
    return read


def between(kind, low, high) -> Callable[[str], object]:
    """A type for argparse: numbers in a range, its ends among them."""
    return value(kind, f"from {low} to {high}", lambda x: low <= x <= high)


def boolean(text) -> bool:
    """Read true or false from a flag's value; `bool("False")` is True, which nobody means."""
    return ["false", "no", "0", "true", "yes", "1"].index(text.lower()) > 2


def home_path(text) -> str:
    """A path whose ~ is the home folder: shells leave it after `--output_dir=`."""
    if text.startswith("~"):
        return str(Path(text).expanduser())
    return text


boolean.__name__ = "bool"
home_path.__name__ = "str"
COUNT = value(int, "at least 1", lambda x: x >= 1)
WHOLE = between(int, 0, 2**63 - 1)  # as torch's generators take seeds
EDGE = value(int, f"a multiple of {LATENT_STRIDE}", lambda x: x >= 1 and x % LATENT_STRIDE == 0)
AMOUNT = between(float, 0, 1e38)  # float32 ends there
POSITIVE = value(float, "above 0 and below 1e38", lambda x: 0 < x < 1e38)
SHARE = value(float, "at least 0 and below 1", lambda x: 0 <= x < 1)
PROMPT = value(str, "text in UTF-8", lambda x: x.encode() is not None)
TEXT = value(str, "text in UTF-8, or left out", lambda x: x.encode() != b"")  # empty where a shell variable is not set
PATH = value(home_path, "a path or a name, or left out", bool)
FOLDER = value(home_path, "a folder that is there", lambda x: x != "" and Path(x).is_dir())
FILE = value(home_path, "a file that is there", lambda x: Path(x).is_file())
SIZES = value(
    str,
    f'"h,w;h,w" in multiples of {LATENT_STRIDE}, such as "512,512;640,384"',
    lambda x: not any(edge % LATENT_STRIDE for edge in sum(parse_buckets_string(x), ())),
)
LAYERS = value(str, 'names with commas between them, "to_k,to_v"', lambda x: all(n.strip() for n in x.split(",")))
SCHEDULE = value(str, f"one of {', '.join(LR_SCHEDULERS)}", LR_SCHEDULERS.__contains__)
OPTIMIZER = value(str, "AdamW or prodigy", lambda x: x.lower() in ("adamw", "prodigy"))

# Every flag of diffusers' example, with its type, default and choices, and ours; those that matter come first.
FLAGS_OF_BASE = [
    Flag("--pretrained_vae_model_name_or_path", "Another VAE than the base's: hub name or local folder.", PATH),
    Flag("--do_edm_style_training", "Train in EDM's parameterisation (arXiv 2206.00364)."),
]
FLAGS = [
    "start here",
    Flag("--pretrained_model_name_or_path", "Base pipeline: hub name or local folder.", PATH, required=True),
    Free("--instance_data_dir", "Folder of pictures, captions in metadata.jsonl or NAME.txt.", FOLDER),
    Flag("--instance_prompt", 'Subject prompt, such as "a photo of sks dog".', TEXT, required=True),
    Flag("--class_prompt", 'Anchor prompt: the same sentence for the class, "a photo of a dog".', TEXT),
    Flag("--anchor_weight", "w of the objective; 0 is plain DreamBooth-LoRA.", AMOUNT, 0.5),
    Flag("--resolution", "Edge in pixels of the square that pictures are cropped to.", EDGE, RESOLUTION),
    Flag("--train_batch_size", "Samples a device in one micro-step.", COUNT, 4),
    Flag("--max_train_steps", "Optimizer steps in all (default: as --num_train_epochs says).", COUNT),
    Flag("--learning_rate", "Learning rate after warm-up.", AMOUNT, LEARNING_RATE),
    Flag("--mixed_precision", "Default: as accelerate is configured.", str, choices=["no", "fp16", "bf16"]),
    Free("--validation_prompt", "Prompt of pictures made during training and at its end.", PROMPT),
    Free("--output_dir", "Folder of the LoRA, the checkpoints and the logs.", PATH, OUTPUT_DIR),
    "model",
    Flag("--revision", "Branch, tag or commit of the base pipeline on the hub.", TEXT),
    Flag("--variant", "File variant of the base weights, such as fp16.", TEXT),
    *FLAGS_OF_BASE,
    "subject: pictures and captions",
    Free("--dataset_name", "A `datasets` dataset of the pictures instead of a folder: hub name or path.", PATH),
    Free("--dataset_config_name", "Configuration of that dataset.", TEXT),
    Free("--image_column", "Column that holds the pictures.", TEXT, "image"),
    Free("--caption_column", "Column, or metadata.jsonl field, that holds a caption for each picture.", TEXT),
    Free("--cache_dir", "Where `datasets` keeps what it downloads.", PATH),
    Flag("--repeats", "How often each picture counts in one epoch.", COUNT, 1),
    Flag("--center_crop", "Crop the middle instead of a random place."),
    Flag("--random_flip", "Mirror each picture with probability 1/2."),
    Flag("--use_aspect_ratio_buckets", "Many shapes of as many pixels instead of a square; the nearest one is taken."),
    Flag("--aspect_ratio_buckets", 'Sizes "h,w;h,w;..." instead of a square; the nearest one is taken.', SIZES),
    Flag("--cache_latents", "Encode each picture once (a random crop then stays the same)."),
    Flag("--mask_dir", "A grey picture NAME.png for each photo NAME.jpg, white on the subject.", FOLDER),
    Flag("--alpha_mask", "The photos' own transparency is the mask."),
    Flag("--unmasked_weight", "What the photo weighs outside.", between(float, 0, 1), 0.1),
    Flag("--caption_dropout", "Share of samples trained with an empty prompt.", SHARE, 0.0),
    Flag(
        "--image_interpolation_mode",
        "How pictures are resized.",
        str,
        "lanczos",
        ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"],
    ),
    "semantic anchor",
    Flag("--subject_token", "Word of the subject: anchor captions are the captions without it.", TEXT),
    Flag("--class_token", "Word that replaces --subject_token in anchor captions (default: nothing).", PROMPT),
    Flag(
        "--anchor_source",
        "Model that gives the anchor; finetuned (the one in training) is the paper's ablation.",
        str,
        "pretrained",
        ["pretrained", "finetuned"],
    ),
    Flag("--class_share", "Share of samples that see the class prompt and learn the anchor alone.", SHARE, 0.0),
    Free("--anchor_batch_size", "Samples of coming micro-steps in one anchor forward.", COUNT, 4),
    "prior preservation: accepted for old command lines, unused",
    Unused("--with_prior_preservation", "Unused."),
    Unused("--class_data_dir", "Unused: no class pictures are read.", str),
    Unused("--num_class_images", "Unused: no class pictures are made.", int, 100),
    Unused("--prior_loss_weight", "Unused: see --anchor_weight.", float, 1.0),
    Unused("--prior_generation_precision", "Unused.", str, choices=["no", "fp32", "fp16", "bf16"]),
    Unused("--sample_batch_size", "Unused.", int, 4),
    "LoRA",
    Flag("--init_lora", "Start from this LoRA, of the same rank and layers: a file, folder or hub name.", PATH),
    Flag("--rank", "Rank of the update matrices.", COUNT, 4),
    Flag("--lora_alpha", "The update is scaled by alpha / rank (default: the rank, a scale of 1).", POSITIVE),
    Flag("--lora_dropout", "Dropout before the update matrices.", SHARE, 0.0),
    Flag("--lora_layers", 'Endings of the layers to adapt, "to_k,to_v" (default: attention).', LAYERS),
    Flag("--use_dora", "Train DoRA: magnitude and direction apart (arXiv 2402.09353)."),
    Flag("--train_text_encoder", "Train a LoRA on the text encoder too."),
    "training",
    Free("--num_train_epochs", "Epochs, where --max_train_steps is not given.", COUNT, 1),
    Flag("--gradient_accumulation_steps", "Micro-steps in one optimizer step.", COUNT, 1),
    Flag("--seed", "Makes the run reproducible (default: drawn and told).", WHOLE),
    Free("--gradient_checkpointing", "Save memory in what trains, for time."),
    Flag("--snr_gamma", "Min-SNR weighting of both loss terms, 5.0 in arXiv 2303.09556.", POSITIVE),
    Free("--allow_tf32", "Let Ampere and newer GPUs multiply in TF32."),
    Free("--enable_xformers_memory_efficient_attention", "Use xformers' attention."),
    Free("--offload", "Text encoders that do not train read prompts on the CPU; the VAE rests there."),
    Flag(
        "--bnb_quantization_config_path",
        "JSON file of diffusers' BitsAndBytesConfig: the frozen denoiser in 4 or 8 bits, on a GPU.",
        PATH,
    ),
    Free("--compile", "Compile the denoiser's blocks: minutes at first, then faster steps."),
    Free("--dataloader_num_workers", "Threads that prepare random crops beforehand.", WHOLE, 0),
    Free("--local_rank", "Set by launchers.", int, -1),
    "optimizer",
    Flag("--text_encoder_lr", "Learning rate of the text encoder's LoRA.", AMOUNT, 5e-6),
    Flag("--scale_lr", "Multiply the rate by accumulation, batch size and processes."),
    Flag("--lr_scheduler", f"One of {', '.join(LR_SCHEDULERS)}.", SCHEDULE, "constant"),
    Flag("--lr_warmup_steps", "Optimizer steps of warm-up, for schedules that have one.", WHOLE, 500),
    Flag("--lr_num_cycles", "Restarts of cosine_with_restarts.", COUNT, 1),
    Flag("--lr_power", "Power of the polynomial schedule.", AMOUNT, 1.0),
    Flag("--optimizer", "AdamW or prodigy.", OPTIMIZER, "AdamW"),
    Flag("--use_8bit_adam", "AdamW with 8-bit state, from bitsandbytes."),
    Flag("--adam_beta1", "First beta, of AdamW and Prodigy.", SHARE, 0.9),
    Flag("--adam_beta2", "Second beta, of AdamW and Prodigy.", SHARE, 0.999),
    Flag("--adam_weight_decay", "Weight decay of the denoiser's LoRA.", AMOUNT, WEIGHT_DECAY),
    Flag("--adam_weight_decay_text_encoder", "And of the text encoder's.", AMOUNT, 1e-3),
    Flag("--adam_epsilon", "Epsilon, of AdamW and Prodigy.", POSITIVE, 1e-8),
    Flag("--prodigy_beta3", "Prodigy's third beta (default: the root of the second).", SHARE),
    Flag("--prodigy_decouple", "Decoupled weight decay in Prodigy.", boolean, True),
    Flag("--prodigy_use_bias_correction", "Bias correction in Prodigy.", boolean, True),
    Flag("--prodigy_safeguard_warmup", "Keep Prodigy's estimate small in warm-up.", boolean, True),
    Flag("--max_grad_norm", "Gradients are clipped to this norm.", POSITIVE, 1.0),
    "output: validation, checkpoints, logs, hub",
    Free("--output_kohya_format", "Accepted: the LoRA with the keys of kohya's tools is written without it."),
    Free("--no_kohya_file", "Do not write that file, which ComfyUI, A1111 and Forge read (SD1.5, SDXL)."),
    Free("--num_validation_images", "How many of them.", WHOLE, 4),
    Free("--validation_epochs", "Every how many epochs.", COUNT, 50),
    Free("--validation_steps", "Every how many optimizer steps, instead of epochs.", COUNT),
    Free("--validation_prompts_file", "More prompts, one a line.", FILE),
    Free("--validation_guidance_scale", "Guidance of these pictures (default: the pipeline's).", AMOUNT),
    Free("--validation_inference_steps", "Denoising steps of these pictures.", COUNT),
    Free("--validation_data_dir", "Photos held out: both loss terms on them, logged as val/.", FOLDER),
    Free("--final_validation_prompt", "Another prompt for the pictures at the end.", PROMPT),
    Free("--skip_final_inference", "Make no pictures at the end."),
    Free("--checkpointing_steps", "Steps between checkpoints (default: 100, and the last 5 of them stay).", COUNT),
    Free("--checkpoints_total_limit", "How many checkpoints stay on disk.", COUNT),
    Free("--resume_from_checkpoint", 'A checkpoint\'s folder or name, or "latest".', PATH),
    Free("--report_to", "tensorboard, wandb, comet_ml, all or none.", TEXT, "tensorboard"),
    Free("--logging_steps", "Fetch the losses from the device every so many steps.", COUNT, 1),
    Free("--logging_dir", "Folder of the logs, inside the output folder.", PATH, "logs"),
    Free("--push_to_hub", "Upload the LoRA, its card and its pictures; nothing else."),
    Free("--hub_token", "Token for that. accelerate launch prints it if the run fails: prefer hf auth login.", TEXT),
    Free("--hub_model_id", "Repository (default: the output folder's name).", TEXT),
]
KNOWN_FLAGS = [flag for flag in FLAGS if isinstance(flag, Flag)]
ADVANCED_FLAGS = {  # of diffusers' advanced scripts, with what comes nearest here
    "--train_text_encoder_ti": "--train_text_encoder trains the encoder's layers, no new token",
    "--train_text_encoder_ti_frac": "--train_text_encoder trains to the end",
    "--train_text_encoder_frac": "--train_text_encoder trains to the end",
    "--token_abstraction": "--subject_token names the word of the subject",
    "--num_new_tokens_per_abstraction": "--subject_token names the word of the subject",
    "--use_blora": "--lora_layers names the layers to adapt",
    "--lora_unet_blocks": "--lora_layers names the layers to adapt",
}
IDENTIFIER = re.compile(r"(?<!\S)(?:sks|zwx|ohwx|xjy|TOK|[VS]\*|\[V\*?\]|<[^<>\s]+>)(?![^\s.,;:!?])")
CLASS_PROMPT_NEEDED = (
    'the anchor needs a prompt for the class: --class_prompt, "a photo of a dog" for "a photo of sks dog", '
    "or --subject_token to derive it, or --anchor_weight 0 to train without it"
)
SMALL_WORDS = "a|an|the|my|of|in|on|at|by|with|from|for|to|and|near|under|like|as|called|named"


def make_parser() -> argparse.ArgumentParser:
    """The parser of `FLAGS`."""
    usage = "accelerate launch %(prog)s --pretrained_model_name_or_path BASE --instance_data_dir FOLDER "
    usage += '--instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog" [more flags]'
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0])
    for flag in FLAGS:
        if isinstance(flag, str):
            group = parser.add_argument_group(flag)
        elif flag.type is None:
            group.add_argument(flag.name, action="store_true", help=flag.help)
        else:
            options = vars(flag).copy()
            if flag.default is not None:
                options["help"] += f" (default: {flag.default})"
            group.add_argument(options.pop("name"), **options)
    return parser


def parse_args(input_args=None) -> Namespace:
    """Read and check the command line (`sys.argv` without `input_args`); a mistake ends in one sentence, status 2."""
    parser = make_parser()
    try:
        args, unknown = parser.parse_known_args(input_args)
        if unknown:
            refuse_unknown(unknown[0])
        settle_arguments(args)
        check_places(args)
        check_anchor(args)
        check_packages(args)
        check_base_flags(args)
        quantization_config(args)
    except UsageError as error:
        parser.error(printable(str(error)))
    return args


def refuse_unknown(word):
    """Raise `UsageError` for a flag that is not there, with the one that may be meant."""
    name = word.split("=")[0]
    if name in ADVANCED_FLAGS:
        raise UsageError(f"{name} of diffusers' advanced scripts is not supported; {ADVANCED_FLAGS[name]}")
    like = difflib.get_close_matches(name, [flag.name for flag in KNOWN_FLAGS], 1)
    meant = "".join(f"; did you mean {one}?" for one in like)
    raise UsageError(f"unrecognized arguments: {word}{meant}")


def settle_arguments(args):
    """Fill in what follows from other flags."""
    args.lora_alpha = args.lora_alpha or args.rank
    args.optimizer = args.optimizer.lower()
    if args.checkpointing_steps is None:
        args.checkpointing_steps = 100
        args.checkpoints_total_limit = args.checkpoints_total_limit or 5
    if args.hub_token:  # wandb copies sys.argv into its files
        sys.argv[1:] = [word.replace(args.hub_token, "***") for word in sys.argv[1:]]
    args.validation_prompts = []
    if args.validation_prompt:
        args.validation_prompts.append(args.validation_prompt)
    if args.validation_prompts_file is not None:
        lines = read_text(Path(args.validation_prompts_file)).splitlines()
        args.validation_prompts += [line.strip() for line in lines if line.strip()]
    derive_class_prompt(args)


def derive_class_prompt(args):
    """Where `--class_prompt` is not given: `--instance_prompt` without the word for the subject."""
    prompt = args.instance_prompt
    args.class_prompt_lacks = None
    if args.anchor_weight == 0 or args.class_prompt is not None:
        return
    token = args.subject_token
    if token is None:
        token = args.class_prompt_lacks = customary_identifier([prompt])
    if token is None:
        return
    # Where every picture has a caption the instance prompt is not used, and may lack the word.
    if token in prompt or args.caption_column is None:
        with explained("--instance_prompt"):
            args.class_prompt = class_caption(prompt, token, args.class_token or "")


def customary_identifier(texts) -> str | None:
    """The word customary for subjects, such as sks, that the texts hold, if it is one word in all of them."""
    found = set(IDENTIFIER.findall(" ".join(texts)))
    if len(found) == 1:
        return found.pop()
    return None


def class_caption(caption, subject_token, class_token) -> str:
    """`anchor_caption`; raises `ValueError` also where nothing is left in the subject's place: "a photo of"."""
    before = rf"(?:^|\b(?:{SMALL_WORDS})\s+)"
    after = rf"(?!\w)(?:\s*(?:$|[.!?])|\s+(?:{SMALL_WORDS})\b)"
    bare = re.search(before + re.escape(subject_token) + after, caption.strip(), re.IGNORECASE)
    if bare and not class_token:
        advice = 'say what it is one of: --class_prompt "a photo of a dog", or --subject_token with --class_token dog'
        raise ValueError(f'"{caption}" without "{subject_token}" names nothing that the anchor could hold; {advice}')
    return anchor_caption(caption, subject_token, class_token)


def check_places(args):
    """Raise `UsageError` for pictures, a base or an output folder that cannot be meant."""
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        raise UsageError("pass the subject's pictures once: either --instance_data_dir or --dataset_name")
    with explained(f"--output_dir {args.output_dir}", RuntimeError):
        output_dir = Path(args.output_dir).resolve()
        if output_dir.is_file():
            raise ValueError("this is a file; name a folder")
        if args.instance_data_dir and output_dir.is_relative_to(Path(args.instance_data_dir).resolve()):
            raise ValueError("this is in the folder of the photos, and its pictures would be trained on")
        if (output_dir / "model_index.json").exists():
            raise ValueError("this is the folder of a pipeline; take another one")
    base = args.pretrained_model_name_or_path
    with explained(f"--pretrained_model_name_or_path {base} is no folder here, and no name on the hub"):
        if not Path(base).exists():
            validate_repo_id(base)
    if args.push_to_hub:
        with explained("--hub_model_id"):
            validate_repo_id(args.hub_model_id or output_dir.name)


def may_hold_captions(args) -> bool:
    """Whether the pictures may have captions, from which the prompt for the class can be derived."""
    if args.instance_data_dir is None:
        return args.caption_column is not None
    folder = Path(args.instance_data_dir)
    return (folder / "metadata.jsonl").is_file() or any(folder.glob("*.txt"))


def check_anchor(args):
    """Raise `UsageError` where flags of the anchor and of masks contradict one another."""
    if args.class_token is not None and args.subject_token is None:
        raise UsageError("--class_token replaces --subject_token, which is not given: pass both")
    unnamed = args.class_prompt is None and args.subject_token is None
    if args.anchor_weight > 0 and unnamed and not may_hold_captions(args):
        raise UsageError(CLASS_PROMPT_NEEDED)
    if args.class_share > 0 and args.anchor_weight == 0:
        raise UsageError("--class_share trains on the anchor: drop it, or --anchor_weight 0")
    if args.class_share > 0 and args.anchor_source == "finetuned":
        raise UsageError("--class_share needs --anchor_source pretrained: the other one is the student's own answer")
    if args.mask_dir and args.alpha_mask:
        raise UsageError("--mask_dir and --alpha_mask are two sources of masks: pass one")
    masked = args.mask_dir or args.alpha_mask
    if masked and args.anchor_weight == 0:
        raise UsageError("masks need the anchor, which holds what is outside of them: drop --anchor_weight 0")


def check_packages(args):
    """Raise `UsageError` for what this environment cannot do."""
    accumulation = str(args.gradient_accumulation_steps)
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", accumulation) != accumulation:
        raise UsageError("ACCELERATE_GRADIENT_ACCUMULATION_STEPS differs from --gradient_accumulation_steps: unset it")
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if args.compile and not any(shutil.which(name) for name in compilers):
        raise UsageError("--compile needs a C++ compiler, and there is none: install g++, or leave it out")
    trackers = [*LoggerType.list(), "none"]
    if args.report_to not in trackers:
        raise UsageError(f"--report_to must be one of {', '.join(trackers)}, not {args.report_to}")
    if args.report_to == "wandb" and args.hub_token is not None:
        raise UsageError("--report_to wandb together with --hub_token would show the token: use `hf auth login`")
    for flag, package, wanted in (
        ("--optimizer prodigy", "prodigyopt", args.optimizer == "prodigy"),
        ("--use_8bit_adam", "bitsandbytes", args.use_8bit_adam),
        ("--bnb_quantization_config_path", "bitsandbytes", args.bnb_quantization_config_path),
        ("--enable_xformers_memory_efficient_attention", "xformers", args.enable_xformers_memory_efficient_attention),
        (f"--report_to {args.report_to}", args.report_to, args.report_to not in ("all", "none")),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(f"{flag} needs the package {package}, which is not installed: pip install {package}")


def check_base_flags(args):
    """Raise `UsageError` for what Stable Diffusion XL cannot do."""
    if args.do_edm_style_training and args.snr_gamma is not None:
        raise UsageError("--snr_gamma cannot go with --do_edm_style_training, which has weights of its own: drop one")


def quantization_config(args, dtype=torch.float32) -> BitsAndBytesConfig | None:
    """What `--bnb_quantization_config_path` says; 4-bit weights compute in `dtype` unless the file says otherwise."""
    file = args.bnb_quantization_config_path
    if file is None:
        return None
    wanted = 'a JSON object such as {"load_in_4bit": true}'
    with explained(f"--bnb_quantization_config_path {file} must be {wanted}", AttributeError, TypeError):
        options = json.loads(Path(file).read_text(encoding="utf-8"))
        config = BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": dtype} | options)
        if not config.is_quantizable():
            raise ValueError("it must ask for load_in_4bit or load_in_8bit")
        if not torch.accelerator.is_available():
            raise ValueError("diffusers quantises on a GPU only, and there is none")
    return config


def warn_about_arguments(args):
    """Say once what was accepted and is not used, and what is hardly meant."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")  # `accelerate launch` always names one
    if backend.lower() != "no":
        logger.warning(f"the launcher's dynamo backend {backend}: unused, --compile compiles")
    unused = [flag for flag in KNOWN_FLAGS if isinstance(flag, Unused)]
    given = [flag.name for flag in unused if getattr(args, flag.name[2:]) not in (None, False, flag.default)]
    if given:
        logger.warning(f"{', '.join(given)}: unused, the anchor of --class_prompt replaces class images")
    if args.optimizer == "prodigy":
        logger.warning("Prodigy has one rate for all, --learning_rate, of about 1; --use_8bit_adam is unused")
    elif 0 < args.learning_rate <= 1e-5:
        logger.warning(f"--learning_rate {args.learning_rate} is a rate for whole models; a LoRA's is about 1e-4")
    if args.class_prompt is not None and args.anchor_weight > 0:
        names_subject = (args.subject_token or "sks") in args.class_prompt.split()
        if names_subject or args.class_prompt == args.instance_prompt:
            said = f'--class_prompt "{args.class_prompt}"'
            logger.warning(f"{said} should be --instance_prompt without the word for the subject")


# ---- The run ----


def start_accelerator(args) -> Accelerator:
    """Set up logging, precision, processes and the output folder; raises `UsageError` for what cannot work."""
    output_dir = Path(args.output_dir)
    # What accelerate reads from its configuration file and from the environment may be anything.
    with explained("The environment or accelerate's configuration cannot be used", ImportError, AssertionError):
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / args.logging_dir)),
            dynamo_backend="no",  # only --compile compiles: `accelerate launch` always names a backend
            # SDXL reads its text encoders' last layer but one: the LoRA of the first one's last gets no gradient.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=args.train_text_encoder),
                # The base is loaded in the run's precision: autocast would only cast its norms' weights at every call.
                AutocastKwargs(enabled=False),
            ],
        )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):  # half-precision LoRA; anchors past the wrapper that gathers
        raise UsageError(
            f"accelerate is configured for {kind}, by which this script cannot train: choose distributed_type "
            "MULTI_GPU; a LoRA's gradients and optimizer state are small, so DDP serves as well"
        )
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise UsageError(f"--mixed_precision no, fp16 or bf16, not {accelerator.mixed_precision} of accelerate's")
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    logger.filters = [make_printable]
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    with explained(f"--output_dir {output_dir} cannot be written, take another one"):
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / ".lock").touch()
    return accelerator


def make_printable(record) -> bool:
    """A filter for logging that lets everything through, without control characters."""
    record.msg = printable(record.msg)
    return True


@contextlib.contextmanager
def locked(folder):
    """Inside, no other run writes into the folder, if its file system has locks; raises `UsageError` if one does."""
    lock = FileLock(folder / ".lock", fallback_to_soft=False)  # a soft lock outlives a run that was killed
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UsageError(f"--output_dir {folder}: another run writes into it; wait, or take another one") from error
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{folder} cannot be locked ({error}): start no other run there")
    try:
        for path in folder.glob(".checkpoint-*.*"):  # of a run that was killed while it wrote
            tidy(path.with_name(path.stem[1:]))
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def start_trackers(args, accelerator):
    """Start what `--report_to` names, before models are loaded, and tell it the command line, without secrets."""
    errors = [ImportError, AttributeError, TypeError, RuntimeError]
    if args.report_to in ("wandb", "all") and importlib.util.find_spec("wandb"):
        errors.append(importlib.import_module("wandb.errors").Error)
    settings = {k: v for k, v in vars(args).items() if k != "hub_token" and isinstance(v, int | float | str)}
    with explained(f"--report_to {args.report_to} cannot start, mend it or pass --report_to none", *errors):
        accelerator.init_trackers(TRACKER, settings)


def announce(run):
    """Say in plain words what the run will do, and what is hardly meant."""
    args = run.args
    images = run.images
    anchor = "none (w = 0)"
    if args.anchor_weight > 0:
        anchor = f'"{images.anchor_captions[0]}", w = {args.anchor_weight:g}'
    if args.class_prompt_lacks is not None:
        anchor += f' (without "{args.class_prompt_lacks}"; --class_prompt to say it better)'
    trained = sum(parameter.numel() for parameter in run.student.trained().values())
    batch = args.train_batch_size * args.gradient_accumulation_steps * run.accelerator.num_processes
    logger.info(f"Device:   {describe_device(run.device)}")
    logger.info(f"Pictures: {images.count}, captions: {len(set(images.captions))}")
    logger.info(f'Subject:  "{images.captions[0]}"')
    logger.info(f"Anchor:   {anchor}")
    logger.info(f"Training: {args.max_train_steps} steps of {batch} samples, {trained:,} parameters, seed {args.seed}")
    logger.info(f"Output:   {Path(args.output_dir) / LORA_FILE}")
    usual = math.ceil(100 * images.count / batch)  # the readme's 500 steps for five pictures
    if args.max_train_steps < usual:
        each = args.max_train_steps * batch / images.count
        logger.warning(f"Each picture is seen {each:.3g} times; for 100, which is usual: --max_train_steps {usual}")
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= args.max_train_steps:
        logger.warning(f"--lr_warmup_steps {args.lr_warmup_steps}: the learning rate does not reach its height")
    small = sum(min(size) < args.resolution for size in images.sizes)
    if small:
        logger.warning(f"{small} of {len(images)} pictures are smaller than --resolution {args.resolution}")


def describe_device(device) -> str:
    """What the run computes on; on a CPU, where it takes hours, also why."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    if device.type == "cpu":
        return f"CPU, WHICH IS SLOW: torch {torch.__version__} sees no GPU; https://pytorch.org has one with CUDA"
    return device.type


def finish(run, training, repo_id):
    """The last pictures, the card and the upload: what can fail comes after the LoRA is written."""
    args = run.args
    images = training.images
    folder = Path(args.output_dir)
    prompts = args.validation_prompts
    if not args.skip_final_inference and args.num_validation_images > 0:
        if args.final_validation_prompt:
            prompts = [args.final_validation_prompt]
        if prompts:
            images = validate(run, prompts, "test", args.max_train_steps, **FINAL_SAMPLING)
    if run.accelerator.is_main_process:
        write_model_card(args, images, (prompts or [None])[0], repo_id)
        write_state(folder / FINISHED_FILE, run, args.max_train_steps, found(folder, RESULTS))
        if repo_id is not None:
            upload(args, repo_id)
        logger.info(f"Written: {written(folder)}; use it with pipeline.load_lora_weights({args.output_dir!r})")
    if "seconds_per_step" in training.cost:
        took = (
            f"Took:     {training.cost['seconds_per_step']:.3g} s a step, with its share of pictures and checkpoints"
        )
        if "peak_memory_gib" in training.cost:
            took += f", at most {training.cost['peak_memory_gib']:.3g} GiB of the GPU's memory"
        logger.info(took)


def settle_run(args, accelerator, images):
    """Steps and learning rate, where they follow from the number of pictures and processes."""
    samples = accelerator.num_processes * args.gradient_accumulation_steps
    args.steps_per_epoch = math.ceil(images.batches_per_epoch / samples)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * args.steps_per_epoch
    if args.scale_lr:
        args.learning_rate *= samples * args.train_batch_size


def check_resumed(args, checkpoint, state, record):
    """Raise `UsageError` if the run that `record` describes cannot go on from the checkpoint."""
    flag = "--resume_from_checkpoint"
    if checkpoint is None:
        if args.resume_from_checkpoint == "latest":
            logger.info(f"{flag} latest: {args.output_dir} holds no checkpoint of this script: a new run")
        return
    if state["global_step"] > args.max_train_steps:
        raise UsageError(f"{flag} {checkpoint} is beyond --max_train_steps {args.max_train_steps}")
    changed = differences(state["run"], record)
    if changed:
        advice = "go on with what was, or start a new run in another --output_dir"
        raise UsageError(f"{flag} {checkpoint} is of another run: {changed}; {advice}")


def run_stages(args, accelerator, signals, loss_of):
    """What `main` does, in the folder that it has locked."""
    output_dir = Path(args.output_dir)
    warn_about_arguments(args)
    check_base(args)
    scheduler = training_scheduler(args)
    checkpoint, state = find_checkpoint(args)
    finished = {}
    if args.resume_from_checkpoint == "latest":
        finished = read_state(output_dir / FINISHED_FILE)
    if args.seed is None:
        args.seed = (state or finished).get("seed", secrets.randbelow(2**32))
    args.seed = broadcast_object_list([args.seed])[0]
    images = SubjectImages(args)
    settle_run(args, accelerator, images)
    record = describe_run(args, accelerator, images)
    seen = gather_object([json.dumps([state, finished, record])])
    if len(set(seen)) > 1:
        raise UsageError(
            f"--output_dir {output_dir}: not all nodes find the same checkpoints there; they must share it"
        )
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = make_repository(args)
    done = finished and finished["global_step"] >= args.max_train_steps and "README.md" in finished["files"]
    if done and not differences(finished["run"], record):
        logger.info(f"{output_dir} holds the finished run of {finished['global_step']} steps: nothing is left")
        if repo_id is not None:
            upload(args, repo_id)
        return
    check_resumed(args, checkpoint, state, record)
    start = state.get("global_step", 0)
    if accelerator.is_main_process:
        set_aside(output_dir, checkpoint, start)
        cut_metrics(output_dir, start)
    start_trackers(args, accelerator)

    run = prepare(args, accelerator, images, scheduler=scheduler, record=record, signals=signals, loss_of=loss_of)
    announce(run)
    training = start_training(run, checkpoint, start)
    if training.step >= args.max_train_steps:
        logger.info(f"{checkpoint} already has {start} of {args.max_train_steps} steps: nothing is left to train")
    train_and_keep(run, training)
    finish(run, training, repo_id)
    accelerator.end_training()


def main(args, loss_of=None):
    """Train as the command line says; raises `UsageError` for what the user can mend, before a model is loaded.

    `loss_of(micro_step, anchor, student, run)` takes the place of `loss_terms`: another objective on the same draws.
    """
    args = Namespace(**vars(args))  # settled on the way
    with StopRequests() as signals:
        accelerator = start_accelerator(args)
        lock = contextlib.nullcontext()
        if accelerator.is_main_process:
            lock = locked(Path(args.output_dir))
        with lock:
            accelerator.wait_for_everyone()
            run_stages(args, accelerator, signals, loss_of)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (UsageError, RunError) as error:
        print(f"{Path(__file__).name}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.status)
