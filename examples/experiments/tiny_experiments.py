# SPDX-License-Identifier: Apache-2.0
"""The paper's questions, and a sceptic's, on the tiny world: train, draw and measure drift; tiny_report.py answers.

    python tiny_experiments.py --backbone sd15 --output_dir outputs/tiny --processes 2
    python tiny_report.py --output_dir outputs/tiny

Many trainings share a process, so that one costs its steps and not its start. Parts, in this order:

    core        w of 0, .5 and 1, the finetuned anchor, and prior preservation, with all seeds
    curve       w of .25 and .75
    masks       w of .25 and .5 with exact masks of the subjects
    frontier    w = 0 at a quarter of the rate, and of an eighth of the rank
    rates       w = .5 and prior preservation at half and twice the rate, on the tuning subjects
    budget      both at the best of their three rates (tuning subjects), on the other subjects
    neighbours  DCO, differential output preservation, L2 on the LoRA
    offers      samples that see the class prompt; an anchor whose weight rises, or falls, with the noise

w of 0, .5 and 1, and the frontier's runs, are drawn at four steps. All have all of --seeds but the rates and the
neighbours, which have the first one. What is there is not done again: parts, seeds, subjects and backbones can be
asked for one by one, and a stopped command goes on. Writes
loras/RUN-seedS/SUBJECT/, images/METHOD/ as evaluate.py reads it, with pictures of the class prompts,
plain/images/METHOD/ (pictures of a prompt that names no scene), rates-BACKBONE.json and
drift/BACKBONE/SUBJECT/drift.csv.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from tiny_numbers import TUNING_SUBJECTS
from tiny_plan import (
    EARLY,
    EQUAL_COMPUTE,
    PRIOR,
    RATE,
    RATES,
    SAP,
    SEEDS,
    Run,
    anchored,
    at_rate,
    neighbour,
    planned,
)
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "dreambench"))  # the scripts that this one runs in its own processes
import evaluate  # noqa: E402
import generate  # noqa: E402
import neighbours  # noqa: E402
from benchmark import PROMPTS_FILE, HelpFormatter, load_script, read_benchmark  # noqa: E402

WORLD = ROOT / "examples" / "tiny_world"
drift = load_script(ROOT / "examples" / "analysis" / "drift.py")
PARTS = ("core", "curve", "masks", "frontier", "rates", "budget", "neighbours", "offers")
CLASS_IMAGES = ["--num_class_images=24", "--sampling_steps=10", "--guidance_scale=3"]
PLAIN_PROMPT = "a photo of {0} {1}"  # a prompt that names no scene


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--backbone", choices=["sd15", "sdxl", "sd3"], required=True, help="which tiny pipeline")
    add("--output_dir", type=Path, required=True, help="folder of everything")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    add(
        "--runs",
        nargs="+",
        metavar="RUN",
        help="some of their runs by name: w0-pretrained, prior; all by default",
    )
    add("--stops", nargs="+", type=float, default=EARLY, help="shares of the steps at which runs are drawn, too")
    add("--subjects", nargs="+", help="some of the tiny world's subjects; all by default")
    add("--seeds", nargs="+", type=int, default=SEEDS, help="of the trainings; some parts take the first ones only")
    add("--steps", type=int, default=200, help="of every training, a multiple of 8")
    add("--train_batch_size", type=int, default=2, help="of every training")
    add("--prompts", nargs="+", type=int, help="numbers of some prompts; all by default")
    add("--plain_images", type=int, default=6, help="pictures of the prompt that names no scene; 0: no DIV, no leak")
    add("--processes", type=int, default=1, help="trainings side by side, a CPU core each")
    add("--world", type=Path, default=WORLD, help="folder of pipelines, data and metric models")
    args = parser.parse_args(arguments)
    if args.steps < 8 or args.steps % 8:
        parser.error(f"--steps must be a multiple of 8, not {args.steps}")
    try:
        args.benchmark = read_benchmark(args.world / "dataset")
    except ValueError as error:
        parser.error(f"--world: {error}")
    args.subjects = args.subjects or args.benchmark.subjects()
    if unknown := set(args.subjects) - set(args.benchmark.subjects()):
        parser.error(f"--subjects: no {', '.join(sorted(unknown))} in {args.world / 'dataset'}")
    return args


# --- The plan -----------------------------------------------------------------------------------------------------


def budget_runs(args: argparse.Namespace) -> list[Run]:
    """Both methods at their best rates on the scored subjects; where that is RATE, the core has it already."""
    best = best_rates(args)
    options = {"subjects": "scored"}
    runs = [anchored(0.5, rate=best[SAP], **options)]
    runs += [neighbour(PRIOR, rate=best[PRIOR], early=(EQUAL_COMPUTE,), kept=(EQUAL_COMPUTE,), **options)]
    return [run for run in runs if run.tags["rate"] != RATE]


def seeds_of(run: Run, args: argparse.Namespace) -> list[int]:
    return args.seeds[: run.seeds]


def subjects_of(run: Run, args: argparse.Namespace) -> list[str]:
    tuning = [name for name in args.subjects if name in TUNING_SUBJECTS]
    others = [name for name in args.subjects if name not in TUNING_SUBJECTS]
    return {"all": args.subjects, "tuning": tuning, "scored": others}[run.subjects]


def method_name(args: argparse.Namespace, name: str, seed: int, step: int) -> str:
    """The folder of a run's pictures: of its last step without the step."""
    return f"{args.backbone}-{name}{f'-step{step}' if step != args.steps else ''}-seed{seed}"


