# SPDX-License-Identifier: Apache-2.0
"""Beyond-Finetuning sampling: let the superclass prompt steer a personalised model while it samples.

    python beyond_finetuning.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --lora sks-dog-lora --prompt "a photo of sks dog in the snow" --class_prompt "a photo of a dog in the snow" \
        --method switching --output_dir pictures

The three schemes of Soboleva et al. With the null, concept and superclass predictions e0, ec, es of the fine-tuned
network and the step index i:

    switching     i < t_sw: e0 + w (es - e0),          then e0 + w (ec - e0)
    mixed                   e0 + wc (ec - e0) + ws (es - e0)
    multistage    i < t_sw: e0 + (wc + ws) (es - e0),  then mixed

Mixed is classifier-free guidance of scale wc + ws towards the weighted mean (wc ec + ws es) / (wc + ws). So all three
are one rule with three numbers: a scale s, a step t_sw, and the share a = ws / (wc + ws) of the superclass,

    e0 + s (e - e0),    e = es before step t_sw,  e = (1 - a) ec + a es from there on,

and the pipelines' own guidance computes it: we only choose the prompt, and where a > 0 put the mean in ec's place.
"""

import argparse
import contextlib
import dataclasses
import logging
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

LORA_FILE = "pytorch_lora_weights.safetensors"
METHODS = ("switching", "mixed", "multistage")
STEPS = 50  # of the published settings, where switch_step counts
# The published settings. Those of Stable Diffusion 2 stand for every pipeline of its class: none exist for 1.5.
PUBLISHED = {
    "StableDiffusionPipeline": {
        "switching": {"guidance_scale": 7.0, "switch_step": 7},
        "mixed": {"concept_weight": 3.5, "class_weight": 3.5},
        "multistage": {"concept_weight": 4.0, "class_weight": 3.0, "switch_step": 10},
    },
    "StableDiffusionXLPipeline": {
        "switching": {"guidance_scale": 5.0, "switch_step": 10},
        "mixed": {"concept_weight": 2.5, "class_weight": 2.5},
    },
    "StableDiffusion3Pipeline": {},
}
USES = {
    "switching": ("guidance_scale", "switch_step"),
    "mixed": ("concept_weight", "class_weight"),
    "multistage": ("concept_weight", "class_weight", "switch_step"),
}
# What callback_on_step_end may replace: the prompt's embeddings, then the pooled ones where there are any.
CALLBACK_INPUTS = {
    "StableDiffusionPipeline": ["prompt_embeds"],
    "StableDiffusionXLPipeline": ["prompt_embeds", "add_text_embeds"],
    "StableDiffusion3Pipeline": ["prompt_embeds", "pooled_prompt_embeds"],
}
NEGATIVE_PROMPTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The guidance of a whole run: the scale, the last step of the superclass, and its share after that."""

    scale: float
    switch_step: int
    class_share: float


def make_schedule(
    pipeline_class: str,
    method: str = "switching",
    guidance_scale: float | None = None,
    switch_step: int | None = None,
    concept_weight: float | None = None,
    class_weight: float | None = None,
    num_inference_steps: int = STEPS,
) -> Schedule:
    """Fill in the published settings and turn a method's own numbers into a scale, a step and a share.

    A published step belongs to 50 steps; with another number of steps it keeps its share of them.

    Args:
        pipeline_class: name of the pipeline's class.
        method: "switching", "mixed" or "multistage".
        guidance_scale, switch_step: of switching; the step also of multistage.
        concept_weight, class_weight: of mixed and multistage.

    Raises:
        ValueError: where a number is missing, out of range, or means nothing to the method.
    """
    if pipeline_class not in PUBLISHED:
        raise ValueError(f"{pipeline_class} is not supported; use one of {', '.join(PUBLISHED)}.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    given = {
        "guidance_scale": guidance_scale,
        "switch_step": switch_step,
        "concept_weight": concept_weight,
        "class_weight": class_weight,
    }
    published = dict(PUBLISHED[pipeline_class].get(method, {}))
    if "switch_step" in published:
        published["switch_step"] = round(published["switch_step"] * num_inference_steps / STEPS)
    values = published | {name: value for name, value in given.items() if value is not None}
    for name in USES[method]:
        if name not in values:
            raise ValueError(f"{name} has no published value for {method} on {pipeline_class}; give one.")
    for name in values:
        if name not in USES[method]:
            raise ValueError(f"{name} means nothing to {method}, which uses {' and '.join(USES[method])}.")

    step = values.get("switch_step", 0)
    weights = values.get("concept_weight", 0.0), values.get("class_weight", 0.0)
    scale = values.get("guidance_scale", sum(weights))
    if not 0 <= step <= num_inference_steps:
        raise ValueError(f"switch_step is {step}; it must lie between 0 and the {num_inference_steps} steps.")
    if min(weights) < 0:
        raise ValueError("concept_weight and class_weight must not be negative.")
    if scale <= 1:
        raise ValueError(f"the guidance adds up to {scale:g}; it must be above 1, where the pipelines apply it.")
    return Schedule(scale, step, weights[1] / scale)


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline,
    prompt: str | list[str],
    class_prompt: str | list[str],
    method: str = "switching",
    guidance_scale: float | None = None,
    switch_step: int | None = None,
    concept_weight: float | None = None,
    class_weight: float | None = None,
    **pipeline_kwargs,
) -> list[Image.Image]:
    """Sample a personalised pipeline with Switching, Mixed or Multi-stage guidance.

    Args:
        pipeline: a StableDiffusionPipeline, StableDiffusionXLPipeline or StableDiffusion3Pipeline with the LoRA
            loaded. It comes back as it was, also after an exception.
        prompt: with the subject's token, "a photo of sks dog in the snow", or a list of such.
        class_prompt: the same without the token, "a photo of a dog in the snow", or a list of the same length.
        method: "switching", "mixed" or "multistage".
        guidance_scale, switch_step, concept_weight, class_weight: the method's numbers; the published ones where
            they are None and exist (`PUBLISHED`).
        pipeline_kwargs: anything else that the pipeline's call takes: num_inference_steps (50), generator,
            negative_prompt, num_images_per_prompt, height ...

    Returns:
        The pictures, one for each prompt and image per prompt.

    Raises:
        ValueError: where the settings are incomplete or contradict one another, or an argument cannot be combined.

    Source: Soboleva et al., Beyond Fine-Tuning: A Systematic Study of Sampling Techniques in Personalized Image
    Generation.
    """
    pipeline_class = type(pipeline).__name__
    steps = pipeline_kwargs.setdefault("num_inference_steps", STEPS)
    schedule = make_schedule(pipeline_class, method, guidance_scale, switch_step, concept_weight, class_weight, steps)
    check_kwargs(pipeline, prompt, class_prompt, pipeline_kwargs)

    # The pipeline sees a batch of embeddings, one an image: encode_prompt has repeated them.
    images = pipeline_kwargs.pop("num_images_per_prompt", 1)
    concept, superclass = (encode(pipeline, text, images, pipeline_kwargs) for text in (prompt, class_prompt))
    for name in NEGATIVE_PROMPTS:
        pipeline_kwargs.pop(name, None)
    with Guidance(pipeline, schedule, concept, superclass, steps) as guidance:
        return pipeline(
            **guidance.first_prompt(),
            guidance_scale=schedule.scale,
            callback_on_step_end=guidance.after_step,
            callback_on_step_end_tensor_inputs=CALLBACK_INPUTS[pipeline_class],
            **pipeline_kwargs,
        ).images


def check_kwargs(pipeline, prompt, class_prompt, pipeline_kwargs: dict) -> None:
    """Refuse what the guidance would silently ignore or get wrong."""
    lengths = [1 if isinstance(text, str) else len(text) for text in (prompt, class_prompt)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"there are {lengths[0]} prompts and {lengths[1]} class prompts; give as many of both.")
    for name, value in pipeline_kwargs.items():
        taken = name.endswith("_embeds") or name in ("prompt_2", "prompt_3", "skip_guidance_layers")
        if value is not None and (taken or name.startswith(("callback", "ip_adapter"))):
            raise ValueError(f"{name} cannot be combined with Beyond-Finetuning sampling; leave it out.")
    denoiser = denoiser_of(pipeline)
    if getattr(denoiser.config, "time_cond_proj_dim", None) is not None:
        raise ValueError("this model's guidance is distilled into it; a model with ordinary guidance is needed.")


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The UNet, or SD3's transformer."""
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def encode(pipeline, prompt: str | list[str], images: int, pipeline_kwargs: dict) -> tuple[torch.Tensor | None, ...]:
    """A prompt's embeddings, the negative prompt's, and both pooled ones where the pipeline has them, else None.

    Embeddings are (prompts x images, tokens, width), pooled ones (prompts x images, width).
    """
    options = {"clip_skip": pipeline_kwargs.get("clip_skip")}
    names = [*NEGATIVE_PROMPTS, "max_sequence_length"]
    options |= {name: pipeline_kwargs[name] for name in names if name in pipeline_kwargs}
    if type(pipeline).__name__ == "StableDiffusion3Pipeline":
        options |= {"prompt_2": None, "prompt_3": None}  # encode_prompt has no defaults for them
    attention = pipeline_kwargs.get("cross_attention_kwargs") or pipeline_kwargs.get("joint_attention_kwargs") or {}
    embeddings = pipeline.encode_prompt(
        prompt=prompt,
        device=pipeline._execution_device,
        num_images_per_prompt=images,
        do_classifier_free_guidance=True,
        lora_scale=attention.get("scale"),
        **options,
    )
    return (*embeddings, None, None)[:4]


