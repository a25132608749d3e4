# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs the scripts' own loop, counts what it says, and writes what it prints."""

import json
import os
import sys
from pathlib import Path

import pytest
import runner
import tiny_pipelines
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmark"
sys.path.insert(0, str(FOLDER))

import bench  # noqa: E402
import gpu_check  # noqa: E402
import memory  # noqa: E402
import models  # noqa: E402


def test_full_sizes_are_those_of_the_published_models():
    counted = {}
    for name in ("sd15", "sdxl", "sd3"):
        model = models.BACKBONES[name, "full"].build(torch.bfloat16, "meta")
        counted[name] = round(sum(weight.numel() for weight in model.parameters()) / 1e6)
    assert counted == {"sd15": 860, "sdxl": 2567, "sd3": 2028}


def test_rows_of_a_tiny_denoiser(tmp_path, capsys):
    bench.main(bench.parse_args(["--backbone=sd3", "--size=tiny", "--rounds=1", f"--output={tmp_path}"]))
    rows = {row["variant"]: row for row in json.loads((tmp_path / "benchmark.json").read_text())["sd3"]}
    assert list(rows) == list(bench.VARIANTS)
    flops = {name: row["flops"] / rows["plain"]["flops"] for name, row in rows.items()}
    assert flops["doubled batch"] == pytest.approx(2, rel=0.05)
    assert {round(flops[name], 6) for name in rows if name.startswith("SAP")} == {
        round(flops["SAP, anchor batch 1"], 6)
    }
    assert 1.3 < flops["SAP, anchor batch 4"] < 1.6  # one forward more than a forward and a backward
    assert all(row["peak_bytes"] > 0 and len(row["seconds"]) == 1 for row in rows.values())
    text = (tmp_path / "benchmark.md").read_text()
    assert "| SAP, anchor batch 8 |" in text
    assert text.strip() in capsys.readouterr().out


def test_any_command_is_timed_by_the_difference_of_two_lengths(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys, time\n"
        "steps = int([word for word in sys.argv if word.startswith('--max_train_steps')][0].split('=')[1])\n"
        "time.sleep(0.3 + 0.05 * steps)\n"
    )
    options = bench.parse_args([f"--trainer={script} --flag", "--rounds=1", "--trainer_steps", "2", "22"])
    (row,) = bench.measure_commands(options.trainer, options)
    assert row["seconds"][0] == pytest.approx(0.05, rel=0.5)
    script.write_text("raise SystemExit('no such flag')")
    with pytest.raises(SystemExit, match="no such flag"):
        bench.run_command(str(script), 1)


def test_live_bytes_follow_what_is_made_and_gone():
    weights = torch.empty(10000, device="meta")
    with memory.LiveBytes([weights]) as counted:
        weights.view(100, 100).t()
        one = torch.empty(1000, dtype=torch.float32, device="meta")
        other = one + 1
        del one
        view = other[:10]
        third = torch.empty(500, dtype=torch.float32, device="meta")
    assert counted.peak == 8000
    assert counted.live == other.nbytes + third.nbytes
    assert view.untyped_storage().nbytes() == 4000


def test_a_table_of_peaks_names_the_smallest_card():
    peaks = {"load_text_pipeline": 2e9, "encode_texts": 1e9, "encode_images": 3e9, "load_denoiser": 1e9, "train": 7e9}
    table = memory.memory_table([("sd3", "--flag", peaks), ("sd3", "--more", peaks | {"train": 7.5e9})])
    assert "| sd3 | `--flag` | 2.00 | 3.00 | 7.00 | 8 GB |" in table
    assert "| sd3 | `--more` | 2.00 | 3.00 | 7.50 | 12 GB |" in table


def test_4_bits_save_most_of_the_linear_layers():
    assert memory.saved_by_4_bits("sd3") == pytest.approx(2.9e9, rel=0.03)  # of 4.06


# ---- One command for whoever has a GPU ----


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """`gpu_check.main` with words after its command line, on a world that is smaller still."""
    runner.reset()
    tiny_pipelines.save_sd3(tmp_path / "world" / "sd3")
    tiny_pipelines.save_photos(tmp_path / "world" / "dataset" / "fish", size=(64, 64))
    monkeypatch.setattr(gpu_check, "WORLD", tmp_path / "world")
    monkeypatch.syspath_prepend(str(gpu_check.ROOT))
    words = [f"--output={tmp_path / 'output'}", "--rounds=1", "--jobs=1"]
    return lambda *more: gpu_check.main(gpu_check.parse_args([*words, *more]))


@pytest.mark.slow
def test_checks_run_through_on_a_cpu(checks, tmp_path, capfd):
    report = checks("--only", "sd3")
    assert "13 passed, 0 failed, 13 cannot run here." in report, report
    assert report == (tmp_path / "output" / "report.md").read_text()
    for line in (
        "| float32 |  |  | losses apart 0, LoRA 1 |",
        "| fp16 |  |  | needs CUDA |",
        "| SAP, anchor batch 8 |",
    ):
        assert line in report
    assert f"| sd3 | `{gpu_check.CHECKPOINTED}` | milliseconds " in report
    assert len(capfd.readouterr().out.splitlines()) == 13
    checks("--only", "sd3")
    assert not capfd.readouterr().out  # all that passed stays


def test_a_check_that_fails_says_why_and_is_run_again(checks, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "REFERENCES", {"CPU": ""})
    far = {"learns faster": ("--learning_rate=5e-3", "CPU", 1e-6, 0.0, ""),
           "no such flag": ("--no_such_flag", "CPU", 1, 0.0, "")}  # fmt: skip
    monkeypatch.setattr(gpu_check, "TINY", far)
    for name in ("resumed", "anchored", "two_gpus"):
        monkeypatch.setattr(gpu_check, name, lambda *_: os._exit(3))
    report = checks("--only", "tiny", "sd3")
    assert "- **tiny, sd3, learns faster**: ArithmeticError: the losses are up to" in report
    assert "unrecognized arguments: --no_such_flag" in report
    assert "- **tiny, sd3, resumed**: ended with 3" in report
    capfd.readouterr()
    monkeypatch.setattr(gpu_check, "TINY", {"learns faster": ("", "CPU", 1e-6, 1.0, "")})
    report = checks("--only", "tiny", "sd3")
    assert "| learns faster |  |  | losses apart 0, LoRA 1 |" in report
