# SPDX-License-Identifier: Apache-2.0
"""The SD1.5 script as people run it, and what it holds in memory, logs and leaves behind."""

import gc
import json
import weakref

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from runner import (
    LORA_FILE,
    ROOT,
    assert_equal,
    draw,
    flags,
    launch,
    left_in,
    lora,
    make_run,
    randomise_adapters,
    train,
    without,
)
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"


def picture(base, folder=None, name=LORA_FILE, prompt="a photo of sks dog") -> np.ndarray:
    """What the pipeline draws, with or without a LoRA."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.load_lora_weights(folder, weight_name=name)
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, height=64, width=64, num_inference_steps=2, generator=generator, output_type="np").images


def logged(output) -> dict[str, list[float]]:
    """The scalars of a run's tensorboard log."""
    (events,) = (output / "logs" / "dreambooth-lora").glob("events*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_a_whole_run_through_the_launcher(sd15, photos, tmp_path):
    more = ["--validation_prompt=sks dog in the snow", "--num_validation_images=2", "--validation_epochs=1",
            "--checkpointing_steps=2", "--output_kohya_format", "--report_to=tensorboard"]  # fmt: skip
    result = launch(SCRIPT, flags(sd15, photos, tmp_path / "out", *more, steps=4))
    assert left_in(tmp_path / "out") == {
        LORA_FILE, sap.KOHYA_FILE, "README.md", "image_0.png", "image_1.png", "validation", sap.FINISHED_FILE,
        "metrics.jsonl", "logs", "checkpoint-2", "checkpoint-4",
    }  # fmt: skip
    assert all(key.startswith("unet.") and ".lora_" in key for key in lora(tmp_path / "out"))
    assert np.abs(picture(sd15) - picture(sd15, tmp_path / "out")).max() > 0.01
    scalars = logged(tmp_path / "out")
    assert {tag: len(values) for tag, values in scalars.items()} == dict.fromkeys(
        ["loss", "loss/reconstruction", "loss/anchor", "lr"], 4
    )
    for loss, reconstruction, anchor in zip(*list(scalars.values())[:3], strict=True):
        assert loss == pytest.approx(reconstruction + 0.5 * anchor, rel=1e-4)
    assert 'Subject:  "a photo of sks dog"' in result.stderr
    assert 'Anchor:   "a photo of a dog", w = 0.5' in result.stderr
    assert "Steps:" in result.stderr


# ---- Runs in this process, as from a notebook ----


@pytest.mark.parametrize(
    "more",
    [
        ["--train_batch_size=2", "--gradient_accumulation_steps=2", "--mixed_precision=bf16", "--cache_latents"],
        ["--snr_gamma=5", "--random_flip", "--caption_dropout=0.5", "--gradient_checkpointing"],
        ["--aspect_ratio_buckets=64,64;64,72", "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--scale_lr"],
        ["--anchor_source=finetuned", "--gradient_accumulation_steps=3", "--lora_layers=to_q,ff.net.2"],
        ["--tokenizer_max_length=20", "--text_encoder_use_attention_mask", "--train_text_encoder", "--use_dora"],
        ["--anchor_weight=0", "--image_interpolation_mode=nearest_exact", "--allow_tf32"],
    ],
)
def test_combinations_train_and_load(more, sd15, photos, tmp_path):
    train(SCRIPT, without(flags(sd15, photos, tmp_path, *more), "--center_crop"))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in lora(tmp_path).values())
    assert np.abs(picture(sd15) - picture(sd15, tmp_path)).max() > 0.001


def test_v_prediction(sd21, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd21, photos, tmp_path))
    step, _ = draw(sap, run)
    alpha = run.scheduler.alphas_cumprod[step.timesteps][:, None, None, None]
    noise = alpha**0.5 * step.target + (1 - alpha) ** 0.5 * step.model_input
    again = torch.Generator().manual_seed(0)
    assert noise.std() == pytest.approx(torch.randn(4, 8, 8, generator=again).std(), rel=0.25)
    more = ["--snr_gamma=5", "--validation_prompt=sks", "--validation_inference_steps=1"]
    train(SCRIPT, flags(sd21, photos, tmp_path / "out", *more))
    assert (tmp_path / "out" / "image_3.png").is_file()
    assert np.abs(picture(sd21) - picture(sd21, tmp_path / "out")).max() > 0.001