class Guidance(contextlib.ExitStack):
    """One run of the schedule: which prompt the pipeline guides towards, and the mean with the superclass.

    Every change to the denoiser is a torch hook that goes when the context is left.
    """

    def __init__(self, pipeline, schedule: Schedule, concept: tuple, superclass: tuple, steps: int):
        super().__init__()
        self.denoiser = denoiser_of(pipeline)
        self.schedule = schedule
        self.concept = concept
        self.superclass = superclass
        self.steps = steps

    def first_prompt(self) -> dict[str, torch.Tensor]:
        """What the pipeline is called with: the superclass's embeddings, or the concept's if it comes at once."""
        if self.schedule.switch_step == 0:
            self.start_mean()
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        prompt = self.superclass if self.schedule.switch_step else self.concept
        return {name: tensor for name, tensor in zip(names, prompt, strict=True) if tensor is not None}

    def after_step(self, pipeline, step: int, timestep, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`callback_on_step_end`: before step `switch_step` the concept takes the superclass's place."""
        if step + 1 == self.schedule.switch_step < self.steps:
            self.start_mean()
            embeds, negative, pooled, negative_pooled = self.concept
            tensors["prompt_embeds"] = torch.cat([negative, embeds])
            for name in tensors.keys() - {"prompt_embeds"}:
                tensors[name] = torch.cat([negative_pooled, pooled])
        return tensors

    def start_mean(self) -> None:
        """From the next step on the denoiser answers with the mean of concept and superclass."""
        if self.schedule.class_share > 0:
            before = self.denoiser.register_forward_pre_hook(self.add_superclass, with_kwargs=True)
            after = self.denoiser.register_forward_hook(self.take_mean)
            self.callback(before.remove)
            self.callback(after.remove)

    def add_superclass(self, module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The batch [null, concept] becomes [null, concept, superclass]; latents and the like are the concept's."""
        embeds, _, pooled, _ = self.superclass
        prompts = {"encoder_hidden_states": embeds, "text_embeds": pooled, "pooled_projections": pooled}
        added = kwargs.get("added_cond_kwargs")
        extended = {name: add_third(value, prompts.get(name)) for name, value in kwargs.items()}
        if added is not None:
            extended["added_cond_kwargs"] = {n: add_third(value, prompts.get(n)) for n, value in added.items()}
        return tuple(add_third(value) for value in args), extended

    def take_mean(self, module, args: tuple, output: tuple) -> tuple:
        """[null, concept, superclass] becomes [null, (1 - share) concept + share superclass]."""
        null, concept, superclass = output[0].chunk(3)
        return (torch.cat([null, concept.lerp(superclass, self.schedule.class_share)]), *output[1:])


def add_third(value, third: torch.Tensor | None = None):
    """Append `third`, or the second half, to a batched tensor; anything else stays as it is."""
    if not torch.is_tensor(value) or value.ndim == 0:
        return value
    return torch.cat([value, value.chunk(2)[1] if third is None else third])


# -------------------------------------------------------------------------------------------------------- command line


def path(text: str) -> Path:
    """A flag's value as a path, in which "~" is the home folder."""
    return Path(text).expanduser()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a contradiction ends it before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="MODEL", help="base model")
    add("--lora", type=path, metavar="FOLDER", help="folder or file of a LoRA; none: the base model")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help=f"of all weights {default}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=f"where to sample {default}")

    guidance = parser.add_argument_group("guidance", "numbers left out take their published values, where they exist")
    add = guidance.add_argument
    add("--prompt", required=True, help='with the token: "a photo of sks dog in the snow"')
    add("--class_prompt", required=True, help='without it: "a photo of a dog in the snow"')
    add("--method", choices=METHODS, default="switching", help=default)
    add("--guidance_scale", type=float, metavar="W", help="switching: guidance scale of both prompts")
    add("--switch_step", type=int, metavar="T", help="first step of the concept (not for mixed)")
    add("--concept_weight", type=float, metavar="WC", help="mixed, multistage: the concept's weight")
    add("--class_weight", type=float, metavar="WS", help="mixed, multistage: the superclass's weight")
    add("--negative_prompt", help="in place of the empty prompt")

    add = parser.add_argument_group("pictures").add_argument
    add("--output_dir", type=path, required=True, metavar="FOLDER", help="gets 0.png, 1.png ...")
    add("--num_images", type=int, default=4, metavar="N", help=f"how many pictures {default}")
    add("--batch_size", type=int, default=1, metavar="N", help=f"how many at a time {default}")
    add("--num_inference_steps", type=int, default=STEPS, metavar="N", help=f"sampling steps {default}")
    add("--resolution", type=int, metavar="PIXELS", help="side of a picture; the model's own")
    add("--max_sequence_length", type=int, metavar="N", help="SD3: tokens of T5, as in training")
    add("--seed", type=int, default=0, help=f"of the first picture; the next ones count on {default}")
    args = parser.parse_args(arguments)

    if args.pretrained_model_name_or_path.startswith("~"):
        args.pretrained_model_name_or_path = str(path(args.pretrained_model_name_or_path))
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir: {args.output_dir} is not a folder.")
    if args.output_dir.is_dir() and any(args.output_dir.glob("*.png")):
        parser.error(f"--output_dir: {args.output_dir} has pictures already; choose another folder.")
    for name in ("num_images", "batch_size", "num_inference_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1.")
    try:
        args.lora_keys = read_lora(args.lora) if args.lora else []
    except ValueError as error:
        parser.error(f"--lora: {error}")
    return args


def lora_file(lora: Path) -> Path:
    """The file itself, or the one of the usual name in a folder."""
    return lora / LORA_FILE if lora.is_dir() else lora


def read_lora(lora: Path) -> list[str]:
    """The names of a LoRA's tensors; `ValueError`, one sentence, for one that is not there, damaged or not finite."""
    file = lora_file(lora)
    if not file.is_file():
        raise ValueError(f"{file} is not there; give the folder that training wrote, or a file.")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); copy or train it again.") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file} holds numbers that are not finite, in {name}; train it again.")
    return list(tensors)


