# SPDX-License-Identifier: Apache-2.0
"""The scripts share code by copying it; these tests make the copies a law, and the flags that scripts share too."""

import ast
import re

import copies
import pytest
from runner import parser_of

TEXTS = {script.name: script.read_text(encoding="utf-8") for script in copies.SCRIPTS}
SOURCES = {name: copies.sources(text) for name, text in TEXTS.items()}
SD15, *OTHERS = TEXTS
METHOD = {"adapters_disabled", "anchor_caption", "predict_anchors", "semantic_anchor_loss", "adapter_layers"}
FLAGS_THAT_DIFFER = {"resolution", "learning_rate", "adam_weight_decay", "output_dir"}


@pytest.mark.parametrize("script", copies.SCRIPTS, ids=lambda path: path.stem)
def test_what_scripts_share_is_identical(script):
    assert copies.rewritten()[script] == TEXTS[script.name], "run make copies"


@pytest.mark.parametrize("script", OTHERS)
def test_what_is_a_scripts_own_is_named_and_not_identical(script):
    own = copies.OWN[script]
    assert [name for name in own if SOURCES[script][name] == SOURCES[SD15][name]] == []
    assert METHOD & set(own) == set()
    assert SOURCES[script].keys() >= METHOD


@pytest.mark.parametrize("script", OTHERS)
def test_what_scripts_share_comes_in_the_same_order(script):
    shared = [name for name in SOURCES[script] if name in SOURCES[SD15]]
    assert shared == [name for name in SOURCES[SD15] if name in SOURCES[script]]


def test_a_changed_copy_is_found_and_mended():
    originals = copies.sources(
        "ONE, TWO = 1, 2\n\n\n@cache\ndef two():\n    return 2\n\n\ndef three():\n    return 3\n"
    )
    changed = "@cached\ndef two():\n    return 5\n\n\nONE, TWO = 1, 3\n\n\ndef three():\n    return 4\n\n\nMY = 1\n"
    mended = copies.rewrite(changed, originals, ["three"])
    expected = changed.replace("@cached", "@cache").replace("return 5", "return 2").replace("= 1, 3", "= 1, 2")
    assert mended == expected


@pytest.mark.parametrize("script", OTHERS)
def test_flags_that_two_scripts_share_are_the_same(script):
    ours, theirs = (
        {
            action.dest: (action.option_strings, action.type and action.type.__name__, action.default,
                          action.choices, action.nargs, action.const, action.required, action.help)
            for action in parser_of(name.removesuffix(".py"))._actions
        }
        for name in (SD15, script)
    )  # fmt: skip
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} <= FLAGS_THAT_DIFFER
    assert len(ours.keys() & theirs.keys()) > 70


@pytest.mark.parametrize("script", TEXTS)
def test_the_header_of_a_script_asks_for_what_requirements_ask_for(script):
    header = re.search(r"^# /// script\n(.*?)^# ///$", TEXTS[script], re.DOTALL | re.MULTILINE).group(1)
    header = "".join(line.removeprefix("#").removeprefix(" ") for line in header.splitlines(keepends=True))
    asked = ast.literal_eval(header.split("dependencies = ")[1])
    lines = (copies.ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.replace('"', "'") for line in lines if line and not line.startswith("#")]
    assert sorted(asked) == sorted(wanted)
