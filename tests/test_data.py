# SPDX-License-Identifier: Apache-2.0
"""Pictures, captions, and which of them each micro-step draws."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from runner import draw, flags, make_run, without

import train_sap_lora_sd15 as sap


def parse(folder: Path, *more: str):
    return sap.parse_args(flags("base", folder, "out", *more))


def load(folder: Path, *more: str) -> sap.SubjectImages:
    return sap.load_subject_images(parse(folder, *more))


# ---- One picture ----


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 100 * 256, (100, 100, 100)),
        ("I", 100 * 256, (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected, tmp_path):
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "I") else "picture.png")
    Image.new(mode, (8, 8), colour).save(path)
    image = sap.read_image(path)
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == pytest.approx(expected, abs=2)


def test_a_palette_with_transparency_is_laid_over_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=1)
    assert sap.read_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert sap.read_image(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_a_damaged_picture_is_named(content, tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=2, size=(200, 200))
    damaged = tmp_path / "01.jpg"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(sap.UsageError, match="01.jpg cannot be read as a picture"):
        load(tmp_path)


def test_a_picture_too_large_to_be_meant_is_named(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    with pytest.raises(sap.UsageError, match="huge.png cannot be read .* scale it down"):
        load(tmp_path)


def test_animated_pictures_train_on_their_first_frame(tmp_path):
    first, second = (Image.new("RGB", (80, 80), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert sap.read_image(tmp_path / "a.gif").getpixel((40, 40)) == (255, 0, 0)


def test_names_in_any_script_and_two_pictures_of_one_name(tmp_path):
    for name, colour in (("hündchen 犬.png", "red"), ("00.png", "red"), ("00.jpg", "blue")):
        Image.new("RGB", (80, 80), colour).save(tmp_path / name)
    (tmp_path / "hündchen 犬.txt").write_text("sks dog 犬", encoding="utf-8")
    (tmp_path / "00.txt").write_text("sks dog", encoding="utf-8")
    assert load(tmp_path).captions == ["sks dog", "sks dog", "sks dog 犬"]


# ---- The folder ----


def test_only_pictures_are_read_and_the_rest_is_named(tmp_path, caplog):
    tiny_pipelines.save_photos(tmp_path, count=3)
    for name in (".DS_Store", "._00.jpg", "notes.md", "model.safetensors"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "00.jpg").rename(tmp_path / "00.JPG")
    images = load(tmp_path)
    assert [path.name for path in images.images] == ["00.JPG", "01.jpg", "02.jpg"]
    (line,) = [record.message for record in caplog.records]
    assert all(
        name in line for name in (".DS_Store", "._00.jpg", "notes.md", "model.safetensors", ".ipynb_checkpoints")
    )


def test_captions_of_metadata_and_of_text_files(tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=3, captions=["one sks", "two sks"])
    (tmp_path / "02.txt").write_text("three sks\n", encoding="utf-8")
    images = load(tmp_path, "--subject_token=sks", "--class_token=dog")
    assert images.captions == ["one sks", "two sks", "three sks"]
    assert images.anchor_captions == ["one dog", "two dog", "three dog"]


def test_captions_of_another_field(tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=1)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "00.jpg", "prompt": "mine"}))
    assert load(tmp_path, "--caption_column=prompt").captions == ["mine"]


def test_pictures_without_caption_get_the_instance_prompt(tmp_path, caplog):
    tiny_pipelines.save_photos(tmp_path, count=3, captions=["one"])
    assert load(tmp_path).captions == ["one", "a photo of sks dog", "a photo of sks dog"]
    assert "2 of 3 pictures have no caption" in caplog.text
    assert set(load(tmp_path).anchor_captions) == {"a photo of a dog"}


@pytest.mark.parametrize("line", ["{", '{"file_name": "00.jpg"}', '["00.jpg"]', '{"file_name": "9.jpg", "text": "x"}'])
def test_a_broken_caption_line_is_named(line, tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=1)
    (tmp_path / "metadata.jsonl").write_text("\n" + line)
    with pytest.raises(sap.UsageError, match=r"metadata.jsonl, line 2: "):
        load(tmp_path)


@pytest.mark.parametrize("name", ["00.txt", "metadata.jsonl"])
def test_captions_in_another_encoding_are_named(name, tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=1)
    (tmp_path / name).write_bytes("süß".encode("latin-1"))
    with pytest.raises(sap.UsageError, match=f"{name} is not UTF-8"):
        load(tmp_path)


def test_captions_with_the_mark_of_windows(tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=1)
    (tmp_path / "00.txt").write_text("sks süß", encoding="utf-8-sig")
    assert load(tmp_path).captions == ["sks süß"]


def test_a_caption_without_the_subject_token_is_quoted(captioned):
    with pytest.raises(sap.UsageError, match='"sks dog in the snow" does not hold the word "photo"'):
        load(captioned, "--subject_token=photo")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(sap.UsageError, match="holds no picture"):
        load(tmp_path)


# ---- A `datasets` dataset ----


@pytest.fixture(scope="module")
def dataset(photos, tmp_path_factory) -> Path:
    import datasets

    paths = sorted(str(path) for path in photos.glob("*.jpg"))
    rows = {"picture": paths, "words": [f"sks {i}" for i in range(len(paths))]}
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    folder = tmp_path_factory.mktemp("data") / "dataset"
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def of_dataset(dataset: Path, *more: str) -> sap.SubjectImages:
    arguments = without(flags("base", "none", "out", *more), "--instance_data_dir")
    return sap.load_subject_images(sap.parse_args([*arguments, f"--dataset_name={dataset}"]))


def test_dataset_from_disk(dataset, photos):
    images = of_dataset(dataset, "--image_column=picture", "--caption_column=words", "--subject_token=sks")
    folder = load(photos)
    assert images.captions == [f"sks {i}" for i in range(5)]
    assert images.anchor_captions == [f"{i}" for i in range(5)]
    for i in range(5):
        assert torch.equal(images.pixel_values(i, False, (0, 1)), folder.pixel_values(i, False, (0, 1)))


def test_dataset_of_a_folder_with_captions(captioned, tmp_path):
    images = of_dataset(captioned, "--caption_column=text", f"--cache_dir={tmp_path}")
    assert images.captions[1] == "sks dog in the snow"


@pytest.mark.parametrize("column", ["image_column", "caption_column"])
def test_a_missing_column_is_named(column, dataset):
    with pytest.raises(sap.UsageError, match=f"--{column} nothing is not one of the columns picture, words"):
        of_dataset(dataset, "--image_column=picture", f"--{column}=nothing")


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(sap.UsageError, match="--dataset_name .*nowhere"):
        of_dataset(tmp_path / "nowhere")


# ---- Crops ----


def gradient_picture(folder: Path, width: int, height: int) -> Path:
    """A picture whose red grows from left to right and whose green grows from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    folder.mkdir()
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)).save(folder / "0.png")
    return folder