def expected(record: logging.LogRecord) -> bool:
    """A filter without diffusers' warning that a LoRA has nothing for a text encoder: most LoRAs have not."""
    said = record.getMessage()
    return not (said.startswith("No LoRA keys associated") and "prefix='text_encoder" in said)


def load_lora(pipeline: DiffusionPipeline, lora: Path, keys: list[str]) -> None:
    """Load a LoRA with these keys; `ValueError` where nothing of it, or not all its shapes, fit the base."""
    file = lora_file(lora)
    logger = logging.getLogger("diffusers.loaders.lora_base")
    trains_text = any("text_encoder" in key or key.startswith("lora_te") for key in keys)
    if not trains_text:
        logger.addFilter(expected)
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    except (RuntimeError, ValueError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"--lora: {file} does not fit the base; is it another model's LoRA?") from error
    finally:
        logger.removeFilter(expected)
    if not pipeline.get_active_adapters():
        raise ValueError(f"--lora: {file} has no layer that fits the base; is it another model's LoRA?")


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """The base model on its device, with the LoRA; `ValueError` where that is another model's."""
    dtype = getattr(torch, args.dtype)
    pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype)
    if args.lora:
        load_lora(pipeline, args.lora, args.lora_keys)
    return pipeline.to(args.device)


