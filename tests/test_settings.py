# SPDX-License-Identifier: Apache-2.0
"""What single settings do, by values that are computed by hand or by another library."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from runner import draw, flags, make_run, metrics, train

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"


def pictures(photos, tmp_path, *more: str) -> sap.SubjectImages:
    return sap.SubjectImages(sap.parse_args(flags("base", photos, tmp_path / "out", *more)))


# ---- When ----


@pytest.mark.parametrize("script", ["train_sap_lora_sd15", "train_sap_lora_sdxl", "train_sap_lora_sd3"])
def test_timesteps_come_from_all_of_the_process(script, bases, photos, tmp_path):
    module, run = make_run(script, flags(bases[script], photos, tmp_path, "--train_batch_size=5"))
    table = list(range(1000))
    if script.endswith("sd3"):  # whose timesteps are shifted: the places in its table are not
        table = run.scheduler.timesteps.tolist()
    found = []
    for index in range(60):
        found += [table.index(timestep) for timestep in draw(module, run, index)[0].timesteps.tolist()]
    assert min(found) < 60
    assert max(found) > 940
    assert 450 < np.mean(found) < 550  # uniform, or symmetric as SD3's logit-normal


# ---- The optimizer and its schedule ----


def test_adams_settings_reach_it(sd15, photos, tmp_path):
    more = ["--adam_beta1=0.8", "--adam_beta2=0.9", "--adam_epsilon=1e-3", "--adam_weight_decay=0.5"]
    run = make_run(SCRIPT, flags(sd15, photos, tmp_path, *more))[1]
    ours = sap.make_optimizer(run)
    start = [parameter.detach().clone().requires_grad_() for parameter in run.student.trained().values()]
    other = torch.optim.AdamW(start, lr=1e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    for seed in range(3):
        torch.manual_seed(seed)
        for mine, theirs in zip(run.student.trained().values(), start, strict=True):
            mine.grad = torch.randn(mine.shape)
            theirs.grad = mine.grad.clone()
        ours.step()
        other.step()
    for mine, theirs in zip(run.student.trained().values(), start, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--scale_lr", "--train_batch_size=2", "--gradient_accumulation_steps=3"], [6e-2, 6e-2]),
        (
            ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=4", "--max_train_steps=6"],
            [0, 0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2],
        ),
    ],
)
def test_the_rate_is_scaled_and_warms_up(more, expected, sd15, photos, tmp_path):
    train(SCRIPT, flags(sd15, photos, tmp_path, *more))
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(expected)


# ---- Pictures ----


def test_random_flip_mirrors_half_of_the_samples(photos, tmp_path):
    for more, expected in (([], {False}), (["--random_flip"], {False, True})):
        images = pictures(photos, tmp_path, *more)
        drawn = [item["flipped"] for batch in images.batches(images.draws(0, 1, 0, 200)) for item in batch]
        assert set(drawn) == expected
        if more:
            assert 70 < sum(drawn) < 130
    straight = images.pixel_values(0, False, (0.5, 0.5))
    assert torch.equal(images.pixel_values(0, True, (0.5, 0.5)), straight.flip(-1))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"])
def test_interpolation_is_pillows_of_that_name(mode, photos, tmp_path):
    images = pictures(photos, tmp_path, f"--image_interpolation_mode={mode}")
    method = Image.Resampling[mode.removesuffix("_exact").upper()]
    picture = ImageOps.fit(Image.open(images.images[0]).convert("RGB"), (64, 64), method=method)
    expected = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)
    assert torch.allclose(images.pixel_values(0, False, (0.5, 0.5)), expected, atol=1e-5)


def test_a_mask_is_turned_as_its_exif_says(photos, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in sorted(photos.glob("*.jpg")):
        size = Image.open(path).size
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0], size[1] // 4))  # the subject is at the top
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
        mask.transpose(Image.Transpose.ROTATE_90).save(masks / f"{path.stem}.png", exif=exif)
    images = pictures(photos, tmp_path, f"--mask_dir={masks}")
    for mask in images.masks:
        pixels = np.asarray(mask)
        assert pixels[0].mean() == 255
        assert pixels[-1].mean() == 0
