# SPDX-License-Identifier: Apache-2.0
"""Beyond-Finetuning sampling: the guidance that the pipelines really apply, against the published formulas."""

import contextlib
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "examples" / "sampling"))
import beyond_finetuning  # noqa: E402 (the path comes first)
from beyond_finetuning import make_schedule, sample  # noqa: E402

PROMPT, CLASS_PROMPT, NEGATIVE = "a photo of sks dog in snow", "a photo of a dog in snow", "a drawing"
STEPS = 5
FAST = {"num_inference_steps": STEPS, "output_type": "latent"}


@pytest.fixture(scope="module", params=["sd15", "sdxl", "sd3"])
def folder(request, tmp_path_factory):
    save = getattr(tiny_pipelines, f"save_{request.param}")
    return save(tmp_path_factory.mktemp("sampling") / request.param)


def load(folder):
    """A pipeline with LoRA layers that do something, the same on every call."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    torch.manual_seed(3)
    denoiser = beyond_finetuning.denoiser_of(pipeline)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    return pipeline


@pytest.fixture
def pipeline(folder):
    return load(folder)


def seeded(count=1):
    return [torch.Generator().manual_seed(number) for number in range(count)]


class Applied:
    """What the scheduler is given at each step, beside the predictions that a second pipeline makes there."""

    def __init__(self, pipeline, reference, prompt, class_prompt, negative, images):
        self.reference, self.images = reference, images
        self.prompts = [self.encode(text, negative) for text in (prompt, class_prompt)]
        self.steps = []
        self.step, pipeline.scheduler.step = pipeline.scheduler.step, self

    def encode(self, text, negative):
        extra = {"prompt_2": None, "prompt_3": None} if hasattr(self.reference, "transformer") else {}
        extra |= {"negative_prompt": negative, "num_images_per_prompt": self.images}
        return self.reference.encode_prompt(text, device="cpu", do_classifier_free_guidance=True, **extra)

    def __call__(self, output, timestep, sample, **options):
        (ec, e0), (es, _) = (
            [self.predict(sample, timestep, encoded, which) for which in (0, 1)] for encoded in self.prompts
        )
        self.steps.append((output.clone(), e0, ec, es))
        return self.step(output, timestep, sample, **options)

    def predict(self, latents, timestep, encoded, which):
        """One prediction alone: the prompt's (which = 0) or the negative prompt's (1)."""
        embeds, pooled = encoded[which], encoded[2 + which] if len(encoded) > 2 else None
        if hasattr(self.reference, "transformer"):
            times = timestep.expand(len(latents))
            return self.reference.transformer(latents, embeds, pooled, times, return_dict=False)[0]
        added = {}
        if pooled is not None:
            side = 8 * latents.shape[-1]
            times = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).repeat(len(latents), 1)
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
        return self.reference.unet(latents, timestep, embeds, **added, return_dict=False)[0]


def check(applied, formula):
    """The scheduler was given `formula(i, e0, ec, es)` at every step, to a small part of what the prompts change."""
    assert len(applied.steps) == STEPS
    for i, (output, e0, ec, es) in enumerate(applied.steps):
        difference = torch.minimum((ec - es).std(), (e0 - es).std())
        assert difference > 1e-3 * e0.std()
        assert (output - formula(i, e0, ec, es)).abs().max() < 1e-3 * difference


SCHEMES = {
    "switching": (
        {"guidance_scale": 4.0, "switch_step": 2},
        lambda i, e0, ec, es: e0 + 4 * ((es if i < 2 else ec) - e0),
    ),
    "mixed": (
        {"concept_weight": 3.0, "class_weight": 1.5},
        lambda i, e0, ec, es: e0 + 3 * (ec - e0) + 1.5 * (es - e0),
    ),
    "multistage": (
        {"concept_weight": 3.0, "class_weight": 1.5, "switch_step": 3},
        lambda i, e0, ec, es: e0 + (4.5 * (es - e0) if i < 3 else 3 * (ec - e0) + 1.5 * (es - e0)),
    ),
}


@pytest.mark.parametrize("method", SCHEMES)
def test_guidance_is_the_formula(folder, pipeline, method):
    """At every step, with a LoRA, a negative prompt and two images of the prompt."""
    settings, formula = SCHEMES[method]
    applied = Applied(pipeline, load(folder), PROMPT, CLASS_PROMPT, NEGATIVE, images=2)
    options = {"num_images_per_prompt": 2, "negative_prompt": NEGATIVE, "generator": seeded(2)}
    latents = sample(pipeline, PROMPT, CLASS_PROMPT, method, **settings, **options, **FAST)
    assert len(latents) == 2
    check(applied, formula)


def test_guidance_with_a_list_of_prompts(folder, pipeline):
    settings, formula = SCHEMES["multistage"]
    prompts, class_prompts = [PROMPT, "a sks dog"], [CLASS_PROMPT, "a dog"]
    applied = Applied(pipeline, load(folder), prompts, class_prompts, None, images=1)
    sample(pipeline, prompts, class_prompts, "multistage", **settings, generator=seeded(2), **FAST)
    check(applied, formula)


def plain(pipeline, prompt, scale=4.0):
    return pipeline(prompt, guidance_scale=scale, generator=seeded(), **FAST).images


@pytest.mark.parametrize(("step", "prompt"), [(0, PROMPT), (STEPS, CLASS_PROMPT)])
def test_switching_at_either_end_is_plain_sampling(pipeline, step, prompt):
    switched = sample(pipeline, PROMPT, CLASS_PROMPT, guidance_scale=4.0, switch_step=step, generator=seeded(), **FAST)
    assert torch.equal(switched, plain(pipeline, prompt))


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_comes_back_as_it_was(pipeline, monkeypatch, fails):
    denoiser = beyond_finetuning.denoiser_of(pipeline)
    before = plain(pipeline, PROMPT)
    weights = {"concept_weight": 2.0, "class_weight": 2.0}
    expected = pytest.raises(RuntimeError, match="in the middle") if fails else contextlib.nullcontext()
    with monkeypatch.context() as patch, expected:
        if fails:
            patch.setattr(pipeline.scheduler, "step", fail)
        sample(pipeline, PROMPT, CLASS_PROMPT, "mixed", **weights, generator=seeded(), **FAST)
    assert not denoiser._forward_hooks
    assert not denoiser._forward_pre_hooks
    assert torch.equal(plain(pipeline, PROMPT), before)


def fail(*args, **kwargs):
    raise RuntimeError("in the middle")


def test_half_precision_returns_pictures(folder):
    pipeline = load(folder).to(torch.bfloat16)
    settings, _ = SCHEMES["multistage"]
    options = {"num_inference_steps": STEPS, "generator": seeded()}
    (image,) = sample(pipeline, PROMPT, CLASS_PROMPT, "multistage", **settings, **options)
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 0


def test_published_settings():
    sd, xl = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
    assert make_schedule(sd, "switching") == beyond_finetuning.Schedule(7.0, 7, 0.0)
    assert make_schedule(sd, "mixed") == beyond_finetuning.Schedule(7.0, 0, 0.5)
    assert make_schedule(sd, "multistage") == beyond_finetuning.Schedule(7.0, 10, 3 / 7)
    assert make_schedule(xl, "switching") == beyond_finetuning.Schedule(5.0, 10, 0.0)
    assert make_schedule(xl, "mixed") == beyond_finetuning.Schedule(5.0, 0, 0.5)
    assert make_schedule(xl, "switching", num_inference_steps=25).switch_step == 5
    assert make_schedule(xl, "switching", switch_step=9, num_inference_steps=25).switch_step == 9


@pytest.mark.parametrize(
    ("pipeline_class", "settings", "message"),
    [
        ("StableDiffusion3Pipeline", {}, "guidance_scale has no published value"),
        ("StableDiffusion3Pipeline", {"guidance_scale": 7.0}, "switch_step has no published value"),
        ("StableDiffusionXLPipeline", {"method": "multistage"}, "concept_weight has no published value"),
        ("FluxPipeline", {}, "not supported"),
        ("StableDiffusionPipeline", {"method": "both"}, "must be one of"),
        ("StableDiffusionPipeline", {"method": "mixed", "guidance_scale": 7.0}, "means nothing to mixed"),
        ("StableDiffusionPipeline", {"class_weight": 2.0}, "means nothing to switching"),
        ("StableDiffusionPipeline", {"switch_step": 51}, "between 0 and the 50"),
        ("StableDiffusionPipeline", {"guidance_scale": 1.0}, "above 1"),
        ("StableDiffusionPipeline", {"method": "mixed", "class_weight": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_make_no_sense(pipeline_class, settings, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(pipeline_class, **settings)


@pytest.mark.parametrize(
    ("class_prompt", "options", "message"),
    [
        ([CLASS_PROMPT, "a dog"], {}, "1 prompts and 2 class prompts"),
        (CLASS_PROMPT, {"callback_on_step_end": fail}, "callback_on_step_end cannot be combined"),
        (CLASS_PROMPT, {"negative_prompt_embeds": torch.zeros(1)}, "negative_prompt_embeds cannot be combined"),
    ],
)
def test_arguments_that_cannot_be_combined(pipeline, class_prompt, options, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline, PROMPT, class_prompt, guidance_scale=4.0, switch_step=1, **options, **FAST)


def command(folder, output, *more):
    return beyond_finetuning.parse_args(
        [f"--pretrained_model_name_or_path={folder}", f"--prompt={PROMPT}", f"--class_prompt={CLASS_PROMPT}",
         f"--output_dir={output}", "--num_inference_steps=2", *more]
    )  # fmt: skip


def test_command_line(folder, tmp_path):
    """Pictures do not depend on the batch size; a LoRA changes them."""
    saved_lora(load(folder), tmp_path / "lora")
    mixed = ["--method=mixed", "--concept_weight=2", "--class_weight=1", "--num_images=3"]
    for name, more in {"one": [], "two": ["--batch_size=2"], "base": []}.items():
        lora = [] if name == "base" else [f"--lora={tmp_path / 'lora'}"]
        beyond_finetuning.main(command(folder, tmp_path / name, *mixed, *more, *lora, "--device=cpu"))
    one, two, base = (
        np.stack([Image.open(tmp_path / name / f"{i}.png") for i in range(3)]).astype(int)
        for name in ("one", "two", "base")
    )
    assert np.abs(one - two).max() <= 1
    assert np.abs(one - base).max() > 1
    with pytest.raises(SystemExit) as stop:
        command(folder, tmp_path / "one")
    assert stop.value.code == 2


def saved_lora(pipeline, folder):
    """The file of a pipeline's LoRA."""
    name = "transformer" if hasattr(pipeline, "transformer") else "unet"
    layers = get_peft_model_state_dict(getattr(pipeline, name), adapter_name="default")
    pipeline.save_lora_weights(folder, **{f"{name}_lora_layers": layers})
    return folder


