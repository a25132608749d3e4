# SPDX-License-Identifier: Apache-2.0
"""What the three scripts share, tested with each: whole runs, what they hold in memory, pictures, files, logs."""

import gc
import importlib
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from PIL import Image
from runner import (
    LORA_FILE,
    anchors_of,
    assert_equal,
    draw,
    flags,
    left_in,
    lora,
    make_run,
    metrics,
    randomise_adapters,
    train,
    without,
)
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_pipelines import KINDS
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

import train_sap_lora_sd15 as sap

SD15 = "train_sap_lora_sd15"
PROMPT = "a photo of sks dog"
# What else than the embeddings of the tokens the denoiser wants of a prompt.
POOLED = {"sd15": [], "sdxl": ["text_embeds"], "sd3": ["pooled_projections"]}
every_script = pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])


def pipeline_of(kind, base, folder=None, name=LORA_FILE):
    """The pipeline as a user loads it, with or without a LoRA."""
    pipeline = importlib.import_module(KINDS[kind][0]).PIPELINE_CLASS.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.load_lora_weights(folder, weight_name=name)
    return pipeline


def pictures(pipeline, count=1) -> np.ndarray:
    """What a pipeline draws with seed 0, in [0, 255]."""
    generator = torch.Generator().manual_seed(0)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    if "tokenizer_3" in pipeline.components:
        options["max_sequence_length"] = 77
    return 255 * np.concatenate([pipeline(PROMPT, generator=generator, **options).images for _ in range(count)])


def drawn_with(sampler, pipeline) -> np.ndarray:
    """Two pictures that a pipeline draws with another sampler, if there is one."""
    if sampler is not None:
        pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    return pictures(pipeline, count=2)


def assert_close(one, other, atol: float) -> None:
    """Two LoRAs are the same but for rounding."""
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.allclose(one[key], other[key], atol=atol)] == []


def moved(one, other) -> set[str]:
    """The parts of the pipeline in which two LoRAs differ."""
    return {key.split(".")[0] for key in one if not torch.allclose(one[key], other[key], atol=1e-4)}


