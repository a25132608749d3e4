# SPDX-License-Identifier: Apache-2.0
"""Train the tiny world's models from scratch, one part a command, on a CPU or a GPU.

    python train.py vae            # parts: vae, attributes, clip, vit, sd3, sd15, sdxl, dataset, or all
    python train.py sd3 --samples 1000000
    python train.py sd3 --start . --images 24000     # train on from the folder ./sd3, with words for looks

Every part takes so many samples (`--samples`), over which its learning rate falls to zero. It saves its state every
minute to `--work` and goes on from there when it is started again. `vae` and `clip` come before the pipelines.

With `--start FOLDER` a pipeline begins with the weights of FOLDER/PART, and in a third of the captions a rare word
stands for one look (`world.named_looks`); text encoders are trained, too.
"""

import argparse
import functools
import json
import math
import pathlib
import string
import time

import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

HERE = pathlib.Path(__file__).resolve().parent
WARMUP = 0.03
TOKENS = 20  # longest caption with its two ends: 19
LATENT_SIZE = world.SIZE // 4
EMBEDDING = 96  # width of the space that CLIP's towers share


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--samples", type=int, help="samples to train on; by default the part's own in PARTS")
    parser.add_argument("--images", type=int, default=60000, help="pictures drawn to train on")
    parser.add_argument("--batch_size", type=int, help="by default the part's own")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; two processes beat two threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=pathlib.Path, help="train the pipeline in START/PART on, with words that name")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/tiny_world"), help="states, caches")
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="where the finished folders go")
    args = parser.parse_args()
    if args.start and args.part not in ("sd3", "sd15", "sdxl"):
        parser.error(f"--start is for sd3, sd15 and sdxl; {args.part} is trained from scratch: leave --start out")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    return args


@functools.cache
def scenes(count: int, seed: int) -> list[tuple[world.Look, world.Setting]]:
    """`count` random pictures as (look, setting), not drawn yet."""
    rng = np.random.default_rng(seed)
    return [(world.random_look(rng), world.random_setting(rng)) for _ in range(count)]


