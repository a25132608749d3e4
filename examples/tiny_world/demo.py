# SPDX-License-Identifier: Apache-2.0
"""Personalise a tiny pipeline twice, without and with the semantic anchor, and show the difference.

    python demo.py                    # make demo
    python demo.py --backbone sd15    # make demo BACKBONE=sd15
    python demo.py --subjects ball star tree --seeds 0 1     # more than one case: a quarter of an hour

The trainer at the root of the repository is run as it is, through `accelerate launch`, with one seed for both weights.
Writes grid.png (pictures), curves.png (both terms of the loss) and the two LoRA folders to outputs/demo/. The rows "a
ball" show what is left of the class: their likeness to the subject should be the base model's, and is not. Of several
subjects or seeds each has a folder of its own there, grid.png shows all of them, and the table their means.
"""

import argparse
import json
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import gates
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import train
import world
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)

ROOT = train.HERE.parents[1]
WEIGHTS = {"w = 0": 0.0, "w = 0.5": 0.5}
# The trainer measures the anchor distance only where it has a weight. This one changes nothing else: it is below the
# rounding of the loss.
MEASURE_ONLY = 1e-12
TRAINING = {
    "sd15": {"max_train_steps": 400, "learning_rate": 2e-3},
    "sdxl": {"max_train_steps": 500, "learning_rate": 2e-3},
    "sd3": {"max_train_steps": 450, "learning_rate": 2.5e-3},
}
SHOWN_SCENES = 3  # in the picture of several cases
SHARED = {"resolution": world.SIZE, "train_batch_size": 4, "rank": 16, "checkpointing_steps": 100000}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(TRAINING), default="sd3")
    parser.add_argument("--subjects", nargs="+", choices=list(world.SUBJECTS), default=["ball"])
    parser.add_argument("--steps", type=int, help="training steps of each run; by default the backbone's own")
    parser.add_argument("--learning_rate", type=float, help="of each run; by default the backbone's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training and pictures")
    parser.add_argument("--images", type=int, default=4, help="pictures a prompt; the first is shown, all are scored")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--models", type=pathlib.Path, default=train.HERE, help="folder of the shipped models")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "outputs" / "demo")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each pair of trainings: `subject`, `seed` and its own `out`."""
    pairs = [(subject, seed) for subject in args.subjects for seed in args.seeds]
    found = []
    for subject, seed in pairs:
        out = args.out
        if len(pairs) > 1:
            out = args.out / f"{subject}-seed{seed}"
        found.append(argparse.Namespace(**vars(args) | {"subject": subject, "seed": seed, "out": out}))
    return found


def command(args: argparse.Namespace, weight: float, out: pathlib.Path) -> list[str]:
    """The trainer's command line, as a user would write it."""
    kind = world.SUBJECTS[args.subject].class_name
    options = SHARED | TRAINING[args.backbone]
    options |= {
        "pretrained_model_name_or_path": args.models / args.backbone,
        "instance_data_dir": args.models / "dataset" / args.subject,
        "instance_prompt": f"a photo of sks {kind}",
        "class_prompt": f"a photo of a {kind}",
        "anchor_weight": weight or MEASURE_ONLY,
        "seed": args.seed,
        "output_dir": out,
    }
    if args.steps is not None:
        options["max_train_steps"] = args.steps
    if args.learning_rate is not None:
        options["learning_rate"] = args.learning_rate
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [f"train_sap_lora_{args.backbone}.py", *flags, "--skip_final_inference", "--report_to", "none"]