@pytest.mark.parametrize(
    ("kind", "kohya", "tracker", "card"),
    [
        ("sd15", True, "dreambooth-lora", ["license: creativeml-openrail-m", "- stable-diffusion\n"]),
        ("sdxl", True, "dreambooth-lora-sd-xl", ["license: openrail++", "- stable-diffusion-xl\n"]),
        ("sd3", False, "dreambooth-sd3-lora", ["license: other", "- sd3\n"]),
    ],
)
def test_a_whole_run(kind, kohya, tracker, card, base_of, captioned, tmp_path, caplog, capfd):
    script, output = KINDS[kind][0], tmp_path / "out"
    more = ["--validation_prompt=sks dog in the snow", "--num_validation_images=2", "--validation_inference_steps=1",
            "--validation_epochs=1", "--checkpointing_steps=2", "--report_to=tensorboard", "--subject_token=sks",
            "--class_token=", *(["--output_kohya_format"] if kohya else [])]  # fmt: skip
    train(script, flags(base_of(kind), captioned, output, *more, steps=4))
    assert left_in(output) == {
        LORA_FILE, "README.md", "image_0.png", "image_1.png", "validation", sap.FINISHED_FILE, "metrics.jsonl", "logs",
        "checkpoint-2", "checkpoint-4", *({sap.KOHYA_FILE} if kohya else set()),
    }  # fmt: skip
    module = importlib.import_module(script)
    assert all(key.startswith(f"{module.DENOISER}.") and ".lora_" in key for key in lora(output))
    (events,) = (output / "logs" / tracker).glob("events*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    for tag in ("loss", "loss/reconstruction", "loss/anchor", "lr"):
        values = [event.value for event in accumulator.Scalars(tag)]
        assert values == pytest.approx([row[tag] for row in metrics(output)], rel=1e-5)
        assert len(values) == 4
    text = (output / "README.md").read_text()
    assert all(words in text for words in [*card, f"import {module.PIPELINE_CLASS.__name__}\n"])
    assert 'Subject:  "a photo of sks dog"' in caplog.text
    assert 'Anchor:   "a photo of dog", w = 0.5' in caplog.text
    assert "captions: 5" in caplog.text
    assert "Written" in caplog.text
    assert "Steps:" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sd15", ["--train_batch_size=2", "--gradient_accumulation_steps=2", "--mixed_precision=bf16"]),
        ("sd15", ["--snr_gamma=5", "--random_flip", "--caption_dropout=0.5", "--gradient_checkpointing"]),
        ("sd15", ["--aspect_ratio_buckets=64,64;64,72", "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--scale_lr"]),
        ("sd15", ["--anchor_source=finetuned", "--gradient_accumulation_steps=3", "--lora_layers=to_q,ff.net.2"]),
        ("sd15", ["--tokenizer_max_length=20", "--text_encoder_use_attention_mask", "--train_text_encoder"]),
        ("sd15", ["--anchor_weight=0", "--image_interpolation_mode=nearest_exact", "--allow_tf32"]),
        ("sd21", ["--snr_gamma=5", "--cache_latents"]),
        ("sdxl", ["--use_dora", "--train_text_encoder", "--train_batch_size=2", "--gradient_accumulation_steps=2"]),
        ("sdxl", ["--mixed_precision=bf16", "--train_text_encoder", "--gradient_checkpointing", "--cache_latents"]),
        ("sdxl", ["--snr_gamma=5", "--random_flip", "--caption_dropout=0.5", "--train_batch_size=2"]),
        ("sdxl", ["--anchor_source=finetuned", "--do_edm_style_training", "--lora_layers=to_q,ff.net.2"]),
        ("sdxl", ["--anchor_weight=0", "--with_prior_preservation"]),
        ("sdxl", ["--optimizer=prodigy", "--learning_rate=1", "--train_text_encoder"]),
        ("sdxl", ["--use_8bit_adam"]),
        ("sd3", ["--use_dora", "--mixed_precision=bf16", "--train_text_encoder"]),
        ("sd3", ["--mixed_precision=bf16", "--cache_latents", "--train_batch_size=2", "--upcast_before_saving"]),
    ],
)  # fmt: skip
def test_combinations_train_and_load(kind, more, base_of, photos, tmp_path):
    for flag, package in (("--optimizer=prodigy", "prodigyopt"), ("--use_8bit_adam", "bitsandbytes")):
        if flag in more:
            pytest.importorskip(package)
    train(KINDS[kind][0], without(flags(base_of(kind), photos, tmp_path, *more), "--center_crop"))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in lora(tmp_path).values())
    plain, adapted = pipeline_of(kind, base_of(kind)), pipeline_of(kind, base_of(kind), tmp_path)
    least = 0.0 if "--optimizer=prodigy" in more else 0.25  # it begins with tiny steps
    assert np.abs(pictures(plain) - pictures(adapted)).max() > least


# ---- The anchor ----

FINETUNED = ["--anchor_source=finetuned", "--anchor_weight=1"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *[(kind, ["--gradient_accumulation_steps=2"]) for kind in ("sd15", "sdxl", "playground", "sd3")],
        ("sd15", FINETUNED),
        ("sd15", [*FINETUNED, "--gradient_accumulation_steps=3"]),
        ("sd15", [*FINETUNED, "--gradient_accumulation_steps=2", "--lora_dropout=0.3"]),
    ],
)
def test_anchor_batch_size_does_not_change_the_lora(kind, more, base_of, captioned, tmp_path):
    """A finetuned anchor has the weights of its optimizer step, and no dropout, however many are made at once."""
    more = [*more, "--subject_token=sks", "--learning_rate=1e-3", "--adam_epsilon=1e-6"]  # or Adam enlarges rounding
    for size in (1, 4):
        output = tmp_path / str(size)
        train(KINDS[kind][0], flags(base_of(kind), captioned, output, f"--anchor_batch_size={size}", *more, steps=4))
    assert_close(lora(tmp_path / "1"), lora(tmp_path / "4"), atol=1e-5)


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"], ["--alpha_mask"]], ids=" ".join)
@every_script
def test_samples_that_see_the_class_prompt_learn_the_anchor_alone(kind, more, base_of, tmp_path):
    """A share of nearly all: the photos' pixels have no say in the loss, whatever they show."""
    losses = []
    for number, colour in enumerate(["red", "blue"]):
        photos = tmp_path / colour
        photos.mkdir()
        for name in ("a.png", "b.png"):
            photo = Image.new("RGBA", (64, 64), colour)
            photo.paste((0, 255, 0, 0), (8, 8, 40 + number, 40))
            photo.save(photos / name)
        output = tmp_path / f"out-{colour}"
        train(KINDS[kind][0], flags(base_of(kind), photos, output, "--class_share=.999999", *more, steps=2))
        losses.append([row["loss/reconstruction"] for row in metrics(output)])
    assert losses == [[0.0, 0.0], [0.0, 0.0]]


