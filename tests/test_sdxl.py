# SPDX-License-Identifier: Apache-2.0
"""What SDXL adds: two text encoders with pooled embeddings, size conditioning, EDM, another VAE and its own files.

What the scripts share is tested once, with SD1.5, and held identical by test_copies.py.
"""

import gc
import shutil
import weakref

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageOps
from runner import (
    LORA_FILE,
    anchors_of,
    assert_equal,
    draw,
    flags,
    items_of,
    left_in,
    lora,
    make_run,
    randomise_adapters,
    train,
    without,
)
from safetensors.torch import load_file

import train_sap_lora_sdxl as sap

SCRIPT = "train_sap_lora_sdxl"
PROMPT = "a photo of sks dog"
BASES = {
    "eps": {},
    "v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "playground": {"scheduler": "playground"},
    "edm_v": {"scheduler": "edm_euler", "prediction_type": "v_prediction", "sigma_data": 1.0},
}
PROCESSES = [("eps", []), ("v", []), ("eps", ["--do_edm_style_training"]), ("v", ["--do_edm_style_training"]),
             ("playground", []), ("edm_v", [])]  # fmt: skip
EDM_PROCESSES = PROCESSES[2:]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny SDXL pipelines by what they predict."""
    folder = tmp_path_factory.mktemp("sdxl")
    return {name: tiny_pipelines.save_sdxl(folder / name, **options) for name, options in BASES.items()}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Three pictures much wider than high, so that crops differ, with captions."""
    folder = tmp_path_factory.mktemp("data") / "wide"
    captions = [PROMPT, "sks dog in the snow", "sks dog on the beach"]
    return tiny_pipelines.save_photos(folder, count=3, size=(150, 100), captions=captions, suffix=".png")


def random_crops(*arguments) -> list[str]:
    return without(flags(*arguments), "--center_crop")


def load_pipeline(base, folder=None, name=LORA_FILE) -> StableDiffusionXLPipeline:
    """The pipeline as a user loads it, with or without a LoRA."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.load_lora_weights(folder, weight_name=name)
    return pipeline


def picture(pipeline, prompt=PROMPT) -> np.ndarray:
    """What a pipeline draws, in [0, 255]."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    return 255 * pipeline(prompt, generator=generator, **arguments).images[0]


def picture_of_run(run, prompt=PROMPT) -> np.ndarray:
    """What a run's validation draws, in [0, 255]."""
    return np.asarray(sap.sample_images(run, prompt, num_inference_steps=2)[0]).astype(float)


def predict(run, step) -> torch.Tensor:
    with torch.no_grad():
        return run.student(step.model_input, step.timesteps, step.conditioning, step.prompts)


def test_a_whole_run(bases, captioned, tmp_path, caplog):
    more = ["--validation_prompt=sks dog in the snow", "--num_validation_images=1", "--validation_epochs=1",
            "--checkpointing_steps=2", "--output_kohya_format", "--report_to=tensorboard",
            "--subject_token=sks", "--class_token="]  # fmt: skip
    train(SCRIPT, flags(bases["eps"], captioned, tmp_path / "out", *more))
    assert left_in(tmp_path / "out") == {
        LORA_FILE, sap.KOHYA_FILE, "README.md", "image_0.png", "validation", "logs", "metrics.jsonl", "checkpoint-2",
        sap.FINISHED_FILE,
    }  # fmt: skip
    assert list((tmp_path / "out" / "logs" / "dreambooth-lora-sd-xl").glob("events*"))
    assert all(key.startswith("unet.") and ".lora_" in key for key in lora(tmp_path / "out"))
    plain, adapted = load_pipeline(bases["eps"]), load_pipeline(bases["eps"], tmp_path / "out")
    assert np.abs(picture(plain) - picture(adapted)).max() > 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: openrail++" in card
    assert "- stable-diffusion-xl\n" in card
    assert "import StableDiffusionXLPipeline" in card
    assert "captions: 5" in caplog.text


# ---- Noise, v and EDM ----


