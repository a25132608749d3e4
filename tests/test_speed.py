# SPDX-License-Identifier: Apache-2.0
"""What is there for speed and memory changes neither the LoRA nor the files: compiled blocks, logs fetched late."""

import json
import subprocess
import sys
import types

import copies
import pytest
import torch
from runner import assert_equal, draw, flags, lora, make_run, randomise_adapters, train, without
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_post_hook

SCRIPTS = [path.stem for path in copies.SCRIPTS]
every_script = pytest.mark.parametrize("script", SCRIPTS)


def without_pictures(base, photos, output, *more: str, steps: int = 4) -> list[str]:
    return flags(base, photos, output, "--skip_final_inference", *more, steps=steps)


def logged(script: str, monkeypatch) -> list[dict]:
    """What the script's runs will give to trackers, in order."""
    rows, sap = [], __import__(script)
    monkeypatch.setattr(sap.Accelerator, "log", lambda self, values, step: rows.append(values | {"step": step}))
    return rows


# ---- Compiled blocks ----

COMPILED_WITH = [
    ("train_sap_lora_sd15", ["--train_text_encoder"]),
    pytest.param("train_sap_lora_sdxl", ["--gradient_checkpointing"], marks=pytest.mark.slow),
    pytest.param("train_sap_lora_sd3", ["--mixed_precision=bf16"], marks=pytest.mark.slow),
]


