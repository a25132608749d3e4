# SPDX-License-Identifier: Apache-2.0
"""Whole trainings on a fake GPU (`fake_gpu.py`): nothing on a wrong device or in a wrong dtype, nothing that waits."""

import functools
import json
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
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
# What differs most; the others are of the slow tests.
QUICK = ["sd15-plain", "sdxl-plain", "sd3-plain", "sd15-encoders", "sd15-half", "sd15-no_anchor"]
QUICK += ["sd3-half", "sd3-crops"]
BY_SPEED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMED]
# Posterior, its noise, noise, timesteps, embeddings of two prompts; pooled ones and SDXL's time ids or SD3's sigmas.
COPIES = {"sd15": 6, "sdxl": 9, "sd3": 9}
READ, WAIT = "reading a number", "blocking copy from cpu to cuda"
BUCKETS = "--train_batch_size=2 --aspect_ratio_buckets=64,64;64,96 --mask_dir={}"


def build(library: Path) -> None:
    """The library that tells torch of a device."""
    folder = Path(torch.__file__).parent
    command = ["g++", "-shared", "-fPIC", "-std=c++20", str(Path(__file__).with_name("fake_gpu.cpp"))]
    command += [f"-I{folder / 'include' / more}" for more in (".", "torch/csrc/api/include")]
    command += [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)


def saved(base: str, folder: Path) -> Path:
    """The folder of a tiny base, which is made when it is first asked for."""
    _, save, options = BASES[base]
    if not (folder / base).exists():
        save(folder / base, **options)
    return folder / base


def arguments(name: str, folder: Path) -> tuple[str, str, list[str]]:
    """What is reported of one case, its script and flags: two micro-steps, whose losses are fetched once."""
    base, flags = NAMED[name]
    script, *_ = BASES[base]
    flags = flags.replace("BUCKETS", BUCKETS.format(folder / "masks")).split()
    common = runner.flags(saved(base, folder), folder / "photos", folder / "output", "--logging_steps=2", *flags)
    return "report", script, runner.without(common, *["--center_crop"] * name.endswith("crops"))


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
def reports(fake_gpus) -> Callable[[str], dict | str]:
    """The report of a tiny case by its name; all quick ones, and all slow ones, are of one process."""

    @functools.cache
    def of_group(quick: bool) -> dict[str, dict | str]:
        folder = fake_gpus / ("tiny" if quick else "tiny-slow")
        with FileLock(f"{folder}.lock"):
            found = folder.with_suffix(".json")
            if not found.exists():
                make_photos_and_masks(folder)
                cases = {name: arguments(name, folder) for name in NAMED if (name in QUICK) == quick}
                found.write_text(json.dumps(run_cases(folder, cases)))
            return json.loads(found.read_text())

    return lambda name: of_group(name in QUICK)[name]


def make_photos_and_masks(folder: Path) -> None:
    for path in tiny_pipelines.save_photos(folder / "photos", count=2).iterdir():
        mask = Image.new("L", Image.open(path).size)
        mask.paste(255, (8, 8, 40, 40))
        (folder / "masks").mkdir(exist_ok=True)
        mask.save(folder / "masks" / f"{path.stem}.png")


def waits(report: dict) -> dict[str, int]:
    """All that a training waits for, wherever in a script that is."""
    found = Counter()
    for what, count in report["traffic"].items():
        if not what.startswith("free copy"):
            found[what.partition(" in ")[0]] += count
    return dict(found)


@pytest.mark.parametrize("name", BY_SPEED)
def test_everything_is_on_the_device_and_what_trains_is_float32(name, reports):
    report = reports(name)
    assert isinstance(report, dict), report
    half = [dtype for flag, dtype in (("fp16", "float16"), ("bf16", "bfloat16")) if flag in NAMED[name][1]]
    assert report["parameters"] == [f"torch.{dtype} cuda:0" for dtype in (*half, "float32")]
    assert report["trained"] == report["gradients"] == ["torch.float32 cuda:0"]


