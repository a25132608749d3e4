# SPDX-License-Identifier: Apache-2.0
"""Make DreamBench's pictures with a base model and one LoRA a subject, or with another method that diffusers loads.

    python generate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --data_dir dreambench --images_dir images --method sap --loras "loras/sd15-w0.5-pretrained-seed0/{subject}"
    accelerate launch generate.py ...                                                        # several GPUs

Writes IMAGES/METHOD/SUBJECT/PROMPT_INDEX/N.png and IMAGES/METHOD/manifest.json, which says of every picture its
prompt, seed and weights, and is written first: started again, the command makes what is missing. A picture's seed
depends on --seed, subject, prompt and N alone, so all methods start from the same noise. Without weights for each
subject, the base model is shown the class prompt ("a dog in the snow"). With --class_prompts a model with a subject's
weights is shown it, too, from the same seeds: IMAGES/METHOD/SUBJECT/class/PROMPT_INDEX/N.png, what it draws of the
class after training.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from accelerate import PartialState
from benchmark import (
    CLASS_FOLDER,
    Benchmark,
    HelpFormatter,
    UnreadableImage,
    check_name,
    load_script,
    model_name,
    path,
    read_benchmark,
    read_image,
    read_json,
    write_json,
)
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

SAMPLING_FILE = Path(__file__).resolve().parents[1] / "sampling" / "beyond_finetuning.py"
LORA_FILE = "pytorch_lora_weights.safetensors"
CUSTOM_DIFFUSION_FILE = "pytorch_custom_diffusion_weights.safetensors"
SOURCES = ("loras", "pipelines", "textual_inversion", "custom_diffusion", "ip_adapter")
BEYOND = ("switch_step", "concept_weight", "class_weight")


@dataclass(frozen=True)
class Picture:
    """One picture to make: its file below IMAGES/METHOD, its prompts and its seed."""

    file: str
    subject: str
    prompt_index: int
    prompt: str
    class_prompt: str
    seed: int
    weights: str | None
    weights_sha256: str | None


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", type=model_name, help="Base pipeline: hub name or local folder.")
    add("--data_dir", type=path, required=True, help="DreamBench: a folder a subject, and prompts_and_classes.txt.")
    add("--images_dir", type=path, required=True, help="Folder of the pictures of all methods.")
    add("--method", required=True, help="Name of the method: its folder, and its row in the table.")
    add("--tags", nargs="*", default=[], metavar="KEY=VALUE", help="Facts for the plots: backbone, w, anchor, seed.")
    add = parser.add_argument_group(
        "weights, with {subject} where its name belongs (at most one of these)"
    ).add_argument
    add("--loras", help="LoRA folders or files.")
    add("--pipelines", help="Whole fine-tuned pipelines; no base is needed.")
    add("--textual_inversion", help="Textual Inversion embeddings, whose word is --token.")
    add("--custom_diffusion", help=f"Custom Diffusion folders: {CUSTOM_DIFFUSION_FILE} and TOKEN.safetensors.")
    add("--ip_adapter", help="IP-Adapter repository or folder; the first reference is the picture that it reads.")
    add("--ip_adapter_subfolder", default="models", help="Folder of the IP-Adapter in it.")
    add("--ip_adapter_weight", default="ip-adapter_sd15.safetensors", help="File of the IP-Adapter in it.")
    add("--ip_adapter_scale", type=float, default=0.6, help="Strength of the IP-Adapter.")
    add = parser.add_argument_group("pictures").add_argument
    add("--subjects", nargs="+", help="Some subjects (default: all that have pictures).")
    add("--prompts", nargs="+", type=int, help="Numbers of some prompts (default: all).")
    add("--images", type=int, default=4, help="Pictures a prompt.")
    add("--class_prompts", action="store_true", help="Also draw each prompt with the class alone, without --token.")
    add("--token", default="sks", help="Word for the subject.")
    add("--seed", type=int, default=0, help="Seed of all pictures.")
    add("--resolution", type=int, help="Edge in pixels (default: the model's).")
    add("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    add("--guidance_scale", type=float, default=7.5, help="Classifier-free guidance (not for mixed, multistage).")
    add("--max_sequence_length", type=int, help="Tokens that SD3's T5 reads, as in training.")
    add("--batch_size", type=int, default=4, help="Pictures at once.")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="Default: float16 on a GPU, float32 on a CPU.")
    add = parser.add_argument_group("Beyond-Finetuning sampling (examples/sampling)").add_argument
    add(
        "--sampler", choices=["standard", "switching", "mixed", "multistage"], default="standard", help="How to guide."
    )
    add("--switch_step", type=int, help="Step at which switching and multistage turn from the class to the subject.")
    add("--concept_weight", type=float, help="Guidance towards the subject prompt, for mixed and multistage.")
    add("--class_weight", type=float, help="Guidance towards the class prompt, for mixed and multistage.")
    args = parser.parse_args(input_args)
    try:
        args.benchmark = read_benchmark(args.data_dir)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raise `ValueError` for what cannot work, before anything is loaded."""
    check_name(args.method, "--method")
    if args.images_dir.exists() and not args.images_dir.is_dir():
        raise ValueError(f"--images_dir: {args.images_dir} is not a folder")
    given = [name for name in SOURCES if getattr(args, name)]
    if len(given) > 1:
        raise ValueError(f"--{given[1]} cannot go with --{given[0]}: a method has one kind of weights")
    if bool(args.pipelines) == bool(args.pretrained_model_name_or_path):
        raise ValueError("give either --pretrained_model_name_or_path or --pipelines: one of them is the model")
    if given and given[0] != "ip_adapter" and "{subject}" not in getattr(args, given[0]):
        raise ValueError(f'--{given[0]} must hold {{subject}}, such as "loras/run/{{subject}}"')
    if args.sampler != "standard" and not (args.loras or args.pipelines):
        raise ValueError(f"--sampler {args.sampler} needs a model that knows the subject: --loras or --pipelines")
    if args.sampler == "standard" and any(getattr(args, name) is not None for name in BEYOND):
        raise ValueError("--switch_step, --concept_weight and --class_weight belong to --sampler other than standard")
    for name in ("images", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not math.isfinite(args.guidance_scale):
        raise ValueError(f"--guidance_scale must be a number, not {args.guidance_scale}")
    args.tags = dict(read_tag(text) for text in args.tags)
    check_subjects(args, *given)


def check_subjects(args: argparse.Namespace, source: str = "") -> None:
    """Raise `ValueError` for a subject without pictures, whole weights (of the flag `source`) or these prompts."""
    there = args.benchmark.subjects()
    args.subjects = args.subjects or there
    for subject in args.subjects:
        if subject not in there:
            raise ValueError(f"--subjects: {subject} has no pictures or no class in {args.data_dir}")
        weights = weights_of(args, subject)
        if weights is not None:
            check_weights(f"--{source}", weights)
        count = len(args.benchmark.templates(subject))
        if any(not 0 <= index < count for index in args.prompts or []):
            raise ValueError(f"--prompts must be from 0 to {count - 1} for {subject}")


def read_tag(text: str) -> tuple[str, object]:
    """("w", 0.5) of "w=0.5"; what is no number, true or false stays text."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise ValueError(f"--tags {text}: write KEY=VALUE, such as w=0.5")
    try:
        found = json.loads(value, parse_constant=str)  # NaN is no JSON
    except (json.JSONDecodeError, RecursionError):
        return key, value
    return key, found if isinstance(found, (int, float)) else value


def weights_of(args: argparse.Namespace, subject: str) -> Path | None:
    """Where a subject's weights are; None for the base model, which has none, and for an IP-Adapter."""
    patterns = [getattr(args, name) for name in SOURCES if name != "ip_adapter" and getattr(args, name)]
    return path(patterns[0].replace("{subject}", subject)) if patterns else None


def weight_files(weights: Path) -> list[Path]:
    """The file itself, or of a folder the LoRA's (not its copy for other programs), or all safetensors files."""
    if weights.is_file():
        return [weights]
    if (weights / LORA_FILE).is_file():
        return [weights / LORA_FILE]
    pattern = "*/*.safetensors" if (weights / "model_index.json").is_file() else "*.safetensors"
    return sorted(weights.glob(pattern))


def check_weights(flag: str, weights: Path) -> None:
    """Raise `ValueError` where a subject's weights are missing, damaged, or not numbers: they draw something, too."""
    if not weights.exists():
        raise ValueError(f"{flag}: {weights} is not there")
    if not weight_files(weights):
        raise ValueError(f"{flag}: {weights} has no .safetensors file; train it again")
    for file in weight_files(weights):
        try:
            with safe_open(file, "pt") as tensors:
                odd = [name for name in tensors.keys() if not tensors.get_tensor(name).isfinite().all()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{flag}: {file} is damaged ({error}): copy or train it again") from error
        if odd:
            raise ValueError(f"{flag}: {file} holds numbers that are not finite, in {odd[0]}: train it again")


def digest(weights: Path | None) -> str | None:
    """SHA-256 over the names and bytes of the weights."""
    if weights is None:
        return None
    total = hashlib.sha256()
    for file in weight_files(weights):
        total.update(file.name.encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def seed_of(seed: int, subject: str, prompt_index: int, number: int) -> int:
    """A picture's seed, the same for every method."""
    text = f"{seed}/{subject}/{prompt_index}/{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def plan(args: argparse.Namespace) -> list[Picture]:
    """All pictures of the method; those of a subject's class prompts follow those of its own."""
    pictures = []
    for subject in args.subjects:
        weights = weights_of(args, subject)
        sha256 = digest(weights)
        token = args.token if weights is not None else None
        pictures += pictures_of(args, subject, token, weights, sha256)
        if args.class_prompts:
            pictures += pictures_of(args, subject, None, weights, sha256, f"{CLASS_FOLDER}/")
    return pictures


def pictures_of(
    args: argparse.Namespace,
    subject: str,
    token: str | None,
    weights: Path | None,
    sha256: str | None,
    folder: str = "",
) -> list[Picture]:
    """A subject's pictures, of the prompts with `token` or, with None, of the class prompts."""
    benchmark: Benchmark = args.benchmark
    class_prompts = benchmark.prompts(subject)
    prompts = class_prompts if token is None else benchmark.prompts(subject, token)
    source = None if weights is None else str(weights)
    pictures = []
    for index in args.prompts if args.prompts is not None else range(len(prompts)):
        for number in range(args.images):
            file = f"{subject}/{folder}{index}/{number}.png"
            seed = seed_of(args.seed, subject, index, number)
            pictures.append(Picture(file, subject, index, prompts[index], class_prompts[index], seed, source, sha256))
    return pictures


def scheduler_of(args: argparse.Namespace) -> str:
    """The class of the model's own scheduler, which samples."""
    model = args.pretrained_model_name_or_path or weights_of(args, args.subjects[0])
    return DiffusionPipeline.load_config(model)["scheduler"][1]


def manifest_of(args: argparse.Namespace, pictures: list[Picture]) -> dict:
    """What is true of the whole method, and of each picture."""
    beyond = {name: getattr(args, name) for name in BEYOND if getattr(args, name) is not None}
    return {
        "method": args.method,
        "tags": args.tags,
        "model": args.pretrained_model_name_or_path or args.pipelines,
        "scheduler": scheduler_of(args),
        "ip_adapter": args.ip_adapter,
        "sampler": {"name": args.sampler, **beyond},
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "resolution": args.resolution,
        "images": [asdict(picture) for picture in pictures],
    }


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json before the first picture; those of other subjects or prompts that it has stay in it.

    Raises:
        ValueError: if the folder has pictures made otherwise, which would be mixed with these.
    """
    file = folder / "manifest.json"
    if file.exists():
        before = read_json(file)
        try:
            pictures = {picture["file"]: picture for picture in before["images"]}
        except (TypeError, LookupError) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it, it is written again") from error
        added = {picture["file"]: picture for picture in manifest["images"]}
        changed = [key for key in manifest if key != "images" and before.get(key) != manifest[key]]
        if any(pictures.get(name, one) != one for name, one in added.items()):
            changed.append("images")
        if changed:
            raise ValueError(f"{file} was made with other {', '.join(changed)}: take another --method, or remove it")
        manifest = manifest | {"images": list((pictures | added).values())}
    write_json(file, manifest)


def expected(record: logging.LogRecord) -> bool:
    """A filter without diffusers' warning that a LoRA has nothing for a text encoder: most LoRAs have not."""
    said = record.getMessage()
    return not (said.startswith("No LoRA keys associated") and "prefix='text_encoder" in said)


def load_lora(pipeline: DiffusionPipeline, weights: Path) -> None:
    """Load a LoRA's file or folder; `ValueError` where it does not fit the base."""
    file = weight_files(weights)[0]
    with safe_open(file, "pt") as tensors:
        keys = list(tensors.keys())
    logger = logging.getLogger("diffusers.loaders.lora_base")
    trains_text = any("text_encoder" in key or key.startswith("lora_te") for key in keys)
    if not trains_text:
        logger.addFilter(expected)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    except (RuntimeError, ValueError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"--loras: {weights} does not fit the base; is it another model's LoRA?") from error
    finally:
        logger.removeFilter(expected)
    if not pipeline.get_active_adapters():
        raise ValueError(f"--loras: {weights} has no layer that fits the base; is it another model's LoRA?")


class Model:
    """The pipeline, with the weights of one subject at a time."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        default = "float32" if device.type == "cpu" else "float16"
        self.dtype = getattr(torch, args.dtype or default)
        self.pipeline, self.subject = None, None
        if args.pretrained_model_name_or_path and not args.custom_diffusion:
            self.pipeline = self.load(args.pretrained_model_name_or_path)
        if args.ip_adapter:
            self.pipeline.load_ip_adapter(
                args.ip_adapter, subfolder=args.ip_adapter_subfolder, weight_name=args.ip_adapter_weight
            )
            self.pipeline.set_ip_adapter_scale(args.ip_adapter_scale)

    def load(self, name: str) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=self.dtype).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "safety_checker", None) is not None:  # it would blacken pictures, which are then scored
            pipeline.safety_checker = None
            pipeline.register_to_config(requires_safety_checker=False)
        return pipeline

    def of(self, subject: str) -> DiffusionPipeline:
        """The pipeline for a subject."""
        if subject != self.subject:
            self.take(subject, weights_of(self.args, subject))
            self.subject = subject
        return self.pipeline

    def take(self, subject: str, weights: Path | None) -> None:
        args = self.args
        if args.loras:
            self.pipeline.unload_lora_weights()
            load_lora(self.pipeline, weights)
        elif args.pipelines:
            self.pipeline = self.load(str(weights))
        elif args.textual_inversion:
            if self.subject is not None:
                self.pipeline.unload_textual_inversion()
            self.pipeline.load_textual_inversion(str(weights), token=args.token, use_safetensors=True)
        elif args.custom_diffusion:  # it replaces attention processors, which cannot be taken back
            self.pipeline = self.load(args.pretrained_model_name_or_path)
            self.pipeline.unet.load_attn_procs(str(weights), weight_name=CUSTOM_DIFFUSION_FILE)
            self.pipeline.unet.to(self.device, self.dtype)
            if (weights / f"{args.token}.safetensors").is_file():
                self.pipeline.load_textual_inversion(str(weights), weight_name=f"{args.token}.safetensors")

    def options(self, subject: str) -> dict:
        """What the pipeline's call is given beside prompts and seeds."""
        args = self.args
        options = {"num_inference_steps": args.num_inference_steps}
        if args.resolution:
            options |= {"height": args.resolution, "width": args.resolution}
        if args.max_sequence_length:
            options["max_sequence_length"] = args.max_sequence_length
        if args.ip_adapter:
            reference = args.benchmark.references(subject)[0]
            options["ip_adapter_image"] = Image.open(reference).convert("RGB")
        return options


def load_sampling() -> ModuleType:
    """examples/sampling/beyond_finetuning.py, which stands in a folder of its own."""
    if not SAMPLING_FILE.is_file():
        raise ValueError(f"--sampler needs {SAMPLING_FILE}, which is not there")
    return load_script(SAMPLING_FILE)


def sampler_of(args: argparse.Namespace) -> Callable:
    """(pipeline, prompts, class prompts, options) -> pictures, as `--sampler` says."""
    if args.sampler == "standard":

        def standard(pipeline, prompts, class_prompts, options):
            return pipeline(prompts, guidance_scale=args.guidance_scale, **options).images

        return standard
    sample = load_sampling().sample
    settings = {name: getattr(args, name) for name in BEYOND} | {"method": args.sampler}
    if args.sampler == "switching":  # the others have two weights instead
        settings["guidance_scale"] = args.guidance_scale

    def guided(pipeline, prompts, class_prompts, options):
        return sample(pipeline, prompts, class_prompts, **settings, **options)

    return guided


def batches(pictures: list[Picture], size: int) -> Iterator[list[Picture]]:
    """Up to `size` pictures of one subject at a time."""
    for subject in dict.fromkeys(picture.subject for picture in pictures):
        own = [picture for picture in pictures if picture.subject == subject]
        yield from (own[i : i + size] for i in range(0, len(own), size))


def generate(args: argparse.Namespace, state: PartialState, pictures: list[Picture]) -> None:
    """Make this process's share of the pictures."""
    folder = args.images_dir / args.method
    model, sample = Model(args, state.device), sampler_of(args)
    size = 1 if args.ip_adapter else args.batch_size  # the pipelines take one reference a call
    with tqdm(total=len(pictures), desc=args.method, disable=not state.is_main_process) as bar:
        for batch in batches(pictures, size):
            pipeline = model.of(batch[0].subject)
            options = model.options(batch[0].subject)
            options["generator"] = [torch.Generator().manual_seed(picture.seed) for picture in batch]
            prompts = [picture.prompt for picture in batch]
            images = sample(pipeline, prompts, [picture.class_prompt for picture in batch], options)
            for picture, image in zip(batch, images, strict=True):
                file = folder / picture.file
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".{file.name}.partial")
                image.save(partial, format="PNG")
                os.replace(partial, file)
            bar.update(len(batch))


def is_whole(file: Path) -> bool:
    """Whether a picture is there and can be read to its end."""
    try:
        return file.is_file() and read_image(file) is not None
    except UnreadableImage:
        return False


def main(args: argparse.Namespace) -> None:
    state = PartialState()
    pictures = plan(args)
    folder = args.images_dir / args.method
    if state.is_main_process:
        write_manifest(folder, manifest_of(args, pictures))
    state.wait_for_everyone()
    missing = [picture for picture in pictures if not is_whole(folder / picture.file)]
    state.wait_for_everyone()  # nobody starts before all have looked
    if missing:
        with state.split_between_processes(missing) as share:
            generate(args, state, share)
    if state.is_main_process:
        print(f"{args.method}: {len(missing)} pictures made, {len(pictures) - len(missing)} were there, in {folder}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