def test_a_base_that_predicts_samples_is_refused(photos, tmp_path):
    base = tiny_pipelines.save_sd15(tmp_path / "base", prediction_type="sample")
    with pytest.raises(sap.UsageError, match="prediction_type is sample"):
        train(SCRIPT, flags(base, photos, tmp_path / "out"))


def test_anchor_batch_size_does_not_change_the_lora(sd15, captioned, tmp_path):
    for size in (1, 4):
        more = [
            f"--anchor_batch_size={size}",
            "--gradient_accumulation_steps=2",
            "--subject_token=sks",
            "--learning_rate=1e-3",
        ]
        train(SCRIPT, flags(sd15, captioned, tmp_path / str(size), *more, steps=5))
    one, four = lora(tmp_path / "1"), lora(tmp_path / "4")
    assert all(torch.allclose(one[key], four[key], atol=1e-5) for key in one)


@pytest.mark.parametrize(("accumulation", "dropout"), [(1, 0), (3, 0), (2, 0.3)])
def test_a_finetuned_anchor_has_the_weights_of_its_optimizer_step_and_no_dropout(
    accumulation, dropout, sd15, photos, tmp_path
):
    more = ["--anchor_source=finetuned", "--anchor_weight=1", f"--gradient_accumulation_steps={accumulation}"]
    more += [f"--lora_dropout={dropout}", "--learning_rate=1e-3"]  # large rates let Adam blow rounding up
    for size in (1, 4):
        train(SCRIPT, flags(sd15, photos, tmp_path / str(size), f"--anchor_batch_size={size}", *more, steps=4))
    one, four = lora(tmp_path / "1"), lora(tmp_path / "4")
    assert all(torch.allclose(one[key], four[key], atol=1e-5) for key in one)


@pytest.mark.parametrize("more", [[], ["--use_dora"], ["--lora_layers=to_q,conv1"]])
def test_student_and_anchor_round_alike_in_half_precision(more, sd15, photos, tmp_path):
    run = make_run(SCRIPT, flags(sd15, photos, tmp_path, "--mixed_precision=bf16", *more))[1]
    step, anchor = draw(sap, run)
    student = sap.start_training(run, None, 0).student  # as it is prepared, its LoRA without effect yet
    conditioning = step.anchor_conditioning
    assert {tensor.dtype for tensor in conditioning.values()} == {torch.bfloat16}
    predicted = student(step.model_input, step.timesteps, conditioning, step.prompts)
    assert torch.equal(predicted, anchor.float()) or "--use_dora" in more
    assert torch.allclose(predicted, anchor.float(), atol=2e-2)
    predicted.sum().backward()
    gradients = {parameter.grad.dtype for parameter in run.student.trained().values()}
    assert gradients == {torch.float32}


def test_the_anchor_changes_what_is_learnt(sd15, photos, tmp_path):
    for weight in (0, 1):
        train(SCRIPT, flags(sd15, photos, tmp_path / str(weight), f"--anchor_weight={weight}"))
    zero, one = lora(tmp_path / "0"), lora(tmp_path / "1")
    assert any(not torch.allclose(zero[key], one[key], atol=1e-4) for key in zero)


def test_every_optimizer_step_has_the_same_number_of_samples(sd15, photos, tmp_path, monkeypatch):
    drawn, original = [], sap.loss_terms
    monkeypatch.setattr(
        sap, "loss_terms", lambda step, *rest: drawn.append(len(step.prompts)) or original(step, *rest)
    )
    more = ["--train_batch_size=2", "--gradient_accumulation_steps=2", "--num_train_epochs=2"]
    train(SCRIPT, without(flags(sd15, photos, tmp_path, *more), "--max_train_steps"))
    assert drawn == [2] * 2 * 4  # 5 pictures: 3 batches, so 2 optimizer steps of 2 batches an epoch


