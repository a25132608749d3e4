# SPDX-License-Identifier: Apache-2.0
"""How the dreambench scripts read and write files: one sentence for what cannot be, and nothing lost."""

import os
import sys

import pytest
from PIL import Image
from runner import ROOT

sys.path.insert(0, str(ROOT / "examples" / "dreambench"))
import benchmark  # noqa: E402 (the path comes first)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not there"),
        (b'{"a": 1', "is damaged"),
        (b"[1]", "it holds no JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"[" * 200_000, "is damaged"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, content, says):
    file = tmp_path / "scores.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as told:
        benchmark.read_json(file)
    assert str(file) in str(told.value)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "scores.json")
    with pytest.raises(ValueError, match="is not an ordinary file"):
        benchmark.read_json(tmp_path / "scores.json")
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    assert benchmark.image_files(tmp_path) == [tmp_path / "0.png"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new" / "scores.json"
    benchmark.write_json(file, {"ä": 1})
    assert benchmark.read_json(file) == {"ä": 1}
    link = tmp_path / "link.json"
    link.symlink_to(file)
    benchmark.write_json(link, {"b": 2})
    assert link.is_symlink() and benchmark.read_json(file) == {"b": 2}
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ValueError, match="scores.json cannot be written: No space left"):
        benchmark.write_json(file, {"c": 3})
    assert benchmark.read_json(file) == {"b": 2}
    assert [one.name for one in file.parent.iterdir()] == ["scores.json"]


def full_disk(*names):
    raise OSError(28, "No space left on device")


def test_a_folder_is_refused_and_a_device_stays_one(tmp_path):
    with pytest.raises(ValueError, match="cannot be written: Is a directory"):
        benchmark.write_file(tmp_path, "text")
    benchmark.write_file(benchmark.Path("/dev/null"), "text")
    assert benchmark.Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "=1+1", "+1", "-x", "@x", "a|b"])
def test_names_that_are_no_folders_or_break_tables(name):
    with pytest.raises(ValueError, match="--method"):
        benchmark.check_name(name, "--method")


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/rex")
    assert str(benchmark.path("~/loras")) == "/home/rex/loras"
    assert benchmark.model_name("~/sd15") == "/home/rex/sd15"
    assert benchmark.model_name("stable-diffusion-v1-5/stable-diffusion-v1-5/") == (
        "stable-diffusion-v1-5/stable-diffusion-v1-5/"
    )