@pytest.mark.parametrize(("base", "more"), [*PROCESSES, ("eps", ["--snr_gamma=0.05"]), ("v", ["--snr_gamma=0.05"])])
def test_gradient_is_that_of_the_blend_scaled(base, more, bases, photos, tmp_path):
    _, run = make_run(
        SCRIPT, flags(bases[base], photos, tmp_path, "--train_batch_size=2", "--anchor_weight=0.7", *more)
    )
    randomise_adapters(run)
    adapters = list(run.student.trained().values())
    step, anchor = draw(sap, run)
    of_objective = torch.autograd.grad(sap.loss_terms(step, anchor, run.student, run)["loss"], adapters)
    step.target = (step.target + 0.7 * sap.to_target_space(anchor, step)) / 1.7
    of_blend = torch.autograd.grad(sap.loss_terms(step, None, run.student, run)["loss"], adapters)
    largest = max(gradient.abs().max() for gradient in of_objective)
    assert largest > 1e-4
    for one, other in zip(of_objective, of_blend, strict=True):
        assert torch.allclose(one, 1.7 * other, atol=2e-5 * largest)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("base", "more"), PROCESSES)
def test_a_student_that_says_what_the_anchor_says_has_no_anchor_term(base, more, precision, bases, photos, tmp_path):
    more = ["--train_batch_size=2", f"--mixed_precision={precision}", *more]
    _, run = make_run(SCRIPT, flags(bases[base], photos, tmp_path, *more))
    student = run.accelerator.prepare(run.student)  # a new LoRA does nothing
    step, anchor = draw(sap, run)
    terms = sap.loss_terms(step, anchor, student, run)
    assert terms["loss/anchor"] > 1e-6 * terms["loss/reconstruction"]
    step.conditioning = step.anchor_conditioning
    assert sap.loss_terms(step, anchor, student, run)["loss/anchor"] == 0


@pytest.mark.parametrize(("base", "more"), EDM_PROCESSES)
def test_edm_denoises_as_the_sampler_does(base, more, bases, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(bases[base], photos, tmp_path, "--train_batch_size=3", *more))
    step, prediction = draw(sap, run)
    denoised = sap.to_target_space(prediction, step)
    for i in range(3):
        sampler = type(run.scheduler).from_config(run.scheduler.config)
        (index,) = (sampler.timesteps == step.timesteps[i]).nonzero().flatten().tolist()
        sampler.set_begin_index(index)
        noisy, time = step.noisy_latents[i], step.timesteps[i]
        assert torch.allclose(sampler.scale_model_input(noisy, time), step.model_input[i], rtol=1e-5, atol=1e-6)
        if isinstance(sampler, EDMDPMSolverMultistepScheduler):
            expected = sampler.convert_model_output(prediction[i], sample=noisy)
        else:
            expected = sampler.step(prediction[i], time, noisy).pred_original_sample
        assert torch.allclose(denoised[i], expected, rtol=1e-4, atol=1e-5 * noisy.abs().max().item())
        sigma = sampler.sigmas[index]
        c_out = sigma  # of an ordinary base: the weight makes its error one of the noise
        if isinstance(sampler, sap.EDM_SCHEDULERS):
            c_out = sampler.precondition_outputs(torch.zeros(()), torch.ones(()), sigma)
        assert step.sample_weights[i].item() == pytest.approx(c_out.item() ** -2, rel=1e-5)
        assert ((noisy - step.target[i]) / sigma).std().item() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("base", ["eps", "v"])
def test_edm_training_of_an_ordinary_base_is_its_own_loss(base, bases, photos, tmp_path):
    # 1 / sigma^2 turns the error of the denoised latents into that of the noise; for v it leaves alpha^2.
    more = ["--train_batch_size=2", "--do_edm_style_training"]
    _, run = make_run(SCRIPT, flags(bases[base], photos, tmp_path, *more))
    step, _ = draw(sap, run)
    prediction = sap.denoise(run.student.denoiser, step.model_input, step.timesteps, step.conditioning)
    process = DDPMScheduler.from_config(run.scheduler.config)
    timesteps = step.timesteps.long()
    noise = (step.noisy_latents - step.target) * step.sample_weights**0.5
    assert torch.allclose(step.model_input, process.add_noise(step.target, noise, timesteps), atol=1e-4)
    alphas = process.alphas_cumprod[timesteps][:, None, None, None]
    expected = (noise - prediction) ** 2
    if base == "v":
        expected = alphas * (process.get_velocity(step.target, noise, timesteps) - prediction) ** 2
    loss = sap.loss_terms(step, None, run.student, run)["loss"]
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-3)