def train_loras(args: argparse.Namespace) -> None:
    """Both runs side by side, one CPU core each; the first shows its progress, the second writes it to a file."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    runs = []
    for name, weight in WEIGHTS.items():
        out = args.out / name.replace(" ", "")
        shutil.rmtree(out, ignore_errors=True)
        arguments = command(args, weight, out)
        print("\naccelerate launch", shlex.join(arguments), flush=True)
        log = (args.out / f"{out.name}.log").open("w") if runs else None
        runs.append(subprocess.Popen([*launch, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log))
    for run in runs:
        if run.wait():
            raise SystemExit(f"training failed; see above and the logs in {args.out}")


def new_scenes(args: argparse.Namespace) -> dict[str, int]:
    """Prompt with {} for the subject -> scene index, for all scenes that no reference was taken in."""
    seen = world.SUBJECT_SCENES[args.subject]
    return {f"a photo of {{}} {phrase}": i for i, (s, phrase) in enumerate(world.SCENES.items()) if s not in seen}


@torch.no_grad()
def sample(args: argparse.Namespace, pipeline, subject: str) -> list[np.ndarray]:
    """Pictures of `subject` in the new scenes, the same noise for every model: one (images, 64, 64, 3) a prompt."""
    options = {"max_sequence_length": 77} if args.backbone == "sd3" else {}  # as in training
    columns = []
    for number, prompt in enumerate(new_scenes(args)):
        pictures = pipeline(
            prompt.format(subject),
            height=world.SIZE,
            width=world.SIZE,
            num_inference_steps=20,
            guidance_scale=args.guidance_scale,
            num_images_per_prompt=args.images,
            generator=torch.Generator("cpu").manual_seed(args.seed + number),
            **options,
        ).images
        columns.append(np.stack([np.asarray(picture) for picture in pictures]))
    return columns


class Scores:
    """Subject fidelity (ViT), text alignment (CLIP) and the share of right scenes (attribute network)."""

    def __init__(self, args: argparse.Namespace):
        self.prompts = new_scenes(args)
        self.class_name = "a " + world.SUBJECTS[args.subject].class_name
        self.identity = gates.Identity(args.models, "cpu")
        self.attributes = train.load_attributes(args.models, "cpu")
        self.clip = CLIPModel.from_pretrained(args.models / "clip", dtype=torch.float32)
        self.processor = CLIPProcessor.from_pretrained(args.models / "clip")
        self.references = self.identity(list(references(args)))

    @torch.no_grad()
    def __call__(self, columns: list[np.ndarray]) -> tuple[float, float, float]:
        fidelity = [(self.identity(list(images)) @ self.references.T).mean().item() for images in columns]
        alignment, right = [], []
        for (prompt, scene), images in zip(self.prompts.items(), columns, strict=True):
            texts = [prompt.format(self.class_name)]
            inputs = self.processor(text=texts, images=list(images), padding=True, return_tensors="pt")
            output = self.clip(**inputs)
            alignment.append(F.cosine_similarity(output.image_embeds, output.text_embeds).mean().item())
            guesses = self.attributes(gates.to_tensor(images, "cpu"))[list(world.ATTRIBUTES).index("scene")]
            right.append((guesses.argmax(1) == scene).float().mean().item())
        return float(np.mean(fidelity)), float(np.mean(alignment)), float(np.mean(right))


def references(args: argparse.Namespace) -> list[np.ndarray]:
    files = sorted((args.models / "dataset" / args.subject).glob("*.png"))
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def logged(folder: pathlib.Path, name: str) -> np.ndarray:
    """What the trainer logged under that name, one value a step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return np.array([values[name] for values in map(json.loads, lines) if name in values])


def draw_grid(args: argparse.Namespace, rows: dict[str, list[np.ndarray]]) -> None:
    """grid.png: the references above, then one row a model and one column a prompt."""
    titles = list(new_scenes(args))
    pictures = [("references", references(args))] + [(n, [images[0] for images in c]) for n, c in rows.items()]
    figure, axes = plt.subplots(len(pictures), len(titles), figsize=(1.7 * len(titles), 1.85 * len(pictures)))
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (name, images) in enumerate(pictures):
        for column, image in enumerate(images[: len(titles)]):
            axes[line, column].imshow(image, interpolation="nearest")
            if line:
                axes[line, column].set_title(titles[column].split("{} ")[1], fontsize=9)
        axes[line, 0].text(-0.08, 0.5, name, transform=axes[line, 0].transAxes, ha="right", va="center", fontsize=10)
    figure.subplots_adjust(left=0.16, right=0.99, top=0.98, bottom=0.01, wspace=0.04, hspace=0.2)
    figure.savefig(args.out / "grid.png", dpi=110)