def test_logs_are_means_over_the_micro_steps(sd15, photos, tmp_path, monkeypatch):
    seen, original = [], sap.loss_terms

    def record(*arguments):
        terms = original(*arguments)
        seen.append([term.item() for term in terms.values()])
        return terms

    monkeypatch.setattr(sap, "loss_terms", record)
    more = [
        "--gradient_accumulation_steps=3",
        "--report_to=tensorboard",
        "--lr_scheduler=linear",
        "--lr_warmup_steps=0",
    ]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=2))
    scalars = logged(tmp_path)
    for column, tag in enumerate(["loss", "loss/reconstruction", "loss/anchor"]):
        expected = [sum(row[column] for row in seen[i : i + 3]) / 3 for i in (0, 3)]
        assert scalars[tag] == pytest.approx(expected, rel=1e-5)
    assert scalars["lr"] == pytest.approx([1e-2, 0.5e-2])


def test_a_loss_that_is_not_finite_stops_the_run(sd15, photos, tmp_path, monkeypatch):
    original = sap.to_target_space
    monkeypatch.setattr(sap, "to_target_space", lambda *arguments: original(*arguments) * float("nan"))
    with pytest.raises(sap.RunError, match="step 1 is nan"):
        train(SCRIPT, flags(sd15, photos, tmp_path))
    assert not (tmp_path / LORA_FILE).exists()


@pytest.mark.parametrize("optimizer", [["--optimizer=prodigy", "--learning_rate=1"], ["--use_8bit_adam"]])
def test_other_optimizers(optimizer, sd15, photos, tmp_path):
    pytest.importorskip("prodigyopt" if "--learning_rate=1" in optimizer else "bitsandbytes")
    train(SCRIPT, flags(sd15, photos, tmp_path, *optimizer, steps=3))
    assert any(tensor.abs().max() > 0 for key, tensor in lora(tmp_path).items() if "lora_B" in key)


def test_gradients_are_clipped(sd15, photos, tmp_path):
    largest = {}
    for norm in ("1", "1e-10"):
        train(SCRIPT, flags(sd15, photos, tmp_path / norm, f"--max_grad_norm={norm}", "--adam_weight_decay=0"))
        largest[norm] = max(tensor.abs().max() for key, tensor in lora(tmp_path / norm).items() if "lora_B" in key)
    assert largest["1e-10"] < 0.1 * largest["1"]  # far below Adam's epsilon


def test_rates_and_decay_of_the_parts(sd15, photos, tmp_path):
    more = ["--train_text_encoder", "--learning_rate=3e-4", "--text_encoder_lr=2e-6", "--adam_weight_decay=0.1"]
    _, run = make_run(SCRIPT, flags(sd15, photos, tmp_path, *more))
    rates = [(group["lr"], group["weight_decay"]) for group in sap.make_optimizer(run).param_groups]
    assert rates == [(3e-4, 0.1), (2e-6, 1e-3)]


# ---- Memory ----


def test_stages_let_go_of_what_they_used(sd15, photos, tmp_path, monkeypatch):
    alive, met = {}, {}

    def watch(name, part):
        original = getattr(sap, name)

        def load(*arguments):
            gc.collect()
            met[name] = [key for key, reference in alive.items() if reference() is not None]
            result = original(*arguments)
            alive[name] = weakref.ref(part(result))
            return result

        monkeypatch.setattr(sap, name, load)

    watch("load_text_pipeline", lambda pipeline: pipeline.text_encoder)
    watch("encode_images", lambda found: found[0])  # the VAE, which then rests on the CPU
    watch("load_denoiser", lambda denoiser: denoiser)
    train(SCRIPT, flags(sd15, photos, tmp_path))
    assert met == {"load_text_pipeline": [], "encode_images": [], "load_denoiser": ["encode_images"]}
    alive.clear()
    train(SCRIPT, flags(sd15, photos, tmp_path, "--train_text_encoder"))
    assert met["load_denoiser"] == ["load_text_pipeline", "encode_images"]