def test_v_prediction(bases, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(bases["v"], photos, tmp_path))
    step, _ = draw(sap, run)
    alphas = run.scheduler.alphas_cumprod[step.timesteps][:, None, None, None]
    latents = alphas**0.5 * step.noisy_latents - (1 - alphas) ** 0.5 * step.target
    (item,) = items_of(run)
    posterior = run.posteriors[item["index"], False]
    mean = posterior.chunk(2, dim=1)[0] * run.vae.config.scaling_factor
    assert torch.allclose(latents, mean, atol=0.3)
    assert not torch.allclose(step.target, mean, atol=0.3)


@pytest.mark.parametrize(("base", "more"), PROCESSES[1:])
def test_every_process_trains_and_draws(base, more, bases, photos, tmp_path):
    more = [*more, "--validation_prompt=sks", "--num_validation_images=1", "--mixed_precision=bf16"]
    more += ["--validation_inference_steps=3"]
    train(SCRIPT, flags(bases[base], photos, tmp_path, *more, steps=3))
    assert any(tensor.abs().max() > 0.01 for key, tensor in lora(tmp_path).items() if "lora_B" in key)
    assert np.asarray(Image.open(tmp_path / "image_0.png")).std() > 1  # not black


def test_edm_changes_what_is_learnt(bases, photos, tmp_path):
    for name, more in {"plain": [], "edm": ["--do_edm_style_training"]}.items():
        train(SCRIPT, flags(bases["eps"], photos, tmp_path / name, *more))
    plain, edm = lora(tmp_path / "plain"), lora(tmp_path / "edm")
    assert any(not torch.allclose(plain[key], edm[key], atol=1e-3) for key in plain)