@every_script
def test_the_anchor_changes_what_is_learnt(kind, base_of, photos, tmp_path):
    for weight in (0, 1):
        output = tmp_path / str(weight)
        train(KINDS[kind][0], flags(base_of(kind), photos, output, f"--anchor_weight={weight}"))
    assert moved(lora(tmp_path / "0"), lora(tmp_path / "1"))


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]])
@every_script
def test_each_sample_meets_its_own_words(kind, more, base_of, captioned, tmp_path):
    """Those for the student and those for the anchor, as the pipeline's text encoders were before training."""
    more = ["--train_batch_size=3", "--subject_token=sks", *more]
    arguments = without(flags(base_of(kind), captioned, tmp_path, *more), "--center_crop")
    module, run = make_run(KINDS[kind][0], arguments)
    step, anchors = draw(module, run)
    with torch.no_grad():
        predictions = run.student(step.model_input, step.timesteps, step.conditioning, step.prompts)
    options = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 77} if kind == "sd3" else {}
    options |= {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    pipeline = pipeline_of(kind, base_of(kind))
    for i, prompt in enumerate(step.prompts):
        conditioning = {name: tensor[i : i + 1] for name, tensor in step.anchor_conditioning.items()}
        for caption, prediction in ((prompt.replace("sks ", ""), anchors[i]), (prompt, predictions[i])):
            with torch.no_grad():
                encoded = [tensor for tensor in pipeline.encode_prompt(caption, **options) if tensor is not None]
                conditioning |= dict(zip(("encoder_hidden_states", *POOLED[kind]), encoded, strict=True))
                denoiser = getattr(pipeline, module.DENOISER)
                alone = module.denoise(denoiser, step.model_input[i : i + 1], step.timesteps[i : i + 1], conditioning)
            assert torch.allclose(prediction, alone[0], atol=1e-5)
    assert len(set(step.prompts)) == 3
    randomise_adapters(run)
    assert torch.equal(anchors_of(module, run, [step])[0], anchors)


# ---- Training ----


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (
            "sdxl",
            ["--gradient_accumulation_steps=2", "--lora_dropout=0.2", "--random_flip", "--do_edm_style_training"],
        ),
        ("sd3", []),
        ("sd3", ["--class_share=0.5", "--train_batch_size=2", "--gradient_accumulation_steps=2"]),
        ("sd3", ["--use_dora", "--mixed_precision=bf16"]),
    ],
)
def test_all_text_encoders_train_and_resume_bit_for_bit(kind, more, base_of, captioned, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more = ["--train_text_encoder", "--checkpointing_steps=2", "--subject_token=sks", *more]
    for output in (whole, resumed):
        arguments = without(flags(base_of(kind), captioned, output, *more, steps=3), "--center_crop")
        if output == resumed:
            shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
            torch.manual_seed(12345)
            arguments.append("--resume_from_checkpoint=latest")
        train(KINDS[kind][0], arguments)
    assert_equal(lora(resumed), lora(whole))
    assert len(moved(lora(whole / "checkpoint-2"), lora(whole))) == 3


@every_script
def test_checkpointing_of_gradients_changes_nothing(kind, base_of, photos, tmp_path):
    for name, more in {"plain": [], "checkpointed": ["--gradient_checkpointing"]}.items():
        train(KINDS[kind][0], flags(base_of(kind), photos, tmp_path / name, "--train_text_encoder", *more))
    assert_close(lora(tmp_path / "plain"), lora(tmp_path / "checkpointed"), atol=1e-6)


def test_every_optimizer_step_has_the_same_number_of_samples(sd15, photos, tmp_path, monkeypatch):
    drawn, original = [], sap.loss_terms
    monkeypatch.setattr(
        sap, "loss_terms", lambda step, *rest: drawn.append(len(step.prompts)) or original(step, *rest)
    )
    more = ["--train_batch_size=2", "--gradient_accumulation_steps=2", "--num_train_epochs=2"]
    train(SD15, without(flags(sd15, photos, tmp_path, *more), "--max_train_steps"))
    assert drawn == [2] * 2 * 4  # 5 pictures: 3 batches, so 2 optimizer steps of 2 batches an epoch


def test_logs_are_means_over_the_micro_steps(sd15, photos, tmp_path, monkeypatch):
    seen, original = [], sap.loss_terms

    def record(*arguments):
        terms = original(*arguments)
        seen.append({name: term.item() for name, term in terms.items()})
        return terms

    monkeypatch.setattr(sap, "loss_terms", record)
    more = ["--gradient_accumulation_steps=3", "--lr_scheduler=linear", "--lr_warmup_steps=0"]
    train(SD15, flags(sd15, photos, tmp_path, *more))
    rows = metrics(tmp_path)
    for name in ("loss", "loss/reconstruction", "loss/anchor"):
        expected = [sum(terms[name] for terms in seen[i : i + 3]) / 3 for i in (0, 3)]
        assert [row[name] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss/reconstruction"] + 0.5 * row["loss/anchor"] for row in rows], rel=1e-4
    )
    assert [row["lr"] for row in rows] == pytest.approx([1e-2, 0.5e-2])


def test_gradients_are_clipped(sd15, photos, tmp_path):
    largest = {}
    for norm in ("1", "1e-10"):
        train(SD15, flags(sd15, photos, tmp_path / norm, f"--max_grad_norm={norm}", "--adam_weight_decay=0"))
        largest[norm] = max(tensor.abs().max() for key, tensor in lora(tmp_path / norm).items() if "lora_B" in key)
    assert largest["1e-10"] < 0.1 * largest["1"]  # far below Adam's epsilon


def test_rates_and_decay_of_the_parts(sd15, photos, tmp_path):
    more = ["--train_text_encoder", "--learning_rate=3e-4", "--text_encoder_lr=2e-6", "--adam_weight_decay=0.1"]
    _, run = make_run(SD15, flags(sd15, photos, tmp_path, *more))
    rates = [(group["lr"], group["weight_decay"]) for group in sap.make_optimizer(run).param_groups]
    assert rates == [(3e-4, 0.1), (2e-6, 1e-3)]


# ---- Memory ----


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]])
@every_script
def test_stages_let_go_of_what_they_used(kind, more, base_of, photos, tmp_path, monkeypatch):
    """T5 never meets VAE and denoiser, CLIP only if it trains; pictures of validation load nothing again."""
    alive = {
        part: weakref.WeakSet() for part in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, AutoencoderKL)
    }
    met, loaded = {}, []
    module = importlib.import_module(KINDS[kind][0])
    for part in (*alive, module.DENOISER_CLASS):

        def load(*args, original=part.from_pretrained, part=part, **options):
            gc.collect()
            met[part] = [(one.__name__, len(members)) for one, members in alive.items() if members]
            model, info = original(*args, **options)
            loaded.append(part)
            if part in alive:
                alive[part].add(model)
            return model, info

        monkeypatch.setattr(part, "from_pretrained", load)
    picture = ["--final_validation_prompt=a dog", "--num_validation_images=1", "--validation_inference_steps=1"]
    train(KINDS[kind][0], flags(base_of(kind), photos, tmp_path, *more, *picture, steps=1))
    encoders = {
        "sd15": [("CLIPTextModel", 1)],
        "sdxl": [("CLIPTextModel", 1), ("CLIPTextModelWithProjection", 1)],
        "sd3": [("CLIPTextModelWithProjection", 2)],
    }
    kept = encoders[kind] if more else []
    assert met[AutoencoderKL] == kept
    assert met[module.DENOISER_CLASS] == [*kept, ("AutoencoderKL", 1)]  # which rests on the CPU
    assert len(loaded) == {"sd15": 3, "sdxl": 4, "sd3": 5}[kind]