def test_crop_lies_where_the_centering_says(tmp_path):
    images = load(gradient_picture(tmp_path / "wide", 256, 128))
    left, middle, right = (images.pixel_values(0, False, (x, 0.5))[0].mean().item() for x in (0, 0.5, 1))
    assert [left, middle, right] == pytest.approx([-0.5, 0, 0.5], abs=0.02)
    whole = images.pixel_values(0, False, (0, 0))
    assert whole.shape == (3, 64, 64)
    assert [whole.min().item(), whole[1].max().item()] == pytest.approx([-1, 1], abs=0.03)


def test_mirrored_pixels(tmp_path):
    images = load(gradient_picture(tmp_path / "square", 128, 128))
    straight, mirrored = images.pixel_values(0, False, (0.5, 0.5)), images.pixel_values(0, True, (0.5, 0.5))
    assert torch.allclose(straight.flip(-1), mirrored, atol=0.02)


def test_random_crops_are_drawn_anew_at_each_micro_step_but_not_at_random(photos):
    arguments = without(flags("base", photos, "out"), "--center_crop")
    images = sap.load_subject_images(sap.parse_args(arguments))
    assert not images.cacheable
    items = [images[(0, (0, 0, step, 0))] for step in range(8)]
    assert len({item["centering"] for item in items}) == 8
    assert len({item["pixel_values"].sum().item() for item in items}) > 4
    assert torch.equal(images[(0, (0, 0, 3, 0))]["pixel_values"], items[3]["pixel_values"])


