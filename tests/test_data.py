# SPDX-License-Identifier: Apache-2.0
"""Pictures, captions, and which of them each micro-step draws."""

import json
import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from runner import assert_equal, flags, lora, make_run, train, without

import train_sap_lora_sd15 as sap


def load(folder: Path, *more: str, left_out: str = "") -> sap.SubjectImages:
    return sap.SubjectImages(sap.parse_args(without(flags("base", folder, "out", *more), left_out)))


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


def test_a_tiff_of_floats_from_0_to_1_is_not_black(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "floats.tif")
    red = np.asarray(sap.read_image(tmp_path / "floats.tif"))[..., 0]
    assert np.abs(red - 255 * values).max() <= 1


def test_pictures_of_one_colour_are_named(tmp_path, caplog):
    tiny_pipelines.save_photos(tmp_path, count=2)
    Image.new("RGB", (64, 64), (0, 0, 9)).save(tmp_path / "dark.png")
    load(tmp_path)
    assert "dark.png" in caplog.text
    assert "00.jpg" not in caplog.text


def test_animated_pictures_train_on_their_first_frame(tmp_path):
    first, second = (Image.new("RGB", (80, 80), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert sap.read_image(tmp_path / "a.gif").getpixel((40, 40)) == (255, 0, 0)


# ---- The folder ----


def test_only_pictures_are_read_and_the_rest_is_named(tmp_path, caplog):
    tiny_pipelines.save_photos(tmp_path, count=3)
    of_systems, others = [".DS_Store", "._00.jpg", "Thumbs.db", ".hidden.png"], ["notes.md", "model.safetensors"]
    for name in of_systems + others:
        (tmp_path / name).write_text("no picture")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "00.jpg").rename(tmp_path / "00.JPG")
    assert [path.name for path in load(tmp_path).images] == ["00.JPG", "01.jpg", "02.jpg"]
    (line,) = [record.message for record in caplog.records]
    assert [name for name in others if name not in line] == []
    assert [name for name in [*of_systems, ".ipynb_checkpoints"] if name in line] == []


def test_heic_without_its_package_is_explained(tmp_path, caplog, monkeypatch):
    tiny_pipelines.save_photos(tmp_path, count=1)
    (tmp_path / "IMG_1.HEIC").touch()
    find_spec = sap.importlib.util.find_spec
    monkeypatch.setattr(sap.importlib.util, "find_spec", lambda name: None if "heif" in name else find_spec(name))
    load(tmp_path)
    assert "IMG_1.HEIC; for HEIC export JPEG, or pip install pillow-heif" in caplog.text


@pytest.mark.parametrize(
    ("files", "more", "captions", "anchors"),
    [
        ({"metadata.jsonl": '{"file_name": "00.jpg", "text": "one sks"}', "01.txt": "two sks\n"},
         ["--subject_token=sks", "--class_token=dog"], ["one sks", "two sks"], ["one dog", "two dog"]),
        ({"metadata.jsonl": '{"file_name": "01.jpg", "prompt": "mine"}'}, ["--caption_column=prompt"],
         ["a photo of sks dog", "mine"], ["a photo of a dog"] * 2),
        ({"00.txt": "\ufeffsks süß", "01.txt": "  "}, [],  # with the mark of Windows
         ["sks süß", "a photo of sks dog"], ["a photo of a dog"] * 2),
        ({"metadata.jsonl": '{"file_name": "00.jpg", "text": null}', "01.txt": "mine"}, [],
         ["a photo of sks dog", "mine"], ["a photo of a dog"] * 2),
    ],
)  # fmt: skip
def test_captions_of_metadata_and_of_text_files(files, more, captions, anchors, tmp_path, caplog):
    caplog.set_level("INFO", "sap_lora")
    tiny_pipelines.save_photos(tmp_path, count=2)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    images = load(tmp_path, *more)
    assert images.captions == captions
    assert images.anchor_captions == anchors
    of_one = "Captions: found for 1 of 2 pictures, --instance_prompt stands in for the others" in caplog.text
    assert of_one == ("a photo of sks dog" in captions)


def line(text: str, name: str = "00.jpg") -> bytes:
    """A line of metadata.jsonl with a caption as JSON has it."""
    return f'{{"file_name": "{name}", "text": {text}}}\n'.encode()


NO_TEXT = ["3", "true", "[1]", "{}", '"\\ud800"']
MISTAKES = [
    ({"01.jpg": b""}, [], "01.jpg of .* cannot be read as a picture"),
    ({"01.jpg": b"no picture"}, [], "01.jpg of .* cannot be read as a picture"),
    ({"metadata.jsonl": b"\n{"}, [], "metadata.jsonl, line 2: "),
    ({"metadata.jsonl": b'{"file_name": "00.jpg"}'}, [], "metadata.jsonl, line 1: "),
    ({"metadata.jsonl": b'["00.jpg"]'}, [], "metadata.jsonl, line 1: "),
    ({"metadata.jsonl": line('"x"', "9.jpg")}, [], "metadata.jsonl, line 1: "),
    *[({"metadata.jsonl": line(text)}, [], "metadata.jsonl, line 1: ") for text in NO_TEXT],
    ({"metadata.jsonl": line('"x"') + line('"y"', "./00.jpg")}, [], "line 2: .*has a line already"),
    ({"metadata.jsonl": "süß".encode("latin-1")}, [], "metadata.jsonl is not UTF-8"),
    ({"00.txt": "süß".encode("latin-1")}, [], "00.txt is not UTF-8"),
    ({"00.txt": b"sks dog in the snow"}, ["--subject_token=photo"], '"sks dog in the snow" does not hold the word'),
]


@pytest.mark.parametrize(("files", "more", "words"), MISTAKES)
def test_mistakes_in_pictures_and_captions_are_named(files, more, words, tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=1)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(sap.UsageError, match=words):
        load(tmp_path, *more)


def test_pictures_that_cannot_be_meant_are_named(tmp_path):
    with pytest.raises(sap.UsageError, match="holds no picture"):
        load(tmp_path)
    (photo,) = tiny_pipelines.save_photos(tmp_path, count=1, size=(200, 200)).iterdir()
    photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    with pytest.raises(sap.UsageError, match=f"00.jpg of {tmp_path} cannot be read as a picture"):
        load(tmp_path)
    photo.unlink()
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    with pytest.raises(sap.UsageError, match=f"huge.png of {tmp_path} cannot be read .*exceeds limit"):
        load(tmp_path)


def test_captions_that_are_found_are_told_and_one_anchor_for_all_is_warned_of(captioned, caplog):
    caplog.set_level("INFO", "sap_lora")
    load(captioned)
    assert "Captions: found for 5 of 5 pictures" in caplog.text
    assert "--subject_token" in caplog.text
    caplog.clear()
    load(captioned, "--subject_token=sks")
    assert "differ" not in caplog.text


@pytest.mark.parametrize("spelling", ["NFC", "NFD"])
def test_names_are_the_same_in_whatever_unicode_form(spelling, tmp_path):
    other = {"NFC": "NFD", "NFD": "NFC"}[spelling]
    for number, name in enumerate(("süß", "mädchen")):
        photo = unicodedata.normalize(spelling, f"{name}.png")
        tiny_pipelines.save_photos(tmp_path / f"{number}", count=1, suffix=".png")
        (tmp_path / f"{number}" / "00.png").rename(tmp_path / photo)
        (tmp_path / f"{number}").rmdir()
    masks = tmp_path.parent / f"masks {spelling}"
    masks.mkdir()
    for name in ("süß", "mädchen"):
        half_white(masks / unicodedata.normalize(other, f"{name}.png"))
    (tmp_path / unicodedata.normalize(other, "süß.txt")).write_text("of a file", encoding="utf-8")
    line = {"file_name": unicodedata.normalize(other, "mädchen.png"), "text": "of a line"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    images = load(tmp_path, f"--mask_dir={masks}")
    assert sorted(images.captions) == ["of a file", "of a line"]
    assert len(images.masks) == 2


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_a_pipe_is_no_picture(tmp_path, caplog):
    tiny_pipelines.save_photos(tmp_path, count=1)
    pipe(tmp_path / "pipe.jpg")
    pipe(tmp_path / "00.txt")
    images = load(tmp_path)
    assert images.names == ["00.jpg"]
    assert "pipe.jpg" in caplog.text
    pipe(tmp_path / "00.jpg")
    with pytest.raises(sap.UsageError, match="00.jpg of .* it is no regular file"):
        images.pixel_values(0, False, (0.5, 0.5))


@pytest.mark.parametrize("flag", ["instance_data_dir", "mask_dir", "validation_data_dir"])
@pytest.mark.parametrize("how", ["iterdir", "is_file"])
def test_a_folder_that_may_not_be_read_is_named(flag, how, photos, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    tiny_pipelines.save_photos(closed)
    args = sap.parse_args(flags("base", photos, tmp_path / "out", f"--{flag}={closed}"))
    real = getattr(Path, how)

    def refuse(path, *rest):
        if path == closed or path.parent == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest)

    monkeypatch.setattr(Path, how, refuse)
    with pytest.raises(sap.UsageError, match=r"closed.*Permission denied|the mask of 00.jpg.*Permission denied"):
        sap.SubjectImages(args)


# ---- Masks ----


def half_white(path: Path, size: tuple[int, int] = (72, 64)) -> None:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)


# ---- Held out ----


def test_a_damaged_photo_that_is_held_out_is_blamed_on_its_own_folder(photos, tmp_path):
    held_out = tiny_pipelines.save_photos(tmp_path / "held out", count=1)
    (held_out / "00.jpg").write_bytes(b"no picture")
    with pytest.raises(sap.UsageError, match="00.jpg of .*held out cannot be read"):
        load(photos, f"--validation_data_dir={held_out}")


def test_photos_that_are_trained_on_and_held_out_are_named(photos, tmp_path, caplog):
    held_out = tmp_path / "held out"
    held_out.mkdir()
    shutil.copy(photos / "02.jpg", held_out / "again.jpg")
    tiny_pipelines.save_photos(tmp_path / "more", count=7)
    shutil.copy(tmp_path / "more" / "06.jpg", held_out / "other.jpg")
    load(photos, f"--validation_data_dir={held_out}")
    assert "again.jpg" in caplog.text
    assert "other.jpg" not in caplog.text


# ---- A `datasets` dataset ----


@pytest.fixture(scope="module")
def dataset(photos, tmp_path_factory) -> Path:
    paths = sorted(str(path) for path in photos.glob("*.jpg"))
    rows = {"picture": paths, "words": [f"sks {i}" for i in range(len(paths))]}
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    folder = tmp_path_factory.mktemp("data") / "dataset"
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def of_dataset(dataset: Path, *more: str) -> sap.SubjectImages:
    return load("none", *more, f"--dataset_name={dataset}", left_out="--instance_data_dir")


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


ODD_DATASETS = {
    "a picture that is none": ({"image": [None, None]}, "cannot be read as a picture"),
    "numbers": ({"image": [1, 2]}, "--image_column image"),
    "a path that is missing": ({"image": ["/nowhere/a.png"] * 2}, "cannot be read as a picture"),
    "damaged bytes": ({"image": [{"bytes": b"x", "path": None}] * 2}, "cannot be read as a picture"),
    "captions that are numbers": ({"image": ["00.jpg"], "text": [3]}, "--caption_column text"),
    "without the column of pictures": ({"text": ["x"]}, "--image_column image is not one of the columns text"),
    "without the column of captions": ({"image": ["00.jpg"]}, "--caption_column text is not one of the columns image"),
    "empty": ({"image": []}, "holds no picture|cannot be loaded|--image_column"),
    "damaged": (None, "--dataset_name"),
    "missing": (None, "--dataset_name .*missing"),
}


@pytest.mark.parametrize("name", ODD_DATASETS)
def test_an_odd_dataset_ends_in_a_sentence(name, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    rows, words = ODD_DATASETS[name]
    if rows is not None:
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
    elif name == "damaged":
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    with pytest.raises(sap.UsageError, match=words):
        of_dataset(tmp_path / name, *(["--caption_column=text"] if "caption" in name else []))


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
    images = load(photos, left_out="--center_crop")
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
    found = without(flags("base", photos, "out"), "--center_crop") + more
    assert sap.SubjectImages(sap.parse_args(found)).cacheable == cacheable


def test_cached_random_crops_differ_between_pictures_and_seeds(photos):
    images, other = (load(photos, "--cache_latents", f"--seed={i}", left_out="--center_crop") for i in (0, 1))
    assert len(set(images.fixed_centering)) == 5
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


def test_a_share_of_the_samples_sees_the_class_prompt(photos):
    images = sap.SubjectImages(sap.parse_args(flags("base", photos, "/out", "--class_share=.25")))
    items = [images[0, (0, 0, step, 0)] for step in range(1000)]
    of_class = [item for item in items if item["of_class"]]
    assert 200 < len(of_class) < 300
    assert {item["prompt"] for item in of_class} == {"a photo of a dog"}
    assert {item["prompt"] for item in items if not item["of_class"]} == {"a photo of sks dog"}
    assert {item["anchor_prompt"] for item in items} == {"a photo of a dog"}


def test_posteriors_are_keyed_by_picture_and_mirror_and_sampled_anew(sd15, photos, tmp_path):
    run = make_run("train_sap_lora_sd15", flags(sd15, photos, tmp_path, "--random_flip"))[1]
    assert set(run.posteriors) == {(i, flipped) for i in range(5) for flipped in (False, True)}
    for (index, flipped), parameters in run.posteriors.items():
        pixel_values = run.images.pixel_values(index, flipped, (0.5, 0.5))
        assert torch.equal(parameters, run.vae.encode(pixel_values[None]).latent_dist.parameters)
    item = {"index": 1, "flipped": False}
    one, other = (sap.draw_latents(run, [item], sap.keyed_generator(i)) for i in range(2))
    assert 0 < (one - other).abs().max() < 0.5


# ---- Which pictures a micro-step draws ----


def batches(images, ranks: int = 1, rank: int = 0, start: int = 0, stop: int = 30) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in images.draws(rank, ranks, start, stop)]


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(photos):
    drawn = sum(batches(load(photos)), [])
    epochs = [tuple(drawn[i : i + 5]) for i in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 3


def test_every_batch_is_full(photos):
    drawn = batches(load(photos, "--train_batch_size=2"))
    assert {len(batch) for batch in drawn} == {2}
    assert all(set(sum(drawn[i : i + 3], [])) == {0, 1, 2, 3, 4} for i in range(0, 30, 3))
    assert {len(batch) for batch in batches(load(photos, "--train_batch_size=8"))} == {8}


def test_ranks_share_an_epoch_and_draws_go_on_where_a_run_stopped(photos):
    images = load(photos)
    first, second = (batches(images, ranks=2, rank=rank, stop=10) for rank in range(2))
    merged = [index for pair in zip(first, second, strict=True) for batch in pair for index in batch]
    assert merged == sum(batches(images, stop=20), [])
    assert list(images.draws(0, 1, 7, 20)) == list(images.draws(0, 1, 0, 20))[7:]


def test_repeats_make_the_epoch_longer(photos):
    images = load(photos, "--repeats=3")
    drawn = sum(batches(images, stop=15), [])
    assert images.batches_per_epoch == 15
    assert set(Counter(drawn).values()) == {3}
    assert drawn != sum(batches(load(photos), stop=15), [])


def test_a_batch_has_one_size(tmp_path):
    for i, size in enumerate([(64, 64), (128, 64), (64, 64), (128, 64), (64, 64)]):
        tiny_pipelines.save_photos(tmp_path / f"{i}", count=1, size=size)
        (tmp_path / f"{i}" / "00.jpg").rename(tmp_path / f"{i}.jpg")
    images = load(tmp_path, "--aspect_ratio_buckets=64,64;64,128", "--train_batch_size=2")
    drawn = batches(images)
    assert all(len({images.windows[index] for index in batch}) == 1 for batch in drawn)
    assert {frozenset(batch) for batch in drawn} >= {frozenset({1, 3})}


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_what_one_thread_gives_in_its_order(threads, photos):
    plain, threaded = (load(photos, f"--dataloader_num_workers={n}", "--train_batch_size=2", left_out="--center_crop")
                       for n in (0, threads))  # fmt: skip
    pairs = zip(*(images.batches(images.draws(0, 1, 3, 12)) for images in (plain, threaded)), strict=True)
    for items, others in pairs:
        for item, other in zip(items, others, strict=True):
            assert torch.equal(item.pop("pixel_values"), other.pop("pixel_values"))
            assert item == other


@pytest.mark.parametrize("threads", [0, 2])
def test_a_picture_that_goes_bad_in_training_ends_the_run(threads, sd15, photos, tmp_path, monkeypatch):
    real = sap.SubjectImages.pixel_values

    def gone(images, index, *rest):
        if images.epoch(0)[2] == [index]:  # the third one that is drawn
            raise sap.UsageError("01.jpg cannot be read as a picture: it is gone")
        return real(images, index, *rest)

    monkeypatch.setattr(sap.SubjectImages, "pixel_values", gone)
    more = [f"--dataloader_num_workers={threads}", "--anchor_batch_size=1"]
    with pytest.raises(sap.RunError, match="it is gone: stopped after step .* of 9. To go on") as ended:
        train("train_sap_lora_sd15", without(flags(sd15, photos, tmp_path, *more, steps=9), "--center_crop"))
    assert ended.value.status == 1
    (checkpoint,) = sap.list_checkpoints(tmp_path)  # what was trained is kept
    assert f"after step {checkpoint.name.removeprefix('checkpoint-')} of" in str(ended.value)
    assert_equal(lora(tmp_path), lora(checkpoint))
