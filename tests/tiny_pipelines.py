# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of the genuine classes, with random weights, written to disk.

A test calls `save_sd15(folder)` (or `save_sdxl`, `save_sd3`) and hands the folder to a training script as
`--pretrained_model_name_or_path`: the real loading code runs, offline, in a fraction of a second. Weights are float32
safetensors and the same on every call; the caller's random state is left alone.

Three things make these pipelines behave like trained ones where a test looks: prompts change the denoiser's output
(`_amplify_prompts`), latents have unit variance and follow the picture (`_calibrate_vae`), and the words in `WORDS`
are one token each, so that ordinary prompts are not cut off at 77 tokens.
"""

import contextlib
import inspect
import json
import string
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SIDE = 64  # pixels of a square sample when the caller names no size: sample_size 8 at the VAE's factor 8

WORDS = """a an and at beach black blue brown cat class dog drawing female flower forest front grass green house image
    in is male mountain of on painting person photo picture portrait purple red running sitting sks small snow
    standing star teapot the token toy tree under water wearing white wooden with yellow zwx""".split()


@contextlib.contextmanager
def _seeded(seed=0):
    """Draw the same random numbers every time, then give the caller's random state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# --------------------------------------------------------------------------------------------------------- tokenizers


def _merge(pieces, pair):
    """Join every neighbouring `pair` in a list of pieces."""
    joined, i = [], 0
    while i < len(pieces):
        hit = tuple(pieces[i : i + 2]) == pair
        joined.append("".join(pair) if hit else pieces[i])
        i += 2 if hit else 1
    return joined


def _merges_for(words):
    """Byte-pair merges that make each word one token.

    A word is cut with the merges found so far and its remaining pieces are chained from the left. Later merges rank
    lower, so they never disturb an earlier word.
    """
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    return merges


def clip_tokenizer(pad_token="<|endoftext|>"):
    """Build a byte-level CLIPTokenizer: any text becomes tokens, unlike words become unlike ones.

    Ids lie as in CLIP's: letters first ("!" is 0), then letters at a word's end, merges, start and end of text.
    SDXL and SD3 pad their second tokenizer with "!".
    """
    letters = sorted(ByteLevel.alphabet())
    merges = _merges_for(WORDS)
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer():
    """Build a Unigram T5 tokenizer of ASCII letters and whole words; other letters become <unk>."""
    letters = [letter for letter in string.printable if not letter.isspace()]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [(letter, -4.0) for letter in letters] + [("▁" + word, -2.0) for word in WORDS]
    vocab = list(dict(vocab).items())
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


# ------------------------------------------------------------------------------------------------------ text encoders


def _clip(tokenizer, hidden_size=32, projection_dim=None, hidden_act="quick_gelu", with_projection=True):
    """Build a two-layer CLIP text tower for a tokenizer; without projection it is SD1.5's plain CLIPTextModel."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=projection_dim or hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=3.0,  # at 1 every token's embedding is nearly the same
    )
    model = (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)
    return model.eval()


def _t5(tokenizer, width):
    """Build a two-layer T5 encoder (gated GELU, as T5 v1.1 has it)."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=width,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config).eval()


# --------------------------------------------------------------------------------------------------------------- VAEs


def _vae(**overrides):
    """Build a factor-8 AutoencoderKL; overrides are configuration entries."""
    config = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "sample_size": SIDE,
    }
    vae = AutoencoderKL(**(config | overrides)).eval()
    _calibrate_vae(vae)
    return vae


@torch.no_grad()
def _calibrate_vae(vae):
    """Give a random VAE a trained one's posterior: unit variance once scaled, and a small standard deviation."""
    config = vae.config
    mean, std = _latent_statistics(config)
    images = 2 * torch.rand(4, 3, 8, 8).repeat_interleave(8, -1).repeat_interleave(8, -2) - 1
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    means = vae.encode(images).latent_dist.mean
    gain = std / means.std((0, 2, 3))
    channels = config.latent_channels
    last.weight[:channels] *= gain[:, None, None, None]
    last.bias[:channels] = gain * (last.bias[:channels] - means.mean((0, 2, 3))) + mean
    last.weight[channels:] *= 0.1
    last.bias[channels:] = 2 * torch.log(0.05 * std)


