# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate>=1.10",
#     "bitsandbytes>=0.45; sys_platform != 'darwin'",
#     "datasets>=4.0",
#     "diffusers>=0.41",
#     "huggingface_hub>=1.0",
#     "peft>=0.18",
#     "pillow>=10.1",
#     "safetensors>=0.5",
#     "tensorboard",
#     "torch>=2.6",
#     "tqdm",
#     "transformers>=5.0",
#     "wandb",
# ]
# ///
"""Personalise Stable Diffusion XL with a LoRA that stays anchored to what the model knew of the class.

    accelerate launch train_sap_lora_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir dog \
        --instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog" --max_train_steps 500 \
        --train_batch_size 1 --learning_rate 1e-4 --output_dir sap-dog

The method is "Semantic Anchoring for Robust Personalization in Text-to-Image Diffusion Models" (arXiv 2511.22245):
beside DreamBooth's regression to the noise, the prediction for the subject's prompt is drawn to what the pretrained
model predicts, at the same noisy latents, for the class prompt. No class images are needed. The method itself is the
four functions `adapters_disabled`, `anchor_caption`, `predict_anchors` and `semantic_anchor_loss`.

One way through: command line -> components -> prompt embeddings -> latent posteriors -> micro-steps -> anchors ->
loss -> LoRA file. What is random in a micro-step depends on (seed, rank, micro-step) alone.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    LoggerType,
    ProjectConfiguration,
    TorchDynamoPlugin,
    broadcast_object_list,
    tqdm,
)
from accelerate.utils import load as load_pickle
from diffusers import (
    AutoencoderKL,
    BitsAndBytesConfig,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import (
    cast_training_params,
    compute_snr,
    find_nearest_bucket,
    free_memory,
    parse_buckets_string,
)
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import ModelCardData, create_repo, upload_folder
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

logger = logging.getLogger("sap_lora")

PIPELINE_CLASS = StableDiffusionXLPipeline
DENOISER_CLASS = UNet2DConditionModel
DENOISER = "unet"
TRAINABLE_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
BASE_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler")
FOREIGN_PARTS = ("text_encoder_3", "transformer")
BASE_KIND = "this script trains Stable Diffusion XL; Stable Diffusion 1.x, 2.x and SD3 have scripts of their own"
UNUSED_PARTS = {"feature_extractor": None, "image_encoder": None}
EDM_SCHEDULERS = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)  # of Playground v2.5 and CosXL
DENOISER_TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
KOHYA_PARTS = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "magnitude_vector": "dora_scale"}
COMPILED_BLOCKS = {"BasicTransformerBlock"}
FINAL_SAMPLING = {"num_inference_steps": 25}
LATENT_STRIDE = 8  # pixels an edge of a latent stands for
BACKBONE_DEFAULTS = {"resolution": 1024, "learning_rate": 1e-4, "adam_weight_decay": 1e-4}
OUTPUT_DIR = "lora-dreambooth-model"
CACHE_LIMIT = 2**28  # bytes of latents and embeddings that rest on the device, not on the CPU
TRACKER = "dreambooth-lora-sd-xl"
CARD_LICENSE = "openrail++"

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
STATE_FILE = "trainer_state.json"
# Copied from train_sap_lora_sd15.FINISHED_FILE
FINISHED_FILE = "finished_run.json"
DORA_KEY = "lora_magnitude_vector"
PAPER = "https://arxiv.org/abs/2511.22245"
SECRETS = {"hub_token"}
# What may change when a run is resumed: places, output, speed; what the pictures' fingerprint stands for; and the
# number of steps, which `check_same_run` looks at.
# Copied from train_sap_lora_sd15.FREE_ON_RESUME
FREE_ON_RESUME = set(
    """
    instance_data_dir dataset_name dataset_config_name image_column caption_column cache_dir dataloader_num_workers
    with_prior_preservation class_data_dir num_class_images prior_loss_weight prior_generation_precision
    sample_batch_size pre_compute_text_embeddings max_train_steps num_train_epochs steps_per_epoch local_rank
    anchor_batch_size gradient_checkpointing allow_tf32 enable_xformers_memory_efficient_attention
    output_dir output_kohya_format validation_prompt num_validation_images validation_epochs validation_steps
    final_validation_prompt skip_final_inference checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    report_to logging_dir logging_steps push_to_hub hub_model_id compile offload
    """.split()
)
# Copied from train_sap_lora_sd15.MAY_BE_EMPTY
MAY_BE_EMPTY = {"class_token", "validation_prompt", "final_validation_prompt"}
# Copied from train_sap_lora_sd15.LR_SCHEDULERS
LR_SCHEDULERS = [name.value for name in SchedulerType if name != SchedulerType.PIECEWISE_CONSTANT]


# Copied from train_sap_lora_sd15.UsageError
class UsageError(ValueError):
    """Something that the user can mend: the message names the flag or the file, what is wrong and what to do."""


# Copied from train_sap_lora_sd15.OutputError
class OutputError(Exception):
    """The output folder could not be written during the run: the message says why and what is still there."""


# ---- Requests to stop ----


# Copied from train_sap_lora_sd15.StopSignals
class StopSignals:
    """SIGTERM and SIGINT (Ctrl-C, a scheduler, a spot machine's notice) as a request to stop.

    Inside the `with` block a signal ends the program at once, until `deferring` is set: from then on the first one is
    only kept in `received`, for `train` to see, and another one does what it would have done outside. Signals of the
    same second count as one, as a launcher passes on what its processes may have got already.
    """

    def __init__(self):
        self.deferring, self.received, self.arrival = False, 0, 0.0
        self.previous = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def handle(self, number: int, frame) -> None:
        if not self.deferring:
            logger.warning(
                f"{signal.Signals(number).name}: stopped, not in training; nothing was under way to be kept"
            )
            sys.exit(128 + number)
        if not self.received:
            self.received, self.arrival = number, time.monotonic()
        elif time.monotonic() - self.arrival > 1:
            self.__exit__()
            signal.raise_signal(number)


# ---- Command line ----


# Copied from train_sap_lora_sd15.HelpFormatter
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag where it has one, and what kind of value it takes."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X", boolean: "BOOL"}.get(action.type, "TEXT")


# Copied from train_sap_lora_sd15.boolean
def boolean(text: str) -> bool:
    """Read true or false from a flag's value; `bool("False")` is True, which nobody means."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(text)


boolean.__name__ = "bool"  # argparse puts it into its message: invalid bool value


# Copied from train_sap_lora_sd15.add_first_arguments
def add_first_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("start here").add_argument
    add("--pretrained_model_name_or_path", required=True, type=str, help="Base pipeline: hub name or local folder.")
    add("--instance_data_dir", type=str, help="Folder of pictures, captions in metadata.jsonl or NAME.txt.")
    add("--instance_prompt", required=True, type=str, help='Subject prompt, such as "a photo of sks dog".')
    add("--class_prompt", type=str, help='Anchor prompt: the same sentence for the class, "a photo of a dog".')
    add("--anchor_weight", type=float, default=0.5, help="w of the objective; 0 is plain DreamBooth-LoRA.")
    add("--resolution", type=int, help="Edge in pixels of the square that pictures are resized and cropped to.")
    add("--train_batch_size", type=int, default=4, help="Samples a device in one micro-step.")
    add("--max_train_steps", type=int, help="Optimizer steps in all (default: as --num_train_epochs says).")
    add("--learning_rate", type=float, help="Learning rate after warm-up.")
    add("--mixed_precision", type=str, choices=["no", "fp16", "bf16"], help="Default: as accelerate is configured.")
    add("--validation_prompt", type=str, help="Prompt of pictures made during training and at its end.")
    add("--output_dir", type=str, default=OUTPUT_DIR, help="Folder of the LoRA, the checkpoints and the logs.")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--revision", type=str, help="Branch, tag or commit of the base pipeline on the hub.")
    add("--variant", type=str, help="File variant of the base weights, such as fp16.")
    add("--pretrained_vae_model_name_or_path", type=str, help="Another VAE than the base's: hub name or local folder.")
    add("--do_edm_style_training", action="store_true", help="Train in EDM's parameterisation (arXiv 2206.00364).")


# Copied from train_sap_lora_sd15.add_subject_arguments
def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("subject: pictures and captions").add_argument
    add("--dataset_name", type=str, help="A `datasets` dataset of the pictures instead of a folder: hub name or path.")
    add("--dataset_config_name", type=str, help="Configuration of that dataset.")
    add("--image_column", type=str, default="image", help="Column that holds the pictures.")
    add("--caption_column", type=str, help="Column, or metadata.jsonl field, that holds a caption for each picture.")
    add("--cache_dir", type=str, help="Where `datasets` keeps what it downloads.")
    add("--repeats", type=int, default=1, help="How often each picture counts in one epoch.")
    add("--center_crop", action="store_true", help="Crop the middle instead of a random place.")
    add("--random_flip", action="store_true", help="Mirror each picture with probability 1/2.")
    add("--aspect_ratio_buckets", type=str, help='Sizes "h,w;h,w;..." instead of a square; the nearest one is taken.')
    add("--cache_latents", action="store_true", help="Encode each picture once (a random crop then stays the same).")
    add("--caption_dropout", type=float, default=0.0, help="Share of samples trained with an empty prompt.")
    add("--image_interpolation_mode", type=str, default="lanczos", help="How pictures are resized.",
        choices=["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"])  # fmt: skip


# Copied from train_sap_lora_sd15.add_anchor_arguments
def add_anchor_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("semantic anchor").add_argument
    add("--subject_token", type=str, help="Word of the subject: anchor captions are the captions without it.")
    add("--class_token", type=str, help="Word that replaces --subject_token in anchor captions (default: nothing).")
    add("--anchor_source", default="pretrained", choices=["pretrained", "finetuned"],
        help="Model that gives the anchor; finetuned (the model in training, no gradient) is the paper's ablation. "
        "Both read the class prompt through the text encoders as they were before training.")  # fmt: skip
    add("--anchor_batch_size", type=int, default=4, help="Samples of coming micro-steps in one anchor forward.")
    add = parser.add_argument_group("prior preservation", "Accepted for old command lines, unused.").add_argument
    add("--with_prior_preservation", action="store_true", help="Unused.")
    add("--class_data_dir", type=str, help="Unused: no class pictures are read.")
    add("--num_class_images", type=int, default=100, help="Unused: no class pictures are made.")
    add("--prior_loss_weight", type=float, default=1.0, help="Unused: see --anchor_weight.")
    add("--prior_generation_precision", type=str, choices=["no", "fp32", "fp16", "bf16"], help="Unused.")
    add("--sample_batch_size", type=int, default=4, help="Unused.")


# Copied from train_sap_lora_sd15.add_lora_arguments
def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, default=4, help="Rank of the update matrices.")
    add("--lora_alpha", type=float, help="The update is scaled by alpha / rank (default: the rank, a scale of 1).")
    add("--lora_dropout", type=float, default=0.0, help="Dropout before the update matrices.")
    add("--lora_layers", type=str, help='Endings of the layers to adapt, "to_k,to_v" (default: attention).')
    add("--use_dora", action="store_true", help="Train DoRA: magnitude and direction apart (arXiv 2402.09353).")
    add("--train_text_encoder", action="store_true", help="Train a LoRA on the text encoder too.")


# Copied from train_sap_lora_sd15.add_training_arguments
def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--num_train_epochs", type=int, default=1, help="Epochs, where --max_train_steps is not given.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Micro-steps in one optimizer step.")
    add("--seed", type=int, help="Makes the run reproducible (default: drawn and told).")
    add("--gradient_checkpointing", action="store_true", help="Save memory in the denoiser for time.")
    add("--snr_gamma", type=float, help="Min-SNR weighting of both loss terms, 5.0 in its paper (arXiv 2303.09556).")
    add("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs multiply in TF32.")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="Use xformers' attention.")
    add("--offload", action="store_true", help="Text encoders that do not train read prompts on the CPU; the VAE and "
        "all latents and embeddings rest there.")  # fmt: skip
    add("--bnb_quantization_config_path", type=str,
        help="JSON file of diffusers' BitsAndBytesConfig: the frozen denoiser in 4 or 8 bits, on a GPU.")  # fmt: skip
    add("--compile", action="store_true", help="Compile the denoiser's blocks: minutes at first, then faster steps.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that prepare random crops.")
    add("--local_rank", type=int, default=-1, help="Set by launchers.")