def test_min_snr_cannot_go_with_edm(bases, photos, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        sap.parse_args(flags("base", photos, tmp_path, "--do_edm_style_training", "--snr_gamma=5"))
    assert "--snr_gamma cannot go with --do_edm_style_training" in capsys.readouterr().err
    monkeypatch.delattr(sap, "load_text_pipeline")  # the mistake is found before weights are read
    for base in ("playground", "edm_v"):
        with pytest.raises(sap.UsageError, match="--snr_gamma cannot go with .* has weights of its own"):
            train(SCRIPT, flags(bases[base], photos, tmp_path, "--snr_gamma=5"))


@pytest.mark.parametrize(
    ("base", "more", "sampler"),
    [
        ("eps", [], DPMSolverMultistepScheduler),
        ("v", [], DPMSolverMultistepScheduler),
        ("eps", ["--do_edm_style_training"], EulerDiscreteScheduler),
        ("v", ["--do_edm_style_training"], EulerDiscreteScheduler),
        ("playground", [], EDMDPMSolverMultistepScheduler),
        ("edm_v", [], EDMEulerScheduler),
    ],
)
def test_validation_draws_what_the_pipeline_draws(base, more, sampler, bases, photos, tmp_path):
    more = [f"--validation_prompt={PROMPT}", "--num_validation_images=1", *more]
    _, run = make_run(SCRIPT, flags(bases[base], photos, tmp_path, *more))
    pipeline = load_pipeline(bases[base])
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    assert np.abs(picture(pipeline) - picture_of_run(run)).max() < 1.1
    assert np.abs(picture(pipeline, "sks dog in the snow") - picture_of_run(run)).max() > 2


# ---- Captions and sizes: each sample meets its own ----


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]])
def test_each_sample_meets_its_own_embeddings_and_time_ids(more, bases, wide, tmp_path):
    more = ["--train_batch_size=3", "--subject_token=sks", *more]
    _, run = make_run(SCRIPT, random_crops(bases["eps"], wide, tmp_path, *more))
    items = items_of(run)
    step = sap.draw_micro_step(run, 0, items)
    assert len(set(step.prompts)) == len({item["centering"] for item in items}) == 3
    together, anchors = predict(run, step), draw(sap, run)[1]
    pipeline = StableDiffusionXLPipeline.from_pretrained(bases["eps"], vae=None)
    for i, item in enumerate(items):
        left, top = item["centering"]
        time_ids = torch.tensor([[100, 150, round(0 * top), round(32 * left), 64, 64]], dtype=torch.float32)
        for caption, prediction in (item["prompt"], together), (item["anchor_prompt"], anchors):
            embeds, _, pooled, _ = pipeline.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
            with torch.no_grad():
                alone = pipeline.unet(
                    step.model_input[i : i + 1], step.timesteps[i], embeds,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
                ).sample[0]  # fmt: skip
            assert torch.allclose(prediction[i], alone, atol=1e-5)


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]])
@pytest.mark.parametrize(
    "change", [{"prompt": "sks dog on the beach"}, {"centering": (1.0, 0.0)}, {"anchor_prompt": "dog on the beach"}]
)
def test_a_change_of_one_sample_reaches_that_sample_alone(change, more, bases, wide, tmp_path):
    more = ["--train_batch_size=2", "--subject_token=sks", *more]
    _, run = make_run(SCRIPT, random_crops(bases["eps"], wide, tmp_path, *more))
    items = items_of(run)
    items[0] |= {"prompt": PROMPT, "anchor_prompt": "dog in the snow", "centering": (0.0, 0.0)}
    items[1] |= {"prompt": PROMPT, "anchor_prompt": "dog in the snow", "centering": (0.0, 0.0)}
    before = sap.draw_micro_step(run, 0, items)
    items[1] |= change
    after = sap.draw_micro_step(run, 0, items)
    assert torch.equal(before.model_input, after.model_input)
    of_students = (predict(run, after) - predict(run, before)).abs().amax(dim=(1, 2, 3))
    anchors = [anchors_of(sap, run, [one])[0] for one in (before, after)]
    of_anchors = (anchors[1] - anchors[0]).abs().amax(dim=(1, 2, 3))
    assert of_students[0] == of_anchors[0] == 0
    assert (of_students[1] > 1e-5) == ("anchor_prompt" not in change)
    assert (of_anchors[1] > 1e-5) == ("prompt" not in change)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("centering", [(0.0, 0.5), (0.25, 0.0), (1.0, 1.0)])
def test_time_ids_say_where_the_crop_lies(centering, flipped, bases, wide, tmp_path):
    args = sap.parse_args(random_crops(bases["eps"], wide, tmp_path, "--aspect_ratio_buckets=64,64", "--random_flip"))
    images = sap.SubjectImages(args)
    item = {"index": 1, "flipped": flipped, "centering": centering}
    height, width, top, left, *target = sap.size_conditioning(images, [item])[0].int().tolist()
    assert (height, width, target) == (100, 150, [64, 64])
    assert (top, left) == (0, round(32 * centering[0]))
    whole = Image.open(wide / "01.png")
    whole = (ImageOps.mirror(whole) if flipped else whole).resize((96, 64), Image.Resampling.LANCZOS)
    pixels = (images.pixel_values(1, flipped, centering).permute(1, 2, 0).numpy() + 1) * 127.5
    errors = [
        np.abs(pixels - np.asarray(whole.crop((corner, 0, corner + 64, 64)), dtype=float)).mean()
        for corner in range(33)
    ]
    assert int(np.argmin(errors)) == left


def test_pictures_of_a_bucket_have_its_size(bases, wide, tmp_path):
    more = ["--aspect_ratio_buckets=64,96;64,64", "--train_batch_size=2"]
    _, run = make_run(SCRIPT, flags(bases["eps"], wide, tmp_path, *more))
    step, _ = draw(sap, run)
    assert step.conditioning["time_ids"].tolist() == [[100, 150, 0, 0, 64, 96]] * 2
    assert step.model_input.shape == (2, 4, 8, 12)