def _latent_statistics(config):
    """Return per-channel mean and standard deviation of the unscaled latents that a VAE configuration implies."""
    channels = config.latent_channels
    if config.latents_mean is not None:
        return torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    shift = config.shift_factor or 0.0
    return torch.full((channels,), shift), torch.full((channels,), 1 / config.scaling_factor)


def save_vae(folder, seed=1, **overrides):
    """Save a separate AutoencoderKL, unlike the pipelines' own; overrides are configuration entries."""
    with _seeded(seed):
        _vae(**overrides).save_pretrained(folder)
    return Path(folder)


# ---------------------------------------------------------------------------------------------------------- denoisers


@torch.no_grad()
def _amplify_prompts(denoiser, gain):
    """Scale what the prompt contributes: at random initialisation attention averages the tokens almost away."""
    names = ("attn.add_k_proj", "attn.add_v_proj", "context_embedder")  # SD3, whose attn2 sees no prompt
    if isinstance(denoiser, UNet2DConditionModel):
        names = ("attn2.to_q", "attn2.to_v", "attn2.to_out.0")
    for name, module in denoiser.named_modules():
        if name.endswith(names):
            module.weight *= gain


def _unet(layers_per_block=1, **config):
    """Build a two-level UNet2DConditionModel; `attention_head_dim` is, as ever, the number of heads."""
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 64),
        layers_per_block=layers_per_block,
        norm_num_groups=8,
        **config,
    )
    _amplify_prompts(unet, 2.0)
    return unet.eval()


def _transformer(joint_width, pooled_width, dual_attention):
    """Build a two-layer SD3 transformer; with dual attention its first layer has SD3.5-medium's `attn2`."""
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint_width,
        caption_projection_dim=32,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=32,
        dual_attention_layers=(0,) if dual_attention else (),
        qk_norm="rms_norm" if dual_attention else None,
    )
    _amplify_prompts(transformer, 2.0)
    return transformer.eval()


# ---------------------------------------------------------------------------------------------------------- pipelines