def main(args: argparse.Namespace) -> None:
    """Check the settings against the model's class, then sample in batches."""
    numbers = {name: getattr(args, name) for name in ("guidance_scale", "switch_step", *USES["mixed"])}
    try:
        pipeline_class = DiffusionPipeline.load_config(args.pretrained_model_name_or_path)["_class_name"]
        make_schedule(pipeline_class, args.method, **numbers, num_inference_steps=args.num_inference_steps)
        pipeline = load_pipeline(args)
    except (ValueError, OSError) as error:
        print(f"beyond_finetuning.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    options = {"num_inference_steps": args.num_inference_steps, "negative_prompt": args.negative_prompt}
    if args.resolution:
        options |= {"height": args.resolution, "width": args.resolution}
    if args.max_sequence_length:
        options["max_sequence_length"] = args.max_sequence_length
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for start in range(0, args.num_images, args.batch_size):
        numbered = range(start, min(start + args.batch_size, args.num_images))
        generators = [torch.Generator("cpu").manual_seed(args.seed + number) for number in numbered]
        images = sample(
            pipeline,
            args.prompt,
            args.class_prompt,
            args.method,
            **numbers,
            num_images_per_prompt=len(numbered),
            generator=generators,
            **options,
        )
        for number, image in zip(numbered, images, strict=True):
            image.save(args.output_dir / f"{number}.png")


if __name__ == "__main__":
    main(parse_args())
