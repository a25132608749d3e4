# SPDX-License-Identifier: Apache-2.0
"""The mathematics of Eq. 5, and each way in which switching adapters off can go wrong."""

import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, get_peft_model
from runner import anchors_of, draw, flags, lora, make_run, metrics, randomise_adapters, train
from tiny_pipelines import KINDS
from torch import nn

import train_sap_lora_sd15 as sap


def gradients(run) -> dict[str, torch.Tensor]:
    """Gradients of everything that trains, which are cleared."""
    found = {name: parameter.grad.clone() for name, parameter in run.student.trained().items()}
    run.student.zero_grad()
    return found


def predict(model, step, conditioning) -> torch.Tensor:
    """What a denoiser says of a micro-step's noisy latents."""
    return sap.denoise(model, step.model_input, step.timesteps, conditioning)


@pytest.fixture
def run(sd15, photos, tmp_path):
    run = make_run("train_sap_lora_sd15", flags(sd15, photos, tmp_path, "--train_batch_size=2"))[1]
    randomise_adapters(run)
    return run


MIN_SNR, EDM = ["--snr_gamma=0.05"], ["--do_edm_style_training"]
PROCESSES = [("sd15", []), ("sd15", MIN_SNR), ("sd21", []), ("sd21", MIN_SNR), ("sdxl", []), ("sdxl-v", MIN_SNR),
             ("sdxl", EDM), ("sdxl-v", EDM), ("playground", []), ("cosxl", []), ("sd3", []),
             ("sd3", ["--precondition_outputs=0"]), ("sd3", ["--weighting_scheme=sigma_sqrt"]),
             ("sd3", ["--weighting_scheme=sigma_sqrt", "--precondition_outputs=0"])]  # fmt: skip


@pytest.mark.parametrize(("kind", "more"), PROCESSES)
def test_gradient_is_that_of_the_blend_scaled(kind, more, base_of, photos, tmp_path):
    weight = 0.7
    more = ["--train_batch_size=2", f"--anchor_weight={weight}", *more]
    sap, run = make_run(KINDS[kind][0], flags(base_of(kind), photos, tmp_path, *more))
    randomise_adapters(run)
    step, anchor = draw(sap, run)
    sap.loss_terms(step, anchor, run.student, run)["loss"].backward()
    of_objective = gradients(run)
    step.target = (step.target + weight * sap.to_target_space(anchor, step)) / (1 + weight)
    sap.loss_terms(step, None, run.student, run)["loss"].backward()
    of_blend = gradients(run)
    largest = max(gradient.abs().max() for gradient in of_objective.values())
    assert largest > 1e-4
    for name, gradient in of_objective.items():
        assert torch.allclose(gradient, (1 + weight) * of_blend[name], atol=2e-5 * largest), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("kind", "more"), [*PROCESSES, ("sd15", ["--lora_layers=to_q,conv1"])])
def test_student_and_anchor_round_alike(kind, more, precision, base_of, photos, tmp_path):
    """With one prompt for both the term of the anchor is nothing until the LoRA has an effect."""
    more = ["--class_prompt=a photo of sks dog", "--anchor_batch_size=1", f"--mixed_precision={precision}", *more]
    train(KINDS[kind][0], flags(base_of(kind), photos, tmp_path, *more))
    first, second = metrics(tmp_path)
    assert first["loss/anchor"] == 0 < second["loss/anchor"]
    assert any(tensor.abs().max() > 0.01 for key, tensor in lora(tmp_path).items() if "lora_B" in key)


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "sdxl-v", "playground", "sd3"])
def test_targets_are_what_the_base_predicts_and_each_sample_has_its_own_latents(kind, base_of, photos, tmp_path):
    sap, run = make_run(KINDS[kind][0], flags(base_of(kind), photos, tmp_path, "--train_batch_size=4"))
    step, _ = draw(sap, run)
    roots = torch.ones(())
    latents = step.target  # of EDM and of flows
    if kind not in ("playground", "sd3"):
        alphas = run.scheduler.alphas_cumprod[step.timesteps][:, None, None, None]
        roots = alphas**0.5
        latents = step.model_input - (1 - alphas) ** 0.5 * step.target
    if kind in ("sd21", "sdxl-v"):
        latents = alphas * step.model_input - (alphas * (1 - alphas)) ** 0.5 * step.target
    posteriors = torch.cat([run.posteriors[index, False] for index in step.pictures])
    means = posteriors.chunk(2, dim=1)[0]
    config = run.vae.config
    shift, scale = config.shift_factor or 0.0, config.scaling_factor
    if kind == "playground":
        shift = torch.tensor(config.latents_mean)[:, None, None]
        scale = scale / torch.tensor(config.latents_std)[:, None, None]
    expected = roots * (means - shift) * scale
    assert torch.allclose(latents, expected, atol=0.3)
    assert (latents - expected).mean().abs() < 0.02
    assert not torch.allclose(latents, expected.roll(1, 0), atol=0.3)


