# SPDX-License-Identifier: Apache-2.0
"""What is Stable Diffusion 3's own: the flow, two CLIPs and a T5 that comes and goes, blocks, and the file's keys."""

import dataclasses
import weakref

import pytest
import tiny_pipelines
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from runner import (
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
)
from transformers import CLIPTextModelWithProjection, T5EncoderModel

import train_sap_lora_sd3 as sap

SCRIPT = "train_sap_lora_sd3"
PROMPTS = ["a photo of sks dog", "a photo of a dog"]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_pipelines.save_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def sd3_without_t5(tmp_path_factory):
    """The same weights as `sd3`, without T5."""
    return tiny_pipelines.save_sd3(tmp_path_factory.mktemp("models") / "sd3_without_t5", t5=False)


@pytest.fixture(scope="module")
def sd35(tmp_path_factory):
    return tiny_pipelines.save_sd3(tmp_path_factory.mktemp("models") / "sd35", dual_attention=True)


def layers_of(keys, name: str = "transformer") -> set[str]:
    """The layers that a LoRA file's keys adapt in one module."""
    return {key.split(".lora")[0].removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")}


# ---- The flow ----


@pytest.mark.parametrize("scheme", ["logit_normal", "sigma_sqrt", "cosmap", "mode"])
def test_noisy_latents_lie_on_the_flow_and_both_spaces_mean_the_same(scheme, sd3, photos, tmp_path):
    more = ["--train_batch_size=4", f"--weighting_scheme={scheme}"]
    _, velocities = make_run(SCRIPT, flags(sd3, photos, tmp_path, *more, "--precondition_outputs=0"))
    _, latents = make_run(SCRIPT, flags(sd3, photos, tmp_path, *more))
    flow, image = draw(sap, velocities)[0], draw(sap, latents)[0]
    assert torch.equal(flow.model_input, image.model_input)
    sigmas = (flow.timesteps / 1000)[:, None, None, None]
    assert torch.allclose(flow.model_input, image.target + sigmas * flow.target, atol=1e-5)
    assert torch.equal(sap.to_target_space(flow.target, flow), flow.target)
    assert torch.allclose(sap.to_target_space(flow.target, image), image.target, atol=1e-5)
    expected = {"sigma_sqrt": sigmas**-2, "cosmap": 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2))}
    assert torch.allclose(image.sample_weights, expected.get(scheme, torch.ones_like(sigmas)), rtol=1e-4)
    assert torch.equal(image.sample_weights, flow.sample_weights)


@pytest.mark.parametrize(
    ("more", "low", "high"),
    [
        (["--logit_mean=6"], 0.002, 0.05),
        (["--logit_mean=-6"], 0.95, 1.0),
        (["--weighting_scheme=mode", "--mode_scale=12"], 0.002, 1.0),  # its density leaves [0, 1]
        (["--weighting_scheme=cosmap"], 0.002, 1.0),
    ],
)
def test_timesteps_follow_the_scheme_and_stay_in_the_table(more, low, high, sd3, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd3, photos, tmp_path, *more))
    latents, noise = torch.zeros(500, 1, 1, 1), torch.ones(500, 1, 1, 1)
    drawn, again = (sap.diffuse(run, latents, noise, sap.keyed_generator(0)) for _ in range(2))
    assert torch.isin(drawn["timesteps"], run.scheduler.timesteps).all()
    sigmas = drawn["model_input"].flatten()  # of noise alone
    assert torch.isin(sigmas, run.scheduler.sigmas).all()
    assert sigmas.dtype == torch.float32
    middle = sigmas.quantile(torch.tensor([0.1, 0.9]))
    assert low <= middle[0] < middle[1] <= high
    assert torch.equal(drawn["timesteps"], again["timesteps"])


@pytest.mark.parametrize("scheme", ["logit_normal", "sigma_sqrt"])
@pytest.mark.parametrize("precondition", [0, 1])
def test_gradient_is_that_of_the_blend_scaled(precondition, scheme, sd3, photos, tmp_path):
    weight = 0.5
    more = ["--train_batch_size=2", f"--precondition_outputs={precondition}", f"--weighting_scheme={scheme}"]
    _, run = make_run(SCRIPT, flags(sd3, photos, tmp_path, *more, f"--anchor_weight={weight}"))
    randomise_adapters(run)
    step, anchor = draw(sap, run)
    adapters = list(run.student.trained().values())
    of_objective = torch.autograd.grad(sap.loss_terms(step, anchor, run.student, run)["loss"], adapters)
    step.target = (step.target + weight * sap.to_target_space(anchor, step)) / (1 + weight)
    of_blend = torch.autograd.grad(sap.loss_terms(step, None, run.student, run)["loss"], adapters)
    largest = max(gradient.abs().max() for gradient in of_objective)
    assert largest > 1e-4
    for one, other in zip(of_objective, of_blend, strict=True):
        assert torch.allclose(one, (1 + weight) * other, atol=1e-5 * largest)