def trace_only(monkeypatch) -> None:
    """Blocks are traced as ever, but not compiled to machine code, which takes minutes."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, backend="eager", **how))


@pytest.mark.parametrize(("script", "more"), COMPILED_WITH)
def test_compiled_blocks_train_the_same_lora_without_recompiling(script, more, bases, photos, tmp_path, monkeypatch):
    plain, compiled = (without_pictures(bases[script], photos, tmp_path / name, *more) for name in ("a", "b"))
    train(script, plain)
    sap, graphs = __import__(script), []
    log_steps = sap.log_steps

    def count(*arguments):
        graphs.append(counters["stats"]["unique_graphs"])
        log_steps(*arguments)

    monkeypatch.setattr(sap, "log_steps", count)
    trace_only(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    train(script, [*compiled, "--compile", "--checkpointing_steps=2"])
    assert 0 < graphs[1] == graphs[-1], graphs
    one, other = lora(tmp_path / "a"), lora(tmp_path / "b")
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.allclose(tensor, other[key], atol=1e-4), key
    assert lora(tmp_path / "b" / "checkpoint-2").keys() == one.keys()


@every_script
def test_blocks_are_compiled_and_keep_their_names(script, bases, photos, tmp_path):
    keys = []
    for more in ([], ["--compile"]):
        denoiser = make_run(script, flags(bases[script], photos, tmp_path, *more))[1].student.denoiser
        keys.append(set(denoiser.state_dict()))
        compiled = [module for module in denoiser.modules() if module._compiled_call_impl is not None]
        assert bool(compiled) == bool(more)
    assert keys[0] == keys[1]


def test_sizes_that_vary_share_graphs(sd15, photos, tmp_path, monkeypatch):
    trace_only(monkeypatch)
    buckets = "--aspect_ratio_buckets=64,64;64,96;96,64;96,96"
    torch._dynamo.reset()
    counters.clear()
    train("train_sap_lora_sd15", without_pictures(sd15, photos, tmp_path, buckets, "--compile", steps=6))
    assert 0 < counters["stats"]["unique_graphs"] <= 12, "compiled anew for each size"


# ---- The log ----


@every_script
def test_losses_fetched_late_are_those_of_each_step(script, bases, photos, tmp_path, monkeypatch):
    rows = logged(script, monkeypatch)
    accumulate = "--gradient_accumulation_steps=2"
    for name, more in (("a", []), ("b", ["--logging_steps=3"])):
        train(script, without_pictures(bases[script], photos, tmp_path / name, accumulate, *more, steps=5))
    assert [row["step"] for row in rows] == 2 * [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if row.pop("seconds_per_step", 0) > 0] == [5, 5]
    assert rows[:5] == rows[5:]
    assert_equal(lora(tmp_path / "a"), lora(tmp_path / "b"))


def test_losses_are_fetched_once_in_so_many_steps(sd15, photos, tmp_path, monkeypatch):
    rows, known = logged("train_sap_lora_sd15", monkeypatch), []
    hook = register_optimizer_step_post_hook(lambda *_: known.append(len(rows)))
    more = ["--logging_steps=3", "--gradient_accumulation_steps=2"]
    train("train_sap_lora_sd15", without_pictures(sd15, photos, tmp_path, *more, steps=7))
    hook.remove()
    assert known == [0, 0, 0, 3, 3, 3, 6]  # at the end of each step
    assert len(rows) == 7


# ---- A quantised base ----


@pytest.fixture
def quantising_on_the_cpu(monkeypatch):
    """Let diffusers quantise without a GPU, which it refuses: bitsandbytes itself has kernels for the CPU too."""
    from bitsandbytes.nn import modules
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *_, **__: None)
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # its kernel wants layers of at least 64 features
    available = torch.accelerator.is_available

    def claimed() -> bool:
        """To the scripts alone: torch itself, built for CUDA, would go on to ask the GPU that is not there."""
        return sys._getframe(1).f_globals["__name__"].startswith("train_sap_lora") or available()

    monkeypatch.setattr(torch.accelerator, "is_available", claimed)


def quantised(folder, **options) -> str:
    path = folder / "quantization.json"
    path.write_text(json.dumps(options))
    return f"--bnb_quantization_config_path={path}"


@pytest.mark.parametrize("bits", [4, 8])
@every_script
def test_the_anchor_of_a_quantised_base_is_the_quantised_base(
    script, bits, bases, photos, tmp_path, quantising_on_the_cpu
):
    more = quantised(tmp_path, **{f"load_in_{bits}bit": True})
    sap, run = make_run(script, flags(bases[script], photos, tmp_path, more, "--train_batch_size=2"))
    weights = list(run.student.denoiser.parameters())
    assert {f"Params{bits}bit", f"Int{bits}Params"} & {type(weight).__name__ for weight in weights}
    assert {weight.dtype for weight in weights if weight.requires_grad} == {torch.float32}
    base = sap.load_denoiser(run.args, run.accelerator, run.images)
    base.train()  # as the student is: bitsandbytes rounds 8 bits otherwise in evaluation
    randomise_adapters(run)
    step, anchor = draw(sap, run)
    with torch.no_grad():
        expected, moved = (
            sap.denoise(model, step.model_input, step.timesteps, step.anchor_conditioning)
            for model in (base, run.student.denoiser)
        )
    assert torch.equal(expected, anchor)
    assert not torch.allclose(moved, anchor, atol=1e-3)


@every_script
def test_a_lora_trains_on_a_quantised_base(script, bases, photos, tmp_path, quantising_on_the_cpu):
    four = quantised(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for name, more in (("a", [four]), ("b", [four, "--gradient_checkpointing"]), ("c", [])):
        train(script, without_pictures(bases[script], photos, tmp_path / name, *more, steps=2))
    one, other, full = lora(tmp_path / "a"), lora(tmp_path / "b"), lora(tmp_path / "c")
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)
    assert {key: tensor.shape for key, tensor in one.items()} == {key: tensor.shape for key, tensor in full.items()}
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    trained = {name: {key for key, tensor in tensors.items() if tensor.abs().max() > 0}
               for name, tensors in (("quantised", one), ("full", full))}  # fmt: skip
    assert trained["quantised"] == trained["full"]


@every_script
def test_8_bit_layers_get_contiguous_inputs(script, bases, photos, tmp_path, quantising_on_the_cpu, monkeypatch):
    """bitsandbytes' CUDA kernel ignores strides: a base whose `proj_in` gets a view trained on garbage on an H200."""
    import bitsandbytes

    seen, multiply = [], bitsandbytes.matmul

    def watched(inputs, *args, **options):
        seen.append(inputs.is_contiguous())
        return multiply(inputs, *args, **options)

    monkeypatch.setattr(bitsandbytes, "matmul", watched)
    more = [quantised(tmp_path, load_in_8bit=True), "--train_batch_size=1", "--anchor_batch_size=1"]
    train(script, without_pictures(bases[script], photos, tmp_path / "out", *more, steps=1))
    assert len(seen) > 20 and all(seen)