# Copied from train_sap_lora_sd15.add_optimizer_arguments
def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--text_encoder_lr", type=float, default=5e-6, help="Learning rate of the text encoder's LoRA.")
    add("--scale_lr", action="store_true", help="Multiply the rate by accumulation, batch size and processes.")
    add("--lr_scheduler", type=str, default="constant", help=f"One of {', '.join(LR_SCHEDULERS)}.")
    add("--lr_warmup_steps", type=int, default=500, help="Optimizer steps of warm-up, for schedules that have one.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of the polynomial schedule.")
    add("--optimizer", type=str, default="AdamW", help="AdamW or prodigy.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state, from bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, help="First beta, of AdamW and Prodigy.")
    add("--adam_beta2", type=float, default=0.999, help="Second beta, of AdamW and Prodigy.")
    add("--adam_weight_decay", type=float, help="Weight decay of the denoiser's LoRA.")
    add("--adam_weight_decay_text_encoder", type=float, default=1e-3, help="And of the text encoder's.")
    add("--adam_epsilon", type=float, default=1e-8, help="Epsilon, of AdamW and Prodigy.")
    add("--prodigy_beta3", type=float, help="Prodigy's third beta (default: the root of the second).")
    add("--prodigy_decouple", type=boolean, default=True, help="Decoupled weight decay in Prodigy.")
    add("--prodigy_use_bias_correction", type=boolean, default=True, help="Bias correction in Prodigy.")
    add("--prodigy_safeguard_warmup", type=boolean, default=True, help="Keep Prodigy's estimate small in warm-up.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")


# Copied from train_sap_lora_sd15.add_output_arguments
def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output: validation, checkpoints, logs, hub").add_argument
    add("--output_kohya_format", action="store_true", help="Also write the LoRA with the keys of kohya's tools.")
    add("--num_validation_images", type=int, default=4, help="How many of them.")
    add("--validation_epochs", type=int, default=50, help="Every how many epochs.")
    add("--validation_steps", type=int, help="Every how many optimizer steps, instead of epochs.")
    add("--final_validation_prompt", type=str, help="Another prompt for the pictures at the end.")
    add("--skip_final_inference", action="store_true", help="Make no pictures at the end.")
    add("--checkpointing_steps", type=int, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="How many checkpoints stay on disk.")
    add("--resume_from_checkpoint", type=str, help='A checkpoint\'s folder or name, or "latest".')
    add("--report_to", type=str, default="tensorboard", help="tensorboard, wandb, comet_ml, all or none.")
    add("--logging_steps", type=int, default=1, help="Fetch the losses from the device every so many steps.")
    add("--logging_dir", type=str, default="logs", help="Folder of the logs, inside the output folder.")
    add("--push_to_hub", action="store_true", help="Upload the LoRA, its card and its pictures; nothing else.")
    add("--hub_token", type=str, help="Token for that; `hf auth login` is safer.")
    add("--hub_model_id", type=str, help="Repository (default: the output folder's name).")


# Copied from train_sap_lora_sd15.hide_secrets
def hide_secrets(args: argparse.Namespace) -> None:
    """Take secrets out of `sys.argv`, which wandb copies into its files."""
    for secret in filter(None, (getattr(args, name) for name in SECRETS)):
        sys.argv[1:] = [word.replace(secret, "***") for word in sys.argv[1:]]


# Copied from train_sap_lora_sd15.parse_args
def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (`sys.argv` without `input_args`); a mistake ends in one sentence, status 2."""
    usage = "accelerate launch %(prog)s --pretrained_model_name_or_path BASE --instance_data_dir FOLDER "
    usage += '--instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog" [more flags]'
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add_first_arguments(parser)
    add_model_arguments(parser)
    add_subject_arguments(parser)
    add_anchor_arguments(parser)
    add_lora_arguments(parser)
    add_training_arguments(parser)
    add_optimizer_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(**BACKBONE_DEFAULTS)
    args = parser.parse_args(input_args)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    hide_secrets(args)
    try:
        check_numbers(args)
        check_texts(args)
        check_data_arguments(args)
        check_anchor_arguments(args)
        check_backbone_arguments(args)
        check_training_arguments(args)
        check_hub_arguments(args)
    except UsageError as error:
        parser.error(str(error))
    return args


# Copied from train_sap_lora_sd15.NUMBER_RANGES
NUMBER_RANGES = {
    ("at least 1", lambda x: x >= 1): "train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps "
    "rank repeats anchor_batch_size checkpointing_steps checkpoints_total_limit validation_epochs validation_steps "
    "resolution logging_steps lr_num_cycles",
    ("finite and at least 0", lambda x: 0 <= x < math.inf): "anchor_weight learning_rate text_encoder_lr seed "
    "lr_warmup_steps dataloader_num_workers num_validation_images adam_weight_decay adam_weight_decay_text_encoder "
    "lr_power",
    ("finite and above 0", lambda x: 0 < x < math.inf): "lora_alpha snr_gamma adam_epsilon max_grad_norm",
    ("at least 0 and below 1", lambda x: 0 <= x < 1): "caption_dropout lora_dropout adam_beta1 adam_beta2 "
    "prodigy_beta3",
    ("below 2**63", lambda x: x < 2**63): "seed",  # what torch's generators take
}


# Copied from train_sap_lora_sd15.check_numbers
def check_numbers(args: argparse.Namespace) -> None:
    """Raise `UsageError` for a number out of its range."""
    for (kind, fits), names in NUMBER_RANGES.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):
                raise UsageError(f"--{name} must be {kind}, not {value}")


# Copied from train_sap_lora_sd15.check_texts
def check_texts(args: argparse.Namespace) -> None:
    """Raise `UsageError` for an empty value, which is mostly a shell variable that was not set."""
    for name, value in vars(args).items():
        if value == "" and name not in MAY_BE_EMPTY:
            raise UsageError(f"--{name} is empty: give it a value, or leave the flag out")


# Copied from train_sap_lora_sd15.check_data_arguments
def check_data_arguments(args: argparse.Namespace) -> None:
    """Raise `UsageError` where pictures, sizes or the output folder cannot be used."""
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        raise UsageError("pass the subject's pictures once: either --instance_data_dir or --dataset_name")
    if args.instance_data_dir is not None and not Path(args.instance_data_dir).is_dir():
        raise UsageError(f"--instance_data_dir: there is no folder {args.instance_data_dir}")
    if args.resolution % LATENT_STRIDE:
        raise UsageError(f"--resolution must be a multiple of {LATENT_STRIDE}, not {args.resolution}")
    if args.aspect_ratio_buckets is not None:
        try:
            sizes = parse_buckets_string(args.aspect_ratio_buckets)
        except ValueError as error:
            raise UsageError(f'--aspect_ratio_buckets: {error}; write "h,w;h,w", such as "512,512;640,384"') from error
        if any(edge % LATENT_STRIDE for size in sizes for edge in size):
            raise UsageError(f"--aspect_ratio_buckets: every edge must be a multiple of {LATENT_STRIDE}")
    if Path(args.output_dir).is_file():
        raise UsageError(f"--output_dir: {args.output_dir} is a file; name a folder")


# Copied from train_sap_lora_sd15.check_anchor_arguments
def check_anchor_arguments(args: argparse.Namespace) -> None:
    """Raise `UsageError` where an anchor prompt is needed and cannot be had; derive `args.class_prompt` if it can."""
    if args.class_token is not None and args.subject_token is None:
        raise UsageError("--class_token replaces --subject_token, which is not given: pass both")
    if args.anchor_weight == 0:
        return
    if args.class_prompt is None and args.subject_token is not None:
        try:
            args.class_prompt = anchor_caption(args.instance_prompt, args.subject_token, args.class_token or "")
        except ValueError as error:
            # With a caption for every picture the instance prompt is not used, so this may yet be right.
            if args.caption_column is None:
                raise UsageError(f"--subject_token and --instance_prompt: {error}; pass --class_prompt") from error
    elif args.class_prompt is None:
        raise UsageError(
            'the anchor needs a prompt for the class: --class_prompt, "a photo of a dog" for "a photo of sks dog", '
            "or --subject_token to derive it, or --anchor_weight 0 to train without it"
        )


# Copied from train_sap_lora_sd15.check_training_arguments
def check_training_arguments(args: argparse.Namespace) -> None:
    """Raise `UsageError` for options that do not go together or lack a package."""
    if args.optimizer.lower() not in ("adamw", "prodigy"):
        raise UsageError(f"--optimizer must be AdamW or prodigy, not {args.optimizer}")
    if args.lr_scheduler not in LR_SCHEDULERS:
        raise UsageError(f"--lr_scheduler must be one of {', '.join(LR_SCHEDULERS)}, not {args.lr_scheduler}")
    trackers, found = ({str(name) for name in names} - {"all"} for names in (LoggerType, get_available_trackers()))
    if args.report_to not in trackers | {"all", "none"}:
        raise UsageError(f"--report_to must be one of {', '.join(sorted(trackers))}, all, none, not {args.report_to}")
    packages = {
        "--optimizer prodigy": ("prodigyopt", args.optimizer.lower() == "prodigy"),
        "--use_8bit_adam": ("bitsandbytes", args.use_8bit_adam),
        "--bnb_quantization_config_path": ("bitsandbytes", args.bnb_quantization_config_path is not None),
        "--enable_xformers_memory_efficient_attention": ("xformers", args.enable_xformers_memory_efficient_attention),
        f"--report_to {args.report_to}": (args.report_to, args.report_to in trackers - found),
        "--dataset_name": ("datasets", args.dataset_name is not None),
    }
    for flag, (package, wanted) in packages.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(f"{flag} needs the package {package}, which is not installed: pip install {package}")
    quantization_config(args)
    if args.report_to == "wandb" and args.hub_token is not None:
        raise UsageError("--report_to wandb together with --hub_token would show the token: use `hf auth login`")
    if args.lora_layers is not None and not all(name.strip() for name in args.lora_layers.split(",")):
        raise UsageError(f'--lora_layers: write names with commas between them, "to_k,to_v", not "{args.lora_layers}"')


# Copied from train_sap_lora_sd15.quantization_config
def quantization_config(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig | None:
    """What `--bnb_quantization_config_path` says; 4-bit weights compute in `dtype` unless the file says otherwise.

    Raises:
        UsageError: if the file is not a JSON object of BitsAndBytesConfig's arguments, or there is no GPU.
    """
    if args.bnb_quantization_config_path is None:
        return None
    flag, wanted = f"--bnb_quantization_config_path {args.bnb_quantization_config_path}", '{"load_in_4bit": true}'
    try:
        options = json.loads(read_text(Path(args.bnb_quantization_config_path)))
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} cannot be read as JSON, such as {wanted}: {error}") from error
    known = [*inspect.signature(BitsAndBytesConfig).parameters][:-1]  # the last one takes everything else
    unknown = sorted(set(options) - set(known)) if isinstance(options, dict) else [type(options).__name__]
    if unknown:
        raise UsageError(f"{flag}: {', '.join(unknown)} is none of BitsAndBytesConfig's {', '.join(known)}")
    if not options.get("load_in_4bit") and not options.get("load_in_8bit"):
        raise UsageError(f"{flag} must ask for load_in_4bit or load_in_8bit, such as {wanted}")
    try:
        config = BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": dtype} | options)
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{flag}: {error}") from error
    if not torch.accelerator.is_available():
        raise UsageError(f"{flag}: diffusers quantises on a GPU only, and there is none: leave the flag out")
    return config


# Copied from train_sap_lora_sd15.check_hub_arguments
def check_hub_arguments(args: argparse.Namespace) -> None:
    """Raise `UsageError` where the LoRA is to be uploaded to what cannot be a repository's name."""
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or Path(args.output_dir).name)
        except HFValidationError as error:
            raise UsageError(f"--hub_model_id: {error}") from error


def check_backbone_arguments(args: argparse.Namespace) -> None:
    """Raise `UsageError` for what Stable Diffusion XL cannot do."""
    if args.do_edm_style_training and args.snr_gamma is not None:
        raise UsageError("--snr_gamma cannot go with --do_edm_style_training, which has weights of its own: drop one")


# Copied from train_sap_lora_sd15.warn_about_arguments
def warn_about_arguments(args: argparse.Namespace) -> None:
    """Say once what was accepted and is not used."""
    unused = {"with_prior_preservation": False, "class_data_dir": None, "num_class_images": 100,
              "prior_loss_weight": 1.0, "prior_generation_precision": None, "sample_batch_size": 4}  # fmt: skip
    given = [f"--{name}" for name, default in unused.items() if getattr(args, name) != default]
    if given:
        logger.warning(f"{', '.join(given)}: unused, the anchor of --class_prompt replaces class images")
    prodigy = args.optimizer.lower() == "prodigy"
    if prodigy and args.use_8bit_adam:
        logger.warning("--use_8bit_adam: unused, the optimizer is Prodigy")
    if prodigy and args.learning_rate <= 0.1:
        logger.warning(f"--learning_rate {args.learning_rate} is small for Prodigy, which expects about 1.0")
    if prodigy and args.train_text_encoder:
        logger.warning("--text_encoder_lr: unused, Prodigy has one rate for all, --learning_rate")


# ---- The method: these four functions can be lifted into any other diffusers + peft training script ----