@every_script
def test_adapters_are_float32_whatever_the_precision(kind, base_of, photos, tmp_path):
    more = ["--mixed_precision=bf16", "--train_text_encoder"]
    _, run = make_run(KINDS[kind][0], flags(base_of(kind), photos, tmp_path, *more))
    assert {parameter.dtype for parameter in run.vae.parameters()} == {torch.float32}
    for part in run.student.adapted.values():
        dtypes = {(p.requires_grad, p.dtype) for p in part.parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


# ---- Pictures ----


@pytest.mark.parametrize(
    ("kind", "more", "sampler"),
    [
        ("sd15", ["--train_text_encoder", "--lora_alpha=8", "--lora_dropout=0.5"], DPMSolverMultistepScheduler),
        ("sd15", ["--train_text_encoder", "--use_dora"], DPMSolverMultistepScheduler),
        ("sd21", [], DPMSolverMultistepScheduler),
        ("sdxl", ["--train_text_encoder", "--rank=2", "--lora_alpha=6"], DPMSolverMultistepScheduler),
        ("sdxl-deep", ["--train_text_encoder", "--rank=2"], DPMSolverMultistepScheduler),
        ("sdxl", ["--train_text_encoder", "--use_dora"], DPMSolverMultistepScheduler),
        ("sdxl", ["--do_edm_style_training"], EulerDiscreteScheduler),
        ("sdxl-v", ["--do_edm_style_training"], EulerDiscreteScheduler),
        ("playground", [], None),
        ("cosxl", [], EDMEulerScheduler),
        ("sd3", ["--train_text_encoder", "--lora_alpha=8"], None),
        ("sd35", ["--use_dora"], None),
    ],
)
def test_pictures_are_those_that_the_pipeline_draws_with_the_files(kind, more, sampler, base_of, photos, tmp_path):
    base = base_of(kind)
    files = [LORA_FILE]
    if not kind.startswith("sd3") and "--use_dora" not in more:  # diffusers reads no DoRA of kohya's
        more = [*more, "--output_kohya_format"]
        files.append(sap.KOHYA_FILE)
    more = [*more, f"--validation_prompt={PROMPT}", "--num_validation_images=2", "--validation_inference_steps=2"]
    train(KINDS[kind][0], flags(base, photos, tmp_path, "--learning_rate=0.05", "--text_encoder_lr=0.05", *more))
    shown = np.stack([Image.open(tmp_path / f"image_{i}.png") for i in range(2)]).astype(float)
    assert shown.std() > 1  # not black
    plain = drawn_with(sampler, pipeline_of(kind, base))
    assert np.abs(plain - shown).max() > 5
    for name in files:
        pipeline = pipeline_of(kind, base, tmp_path, name)
        assert np.abs(drawn_with(sampler, pipeline) - shown).max() < 1.6, name
        if "--train_text_encoder" in more:
            getattr(pipeline, importlib.import_module(KINDS[kind][0]).DENOISER).disable_adapters()
            assert np.abs(drawn_with(sampler, pipeline) - plain).max() > 2, "the text encoders do nothing"


@pytest.mark.parametrize(("kind", "precision"), [("sd15", "no"), ("sd15", "bf16"), ("sdxl", "no"), ("sd3", "no")])
def test_validation_changes_nothing_in_training(kind, precision, base_of, photos, tmp_path):
    more = ["--train_text_encoder", "--lora_dropout=0.3", f"--mixed_precision={precision}"]
    more += ["--anchor_batch_size=1"]  # nothing is drawn ahead
    shown = ["--validation_prompt=a dog", "--validation_steps=1", "--num_validation_images=1"]
    shown += ["--validation_inference_steps=2"]
    train(KINDS[kind][0], flags(base_of(kind), photos, tmp_path / "plain", *more, steps=3))
    train(KINDS[kind][0], flags(base_of(kind), photos, tmp_path / "watched", *more, *shown, steps=3))
    assert_equal(lora(tmp_path / "plain"), lora(tmp_path / "watched"))


@pytest.mark.parametrize(
    ("steps", "more", "expected"),
    [
        (6, ["--validation_epochs=1"], [2, 4, 6]),  # at the end of each epoch of 2 steps
        (6, ["--validation_epochs=2"], [2, 6]),
        (7, ["--validation_epochs=3"], [2, 7]),  # the epoch that the run ends in counts
        (6, ["--validation_epochs=50"], [2]),
        (9, ["--validation_steps=4"], [4, 8]),
        (6, ["--validation_epochs=1", "--num_validation_images=0"], []),
    ],
)
def test_when_pictures_are_made(steps, more, expected, sd15, photos, tmp_path):
    for name in ("00.jpg", "01.jpg"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(photos / name, tmp_path / "photos")
    more = ["--validation_prompt=sks", "--num_validation_images=1", "--validation_inference_steps=1", *more]
    output = tmp_path / "out"
    train(SD15, flags(sd15, tmp_path / "photos", output, "--skip_final_inference", *more, steps=steps))
    made = sorted(path.name for path in output.glob("validation/validation-*"))
    assert made == [f"validation-{step:06}.png" for step in expected]


@every_script
def test_pictures_start_from_the_noise_of_the_seed(kind, base_of, photos, tmp_path):
    """At a rate of 0 nothing else differs between two runs."""
    drawn = []
    for seed in (1, 2, 1):
        more = ["--learning_rate=0", f"--seed={seed}", f"--validation_prompt={PROMPT}", "--num_validation_images=1"]
        train(KINDS[kind][0], flags(base_of(kind), photos, tmp_path / "out", *more, steps=1))
        drawn.append((tmp_path / "out" / "image_0.png").read_bytes())
    assert drawn[0] == drawn[2] != drawn[1]


def test_final_pictures_and_nothing_stale(sd15, photos, tmp_path):
    more = ["--validation_prompt=sks", "--final_validation_prompt=sks dog", "--num_validation_images=1"]
    train(SD15, flags(sd15, photos, tmp_path, *more, "--validation_inference_steps=1", "--output_kohya_format"))
    assert Image.open(tmp_path / "image_0.png").size == (64, 64)
    assert "text: sks dog" in (tmp_path / "README.md").read_text()
    more = ["--final_validation_prompt=sks", "--skip_final_inference", "--no_kohya_file"]
    train(SD15, flags(sd15, photos, tmp_path, *more))
    assert not {name for name in left_in(tmp_path) if "kohya" in name or "image_" in name}


# ---- Files ----

OF_TRAINED = ["--train_text_encoder", "--output_kohya_format", "--rank=2", "--lora_alpha=6"]


@pytest.fixture(scope="module")
def trained(base_of, photos, tmp_path_factory) -> dict:
    """LoRAs of UNet and text encoders whose alpha is not their rank, in both formats."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in ("sd15", "sdxl"):
        train(KINDS[kind][0], flags(base_of(kind), photos, folder / kind, *OF_TRAINED))
    return {kind: folder / kind for kind in ("sd15", "sdxl")}


def test_metadata_holds_what_loading_needs_and_the_scale_is_in_the_weights(trained):
    with safe_open(trained["sd15"] / LORA_FILE, "pt") as file:
        keys, metadata = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    assert {key.split(".")[1] for key in metadata} == {"r", "lora_alpha", "target_modules"}
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 2)
    of_text_encoder = [key for key in keys if key.startswith("text_encoder.")]
    assert len(of_text_encoder) == 16
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in of_text_encoder)  # as others read


@pytest.mark.parametrize(
    ("kind", "version", "parts", "some"),
    [
        ("sd15", "sd_v1", {"unet", "te"},
         {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
          "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"}),
        ("sdxl", "sdxl_base_v1-0", {"unet", "te1", "te2"},
         {"lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight",
          "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0.lora_up.weight"}),
    ],
)  # fmt: skip
def test_kohya_file(kind, version, parts, some, trained):
    with safe_open(trained[kind] / sap.KOHYA_FILE, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        alphas = {file.get_tensor(key).item() for key in keys if key.endswith(".alpha")}
    assert alphas == {6.0}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "6.0")
    assert metadata["ss_base_model_version"] == version
    assert {key.split("_")[1] for key in keys} == parts
    assert some <= keys
    assert len(keys) == 3 * len(lora(trained[kind])) / 2


@pytest.mark.parametrize("weight", ["0.25", "0"])
@pytest.mark.parametrize("base", ["folder", "org/base"])
def test_model_card(base, weight, sd15, photos, tmp_path):
    base = str(sd15) if base == "folder" else base
    more = [f"--anchor_weight={weight}", "--hub_model_id=me/dog"]
    args = sap.parse_args(flags(base, photos, tmp_path, *more))
    sap.write_model_card(args, [Image.new("RGB", (64, 64))], "sks")
    text = (tmp_path / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert ("base_model: org/base" in head) == (base == "org/base")
    for words in (f"instance_prompt: {PROMPT}", "- template:sd-lora", "url: image_0.png"):
        assert words in head
    assert f"w = {weight}" in body
    assert ("a photo of a dog" in body) == (weight != "0")
    assert "2511.22245" in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert f"from_pretrained({'org/base' if base == 'org/base' else sd15.name!r}," in code
    assert "load_lora_weights('me/dog'" in code
    assert str(sd15.parent) not in text  # no path of this machine
    assert (tmp_path / "image_0.png").is_file()


def test_a_hub_that_refuses_stops_the_run_before_it_starts(sd15, photos, tmp_path):
    with pytest.raises(sap.UsageError, match="--push_to_hub: .*unset the `HF_HUB_OFFLINE`"):  # HF_HUB_OFFLINE is set
        train(SD15, flags(sd15, photos, tmp_path, "--push_to_hub", "--hub_token=hf_secret"))
    assert not (tmp_path / LORA_FILE).exists()