def smooth(values: np.ndarray, window: int = 25) -> np.ndarray:
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def draw_curves(args: argparse.Namespace) -> dict[str, float]:
    """curves.png: both terms over the steps. Returns each run's drift: the anchor distance in its last quarter."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    drift = {}
    for name in WEIGHTS:
        terms = [logged(args.out / name.replace(" ", ""), f"loss/{term}") for term in ("reconstruction", "anchor")]
        for axis, values in zip(axes, terms, strict=True):
            axis.plot(smooth(values), label=name)
        drift[name] = float(terms[1][-max(1, len(terms[1]) // 4) :].mean())
    for axis, title in zip(axes, ("reconstruction of the references", "distance to the anchor (drift)"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(args.out / "curves.png", dpi=110)
    return drift


def draw_all(args: argparse.Namespace, found: dict[tuple[str, int], dict[str, list[np.ndarray]]]) -> None:
    """grid.png of several cases: below each other the subjects and their models, side by side the seeds.

    Of each case the first SHOWN_SCENES scenes are shown; the first column has the subject's photos.
    """
    lines = [(subject, name) for subject in args.subjects for name in found[subject, args.seeds[0]]]
    columns = 1 + SHOWN_SCENES * len(args.seeds)
    figure, axes = plt.subplots(len(lines), columns, figsize=(1.25 * columns + 1.6, 1.3 * len(lines)))
    for axis in axes.flat:
        axis.set_axis_off()
    for (subject, name), row in zip(lines, axes, strict=True):
        case = argparse.Namespace(**vars(args) | {"subject": subject})
        models = [model for one, model in lines if one == subject]
        photos = references(case)
        row[0].imshow(photos[models.index(name) % len(photos)], interpolation="nearest")
        label = name.replace("class", f'"a {world.SUBJECTS[subject].class_name}"')
        row[0].text(-0.1, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=8)
        if name == models[0]:
            row[0].set_title("photos", fontsize=8, pad=2)
        for place, seed in enumerate(args.seeds):
            start = 1 + SHOWN_SCENES * place
            for axis, images, prompt in zip(row[start:], found[subject, seed][name], new_scenes(case), strict=False):
                axis.imshow(images[0], interpolation="nearest")
                if name == models[0]:
                    of_seed = f"seed {seed}\n" if subject == args.subjects[0] else ""
                    axis.set_title(of_seed + prompt.split("{} ")[1], fontsize=7, pad=2)
    figure.subplots_adjust(
        left=1.4 / figure.get_figwidth(), right=0.995, top=0.98, bottom=0.005, wspace=0.05, hspace=0.12
    )
    figure.savefig(args.out / "grid.png", dpi=64)


def print_table(rows: dict[str, tuple], drift: dict[str, float]) -> None:
    """Scores a row; the drift of the rows that have one."""
    print(f"\n{'':<24}{'likeness (ViT)':>18}{'text alignment':>16}{'scenes right':>14}{'drift':>9}")
    for name, scores in rows.items():
        numbers = "".join(f"{value:{width}.3f}" for value, width in zip(scores, (18, 16, 14), strict=True))
        measured = f"{drift[name]:9.4f}" if name in drift else ""
        print(f"{name:<24}{numbers}{measured}")


def personalise(args: argparse.Namespace) -> tuple[dict[str, list[np.ndarray]], dict[str, tuple], dict[str, float]]:
    """Train one case; the pictures of each model, their scores, and each run's drift."""
    kind = world.SUBJECTS[args.subject].class_name
    args.out.mkdir(parents=True, exist_ok=True)
    train_loras(args)
    pipeline = gates.PIPELINES[args.backbone].from_pretrained(args.models / args.backbone)
    pipeline.set_progress_bar_config(disable=True)
    logging.getLogger("diffusers.loaders.lora_base").setLevel(logging.ERROR)  # no text encoder was trained
    print("\nsampling", flush=True)
    rows = {"base model, class": sample(args, pipeline, f"a {kind}")}
    for name in WEIGHTS:
        pipeline.load_lora_weights(args.out / name.replace(" ", ""))
        rows[name] = sample(args, pipeline, f"sks {kind}")
        rows[f"{name}, class"] = sample(args, pipeline, f"a {kind}")
        pipeline.unload_lora_weights()
    scores = Scores(args)
    return rows, {name: scores(columns) for name, columns in rows.items()}, draw_curves(args)


def main() -> None:
    args = parse_args()
    pictures = {}
    scores = []
    drifts = []
    for case in cases(args):
        rows, its_scores, drift = personalise(case)
        pictures[case.subject, case.seed] = rows
        scores.append(its_scores)
        drifts.append(drift)
    if len(pictures) == 1:
        kind = world.SUBJECTS[args.subjects[0]].class_name
        draw_grid(case, {name.replace("class", f'"a {kind}"'): columns for name, columns in rows.items()})
    else:
        draw_all(args, pictures)
    means = {name: tuple(np.mean([one[name] for one in scores], axis=0)) for name in scores[0]}
    drift = {name: float(np.mean([one[name] for one in drifts])) for name in drifts[0]}
    print_table(means, {"base model, class": 0.0} | drift)
    print(f"\nOpen {args.out / 'grid.png'}\nand  {case.out / 'curves.png'}")


if __name__ == "__main__":
    main()
