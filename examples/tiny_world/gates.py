# SPDX-License-Identifier: Apache-2.0
"""Measure the tiny world's gates on the shipped folders and print them as a Markdown table.

    python gates.py                         # everything
    python gates.py sd3 --images outputs    # one part, and some of the pictures it was measured on

The pipelines are sampled by themselves: `from_pretrained` on the shipped fp16 folder, then a call with a prompt.
"""

import argparse
import functools
import inspect
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
import train
import world
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor, ViTImageProcessor, ViTModel

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline}
GATES = {"class": 0.95, "colour": 0.95, "pattern": 0.85, "scene": 0.95, "hat": 0.95, "cleanliness": 16.5}
NAMED_GATE = 0.9  # class, colour and pattern of the look that a word names
UNBOUND_LOSS = 0.02  # how much less often the class may come out beside a word that names nothing


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of vae, clip, sd15, sdxl, sd3; all by default")
    parser.add_argument("--folder", type=pathlib.Path, default=train.HERE)
    parser.add_argument("--prompts", type=int, default=256, help="prompts a pipeline")
    parser.add_argument("--fits", type=int, default=64, help="of their pictures, how many are compared with drawings")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, nargs="*", help="by default the pipeline's own default, and 3")
    parser.add_argument("--names", action="store_true", help="also of the words that name a look, or nothing")
    parser.add_argument("--images", type=pathlib.Path, help="write 40 generated pictures a pipeline to this folder")
    parser.add_argument("--report", type=pathlib.Path, help="also write the table to this file")
    return parser.parse_args()


def to_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """uint8 (batch, 64, 64, 3) to float (batch, 3, 64, 64) in -1..1."""
    return train.to_float(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))


def unseen(count: int) -> tuple[list, np.ndarray]:
    """Scenes and pictures drawn from a seed that no training part uses."""
    pool = train.scenes(count, 987)
    return pool, np.stack([world.draw(*scene) for scene in pool])


class Identity:
    """CLS features of the shipped ViT, by its own image processor."""

    def __init__(self, folder: pathlib.Path, device: str):
        self.processor = ViTImageProcessor.from_pretrained(folder / "vit")
        self.model = ViTModel.from_pretrained(folder / "vit", add_pooling_layer=False, dtype=torch.float32).to(device)

    @torch.no_grad()
    def __call__(self, images: list) -> torch.Tensor:
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(self.model.device)
        return F.normalize(self.model(pixels).last_hidden_state[:, 0], dim=-1)


