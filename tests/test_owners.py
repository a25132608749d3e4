# SPDX-License-Identifier: Apache-2.0
"""What owners of photos ask for: masks, going on from a LoRA, is it learning, pictures to look at, flags in a file."""

import contextlib
import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image, ImageOps
from runner import assert_equal, draw, flags, lora, make_run, metrics, train, without
from safetensors import safe_open

import train_sap_lora_sd15 as sap

SD15, SDXL, SD3 = SCRIPTS = [f"train_sap_lora_{kind}" for kind in ("sd15", "sdxl", "sd3")]
every_script = pytest.mark.parametrize("script", SCRIPTS)


# ---- Masks ----


def masked_photos(folder: Path, alpha: bool = False) -> tuple[Path, Path]:
    """Photos that are white inside their mask and black outside, 96 x 64 pixels, and the folder of the masks."""
    photos, masks = folder / "photos", folder / "masks"
    photos.mkdir(parents=True)
    masks.mkdir()
    for number in range(3):
        inside = np.zeros((64, 96), np.uint8)
        inside[8 : 24 + 8 * number, 16:56] = 255
        mask = Image.fromarray(inside)
        photo = Image.merge("RGB", [mask] * 3)
        if alpha:
            photo.putalpha(mask)
        photo.save(photos / f"{number}.png")
        mask.save(masks / f"{number}.png")
    return photos, masks


def test_a_mask_weighs_the_reconstruction_and_never_the_anchor():
    prediction, target, anchor = torch.randn(3, 2, 4, 8, 8).unbind()
    mask = torch.rand(2, 1, 8, 8)
    _, plain, plain_distance = sap.semantic_anchor_loss(prediction, target, anchor)
    loss, reconstruction, distance = sap.semantic_anchor_loss(prediction, target, anchor, 0.5, 1.0, mask)
    assert torch.equal(distance, plain_distance)
    assert torch.isclose(reconstruction, (mask * (target - prediction) ** 2).mean())  # not normalised by its area
    assert torch.isclose(loss, reconstruction + 0.5 * distance)
    assert not torch.isclose(reconstruction, plain)


