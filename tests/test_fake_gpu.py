# SPDX-License-Identifier: Apache-2.0
"""Whole trainings on a fake GPU (`fake_gpu.py`): nothing on a wrong device or in a wrong dtype, nothing that waits."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import runner
import tiny_pipelines
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open

BENCHMARK = runner.ROOT / "examples" / "benchmark"
sys.path.insert(0, str(BENCHMARK))

import memory  # noqa: E402
import models  # noqa: E402

BASES = {
    "sd15": ("train_sap_lora_sd15", tiny_pipelines.save_sd15, {}),
    "sd21": ("train_sap_lora_sd15", tiny_pipelines.save_sd15, {"prediction_type": "v_prediction"}),
    "sdxl": ("train_sap_lora_sdxl", tiny_pipelines.save_sdxl, {}),
    "playground": ("train_sap_lora_sdxl", tiny_pipelines.save_sdxl, {"scheduler": "playground"}),
    "sd3": ("train_sap_lora_sd3", tiny_pipelines.save_sd3, {}),
    "sd35": ("train_sap_lora_sd3", tiny_pipelines.save_sd3, {"t5": False, "dual_attention": True}),
}
ANY = ["sd15", "sdxl", "sd3"]
CASES = {
    "plain": (ANY, ""),
    "encoders": (ANY, "--mixed_precision=bf16 --train_text_encoder --use_dora --caption_dropout=.5"),
    "half": (ANY, "--mixed_precision=fp16 --gradient_checkpointing BUCKETS"),
    "offload": (["sdxl"], "--mixed_precision=bf16 --offload --anchor_source=finetuned --lora_dropout=.1"),
    "crops": (["sd3"], "--offload"),
    "no_anchor": (["sd15"], "--anchor_weight=0 --gradient_accumulation_steps=2 --max_train_steps=1 --snr_gamma=5"),
    "velocity": (["sd21"], "--snr_gamma=5"),
    "edm": (["sdxl"], "--mixed_precision=fp16 --do_edm_style_training"),
    "channels": (["playground"], "--mixed_precision=bf16"),
    "weighting": (["sd35"], "--mixed_precision=fp16 --weighting_scheme=sigma_sqrt --train_text_encoder"),
    "mode": (["sd3"], "--weighting_scheme=mode --precondition_outputs=0"),
}
NAMED = {f"{base}-{name}": (base, flags) for name, (bases, flags) in CASES.items() for base in bases}
# Posterior, its noise, noise, timesteps, embeddings of two prompts; pooled ones and SDXL's time ids or SD3's sigmas.
COPIES = {"sd15": 6, "sdxl": 9, "sd3": 9}
LOG, SCHEDULE = "reading a number in log_steps", "blocking copy from cpu to cuda in diffuse"
BUCKETS = "--train_batch_size=2 --aspect_ratio_buckets=64,64;64,96 --mask_dir={}"


def build(library: Path) -> None:
    """The library that tells torch of a device."""
    folder = Path(torch.__file__).parent
    command = ["g++", "-shared", "-fPIC", "-std=c++20", str(Path(__file__).with_name("fake_gpu.cpp"))]
    command += [f"-I{folder / 'include' / more}" for more in (".", "torch/csrc/api/include")]
    command += [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)


def arguments(name: str, folder: Path) -> tuple[str, list[str]]:
    """Script and flags of one case: two micro-steps, whose losses are fetched once."""
    base, flags = NAMED[name]
    script, save, options = BASES[base]
    if not (folder / base).exists():
        save(folder / base, **options)
    flags = flags.replace("BUCKETS", BUCKETS.format(folder / "masks")).split()
    common = runner.flags(folder / base, folder / "photos", folder / "output", "--logging_steps=2", *flags)
    return script, runner.without(common, *["--center_crop"] * name.endswith("crops"))


def run_cases(folder: Path, cases: dict) -> dict[str, dict | str]:
    """The report of each case, or the end of its log."""
    build(folder / "guard.so")
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {"LD_PRELOAD": str(folder / "guard.so"), "PYTHONPATH": f"{runner.ROOT}:{BENCHMARK}"}
    command = [sys.executable, str(Path(__file__).with_name("fake_gpu.py")), str(folder / "cases.json")]
    subprocess.run(command, check=True, env=os.environ | environment)
    reports = {name: folder / f"{name}.json" for name in cases}
    return {name: json.loads(path.read_text()) if path.exists() else path.with_suffix(".log").read_text()[-2000:]
            for name, path in reports.items()}  # fmt: skip


@pytest.fixture(scope="session")
def fake_gpus(tmp_path_factory) -> Path:
    """The folder, shared by the workers of pytest-xdist, in which reports are made; skips where none can be made."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the fake GPU is built by g++ on Linux")
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("the fake GPU is for a CPU build of torch")
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def reports(fake_gpus) -> dict[str, dict | str]:
    """The reports of all tiny cases, of one process."""
    folder, found = fake_gpus / "tiny", fake_gpus / "tiny.json"
    with FileLock(fake_gpus / "tiny.lock"):
        if not found.exists():
            for path in tiny_pipelines.save_photos(folder / "photos", count=2).iterdir():
                mask = Image.new("L", Image.open(path).size)
                mask.paste(255, (8, 8, 40, 40))
                (folder / "masks").mkdir(exist_ok=True)
                mask.save(folder / "masks" / f"{path.stem}.png")
            cases = {name: arguments(name, folder) for name in NAMED}
            found.write_text(json.dumps(run_cases(folder, cases)))
    return json.loads(found.read_text())