def test_anchors_come_from_text_encoders_as_they_were(sd15, captioned, tmp_path):
    more = ["--train_text_encoder", "--subject_token=sks"]
    _, run = make_run(SCRIPT, flags(sd15, captioned, tmp_path, *more))
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, unet=None, vae=None)
    assert set(run.embeddings) == set(run.images.anchor_captions)
    for prompt, conditioning in run.embeddings.items():
        assert torch.equal(conditioning["encoder_hidden_states"], pipeline.encode_prompt(prompt, "cpu", 1, False)[0])


def test_adapters_are_float32_whatever_the_precision(sd15, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd15, photos, tmp_path, "--mixed_precision=bf16", "--train_text_encoder"))
    for module in run.student.adapted.values():
        dtypes = {(p.requires_grad, p.dtype) for p in module.parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


# ---- Validation ----


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_validation_repeats_and_leaves_everything_as_it_was(precision, sd15, photos, tmp_path):
    more = ["--validation_prompt=sks", "--lora_dropout=0.5", "--train_text_encoder", f"--mixed_precision={precision}"]
    _, run = make_run(SCRIPT, flags(sd15, photos, tmp_path, *more, "--num_validation_images=2"))
    randomise_adapters(run)  # without an effect of the LoRA its dropout would have none
    modules = list(run.student.adapted.values())
    dtypes = [[p.dtype for p in module.parameters()] for module in modules]
    first, second = (sap.sample_images(run, "sks", num_inference_steps=2) for _ in range(2))
    assert [image.size for image in first] == [(64, 64)] * 2
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
        assert np.asarray(one).std() > 1  # not black
    assert not np.array_equal(np.asarray(first[0]), np.asarray(first[1]))
    assert all(module.training for module in modules)
    assert dtypes == [[p.dtype for p in module.parameters()] for module in modules]


def test_validation_shows_the_training_state(sd15, photos, tmp_path):
    _, run = make_run(SCRIPT, flags(sd15, photos, tmp_path, "--validation_prompt=sks", "--num_validation_images=1"))
    plain = np.asarray(sap.sample_images(run, "sks", num_inference_steps=2)[0]).astype(int)
    for parameter in run.student.trained().values():
        parameter.data += 0.1
    adapted = np.asarray(sap.sample_images(run, "sks", num_inference_steps=2)[0]).astype(int)
    assert np.abs(plain - adapted).max() > 5


@pytest.mark.parametrize(
    ("steps", "epochs", "more", "expected"),
    [
        (6, 1, [], [2, 4, 6]),  # at the end of each epoch of 2 steps
        (6, 2, [], [2, 6]),
        (7, 3, [], [2, 7]),  # the epoch that the run ends in counts
        (6, 50, [], [2]),
        (9, 1, ["--validation_steps=4"], [4, 8]),
        (6, 1, ["--num_validation_images=0"], []),
    ],
)
def test_when_pictures_are_made(steps, epochs, more, expected, photos, tmp_path):
    more = [f"--validation_epochs={epochs}", "--validation_prompt=sks", *more]
    args = sap.parse_args(flags("base", photos, tmp_path, *more, steps=steps))
    args.steps_per_epoch = 2
    assert [step for step in range(1, steps + 1) if sap.validation_is_due(args, step)] == expected


def test_final_pictures_and_nothing_stale(sd15, photos, tmp_path):
    more = ["--validation_prompt=sks", "--final_validation_prompt=sks dog", "--num_validation_images=1"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, "--output_kohya_format"))
    assert Image.open(tmp_path / "image_0.png").size == (64, 64)
    assert "text: sks dog" in (tmp_path / "README.md").read_text()
    assert (tmp_path / sap.KOHYA_FILE).is_file()
    train(
        SCRIPT,
        flags(sd15, photos, tmp_path, "--final_validation_prompt=sks", "--skip_final_inference", "--no_kohya_file"),
    )
    assert not {name for name in left_in(tmp_path) if "kohya" in name or "image_" in name}


# ---- Files ----


OF_TRAINED = ["--train_text_encoder", "--output_kohya_format", "--rank=2", "--lora_alpha=6"]