def _set_config(folder, **entries):
    """Add entries to a saved scheduler's configuration: the published ones carry keys of other schedulers."""
    path = Path(folder, "scheduler", "scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2, sort_keys=True) + "\n")


def _diffusion_betas(prediction_type):
    """Return the noise schedule that SD1.5 and SDXL share."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }


def save_sd15(folder, prediction_type="epsilon", **scheduler_overrides):
    """Save a StableDiffusionPipeline.

    The scheduler is SD1.5's PNDM, or DDIM where an override is a key that only DDIM knows (`rescale_betas_zero_snr`).
    """
    settings = _diffusion_betas(prediction_type) | {"set_alpha_to_one": False} | scheduler_overrides
    if settings.keys() <= inspect.signature(PNDMScheduler).parameters.keys():
        scheduler = PNDMScheduler(skip_prk_steps=True, **settings)
    else:
        scheduler = DDIMScheduler(**({"clip_sample": False} | settings))
    with _seeded():
        tokenizer = clip_tokenizer()
        unet = _unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
        )
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_clip(tokenizer, with_projection=False),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    _set_config(folder, clip_sample=scheduler.config.get("clip_sample", False))
    return Path(folder)


def _sdxl_scheduler(kind, prediction_type, overrides):
    """Build one of the schedulers that SDXL-type repositories carry."""
    if kind == "euler":
        settings = _diffusion_betas(prediction_type) | {"timestep_spacing": "leading"}
        return EulerDiscreteScheduler(**(settings | overrides))
    edm = {"edm_euler": EDMEulerScheduler, "playground": EDMDPMSolverMultistepScheduler}[kind]
    return edm(prediction_type=prediction_type, **overrides)


def save_sdxl(folder, prediction_type="epsilon", scheduler="euler", layers_per_block=1, **scheduler_overrides):
    """Save a StableDiffusionXLPipeline.

    `scheduler` is "euler", "edm_euler" or "playground": the last is Playground v2.5, whose VAE has latent statistics.
    The blocks of the real UNet have two layers, which counts where keys have Stability's names.
    """
    vae_config = {"scaling_factor": 0.13025, "force_upcast": True}
    if scheduler == "playground":
        statistics = {"latents_mean": [-1.6, 1.1, 0.4, 2.2], "latents_std": [8.4, 6.2, 7.3, 5.9]}
        vae_config |= statistics | {"scaling_factor": 0.5}
    widths, projection_dim, time_width = (32, 48), 40, 8
    with _seeded():
        tokenizers = clip_tokenizer(), clip_tokenizer(pad_token="!")
        unet = _unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=sum(widths),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            layers_per_block=layers_per_block,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=projection_dim + 6 * time_width,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(**vae_config),
            text_encoder=_clip(tokenizers[0], widths[0], with_projection=False),
            text_encoder_2=_clip(tokenizers[1], widths[1], projection_dim, hidden_act="gelu"),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=_sdxl_scheduler(scheduler, prediction_type, scheduler_overrides),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    if scheduler == "euler":
        _set_config(folder, clip_sample=False)
    return Path(folder)


def save_sd3(folder, t5=True, dual_attention=False):
    """Save a StableDiffusion3Pipeline.

    `dual_attention` gives SD3.5-medium's layers. Without `t5` the third text encoder and tokenizer are None; diffusers
    then writes model_index.json entries that its own loader refuses unless `text_encoder_3=None, tokenizer_3=None` are
    passed.
    """
    widths, projections, joint_width = (32, 48), (32, 40), 96
    with _seeded():
        tokenizers = clip_tokenizer(), clip_tokenizer(pad_token="!")
        tokenizer_3 = t5_tokenizer() if t5 else None
        vae = _vae(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(joint_width, sum(projections), dual_attention),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=_clip(tokenizers[0], widths[0], projections[0]),
            tokenizer=tokenizers[0],
            text_encoder_2=_clip(tokenizers[1], widths[1], projections[1], hidden_act="gelu"),
            tokenizer_2=tokenizers[1],
            text_encoder_3=_t5(tokenizer_3, joint_width) if t5 else None,
            tokenizer_3=tokenizer_3,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


OF_V = {"prediction_type": "v_prediction"}
KINDS = {  # which script trains a base, and how it is made
    "sd15": ("train_sap_lora_sd15", save_sd15, {}),
    "sd21": ("train_sap_lora_sd15", save_sd15, OF_V | {"rescale_betas_zero_snr": True}),
    "sdxl": ("train_sap_lora_sdxl", save_sdxl, {}),
    "sdxl-v": ("train_sap_lora_sdxl", save_sdxl, OF_V | {"rescale_betas_zero_snr": True}),
    "sdxl-deep": ("train_sap_lora_sdxl", save_sdxl, {"layers_per_block": 2}),
    "playground": ("train_sap_lora_sdxl", save_sdxl, {"scheduler": "playground"}),
    "cosxl": ("train_sap_lora_sdxl", save_sdxl, OF_V | {"scheduler": "edm_euler", "sigma_data": 1.0}),
    "sd3": ("train_sap_lora_sd3", save_sd3, {}),
    "sd3-without-t5": ("train_sap_lora_sd3", save_sd3, {"t5": False}),
    "sd35": ("train_sap_lora_sd3", save_sd3, {"dual_attention": True}),
}


# ------------------------------------------------------------------------------------------------------------- photos


def _photo(index, width, height):
    """Draw a disc on a gradient, as uint8 RGB of shape (height, width, 3); every index gives another picture."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:height, :width] / max(width, height)
    ground, slope, paint = rng.uniform(0, 255, 3), rng.uniform(-120, 120, (2, 3)), rng.uniform(0, 255, 3)
    picture = ground + x[..., None] * slope[0] + y[..., None] * slope[1]
    centre = rng.uniform(0.3, 0.6, 2)
    picture[np.hypot(x - centre[0], y - centre[1]) < rng.uniform(0.15, 0.3)] = paint
    return picture.clip(0, 255).astype(np.uint8)


def save_photos(folder, count=5, size=(72, 64), captions=None, suffix=".jpg"):
    """Save `count` distinct pictures of (width, height) `size` as 00.jpg, 01.jpg and so on.

    `captions` become metadata.jsonl: the first caption goes with 00, and there may be fewer captions than pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:02d}{suffix}" for i in range(count)]
    for i, name in enumerate(names):
        Image.fromarray(_photo(i, *size)).save(folder / name)
    if captions is not None:
        rows = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, captions, strict=False)]
        (folder / "metadata.jsonl").write_text("".join(row + "\n" for row in rows))
    return folder