def best_rates(args: argparse.Namespace) -> dict[str, float]:
    """The rate of each method with the greatest CLIP-T + (CLIP-I + DINO) / 2 on the tuning subjects, of the first
    seed; rates-BACKBONE.json tells all of them."""
    tuning = [name for name in args.subjects if name in TUNING_SUBJECTS]
    if not tuning:
        raise ValueError(f"--subjects: rates are chosen on {', '.join(TUNING_SUBJECTS)}; add one of them")
    runs = [(name, rate) for name in (SAP, PRIOR) for rate in RATES]
    methods = [method_name(args, at_rate(*run), args.seeds[0], args.steps) for run in runs]
    for folder in (args.output_dir / "images" / method / one for method in methods for one in tuning):
        if not folder.is_dir():
            raise ValueError(f"--parts budget needs {folder}: run the parts core and rates before")
    scores, totals = score(args, methods), {SAP: {}, PRIOR: {}}
    for (name, rate), method in zip(runs, methods, strict=True):
        known = [scores[method]["subjects"][one] for one in tuning]
        totals[name][rate] = sum(one["clip_t"] + (one["clip_i"] + one["dino"]) / 2 for one in known) / len(known)
    best = {name: max(by_rate, key=by_rate.get) for name, by_rate in totals.items()}
    told = {"tuning_subjects": tuning, "best": best, "totals": totals}
    (args.output_dir / f"rates-{args.backbone}.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    return best


def score(args: argparse.Namespace, methods: Sequence[str]) -> dict[str, dict]:
    """evaluate.py's scores of some methods."""
    folders = [f"--images_dir={args.output_dir / 'images'}", f"--output_dir={args.output_dir / 'rates'}"]
    models = [f"--clip_model={args.world / 'clip'}", f"--dino_model={args.world / 'vit'}"]
    forget_accelerate()
    evaluate.main(
        evaluate.parse_args([f"--data_dir={args.world / 'dataset'}", *folders, *models, "--methods", *methods])
    )
    return json.loads((args.output_dir / "rates" / "scores.json").read_text(encoding="utf-8"))["methods"]


# --- What the world gives ------------------------------------------------------------------------------------------


def make_masks(args: argparse.Namespace) -> None:
    """masks/SUBJECT/00.png for each reference: how much of a pixel the thing covers, as the world draws it."""
    world = load_script(WORLD / "world.py")
    for subject in args.subjects:
        rng = np.random.default_rng(list(world.SUBJECTS).index(subject) + 1000)  # as in world.references
        first, second = world.SUBJECT_SCENES[subject]
        for number, scene in enumerate((first, first, first, second, second)):
            look, setting = world.SUBJECTS[subject], world.random_setting(rng, scene, hat=False)
            photo = args.benchmark.references(subject)[number]
            if not np.array_equal(np.asarray(Image.open(photo).convert("RGB")), world.draw(look, setting)):
                raise ValueError(f"--world: {photo} is not what {WORLD / 'world.py'} draws: make the dataset again")
            grounds = [np.full((world.SIZE, world.SIZE, 3), level, np.float32) for level in (0, 255)]
            for ground in grounds:
                world.draw_thing(ground, look, setting)
            cover = 255 - (grounds[1] - grounds[0]).mean(-1)  # the ground does not show where the thing covers it
            path = args.output_dir / "masks" / subject / photo.name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cover.clip(0, 255).round().astype(np.uint8)).save(path)