def test_a_dropped_caption_is_what_the_sampler_takes_for_none(bases, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(bases["eps"], photos, tmp_path, "--caption_dropout=0.5", "--train_text_encoder"))
    names = ("encoder_hidden_states", "text_embeds")
    assert all(run.embeddings[""][name].abs().max() == 0 for name in names)
    both = sap.encode_prompts(run.student.text_pipeline, ["", PROMPT], run.device)
    alone = sap.encode_prompts(run.student.text_pipeline, [PROMPT], run.device)
    for name in names:
        assert both[name][0].abs().max() == 0
        assert torch.allclose(both[name][1], alone[name][0], atol=1e-5)
        assert both[name].requires_grad
    run.student.text_pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    for name, tensor in sap.encode_prompts(run.student.text_pipeline, [""], run.device).items():
        assert tensor.abs().max() > 0.1, name


# ---- Text encoders ----


def test_both_text_encoders_train(bases, photos, tmp_path):
    train(SCRIPT, flags(bases["eps"], photos, tmp_path, "--train_text_encoder"))
    moved = {
        key.split(".lora")[0] for key, tensor in lora(tmp_path).items() if "lora_B" in key and tensor.abs().max() > 0
    }
    layers = {key.split(".self_attn")[0] for key in moved if key.startswith("text_encoder")}
    # SDXL reads the last layer but one of both; the last one of the second gives the pooled embedding.
    assert layers == {
        f"{name}.text_model.encoder.layers.{i}"
        for name, i in [("text_encoder", 0), ("text_encoder_2", 0), ("text_encoder_2", 1)]
    }


def test_anchors_come_from_text_encoders_as_they_were(bases, captioned, tmp_path):
    more = ["--train_text_encoder", "--subject_token=sks"]
    _, run = make_run(SCRIPT, flags(bases["eps"], captioned, tmp_path, *more))
    pipeline = StableDiffusionXLPipeline.from_pretrained(bases["eps"], unet=None, vae=None)
    assert set(run.embeddings) == set(run.images.anchor_captions)
    for prompt, conditioning in run.embeddings.items():
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        assert torch.equal(conditioning["encoder_hidden_states"], embeds)
        assert torch.equal(conditioning["text_embeds"], pooled)


def test_text_encoders_are_gone_before_the_unet_is_loaded(bases, photos, tmp_path, monkeypatch):
    encoders, alive, load_text_pipeline, load_denoiser = [], [], sap.load_text_pipeline, sap.load_denoiser

    def load_text(*arguments):
        pipeline = load_text_pipeline(*arguments)
        encoders[:] = [weakref.ref(pipeline.text_encoder), weakref.ref(pipeline.text_encoder_2)]
        return pipeline

    def load_unet(*arguments):
        gc.collect()
        alive[:] = [reference() is not None for reference in encoders]
        return load_denoiser(*arguments)

    monkeypatch.setattr(sap, "load_text_pipeline", load_text)
    monkeypatch.setattr(sap, "load_denoiser", load_unet)
    make_run(SCRIPT, flags(bases["eps"], photos, tmp_path / "plain", "--validation_prompt=sks"))
    assert alive == [False, False]
    make_run(SCRIPT, flags(bases["eps"], photos, tmp_path / "both", "--train_text_encoder"))
    assert alive == [True, True]


def test_a_resumed_run_is_the_same_run_bit_for_bit(bases, captioned, tmp_path):
    more = ["--train_text_encoder", "--gradient_accumulation_steps=2", "--lora_dropout=0.2", "--random_flip",
            "--subject_token=sks", "--do_edm_style_training"]  # fmt: skip
    for name in ("whole", "resumed"):
        arguments = [*more, "--checkpointing_steps=2", "--max_train_steps=3"]
        arguments = random_crops(bases["eps"], captioned, tmp_path / name, *arguments)
        if name == "resumed":
            shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / name / "checkpoint-2")
            torch.manual_seed(12345)
            arguments.append("--resume_from_checkpoint=latest")
        train(SCRIPT, arguments)
    whole = lora(tmp_path / "whole")
    assert {key.split(".")[0] for key in whole} == {"unet", "text_encoder", "text_encoder_2"}
    assert_equal(lora(tmp_path / "resumed"), whole)
    before = lora(tmp_path / "whole" / "checkpoint-2")
    assert any(not torch.equal(before[key], whole[key]) for key in whole)