@pytest.mark.parametrize("centering", [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_mask_lies_where_the_subject_lies(flipped, centering, tmp_path):
    photos, masks = masked_photos(tmp_path)
    images = sap.SubjectImages(sap.parse_args(flags("base", photos, tmp_path / "out", f"--mask_dir={masks}")))
    for index in range(3):
        picture = (images.pixel_values(index, flipped, centering)[0] + 1) / 2
        picture = torch.nn.functional.avg_pool2d(picture[None], 8)[0]
        mask = images.mask(index, flipped, centering, (8, 8))[0]
        assert mask.shape == picture.shape == (8, 8)
        assert (picture - mask).abs().mean() < 0.03
        assert mask.min() >= 0
        assert mask.max() <= 1


@every_script
def test_masks_change_what_is_learned_and_random_crops_crop_them_too(script, bases, tmp_path):
    photos, masks = masked_photos(tmp_path)
    flag = f"--mask_dir={masks}"
    for name, more in {"plain": [], "masked": [flag], "all": [flag, "--unmasked_weight=1"]}.items():
        train(script, without(flags(bases[script], photos, tmp_path / name, *more), "--center_crop"))
    plain, masked, everything = (lora(tmp_path / name) for name in ("plain", "masked", "all"))
    assert any(not torch.allclose(plain[key], masked[key], atol=1e-4) for key in plain)
    assert all(torch.allclose(plain[key], everything[key], atol=1e-5) for key in plain)


def test_the_transparency_of_the_photos_is_a_mask(sd15, tmp_path):
    photos, masks = masked_photos(tmp_path, alpha=True)
    train(SD15, flags(sd15, photos, tmp_path / "one", "--alpha_mask"))
    train(SD15, flags(sd15, photos, tmp_path / "other", f"--mask_dir={masks}"))
    assert_equal(lora(tmp_path / "one"), lora(tmp_path / "other"))


def grey(path: Path, level: int, size: tuple[int, int] = (96, 64)) -> None:
    Image.new("L", size, level).save(path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SPOILT = {  # what happens to a folder of masks, and what the sentence says
    "missing": (lambda masks: (masks / "1.png").unlink(), "without the other: 1"),
    "left over": (lambda masks: shutil.copy(masks / "1.png", masks / "9.png"), "without the other: 9"),
    "two of a name": (lambda masks: shutil.copy(masks / "1.png", masks / "1.bmp"), "1.bmp and 1.png are two masks"),
    "shape": (
        lambda masks: grey(masks / "1.png", 99, (64, 96)),
        "mask of 1.png: it has 64 x 96 pixels, and the photo, turned as its EXIF says, 96 x 64",
    ),
    "black": (lambda masks: grey(masks / "1.png", 0), "mask of 1.png: 0%"),
    "white": (lambda masks: grey(masks / "1.png", 255), "mask of 1.png: 100%"),
    "damaged": (lambda masks: cut_short(masks / "1.png"), "mask of 1.png"),
    "a pipe": (lambda masks: pipe(masks / "1.png"), "mask of 1.png: it is no regular file"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_mask_that_cannot_be_meant_is_named(name, tmp_path):
    photos, masks = masked_photos(tmp_path)
    spoil, words = SPOILT[name]
    spoil(masks)
    with pytest.raises(sap.UsageError, match=f"--mask_dir.*{words}"):
        sap.SubjectImages(sap.parse_args(flags("base", photos, tmp_path / "out", f"--mask_dir={masks}")))


def test_what_systems_leave_beside_masks_is_no_mask(tmp_path):
    photos, masks = masked_photos(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (masks / name).write_bytes(b"x")
    images = sap.SubjectImages(sap.parse_args(flags("base", photos, tmp_path / "out", f"--mask_dir={masks}")))
    assert len(images.masks) == 3


def test_a_run_with_other_masks_is_another_run(sd15, tmp_path):
    photos, masks = masked_photos(tmp_path)
    arguments = flags(sd15, photos, tmp_path / "out", f"--mask_dir={masks}", "--checkpointing_steps=1")
    train(SD15, arguments)
    Image.fromarray(np.eye(64, 96, dtype=np.uint8) * 255).save(masks / "0.png")
    with pytest.raises(sap.UsageError, match="the mask of 0.png was"):
        train(SD15, [*arguments, "--resume_from_checkpoint=checkpoint-1"])


# ---- Buckets ----


def test_buckets_are_computed_from_the_resolution(tmp_path):
    sizes = {"wide": (320, 160), "high": (160, 320), "square": (200, 200)}
    for name, (width, height) in sizes.items():
        Image.new("RGB", (width, height)).save(tmp_path / f"{name}.png")
    arguments = without(flags("base", tmp_path, "/out"), "--center_crop", "--resolution")
    images = sap.SubjectImages(sap.parse_args([*arguments, "--use_aspect_ratio_buckets", "--resolution=256"]))
    windows = dict(zip(images.names, images.windows, strict=True))
    assert windows["square.png"] == (256, 256)
    assert windows["wide.png"][0] < 256 < windows["wide.png"][1]
    assert windows["high.png"] == windows["wide.png"][::-1]
    assert all(abs(h * w / 256**2 - 1) < 0.1 and h % 8 == w % 8 == 0 for h, w in images.windows)
    assert images.cacheable


# ---- Going on from a LoRA ----


@every_script
def test_a_run_can_start_from_a_lora_and_the_anchor_stays_the_base(script, bases, photos, tmp_path):
    more = ["--train_text_encoder", "--lora_alpha=8"]
    train(script, flags(bases[script], photos, tmp_path / "one", *more, steps=3))
    again = [*more, f"--init_lora={tmp_path / 'one'}"]
    module, run = make_run(script, flags(bases[script], photos, tmp_path / "two", *again))
    module.write_lora(run, tmp_path)
    one, two = lora(tmp_path / "one"), lora(tmp_path)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    step, anchor = draw(module, run)
    fresh, base = make_run(script, flags(bases[script], photos, tmp_path / "two", *more))
    assert torch.equal(anchor, draw(fresh, base)[1])
    train(script, flags(bases[script], photos, tmp_path / "two", *again))
    assert any(not torch.equal(one[key], tensor) for key, tensor in lora(tmp_path / "two").items())


@pytest.mark.parametrize("more", [["--rank=8"], ["--lora_layers=to_k"], ["--init_lora=/nowhere"]])
def test_a_lora_that_does_not_fit_is_refused(more, sd15, photos, tmp_path):
    train(SD15, flags(sd15, photos, tmp_path / "one"))
    with pytest.raises(sap.UsageError, match=f"--init_lora {'/nowhere' if 'nowhere' in more[0] else '.*one'}"):
        train(SD15, flags(sd15, photos, tmp_path / "two", f"--init_lora={tmp_path / 'one'}", *more))


# ---- Is it learning? ----


@every_script
def test_photos_held_out_are_measured_alike_each_time_and_never_trained_on(script, bases, photos, tmp_path):
    held_out = tiny_pipelines.save_photos(tmp_path / "held out", count=2, size=(80, 64))
    more = [f"--validation_data_dir={held_out}", "--validation_steps=1", "--learning_rate=0", "--random_flip"]
    train(script, without(flags(bases[script], photos, tmp_path / "out", *more, steps=3), "--center_crop"))
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    values = [row for row in rows if "val/reconstruction" in row]
    assert [row["step"] for row in values] == [1, 2, 3]
    assert len({(row["val/reconstruction"], row["val/anchor"]) for row in values}) == 1
    assert values[0]["val/reconstruction"] > 0
    train(script, without(flags(bases[script], photos, tmp_path / "plain", *more[2:], steps=3), "--center_crop"))
    assert_equal(lora(tmp_path / "out"), lora(tmp_path / "plain"))


# ---- Pictures to look at ----


def test_each_validation_is_one_grid_with_a_row_for_each_prompt(sd15, photos, tmp_path, monkeypatch):
    calls, kind, sample = [], sap.PIPELINE_CLASS, sap.PIPELINE_CLASS.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, **options: calls.append(options) or sample(self, **options))
    (tmp_path / "prompts.txt").write_text("sks dog in the snow\n\na dog\n")
    more = ["--validation_prompt=a photo of sks dog", f"--validation_prompts_file={tmp_path / 'prompts.txt'}",
            "--num_validation_images=2", "--validation_steps=2", "--validation_guidance_scale=3",
            "--validation_inference_steps=1"]  # fmt: skip
    train(SD15, flags(sd15, photos, tmp_path / "out", *more, steps=2))
    grids = {path.name: Image.open(path).size for path in (tmp_path / "out" / "validation").iterdir()}
    assert set(grids) == {"validation-000002.png", "test-000002.png"}
    width, height = grids["validation-000002.png"]
    assert (width, height) == (3 * 64, 5 * 64)  # labels and two pictures; photos, base and three prompts
    assert {(call["guidance_scale"], call["num_inference_steps"]) for call in calls} == {(3.0, 1)}
    assert len(calls) == 2 * 3 * 2 + 2  # the base's once
    assert (tmp_path / "out" / "image_1.png").is_file()


def cell(path: Path, row: int, column: int) -> np.ndarray:
    """A picture of a grid of pictures of 64 pixels."""
    return np.asarray(Image.open(path))[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]


@every_script
def test_a_grid_shows_photos_and_what_the_base_makes(script, bases, photos, tmp_path):
    more = ["--validation_prompt=a photo of sks dog", "--num_validation_images=2", "--validation_steps=1",
            "--train_text_encoder", "--validation_inference_steps=2", "--learning_rate=.1"]  # fmt: skip
    train(script, flags(bases[script], photos, tmp_path / "out", *more, steps=3))
    first, last = (tmp_path / "out" / "validation" / f"validation-{step:06}.png" for step in (1, 3))
    module, run = make_run(script, flags(bases[script], photos, tmp_path / "base", *more))
    for column, picture in enumerate(module.sample_images(run, "a photo of sks dog"), 1):
        for grid in (first, last):
            assert np.array_equal(cell(grid, 1, column), np.asarray(picture))
            assert not np.array_equal(cell(grid, 2, column), np.asarray(picture))
        photo = ImageOps.fit(module.read_image(run.images.images[column - 1]), (64, 64))
        assert np.array_equal(cell(last, 0, column), np.asarray(photo))


def test_long_prompts_stay_in_their_cell():
    pictures = [Image.new("RGB", (512, 512), "red")]
    grid = sap.labelled_grid({"short": pictures, "a photo of sks dog in the snow " * 6: pictures, "none": []})
    assert grid.size == (1024, 1536)
    red = np.asarray(grid)[:1024, 512:]
    assert (red == (255, 0, 0)).all()
    written = np.asarray(grid)[512:1024, :512].min(axis=2) < 128
    assert written.any()
    assert not written[:, -4:].any()
    assert not written[-4:].any()


@pytest.mark.parametrize("fails", ["sample_images", "labelled_grid", "vae_at_work", "show_to_trackers", "the folder"])
def test_pictures_that_fail_never_end_a_run(fails, sd15, photos, tmp_path, monkeypatch, caplog):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if fails == "the folder":
        (tmp_path / "validation").write_text("a file")
        reason = "the grid of pictures failed"
    else:
        monkeypatch.setattr(sap, fails, out_of_memory)
        reason = "OutOfMemoryError: CUDA out of memory"
    more = ["--validation_prompt=a dog", "--num_validation_images=1", "--validation_steps=1"]
    train(SD15, flags(sd15, photos, tmp_path, *more, "--validation_inference_steps=1"))
    assert caplog.text.count(reason) == 1
    assert (tmp_path / "README.md").is_file()
    assert lora(tmp_path)


# ---- Samplers ----

CONFIGURATIONS = [
    {"algorithm_type": "deis", "final_sigmas_type": "zero", "solver_type": "logrho"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "zero"},
    {"algorithm_type": "data_prediction"},
    {"timestep_spacing": "trailing", "final_sigmas_type": "denoise_to_zero"},
    {"timestep_spacing": "of its own"},
    {"use_karras_sigmas": True, "use_exponential_sigmas": True, "use_beta_sigmas": True},
    {"solver_order": "2"},
    {"solver_type": "bh2", "prediction_type": "v_prediction", "lambda_min_clipped": None},
]


def of_diffusers() -> list[type]:
    """All of diffusers' schedulers that can be made without arguments."""
    found = []
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if isinstance(kind, type):
            with contextlib.suppress(TypeError, ImportError):
                kind()
                found.append(kind)
    return found


FLOWS = {
    "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "MiniMaxH3Scheduler", "PiflowScheduler",
}  # fmt: skip


def pictures_from(module, scheduler) -> None:
    """Sample with a training scheduler's configuration: numbers that are finite come out."""
    sampler = module.sampling_scheduler(SimpleNamespace(scheduler=scheduler))
    sampler.set_timesteps(4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in sampler.timesteps:
        latents = sampler.step(0.1 * latents, timestep, latents).prev_sample
    assert latents.isfinite().all()


@every_script
def test_every_scheduler_of_diffusers_gives_a_sampler(script, tmp_path):
    """As `training_scheduler` reads them from the base's folder; what it cannot train it refuses itself."""
    module = importlib.import_module(script)
    kinds = of_diffusers()
    assert len(kinds) > 40
    refused = set()
    for kind in kinds:
        kind().save_pretrained(tmp_path / kind.__name__ / "scheduler")
        args = SimpleNamespace(pretrained_model_name_or_path=str(tmp_path / kind.__name__), revision=None,
                               snr_gamma=None, do_edm_style_training=False)  # fmt: skip
        try:
            scheduler = module.training_scheduler(args)
        except module.UsageError as error:
            assert str(error).startswith("--pretrained_model_name_or_path")
            refused.add(kind.__name__)
            continue
        pictures_from(module, scheduler)
    if script == SD3:
        assert refused.isdisjoint(FLOWS)
    else:
        assert refused == {*FLOWS, "SCMScheduler"}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("script", [SD15, SDXL])
def test_settings_of_another_sampler_are_left_out(script, configuration):
    module = importlib.import_module(script)
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | configuration
    scheduler = diffusers.DDPMScheduler.from_config(base)
    pictures_from(module, scheduler)
    sampler = module.sampling_scheduler(SimpleNamespace(scheduler=scheduler))
    assert torch.allclose(sampler.alphas_cumprod, scheduler.alphas_cumprod)
    assert sampler.config.prediction_type == scheduler.config.prediction_type


# ---- The file for ComfyUI ----


@pytest.mark.parametrize("script", [SD15, SDXL])
def test_the_kohya_file_is_written_at_the_end_and_in_each_checkpoint(script, bases, photos, tmp_path):
    for name, more in {"default": [], "without": ["--no_kohya_file"], "dora": ["--use_dora"],
                       "asked": ["--use_dora", "--output_kohya_format"]}.items():  # fmt: skip
        train(script, flags(bases[script], photos, tmp_path / name, "--checkpointing_steps=1", *more, steps=1))
        for folder in (tmp_path / name, tmp_path / name / "checkpoint-1"):
            assert (folder / sap.KOHYA_FILE).is_file() == (name in ("default", "asked")), folder
        assert sap.read_state(tmp_path / name / "checkpoint-1" / sap.STATE_FILE)


def test_a_folder_with_a_name_of_other_bytes_gives_files_that_can_be_read(sd15, photos, tmp_path):
    output = tmp_path / os.fsdecode(b"d\xffg")
    try:
        output.mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    train(SD15, flags(sd15, photos, output, steps=1))
    shutil.copy(output / sap.KOHYA_FILE, tmp_path / "copy")  # the library opens no path of such a name
    with safe_open(tmp_path / "copy", "pt") as file:
        assert json.loads(file.metadata()["ss_tag_frequency"]) == {"d\\udcffg": {"a photo of sks dog": 5}}
    assert "load_lora_weights" in (output / "README.md").read_text(encoding="utf-8")