@pytest.mark.parametrize(
    ("size", "more", "cacheable"),
    [((64, 64), [], True), ((128, 132), [], False), ((1000, 1001), [], True), ((72, 64), ["--cache_latents"], True),
     ((72, 64), ["--center_crop"], True), ((72, 64), ["--aspect_ratio_buckets=64,64"], True)],
)  # fmt: skip
def test_latents_are_cached_where_crops_do_not_move(size, more, cacheable, tmp_path):
    photos = tiny_pipelines.save_photos(tmp_path / "photos", count=1, size=size)
    arguments = without(flags("base", photos, "out"), "--center_crop") + more
    assert sap.load_subject_images(sap.parse_args(arguments)).cacheable == cacheable


def test_cached_random_crops_differ_between_pictures_and_seeds(photos):
    arguments = without(flags("base", photos, "out", "--cache_latents"), "--center_crop")
    images = sap.load_subject_images(sap.parse_args(arguments))
    assert len({tuple(centering) for centering in images.fixed_centering}) == 5
    other = sap.load_subject_images(sap.parse_args([*arguments, "--seed=1"]))
    assert images.fixed_centering != other.fixed_centering


def test_buckets_take_the_nearest_shape(tmp_path):
    folder = tiny_pipelines.save_photos(tmp_path / "photos", count=1, size=(128, 64))
    images = load(folder, "--aspect_ratio_buckets=64,64;64,128;128,64")
    assert images.windows == [(64, 128)]
    assert images.pixel_values(0, False, (0.5, 0.5)).shape == (3, 64, 128)


def test_caption_dropout_empties_both_prompts(photos):
    images = load(photos, "--caption_dropout=0.5")
    items = [images[(0, (0, 0, step, 0))] for step in range(200)]
    dropped = [item for item in items if item["prompt"] == ""]
    assert 70 < len(dropped) < 130
    assert all((item["prompt"] == "") == (item["anchor_prompt"] == "") for item in items)


# ---- Posteriors ----


def test_posteriors_are_keyed_by_picture_and_mirror_and_sampled_anew(sd15, photos, tmp_path):
    run = make_run("train_sap_lora_sd15", flags(sd15, photos, tmp_path, "--random_flip"))[1]
    assert set(run.posteriors) == {(i, flipped) for i in range(5) for flipped in (False, True)}
    assert run.vae is None
    vae = sap.load_vae(run.args, run.device)
    for (index, flipped), parameters in run.posteriors.items():
        pixel_values = run.images.pixel_values(index, flipped, (0.5, 0.5))
        assert torch.equal(parameters, vae.encode(pixel_values[None]).latent_dist.parameters)
    item = {"index": 1, "flipped": False}
    one, other = (sap.draw_latents(run, [item], sap.keyed_generator(i)) for i in range(2))
    mean = run.posteriors[1, False].chunk(2, dim=1)[0] * run.vae_config["scaling_factor"]
    assert 0 < (one - other).abs().max() < 0.5
    assert torch.allclose(one, mean, atol=0.5)
    assert torch.allclose(sap.unscale_latents(sap.scale_latents(mean, run.vae_config), run.vae_config), mean)