def waits(report: dict) -> dict[str, int]:
    """All that a training waits for."""
    return {what: count for what, count in report["traffic"].items() if not what.startswith("free copy")}


@pytest.mark.parametrize("name", NAMED)
def test_everything_is_on_the_device_and_what_trains_is_float32(name, reports):
    report = reports[name]
    assert isinstance(report, dict), report
    half = [dtype for flag, dtype in (("fp16", "float16"), ("bf16", "bfloat16")) if flag in NAMED[name][1]]
    assert report["parameters"] == [f"torch.{dtype} cuda:0" for dtype in (*half, "float32")]
    assert report["trained"] == report["gradients"] == ["torch.float32 cuda:0"]


@pytest.mark.parametrize("name", [name for name in NAMED if "crops" not in name])
def test_a_training_waits_for_its_log_alone(name, reports):
    (base, flags), expected = NAMED[name], {}
    expected[LOG] = 2 if "no_anchor" in name else 6  # of two steps three terms
    if "fp16" in flags:
        expected["reading a number in update"] = 2  # GradScaler asks at each optimizer step whether it may be done
    if "--train_text_encoder" in flags:  # the pipeline's copy of the tokens, of two steps
        expected["blocking copy from cpu to cuda in encode_prompts"] = 2 if base == "sd15" else 4
    if not base.startswith("sd3") and "edm" not in name and base != "playground":
        expected[SCHEDULE] = 1  # of the noise schedule, which stays
    assert waits(reports[name]) == expected


@pytest.mark.parametrize("base", ANY)
def test_what_a_micro_step_copies(base, reports):
    found = reports[f"{base}-plain"]["traffic"]
    assert {what: count for what, count in found.items() if what.startswith("free")} == {
        "free copy from cpu to cuda in to_device": 2 * COPIES[base]
    }