# ---- The VAE ----


def test_another_vae_is_loaded_without_the_revision_and_variant_of_the_base(bases, photos, tmp_path, monkeypatch):
    base = tmp_path / "base"
    StableDiffusionXLPipeline.from_pretrained(bases["eps"]).save_pretrained(base, variant="fp16")
    vae = tiny_pipelines.save_vae(tmp_path / "vae", scaling_factor=0.2)
    calls, original = [], AutoencoderKL.from_pretrained
    monkeypatch.setattr(
        sap.AutoencoderKL,
        "from_pretrained",
        lambda *args, **options: calls.append(options) or original(*args, **options),
    )
    more = [f"--pretrained_vae_model_name_or_path={vae}", "--revision=main", "--variant=fp16"]
    _, run = make_run(SCRIPT, flags(base, photos, tmp_path / "out", *more))
    assert [call.keys() & {"revision", "variant", "subfolder"} for call in calls] == [set()]
    pixels = run.images.pixel_values(0, False, run.images.fixed_centering[0])[None]
    with torch.no_grad():
        expected = original(vae).encode(pixels).latent_dist.parameters
        of_base = original(bases["eps"], subfolder="vae").encode(pixels).latent_dist.parameters
    assert torch.allclose(run.posteriors[0, False], expected, atol=1e-5)
    assert not torch.allclose(run.posteriors[0, False], of_base, atol=0.1)
    assert run.vae.config.scaling_factor == 0.2
    train(
        SCRIPT,
        flags(
            base, photos, tmp_path / "out", *more, "--validation_prompt=sks", "--validation_inference_steps=2", steps=1
        ),
    )
    assert (tmp_path / "out" / "image_0.png").is_file()


@pytest.mark.parametrize("base", ["eps", "playground"])
def test_latents_are_scaled_and_brought_back(base, bases, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(bases[base], photos, tmp_path))
    config = run.vae.config
    assert (config.latents_mean is not None) == (base == "playground")
    posteriors = torch.cat(list(run.posteriors.values())).chunk(2, dim=1)[0]
    scaled = sap.scale_latents(posteriors, run.vae)
    assert torch.allclose(sap.scale_latents(scaled, run.vae, inverse=True), posteriors, atol=1e-5)
    for channel in range(4):
        mean, std = (config[name][channel] if base == "playground" else default
                     for name, default in (("latents_mean", 0), ("latents_std", 1)))  # fmt: skip
        expected = (posteriors[:, channel] - mean) / std * config["scaling_factor"]
        assert torch.allclose(scaled[:, channel], expected, atol=1e-5)