def test_a_batch_pairs_each_picture_with_its_own_captions(sd15, captioned, tmp_path):
    more = ["--subject_token=sks", "--class_token=red", "--train_batch_size=4"]
    module, run = make_run("train_sap_lora_sd15", flags(sd15, captioned, tmp_path, *more))
    step, _ = draw(module, run)
    assert len(set(step.prompts)) == 4
    for i, prompt in enumerate(step.prompts):
        subject, anchor = run.embeddings[prompt], run.embeddings[prompt.replace("sks", "red")]
        assert torch.equal(step.conditioning["encoder_hidden_states"][i], subject["encoder_hidden_states"][0])
        assert torch.equal(step.anchor_conditioning["encoder_hidden_states"][i], anchor["encoder_hidden_states"][0])


# ---- Which pictures a micro-step draws ----


def batches(images, *more: str, ranks: int = 1, rank: int = 0, start: int = 0, stop: int = 30) -> list[list[int]]:
    args = parse(Path("/"), *more)
    sampler = sap.MicroStepSampler(images, args, rank, ranks)
    sampler.start, sampler.stop = start, stop
    return [[index for index, _ in batch] for batch in sampler]


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(photos):
    drawn = sum(batches(load(photos)), [])
    epochs = [tuple(drawn[i : i + 5]) for i in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 3


def test_every_batch_is_full(photos):
    drawn = batches(load(photos), "--train_batch_size=2")
    assert {len(batch) for batch in drawn} == {2}
    assert all(set(sum(drawn[i : i + 3], [])) == {0, 1, 2, 3, 4} for i in range(0, 30, 3))
    assert {len(batch) for batch in batches(load(photos), "--train_batch_size=8")} == {8}


def test_ranks_share_an_epoch(photos):
    images = load(photos)
    first, second = (batches(images, ranks=2, rank=rank, stop=10) for rank in range(2))
    merged = [index for pair in zip(first, second, strict=True) for batch in pair for index in batch]
    assert merged == sum(batches(images, stop=20), [])


def test_a_sampler_goes_on_where_a_run_stopped(photos):
    images = load(photos)
    assert batches(images, start=7, stop=20) == batches(images, stop=20)[7:]


def test_repeats_make_the_epoch_longer(photos):
    images = load(photos)
    drawn = sum(batches(images, "--repeats=3", stop=15), [])
    assert set(Counter(drawn).values()) == {3}
    assert drawn != sum(batches(images, stop=15), [])


def test_a_batch_has_one_size(tmp_path):
    folder = tmp_path / "mixed"
    for i, size in enumerate([(64, 64), (128, 64), (64, 64), (128, 64), (64, 64)]):
        path = tiny_pipelines.save_photos(tmp_path / f"{i}", count=1, size=size) / "00.jpg"
        folder.mkdir(exist_ok=True)
        path.rename(folder / f"{i}.jpg")
    images = load(folder, "--aspect_ratio_buckets=64,64;64,128")
    drawn = batches(images, "--train_batch_size=2")
    assert all(len({images.windows[index] for index in batch}) == 1 for batch in drawn)
    assert {frozenset(batch) for batch in drawn} >= {frozenset({1, 3})}


def test_draws_are_keyed_by_seed_rank_and_micro_step(photos):
    images = load(photos)
    keys = set()
    for seed in (0, 1):
        for rank in (0, 1):
            sampler = sap.MicroStepSampler(images, parse(photos, f"--seed={seed}", "--train_batch_size=2"), rank, 2)
            sampler.stop = 5
            keys |= {key for batch in sampler for _, key in batch}
    assert len(keys) == 2 * 2 * 5 * 2
    numbers = {torch.rand(1, generator=sap.keyed_generator(*key)).item() for key in keys}
    assert len(numbers) == len(keys)


def test_noise_does_not_depend_on_what_was_drawn_before(sd15, photos, tmp_path):
    module, run = make_run("train_sap_lora_sd15", flags(sd15, photos, tmp_path))
    first = draw(module, run, index=3)[0]
    torch.manual_seed(99)
    draw(module, run, index=2)
    again, other = draw(module, run, index=3)[0], draw(module, run, index=4)[0]
    assert torch.equal(first.model_input, again.model_input)
    assert torch.equal(first.target, again.target)
    assert not torch.allclose(first.target, other.target)