def test_offloading_with_random_crops_moves_the_vae_once_for_a_group(reports, fake_gpus):
    with safe_open(fake_gpus / "tiny" / "sd3" / "vae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        weights = len(file.keys())
    found = waits(reports["sd3-crops"])
    assert found.pop(LOG) == 6
    assert found == {
        "blocking copy from cpu to cuda in draw_latents": weights,
        "blocking copy from cuda to cpu in micro_steps": weights,
    }


# GB that stages need at the most: prompts, pictures, training, and that with checkpointing.
PEAKS = {"sd15": (0.25, 1.01, 2.90, 2.01), "sdxl": (1.64, 3.03, 13.08, 6.25), "sd3": (11.44, 3.03, 9.36, 4.92)}


@pytest.mark.slow
def test_full_size_trains_in_known_memory(fake_gpus):
    """Prints the table of memory of the READMEs: `pytest -s`."""
    folder, cases, flags = fake_gpus / "full", {}, "--mixed_precision bf16"
    tiny_pipelines.save_photos(folder / "photos", count=2)
    for base in ANY:
        script, save, _ = BASES[base]
        save(folder / base)
        for part, sizes in models.PARTS[base].items():
            path = folder / base / part / "config.json"
            kept = ("_class_name", "architectures", "model_type")
            config = {key: one for key, one in json.loads(path.read_text()).items() if key in kept}
            path.write_text(json.dumps(config | sizes))
        resolution = f"--resolution={models.BACKBONES[base, 'full'].resolution}"
        common = runner.flags(folder / base, folder / "photos", folder / "output", *flags.split(), resolution, steps=4)
        cases |= {base: (script, common, True), f"{base}-less": (script, [*common, "--gradient_checkpointing"], True)}
    reports, rows = run_cases(folder, cases), []
    for base in ANY:
        assert isinstance(reports[base], dict), reports[base]
        assert isinstance(reports[f"{base}-less"], dict), reports[f"{base}-less"]
        assert set(waits(reports[base])) <= {
            "reading a number in log_steps",
            "blocking copy from cpu to cuda in diffuse",
        }
        most, less = reports[base]["peaks"], reports[f"{base}-less"]["peaks"]
        found = [most["load_text_pipeline"], most["encode_images"], most["train"], less["train"]]
        assert [one / 1e9 for one in found] == pytest.approx(PEAKS[base], rel=0.02)
        four = {name: less[name] - memory.saved_by_4_bits(base) for name in ("load_denoiser", "train")}
        rows += [(base, flags, most), (base, f"{flags} --gradient_checkpointing", less)]
        rows.append((base, f"{rows[-1][1]} --bnb_quantization_config_path nf4.json", less | four))
    print(memory.memory_table(rows))


# ---- What a CPU shows without a fake GPU ----


def of_script(base: str, folder: Path, *more: str):
    """The module and `Run` of one script on the CPU, of four micro-steps in two groups."""
    script, save, _ = BASES[base]
    photos = tiny_pipelines.save_photos(folder / "photos", count=2)
    flags = runner.flags(save(folder / base), photos, folder / "output", "--anchor_batch_size=2", *more, steps=4)
    return runner.make_run(script, runner.without(flags, *["--center_crop"] * ("--offload" in more)))


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("base", ANY)
def test_copies_go_through_pinned_memory_on_cuda_and_wait_elsewhere(base, device, tmp_path, monkeypatch):
    sap, run = of_script(base, tmp_path)
    place, seen, to = types.SimpleNamespace(type=device), [], torch.Tensor.to

    def record(tensor, *places, **options):
        if places[:1] == (place,):
            seen.append(options)
            return tensor
        return to(tensor, *places, **options)

    monkeypatch.setattr(sap.Run, "device", place)
    monkeypatch.setattr(torch.Tensor, "to", record)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append("pinned") or tensor)
    assert len(list(sap.micro_steps(run, 0))) == 4
    copies = 4 * COPIES[base]
    # On MPS a copy that does not wait may read what is free by then (pytorch #189690).
    assert seen == (["pinned", {"non_blocking": True}] if device == "cuda" else [{}]) * copies


@pytest.mark.parametrize("base", ANY)
def test_switching_collected_adapters_walks_over_no_modules(base, tmp_path, monkeypatch):
    sap, run = of_script(base, tmp_path)
    walks, named_modules = [], torch.nn.Module.named_modules
    monkeypatch.setattr(
        torch.nn.Module, "named_modules", lambda *args, **options: walks.append(1) or named_modules(*args, **options)
    )
    assert len(list(sap.micro_steps(run, 0))) == 4
    assert not walks
    with sap.adapters_disabled(run.student.denoiser):
        assert walks


@pytest.mark.parametrize("base", ANY)
def test_offloading_moves_the_vae_once_for_the_crops_of_a_group(base, tmp_path, monkeypatch):
    sap, run = of_script(base, tmp_path, "--offload")
    moves = []
    monkeypatch.setattr(run.vae, "to", lambda device: moves.append(device) or run.vae)
    assert len(list(sap.micro_steps(run, 0))) == 4
    assert moves == [run.device, run.device, "cpu"] * 2  # of which the second is none