@torch.no_grad()
def vae_gates(args: argparse.Namespace, device: str) -> list[tuple]:
    """PSNR on unseen pictures; how much of a subject's identity is left after a round trip."""
    vae = AutoencoderKL.from_pretrained(args.folder / "sd3", subfolder="vae", dtype=torch.float32).to(device)

    def round_trip(images: np.ndarray) -> np.ndarray:
        output = vae.decode(vae.encode(to_tensor(images, device)).latent_dist.mode()).sample.clamp(-1, 1)
        return ((output + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    images = unseen(200)[1]
    error = ((round_trip(images) - images.astype(np.float32)) / 255) ** 2
    psnr = -10 * np.log10(error.mean((1, 2, 3))).mean()
    identity, rng = Identity(args.folder, device), np.random.default_rng(5)
    fresh, tripped, other = [], [], []
    for subject, look in world.SUBJECTS.items():
        references = np.stack(world.references(subject))
        drawn = identity([world.draw(look, world.random_setting(rng)) for _ in range(16)])
        different = identity([world.draw(world.random_look(rng), world.random_setting(rng)) for _ in range(16)])
        fresh.append((drawn @ identity(list(references)).T).mean().item())
        tripped.append((drawn @ identity(list(round_trip(references))).T).mean().item())
        other.append((different @ drawn.T).mean().item())
    kept = np.mean(tripped) / np.mean(fresh)
    note = f"{np.mean(tripped):.3f} after, {np.mean(fresh):.3f} before; {np.mean(other):.3f} between different things"
    return [("VAE", "PSNR, dB", 32.0, psnr, "200 unseen pictures"), ("VAE", "identity kept", 0.85, kept, note)]


@torch.no_grad()
def clip_gates(args: argparse.Namespace, device: str) -> list[tuple]:
    """Whether CLIP finds the right one of the six classes, and of the eight scenes, for an unseen picture."""
    model = CLIPModel.from_pretrained(args.folder / "clip", dtype=torch.float32).to(device)
    processor = CLIPProcessor.from_pretrained(args.folder / "clip")
    pool, images = unseen(300)
    truth = np.array([world.labels(*scene) for scene in pool])
    questions = {"class": [f"a photo of a {name}" for name in world.CLASSES]}
    questions["scene"] = [f"a photo of a ball {scene}" for scene in world.SCENES.values()]
    rows = []
    for name, texts in questions.items():
        inputs = processor(text=texts, images=list(images), padding=True, return_tensors="pt").to(device)
        guesses = model(**inputs).logits_per_image.argmax(1).cpu().numpy()
        right = (guesses == truth[:, list(world.ATTRIBUTES).index(name)]).mean()
        rows.append(("CLIP", f"{name} retrieval", 0.95 if name == "class" else None, right, "300 unseen pictures"))
    return rows


def prompts_with_labels(count: int) -> tuple[list[str], np.ndarray]:
    """Prompts that name every attribute, classes and scenes in equal shares, and their labels."""
    rng = np.random.default_rng(11)
    prompts, truth = [], []
    for number in range(count):
        scene = list(world.SCENES)[number % len(world.SCENES)]
        look = world.random_look(rng)
        look = world.dataclasses.replace(look, class_name=world.CLASSES[number % len(world.CLASSES)])
        setting = world.random_setting(rng, scene)
        pattern = "" if look.pattern == "plain" else look.pattern + " "
        hat = " with a hat" if setting.hat else ""
        prompts.append(f"a photo of a {look.colour} {pattern}{look.class_name}{hat} {world.SCENES[scene]}")
        truth.append(world.labels(look, setting))
    return prompts, np.array(truth)


@functools.cache
def backgrounds(scene: str) -> np.ndarray:
    """64 empty scenes, float (64, 64, 64, 3)."""
    return np.stack([world.background(scene, np.random.default_rng(seed)) for seed in range(64)])


POSE = np.array([0.0, 0.02, 0.72, 0.0])  # x, y, size and turn in the middle of what world.random_setting draws
SPREAD = np.array([0.05, 0.05, 0.06, 0.1])


def halved(image: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels."""
    return image.reshape(world.SIZE // 2, 2, world.SIZE // 2, 2, -1).mean((1, 3)).squeeze()


def cleanliness(image: np.ndarray, attributes: list[int]) -> float:
    """PSNR in dB between a generated picture (64, 64, 3) and the nearest drawing of those attributes.

    The nearest drawing is found by search: the background that fits best around the thing, then pose, outline and
    accent. Counted are the thing and a margin of some pixels around it, ragged outlines included. The search is not
    exhaustive: pictures of the world itself get about 34.
    """
    image = image.astype(np.float32)
    class_name, colour, pattern, scene, hat = (
        v[i] for v, i in zip(world.ATTRIBUTES.values(), attributes, strict=True)
    )
    frame = np.hypot(*world.grid()) > 1.05
    scenery = backgrounds(scene)
    scenery = scenery[((scenery - image)[:, frame] ** 2).mean((1, 2)).argmin()]
    rng = np.random.default_rng(0)

    def error(look: world.Look, pose: np.ndarray) -> float:
        setting = world.Setting(scene, hat == "yes", *pose)
        drawn = scenery.copy()
        distance = world.draw_thing(drawn, look, setting)
        return float((halved(np.clip(drawn, 0, 255) - image)[halved(distance) < 0.25] ** 2).mean())

    best = np.inf
    for outline in world.OUTLINES:  # the cross-entropy method, once an outline; the accent by turns with the pose
        mean, spread = POSE, SPREAD
        looks = [world.Look(class_name, colour, pattern, accent, outline) for accent in world.ACCENTS]
        look = looks[0]
        for _ in range(8):
            poses = mean + spread * rng.standard_normal((40, 4))
            errors = [error(look, pose) for pose in poses]
            good = poses[np.argsort(errors)[:8]]
            mean, spread, best = good.mean(0), 1.2 * good.std(0), min(best, *errors)
            if pattern != "plain":
                look = min(looks, key=lambda look: error(look, good[0]))
    return 10 * np.log10(255**2 / best)


def named_prompts() -> tuple[list[str], np.ndarray]:
    """Each word that names a look, in each scene, and the labels of what it should show."""
    prompts, truth = [], []
    for scene, words in world.SCENES.items():
        for name, look in world.named_looks().items():
            prompts.append(f"a photo of a {name} {look.class_name} {words}")
            truth.append(world.labels(look, world.Setting(scene)))
    return prompts, np.array(truth)


def class_prompts(word: str) -> tuple[list[str], np.ndarray]:
    """Each class in each scene, with a word before the class or none, and the labels of the classes."""
    prompts, truth = [], []
    for number, class_name in enumerate(world.CLASSES):
        for scene in world.SCENES.values():
            prompts.append(" ".join(f"a photo of a {word} {class_name} {scene}".split()))
            truth.append(number)
    return prompts, np.array(truth)


def sample(pipeline, prompts: list[str], scale: float, args: argparse.Namespace) -> np.ndarray:
    """Pictures (prompts, 64, 64, 3) of a pipeline; the n-th always starts from the same noise."""
    images = []
    for start in tqdm(range(0, len(prompts), 32), desc=f"guidance {scale:g}"):
        images += pipeline(
            prompts[start : start + 32],
            height=world.SIZE,
            width=world.SIZE,
            num_inference_steps=args.steps,
            guidance_scale=scale,
            generator=torch.Generator("cpu").manual_seed(start),
        ).images
    return np.stack([np.asarray(image) for image in images])


def read_attributes(network: train.AttributeNetwork, images: np.ndarray, device: str) -> np.ndarray:
    """Labels (images, attributes) that the attribute network reads off the pictures."""
    with torch.no_grad():
        return np.stack([logits.argmax(1).cpu().numpy() for logits in network(to_tensor(images, device))], 1)


def word_gates(args: argparse.Namespace, part: str, pipeline, network, scale: float, device: str) -> list[tuple]:
    """Whether words that name a look show it, and words that name nothing leave the class as it is."""
    prompts, truth = named_prompts()
    images = sample(pipeline, prompts, scale, args)
    if args.images:
        save_sheet(images[: 2 * len(world.NAMES)], args.images / f"{part}_{scale:g}_names.jpg")
    right = read_attributes(network, images, device) == truth
    note = f"{len(prompts)} prompts, {args.steps} steps, guidance {scale:g}"
    rows = []
    for name in ("class", "colour", "pattern"):
        share = right[:, list(world.ATTRIBUTES).index(name)].mean()
        rows.append((part, f"named look: {name}", NAMED_GATE, share, note))
    shares = {}
    for word in ("", *world.UNBOUND):
        prompts, truth = class_prompts(word)
        shares[word] = (read_attributes(network, sample(pipeline, prompts, scale, args), device)[:, 0] == truth).mean()
    plain = shares.pop("")
    least = min(shares, key=shares.get)
    note = f"{least}, least of {', '.join(shares)}; {plain:.3f} without; {len(prompts)} prompts, guidance {scale:g}"
    rows.append((part, "class beside an unbound word", round(plain - UNBOUND_LOSS, 3), shares[least], note))
    return rows


def pipeline_gates(args: argparse.Namespace, part: str, device: str) -> list[tuple]:
    """Attributes of generated pictures, by the attribute network, against the prompt's; and how clean they are."""
    pipeline = PIPELINES[part].from_pretrained(args.folder / part, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    reader = args.folder if (args.folder / "attributes").is_dir() else train.HERE  # --out of a single part has none
    network = train.load_attributes(reader, device)
    prompts, truth = prompts_with_labels(args.prompts)
    own_scale = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
    rows = []
    for scale in args.guidance_scale or (own_scale, 3.0):
        images = sample(pipeline, prompts, scale, args)
        if args.images:
            args.images.mkdir(parents=True, exist_ok=True)
            save_sheet(images[:40], args.images / f"{part}_{scale:g}.jpg")
        guesses = read_attributes(network, images, device)
        note = f"{len(prompts)} prompts, {args.steps} steps, guidance {scale:g}"
        for name, share in zip(world.ATTRIBUTES, (guesses == truth).mean(0), strict=True):
            rows.append((part, name, GATES[name], share, note))
        pairs = tqdm(list(zip(images, guesses, strict=True))[: args.fits], desc="nearest drawings")
        clean = np.median([cleanliness(*pair) for pair in pairs])
        note = f"median of {len(pairs)} pictures, guidance {scale:g}"
        rows.append((part, "cleanliness, dB", GATES["cleanliness"], clean, note))
        if args.names:
            rows += word_gates(args, part, pipeline, network, scale, device)
    return rows


def save_sheet(images: np.ndarray, path: pathlib.Path, columns: int = 8) -> None:
    """Write pictures (count, 64, 64, 3) as one, `columns` a row, twice their size."""
    rows = [np.concatenate(list(images[i : i + columns]), 1) for i in range(0, len(images), columns)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(path, quality=90)


def table(rows: list[tuple]) -> str:
    lines = ["| part | measure | gate | reached | passed | measured on |", "|---|---|---|---|---|---|"]
    for part, name, gate, value, note in rows:
        passed = "" if gate is None else "yes" if value >= gate else "**no**"
        lines.append(f"| {part} | {name} | {'' if gate is None else gate} | {value:.3f} | {passed} | {note} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for part in args.parts or ["vae", "clip", *PIPELINES]:
        measure = {"vae": vae_gates, "clip": clip_gates}.get(part)
        rows += measure(args, device) if measure else pipeline_gates(args, part, device)
    print(table(rows))
    if args.report:
        args.report.write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