@pytest.fixture(scope="module")
def trained(sd15, photos, tmp_path_factory):
    """A LoRA of UNet and text encoder whose alpha is not its rank, in both formats."""
    output = tmp_path_factory.mktemp("trained") / "out"
    train(SCRIPT, flags(sd15, photos, output, *OF_TRAINED))
    return output


def test_keys_of_the_text_encoder_have_the_form_that_others_read(trained):
    keys = [key for key in lora(trained) if key.startswith("text_encoder.")]
    assert len(keys) == 16
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in keys)


def test_metadata_holds_what_loading_needs_and_the_scale_is_in_the_weights(trained):
    with safe_open(trained / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {key.split(".")[1] for key in metadata} == {"r", "lora_alpha", "target_modules"}
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 2)


def test_kohya_file(trained, sd15):
    with safe_open(trained / sap.KOHYA_FILE, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        alphas = {file.get_tensor(key).item() for key in keys if key.endswith(".alpha")}
    assert alphas == {6.0}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "6.0")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert {key.split("_")[1] for key in keys} == {"unet", "te"}
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in keys
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight" in keys
    assert len(keys) == 3 * len(lora(trained)) / 2
    kohya = picture(sd15, trained, sap.KOHYA_FILE)
    assert np.allclose(kohya, picture(sd15, trained), atol=1e-4)
    assert np.abs(kohya - picture(sd15)).max() > 0.01


def test_equal_runs_write_equal_bytes(trained, sd15, photos, tmp_path):
    train(SCRIPT, flags(sd15, photos, tmp_path / "out", *OF_TRAINED))
    for name in (LORA_FILE, sap.KOHYA_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()


def test_dora_loads_with_its_magnitudes(sd15, photos, tmp_path):
    more = ["--use_dora", "--train_text_encoder", "--checkpointing_steps=1", "--learning_rate=0.1"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more))
    trained = lora(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(sd15)
    pipeline.load_lora_weights(tmp_path)
    for prefix, module, count in (
        ("unet.", pipeline.unet, 32),
        ("text_encoder.text_model.", pipeline.text_encoder, 8),
    ):
        assert module.peft_config["default_0"].use_dora
        stored = {key.removeprefix(prefix).removesuffix(".weight"): tensor for key, tensor in trained.items()
                  if key.startswith(prefix) and "magnitude" in key}  # fmt: skip
        assert len(stored) == count
        for name, tensor in stored.items():
            assert torch.equal(module.get_parameter(f"{name}.default_0.weight"), tensor), name
    train(
        SCRIPT, flags(sd15, photos, tmp_path / "resumed", *more, f"--resume_from_checkpoint={tmp_path}/checkpoint-1")
    )
    assert_equal(lora(tmp_path / "resumed"), trained)


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
    assert "instance_prompt: a photo of sks dog" in head
    assert "license: creativeml-openrail-m" in head
    assert "- template:sd-lora" in head
    assert "url: image_0.png" in head
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
        train(SCRIPT, flags(sd15, photos, tmp_path, "--push_to_hub", "--hub_token=hf_secret"))
    assert not (tmp_path / LORA_FILE).exists()


def test_an_upload_that_fails_is_explained_and_costs_nothing(sd15, photos, tmp_path, monkeypatch):
    def fail(**_):
        raise OSError("503 Server Error")

    monkeypatch.setattr(sap, "create_repo", lambda name, **_: type("Repo", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr(sap, "upload_folder", fail)
    with pytest.raises(sap.RunError, match=r"503 Server Error.*all is written.*hf upload me/dog .*dog \. --include"):
        train(SCRIPT, flags(sd15, photos, tmp_path / "dog", "--push_to_hub", steps=1))
    assert {LORA_FILE, "README.md", sap.FINISHED_FILE} <= left_in(tmp_path / "dog")


def test_the_lora_is_written_before_anything_that_can_fail(sd15, photos, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(sap, "write_model_card", fail)
    with pytest.raises(MemoryError):
        train(SCRIPT, flags(sd15, photos, tmp_path))
    assert lora(tmp_path)


def test_torchvision_is_not_needed():
    text = (ROOT / f"{SCRIPT}.py").read_text()
    assert "torchvision" not in text
