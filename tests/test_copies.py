# SPDX-License-Identifier: Apache-2.0
"""The scripts share code by copying it; these tests make the copies a law."""

import re

import copies
import pytest

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in [copies.ORIGINAL, *copies.SCRIPTS]}
ORIGINAL = TEXTS[copies.ORIGINAL.name]
METHOD = ["adapters_disabled", "anchor_caption", "predict_anchors", "semantic_anchor_loss"]
others = pytest.mark.parametrize("script", [path.name for path in copies.SCRIPTS])


@others
def test_marked_copies_equal_the_original(script):
    assert copies.rewrite(TEXTS[script], ORIGINAL) == TEXTS[script], "run make copies"


@others
def test_identical_functions_are_marked(script):
    marks = copies.marked(TEXTS[script])
    same = [
        name
        for name in copies.definitions(TEXTS[script])
        if name in copies.definitions(ORIGINAL)
        and copies.source(TEXTS[script], name) == copies.source(ORIGINAL, name)
        and copies.source(ORIGINAL, name).count("\n") > 1
    ]
    assert [name for name in same if name not in marks] == []


@others
def test_the_method_is_shared(script):
    assert set(METHOD) <= set(copies.marked(TEXTS[script]))


@pytest.mark.parametrize("script", TEXTS)
def test_the_header_of_a_script_asks_for_what_requirements_ask_for(script):
    header = re.search(r"^# /// script\n(.*?)^# ///$", TEXTS[script], re.DOTALL | re.MULTILINE).group(1)
    header = "".join(line.removeprefix("#").removeprefix(" ") for line in header.splitlines(keepends=True))
    asked = re.findall(r'^    ["\'](.+)["\'],$', header, re.MULTILINE)
    lines = (copies.ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.replace('"', "'") for line in lines if line and not line.startswith("#")]
    assert sorted(asked) == sorted(wanted)


def test_a_changed_copy_is_found_and_mended():
    original = "def one():\n    return 1\n\n\n@cache\ndef two():\n    return 2\n"
    changed = "# Copied from train_sap_lora_sd15.two\n@cache\ndef two():\n    return 3\n\n\ndef one():\n    return 5\n"
    mended = copies.rewrite(changed, original)
    assert mended == changed.replace("return 3", "return 2")
    assert copies.marked(mended) == {"two": "two"}