def test_precision_of_the_parts(bases, photos, tmp_path):
    more = ["--mixed_precision=bf16", "--train_text_encoder"]
    _, run = make_run(SCRIPT, random_crops(bases["eps"], photos, tmp_path, *more))
    assert {parameter.dtype for parameter in run.vae.parameters()} == {torch.float32}
    for module in run.student.adapted.values():
        dtypes = {(p.requires_grad, p.dtype) for p in module.parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    step, anchor = draw(sap, run)
    assert step.anchor_conditioning["encoder_hidden_states"].dtype == anchor.dtype == torch.bfloat16
    assert step.conditioning["time_ids"].dtype == torch.float32  # bfloat16 has no 1023
    assert sap.to_target_space(anchor, step).dtype == torch.float32


# ---- Files ----


@pytest.mark.parametrize(
    ("depth", "more"), [(1, ["--rank=2"]), (2, ["--rank=2", "--lora_alpha=6"]), (2, ["--use_dora"])]
)
def test_both_files_hold_the_model_in_memory(depth, more, photos, tmp_path):
    base = tiny_pipelines.save_sdxl(tmp_path / "base", layers_per_block=depth)
    more = [*more, "--train_text_encoder", f"--validation_prompt={PROMPT}", "--num_validation_images=1"]
    _, run = make_run(SCRIPT, flags(base, photos, tmp_path, *more))
    before = picture_of_run(run)
    randomise_adapters(run)
    trained = picture_of_run(run)
    assert np.abs(before - trained).max() > 5
    sap.write_lora(run, tmp_path)
    sap.write_kohya_lora(run, tmp_path)
    for name in (LORA_FILE,) if run.args.use_dora else (LORA_FILE, sap.KOHYA_FILE):  # diffusers reads no kohya DoRA
        pipeline = load_pipeline(base, tmp_path, name)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        assert np.abs(picture(pipeline) - trained).max() < 1.1, name
        pipeline.unet.disable_adapters()  # what is left is the text encoders'
        assert np.abs(picture(pipeline) - before).max() > 2, name


def test_kohya_keys(bases, photos, tmp_path):
    more = ["--train_text_encoder", "--output_kohya_format", "--rank=2", "--lora_alpha=6"]
    train(SCRIPT, flags(bases["eps"], photos, tmp_path, *more, steps=1))
    stored = load_file(tmp_path / sap.KOHYA_FILE)
    assert {"_".join(key.split("_")[:2]) for key in stored} == {"lora_unet", "lora_te1", "lora_te2"}
    assert "lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight" in stored
    assert "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0.lora_up.weight" in stored
    assert {tensor.item() for key, tensor in stored.items() if key.endswith(".alpha")} == {6.0}
    assert len(stored) == 3 * len(lora(tmp_path)) / 2


# ---- Options ----


@pytest.mark.parametrize(
    "more",
    [
        ["--use_dora", "--train_text_encoder", "--train_batch_size=2", "--gradient_accumulation_steps=2"],
        ["--mixed_precision=bf16", "--train_text_encoder", "--gradient_checkpointing", "--cache_latents"],
        ["--snr_gamma=5", "--random_flip", "--caption_dropout=0.5", "--train_batch_size=2"],
        ["--anchor_source=finetuned", "--do_edm_style_training", "--lora_layers=to_q,ff.net.2"],
        ["--anchor_weight=0", "--with_prior_preservation"],
        ["--optimizer=prodigy", "--learning_rate=1", "--train_text_encoder"],
        ["--use_8bit_adam"],
    ],
)
def test_combinations_train_and_load(more, bases, photos, tmp_path):
    if "--optimizer=prodigy" in more:
        pytest.importorskip("prodigyopt")
    if "--use_8bit_adam" in more:
        pytest.importorskip("bitsandbytes")
    train(SCRIPT, random_crops(bases["eps"], photos, tmp_path, *more))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in lora(tmp_path).values())
    assert any(tensor.abs().max() > 0 for key, tensor in lora(tmp_path).items() if "lora_B" in key)
    pipeline = UNet2DConditionModel.from_pretrained(bases["eps"], subfolder="unet")
    pipeline.load_lora_adapter(lora(tmp_path), prefix="unet")
    assert pipeline.peft_config


@pytest.mark.parametrize("base", ["eps", "playground"])
def test_anchor_batch_size_does_not_change_the_lora(base, bases, captioned, tmp_path):
    for size in (1, 4):
        more = [f"--anchor_batch_size={size}", "--gradient_accumulation_steps=2", "--subject_token=sks"]
        more += ["--learning_rate=1e-3", "--adam_epsilon=1e-6"]  # or Adam blows rounding up to whole steps
        train(SCRIPT, flags(bases[base], captioned, tmp_path / str(size), *more, steps=3))
    one, four = lora(tmp_path / "1"), lora(tmp_path / "4")
    assert all(torch.allclose(one[key], four[key], atol=1e-5) for key in one)


def test_the_anchor_changes_what_is_learnt(bases, photos, tmp_path):
    for weight in (0, 1):
        train(SCRIPT, flags(bases["eps"], photos, tmp_path / str(weight), f"--anchor_weight={weight}"))
    zero, one = lora(tmp_path / "0"), lora(tmp_path / "1")
    assert any(not torch.allclose(zero[key], one[key], atol=1e-4) for key in zero)