def test_loading_a_lora_is_silent_and_another_bases_draws_nothing(tmp_path, caplog):
    """diffusers warns of each text encoder that a LoRA does not train, and draws the base where nothing fits."""
    bases = {name: getattr(tiny_pipelines, f"save_{name}")(tmp_path / name) for name in ("sd15", "sdxl", "sd3")}
    loras = {name: saved_lora(load(base), tmp_path / f"{name}-lora") for name, base in bases.items()}
    logger = logging.getLogger("diffusers.loaders")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, "diffusers.loaders")  # whatever an earlier test left
    mixed = ["--method=mixed", "--concept_weight=2", "--class_weight=1", "--device=cpu"]
    args = command(bases["sdxl"], tmp_path / "out", *mixed, f"--lora={loras['sdxl']}")
    beyond_finetuning.load_pipeline(args)
    assert "No LoRA keys" not in caplog.text
    for base, lora, says in (
        ("sd15", "sdxl", "does not fit the base"),
        ("sd15", "sd3", "no layer that fits the base"),
        ("sd3", "sd15", "no layer that fits the base"),
    ):
        args = command(bases[base], tmp_path / "out", *mixed, f"--lora={loras[lora]}")
        with pytest.raises(ValueError, match=says):
            beyond_finetuning.load_pipeline(args)
    assert "No LoRA keys associated to UNet2DConditionModel" in caplog.text  # what is not expected is told
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora=nan"], "holds numbers that are not finite, in x"),
        (["--lora=cut"], "is damaged"),
        (["--lora=~/nowhere"], f"{Path.home()}/nowhere is not there"),
        (["--output_dir=cut"], "cut is not a folder"),
        (["--num_images=0"], "--num_images must be at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.tensor([0.0, float("nan")])}, "nan")
    Path("cut").write_bytes(Path("nan").read_bytes()[:-4])
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path / "no-model", tmp_path / "out", *flags)
    assert says in capsys.readouterr().err


def test_command_line_says_what_is_missing(tmp_path, capsys):
    folder = tiny_pipelines.save_sd3(tmp_path / "sd3")
    with pytest.raises(SystemExit) as stop:
        beyond_finetuning.main(command(folder, tmp_path / "out"))
    assert stop.value.code == 2
    assert "guidance_scale has no published value for switching" in capsys.readouterr().err
