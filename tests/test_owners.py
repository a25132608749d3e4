# SPDX-License-Identifier: Apache-2.0
"""What owners of photos ask for: masks, going on from a LoRA, is it learning, pictures to look at, flags in a file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from runner import assert_equal, draw, flags, lora, make_run, randomise_adapters, train, without
from safetensors.torch import load_file, save_file

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
        mask = images.mask(index, flipped, centering)[0]
        assert mask.shape == picture.shape == (8, 8)
        assert (picture - mask).abs().mean() < 0.03
        assert mask.min() >= 0
        assert mask.max() <= 1


@every_script
def test_masks_reach_the_step_in_the_latents_own_size(script, bases, tmp_path):
    photos, masks = masked_photos(tmp_path)
    more = [f"--mask_dir={masks}", "--train_batch_size=2", "--unmasked_weight=0.25", "--random_flip"]
    module, run = make_run(script, flags(bases[script], photos, tmp_path / "out", *more))
    step, _ = draw(module, run)
    assert step.mask.shape == (2, 1, *step.target.shape[-2:])
    assert step.mask.min() == pytest.approx(0.25, abs=0.01)
    assert step.mask.max() == pytest.approx(1, abs=0.01)
    assert 0.25 < step.mask.mean() < 0.9


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


def spoil(masks: Path, how: str) -> None:
    """Make something of a folder of masks that cannot be meant."""
    path = masks / "1.png"
    if how == "missing":
        path.unlink()
    elif how == "left over":
        shutil.copy(path, masks / "9.png")
    elif how == "shape":
        Image.open(path).resize((64, 64)).save(path)
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:40])
    else:
        Image.new("L", (96, 64), {"black": 0, "white": 255}[how]).save(path)


@pytest.mark.parametrize(
    ("how", "words"),
    [("missing", "without the other: 1"), ("left over", "without the other: 9"), ("shape", "mask of 1.png: it has 64"),
     ("black", "mask of 1.png: 0%"), ("white", "mask of 1.png: 100%"), ("damaged", "mask of 1.png")],
)  # fmt: skip
def test_a_mask_that_cannot_be_meant_is_named(how, words, tmp_path):
    photos, masks = masked_photos(tmp_path)
    spoil(masks, how)
    with pytest.raises(sap.UsageError, match=f"--mask_dir.*{words}"):
        sap.SubjectImages(sap.parse_args(flags("base", photos, tmp_path / "out", f"--mask_dir={masks}")))


def test_photos_that_are_opaque_are_no_masks(photos, tmp_path):
    with pytest.raises(sap.UsageError, match="--alpha_mask: the mask of 00.jpg: 100%.*opaque"):
        sap.SubjectImages(sap.parse_args(flags("base", photos, tmp_path / "out", "--alpha_mask")))


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--anchor_weight=0"], "masks need the anchor"), (["--alpha_mask"], "two sources"), (["--unmasked_weight=2"],
      "--unmasked_weight")],
)  # fmt: skip
def test_masks_that_cannot_work_are_refused(more, words, photos, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        sap.parse_args(flags("base", photos, tmp_path / "out", f"--mask_dir={photos}", *more))
    assert words in capsys.readouterr().err


def test_a_run_with_other_masks_is_another_run(sd15, tmp_path):
    photos, masks = masked_photos(tmp_path)
    arguments = flags(sd15, photos, tmp_path / "out", f"--mask_dir={masks}", "--checkpointing_steps=1", steps=2)
    train(SD15, arguments)
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    (tmp_path / "out" / "finished_run.json").unlink()
    Image.new("L", (96, 64), 0).save(masks / "0.png")
    Image.fromarray(np.eye(64, 96, dtype=np.uint8) * 255).save(masks / "0.png")
    with pytest.raises(sap.UsageError, match="the mask of 0.png was"):
        train(SD15, [*arguments, "--resume_from_checkpoint=latest"])


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


def test_a_lora_of_another_trainer_is_read_with_its_alpha(sd15, photos, tmp_path):
    _, run = make_run(SD15, flags(sd15, photos, tmp_path))
    randomise_adapters(run)
    sap.write_kohya_lora(run, tmp_path)
    tensors = load_file(tmp_path / sap.KOHYA_FILE)
    tensors = {key: 2 * tensor if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
    _, other = make_run(SD15, flags(sd15, photos, tmp_path, f"--init_lora={tmp_path / 'other.safetensors'}"))
    for (name, mine), theirs in zip(run.student.trained().items(), other.student.trained().values(), strict=True):
        assert torch.allclose((2 if "lora_B" in name else 1) * mine, theirs, atol=1e-6), name


@pytest.mark.parametrize("more", [["--rank=8"], ["--lora_layers=to_k"], ["--init_lora=/nowhere"]])
def test_a_lora_that_does_not_fit_is_refused(more, sd15, photos, tmp_path):
    train(SD15, flags(sd15, photos, tmp_path / "one"))
    with pytest.raises(sap.UsageError, match=f"--init_lora {'/nowhere' if 'nowhere' in more[0] else '.*one'}"):
        train(SD15, flags(sd15, photos, tmp_path / "two", f"--init_lora={tmp_path / 'one'}", *more))


# ---- Is it learning? ----


def logged(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@every_script
def test_photos_held_out_are_measured_alike_each_time_and_never_trained_on(script, bases, photos, tmp_path):
    held_out = tiny_pipelines.save_photos(tmp_path / "held out", count=2, size=(80, 64))
    more = [f"--validation_data_dir={held_out}", "--validation_steps=1", "--learning_rate=0", "--random_flip"]
    train(script, without(flags(bases[script], photos, tmp_path / "out", *more, steps=3), "--center_crop"))
    rows = logged(tmp_path / "out")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    values = [row for row in rows if "val/reconstruction" in row]
    assert [row["step"] for row in values] == [1, 2, 3]
    assert len({(row["val/reconstruction"], row["val/anchor"]) for row in values}) == 1
    assert values[0]["val/reconstruction"] > 0
    train(script, without(flags(bases[script], photos, tmp_path / "plain", *more[2:], steps=3), "--center_crop"))
    assert_equal(lora(tmp_path / "out"), lora(tmp_path / "plain"))


def test_a_folder_without_photos_to_hold_out_is_named(photos, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(sap.UsageError, match="none holds no picture"):
        sap.SubjectImages(sap.parse_args(flags("base", photos, "out", f"--validation_data_dir={tmp_path / 'none'}")))


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
    assert width == 2 * 64
    assert height > 3 * 64
    assert {(call["guidance_scale"], call["num_inference_steps"]) for call in calls} == {(3.0, 1)}
    assert len(calls) == 2 * 3 * 2
    assert (tmp_path / "out" / "image_1.png").is_file()


def test_flags_can_stand_in_a_file(photos, tmp_path):
    lines = flags("base", photos, tmp_path / "out", "--rank=7")
    (tmp_path / "flags.txt").write_text("\n".join(lines) + "\n")
    assert vars(sap.parse_args([f"@{tmp_path / 'flags.txt'}"])) == vars(sap.parse_args(lines))