@pytest.mark.parametrize("name", BY_SPEED)
def test_a_training_waits_for_its_log_alone(name, reports):
    if "crops" in name:
        pytest.skip("it moves the VAE, too: see the next but one")
    (base, flags), expected = NAMED[name], {}
    expected[READ] = 2 if "no_anchor" in name else 6  # of two steps three terms
    if "fp16" in flags:
        expected[READ] += 2  # GradScaler asks at each optimizer step whether it may be done
    copied = 0
    if not base.startswith("sd3") and "edm" not in name and base != "playground":
        copied += 1  # of the noise schedule, which stays
    if "--train_text_encoder" in flags:  # the pipeline's copy of the tokens, of two steps
        copied += 2 if base == "sd15" else 4
    if copied:
        expected[WAIT] = copied
    assert waits(reports(name)) == expected


@pytest.mark.parametrize("base", ANY)
def test_what_a_micro_step_copies(base, reports):
    found = reports(f"{base}-plain")["traffic"]
    assert sum(count for what, count in found.items() if what.startswith("free")) == 2 * COPIES[base]


def test_offloading_with_random_crops_moves_the_vae_once_for_a_group(reports, fake_gpus):
    with safe_open(fake_gpus / "tiny" / "sd3" / "vae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        weights = len(file.keys())
    assert waits(reports("sd3-crops")) == {READ: 6, WAIT: weights, "blocking copy from cuda to cpu": weights}


@pytest.mark.parametrize(("name", "fused"), [("sd15-plain", True), ("sd15-encoders", True), ("sd15-half", False)])
def test_adamw_is_one_kernel_unless_a_scaler_must_know_what_it_skipped(name, fused, reports):
    assert reports(name)["fused"] is fused


# ---- Kernels that a step starts ----

COUNTED = ["original_launches", "launches --anchor_weight=0", "launches"]


def counting(what: str, base: str, folder: Path, *more: str) -> tuple[str, str, list[str]]:
    """One case: the launches of a step of the original, of ours without an anchor, or with its share of four."""
    function, *plain = what.split()
    steps = 2 if plain else 4
    flags = runner.flags(folder / base, folder / "photos", folder / "output", *plain, *more, steps=steps)
    return function, BASES[base][0], flags


@pytest.fixture(scope="session")
def launches(fake_gpus) -> Callable[[str], dict[str, dict | str]]:
    """The launches on a tiny base, in both precisions, of one process."""

    @functools.cache
    def of_base(base: str) -> dict[str, dict | str]:
        folder = fake_gpus / f"launches-{base}"
        with FileLock(f"{folder}.lock"):
            found = folder.with_suffix(".json")
            if not found.exists():
                tiny_pipelines.save_photos(folder / "photos", count=2)
                saved(base, folder)
                cases = {}
                for precision in ("bf16", "fp16"):
                    for what in COUNTED:
                        case = counting(what, base, folder, f"--mixed_precision={precision}")
                        cases[f"{base} {precision} {what}"] = case
                found.write_text(json.dumps(run_cases(folder, cases)))
            return json.loads(found.read_text())

    return of_base


def assert_few(found: dict[str, dict | str], row: str, plain_limit: float, limit: float) -> list[int]:
    """That a step starts no more kernels than so many of the original's, whose numbers it returns, and its own."""
    reports = [found[f"{row} {what}"] for what in COUNTED]
    for report in reports:
        assert isinstance(report, dict), report
    original, plain, anchored = (report["launches"][0] for report in reports)
    assert plain <= plain_limit * original, row
    assert anchored <= limit * original, row
    return [round(original), round(plain), round(anchored)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("base", ["sd15", "sd3", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_step_starts_no_more_kernels_than_the_originals(base, precision, launches):
    assert_few(launches(base), f"{base} {precision}", 1.0, 1.05)


# GB that stages need at the most: prompts, pictures, training, and that with checkpointing.
PEAKS = {"sd15": (0.25, 1.01, 2.71, 2.00), "sdxl": (1.64, 3.03, 11.41, 6.00), "sd3": (11.44, 3.03, 8.10, 4.87)}


def full_size(folder: Path) -> list[str]:
    """The bases with the configurations of the public ones, and tokenizers that are small; returns their names."""
    if not (folder / "photos").exists():
        tiny_pipelines.save_photos(folder / "photos", count=2)
        for base in ANY:
            for part, sizes in models.PARTS[base].items():
                path = saved(base, folder) / part / "config.json"
                kept = ("_class_name", "architectures", "model_type")
                config = {key: one for key, one in json.loads(path.read_text()).items() if key in kept}
                path.write_text(json.dumps(config | sizes))
    return ANY


def resolution(base: str) -> str:
    return f"--resolution={models.BACKBONES[base, 'full'].resolution}"


@pytest.mark.slow
def test_full_size_trains_in_known_memory(fake_gpus):
    """Prints the table of memory of the READMEs: `pytest -s`."""
    folder, cases, flags = fake_gpus / "full", {}, "--mixed_precision bf16"
    for base in full_size(folder):
        more = [*flags.split(), resolution(base)]
        common = runner.flags(folder / base, folder / "photos", folder / "output", *more, steps=4)
        cases[base] = ("report", BASES[base][0], common, True)
        cases[f"{base}-less"] = ("report", BASES[base][0], [*common, "--gradient_checkpointing"], True)
    reports, rows = run_cases(folder, cases), []
    for base in ANY:
        assert isinstance(reports[base], dict), reports[base]
        assert isinstance(reports[f"{base}-less"], dict), reports[f"{base}-less"]
        assert set(waits(reports[base])) <= {READ, WAIT}
        most, less = reports[base]["peaks"], reports[f"{base}-less"]["peaks"]
        found = [most["load_text_pipeline"], most["encode_images"], most["train"], less["train"]]
        assert [one / 1e9 for one in found] == pytest.approx(PEAKS[base], rel=0.02)
        four = {name: less[name] - memory.saved_by_4_bits(base) for name in ("load_denoiser", "train")}
        rows += [(base, flags, most), (base, f"{flags} --gradient_checkpointing", less)]
        rows.append((base, f"{rows[-1][1]} --bnb_quantization_config_path nf4.json", less | four))
    print(memory.memory_table(rows))


# Launches of a step at full size: the original's, ours at w = 0, ours with anchors of four. None may grow by more than
# 20 unseen.
LAUNCHES = {
    "sd15 --mixed_precision=bf16": (3569, 3406, 3652),
    "sdxl --mixed_precision=bf16": (11533, 11519, 12041),
    "sd3 --mixed_precision=bf16": (5070, 4900, 5224),
    "sd15 --mixed_precision=fp16": (4284, 3424, 3670),
    "sdxl --mixed_precision=fp16": (14624, 11536, 12058),
    "sd3 --mixed_precision=fp16": (6033, 4918, 5241),
    "sd15 --mixed_precision=bf16 --train_text_encoder": (4823, 4590, 4836),
    "sdxl --mixed_precision=bf16 --train_text_encoder": (16124, 15845, 16367),
    "sd3 --mixed_precision=bf16 --train_text_encoder": (10953, 9300, 9624),
}


@pytest.mark.slow
def test_full_size_starts_a_known_number_of_kernels(fake_gpus):
    """Prints the table of launches of the README: `pytest -s`."""
    folder, cases = fake_gpus / "full", {}
    full_size(folder)
    for row in LAUNCHES:
        base, *flags = row.split()
        for what in COUNTED:
            cases[f"{row} {what}"] = counting(what, base, folder, resolution(base), *flags)
    found = run_cases(folder, cases)
    print("| | original | w = 0 | anchors of 4 |\n|---|---|---|---|")
    for row, expected in LAUNCHES.items():
        encoders = "--train_text_encoder" in row
        numbers = assert_few(found, row, 1.05 if encoders else 1.0, 1.1 if encoders else 1.05)
        print(f"| {row} | {' | '.join(f'{number:,}' for number in numbers)} |")
        assert numbers == pytest.approx(expected, abs=20), row


# ---- What a CPU shows without a fake GPU ----


def of_script(base: str, folder: Path):
    """The module and `Run` of one script on the CPU, of four micro-steps in two groups."""
    script, save, _ = BASES[base]
    photos = tiny_pipelines.save_photos(folder / "photos", count=2)
    flags = runner.flags(save(folder / base), photos, folder / "output", "--anchor_batch_size=2", steps=4)
    return runner.make_run(script, flags)


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