@pytest.mark.parametrize("logit_mean", [-5, 0, 4])
@pytest.mark.parametrize("scheme", ["logit_normal", "sigma_sqrt"])
@pytest.mark.parametrize("precondition", [0, 1])
def test_weight_of_the_anchor_does_not_depend_on_sigma(precondition, scheme, logit_mean, sd3, photos, tmp_path):
    more = [f"--precondition_outputs={precondition}", f"--weighting_scheme={scheme}", f"--logit_mean={logit_mean}"]
    _, run = make_run(SCRIPT, flags(sd3, photos, tmp_path, *more))
    for index in range(3):
        step, _ = draw(sap, run, index)
        velocity = (step.target - step.skip * step.model_input) / step.scale
        error = torch.randn(velocity.shape, generator=sap.keyed_generator(index))
        prediction = velocity + error  # as far from the truth as from the anchor
        terms = sap.loss_terms(step, prediction + error, lambda *_, p=prediction: p, run)
        distance = terms["loss/anchor"]
        assert torch.isclose(terms["loss/reconstruction"], distance, rtol=1e-3)
        assert distance > 0


def test_small_distances_survive_half_precision(sd3, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd3, photos, tmp_path, "--logit_mean=5", "--mixed_precision=bf16"))
    step, anchor = draw(sap, run)
    assert anchor.dtype == torch.bfloat16
    prediction = anchor * 1.01
    distance = sap.loss_terms(step, anchor, lambda *_: prediction, run)["loss/anchor"]
    sigmas = (step.timesteps / 1000).double()[:, None, None, None]
    expected = ((sigmas * (prediction.double() - anchor.double())) ** 2).mean()
    assert expected < 1e-6
    assert distance.item() == pytest.approx(expected.item(), rel=1e-2)


# ---- The anchor ----


@pytest.mark.parametrize("more", [[], ["--use_dora", "--mixed_precision=bf16"]])
def test_anchor_equals_the_base_model_before_and_after_training(more, sd35, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd35, photos, tmp_path, "--train_batch_size=2", *more))
    dtype = torch.bfloat16 if "--mixed_precision=bf16" in more else torch.float32
    base = SD3Transformer2DModel.from_pretrained(sd35, subfolder="transformer", dtype=dtype)
    training = sap.start_training(run, None, 0)
    for index in range(3):
        step, anchor = draw(sap, run, index)
        with torch.no_grad(), run.accelerator.autocast():
            expected = sap.denoise(base, step.model_input, step.timesteps, step.anchor_conditioning)
        assert torch.equal(anchor, expected)
        sap.loss_terms(step, anchor, training.student, run)["loss"].backward()
        training.optimizer.step()
    with torch.no_grad(), run.accelerator.autocast():
        moved = sap.denoise(run.student.denoiser, step.model_input, step.timesteps, step.anchor_conditioning)
    assert not torch.allclose(moved, expected, atol=1e-3)


def test_anchor_batch_size_changes_rounding_only(sd3, captioned, tmp_path):
    more = ["--subject_token=sks", "--class_token=a"]
    _, run = make_run(SCRIPT, flags(sd3, captioned, tmp_path, *more))
    randomise_adapters(run)
    steps = [draw(sap, run, index)[0] for index in range(4)]
    together = anchors_of(sap, run, steps, batch_size=4)
    for step, anchor in zip(steps, together, strict=True):
        (alone,) = anchors_of(sap, run, [step], batch_size=1)
        assert torch.allclose(alone, anchor, atol=1e-5)


# ---- Text encoders ----