def make_plain_benchmark(args: argparse.Namespace) -> None:
    """plain/dataset: the same subjects with one prompt, which names no scene."""
    folder = args.output_dir / "plain" / "dataset"
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{subject},{kind}\n" for subject, kind in args.benchmark.classes.items())
    text = f'Classes\n\nsubject_name,class\n{rows}\nPrompts\n\nprompt_list = [\n"{PLAIN_PROMPT}",\n]\n'
    (folder / PROMPTS_FILE).write_text(text, encoding="utf-8")
    for subject in args.benchmark.subjects():
        if not (folder / subject).exists():
            shutil.copytree(args.world / "dataset" / subject, folder / subject)


# --- The work -----------------------------------------------------------------------------------------------------


def forget_accelerate() -> None:
    """Forget the settings of the last training in this process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def start_worker(args: argparse.Namespace) -> None:
    """In a new process: everything that the scripts print goes to a file, and the script is loaded once."""
    global SCRIPT
    log = os.open(args.output_dir / f"worker-{args.backbone}-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    SCRIPT = load_script(ROOT / f"train_sap_lora_{args.backbone}.py")


def class_flags(args: argparse.Namespace, kind: str) -> list[str]:
    """Flags of neighbours.py for class pictures that all trainings of a class share."""
    folder = args.output_dir / "class_images" / args.backbone / kind
    return [f"--backbone={args.backbone}", f"--class_data_dir={folder}", *CLASS_IMAGES]


def draw_class(args: argparse.Namespace, kind: str) -> None:
    """The class pictures of prior preservation, before anything trains."""
    flags = [
        f"--pretrained_model_name_or_path={args.world / args.backbone}",
        f"--instance_data_dir={args.world / 'dataset' / args.subjects[0]}",  # the script wants one
        *("--instance_prompt=unused", f"--class_prompt=a photo of a {kind}", "--seed=0", "--resolution=64"),
    ]
    neighbours.make_class_images(neighbours.parse_args(["--method=prior", *class_flags(args, kind), *flags], SCRIPT))


def train(args: argparse.Namespace, run: Run, seed: int, subject: str) -> None:
    """One LoRA, with a checkpoint at each share that is kept; its seconds of CPU go to seconds.json.

    One that was broken off begins anew: its seconds shall be those of all its steps.
    """
    folder = args.output_dir / "loras" / f"{args.backbone}-{run.name}-seed{seed}" / subject
    if (folder / "seconds.json").is_file():
        return
    if folder.is_dir():
        shutil.rmtree(folder)
    kind = args.benchmark.classes[subject]
    kept = [round(share * args.steps) for share in run.kept]
    flags = [
        f"--pretrained_model_name_or_path={args.world / args.backbone}",
        f"--instance_data_dir={args.world / 'dataset' / subject}",
        f"--instance_prompt=a photo of sks {kind}",
        f"--class_prompt=a photo of a {kind}",
        f"--output_dir={folder}",
        f"--seed={seed}",
        f"--max_train_steps={args.steps}",
        f"--train_batch_size={args.train_batch_size}",
        f"--checkpointing_steps={min([*kept, args.steps])}",
        f"--logging_steps={args.steps}",
        *("--resolution=64", "--center_crop", "--skip_final_inference", "--report_to=none"),
        *([f"--mask_dir={args.output_dir / 'masks' / subject}"] if run.masked else []),
        *run.flags,
    ]
    forget_accelerate()
    started = time.process_time()
    if run.method == "sap":
        SCRIPT.main(SCRIPT.parse_args(flags))
    else:
        neighbours.main(neighbours.parse_args([f"--method={run.method}", *class_flags(args, kind), *flags], SCRIPT))
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) not in kept:
            shutil.rmtree(checkpoint)
    (folder / "seconds.json").write_text(json.dumps(round(time.process_time() - started, 1)))


def draw(args: argparse.Namespace, name: str, subjects: Sequence[str], tags: dict, plain=False, loras="") -> None:
    """The pictures of one method by generate.py: one of each prompt, or several of the prompt without a scene; and as
    many with the class alone."""
    data, images = args.world / "dataset", args.output_dir / "images"
    if plain:
        data, images = args.output_dir / "plain" / "dataset", args.output_dir / "plain" / "images"
    flags = [
        f"--pretrained_model_name_or_path={args.world / args.backbone}",
        f"--data_dir={data}",
        f"--images_dir={images}",
        f"--method={name}",
        *(["--class_prompts"] if loras or plain else []),  # else the base model's pictures are those of the class
        *("--subjects", *subjects, f"--images={args.plain_images if plain else 1}"),
        *("--resolution=64", "--batch_size=12"),
        *("--num_inference_steps=10", "--guidance_scale=3"),
        *(["--loras", loras] if loras else []),
        *(["--prompts", *map(str, args.prompts)] if args.prompts and not plain else []),
        *(["--max_sequence_length=77"] if args.backbone == "sd3" else []),
        *("--tags", *(f"{key}={value}" for key, value in tags.items())),
    ]
    forget_accelerate()
    generate.main(generate.parse_args(flags))


def draw_base(args: argparse.Namespace) -> None:
    """The pictures of the base model, on the class prompts."""
    tags = {"backbone": args.backbone, "run": "base", "steps": 0}
    draw(args, f"{args.backbone}-base", args.subjects, tags)
    if args.plain_images:
        draw(args, f"{args.backbone}-base", args.subjects, tags, plain=True)


def work(args: argparse.Namespace, run: Run, seed: int) -> tuple[int, str]:
    """All LoRAs of a run with one seed, and their pictures; how many LoRAs, and what ended them early, if something
    did: a loss that is not finite, say, ends this run and no other."""
    subjects, name = subjects_of(run, args), f"{args.backbone}-{run.name}-seed{seed}"
    try:
        for subject in subjects:
            train(args, run, seed, subject)
    except (SCRIPT.RunError, SCRIPT.UsageError) as error:  # classes that only this process knows
        return len(subjects), f"{name}: {error}"
    folder, tags = args.output_dir / "loras" / name / "{subject}", {"backbone": args.backbone, "run": run.name}
    tags |= run.tags | {"seed": seed, "steps": args.steps}
    draw(args, name, subjects, tags, loras=str(folder))
    if run.plain and args.plain_images:
        draw(args, name, subjects, tags, True, str(folder))
    for share in run.early:
        step = round(share * args.steps)
        early = tags | {"steps": step, "label": f"{tags.get('label', run.name)}, {step} steps"}
        method = method_name(args, run.name, seed, step)
        draw(args, method, subjects, early, loras=str(folder / f"checkpoint-{step}"))
    return len(subjects), ""


def run_part(part: str, args: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
    """Train and draw; a run that failed is told, and the others go on."""
    runs = budget_runs(args) if part == "budget" else planned(args.stops)[part]
    runs = [run for run in runs if not args.runs or run.name in args.runs]
    units = [(run, seed) for run in runs if subjects_of(run, args) for seed in seeds_of(run, args)]
    units.sort(key=lambda unit: unit[1])  # all of a seed before the next one: half a part is of use, too
    futures = [pool.submit(work, args, run, seed) for run, seed in units]
    total = sum(len(subjects_of(run, args)) for run, _ in units)
    with tqdm(total=total, desc=f"{args.backbone}, {part}", unit="LoRA") as bar:
        for future in as_completed(futures):
            count, trouble = future.result()
            bar.update(count)
            if trouble:
                tqdm.write(trouble)


def measure_drift(args: argparse.Namespace, subject: str) -> None:
    """drift.py over all LoRAs of a subject; what it measured before it keeps."""
    loras, kind = args.output_dir / "loras", args.benchmark.classes[subject]
    folders = sorted(file.parent for file in loras.glob(f"{args.backbone}-*/{subject}/seconds.json"))
    flags = [
        f"--pretrained_model_name_or_path={args.world / args.backbone}",
        f"--instance_data_dir={args.world / 'dataset' / subject}",
        f"--instance_prompt=a photo of sks {kind}",
        f"--class_prompt=a photo of a {kind}",
        *("--resolution=64", "--num_noises=1", "--batch_size=25", f"--final_step={args.steps}"),
        *("--anchor_latents=class", f"--class_data_dir={args.output_dir / 'class_images' / args.backbone / kind}"),
        *(f"--run={path.parent.name}={path}" for path in folders),
        f"--output_dir={args.output_dir / 'drift' / args.backbone / subject}",
    ]
    if folders:
        drift.main(drift.parse_args(flags))


def main(args: argparse.Namespace) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    make_masks(args)
    make_plain_benchmark(args)
    context = multiprocessing.get_context("spawn")
    options = {"mp_context": context, "initializer": start_worker, "initargs": (args,)}
    pool = ProcessPoolExecutor(args.processes, **options)
    try:
        kinds = {args.benchmark.classes[subject]: None for subject in args.subjects}
        before = [pool.submit(draw_base, args), *(pool.submit(draw_class, args, kind) for kind in kinds)]
        for future in before:
            future.result()
        for part in args.parts:
            run_part(part, args, pool)
        drifts = [pool.submit(measure_drift, args, subject) for subject in args.subjects]
        for future in tqdm(as_completed(drifts), total=len(drifts), desc=f"{args.backbone}, drift", unit="subject"):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after a mistake, or Ctrl-C, nothing more begins


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the workers would stay
    try:
        main(parse_args())
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
