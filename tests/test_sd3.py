# SPDX-License-Identifier: Apache-2.0
"""What is Stable Diffusion 3's own: the flow, a T5 that comes and goes, and the blocks that get a LoRA."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from runner import assert_equal, draw, flags, lora, make_run, train
from transformers import T5EncoderModel

import train_sap_lora_sd3 as sap

SCRIPT = "train_sap_lora_sd3"


def layers_of(keys) -> set[str]:
    """The layers of the transformer that a LoRA file's keys adapt."""
    return {key.split(".lora")[0].removeprefix("transformer.") for key in keys}


# ---- The flow ----


@pytest.mark.parametrize("scheme", ["logit_normal", "sigma_sqrt", "cosmap", "mode"])
def test_noisy_latents_lie_on_the_flow_and_both_spaces_mean_the_same(scheme, base_of, photos, tmp_path):
    more = ["--train_batch_size=4", f"--weighting_scheme={scheme}"]
    _, velocities = make_run(SCRIPT, flags(base_of("sd3"), photos, tmp_path, *more, "--precondition_outputs=0"))
    _, latents = make_run(SCRIPT, flags(base_of("sd3"), photos, tmp_path, *more))
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
def test_timesteps_follow_the_scheme_and_stay_in_the_table(more, low, high, base_of, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(base_of("sd3"), photos, tmp_path, *more))
    latents, noise = torch.zeros(500, 1, 1, 1), torch.ones(500, 1, 1, 1)
    drawn, again = (sap.diffuse(run, latents, noise, sap.keyed_generator(0)) for _ in range(2))
    assert torch.isin(drawn["timesteps"], run.scheduler.timesteps).all()
    sigmas = drawn["model_input"].flatten()  # of noise alone
    assert torch.isin(sigmas, run.scheduler.sigmas).all()
    assert sigmas.dtype == torch.float32
    middle = sigmas.quantile(torch.tensor([0.1, 0.9]))
    assert low <= middle[0] < middle[1] <= high
    assert torch.equal(drawn["timesteps"], again["timesteps"])


def test_small_distances_survive_half_precision(base_of, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(base_of("sd3"), photos, tmp_path, "--logit_mean=5", "--mixed_precision=bf16"))
    step, anchor = draw(sap, run)
    assert anchor.dtype == torch.bfloat16
    prediction = anchor * 1.01
    distance = sap.loss_terms(step, anchor, lambda *_: prediction, run)["loss/anchor"]
    sigmas = (step.timesteps / 1000).double()[:, None, None, None]
    expected = ((sigmas * (prediction.double() - anchor.double())) ** 2).mean()
    assert expected < 1e-6
    assert distance.item() == pytest.approx(expected.item(), rel=1e-2)


# ---- Text encoders ----


def test_max_sequence_length_holds_in_training_and_validation(base_of, photos, tmp_path):
    prompt = "a photo of sks dog"
    arguments = flags(base_of("sd3"), photos, tmp_path, f"--validation_prompt={prompt}", "--max_sequence_length=9")
    _, run = make_run(SCRIPT, arguments)
    pipeline = StableDiffusion3Pipeline.from_pretrained(base_of("sd3"))
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompt, None, None, max_sequence_length=9)
    trained, sampled = run.embeddings[prompt], run.sampling_inputs[prompt]
    assert expected[0].shape[1] == 77 + 9
    assert torch.equal(trained["encoder_hidden_states"], expected[0])
    assert torch.equal(trained["pooled_projections"], expected[2])
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, tensor in zip(names, expected, strict=True):
        assert torch.equal(sampled[name], tensor), name


def test_leaving_t5_out_equals_a_base_that_has_none(base_of, photos, tmp_path, monkeypatch):
    train(SCRIPT, flags(base_of("sd3"), photos, tmp_path / "with", "--train_text_encoder"))
    monkeypatch.delattr(T5EncoderModel, "forward")
    picture = ["--final_validation_prompt=a dog", "--num_validation_images=1", "--validation_inference_steps=2"]
    train(SCRIPT, flags(base_of("sd3-without-t5"), photos, tmp_path / "none", "--train_text_encoder", *picture))
    train(SCRIPT, flags(base_of("sd3"), photos, tmp_path / "without", "--train_text_encoder", "--without_t5"))
    assert_equal(lora(tmp_path / "none"), lora(tmp_path / "without"))
    changed = lora(tmp_path / "with")
    assert not all(torch.equal(tensor, changed[key]) for key, tensor in lora(tmp_path / "none").items())
    assert (tmp_path / "none" / "image_0.png").is_file()


def test_the_card_tells_how_to_load_a_base_without_t5(base_of, photos, tmp_path, monkeypatch):
    base = base_of("sd3-without-t5")
    train(SCRIPT, flags(base, photos, tmp_path / "dog"))
    snippet = (tmp_path / "dog" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    (tmp_path / base.name).symlink_to(base)  # the card names folders, not where they are
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet.split("image = ")[0], names)
    assert names["pipeline"].text_encoder_3 is None
    assert names["pipeline"].get_list_adapters()["transformer"]


# ---- Where the LoRA goes ----


def test_dual_attention_is_adapted_where_it_is(base_of, photos, tmp_path):
    train(SCRIPT, flags(base_of("sd35"), photos, tmp_path))
    layers = {f"transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    tensors = lora(tmp_path)
    assert layers <= layers_of(tensors)
    assert "transformer_blocks.1.attn2.to_q" not in layers_of(tensors)
    still = {key for key, tensor in tensors.items() if ".lora_B" in key and not tensor.any()}
    # The last block's context goes nowhere, so its queries cannot learn.
    assert still == {"transformer.transformer_blocks.1.attn.add_q_proj.lora_B.weight"}
    assert "\n- sd3.5\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--lora_layers=attn.to_k"], {f"transformer_blocks.{block}.attn.to_k" for block in (0, 1)}),
        (
            ["--lora_blocks=0,1", "--lora_layers=attn.to_q"],
            {f"transformer_blocks.{block}.attn.to_q" for block in (0, 1)},
        ),
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
    ],
)
def test_layers_and_blocks_can_be_chosen(more, expected, base_of, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(base_of("sd35"), photos, tmp_path, *more))
    sap.write_lora(run, tmp_path)
    assert layers_of(lora(tmp_path)) == expected
    pipeline = StableDiffusion3Pipeline.from_pretrained(base_of("sd35"))
    pipeline.load_lora_weights(tmp_path)
    adapted = {name.split(".lora_A")[0] for name, _ in pipeline.transformer.named_modules() if name.endswith("lora_A")}
    assert adapted == expected
