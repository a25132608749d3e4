# SPDX-License-Identifier: Apache-2.0
"""Tables of examples/dreambench compare methods over the images that they have in common, and say what is left out."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "dreambench"))

import evaluate  # noqa: E402
import table  # noqa: E402


def method(prompts: dict[str, dict[str, float]], images: int = 1, **tags) -> dict:
    """A method of scores.json, by the scores of its prompts, which are those of all metrics."""
    metrics = list(table.METRICS)
    of_prompts = {
        subject: {index: {"images": images} | dict.fromkeys(metrics, score) for index, score in own.items()}
        for subject, own in prompts.items()
    }
    means = {subject: sum(own.values()) / len(own) for subject, own in prompts.items()}
    mean = sum(means.values()) / len(means)
    totals = {metric: {"mean": mean, "low": mean, "high": mean} for metric in metrics}
    subjects = {subject: dict.fromkeys(metrics, score) for subject, score in means.items()}
    return totals | {"tags": tags, "subjects": subjects, "prompts": of_prompts}


def shown(tmp_path: Path, capsys, *more: str, **methods: dict) -> tuple[dict[str, list[str]], str]:
    """The table's rows by their first cells, and what stands below it."""
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"methods": methods}))
    table.main(table.parse_args([str(file), *more]))
    text, _, notes = capsys.readouterr().out.partition("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}, notes


def test_methods_are_compared_over_the_prompts_that_all_have(tmp_path, capsys):
    """All of one's images are of the easy prompt: over that prompt alone it is the worse one."""
    one, other = {"dog": {"0": 0.7}, "cat": {"1": 0.5}}, {"dog": {"0": 0.8, "1": 0.2}, "cat": {"0": 0.1, "1": 0.6}}
    rows, notes = shown(tmp_path, capsys, one=method(one), other=method(other))
    assert rows["one"][:2] == ["2", ".6000"] and rows["one"][-1] == "2"
    assert rows["other"][:2] == ["2 †", "**.7000**"] and rows["other"][-1] == "1"
    assert notes == "† Scores are over the prompts that all have images of: other has 2 more.\n"
    tex, remark = tmp_path / "t.tex", "prompts that all have images of: other has 2 more"
    table.main(table.parse_args([str(tmp_path / "scores.json"), "--format=latex", f"--output={tex}"]))
    assert remark in tex.read_text() and r"2 $\dagger$ & \textbf{.7000}" in tex.read_text()


def test_a_subject_without_a_common_prompt_is_left_out(tmp_path, capsys):
    one, other = {"dog": {"0": 0.7}, "cat": {"1": 0.5}}, {"dog": {"1": 0.9}, "cat": {"1": 0.6}}
    rows, notes = shown(tmp_path, capsys, one=method(one), other=method(other))
    assert (rows["one"][1], rows["other"][1]) == (".5000", "**.6000**")
    assert "over the subjects that all have, cat" in notes
    with pytest.raises(SystemExit, match="2"):
        shown(tmp_path, capsys, one=method({"dog": {"0": 0.7}}), other=method({"dog": {"1": 0.9}}))
    assert "no subject has scores of all of one, other" in capsys.readouterr().err


def test_images_count_as_evaluate_counts_them_and_different_numbers_are_told(tmp_path, capsys):
    """A subject's score is the mean over images: a prompt with three of them weighs three times as much."""
    uneven = method({"dog": {"0": 0.8, "1": 0.4, "2": 0.1}})
    uneven["prompts"]["dog"]["0"]["images"] = 3
    rows, notes = shown(tmp_path, capsys, uneven=uneven, even=method({"dog": {"0": 0.5, "1": 0.5}}))
    assert rows["uneven"][1] == "**.7000**"
    assert "different numbers of images: uneven 4, even 2" in notes
    assert rows["even"][0] == "1 †"


def test_evaluate_tells_the_scores_of_each_prompt():
    scores = [("dog", "subject", "0", 0.25), ("dog", "subject", "0", 0.75), ("dog", "subject", "3", 0.5)]
    scores += [("dog", "class", "3", 0.9), ("cat", "subject", "3", 0.1)]
    rows = []
    for subject, of, index, value in scores:
        row = {"subject": subject, "of": of, "prompt_index": index} | dict.fromkeys(table.METRICS, str(value))
        rows.append(row)
    means = dict.fromkeys(table.METRICS, 0.5)
    assert evaluate.prompt_scores(rows, "dog") == {"0": {"images": 2} | means, "3": {"images": 1} | means}


def test_a_method_in_no_group_is_told(tmp_path, capsys):
    methods = {"known": method({"dog": {"0": 0.5}}, backbone="sd15"), "lone": method({"dog": {"0": 0.4}})}
    _, notes = shown(tmp_path, capsys, "--group_by=backbone", **methods)
    assert "In no group, and ranked there among themselves: lone; give it a manifest.json" in notes
    assert shown(tmp_path, capsys, **methods)[1] == ""