def test_weights_of_samples_multiply_both_terms():
    prediction, target, anchor = torch.randn(3, 2, 4, 8, 8).unbind()
    weights = torch.tensor([3.0, 0.0])[:, None, None, None]
    loss, reconstruction, distance = sap.semantic_anchor_loss(prediction, target, anchor, 0.25, weights)
    assert torch.isclose(reconstruction, 3 * ((target - prediction)[0] ** 2).mean() / 2)
    assert torch.isclose(distance, 3 * ((prediction - anchor)[0] ** 2).mean() / 2)
    assert torch.isclose(loss, reconstruction + 0.25 * distance)


def test_without_anchor_it_is_the_plain_loss(run):
    step, _ = draw(sap, run)
    terms = sap.loss_terms(step, None, run.student, run)
    prediction = predict(run.student.denoiser, step, step.conditioning)
    assert terms.keys() == {"loss", "loss/reconstruction"}
    assert torch.equal(terms["loss"], torch.nn.functional.mse_loss(prediction, step.target))
    assert torch.equal(terms["loss"], terms["loss/reconstruction"])


def test_terms_are_computed_in_float32():
    prediction, target, anchor = torch.full((3, 1, 1, 1, 1), 300.0, dtype=torch.float16).unbind()
    assert sap.semantic_anchor_loss(prediction, -target, anchor)[0].item() == 600.0**2  # overflows in float16


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type):
    scheduler = DDPMScheduler(
        prediction_type=prediction_type, rescale_betas_zero_snr=True, beta_schedule="scaled_linear"
    )
    timesteps = torch.tensor([10, 500, 999])
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    assert snr[-1] == 0
    weights = sap.min_snr_weights(scheduler, timesteps, 5.0)
    assert weights.shape == (3, 1, 1, 1)
    expected = snr.clamp(max=5) / (snr + 1)
    if prediction_type == "epsilon":
        expected = torch.where(snr > 0, snr.clamp(max=5) / snr, 1.0)
    assert torch.allclose(weights.flatten(), expected, rtol=1e-4)
    assert sap.min_snr_weights(scheduler, timesteps, None) == 1.0


# ---- The anchor is the pretrained model ----


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sd15", []),
        ("sd15", ["--use_dora"]),
        ("sd15", ["--lora_dropout=0.5"]),
        ("sd15", ["--mixed_precision=bf16"]),
        ("sdxl", []),
        ("sd35", []),
        ("sd35", ["--use_dora", "--mixed_precision=bf16"]),
    ],
)
def test_anchor_equals_the_base_model_before_and_after_training(kind, more, base_of, photos, tmp_path):
    sap, run = make_run(KINDS[kind][0], flags(base_of(kind), photos, tmp_path, "--train_batch_size=2", *more))
    dtype = torch.bfloat16 if "--mixed_precision=bf16" in more else torch.float32
    base = sap.DENOISER_CLASS.from_pretrained(base_of(kind), subfolder=sap.DENOISER, dtype=dtype)
    training = sap.start_training(run, None, 0)
    for index in range(3):
        step, anchor = draw(sap, run, index)
        with torch.no_grad(), run.accelerator.autocast():
            expected = sap.denoise(base, step.model_input, step.timesteps, step.anchor_conditioning)
        assert torch.equal(anchor, expected)
        assert not anchor.requires_grad
        assert not anchor.is_inference()  # it can enter a loss
        sap.loss_terms(step, anchor, training.student, run)["loss"].backward()
        training.optimizer.step()
    with torch.no_grad(), run.accelerator.autocast():
        moved = sap.denoise(run.student.denoiser, step.model_input, step.timesteps, step.anchor_conditioning)
    assert not torch.allclose(moved, expected, atol=1e-3)


@pytest.mark.parametrize("more", [[], ["--lora_dropout=0.5"]])
def test_anchor_of_the_finetuned_source_is_the_student_on_the_class_prompt(more, sd15, photos, tmp_path):
    run = make_run("train_sap_lora_sd15", flags(sd15, photos, tmp_path, *more))[1]
    randomise_adapters(run)
    step, pretrained = draw(sap, run)
    (finetuned,) = anchors_of(sap, run, [step], source="finetuned")
    assert run.student.denoiser.training
    with sap.evaluating(run.student.denoiser):  # dropout is for what trains
        assert torch.equal(finetuned, predict(run.student.denoiser, step, step.anchor_conditioning))
    assert not torch.allclose(finetuned, pretrained, atol=1e-3)
    assert not finetuned.requires_grad


