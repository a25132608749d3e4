# SPDX-License-Identifier: Apache-2.0
"""What SDXL adds: EDM, the sizes of pictures and their crops, captions that are dropped, another VAE."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import AutoencoderKL, EDMDPMSolverMultistepScheduler, StableDiffusionXLPipeline
from PIL import Image, ImageOps
from runner import draw, flags, make_run, train, without

import train_sap_lora_sdxl as sap

SCRIPT = "train_sap_lora_sdxl"
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Three pictures much wider than high, so that crops differ."""
    folder = tmp_path_factory.mktemp("data") / "wide"
    return tiny_pipelines.save_photos(folder, count=3, size=(150, 100), suffix=".png")


# ---- EDM ----


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sdxl", ["--do_edm_style_training"]),
        ("sdxl-v", ["--do_edm_style_training"]),
        ("playground", []),
        ("cosxl", []),
    ],
)
def test_edm_denoises_as_the_sampler_does(kind, more, base_of, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(base_of(kind), photos, tmp_path, "--train_batch_size=3", *more))
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
        if kind in ("playground", "cosxl"):
            c_out = sampler.precondition_outputs(torch.zeros(()), torch.ones(()), sigma)
        assert step.sample_weights[i].item() == pytest.approx(c_out.item() ** -2, rel=1e-5)
        assert ((noisy - step.target[i]) / sigma).std().item() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("kind", ["playground", "cosxl"])
def test_min_snr_cannot_go_with_edm(kind, base_of, photos, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        sap.parse_args(flags("base", photos, tmp_path, "--do_edm_style_training", "--snr_gamma=5"))
    assert "--snr_gamma cannot go with --do_edm_style_training" in capsys.readouterr().err
    monkeypatch.delattr(sap, "load_text_pipeline")  # the mistake is found before weights are read
    with pytest.raises(sap.UsageError, match="--snr_gamma cannot go with .* has weights of its own"):
        train(SCRIPT, flags(base_of(kind), photos, tmp_path, "--snr_gamma=5"))


# ---- Sizes and captions ----


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("centering", [(0.0, 0.5), (0.25, 0.0), (1.0, 1.0)])
def test_time_ids_say_where_the_crop_lies(centering, flipped, wide, tmp_path):
    more = ["--aspect_ratio_buckets=64,64", "--random_flip"]
    images = sap.SubjectImages(sap.parse_args(without(flags("base", wide, tmp_path, *more), "--center_crop")))
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


def test_pictures_of_a_bucket_have_its_size(base_of, wide, tmp_path):
    more = ["--aspect_ratio_buckets=64,96;64,64", "--train_batch_size=2", "--mixed_precision=bf16"]
    _, run = make_run(SCRIPT, flags(base_of("sdxl"), wide, tmp_path, *more))
    step, _ = draw(sap, run)
    assert step.conditioning["time_ids"].tolist() == [[100, 150, 0, 0, 64, 96]] * 2
    assert step.conditioning["time_ids"].dtype == torch.float32  # bfloat16 has no 1023
    assert step.model_input.shape == (2, 4, 8, 12)


def test_a_dropped_caption_is_what_the_sampler_takes_for_none(base_of, photos, tmp_path):
    more = ["--caption_dropout=0.5", "--train_text_encoder"]
    _, run = make_run(SCRIPT, flags(base_of("sdxl"), photos, tmp_path, *more))
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


# ---- The VAE ----


def test_another_vae_is_loaded_without_the_revision_and_variant_of_the_base(base_of, photos, tmp_path, monkeypatch):
    base = tmp_path / "base"
    StableDiffusionXLPipeline.from_pretrained(base_of("sdxl")).save_pretrained(base, variant="fp16")
    vae = tiny_pipelines.save_vae(tmp_path / "vae", scaling_factor=0.2)
    calls, original = [], AutoencoderKL.from_pretrained

    def load(*arguments, **options):
        calls.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", load)
    more = [f"--pretrained_vae_model_name_or_path={vae}", "--revision=main", "--variant=fp16"]
    _, run = make_run(SCRIPT, flags(base, photos, tmp_path / "out", *more))
    assert [call.keys() & {"revision", "variant", "subfolder"} for call in calls] == [set()]
    pixels = run.images.pixel_values(0, False, run.images.fixed_centering[0])[None]
    with torch.no_grad():
        expected = original(vae).encode(pixels).latent_dist.parameters
    assert torch.allclose(run.posteriors[0, False], expected, atol=1e-5)
    assert run.vae.config.scaling_factor == 0.2