def test_live_clips_and_remembered_t5_are_the_pipelines_prompt(sd3, photos, tmp_path):
    more = ["--train_text_encoder", "--max_sequence_length=20"]
    _, run = make_run(SCRIPT, flags(sd3, photos, tmp_path, *more))
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3)
    with torch.no_grad():
        for prompt in PROMPTS:
            expected = pipeline.encode_prompt(
                prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=20
            )
            live = sap.encode_prompts(run.student.text_pipeline, [prompt], run.device)
            assert torch.equal(live["encoder_hidden_states"], expected[0])
            assert torch.equal(live["pooled_projections"], expected[2])
        both = sap.encode_prompts(run.student.text_pipeline, PROMPTS, run.device)
        randomise_adapters(run)
        moved = sap.encode_prompts(run.student.text_pipeline, PROMPTS, run.device)
    assert torch.allclose(both["encoder_hidden_states"][1:], expected[0], atol=1e-5)  # each keeps its own tokens
    assert not torch.allclose(both["encoder_hidden_states"][:1], expected[0], atol=1e-2)
    tokens_of_t5 = slice(77, None)
    assert not torch.allclose(moved["pooled_projections"], both["pooled_projections"], atol=1e-3)
    assert torch.equal(moved["encoder_hidden_states"][:, tokens_of_t5], both["encoder_hidden_states"][:, tokens_of_t5])


def test_max_sequence_length_holds_in_training_and_validation(sd3, photos, tmp_path):
    prompt = "a photo of sks dog"
    arguments = flags(sd3, photos, tmp_path, f"--validation_prompt={prompt}", "--max_sequence_length=9")
    _, run = make_run(SCRIPT, arguments)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3)
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompt, None, None, max_sequence_length=9)
    trained, sampled = run.embeddings[prompt], run.sampling_inputs[prompt]
    assert expected[0].shape[1] == 77 + 9
    assert torch.equal(trained["encoder_hidden_states"], expected[0])
    assert torch.equal(trained["pooled_projections"], expected[2])
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, tensor in zip(names, expected, strict=True):
        assert torch.equal(sampled[name], tensor), name


def test_leaving_t5_out_equals_a_base_that_has_none(sd3, sd3_without_t5, photos, tmp_path, monkeypatch):
    train(SCRIPT, flags(sd3, photos, tmp_path / "with", "--train_text_encoder"))
    monkeypatch.delattr(T5EncoderModel, "forward")
    picture = ["--final_validation_prompt=a dog", "--num_validation_images=1", "--validation_inference_steps=2"]
    train(SCRIPT, flags(sd3_without_t5, photos, tmp_path / "none", "--train_text_encoder", *picture))
    train(SCRIPT, flags(sd3, photos, tmp_path / "without", "--train_text_encoder", "--without_t5"))
    assert_equal(lora(tmp_path / "none"), lora(tmp_path / "without"))
    changed = lora(tmp_path / "with")
    assert not all(torch.equal(tensor, changed[key]) for key, tensor in lora(tmp_path / "none").items())
    assert (tmp_path / "none" / "image_0.png").is_file()


def test_the_card_tells_how_to_load_a_base_without_t5(sd3_without_t5, photos, tmp_path, monkeypatch):
    train(SCRIPT, flags(sd3_without_t5, photos, tmp_path / "dog"))
    snippet = (tmp_path / "dog" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    (tmp_path / sd3_without_t5.name).symlink_to(sd3_without_t5)  # the card names folders, not where they are
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet.split("image = ")[0], names)
    assert names["pipeline"].text_encoder_3 is None
    assert names["pipeline"].get_list_adapters()["transformer"]


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]])
def test_the_transformer_never_meets_t5_and_clips_only_if_they_train(more, sd3, photos, tmp_path, monkeypatch):
    alive = {kind: weakref.WeakSet() for kind in (T5EncoderModel, CLIPTextModelWithProjection)}
    loaded, met = [], []
    for kind, members in alive.items():

        def load(*args, original=kind.from_pretrained, members=members, **options):
            model, info = original(*args, **options)
            members.add(model)
            loaded.append(type(model).__name__)
            return model, info

        monkeypatch.setattr(kind, "from_pretrained", load)
    original = SD3Transformer2DModel.from_pretrained

    def look_around(*args, **options):
        met.append([len(members) for members in alive.values()])
        return original(*args, **options)

    monkeypatch.setattr(SD3Transformer2DModel, "from_pretrained", look_around)
    more = [*more, "--final_validation_prompt=a dog", "--num_validation_images=1", "--validation_inference_steps=1"]
    train(SCRIPT, flags(sd3, photos, tmp_path, *more, steps=1))
    assert sorted(loaded) == ["CLIPTextModelWithProjection"] * 2 + ["T5EncoderModel"]  # validation loads none again
    assert met == [[0, 2 if "--train_text_encoder" in more else 0]]