# Copied from train_sap_lora_sd15.adapters_disabled
@contextlib.contextmanager
def adapters_disabled(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` (unwrapped, with peft layers) computes what it did before adapters were added, bit for bit.

    Only a flag of each adapter layer changes, and it is put back in any case: neither `requires_grad` nor the active
    adapters move, as they do with `disable_adapters()` and `enable_adapters()`. Never run a backward pass inside.

    Raises:
        ValueError: for what the flag does not switch off: whole modules in the adapter (`modules_to_save`), merged
            adapters, or trained parameters outside of the adapter layers.
    """
    layers, adapter_parts = [], set()
    for name, module in model.named_modules():  # one walk, parents first: it takes milliseconds
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(f"the adapter of {name} is merged into the weights: call unmerge_adapter() first")
            layers.append(module)
            adapter_parts.update(module.adapter_layer_names)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"the adapter holds all of {name} (modules_to_save), which cannot be switched off")
        elif adapter_parts.isdisjoint(name.split(".")) and any(
            p.requires_grad for p in module.parameters(recurse=False)
        ):
            raise ValueError(f"{name} trains but is no adapter: without adapters this is not the pretrained model")
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


# Copied from train_sap_lora_sd15.anchor_caption
def anchor_caption(caption: str, subject_token: str, class_token: str = "") -> str:
    """The caption of the class: `subject_token`, as a whole word, becomes `class_token` or goes.

    `anchor_caption("a photo of sks dog", "sks")` is "a photo of dog", with `class_token="a"` "a photo of a dog".

    Raises:
        ValueError: if the caption, which it quotes, does not hold the token.
    """
    pattern = rf"(?<!\w){re.escape(subject_token)}(?!\w)"
    replaced, count = re.subn(pattern, lambda _: class_token, caption)
    if not count:
        raise ValueError(f'the caption "{caption}" does not hold the word "{subject_token}"')
    return " ".join(replaced.split())


# Copied from train_sap_lora_sd15.predict_anchors
@torch.no_grad()
def predict_anchors(
    model: torch.nn.Module,
    denoise: Callable[..., torch.Tensor],
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]],
    batch_size: int = 4,
    source: str = "pretrained",
) -> list[torch.Tensor]:
    """The anchors of Eq. 5, arXiv 2511.22245: eps_theta'(z_t, c_cls, t), for several coming micro-steps at once.

    Call it in the autocast context of the student's forward: outside of it the rounding differs.

    Args:
        model: the denoiser with its adapters, not wrapped by DDP.
        denoise: `denoise(model, model_input, timesteps, conditioning)` gives the prediction, shaped as `model_input`.
        inputs: for each micro-step the model input (B, C, h, w) and timesteps (B,) that the student sees too, and the
            conditioning on the class prompt, a dict of tensors (B, ...). Sizes may differ between micro-steps.
        batch_size: samples in one forward; it changes the result by rounding only.
        source: "pretrained", or "finetuned" for the ablation of section 5.2, with adapters on.

    Returns:
        For each micro-step the raw prediction (B, C, h, w).
    """
    anchors = [torch.empty(0)] * len(inputs)
    sizes = [model_input.shape[1:] for model_input, _, _ in inputs]
    with adapters_disabled(model) if source == "pretrained" else contextlib.nullcontext():
        for size in dict.fromkeys(sizes):
            members = [i for i, other in enumerate(sizes) if other == size]
            model_inputs = torch.cat([inputs[i][0] for i in members]).split(batch_size)
            timesteps = torch.cat([inputs[i][1] for i in members]).split(batch_size)
            conditionings = {
                name: torch.cat([inputs[i][2][name] for i in members]).split(batch_size) for name in inputs[0][2]
            }
            predictions = [
                denoise(model, model_input, timestep, {name: parts[i] for name, parts in conditionings.items()})
                for i, (model_input, timestep) in enumerate(zip(model_inputs, timesteps, strict=True))
            ]
            lengths = [len(inputs[i][0]) for i in members]
            for i, anchor in zip(members, torch.cat(predictions).split(lengths), strict=True):
                anchors[i] = anchor
    return anchors


# Copied from train_sap_lora_sd15.semantic_anchor_loss
def semantic_anchor_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    anchor: torch.Tensor | None = None,
    anchor_weight: float = 0.5,
    sample_weights: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Eq. 5 of arXiv 2511.22245: ||target - prediction||^2 + w ||prediction - anchor||^2, as means over elements.

    Prediction and anchor (B, C, h, w) come from the same noisy latents and timesteps, and through the same output
    map; `sample_weights` (broadcastable to them) multiplies both terms. Then Eq. 5 means the same for every
    parameterisation. Without an anchor it is DreamBooth's loss.

    Returns:
        The loss, its reconstruction term and its anchor term (not yet multiplied by w; None without an anchor).
    """
    reconstruction = (sample_weights * (target.float() - prediction.float()) ** 2).mean()
    if anchor is None:
        return reconstruction, reconstruction, None
    anchor_distance = (sample_weights * (prediction.float() - anchor.float()) ** 2).mean()
    return reconstruction + anchor_weight * anchor_distance, reconstruction, anchor_distance


# ---- The subject's pictures ----


# Copied from train_sap_lora_sd15.read_image
def read_image(source: Path | Image.Image) -> Image.Image:
    """Open a picture as RGB: upright by its EXIF orientation, 16 bits brought to 8, transparency over white.

    Raises:
        UsageError: if the file, which it names, cannot be read.
    """
    try:
        image = Image.open(source) if isinstance(source, Path) else source
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 256).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = source if isinstance(source, Path) else "a picture of --dataset_name"
        advice = "scale it down" if isinstance(error, Image.DecompressionBombError) else "repair or remove it"
        raise UsageError(f"{name} cannot be read as a picture ({error}): {advice}") from error


# Copied from train_sap_lora_sd15.list_image_files
def list_image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a folder whose endings Pillow reads, sorted, and the names of everything else but captions."""
    readable = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    files, skipped = [], []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix.lower() in readable and not path.name.startswith("."):
            files.append(path)
        elif path.name != "metadata.jsonl" and path.suffix != ".txt":
            skipped.append(path.name)
    return files, skipped


# Copied from train_sap_lora_sd15.read_text
def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without the mark that Windows puts before it.

    Raises:
        UsageError: if it is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: save it as UTF-8") from error


# Copied from train_sap_lora_sd15.read_captions
def read_captions(folder: Path, files: Sequence[Path], field: str) -> list[str | None]:
    """A caption for each file, from `metadata.jsonl` (`file_name` and `field`) or from NAME.txt beside NAME.jpg.

    Raises:
        UsageError: for a line that is not of that form, or names a file that is not there.
    """
    text_files = {path: path.with_suffix(".txt") for path in files}
    captions = {path: read_text(text_file).strip() for path, text_file in text_files.items() if text_file.is_file()}
    metadata = folder / "metadata.jsonl"
    lines = read_text(metadata).split("\n") if metadata.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path, caption = folder / row["file_name"], row[field]
        except (ValueError, KeyError, TypeError) as error:
            wanted = f'{{"file_name": "00.jpg", "{field}": "a caption"}}'
            raise UsageError(f"{metadata}, line {number}: not of the form {wanted} ({error!r})") from error
        if path not in files:
            raise UsageError(f"{metadata}, line {number}: there is no picture {path}")
        captions[path] = str(caption)
    return [captions.get(path) for path in files]


# Copied from train_sap_lora_sd15.load_dataset_columns
def load_dataset_columns(args: argparse.Namespace) -> tuple[Sequence[Image.Image], list[str | None]]:
    """Pictures (decoded when indexed) and captions of `--dataset_name`, a name on the hub or a folder on disk.

    Raises:
        UsageError: if there is no such dataset or column.
    """
    import datasets  # costs a second at start-up, and most runs read a folder

    path = Path(args.dataset_name)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(args.dataset_name)
        else:
            dataset = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise UsageError(f"--dataset_name {args.dataset_name} cannot be loaded: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UsageError(f"--dataset_name {args.dataset_name} has no split called train, only {list(dataset)}")
        dataset = dataset["train"]
    for flag in ("image_column", "caption_column"):
        column = getattr(args, flag)
        if column is not None and column not in dataset.column_names:
            raise UsageError(f"--{flag} {column} is not one of the columns {', '.join(dataset.column_names)}")
    images = dataset.cast_column(args.image_column, datasets.Image())[args.image_column]
    captions = list(dataset[args.caption_column]) if args.caption_column else [None] * len(dataset)
    return images, captions


# Copied from train_sap_lora_sd15.covering_size
def covering_size(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of a picture when it is resized to just cover a window, before it is cropped."""
    scale = max(window[0] / size[0], window[1] / size[1])
    return round(size[0] * scale), round(size[1] * scale)


# Copied from train_sap_lora_sd15.SubjectImages
class SubjectImages(torch.utils.data.Dataset):
    """The subject's pictures and captions. An item depends on nothing but the draw (index, key) that asks for it.

    Pictures are opened when they are needed and not kept; at the start each is opened once, so that a damaged one is
    found before a model is loaded.

    Args:
        images: paths, or pictures decoded when indexed.
        captions: for each picture the subject's caption.
        anchor_captions: for each picture the anchor's caption.
        args: the command line.
    """

    def __init__(self, images: Sequence, captions: list[str], anchor_captions: list[str], args: argparse.Namespace):
        self.images, self.captions, self.anchor_captions = images, captions, anchor_captions
        self.random_flip, self.caption_dropout = args.random_flip, args.caption_dropout
        progress = tqdm(range(len(images)), desc="Reading pictures", leave=False)
        self.sizes = [read_image(images[i]).size[::-1] for i in progress]  # (height, width)
        buckets = [(args.resolution, args.resolution)]
        if args.aspect_ratio_buckets is not None:
            buckets = parse_buckets_string(args.aspect_ratio_buckets)
        self.windows = [buckets[find_nearest_bucket(height, width, buckets)] for height, width in self.sizes]
        fits = all(covering_size(*pair) == pair[1] for pair in zip(self.sizes, self.windows, strict=True))
        centred = args.center_crop or args.aspect_ratio_buckets is not None or fits
        self.cacheable = centred or args.cache_latents
        crops = [torch.rand(2, generator=keyed_generator(args.seed, "crop", i)).tolist() for i in range(len(images))]
        self.fixed_centering = [(0.5, 0.5)] * len(images) if centred else crops  # used where latents are cached
        mode = args.image_interpolation_mode.replace("nearest_exact", "nearest").upper()
        self.resampling = Image.Resampling[mode]
        self.to_tensor = VaeImageProcessor(do_resize=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: tuple[int, tuple]) -> dict:
        """Crop, mirror and caption of one sample as drawn from its key; pixels only where latents are not cached."""
        index, key = draw
        left, top, flip, drop = torch.rand(4, generator=keyed_generator(*key)).tolist()
        item = {
            "index": index,
            "flipped": self.random_flip and flip < 0.5,
            "centering": self.fixed_centering[index] if self.cacheable else (left, top),
            "prompt": "" if drop < self.caption_dropout else self.captions[index],
            "anchor_prompt": "" if drop < self.caption_dropout else self.anchor_captions[index],
        }
        if not self.cacheable:
            item["pixel_values"] = self.pixel_values(index, item["flipped"], item["centering"])
        return item

    def pixel_values(self, index: int, flipped: bool, centering: tuple[float, float]) -> torch.Tensor:
        """One picture, mirrored or not, resized to cover its window and cropped: (3, h, w) in [-1, 1].

        `centering` says where the crop lies, from (0, 0), left and top, to (1, 1), right and bottom.
        """
        image = read_image(self.images[index])
        image = ImageOps.mirror(image) if flipped else image
        height, width = self.windows[index]
        image = ImageOps.fit(image, (width, height), method=self.resampling, centering=centering)
        return self.to_tensor.preprocess(image)[0]


# Copied from train_sap_lora_sd15.load_subject_images
def load_subject_images(args: argparse.Namespace) -> SubjectImages:
    """Read the pictures and captions that the command line names, and derive each picture's anchor caption.

    Raises:
        UsageError: if there is no picture, or one or its caption cannot be used.
    """
    if args.dataset_name is not None:
        images, captions = load_dataset_columns(args)
    else:
        folder = Path(args.instance_data_dir)
        images, skipped = list_image_files(folder)
        captions = read_captions(folder, images, args.caption_column or "text")
        if skipped:
            logger.warning(f"{folder}: not pictures, skipped: {', '.join(skipped)}")
    if len(images) == 0:
        raise UsageError(f"{args.instance_data_dir or args.dataset_name} holds no picture: check --instance_data_dir")
    missing = captions.count(None)
    if 0 < missing < len(captions):
        logger.warning(f"{missing} of {len(captions)} pictures have no caption: --instance_prompt stands in")
    subject, anchor = [], []
    for caption in captions:
        subject.append(args.instance_prompt if caption is None else caption)
        anchor.append(args.class_prompt or "")
        if caption is not None and args.subject_token is not None and args.anchor_weight > 0:
            try:
                anchor[-1] = anchor_caption(caption, args.subject_token, args.class_token or "")
            except ValueError as error:
                raise UsageError(f"--subject_token: {error}; mend the caption") from error
    if args.anchor_weight > 0 and args.class_prompt is None and missing:
        raise UsageError(f"--class_prompt is needed for the {missing} pictures without a caption")
    return SubjectImages(images, subject, anchor, args)


# ---- Stateless randomness: the same key draws the same numbers, whatever was drawn before, on every device ----


# Copied from train_sap_lora_sd15.keyed_generator
def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose numbers depend on the key alone, such as (seed, rank, micro-step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


# Copied from train_sap_lora_sd15.MicroStepSampler
class MicroStepSampler(torch.utils.data.Sampler):
    """For each micro-step of one rank, the draws (index, key) of its batch, from `start` to before `stop`.

    An epoch deals every picture (`repeats` times) to batches of one size: pictures of one window make batches
    together, and the last batch of a window is filled up from its first pictures, so all batches weigh the same.
    The ranks take the batches in turn, and run on into the next epoch where they do not come out even.
    """

    def __init__(self, images: SubjectImages, args: argparse.Namespace, rank: int, ranks: int):
        self.seed, self.rank, self.ranks = args.seed, rank, ranks
        self.batch_size = args.train_batch_size
        self.start = self.stop = 0
        self.members = {
            window: [i for i, other in enumerate(images.windows) if other == window] * args.repeats
            for window in sorted(set(images.windows))
        }
        self.batches_per_epoch = sum(math.ceil(len(members) / self.batch_size) for members in self.members.values())

    @functools.lru_cache(maxsize=2)  # noqa: B019 (the sampler lives as long as the run)
    def epoch(self, number: int) -> list[list[int]]:
        """The batches of one epoch, lists of picture indices, the same on all ranks."""
        generator = keyed_generator(self.seed, "epoch", number)
        batches = []
        for members in self.members.values():
            shuffled = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            filled = itertools.cycle(shuffled)
            for _ in range(math.ceil(len(members) / self.batch_size)):
                batches.append(list(itertools.islice(filled, self.batch_size)))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[tuple[int, tuple]]]:
        for micro_step in range(self.start, self.stop):
            number, position = divmod(micro_step * self.ranks + self.rank, self.batches_per_epoch)
            batch = self.epoch(number)[position]
            yield [(index, (self.seed, self.rank, micro_step, i)) for i, index in enumerate(batch)]


# Copied from train_sap_lora_sd15.as_list
def as_list(items: list) -> list:
    """Collate nothing: samples of a batch are put together where their latents and embeddings are known."""
    return items


# Copied from train_sap_lora_sd15.ignore_signals
def ignore_signals(worker: int) -> None:
    """Leave requests to stop, which reach a whole group of processes, to the one that trains."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---- Components, in stages: text encoders, then the VAE, then the denoiser ----


# Copied from train_sap_lora_sd15.Run
@dataclasses.dataclass
class Run:
    """What the stages of a run hand on. The text pipeline and the VAE are None as soon as they are not needed."""

    args: argparse.Namespace
    accelerator: Accelerator
    images: SubjectImages
    record: dict = dataclasses.field(default_factory=dict)  # of `describe_run`, for checkpoints
    signals: StopSignals = dataclasses.field(default_factory=StopSignals)
    scheduler: SchedulerMixin | None = None
    text_pipeline: PIPELINE_CLASS | None = None
    embeddings: dict[str, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)  # of each prompt
    sampling_inputs: dict[str, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    vae: AutoencoderKL | None = None
    vae_config: dict = dataclasses.field(default_factory=dict)
    posteriors: dict[tuple[int, bool], torch.Tensor] = dataclasses.field(default_factory=dict)
    denoiser: torch.nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights and embeddings; what trains is always float32."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

    def adapted(self) -> dict[str, torch.nn.Module]:
        """The modules that have a LoRA, by their names in the pipeline."""
        encoders = TRAINABLE_TEXT_ENCODERS if self.text_pipeline is not None else ()
        return {DENOISER: self.denoiser, **{name: getattr(self.text_pipeline, name) for name in encoders}}


# Copied from train_sap_lora_sd15.loading
@contextlib.contextmanager
def loading(flag: str) -> Iterator[None]:
    """Inside, or in a function that it decorates, what cannot be loaded ends in one sentence that begins with `flag`.

    Raises:
        UsageError: in place of what diffusers, transformers and safetensors raise for missing or damaged files.
    """
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        value = flag.partition(" ")[2]
        what = "is no folder, and the hub does not give it"
        if not value or Path(value).exists():
            what = "cannot be loaded"
        raise UsageError(f"{flag} {what}: {' '.join(str(error).split())}") from error


# Copied from train_sap_lora_sd15.read_index
def read_index(args: argparse.Namespace) -> dict:
    """The base pipeline's model_index.json: for each part its library and its class.

    Raises:
        UsageError: if there is none, or if it is not of a pipeline that this script trains.
    """
    base = args.pretrained_model_name_or_path
    flag = f"--pretrained_model_name_or_path {base}"
    if Path(base).is_file():
        raise UsageError(f"{flag} is a file: from_single_file and save_pretrained of diffusers make a folder of it")
    with loading(flag):
        index = PIPELINE_CLASS.load_config(base, revision=args.revision)
        parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    missing = [name for name in BASE_PARTS if name not in parts]
    foreign = [name for name in FOREIGN_PARTS if name in parts]
    if missing or foreign:
        difference = f"without {', '.join(missing)}" if missing else f"with {', '.join(foreign)}"
        raise UsageError(f"{flag} is a {index.get('_class_name')} {difference}: {BASE_KIND}")
    if parts[DENOISER] != DENOISER_CLASS.__name__:
        raise UsageError(f"{flag} has a {parts[DENOISER]} for a {DENOISER}: {BASE_KIND}")
    return index


# Copied from train_sap_lora_sd15.variant_of
def variant_of(path: Path) -> str | None:
    """The variant, such as fp16, that a file of weights has in its name; None if it has none."""
    parts = re.sub(r"-\d+-of-\d+", "", path.stem).split(".")
    return parts[1] if len(parts) > 1 else None


# Copied from train_sap_lora_sd15.check_files
def check_files(args: argparse.Namespace) -> None:
    """Look for the files of the base pipeline's parts in a local folder; of weights only the headers are read.

    Raises:
        UsageError: if one is missing, or cut short.
    """
    configurations = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
    for name in BASE_PARTS:
        kind, part = name.split("_")[0], Path(args.pretrained_model_name_or_path) / name
        needed, weights = configurations.get(kind, "config.json"), sorted(part.glob("*.safetensors"))
        if not (part / needed).is_file():
            raise UsageError(f"--pretrained_model_name_or_path: {part / needed} is missing; get the folder again")
        if kind not in configurations and not weights:
            raise UsageError(f"--pretrained_model_name_or_path: {part} holds no weights in the safetensors format")
        if name in (DENOISER, "vae") and not any(variant_of(path) == args.variant for path in weights):
            raise UsageError(f"--variant {args.variant}: {part} has no such files, only {weights[0].name}")
        for path in weights:
            with (
                loading(f"--pretrained_model_name_or_path: {path} is damaged, get it again; it"),
                safe_open(path, "pt"),
            ):
                pass


# Copied from train_sap_lora_sd15.check_latents
def check_latents(args: argparse.Namespace, flag: str, vae_config: dict) -> None:
    """Raise `UsageError` if the denoiser reads something else than the VAE's latents, as those for inpainting do."""
    base, makes = args.pretrained_model_name_or_path, vae_config["latent_channels"]
    reads = DENOISER_CLASS.load_config(base, subfolder=DENOISER, revision=args.revision)["in_channels"]
    if reads != makes:
        raise UsageError(
            f"{flag}: the VAE's latents have {makes} channels and the {DENOISER} reads {reads}; "
            "models for inpainting or editing, and VAEs of another kind of base, cannot be used"
        )


@loading("--pretrained_model_name_or_path")
def check_pipeline(args: argparse.Namespace) -> None:
    """Read the base pipeline's index, configurations and headers; raise `UsageError` if they do not fit."""
    base = args.pretrained_model_name_or_path
    scheduler = read_index(args)["scheduler"][1]
    if args.snr_gamma is not None and scheduler in {kind.__name__ for kind in EDM_SCHEDULERS}:
        raise UsageError(f"--snr_gamma cannot go with {base}: its {scheduler} has weights of its own; leave it out")
    if Path(base).is_dir():
        check_files(args)
    flag, source, files = vae_source(args)
    with loading(flag):
        vae_config = AutoencoderKL.load_config(source, **files)
    check_latents(args, flag, vae_config)


@loading("--pretrained_model_name_or_path")
def load_text_pipeline(run: Run) -> PIPELINE_CLASS:
    """The base pipeline without denoiser and VAE: tokenizers, text encoders, `encode_prompt` and the scheduler."""
    args = run.args
    return PIPELINE_CLASS.from_pretrained(
        args.pretrained_model_name_or_path, unet=None, vae=None, **UNUSED_PARTS, **hub_files(args), dtype=run.dtype
    ).to(text_device(run))


def encode_prompts(pipeline: PIPELINE_CLASS, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
    """The denoiser's conditioning (B, ...) on B prompts; gradients reach text encoders that train.

    An empty prompt (caption dropout) gives what the sampler takes for one: zeros, where the pipeline says so.
    """
    prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
        prompts, device=device, do_classifier_free_guidance=False
    )
    zeroed = pipeline.config.force_zeros_for_empty_prompt
    kept = torch.tensor([float(prompt != "" or not zeroed) for prompt in prompts]).to(prompt_embeds)
    return {
        "encoder_hidden_states": prompt_embeds * kept[:, None, None],
        "text_embeds": pooled_prompt_embeds * kept[:, None],
    }


def encode_for_sampling(pipeline: PIPELINE_CLASS, prompt: str, device: torch.device) -> dict[str, torch.Tensor]:
    """What the pipeline's call takes in place of a prompt, for pictures with classifier-free guidance."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, pipeline.encode_prompt(prompt, device=device), strict=True))


def size_conditioning(images: SubjectImages, items: list[dict]) -> torch.Tensor:
    """SDXL's `time_ids` (B, 6) of B samples: original (h, w), crop corner (top, left) and target (h, w), in pixels.

    The corner is counted in the picture (or its mirror image) when it is resized to cover its window.
    """
    rows = []
    for item in items:
        size, window = images.sizes[item["index"]], images.windows[item["index"]]
        height, width = covering_size(size, window)
        left, top = item["centering"]
        rows.append([*size, round((height - window[0]) * top), round((width - window[1]) * left), *window])
    return torch.tensor(rows, dtype=torch.float32)


def denoise(
    model: torch.nn.Module, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The denoiser's raw prediction, shaped as `model_input` (B, C, h, w), in the dtype of its weights."""
    encoder_hidden_states = conditioning["encoder_hidden_states"]
    added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
    return model(
        model_input.to(encoder_hidden_states.dtype),
        timesteps,
        encoder_hidden_states,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def is_edm(scheduler: SchedulerMixin) -> bool:
    """Whether a training scheduler counts noise in sigmas, as EDM does (arXiv 2206.00364)."""
    return not isinstance(scheduler, DDPMScheduler)


def training_scheduler(pipeline: PIPELINE_CLASS, args: argparse.Namespace) -> SchedulerMixin:
    """The diffusion process of the base pipeline: EDM if it is one, or is to be trained as one.

    Raises:
        UsageError: if the base predicts something else than noise or v.
    """
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, EDM_SCHEDULERS):
        process = EulerDiscreteScheduler if args.do_edm_style_training else DDPMScheduler
        scheduler = process.from_config(scheduler.config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UsageError(
            "--pretrained_model_name_or_path: its scheduler has the prediction_type "
            f"{scheduler.config.prediction_type}; epsilon and v_prediction can be trained"
        )
    return scheduler


# Copied from train_sap_lora_sd15.hub_files
def hub_files(args: argparse.Namespace) -> dict[str, str | bool | None]:
    """Which files of the base pipeline's repository to load; never a pickle, which could run code."""
    return {"revision": args.revision, "variant": args.variant, "use_safetensors": True}


def vae_source(args: argparse.Namespace) -> tuple[str, str, dict]:
    """The flag that names the VAE, its value, and the options with which to load it from there."""
    own = args.pretrained_vae_model_name_or_path
    if own is not None:
        return f"--pretrained_vae_model_name_or_path {own}", own, {"use_safetensors": True}
    base = args.pretrained_model_name_or_path
    return f"--pretrained_model_name_or_path {base}", base, {"subfolder": "vae", **hub_files(args)}


def load_vae(args: argparse.Namespace, device: torch.device) -> AutoencoderKL:
    """The VAE in float32, whatever the run's precision: half precision overflows in some."""
    flag, source, files = vae_source(args)
    with loading(flag):
        vae = AutoencoderKL.from_pretrained(source, **files, dtype=torch.float32)
    return vae.requires_grad_(False).to(device)


def latent_statistics(latents: torch.Tensor, vae_config: dict) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and standard deviation of each channel (1, C, 1, 1) where the VAE has them, as Playground v2.5's does."""
    mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
    if mean is None or std is None:
        return 0.0, 1.0
    return latents.new_tensor(mean).view(1, -1, 1, 1), latents.new_tensor(std).view(1, -1, 1, 1)


def scale_latents(latents: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """Latents as the VAE samples them, brought to the scale the denoiser was trained on."""
    mean, std = latent_statistics(latents, vae_config)
    return (latents - mean) * (vae_config["scaling_factor"] / std)


def unscale_latents(latents: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """The inverse of `scale_latents`."""
    mean, std = latent_statistics(latents, vae_config)
    return latents * (std / vae_config["scaling_factor"]) + mean


@torch.no_grad()
def encode_texts(run: Run) -> None:
    """First stage: encode every prompt with the text encoders as they are, then let them go if they will not train."""
    args, pipeline = run.args, load_text_pipeline(run)
    run.scheduler = training_scheduler(pipeline, args)
    prompts = set(run.images.anchor_captions) if args.anchor_weight > 0 else set()
    prompts |= set() if args.train_text_encoder else set(run.images.captions)
    prompts |= {""} if args.caption_dropout > 0 else set()
    for prompt in tqdm(sorted(prompts), desc="Encoding prompts", leave=False):
        conditioning = encode_prompts(pipeline, [prompt], pipeline.device)
        run.embeddings[prompt] = {name: tensor.cpu() for name, tensor in conditioning.items()}
    for prompt in {args.validation_prompt, args.final_validation_prompt} - {None}:
        inputs = encode_for_sampling(pipeline, prompt, pipeline.device)
        run.sampling_inputs[prompt] = {name: tensor.to(run.device) for name, tensor in inputs.items()}
    run.text_pipeline = pipeline if args.train_text_encoder else None


# Copied from train_sap_lora_sd15.text_device
def text_device(run: Run) -> torch.device:
    """Where the text encoders read prompts: with `--offload` on the CPU, unless they train."""
    return torch.device("cpu") if run.args.offload and not run.args.train_text_encoder else run.device


# Copied from train_sap_lora_sd15.place_caches
def place_caches(run: Run) -> None:
    """Bring what micro-steps look up to the device, unless it is more than `CACHE_LIMIT` or `--offload` is given."""
    tensors = [*run.posteriors.values(), *(one for found in run.embeddings.values() for one in found.values())]
    if run.args.offload or sum(tensor.nbytes for tensor in tensors) > CACHE_LIMIT:
        return
    run.posteriors = {key: tensor.to(run.device) for key, tensor in run.posteriors.items()}
    run.embeddings = {
        prompt: {name: tensor.to(run.device) for name, tensor in found.items()}
        for prompt, found in run.embeddings.items()
    }


# Copied from train_sap_lora_sd15.vae_at_work
@contextlib.contextmanager
def vae_at_work(run: Run) -> Iterator[AutoencoderKL]:
    """The VAE on the device: the run's own, which `--offload` rests on the CPU afterwards, or one loaded for this."""
    yield load_vae(run.args, run.device) if run.vae is None else run.vae.to(run.device)
    if run.vae is not None and run.args.offload:
        run.vae.to("cpu")


# Copied from train_sap_lora_sd15.encode_images
@torch.no_grad()
def encode_images(run: Run) -> None:
    """Second stage: encode every picture (and its mirror image) to its posterior, then let the VAE go.

    Where crops are drawn anew at each step the VAE stays instead, and encodes them then.
    """
    vae = load_vae(run.args, run.device)
    run.vae_config = dict(vae.config)
    if not run.images.cacheable:
        run.vae = vae.to("cpu") if run.args.offload else vae
        place_caches(run)
        return
    flips = (False, True) if run.args.random_flip else (False,)
    for index in tqdm(range(len(run.images)), desc="Encoding pictures", leave=False):
        for flipped in flips:
            pixel_values = run.images.pixel_values(index, flipped, run.images.fixed_centering[index])
            posterior = vae.encode(pixel_values[None].to(run.device)).latent_dist
            if not posterior.parameters.isfinite().all():
                name = picture_name(run.images.images, index)
                raise UsageError(
                    f"--pretrained_model_name_or_path: its VAE makes numbers of {name} that are not finite"
                )
            run.posteriors[index, flipped] = posterior.parameters.cpu()
    place_caches(run)


# Copied from train_sap_lora_sd15.load_denoiser
@loading("--pretrained_model_name_or_path")
def load_denoiser(run: Run) -> None:
    """Third stage: the frozen denoiser, in the run's precision."""
    args, config = run.args, quantization_config(run.args, run.dtype)
    placed = {} if config is None else {"quantization_config": config, "device_map": {"": run.device}}
    run.denoiser = DENOISER_CLASS.from_pretrained(
        args.pretrained_model_name_or_path, subfolder=DENOISER, **hub_files(args), dtype=run.dtype, **placed
    )
    if config is None:  # quantised weights are quantised on the device, and stay there
        run.denoiser.to(run.device)
    if args.enable_xformers_memory_efficient_attention:
        run.denoiser.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        run.denoiser.enable_gradient_checkpointing()
    compile_blocks(run)


# Copied from train_sap_lora_sd15.compile_blocks
def compile_blocks(run: Run) -> None:
    """Compile the denoiser's transformer blocks at their first call, if `--compile` asks for it.

    Blocks that are alike share a graph, and no name changes. `accelerate launch --dynamo_backend` asks for it too and
    can name another backend than inductor; accelerate itself would compile the student and leave the anchors out.
    """
    plugin = TorchDynamoPlugin()  # of the launcher
    options = plugin.to_kwargs() if plugin.backend != DynamoBackend.NO else {"backend": "inductor"}
    if not run.args.compile and plugin.backend == DynamoBackend.NO:
        return
    # Student, anchors and validation times the widths of a UNet: more graphs than dynamo makes of one function.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    options = {"dynamic": len(set(run.images.windows)) > 1} | options
    for block in run.denoiser.modules():
        if type(block).__name__ in COMPILED_BLOCKS:
            block.compile(**options)


# ---- LoRA ----


# Copied from train_sap_lora_sd15.lora_targets
def lora_targets(args: argparse.Namespace, name: str) -> list[str]:
    """Endings of the layers that get a LoRA in the pipeline's module `name`."""
    if name != DENOISER:
        return TEXT_ENCODER_TARGETS
    return [layer.strip() for layer in args.lora_layers.split(",")] if args.lora_layers else DENOISER_TARGETS


# Copied from train_sap_lora_sd15.add_adapters
def add_adapters(run: Run) -> None:
    """Freeze the base and add LoRA layers, always in float32: half precision loses small updates.

    Raises:
        UsageError: if `--lora_layers` names no layer.
    """
    args = run.args
    torch.manual_seed(args.seed)  # a LoRA starts at random: at the same place on all ranks
    for name, module in run.adapted().items():
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha or args.rank,
            lora_dropout=args.lora_dropout,
            use_dora=args.use_dora,
            init_lora_weights="gaussian",
            target_modules=lora_targets(args, name),
        )
        module.requires_grad_(False)
        try:
            module.add_adapter(config)
        except ValueError as error:
            raise UsageError(f"--lora_layers: {error}") from error
        cast_training_params(module, torch.float32)
        module.train()


# Copied from train_sap_lora_sd15.lora_layers
def lora_layers(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """The LoRA of each adapted module as peft names it, in float32 on the CPU.

    Text encoders' keys get the `text_model.` that transformers 5.6 dropped: other programs look for it.
    """
    layers = {}
    for name, module in run.adapted().items():
        state = get_peft_model_state_dict(module, save_embedding_layers=False)
        prefix = "text_model." if name in TRAINABLE_TEXT_ENCODERS and not hasattr(module, "text_model") else ""
        layers[name] = {prefix + key: tensor.detach().float().cpu().contiguous() for key, tensor in state.items()}
    return layers


# Copied from train_sap_lora_sd15.to_file_keys
def to_file_keys(name: str, layers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys as upstream's files have them: `lora.down` and `lora.up`, `lora_linear_layer` in text encoders."""
    layers = convert_state_dict_to_diffusers(layers)
    if name in TRAINABLE_TEXT_ENCODERS:  # transformers looks for DoRA's magnitudes under another name than diffusers
        return {key.replace(DORA_KEY, f"{DORA_KEY}.weight"): tensor for key, tensor in layers.items()}
    return layers


# Copied from train_sap_lora_sd15.writing
@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, the output folder is written.

    Raises:
        OutputError: if that fails, for a full disk for instance.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is torch.save's
        reason = str(error).splitlines()[0]
        raise OutputError(
            f"{folder} cannot be written ({reason}): free some space, or copy the folder to another disk; earlier "
            "checkpoints and files in it are whole, and --resume_from_checkpoint latest goes on from there"
        ) from error


# Copied from train_sap_lora_sd15.replacing
@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to inside, which then takes the place of `path`: until it is whole and on the disk, an older
    file stays."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path.parent):
            yield partial
            flush_to_disk(partial)
            os.replace(partial, path)
            flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


# Copied from train_sap_lora_sd15.write_lora
def write_lora(run: Run, folder: Path) -> None:
    """Write the LoRA for `load_lora_weights`; an older file stays whole until the new one is complete."""
    args, arguments = run.args, {}
    check_finite(run)
    for name, layers in lora_layers(run).items():
        arguments[f"{name}_lora_layers"] = to_file_keys(name, layers)
        # Every other field of LoraConfig breaks some older peft; without these alpha would be lost.
        metadata = {"r": args.rank, "lora_alpha": args.lora_alpha or args.rank}
        metadata |= {"target_modules": lora_targets(args, name)} | ({"use_dora": True} if args.use_dora else {})
        arguments[f"{name}_lora_adapter_metadata"] = metadata
    with replacing(folder / LORA_FILE) as partial:
        PIPELINE_CLASS.save_lora_weights(folder, **arguments, weight_name=partial.name)


# Copied from train_sap_lora_sd15.write_kohya_lora
def write_kohya_lora(run: Run, folder: Path) -> None:
    """Write the LoRA with the keys of kohya's tools, which ComfyUI and A1111 read too, text encoder included.

    `diffusers.utils.convert_state_dict_to_kohya` takes the rank for alpha and misses DoRA's and SD1.5's key names.
    """
    alpha, state = run.args.lora_alpha or run.args.rank, {}
    for component, layers in lora_layers(run).items():
        for key, tensor in layers.items():
            module, part = key.split(".lora_")
            name = f"{KOHYA_PREFIXES[component]}_{module.replace('.', '_')}"
            state[f"{name}.{KOHYA_PARTS[part]}"] = tensor if tensor.ndim > 1 else tensor[:, None]
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
    with replacing(folder / KOHYA_FILE) as partial:
        save_file(state, partial, metadata={"format": "pt"})


# Copied from train_sap_lora_sd15.read_lora
def read_lora(run: Run, folder: Path) -> None:
    """Load a checkpoint's LoRA into the adapters.

    Raises:
        UsageError: if its tensors are not exactly those that train in this run.
    """
    stored = load_file(folder / LORA_FILE)
    for name, module in run.adapted().items():
        layers = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        stored = {key: tensor for key, tensor in stored.items() if not key.startswith(f"{name}.")}
        if name == DENOISER:
            layers = convert_unet_state_dict_to_peft(layers)
        elif layers:
            layers = {key.replace(f"{DORA_KEY}.weight", DORA_KEY): tensor for key, tensor in layers.items()}
            layers = convert_state_dict_to_peft(layers)
            if not hasattr(module, "text_model"):
                layers = {key.removeprefix("text_model."): tensor for key, tensor in layers.items()}
        expected = get_peft_model_state_dict(module, save_embedding_layers=False)
        if {key: layers[key].shape for key in layers} != {key: expected[key].shape for key in expected}:
            raise UsageError(f"--resume_from_checkpoint {folder}: its LoRA of {name} has other layers or another rank")
        set_peft_model_state_dict(module, layers)
    if stored:
        raise UsageError(f"--resume_from_checkpoint {folder}: this run does not train {', '.join(sorted(stored)[:3])}")


# ---- Micro-steps ----


@dataclasses.dataclass
class MicroStep:
    """One batch of B samples, drawn and noised, everything in float32 on the device."""

    index: int
    prompts: list[str]
    noisy_latents: torch.Tensor  # (B, C, h, w)
    model_input: torch.Tensor  # (B, C, h, w), the noisy latents as the denoiser wants them
    timesteps: torch.Tensor  # (B,)
    skip: torch.Tensor | float  # (B, 1, 1, 1), how much of the noisy latents is in the denoiser's answer
    scale: torch.Tensor | float  # (B, 1, 1, 1), and how much of its prediction
    target: torch.Tensor  # (B, C, h, w)
    sample_weights: torch.Tensor | float  # (B, 1, 1, 1)
    conditioning: dict[str, torch.Tensor]  # on the subject prompts; without embeddings if text encoders train
    anchor_conditioning: dict[str, torch.Tensor]  # on the class prompts; empty without anchor


# Copied from train_sap_lora_sd15.Student
class Student(torch.nn.Module):
    """The model in training: the denoiser, with the text encoders if they train too.

    As one module it is prepared, synchronised by DDP and accumulated once, whatever trains.
    """

    def __init__(self, denoiser: torch.nn.Module, text_pipeline: PIPELINE_CLASS | None = None):
        super().__init__()
        self.denoiser = denoiser
        self.text_pipeline = text_pipeline
        if text_pipeline is not None:
            self.text_encoders = torch.nn.ModuleList(getattr(text_pipeline, name) for name in TRAINABLE_TEXT_ENCODERS)

    def forward(
        self,
        model_input: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        prompts: list[str],
    ) -> torch.Tensor:
        """The raw prediction (B, C, h, w) for the subject's B prompts."""
        if self.text_pipeline is not None:
            conditioning = conditioning | encode_prompts(self.text_pipeline, prompts, model_input.device)
        return denoise(self.denoiser, model_input, timesteps, conditioning)


# Copied from train_sap_lora_sd15.draw_latents
def draw_latents(run: Run, items: list[dict], generator: torch.Generator) -> torch.Tensor:
    """Sample the posterior of each item anew: scaled latents (B, C, h, w) in float32."""
    if run.vae is None:
        parameters = torch.cat([run.posteriors[item["index"], item["flipped"]] for item in items])
        posterior = DiagonalGaussianDistribution(parameters.to(run.device, non_blocking=True))
    else:
        pixel_values = torch.stack([item["pixel_values"] for item in items])
        with torch.no_grad(), vae_at_work(run) as vae:
            posterior = vae.encode(pixel_values.to(run.device)).latent_dist
    latents = posterior.mean + posterior.std * draw_noise(run, posterior.mean.shape, generator)
    return scale_latents(latents, run.vae_config)


# Copied from train_sap_lora_sd15.draw_noise
def draw_noise(run: Run, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Standard normal numbers from a CPU generator, on the device, without waiting for what it still computes."""
    return torch.randn(shape, generator=generator).to(run.device, non_blocking=True)


# Copied from train_sap_lora_sd15.look_up_embeddings
def look_up_embeddings(run: Run, prompts: list[str]) -> dict[str, torch.Tensor]:
    """The conditioning (B, ...) on B prompts from those encoded beforehand, each sample with its own."""
    found = [run.embeddings[prompt] for prompt in prompts]
    return {name: torch.cat([one[name] for one in found]).to(run.device, non_blocking=True) for name in found[0]}


# Copied from train_sap_lora_sd15.min_snr_weights
def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor | float:
    """Min-SNR weights (B, 1, 1, 1) of arXiv 2303.09556 for noise or v prediction; 1 where `gamma` is None.

    Noise: min(snr, gamma) / snr, written so that it is 1, not 0 / 0, at zero SNR. v: min(snr, gamma) / (snr + 1).
    """
    if gamma is None:
        return 1.0
    snr = compute_snr(scheduler, timesteps)[:, None, None, None]
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def edm_coefficients(
    scheduler: SchedulerMixin, sigmas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """c_in, c_skip and c_out of EDM's table 1 (arXiv 2206.00364), shaped as `sigmas`.

    With noisy latents z the denoised ones are c_skip z + c_out F(c_in z), F being the denoiser's raw prediction.
    """
    if isinstance(scheduler, EDM_SCHEDULERS):
        one, zero = torch.ones_like(sigmas), torch.zeros_like(sigmas)
        c_skip = scheduler.precondition_outputs(one, zero, sigmas)
        return scheduler.precondition_inputs(one, sigmas), c_skip, scheduler.precondition_outputs(zero, one, sigmas)
    c_in = (sigmas**2 + 1).rsqrt()  # a variance-preserving model, in whose scale z has unit variance
    if scheduler.config.prediction_type == "v_prediction":
        return c_in, c_in**2, -sigmas * c_in
    return c_in, torch.ones_like(sigmas), -sigmas


def diffuse(run: Run, latents: torch.Tensor, noise: torch.Tensor, draws: torch.Tensor) -> dict[str, torch.Tensor]:
    """The fields of a `MicroStep` that latents and noise give at the draws (B,) from the scheduler's timesteps.

    EDM: the target is the latents, and 1 / sigma^2 weighs their error as one of the noise.
    """
    scheduler, device = run.scheduler, run.device
    if is_edm(scheduler):
        sigmas = scheduler.sigmas[draws].to(device, non_blocking=True)[:, None, None, None]
        noisy_latents, timesteps = latents + sigmas * noise, scheduler.timesteps[draws].to(device, non_blocking=True)
        scale_input, skip, scale = edm_coefficients(scheduler, sigmas)
        model_input, target, sample_weights = scale_input * noisy_latents, latents, sigmas**-2
    else:
        timesteps, skip, scale = draws.to(device, non_blocking=True), 0.0, 1.0
        model_input = noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        predicts_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if predicts_v else noise
        sample_weights = min_snr_weights(scheduler, timesteps, run.args.snr_gamma)
    return {
        "noisy_latents": noisy_latents,
        "model_input": model_input,
        "timesteps": timesteps,
        "skip": skip,
        "scale": scale,
        "target": target,
        "sample_weights": sample_weights,
    }


def draw_micro_step(run: Run, index: int, items: list[dict]) -> MicroStep:
    """Draw latents, noise and timesteps of one batch. They depend on (seed, rank, index) and the pictures alone."""
    args, scheduler = run.args, run.scheduler
    generator = keyed_generator(args.seed, run.accelerator.process_index, index)
    latents = draw_latents(run, items, generator)
    noise = draw_noise(run, latents.shape, generator)
    draws = torch.randint(scheduler.config.num_train_timesteps, (len(items),), generator=generator)
    prompts = [item["prompt"] for item in items]
    anchor_prompts = [item["anchor_prompt"] for item in items]
    time_ids = {"time_ids": size_conditioning(run.images, items).to(run.device, non_blocking=True)}
    return MicroStep(
        index=index,
        prompts=prompts,
        **diffuse(run, latents, noise, draws),
        conditioning=time_ids | ({} if args.train_text_encoder else look_up_embeddings(run, prompts)),
        anchor_conditioning=time_ids | look_up_embeddings(run, anchor_prompts) if args.anchor_weight > 0 else {},
    )


def to_target_space(prediction: torch.Tensor, step: MicroStep) -> torch.Tensor:
    """The one map of raw predictions, of student and anchor, to what the target is: noise, v, or EDM's latents."""
    return step.skip * step.noisy_latents + step.scale * prediction.float()


# Copied from train_sap_lora_sd15.loss_terms
def loss_terms(
    step: MicroStep, anchor: torch.Tensor | None, student: torch.nn.Module, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Student forward and objective of one micro-step: loss, reconstruction term, anchor term."""
    prediction = student(step.model_input, step.timesteps, step.conditioning, step.prompts)
    return semantic_anchor_loss(
        to_target_space(prediction, step),
        step.target,
        None if anchor is None else to_target_space(anchor, step),
        args.anchor_weight,
        step.sample_weights,
    )


# Copied from train_sap_lora_sd15.anchor_group_size
def anchor_group_size(args: argparse.Namespace) -> int:
    """Micro-steps whose anchors are computed together.

    The finetuned anchor must see the weights of its own optimizer step, so there a group has to divide the step.
    """
    size = max(1, args.anchor_batch_size // args.train_batch_size) if args.anchor_weight > 0 else 1
    if args.anchor_source == "finetuned":
        size = max(n for n in range(1, size + 1) if args.gradient_accumulation_steps % n == 0)
    return size


# Copied from train_sap_lora_sd15.micro_steps
def micro_steps(run: Run, start: int) -> Iterator[tuple[MicroStep, torch.Tensor | None]]:
    """All micro-steps of the run from `start` on, each with its anchor (None without anchor).

    Groups of anchors are counted from the first micro-step of the run and always whole, so that a resumed run puts
    the same samples into the same forward as the run that was not interrupted, and rounds alike.
    """
    args, accelerator, images = run.args, run.accelerator, run.images
    size = anchor_group_size(args)
    stop = args.max_train_steps * args.gradient_accumulation_steps
    sampler = MicroStepSampler(images, args, accelerator.process_index, accelerator.num_processes)
    sampler.start, sampler.stop = start // size * size, math.ceil(stop / size) * size
    workers = 0 if images.cacheable else args.dataloader_num_workers
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=sampler, collate_fn=as_list, num_workers=workers, worker_init_fn=ignore_signals
    )
    numbered = enumerate(loader, sampler.start)
    while group := list(itertools.islice(numbered, size)):
        steps = [draw_micro_step(run, i, items) for i, items in group]
        anchors = [None] * size
        if args.anchor_weight > 0:
            inputs = [(step.model_input, step.timesteps, step.anchor_conditioning) for step in steps]
            with accelerator.autocast():
                anchors = predict_anchors(run.denoiser, denoise, inputs, args.anchor_batch_size, args.anchor_source)
        for step, anchor in zip(steps, anchors, strict=True):
            if start <= step.index < stop:
                yield step, anchor


# ---- Training ----


# Copied from train_sap_lora_sd15.make_optimizer
def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Prodigy over the adapters, with a rate and a weight decay for each kind of module."""
    args, groups = run.args, []
    prodigy = args.optimizer.lower() == "prodigy"
    for name, module in run.adapted().items():
        of_denoiser = name == DENOISER
        groups.append({
            "params": [parameter for parameter in module.parameters() if parameter.requires_grad],
            "lr": args.learning_rate if of_denoiser or prodigy else args.text_encoder_lr,
            "weight_decay": args.adam_weight_decay if of_denoiser else args.adam_weight_decay_text_encoder,
        })  # fmt: skip
    options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if prodigy:
        import prodigyopt

        options |= {name: getattr(args, f"prodigy_{name}")
                    for name in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")}  # fmt: skip
        return prodigyopt.Prodigy(groups, **options)
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options)


# Copied from train_sap_lora_sd15.make_lr_scheduler
def make_lr_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace):
    """The schedule over optimizer steps, whatever the accumulation and the number of processes."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max(args.max_train_steps, args.lr_warmup_steps + 1),  # polynomial divides by the rest
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


# Copied from train_sap_lora_sd15.train
def train(run: Run, checkpoint: Path | None, start: int, progress: tqdm) -> list[Image.Image]:
    """Run the optimizer steps after `start`, the step of `checkpoint`; returns the last validation's pictures."""
    args, accelerator = run.args, run.accelerator
    student = Student(run.denoiser, run.text_pipeline)
    optimizer = make_optimizer(run)
    student, optimizer, lr_scheduler = accelerator.prepare(student, optimizer, make_lr_scheduler(optimizer, args))
    if checkpoint is not None:
        with loading(f"--resume_from_checkpoint {checkpoint}"):
            accelerator.load_state(str(checkpoint))
        accelerator.step = 0  # of micro-steps: one that was stopped between two optimizer steps had begun to count
    run.signals.deferring = True
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    accumulation, pictures, terms = args.gradient_accumulation_steps, [], []
    waiting = []  # for the log: what it shows stays on the device, so that the host can run ahead
    global_step = start
    for step, anchor in micro_steps(run, start * accumulation):
        # LoRA dropout draws from the global generator: key that too.
        torch.manual_seed(keyed_generator(args.seed, accelerator.process_index, step.index, "dropout").initial_seed())
        with accelerator.accumulate(student):
            loss, *parts = loss_terms(step, anchor, student, args)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        terms.append(torch.stack([term.detach() for term in (loss, *parts) if term is not None]))
        if accelerator.sync_gradients:
            global_step = (step.index + 1) // accumulation
            waiting.append((torch.stack(terms).mean(dim=0), lr_scheduler.get_last_lr()[0], global_step))
            lr_scheduler.step()
            terms.clear()
            if log_is_due(args, global_step):
                log_steps(run, progress, waiting)
            if global_step % args.checkpointing_steps == 0:
                save_checkpoint(run, global_step)
        signal_number = agreed_signal(run)
        if not signal_number and accelerator.sync_gradients and validation_is_due(args, global_step):
            pictures = validate(run, args.validation_prompt, "validation", global_step)
            signal_number = agreed_signal(run)
        if signal_number:
            log_steps(run, progress, waiting)
            progress.close()
            stop(run, start, global_step, signal_number)
    run.signals.deferring = False
    return pictures


# Copied from train_sap_lora_sd15.log_is_due
def log_is_due(args: argparse.Namespace, global_step: int) -> bool:
    """Whether losses are fetched after this step: every --logging_steps, and before a checkpoint keeps the LoRA."""
    kept = global_step % args.checkpointing_steps == 0 or global_step == args.max_train_steps
    return kept or global_step % args.logging_steps == 0


# Copied from train_sap_lora_sd15.log_steps
def log_steps(run: Run, progress: tqdm, waiting: list[tuple[torch.Tensor, float, int]]) -> None:
    """Fetch the terms of all optimizer steps that wait, at once, and log each step; nothing waits afterwards."""
    if not waiting:
        return
    terms, rates, numbers = zip(*waiting, strict=True)
    rows = run.accelerator.reduce(torch.stack(terms), reduction="mean").tolist()
    for values, lr, global_step in zip(rows, rates, numbers, strict=True):
        log_step(run, progress, values, lr, global_step)
    waiting.clear()


# Copied from train_sap_lora_sd15.log_step
def log_step(run: Run, progress: tqdm, values: list[float], lr: float, global_step: int) -> None:
    """Log one optimizer step: the terms of its micro-steps, averaged over them and over the ranks.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    logs = dict(zip(("loss", "loss/reconstruction", "loss/anchor"), values, strict=False)) | {"lr": lr}
    progress.update(1)
    progress.set_postfix({name.removeprefix("loss/"): f"{value:.4g}" for name, value in logs.items()})
    run.accelerator.log(logs, step=global_step)
    if not math.isfinite(values[0]):
        raise not_finite(run, f"the loss of step {global_step} is {values[0]}", global_step)


# Copied from train_sap_lora_sd15.not_finite
def not_finite(run: Run, what: str, global_step: int | None = None) -> FloatingPointError:
    """The error for numbers that are not finite: what they are of, which pictures made them, and likely causes."""
    args, ranks, names = run.args, run.accelerator.num_processes, []
    if global_step is not None:
        for rank in range(ranks):
            sampler = MicroStepSampler(run.images, args, rank, ranks)
            sampler.stop = global_step * args.gradient_accumulation_steps
            sampler.start = sampler.stop - args.gradient_accumulation_steps
            names += [picture_name(run.images.images, index) for batch in sampler for index, _ in batch]
        what += f", with {', '.join(sorted(set(names))[:8])}"
    causes = [f"--learning_rate {args.learning_rate:g} may be too high"]
    if run.accelerator.mixed_precision == "fp16":
        causes.append("--mixed_precision fp16 overflows where bf16 does not")
    causes.append("the base may be damaged, or hold numbers that are too large")
    kept = list(list_checkpoints(Path(args.output_dir)))
    kept = f"checkpoint-{kept[-1]} is the last one" if kept else "there is no checkpoint"
    return FloatingPointError(f"{what}. Likely causes: {'; '.join(causes)}. No file of the output changed; {kept}")


# Copied from train_sap_lora_sd15.check_finite
def check_finite(run: Run) -> None:
    """Raise `FloatingPointError` if the LoRA in memory holds a number that is not finite: it must reach no file."""
    for name, module in run.adapted().items():
        trained = [parameter.isfinite().all() for parameter in module.parameters() if parameter.requires_grad]
        if not torch.stack(trained).all():
            raise not_finite(run, f"the LoRA of {name} is no longer finite")


# Copied from train_sap_lora_sd15.agreed_signal
def agreed_signal(run: Run) -> int:
    """The number of the signal that asked any rank to stop, the same on all ranks, or 0.

    A single process looks after each micro-step; several ask one another, and so only after each optimizer step.
    """
    accelerator, received = run.accelerator, run.signals.received
    if accelerator.num_processes == 1:
        return received
    if not accelerator.sync_gradients:
        return 0
    return int(accelerator.gather(torch.tensor([received], device=run.device)).max())


# Copied from train_sap_lora_sd15.stop
def stop(run: Run, start: int, global_step: int, signal_number: int) -> None:
    """Keep what was trained, as the signal asked: a checkpoint of the last optimizer step and the LoRA so far.

    Micro-steps after that step have changed nothing but gradients: they are drawn again when the run goes on.

    Raises:
        SystemExit: always, with the status that a shell gives to a program that ended by this signal.
    """
    args, name = run.args, signal.Signals(signal_number).name
    if global_step > start and global_step % args.checkpointing_steps:
        save_checkpoint(run, global_step)
    if run.accelerator.is_main_process and global_step > 0:
        write_lora(run, Path(args.output_dir))
    run.accelerator.end_training()
    logger.warning(
        f"{name}: stopped after step {global_step} of {args.max_train_steps}. "
        "To go on, add --resume_from_checkpoint latest to the same command"
    )
    sys.exit(128 + signal_number)


# Copied from train_sap_lora_sd15.validation_is_due
def validation_is_due(args: argparse.Namespace, global_step: int) -> bool:
    """Whether pictures are made after this step: every --validation_steps, or at the end of due epochs."""
    if args.validation_prompt is None or args.num_validation_images == 0:
        return False
    if args.validation_steps is not None:
        return global_step % args.validation_steps == 0
    epoch, position = divmod(global_step - 1, args.steps_per_epoch)
    ends = position == args.steps_per_epoch - 1 or global_step == args.max_train_steps
    return ends and epoch % args.validation_epochs == 0


# ---- Checkpoints ----


# Copied from train_sap_lora_sd15.register_checkpoint_hooks
def register_checkpoint_hooks(run: Run) -> None:
    """Let accelerate's checkpoints hold the LoRA in place of the whole model."""

    def save(models: list, weights: list, folder: str) -> None:
        weights.clear()
        if run.accelerator.is_main_process:
            write_lora(run, Path(folder))

    def load(models: list, folder: str) -> None:
        models.clear()
        read_lora(run, Path(folder))

    run.accelerator.register_save_state_pre_hook(save)
    run.accelerator.register_load_state_pre_hook(load)


# Copied from train_sap_lora_sd15.read_json
def read_json(path: Path) -> dict:
    """What a JSON file holds; empty if it is not there or not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# Copied from train_sap_lora_sd15.file_sizes
def file_sizes(folder: Path, pattern: str = "*") -> dict[str, int]:
    """The size of each file in a folder, by name."""
    return {path.name: path.stat().st_size for path in folder.glob(pattern) if path.is_file()}


# Copied from train_sap_lora_sd15.is_complete
def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint and holds all that was written into it."""
    state = read_json(checkpoint / STATE_FILE)
    return "global_step" in state and state.get("files", {}).items() <= file_sizes(checkpoint).items()


# Copied from train_sap_lora_sd15.list_checkpoints
def list_checkpoints(output_dir: Path, complete: bool = True) -> dict[int, Path]:
    """Checkpoints of an output folder by step, in order; anything else that is there is left alone."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and is_complete(path) == complete:
            found[int(number)] = path
    return dict(sorted(found.items()))


# Copied from train_sap_lora_sd15.save_checkpoint
def save_checkpoint(run: Run, global_step: int) -> None:
    """Write a checkpoint beside its final name, rename it, and only then remove those over the limit."""
    args, accelerator = run.args, run.accelerator
    check_finite(run)
    output_dir = Path(args.output_dir)
    final = output_dir / f"checkpoint-{global_step}"
    partial = output_dir / f".{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    with writing(output_dir):
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        state = {"global_step": global_step, "seed": args.seed, "files": file_sizes(partial), **run.record}
        (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
        publish(partial, final)
    logger.info(f"Checkpoint: {final}")
    older = [path for step, path in list_checkpoints(output_dir).items() if step < global_step]
    if args.checkpoints_total_limit is not None:
        for path in older[: max(0, len(older) + 1 - args.checkpoints_total_limit)]:
            shutil.rmtree(path)


# Copied from train_sap_lora_sd15.flush_to_disk
def flush_to_disk(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk now.

    Without it a rename may outlive a power cut that the content of the renamed file does not.
    """
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Not every network file system can do it for a folder, and it is no loss there.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Copied from train_sap_lora_sd15.publish
def publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name. At each moment in between it is whole under one name or another."""
    replaced = final.with_name(f".{final.name}.old")
    if final.exists():  # of an older run in the same folder
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(partial, final)
    flush_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


# Copied from train_sap_lora_sd15.tidy_checkpoints
def tidy_checkpoints(output_dir: Path) -> None:
    """Bring an output folder in order after a run that was killed while it wrote or replaced a checkpoint."""
    for partial in sorted(output_dir.glob(".checkpoint-*.partial")):
        final = output_dir / partial.name[1:].removesuffix(".partial")
        if is_complete(partial):
            publish(partial, final)
        else:
            logger.warning(f"{final} was not complete when the last run ended: it is skipped")
            shutil.rmtree(partial)
    for replaced in sorted(output_dir.glob(".checkpoint-*.old")):
        final = output_dir / replaced.name[1:].removesuffix(".old")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, final)


# Copied from train_sap_lora_sd15.find_checkpoint
def find_checkpoint(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: "latest", a name in the output folder, or a path.

    Raises:
        UsageError: if a named one is not there or not complete, or holds what this script did not write.
    """
    wanted, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    if accelerator.is_main_process:
        tidy_checkpoints(output_dir)
    accelerator.wait_for_everyone()
    if wanted is None:
        return None
    if wanted == "latest":
        checkpoints = list(list_checkpoints(output_dir).values())
        for path in list_checkpoints(output_dir, complete=False).values():
            logger.warning(f"{path} is not complete: it is skipped")
        if not checkpoints:
            logger.info(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint, the run starts at step 0")
            return None
        check_pickles(checkpoints[-1])
        return checkpoints[-1]
    for path in (output_dir / wanted, Path(wanted)):
        if is_complete(path):
            check_pickles(path)
            return path
    raise UsageError(f"--resume_from_checkpoint {wanted}: no complete checkpoint there or in {output_dir}")


# Copied from train_sap_lora_sd15.check_pickles
def check_pickles(checkpoint: Path) -> None:
    """Read what accelerate keeps as pickles (the optimizer, its schedule, random states) as plain data, before use.

    Raises:
        UsageError: for one that is damaged, or holds anything but numbers and tensors, or was put there by others.
    """
    files = read_json(checkpoint / STATE_FILE).get("files")
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix not in (".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt"):
            continue
        foreign = path.name.startswith("custom_checkpoint") or (files is not None and path.name not in files)
        reason = "this script did not write it" if foreign else None
        try:
            load_pickle(path, map_location="cpu")  # with weights_only=True
        except pickle.UnpicklingError:
            reason = "it holds Python code, or is damaged"
        except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
            reason = f"it is damaged ({str(error).splitlines()[0]})" if str(error) else "it is damaged"
        if reason is not None:
            raise UsageError(f"--resume_from_checkpoint {checkpoint}: {path.name} is refused, {reason}")


# ---- Resuming: what makes two runs the same ----


# Copied from train_sap_lora_sd15.content_digest
def content_digest(source: Path | Image.Image) -> str:
    """A short hash of a picture's file, or of its pixels where it comes from a dataset."""
    content = source.read_bytes() if isinstance(source, Path) else repr((source.mode, source.size)).encode()
    content += b"" if isinstance(source, Path) else source.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# Copied from train_sap_lora_sd15.base_identity
def base_identity(args: argparse.Namespace) -> str:
    """The base pipeline as a checkpoint records it: its name on the hub, or what a local folder holds, moved or not.

    Of each file of its parts the name, the size and the first megabyte count.
    """
    base = Path(args.pretrained_model_name_or_path)
    if not base.is_dir():
        return args.pretrained_model_name_or_path
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for part in BASE_PARTS for path in (base / part).rglob("*") if path.is_file()):
        digest.update(repr((path.relative_to(base).as_posix(), path.stat().st_size)).encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return f"a folder with the content {digest.hexdigest()}"


# Copied from train_sap_lora_sd15.picture_name
def picture_name(pictures: Sequence, index: int) -> str:
    """How a message names a picture: by its file, or by its place in the dataset."""
    return pictures[index].name if isinstance(pictures[index], Path) else f"picture {index}"


# Copied from train_sap_lora_sd15.describe_run
def describe_run(args: argparse.Namespace, images: SubjectImages, accelerator: Accelerator) -> dict:
    """What a checkpoint records of its run, as JSON has it: all that its result depends on.

    That is every flag but those of `FREE_ON_RESUME` and secrets, and for each picture in its order the name, a hash
    of the content, the caption and the anchor caption.
    """
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME | SECRETS}
    settings["pretrained_model_name_or_path"] = base_identity(args)
    settings["mixed_precision"] = accelerator.mixed_precision
    settings["num_processes"] = accelerator.num_processes
    pictures = []
    for i, source in enumerate(images.images):
        pictures.append(
            [picture_name(images.images, i), content_digest(source), images.captions[i], images.anchor_captions[i]]
        )
    record = {"max_train_steps": args.max_train_steps, "settings": settings, "pictures": pictures}
    return json.loads(json.dumps(record))


# Copied from train_sap_lora_sd15.differences
def differences(was: dict, now: dict) -> list[str]:
    """How the records of two runs differ, each in a few words. Flags that one does not know are left out."""
    before, after = was["settings"], now["settings"]
    names = [name for name in after if name in before and before[name] != after[name]]
    found = [f"--{name} was {before[name]}, is {after[name]}" for name in names]
    steps = [was["max_train_steps"], now["max_train_steps"]]
    if steps[0] != steps[1] and not after["lr_scheduler"].startswith("constant"):
        found.append(f"--max_train_steps was {steps[0]}, is {steps[1]}, on which --lr_scheduler depends")
    if [row[0] for row in was["pictures"]] != [row[0] for row in now["pictures"]]:
        lists = [", ".join(row[0] for row in record["pictures"]) for record in (was, now)]
        return [*found, f"the pictures were {lists[0]}, are {lists[1]}"]
    for one, other in zip(was["pictures"], now["pictures"], strict=True):
        if one[1] != other[1]:
            found.append(f"{one[0]} is another picture")
        if one[2:] != other[2:]:
            found.append(f"the captions of {one[0]} were {one[2:]}, are {other[2:]}")
    return found


# Copied from train_sap_lora_sd15.check_same_run
def check_same_run(record: dict, state: dict, checkpoint: Path) -> None:
    """Compare this run (`describe_run`) with that of a checkpoint.

    Raises:
        UsageError: if going on would silently make the result of neither run; it names each difference.
    """
    flag = f"--resume_from_checkpoint {checkpoint}"
    if "settings" not in state:
        logger.warning(f"{flag} does not record its settings: whether this run has the same ones is not checked")
        return
    before, after = state["settings"]["num_processes"], record["settings"]["num_processes"]
    if before != after:
        raise UsageError(
            f"{flag} was trained by {before} processes, this run has {after}: a step would see {after} batches where "
            f"it saw {before}, and other ones; start {before} processes, or a new run in another --output_dir"
        )
    found = differences(state, record)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise UsageError(
            f"{flag} is of another run: {'; '.join(found[:3])}{more}; go on with what was, or start a new run in "
            "another --output_dir"
        )


# Copied from train_sap_lora_sd15.read_finished
def read_finished(args: argparse.Namespace) -> dict:
    """What `mark_finished` left in the output folder, if `latest` is to go on there and its LoRA is still in place."""
    folder = Path(args.output_dir)
    record = read_json(folder / FINISHED_FILE) if args.resume_from_checkpoint == "latest" else {}
    return record if record.get("files", {}).items() <= file_sizes(folder).items() else {}


# Copied from train_sap_lora_sd15.is_finished
def is_finished(args: argparse.Namespace, record: dict, finished: dict) -> bool:
    """Whether the run that ended in the output folder is this one, as far as this one is to go, with all its files."""
    if not finished or differences(finished, record) or finished["max_train_steps"] < args.max_train_steps:
        return False
    return not args.output_kohya_format or any("kohya" in name for name in finished["files"])


# Copied from train_sap_lora_sd15.mark_finished
def mark_finished(args: argparse.Namespace, record: dict) -> None:
    """Leave word that the run is at its end, for `read_finished`."""
    folder = Path(args.output_dir)
    record = {"seed": args.seed, "files": file_sizes(folder, "pytorch_lora_weights*.safetensors"), **record}
    with replacing(folder / FINISHED_FILE) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")


# ---- Pictures, card, upload ----


def sampling_pipeline(run: Run) -> PIPELINE_CLASS:
    """A pipeline for ready embeddings around the denoiser in memory, with the sampler of upstream's validation."""
    sampler = type(run.scheduler) if is_edm(run.scheduler) else DPMSolverMultistepScheduler
    text_parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = sampler.from_config(run.scheduler.config)
    pipeline = PIPELINE_CLASS(
        vae=None, unet=run.denoiser, scheduler=scheduler, add_watermarker=False, **text_parts, **UNUSED_PARTS
    )
    pipeline.vae_scale_factor = 2 ** (len(run.vae_config["block_out_channels"]) - 1)  # the VAE comes later
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Copied from train_sap_lora_sd15.sample_images
@torch.no_grad()
def sample_images(run: Run, prompt: str, **sampling: int) -> list[Image.Image]:
    """Pictures of the model as it is, from `--seed`: denoised in the run's precision, decoded in float32.

    `sampling` goes to the pipeline's call, such as `num_inference_steps`.
    """
    args, modules = run.args, list(run.adapted().values())
    modes = [module.training for module in modules]
    pipeline = sampling_pipeline(run)
    generator = torch.Generator().manual_seed(args.seed)
    options = {"height": args.resolution, "width": args.resolution, "output_type": "latent", **sampling}
    latents = []
    try:
        for module in modules:
            module.eval()
        with run.accelerator.autocast():
            inputs = run.sampling_inputs[prompt]
            if run.text_pipeline is not None:
                inputs = encode_for_sampling(run.text_pipeline, prompt, run.device)
            for _ in tqdm(range(args.num_validation_images), desc="Pictures", leave=False):
                if run.signals.received:  # who asked to stop may not wait for all of them
                    break
                latents.append(pipeline(**inputs, **options, generator=generator).images)
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
    with vae_at_work(run) as vae:
        decoded = [vae.decode(unscale_latents(one.float(), run.vae_config)).sample for one in latents]
    return [VaeImageProcessor().postprocess(pixels, output_type="pil")[0] for pixels in decoded]


# Copied from train_sap_lora_sd15.validate
def validate(run: Run, prompt: str, tag: str, step: int, **sampling: int) -> list[Image.Image]:
    """Make pictures on the main process, until a request to stop, and show them to the trackers under `tag`."""
    pictures = []
    if run.accelerator.is_main_process:
        pictures = sample_images(run, prompt, **sampling)
        free_memory()
        for tracker in run.accelerator.trackers if pictures else []:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if tracker.name in ("tensorboard", "wandb"):
                tracker.log_images({tag: np.stack([np.asarray(p) for p in pictures])}, step=step, **layout)
    run.accelerator.wait_for_everyone()
    return pictures


def card_tags(args: argparse.Namespace) -> list[str]:
    """The hub's tags for this kind of base."""
    return ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]


# Copied from train_sap_lora_sd15.absent_parts
def absent_parts(args: argparse.Namespace) -> dict[str, None]:
    """Parts of the pipeline that `from_pretrained` has to be told are not there: none for this kind of base."""
    return {}


# Copied from train_sap_lora_sd15.write_model_card
def write_model_card(args: argparse.Namespace, pictures: list[Image.Image], prompt: str | None) -> None:
    """Write README.md, which the hub shows as the model's page, and the pictures it shows."""
    folder = Path(args.output_dir)
    for i, picture in enumerate(pictures):
        with replacing(folder / f"image_{i}.png") as partial:
            picture.save(partial, format="PNG")
    tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", *card_tags(args)]
    data = ModelCardData(
        base_model=args.pretrained_model_name_or_path,
        instance_prompt=args.instance_prompt,
        library_name="diffusers",
        license=CARD_LICENSE,
        tags=tags,
        widget=[{"text": prompt, "output": {"url": f"image_{i}.png"}} for i in range(len(pictures))] or None,
    )
    absent = [f"{name}={part}" for name, part in absent_parts(args).items()]
    base = ", ".join([repr(args.pretrained_model_name_or_path), *absent])
    anchored = f"w = {args.anchor_weight:g}, class prompt `{args.class_prompt or 'one for each caption'}`"
    text = f"""---
{data.to_yaml()}
---

# LoRA for `{args.instance_prompt}`

A LoRA of rank {args.rank} for {args.pretrained_model_name_or_path}, trained with [Semantic Anchoring
Personalization]({PAPER}): {anchored if args.anchor_weight > 0 else "w = 0, without anchor"}.
Text encoders: {"trained too" if args.train_text_encoder else "not trained"}.

## Use

```python
import torch
from diffusers import {PIPELINE_CLASS.__name__}

pipeline = {PIPELINE_CLASS.__name__}.from_pretrained({base}, dtype=torch.float16)
pipeline.load_lora_weights({(args.hub_model_id or args.output_dir)!r}, weight_name={LORA_FILE!r})
image = pipeline.to("cuda")({(prompt or args.instance_prompt)!r}).images[0]
```
"""
    with replacing(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")


# Copied from train_sap_lora_sd15.open_repo
def open_repo(args: argparse.Namespace) -> str:
    """Make the hub repository if it is not there, before the training that it is for; returns its name.

    Raises:
        UsageError: if the hub refuses or cannot be reached.
    """
    try:
        return create_repo(
            args.hub_model_id or Path(args.output_dir).name, exist_ok=True, token=args.hub_token
        ).repo_id
    except OSError as error:  # of the network, a missing token, a refusal: huggingface_hub derives them all from this
        raise UsageError(f"--push_to_hub: {str(error).splitlines()[0]}; try `hf auth login`") from error


# Copied from train_sap_lora_sd15.push
def push(args: argparse.Namespace, repo_id: str) -> None:
    """Upload the LoRA, the card and its pictures; logs, checkpoints and anything else stay here."""
    upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        allow_patterns=["pytorch_lora_weights*.safetensors", "README.md", "image_*.png"],
        commit_message="SAP-LoRA",
        token=args.hub_token,
    )


# ---- The run ----


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set up logging, precision, processes and trackers."""
    output_dir = Path(args.output_dir)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / args.logging_dir)),
            step_scheduler_with_optimizer=False,
            dynamo_backend="no",  # of the whole student: see compile_blocks
            # SDXL reads its text encoders' last layer but one: the LoRA of the first one's last gets no gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.train_text_encoder)],
        )
    except ValueError as error:
        raise UsageError(f"--mixed_precision {args.mixed_precision}, --report_to {args.report_to}: {error}") from error
    check_launch(accelerator)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.is_main_process:
        check_output_dir(output_dir)
    return accelerator


# Copied from train_sap_lora_sd15.check_output_dir
def check_output_dir(output_dir: Path) -> None:
    """Make the output folder, and a file in it that goes again.

    Raises:
        UsageError: if that cannot be done.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UsageError(
            f"--output_dir {output_dir} cannot be written ({error.strerror}): take another one"
        ) from error


# Copied from train_sap_lora_sd15.check_launch
def check_launch(accelerator: Accelerator) -> None:
    """Raise `UsageError` for ways to spread a run over devices that these scripts do not know.

    DeepSpeed casts the LoRA to half precision and keeps the whole base in its checkpoints, as pickles; under FSDP the
    anchors' forward, which goes past the wrapper, would meet parameters that are not gathered.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise UsageError(
            f"accelerate is configured for {kind.value}, by which this script cannot train: choose distributed_type "
            "MULTI_GPU; a LoRA's gradients and optimizer state are small, so DDP serves as well"
        )


# Copied from train_sap_lora_sd15.start_trackers
def start_trackers(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Tell the trackers the command line, without secrets."""
    config = {name: value for name, value in vars(args).items() if name not in SECRETS}
    accelerator.init_trackers(TRACKER, {k: v for k, v in config.items() if isinstance(v, (int, float, str))})


# Copied from train_sap_lora_sd15.announce
def announce(run: Run) -> None:
    """Say in plain words what the run will do."""
    args, images, modules = run.args, run.images, run.adapted().values()
    trained = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    captions = len(set(images.captions))
    anchor = f'"{images.anchor_captions[0]}", w = {args.anchor_weight:g}' if args.anchor_weight > 0 else "none (w = 0)"
    batch = args.train_batch_size * args.gradient_accumulation_steps * run.accelerator.num_processes
    logger.info(f"Pictures: {len(images)}, with {captions} {'captions' if captions > 1 else 'caption'}")
    logger.info(f'Subject:  "{images.captions[0]}"')
    logger.info(f"Anchor:   {anchor}")
    logger.info(f"Training: {args.max_train_steps} steps of {batch} samples, {trained:,} parameters, seed {args.seed}")
    logger.info(f"Output:   {Path(args.output_dir) / LORA_FILE}")


# Copied from train_sap_lora_sd15.plan
def plan(args: argparse.Namespace, images: SubjectImages, processes: int) -> None:
    """Settle what depends on the pictures and the processes: epochs, steps and the scaled learning rate."""
    batches = MicroStepSampler(images, args, 0, 1).batches_per_epoch
    args.steps_per_epoch = math.ceil(batches / (processes * args.gradient_accumulation_steps))
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * args.steps_per_epoch
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * processes


# Copied from train_sap_lora_sd15.choose_seed
def choose_seed(args: argparse.Namespace, state: dict) -> int:
    """The seed of the command line, or of the checkpoint, or a new one; the same on all ranks."""
    seed = args.seed if args.seed is not None else state.get("seed", secrets.randbelow(2**32))
    return broadcast_object_list([seed])[0]


# Copied from train_sap_lora_sd15.finish
def finish(run: Run, pictures: list[Image.Image], repo_id: str | None) -> None:
    """Write the LoRA before anything that can fail; then the last pictures, the card and the upload."""
    args, folder = run.args, Path(run.args.output_dir)
    if run.accelerator.is_main_process:
        write_lora(run, folder)
        if args.output_kohya_format:
            write_kohya_lora(run, folder)
    prompt = args.final_validation_prompt or args.validation_prompt
    if prompt is not None and args.num_validation_images > 0 and not args.skip_final_inference:
        pictures = validate(run, prompt, "test", args.max_train_steps, **FINAL_SAMPLING)
    else:
        prompt = args.validation_prompt
    if run.accelerator.is_main_process:
        write_model_card(args, pictures, prompt)
        if repo_id is not None:
            push(args, repo_id)
        logger.info(f"Written: {folder / LORA_FILE}; use it with pipeline.load_lora_weights({args.output_dir!r})")


# Copied from train_sap_lora_sd15.main
def main(args: argparse.Namespace) -> None:
    """Train as the command line says, through the stages of the module docstring.

    Raises:
        UsageError: for what the user can mend, before a model is loaded where it can be known then.
    """
    with StopSignals() as signals:
        run_stages(argparse.Namespace(**vars(args)), signals)


# Copied from train_sap_lora_sd15.run_stages
def run_stages(args: argparse.Namespace, signals: StopSignals) -> None:
    """What `main` does; `args` is settled on the way."""
    accelerator = start_accelerator(args)
    warn_about_arguments(args)
    check_pipeline(args)
    checkpoint, finished = find_checkpoint(args, accelerator), read_finished(args)
    state = read_json(checkpoint / STATE_FILE) if checkpoint is not None else {}
    start = state.get("global_step", 0)
    args.seed = choose_seed(args, state or finished)
    images = load_subject_images(args)
    plan(args, images, accelerator.num_processes)
    record = describe_run(args, images, accelerator)
    if is_finished(args, record, finished):
        logger.info(
            f"{args.output_dir} holds the finished run of {finished['max_train_steps']} steps: nothing is left"
        )
        return
    if checkpoint is not None:
        check_same_run(record, state, checkpoint)
    repo_id = open_repo(args) if args.push_to_hub and accelerator.is_main_process else None

    run = Run(args, accelerator, images, record, signals)
    for stage in (encode_texts, encode_images, load_denoiser, add_adapters):
        stage(run)
        free_memory()  # of what the stage let go
    register_checkpoint_hooks(run)
    announce(run)
    start_trackers(accelerator, args)
    if start >= args.max_train_steps:
        logger.info(f"{checkpoint} already has {start} of {args.max_train_steps} steps: nothing is left to train")
    if accelerator.is_main_process:
        (Path(args.output_dir) / FINISHED_FILE).unlink(missing_ok=True)
    with tqdm(total=args.max_train_steps, initial=start, desc="Steps") as progress:  # closed before an error is told
        pictures = train(run, checkpoint, start, progress)
    finish(run, pictures, repo_id)
    if accelerator.is_main_process:
        mark_finished(args, record)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except UsageError as usage_error:
        print(f"{Path(__file__).name}: error: {usage_error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, OutputError) as training_error:
        print(f"{Path(__file__).name}: error: {training_error}", file=sys.stderr)
        sys.exit(1)