def test_anchors_of_several_sizes_keep_their_places():
    sizes = [(2, 3), (3, 2), (2, 3), (3, 2), (2, 3)]
    values = iter(range(100))
    inputs = []
    for height, width in sizes:
        numbers = torch.tensor([float(next(values)), float(next(values))])
        model_input = numbers[:, None, None, None].expand(2, 4, height, width)
        inputs.append((model_input, numbers.long(), {"shift": 100 * numbers[:, None]}))
    batches = []

    def denoise(model, model_input, timesteps, conditioning):
        batches.append(len(timesteps))
        assert torch.equal(model_input[:, 0, 0, 0].long(), timesteps)
        return model_input + conditioning["shift"][:, :, None, None]

    anchors = sap.predict_anchors(nn.Identity(), denoise, inputs, batch_size=4)
    assert sorted(batches) == [2, 4, 4]
    for (model_input, _, _), anchor in zip(inputs, anchors, strict=True):
        assert torch.equal(anchor, 101 * model_input)


# ---- Hazards of switching adapters off ----


def test_frozen_adapter_weights_stay_frozen(run):
    trainable = list(run.student.trained().values())
    trainable[0].requires_grad_(False)
    with sap.adapters_disabled(run.student.denoiser):
        inside = list(run.student.trained().values())
    after = list(run.student.trained().values())
    assert [id(p) for p in inside] == [id(p) for p in after] == [id(p) for p in trainable[1:]]


def test_adapters_come_back_after_an_exception(run):
    step, _ = draw(sap, run)
    before = predict(run.student.denoiser, step, step.conditioning)
    with pytest.raises(KeyError), sap.adapters_disabled(run.student.denoiser):
        raise KeyError
    after = predict(run.student.denoiser, step, step.conditioning)
    assert torch.equal(before, after)
    assert after.requires_grad


def test_nested_use_leaves_the_outer_one_off(run):
    step, anchor = draw(sap, run)
    with torch.no_grad(), sap.adapters_disabled(run.student.denoiser):
        with sap.adapters_disabled(run.student.adapters):  # the layers of it, collected before
            pass
        assert torch.equal(predict(run.student.denoiser, step, step.anchor_conditioning), anchor)


def test_optimizer_has_all_adapters_even_if_made_inside(run):
    with sap.adapters_disabled(run.student.denoiser):
        optimizer = sap.make_optimizer(run)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(run.student.trained()) > 0


@pytest.mark.parametrize("source", ["pretrained", "finetuned"])
def test_all_adapters_train_with_text_encoder_and_half_precision(source, sd15, photos, tmp_path):
    more = ["--train_text_encoder", "--mixed_precision=bf16", f"--anchor_source={source}"]
    run = make_run("train_sap_lora_sd15", flags(sd15, photos, tmp_path, *more))[1]
    randomise_adapters(run)
    step, _ = draw(sap, run)
    (anchor,) = anchors_of(sap, run, [step], source=source)
    sap.loss_terms(step, anchor, run.accelerator.prepare(run.student), run)["loss"].backward()
    assert {name.split(".")[0] for name in run.student.trained()} == {"denoiser", "text_encoders"}
    assert [name for name, parameter in run.student.trained().items() if not parameter.grad.abs().max() > 0] == []


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.to_q(x))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"bias": "all"}, "trains but is no adapter"),
        ({}, "merged"),
    ],
)
def test_what_cannot_be_switched_off_is_refused(options, reason):
    model = get_peft_model(Block(), LoraConfig(target_modules=["to_q"], **options))
    if reason == "merged":
        model.merge_adapter()
    with pytest.raises(ValueError, match=reason), sap.adapters_disabled(model):
        pass


# ---- Captions of the class ----


@pytest.mark.parametrize(
    ("caption", "token", "replacement", "expected"),
    [
        ("a photo of sks dog", "sks", "", "a photo of dog"),
        ("a photo of sks dog", "sks dog", "dog", "a photo of dog"),
        ("sks, near another sks", "sks", "cat", "cat, near another cat"),
        ("a photo of <sks> dog", "<sks>", "", "a photo of dog"),
        ("a photo of [V] dog", "[V]", "a", "a photo of a dog"),
        ("un sks.", "sks", r"\1", r"un \1."),
        ("ein süß sks", "sks", "hund", "ein süß hund"),
    ],
)
def test_anchor_caption(caption, token, replacement, expected):
    assert sap.anchor_caption(caption, token, replacement) == expected


@pytest.mark.parametrize("caption", ["a photo of sksa dog", "a photo of dog", "", "my_sks"])
def test_anchor_caption_without_the_word_quotes_the_caption(caption):
    with pytest.raises(ValueError, match=f'"{caption}"'):
        sap.anchor_caption(caption, "sks")