# ---- Data: every sample has its own latents and its own words ----


def test_a_sample_meets_its_own_latents_and_caption(sd3, captioned, tmp_path):
    more = ["--train_batch_size=2", "--cache_latents", "--subject_token=sks", "--class_token=a"]
    _, run = make_run(SCRIPT, flags(sd3, captioned, tmp_path, *more))
    numbers = set()
    for number in range(4):
        items = items_of(run, number)
        before = sap.draw_micro_step(run, number, items)
        for row, index in enumerate(before.pictures):
            moved = run.posteriors | {(index, False): run.posteriors[index, False] + 1}
            after = sap.draw_micro_step(dataclasses.replace(run, posteriors=moved), number, items)
            assert changed_rows(before.model_input, after.model_input) == {row}
            assert changed_rows(before.target, after.target) == {row}
            captions = {"conditioning": run.images.captions, "anchor_conditioning": run.images.anchor_captions}
            for name, texts in captions.items():
                other = {part: tensor + 1 for part, tensor in run.embeddings[texts[index]].items()}
                changed = dataclasses.replace(run, embeddings=run.embeddings | {texts[index]: other})
                after = sap.draw_micro_step(changed, number, items)
                for part, tensor in getattr(after, name).items():
                    assert changed_rows(getattr(before, name)[part], tensor) == {row}
                assert not changed_rows(before.model_input, after.model_input)
            numbers.add(index)
    assert numbers == set(range(5))


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    """The samples of a batch that are not the same in both."""
    return {row for row in range(len(before)) if not torch.equal(before[row], after[row])}


def test_latents_are_shifted_and_scaled_and_back(sd3, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd3, photos, tmp_path, "--train_batch_size=4"))
    latents = draw(sap, run)[0].target
    assert latents.shape == (4, 16, 8, 8)
    raw = sap.scale_latents(latents, run.vae, inverse=True)
    assert torch.allclose(raw, latents / 1.5305 + 0.0609, atol=1e-6)
    assert torch.allclose(sap.scale_latents(raw, run.vae), latents, atol=1e-6)


# ---- Runs ----


def test_a_whole_run(sd3, photos, tmp_path, caplog):
    more = ["--validation_prompt=a photo of sks dog", "--num_validation_images=1", "--report_to=tensorboard"]
    train(SCRIPT, flags(sd3, photos, tmp_path, "--validation_inference_steps=3", *more))
    assert "Written" in caplog.text
    tensors = lora(tmp_path)
    assert all(key.startswith("transformer.") and ".lora_" in key for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    still = {key for key, tensor in tensors.items() if ".lora_B" in key and not tensor.any()}
    # The last block's context goes nowhere, so its queries cannot learn.
    assert still == {"transformer.transformer_blocks.1.attn.add_q_proj.lora_B.weight"}
    assert {"image_0.png", "validation", "metrics.jsonl"} <= left_in(tmp_path)
    assert any((tmp_path / "logs" / "dreambooth-sd3-lora").iterdir())
    card = (tmp_path / "README.md").read_text()
    assert "\n- sd3\n" in card
    assert "license: other" in card


@pytest.mark.parametrize("more", [[], ["--use_dora", "--mixed_precision=bf16"]])
def test_both_clips_train_and_resume_bit_for_bit(more, sd3, captioned, tmp_path):
    more = ["--train_text_encoder", "--checkpointing_steps=2", *more]
    train(SCRIPT, flags(sd3, captioned, tmp_path / "whole", *more, steps=4))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = flags(sd3, captioned, tmp_path / "resumed", *more, f"--resume_from_checkpoint={checkpoint}", steps=4)
    train(SCRIPT, resumed)
    assert_equal(lora(tmp_path / "whole"), lora(tmp_path / "resumed"))
    halfway, whole = lora(checkpoint), lora(tmp_path / "whole")
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        assert any(not torch.equal(halfway[key], whole[key]) for key in whole if key.startswith(f"{name}."))


def test_validation_changes_nothing_in_training(sd3, photos, tmp_path):
    more = ["--train_text_encoder", "--lora_dropout=0.3", "--anchor_batch_size=1"]  # nothing is drawn ahead
    train(SCRIPT, flags(sd3, photos, tmp_path / "plain", *more, steps=3))
    more += ["--validation_prompt=a dog", "--validation_steps=1", "--num_validation_images=1"]
    more += ["--validation_inference_steps=2"]
    train(SCRIPT, flags(sd3, photos, tmp_path / "watched", *more, steps=3))
    assert_equal(lora(tmp_path / "plain"), lora(tmp_path / "watched"))


def test_checkpointing_of_gradients_changes_nothing(sd3, photos, tmp_path):
    train(SCRIPT, flags(sd3, photos, tmp_path / "plain", "--train_text_encoder"))
    train(SCRIPT, flags(sd3, photos, tmp_path / "checkpointed", "--train_text_encoder", "--gradient_checkpointing"))
    plain, checkpointed = lora(tmp_path / "plain"), lora(tmp_path / "checkpointed")
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[key], checkpointed[key], atol=1e-6) for key in plain)


