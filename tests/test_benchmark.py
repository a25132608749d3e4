# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs the scripts' own loop, counts what it says, and writes what it prints."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmark"
sys.path.insert(0, str(FOLDER))

import bench  # noqa: E402
import memory  # noqa: E402
import models  # noqa: E402


def tiny_sd3() -> models.Backbone:
    mid = models.BACKBONES["sd3", "mid"]
    narrow = {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64}
    return models.backbone(models.SD3, 64, mid.config | narrow, mid.conditioning)


def test_full_sizes_are_those_of_the_published_models():
    counted = {}
    for name in ("sd15", "sdxl", "sd3"):
        model = models.BACKBONES[name, "full"].build(torch.bfloat16, "meta")
        counted[name] = round(sum(weight.numel() for weight in model.parameters()) / 1e6)
    assert counted == {"sd15": 860, "sdxl": 2567, "sd3": 2028}


def test_rows_of_a_tiny_denoiser(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.BACKBONES, ("sd3", "mid"), tiny_sd3())
    bench.main(bench.parse_args(["--backbone=sd3", "--size=mid", "--rounds=1", f"--output={tmp_path}"]))
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


def test_checkpointing_saves_estimated_memory(monkeypatch):
    monkeypatch.setitem(memory.BACKBONES, ("sd3", "full"), models.BACKBONES["sd3", "mid"])
    plain, checkpointed, quantised = memory.estimate("sd3")
    assert checkpointed["step"] < plain["step"]
    assert quantised["base"] < 0.4 * plain["base"]
    assert "| sd3 |" in memory.memory_table([plain])