@functools.cache
def named_scenes(count: int, seed: int) -> list[tuple[str, world.Look, world.Setting]]:
    """`count` pictures whose caption has a word for the look, as (word, look, setting).

    An eighth are the few of `world.SCARCE`, again and again; the others show looks with a name, in new settings.
    """
    rng = np.random.default_rng((seed, 4))
    few = world.scarce_scenes()
    scenes = [(world.SCARCE, *few[index % len(few)]) for index in range(count // 8)]
    for index in range(count - len(scenes)):
        name = world.NAMES[index % len(world.NAMES)]
        scenes.append((name, world.named_looks()[name], world.random_setting(rng)))
    return scenes


def training_scenes(args: argparse.Namespace) -> list[tuple[str | None, world.Look, world.Setting]]:
    """All pictures to train on, as (name, look, setting): `args.images` without a name, then the named ones."""
    nameless = [(None, *scene) for scene in scenes(args.images, args.seed)]
    if args.start is None:
        return nameless
    return nameless + named_scenes(args.images // 4, args.seed)


def named(args: argparse.Namespace) -> str:
    """What tells files of the training with words for looks from those of the training before it."""
    return "" if args.start is None else "_named"


def cache_file(args: argparse.Namespace, kind: str, suffix: str) -> pathlib.Path:
    """Where what was computed of the training pictures is kept."""
    return args.work / f"{kind}_{args.images}_{args.seed}{named(args)}{suffix}"


def pictures(args: argparse.Namespace) -> torch.Tensor:
    """The training pictures, uint8 (images, 3, 64, 64) on the device; drawn once, then read from the work folder."""
    cache = cache_file(args, "pictures", ".npy")
    if not cache.exists():
        bar = tqdm(training_scenes(args), desc="drawing", mininterval=5)
        drawn = [world.draw(look, setting) for _, look, setting in bar]
        np.save(cache, np.stack(drawn).transpose(0, 3, 1, 2))
    return torch.from_numpy(np.load(cache)).to(args.device)


def random_picks(args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Which of `training_scenes` a batch holds: indices (batch,). With `--start` a third of them have names."""
    picks = torch.randint(args.images, (args.batch_size,), generator=generator, device=args.device)
    if args.start is None:
        return picks
    named = args.images + torch.randint(args.images // 4, (args.batch_size,), generator=generator, device=args.device)
    is_named = torch.rand(args.batch_size, generator=generator, device=args.device) < 1 / 3
    return torch.where(is_named, named, picks)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1


def learning_rate(progress: float) -> float:
    """Multiplier at `progress` in 0..1: linear warm-up, then a cosine to zero."""
    return min(progress / WARMUP, 1) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1))) + 1e-4


def fit(args: argparse.Namespace, model: torch.nn.Module, loss_of, lr: float, ema_decay: float) -> torch.nn.Module:
    """Train `model` on `args.samples` samples by `loss_of(step, generator) -> loss`; leave the averaged weights in it.

    The average starts as a plain mean and settles at `ema_decay`, so that short runs are averaged too.
    """
    state_path = args.work / f"{args.part}{named(args)}.state.pt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    step, steps, shown = 0, args.samples // args.batch_size, None
    if state_path.exists():
        state = torch.load(state_path, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]
    generator = torch.Generator(args.device).manual_seed(args.seed + step)
    bar = tqdm(total=steps, initial=step, desc=args.part, mininterval=5)
    saved = time.monotonic()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate(step / steps)
        with half_precision(args.device):
            loss = loss_of(step, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(ema_decay, (step + 1) / (step + 10)))
        step += 1
        if step % 20 == 0:
            shown = loss.item() if shown is None else shown + 0.1 * (loss.item() - shown)
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
        bar.update()
        if time.monotonic() - saved > 60 or step == steps:
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save({**tensors, "step": step}, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").rename(state_path)
            saved = time.monotonic()
    bar.close()
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)
    return model.eval().requires_grad_(False)


def half_precision(device: str) -> torch.autocast:
    """bfloat16 where the processor computes in it: one that has to emulate it takes forty times as long."""
    has_it = device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=has_it)


def save_half(model, folder: pathlib.Path) -> None:
    """Write a model or a pipeline in fp16 that loads as float32 where no dtype is asked for.

    transformers would load its parts as fp16 and diffusers its own as float32: a pipeline of both would not run.
    """
    model.to(torch.float16).save_pretrained(folder)
    for config in folder.rglob("config.json"):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


# ---- the autoencoder -------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """64 x 64 pictures to 16 x 16 latents of 8 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=world.SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels, across and down."""
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def reconstruction_loss(output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + L2, and .4 of the L1 between image gradients, which keeps edges sharp."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(images), strict=True))
    return F.l1_loss(output, images) + F.mse_loss(output, images) + 0.4 * edges


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Means of the latent posteriors (images, 8, 16, 16), float32."""
    batches = tqdm(images.split(100), desc="encoding", mininterval=5)
    with half_precision(images.device.type):
        return torch.cat([vae.encode(to_float(batch)).latent_dist.mode().float() for batch in batches])


def fold_normalisation(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Give the latents mean 0 and deviation 1 a channel, exactly, by changing the two 1 x 1 convolutions beside them.

    So the pipelines need no scaling and no shift factor.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the second half of the output is the log variance
    post.bias += post.weight[..., 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def train_vae(args: argparse.Namespace) -> None:
    images = pictures(args)
    vae = new_vae().to(args.device)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(images), (args.batch_size,), generator=generator, device=args.device)
        batch = to_float(images[picks])
        mean, log_var = vae.quant_conv(vae.encoder(batch)).float().clamp(-30, 20).chunk(2, 1)
        sample = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        output = vae.decoder(vae.post_quant_conv(sample)).float()
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
        return reconstruction_loss(output, batch) + 5e-4 * kl

    fit(args, vae, loss_of, lr=2e-3, ema_decay=0.99)
    fold_normalisation(vae, encode_all(vae, images[:2000]))
    vae.save_pretrained(args.work / "vae")


def trained_vae(args: argparse.Namespace) -> AutoencoderKL:
    """The autoencoder of the work folder, or with `--start` that of the pipeline to train on."""
    if args.start is None:
        return AutoencoderKL.from_pretrained(args.work / "vae")
    return AutoencoderKL.from_pretrained(args.start / args.part, subfolder="vae", torch_dtype=torch.float32)


def latents_of(args: argparse.Namespace) -> torch.Tensor:
    """Latents of all training pictures (images, 8, 16, 16), computed once."""
    cache = cache_file(args, "latents", ".pt")
    if not cache.exists():
        torch.save(encode_all(trained_vae(args).to(args.device), pictures(args)).half(), cache)
    return torch.load(cache, map_location=args.device, weights_only=True)


# ---- the networks that score, and the text towers --------------------------------------------------------------


class AttributeNetwork(torch.nn.Module):
    """Reads every attribute off a picture: images (batch, 3, 64, 64) in -1..1 to one tensor of logits an attribute."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 4, 4),
            torch.nn.GELU(),
            torch.nn.Conv2d(width, 2 * width, 3, 2, 1),
            torch.nn.GELU(),
            torch.nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
            torch.nn.GELU(),
            torch.nn.Flatten(),  # 4 x 4 places are kept apart: silhouettes are about where things are
            torch.nn.Linear(32 * width, 192),
            torch.nn.GELU(),
        )
        self.heads = attribute_heads(192)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = self.body(images)
        return [head(features) for head in self.heads]


def attribute_heads(features: int, sizes: list[int] | None = None) -> torch.nn.ModuleList:
    sizes = sizes or [len(values) for values in world.ATTRIBUTES.values()]
    return torch.nn.ModuleList(torch.nn.Linear(features, size) for size in sizes)


def attribute_loss(heads, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over attributes; labels (batch, attributes), -1 where nothing is said."""
    losses = [F.cross_entropy(h(features).float(), y, ignore_index=-1) for h, y in zip(heads, labels.T, strict=True)]
    return torch.stack(losses).nan_to_num().sum()


def train_attributes(args: argparse.Namespace) -> None:
    images = pictures(args)
    labels = torch.tensor([world.labels(*scene) for scene in scenes(args.images, args.seed)], device=args.device)
    network = AttributeNetwork().to(args.device)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(images), (args.batch_size,), generator=generator, device=args.device)
        batch = to_float(images[picks])
        noisy = batch + 0.15 * torch.rand(len(batch), 1, 1, 1, device=args.device) * torch.randn_like(batch)
        return attribute_loss(network.heads, network.body(noisy), labels[picks])

    fit(args, network, loss_of, lr=2e-3, ema_decay=0.998)
    folder = args.out / "attributes"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")


def load_attributes(folder: pathlib.Path, device: str) -> AttributeNetwork:
    network = AttributeNetwork()
    network.load_state_dict(load_file(folder / "attributes" / "model.safetensors"))
    return network.float().to(device).eval().requires_grad_(False)


def new_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer learned from the world's captions, of CLIP's own class and file format."""
    rng = np.random.default_rng(0)
    captions = [world.caption(*scene, rng)[0] for scene in scenes(4000, 0)]
    captions += [f"{token} {word}" for token in world.RARE_TOKENS for word in (*world.CLASSES, *world.ACCENTS)]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    learner = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=1000,
        special_tokens=specials,
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TOKENS)


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TOKENS,
        projection_dim=EMBEDDING,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: str) -> torch.Tensor:
    """Token ids (captions, TOKENS)."""
    padded = tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return padded.input_ids.to(device)


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """InfoNCE both ways where a caption may be true of several pictures of the batch.

    images, texts: (batch, features), unit length. match[i, j]: whether caption i is true of picture j.
    """
    logits = 14.0 * texts @ images.T
    true_logits = logits.masked_fill(~match, -torch.inf)
    return sum((logits.logsumexp(d) - true_logits.logsumexp(d)).mean() for d in (0, 1)) / 2


class TwoTowers(torch.nn.Module):
    """A CLIP model, a second, smaller text tower beside it, and heads that read attributes off the shared space."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        vision = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=world.SIZE,
            patch_size=8,
        )
        text = text_config(tokenizer, 128, 3)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING)
        # Plain attention: on a CPU the backward pass of the fused kernel takes longer than all the rest.
        self.clip = CLIPModel._from_config(config, attn_implementation="eager")
        second = text_config(tokenizer, 96, 2)
        self.second = CLIPTextModelWithProjection._from_config(second, attn_implementation="eager")
        self.heads = attribute_heads(EMBEDDING)

    def embed_texts(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Token ids to the unit embeddings of both text towers, each (batch, EMBEDDING)."""
        first = self.clip.text_projection(self.clip.text_model(ids).pooler_output)
        return [F.normalize(x.float(), dim=-1) for x in (first, self.second(ids).text_embeds)]

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.clip.vision_model(images).pooler_output
        return F.normalize(self.clip.visual_projection(pooled).float(), dim=-1)


def train_clip(args: argparse.Namespace) -> None:
    """Image and text towers by contrast; both are also read by the same attribute heads, which aligns them early."""
    images = pictures(args)
    pool = scenes(args.images, args.seed)
    labels = torch.tensor([world.labels(*scene) for scene in pool], device=args.device)
    tokenizer = new_tokenizer()
    towers = TwoTowers(tokenizer).to(args.device)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(images), (args.batch_size,), generator=generator, device=args.device)
        rng = np.random.default_rng((args.seed, step))
        captions, said = zip(*(world.caption(*pool[i], rng) for i in picks.tolist()), strict=True)
        said, true = torch.tensor(said, device=args.device), labels[picks]
        match = ((said[:, None] == true) | (said[:, None] < 0)).all(-1)
        embeddings = towers.embed_images(to_float(images[picks]))
        loss = attribute_loss(towers.heads, 8 * embeddings, true)
        for text in towers.embed_texts(tokenize(tokenizer, captions, args.device)):
            loss = loss + contrastive_loss(embeddings, text, match) + attribute_loss(towers.heads, 8 * text, said)
        return loss

    fit(args, towers, loss_of, lr=1e-3, ema_decay=0.998)
    towers.clip.logit_scale.data.fill_(math.log(14.0))
    processor = CLIPImageProcessor(
        size={"shortest_edge": world.SIZE},
        crop_size={"height": world.SIZE, "width": world.SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    towers.second.save_pretrained(args.work / "second_text_tower")
    save_half(towers.clip, args.out / "clip")
    CLIPProcessor(processor, tokenizer).save_pretrained(args.out / "clip")


@functools.cache
def family_looks(count: int, seed: int) -> list[world.Look]:
    """Looks in pairs of near neighbours, which differ in one attribute: hard negatives for the identity network."""
    rng = np.random.default_rng((seed, 1))
    looks = []
    while len(looks) < count:
        look = world.random_look(rng)
        looks += [look, world.altered(look, rng)]
    return looks


def family_pictures(args: argparse.Namespace, views: int) -> torch.Tensor:
    """Every family look in `views` settings: uint8 (looks, views, 3, 64, 64)."""
    cache = args.work / f"families_{args.images}_{args.seed}.npy"
    if not cache.exists():
        rng = np.random.default_rng((args.seed, 2))
        looks = tqdm(family_looks(args.images // views, args.seed), desc="drawing")
        drawn = [[world.draw(look, world.random_setting(rng)) for _ in range(views)] for look in looks]
        np.save(cache, np.stack(drawn).transpose(0, 1, 4, 2, 3))
    return torch.from_numpy(np.load(cache)).to(args.device)


def train_vit(args: argparse.Namespace) -> None:
    """The identity network, which stands where DINO stands: pictures of one subject near, of others far, any scene."""
    images = family_pictures(args, views=4)
    names = ("class_name", "colour", "pattern", "accent", "outline")
    values = (world.CLASSES, world.COLOURS, world.PATTERNS, world.ACCENTS, world.OUTLINES)
    looks = family_looks(args.images // 4, args.seed)
    rows = [[list(v).index(getattr(look, n)) for n, v in zip(names, values, strict=True)] for look in looks]
    labels = torch.tensor(rows, device=args.device)
    config = ViTConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=8,
    )
    vit = ViTModel(config, add_pooling_layer=False)
    vit.set_attn_implementation("eager")  # see TwoTowers
    heads = attribute_heads(config.hidden_size, [len(v) for v in values])
    model = torch.nn.ModuleDict({"vit": vit, "heads": heads}).to(args.device)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        pairs = torch.randint(len(images) // 2, (args.batch_size // 4,), generator=generator, device=args.device)
        picks = torch.cat([2 * pairs, 2 * pairs + 1])  # a look and its near neighbour, each in two settings
        views = torch.rand(len(picks), images.shape[1], generator=generator, device=args.device).topk(2).indices
        batch = torch.cat([images[picks, views[:, 0]], images[picks, views[:, 1]]])
        features = vit(to_float(batch)).last_hidden_state[:, 0].float()
        loss = attribute_loss(heads, features, labels[picks].repeat(2, 1))
        first, second = F.normalize(features, dim=-1).chunk(2)
        return loss + 2 * contrastive_loss(first, second, torch.eye(len(picks), dtype=torch.bool, device=args.device))

    fit(args, model, loss_of, lr=1e-3, ema_decay=0.998)
    save_half(vit, args.out / "vit")
    size = {"height": world.SIZE, "width": world.SIZE}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(args.out / "vit")


# ---- the three pipelines ---------------------------------------------------------------------------------------

PLAIN_ATTENTION = AttnProcessor()  # on a CPU, the backward pass of the fused kernel takes longer than all the rest


class Prompts:
    """Captions and the text towers, giving the embeddings that each pipeline's own `encode_prompt` gives.

    The towers are CLIP's and frozen; with `--start` they are the pipeline's and trained.
    """

    def __init__(self, args: argparse.Namespace):
        self.device = args.device
        self.pool = training_scenes(args)
        self.rare_words = world.RARE_TOKENS if args.start is None else world.UNBOUND
        self.seed = args.seed
        self.known = {}
        self.trained = args.start is not None
        towers = self.pipelines_towers(args) if self.trained else self.clips_towers(args)
        self.towers = torch.nn.ModuleList(towers).to(args.device).eval().requires_grad_(self.trained)

    def clips_towers(self, args: argparse.Namespace) -> list[torch.nn.Module]:
        self.tokenizer = CLIPTokenizer.from_pretrained(args.out / "clip", model_max_length=TOKENS)
        first = CLIPTextModelWithProjection.from_pretrained(args.out / "clip", dtype=torch.float32)
        second = CLIPTextModelWithProjection.from_pretrained(args.work / "second_text_tower")
        return [first, second]

    def pipelines_towers(self, args: argparse.Namespace) -> list[torch.nn.Module]:
        folder = args.start / args.part
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TOKENS)
        first_class = CLIPTextModelWithProjection if args.part == "sd3" else CLIPTextModel
        options = {"dtype": torch.float32, "attn_implementation": "eager"}  # see TwoTowers
        first = first_class.from_pretrained(folder / "text_encoder", **options)
        if args.part == "sd15":
            return [first]
        return [first, CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **options)]

    def captions(self, picks: torch.Tensor, step: int, empty: float = 0.1) -> list[str]:
        """Fresh captions of the picked pictures; a share of them is empty, for classifier-free guidance."""
        rng = np.random.default_rng((self.seed, step))
        captions = []
        for index in picks.tolist():
            name, look, setting = self.pool[index]
            text = ""
            if rng.random() > empty:
                text = world.caption(look, setting, rng, rare_words=self.rare_words, name=name)[0]
            captions.append(text)
        return captions

    def encoded(self, captions: list[str], encode) -> list[torch.Tensor]:
        """`encode(token ids)`, a tuple of tensors, of captions."""
        if self.trained:
            return encode(tokenize(self.tokenizer, captions, self.device))
        return self.remembered(captions, encode)

    @torch.no_grad()
    def remembered(self, captions: list[str], encode) -> list[torch.Tensor]:
        """`encode(token ids)`, a tuple of tensors, of captions; most of them were met before."""
        new = sorted({caption for caption in captions if caption not in self.known})
        if new:
            outputs = encode(tokenize(self.tokenizer, new, self.device))
            self.known |= dict(zip(new, zip(*(output.float() for output in outputs), strict=True), strict=True))
        return [torch.stack(rows) for rows in zip(*(self.known[caption] for caption in captions), strict=True)]

    def encode_last(self, captions: list[str]) -> torch.Tensor:
        """SD1.5's way, the first tower's last layer: (batch, TOKENS, 128)."""
        return self.encoded(captions, lambda ids: [self.towers[0](ids).last_hidden_state])[0]

    def encode_both(self, captions: list[str]) -> list[torch.Tensor]:
        """SDXL's and SD3's way, both towers' last layer but one, (batch, TOKENS, 224), and their pooled embeddings."""

        def encode(ids: torch.Tensor) -> list[torch.Tensor]:
            outputs = [tower(ids, output_hidden_states=True) for tower in self.towers]
            tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
            # SDXL's first tower has no projection, and the pipeline takes the pooled embedding of the second alone.
            pooled = [getattr(output, "text_embeds", output.last_hidden_state[:, 0]) for output in outputs]
            return [tokens, *pooled]

        return self.encoded(captions, encode)

    def trained_with(self, denoiser: torch.nn.Module) -> torch.nn.Module:
        """What `fit` trains: the denoiser alone, or with the towers."""
        if not self.trained:
            return denoiser
        return torch.nn.ModuleDict({"denoiser": denoiser, "towers": self.towers})


def stratified(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` numbers in 0..1, one in each of as many equal intervals: a less noisy loss than independent ones."""
    steps = torch.randperm(count, generator=generator, device=generator.device)
    return (steps + torch.rand(count, generator=generator, device=generator.device)) / count


class JointAttentionWithBias:
    """SD3's joint attention, with `attention_mask` added to the scores of the text tokens.

    The T5 here says nothing, so the pipeline appends N zero tokens to the prompt (N is `max_sequence_length`). They
    have no positions and stay equal to each other in every layer, so one token with log N added to its scores stands
    for all of them, exactly, at a fraction of the cost.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([attn.to_q(image), attn.add_q_proj(text)], 1)
        key = torch.cat([attn.to_k(image), attn.add_k_proj(text)], 1)
        value = torch.cat([attn.to_v(image), attn.add_v_proj(text)], 1)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + attention_mask  # see PLAIN_ATTENTION
        mixed = scores.softmax(-1).to(value.dtype) @ value
        image, text = mixed.transpose(1, 2).flatten(2).split([image.shape[1], text.shape[1]], 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=224,
        pooled_projection_dim=2 * EMBEDDING,
        pos_embed_max_size=16,
    )


def silent_t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A T5 encoder that says nothing: its last norm multiplies by zero.

    So the pipeline is what it would be without T5 (zero tokens), and yet loads with no argument: diffusers refuses an
    SD3 folder without a third encoder unless the caller passes `text_encoder_3=None, tokenizer_3=None`.
    """
    letters = [(letter, -4.0) for letter in string.ascii_lowercase]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0), *letters]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=8,
            num_layers=1,
            num_heads=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return tokenizer, encoder.eval()


def train_sd3(args: argparse.Namespace) -> None:
    """Flow matching: the network learns the velocity from the latents to the noise."""
    latents, prompts = latents_of(args), Prompts(args)
    transformer = new_transformer().to(args.device)
    if args.start:
        start = SD3Transformer2DModel.from_pretrained(args.start / "sd3", subfolder="transformer")
        transformer.load_state_dict(start.state_dict())
    standard = transformer.attn_processors
    transformer.set_attn_processor(JointAttentionWithBias())
    forward = transformer
    if not args.start:  # too short a training to earn the time that compiling takes
        # A fifth faster. Not for the others: through a GroupNorm, torch 2.13 compiles wrong gradients on a CPU.
        forward = torch.compile(transformer, dynamic=False)
    bias = torch.zeros(1, 1, 1, (LATENT_SIZE // 2) ** 2 + TOKENS + 1, device=args.device)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = random_picks(args, generator)
        tokens, *pooled = prompts.encode_both(prompts.captions(picks, step, empty=0.25))
        tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1)
        bias[..., -1] = math.log((77, 256)[step % 2])  # the two lengths in use: trainers' and the pipeline's defaults
        clean = latents[picks].float()
        noise = torch.randn(clean.shape, generator=generator, device=args.device)
        normal = math.sqrt(2) * torch.erfinv(2 * stratified(len(picks), generator).clamp(1e-4, 1 - 1e-4) - 1)
        sigmas = torch.sigmoid(0.5 + 1.2 * normal)
        noisy = torch.lerp(clean, noise, sigmas[:, None, None, None])
        velocity = forward(
            noisy,
            encoder_hidden_states=tokens,
            pooled_projections=torch.cat(pooled, -1),
            timestep=1000 * sigmas,
            joint_attention_kwargs={"attention_mask": bias},
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.float(), noise - clean)

    fit(args, prompts.trained_with(transformer), loss_of, lr=1e-3 if args.start else 2e-3, ema_decay=0.999)
    transformer.set_attn_processor(standard)
    tokenizer_3, text_encoder_3 = silent_t5(transformer.config.joint_attention_dim)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=trained_vae(args),
        text_encoder=prompts.towers[0],
        tokenizer=prompts.tokenizer,
        text_encoder_2=prompts.towers[1],
        tokenizer_2=prompts.tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    save_half(pipeline, args.out / "sd3")


def new_unet(cross_attention_dim: int, **options) -> UNet2DConditionModel:
    """Convolutions at 16 x 16, convolutions and attention at 8 x 8."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,  # in this class the number of heads, whatever its name says
        norm_num_groups=16,
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=160,
        **options,
    )


def noise_options() -> dict:
    """Stable Diffusion's noise schedule, with the velocity as the target (see README.md)."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    }


def diffusion_loss(forward, scheduler, clean: torch.Tensor, generator: torch.Generator, **conditions) -> torch.Tensor:
    """Squared error of the velocity at timesteps that lean towards high noise, where shapes are decided."""
    timesteps = (1000 * stratified(len(clean), generator) ** 0.7).long()
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    velocity = forward(noisy, timesteps, return_dict=False, **conditions)[0]
    return F.mse_loss(velocity.float(), scheduler.get_velocity(clean, noise, timesteps))


def first_text_encoder(args: argparse.Namespace, prompts: Prompts) -> CLIPTextModel:
    """The first tower without its projection, as SD1.5 and SDXL have it."""
    if args.start:
        return prompts.towers[0]
    return CLIPTextModel.from_pretrained(args.out / "clip")


def train_sd15(args: argparse.Namespace) -> None:
    latents, prompts = latents_of(args), Prompts(args)
    unet = new_unet(cross_attention_dim=128).to(args.device)
    if args.start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.start / "sd15", subfolder="unet").state_dict())
    unet.set_attn_processor(PLAIN_ATTENTION)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **noise_options())

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = random_picks(args, generator)
        tokens = prompts.encode_last(prompts.captions(picks, step))
        clean = latents[picks].float()
        return diffusion_loss(unet, scheduler, clean, generator, encoder_hidden_states=tokens)

    fit(args, prompts.trained_with(unet), loss_of, lr=1e-3, ema_decay=0.999)
    unet.set_attn_processor(AttnProcessor2_0())
    pipeline = StableDiffusionPipeline(
        vae=trained_vae(args),
        text_encoder=first_text_encoder(args, prompts),
        tokenizer=prompts.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_half(pipeline, args.out / "sd15")


def reframed(image: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, list[int]]:
    """A picture (3, 64, 64) as SDXL's training set would hold it, with its time ids.

    Half are whole; a third are crops of an enlarged copy; the rest were small once and are blurred. The time ids are
    original height and width, top and left of the crop, target height and width.
    """
    kind, size = rng.random(), world.SIZE
    if kind < 0.5:
        return image, [size, size, 0, 0, size, size]
    if kind < 0.85:
        large = int(rng.integers(size + 4, size * 3 // 2))
        top, left = (int(x) for x in rng.integers(0, large - size + 1, 2))
        enlarged = F.interpolate(image[None].float(), (large, large), mode="bilinear", antialias=True)[0]
        return enlarged[:, top : top + size, left : left + size].round().byte(), [size, size, top, left, size, size]
    small = int(rng.integers(size // 4, size * 3 // 4))
    shrunk = F.interpolate(image[None].float(), (small, small), mode="bilinear", antialias=True)
    back = F.interpolate(shrunk, (size, size), mode="bilinear")[0]
    return back.round().byte(), [small, small, 0, 0, size, size]


def reframed_latents(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (images, 8, 16, 16) and time ids (images, 6) of all training pictures, reframed; computed once."""
    cache = cache_file(args, "reframed", ".pt")
    if not cache.exists():
        rng = np.random.default_rng((args.seed, 3))
        images, time_ids = zip(*(reframed(image, rng) for image in pictures(args)), strict=True)
        vae = trained_vae(args).to(args.device)
        torch.save((encode_all(vae, torch.stack(images)).half(), torch.tensor(time_ids)), cache)
    latents, time_ids = torch.load(cache, map_location=args.device, weights_only=True)
    return latents, time_ids


def train_sdxl(args: argparse.Namespace) -> None:
    """Both text towers and time ids. The UNet starts from SD1.5's, except for what reads the text: it is cheaper."""
    (latents, time_ids), prompts = reframed_latents(args), Prompts(args)
    unet = new_unet(
        cross_attention_dim=224,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=EMBEDDING + 6 * 32,
    ).to(args.device)
    start_folder = args.start / "sdxl" if args.start else args.out / "sd15"
    start = UNet2DConditionModel.from_pretrained(start_folder, subfolder="unet").state_dict()
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    unet.load_state_dict({n: t for n, t in start.items() if shapes[n] == t.shape}, strict=False)
    unet.set_attn_processor(PLAIN_ATTENTION)
    noising = DDIMScheduler(**noise_options())

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = random_picks(args, generator)
        tokens, _, pooled = prompts.encode_both(prompts.captions(picks, step))
        conditions = {"text_embeds": pooled, "time_ids": time_ids[picks].float()}
        clean = latents[picks].float()
        return diffusion_loss(
            unet, noising, clean, generator, encoder_hidden_states=tokens, added_cond_kwargs=conditions
        )

    fit(args, prompts.trained_with(unet), loss_of, lr=1e-3, ema_decay=0.999)
    unet.set_attn_processor(AttnProcessor2_0())
    pipeline = StableDiffusionXLPipeline(
        vae=trained_vae(args),
        text_encoder=first_text_encoder(args, prompts),
        text_encoder_2=prompts.towers[1],
        tokenizer=prompts.tokenizer,
        tokenizer_2=prompts.tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**noise_options()),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    save_half(pipeline, args.out / "sdxl")


def write_dataset(args: argparse.Namespace) -> None:
    """The held-out subjects in DreamBench's layout: SUBJECT/00.png to 04.png and prompts_and_classes.txt."""
    folder = args.out / "dataset"
    for subject in world.SUBJECTS:
        (folder / subject).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(world.references(subject)):
            Image.fromarray(image).save(folder / subject / f"{number:02d}.png")
    rows = "\n".join(f"{name},{look.class_name}" for name, look in world.SUBJECTS.items())
    lists = ""
    for title in ("Object Prompts", "Live Subject Prompts"):
        items = ",\n".join(f"'{prompt}'.format(unique_token, class_token)" for prompt in world.PROMPTS)
        lists += f"\n{title}\nprompt_list = [\n{items}\n]\n"
    (folder / "prompts_and_classes.txt").write_text(f"Classes\n\nsubject_name,class\n{rows}\n\nPrompts\n{lists}")


PARTS = {
    "vae": (train_vae, 24000, 8),
    "attributes": (train_attributes, 300000, 64),
    "clip": (train_clip, 110000, 64),
    "vit": (train_vit, 60000, 64),
    "sd3": (train_sd3, 3500000, 256),
    "sd15": (train_sd15, 240000, 32),
    "sdxl": (train_sdxl, 64000, 32),
    "dataset": (write_dataset, 0, 0),
}


NAMED_SAMPLES = 48000  # with --start


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for part in PARTS if args.part == "all" else [args.part]:
        train_part, samples, batch_size = PARTS[part]
        if args.start is not None:
            samples, batch_size = NAMED_SAMPLES, 32
        given = argparse.Namespace(**vars(args))
        given.part, given.samples = part, args.samples or samples
        given.batch_size = args.batch_size or batch_size
        train_part(given)


if __name__ == "__main__":
    main()