def test_saving_upcast_leaves_a_half_precision_run_alone(sd3, captioned, tmp_path):
    more = ["--mixed_precision=bf16", "--cache_latents", "--train_batch_size=2", "--checkpointing_steps=1"]
    train(SCRIPT, flags(sd3, captioned, tmp_path / "plain", *more, steps=3))
    train(SCRIPT, flags(sd3, captioned, tmp_path / "upcast", *more, "--upcast_before_saving", steps=3))
    tensors = lora(tmp_path / "upcast")
    assert_equal(lora(tmp_path / "plain"), tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    first, last = lora(tmp_path / "upcast" / "checkpoint-1"), lora(tmp_path / "upcast" / "checkpoint-3")
    assert not all(torch.equal(first[key], last[key]) for key in last)


# ---- LoRA: where it goes, and that others read it ----


def test_dual_attention_is_adapted_where_it_is(sd35, photos, tmp_path):
    train(SCRIPT, flags(sd35, photos, tmp_path))
    layers = {f"transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    tensors = lora(tmp_path)
    assert layers <= layers_of(tensors)
    assert all(tensors[f"transformer.{layer}.lora_B.weight"].any() for layer in layers)
    assert "transformer_blocks.1.attn2.to_q" not in layers_of(tensors)
    assert "\n- sd3.5\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--lora_layers=attn.to_k"], {"transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.to_k"}),
        (
            ["--lora_blocks= 0", "--lora_layers=to_k, ff.net.0.proj"],
            {"transformer_blocks.0." + name for name in ("attn.to_k", "attn2.to_k", "ff.net.0.proj")},
        ),
        (
            ["--lora_blocks=1"],
            {
                f"transformer_blocks.1.attn.{name}"
                for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
            },
        ),
        (
            ["--lora_blocks=0,1", "--lora_layers=attn.to_q"],
            {"transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"},
        ),
    ],
)
def test_layers_and_blocks_can_be_chosen(more, expected, sd35, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd35, photos, tmp_path, *more))
    sap.write_lora(run, tmp_path)
    assert layers_of(lora(tmp_path)) == expected
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd35)
    pipeline.load_lora_weights(tmp_path)
    adapted = {name.split(".lora_A")[0] for name, _ in pipeline.transformer.named_modules() if name.endswith("lora_A")}
    assert adapted == expected


@pytest.mark.parametrize("more", [["--train_text_encoder"], ["--use_dora"]])
def test_the_pipeline_reads_the_lora_with_its_alpha(more, sd3, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd3, photos, tmp_path, "--lora_alpha=8", *more))
    randomise_adapters(run)
    sap.write_lora(run, tmp_path)
    step, _ = draw(sap, run)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3)
    found = []
    with torch.no_grad():
        expected = run.student(step.model_input, step.timesteps, step.conditioning, step.prompts)
        for load in (False, True):
            if load:
                pipeline.load_lora_weights(tmp_path)
            embeddings, _, pooled, _ = pipeline.encode_prompt(
                step.prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=77
            )
            found.append(pipeline.transformer(step.model_input, embeddings, pooled, step.timesteps).sample)
    assert torch.allclose(found[1], expected, atol=1e-4)
    assert not torch.allclose(found[0], expected, atol=1e-2)
    for name in run.student.adapted:
        (config,) = getattr(pipeline, name).peft_config.values()
        assert (config.r, config.lora_alpha) == (4, 4)  # the scale is in the weights