QUANTISATION_MISTAKES = [
    (None, "No such file"),
    ("load_in_4bit: true", "Expecting value"),
    ('{"load_in_3bit": true}', "it must ask for load_in_4bit or load_in_8bit"),
    ("[4]", "unsupported operand"),
    ("{}", "it must ask for load_in_4bit or load_in_8bit"),
    ('{"load_in_4bit": true, "load_in_8bit": true}', "only one can be used"),
    ('{"load_in_4bit": true, "bnb_4bit_compute_dtype": "bfloat61"}', "bfloat61"),
    ('{"load_in_8bit": true}', "on a GPU only"),
]


@pytest.mark.parametrize(("text", "words"), QUANTISATION_MISTAKES)
def test_mistakes_in_the_quantisation_end_in_one_sentence(text, words, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    path = tmp_path / "quantization.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        __import__(SCRIPTS[0]).parse_args(flags("base", photos, "out", f"--bnb_quantization_config_path={path}"))
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert f"error: --bnb_quantization_config_path {path} must be a JSON object such as" in last
    assert words in last


def test_quantising_without_its_package_is_explained(photos, tmp_path, capsys, monkeypatch):
    sap = __import__(SCRIPTS[0])
    monkeypatch.setattr(sap.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(SystemExit):
        sap.parse_args(flags("base", photos, "out", quantised(tmp_path, load_in_4bit=True)))
    assert "pip install bitsandbytes" in capsys.readouterr().err


# ---- What rests where, and the way of the data ----


@every_script
def test_offloading_changes_neither_the_lora_nor_the_pictures(script, bases, photos, tmp_path):
    more = ["--final_validation_prompt=a dog", "--num_validation_images=1", "--validation_inference_steps=1"]
    for name, offload in (("a", []), ("b", ["--offload"])):
        train(script, without(flags(bases[script], photos, tmp_path / name, *more, *offload), "--center_crop"))
    assert_equal(lora(tmp_path / "a"), lora(tmp_path / "b"))
    assert (tmp_path / "a" / "image_0.png").read_bytes() == (tmp_path / "b" / "image_0.png").read_bytes()


@pytest.mark.parametrize("script", SCRIPTS[:2])  # SD3's T5 reads at once, which nothing can stand in for
@pytest.mark.parametrize(
    ("more", "place"),
    [([], "meta"), (["--offload"], "cpu"), (["--offload", "--train_text_encoder"], "meta")],
)
def test_text_encoders_read_on_the_cpu_if_they_are_offloaded_and_do_not_train(
    more, place, script, bases, photos, tmp_path
):
    sap = __import__(script)
    args = sap.parse_args(flags(bases[script], photos, tmp_path, *more))
    stand_in = types.SimpleNamespace(device=torch.device("meta"), mixed_precision="no")  # for a GPU
    assert sap.load_text_pipeline(args, stand_in, sap.SubjectImages(args)).device.type == place


def test_the_vae_works_on_the_device_and_rests_on_the_cpu(sd15, photos, tmp_path, monkeypatch):
    sap, run = make_run(SCRIPTS[0], without(flags(sd15, photos, tmp_path, "--offload"), "--center_crop"))
    monkeypatch.setattr(sap.Run, "device", torch.device("meta"))  # stands for a GPU
    moves = []
    monkeypatch.setattr(run.vae, "to", lambda device: moves.append(torch.device(device).type) or run.vae)
    with sap.vae_at_work(run) as vae:
        assert vae is run.vae
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]
    run.args.offload = False
    with sap.vae_at_work(run):
        pass
    assert moves == ["meta", "cpu", "meta"]


@every_script
def test_cached_pictures_cost_a_step_neither_disk_nor_vae(script, bases, photos, tmp_path, monkeypatch):
    sap, run = make_run(script, flags(bases[script], photos, tmp_path))
    for name in ("read_image", "load_part", "vae_at_work"):
        monkeypatch.delattr(sap, name)
    assert len(list(sap.micro_steps(run, 0))) == 2


# ---- Start-up ----


def test_packages_that_a_run_does_not_use_are_not_imported():
    program = """
import sys
import train_sap_lora_sd15, train_sap_lora_sdxl, train_sap_lora_sd3
found = {name.split(".")[0] for name in sys.modules}
print(sorted(found & {"datasets", "wandb", "prodigyopt", "tensorboard", "comet_ml", "xformers", "matplotlib"}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=copies.ROOT, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
