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
    assert [name for name in own if SOURCES[script][name] == SOURCES[SD15].get(name)] == []
    assert [name for name in copies.LACKS[script] if name in SOURCES[script] or name not in SOURCES[SD15]] == []
    assert METHOD & set(own) == set()
    assert SOURCES[script].keys() >= METHOD


@pytest.mark.parametrize("script", OTHERS)
def test_what_scripts_share_comes_in_the_same_order(script):
    shared = [name for name in SOURCES[script] if name in SOURCES[SD15]]
    assert shared == [name for name in SOURCES[SD15] if name in SOURCES[script]]


ORIGINAL = '''"""Words."""

import os

# ---- One ----

ONE = 1
# Why there are two.
TWO = 2


@cache
def two():
    return 2


# ---- Two ----


def helper():
    return os.sep


def three():
    return helper() + str(TWO)


if __name__ == "__main__":
    three()
'''


def test_a_changed_copy_is_found_and_mended_with_its_comment():
    changed = ORIGINAL.replace("@cache", "@cached").replace("return 2", "return 5").replace("Why there are", "No")
    changed = changed.replace("ONE = 1", "ONE = 3").replace("    three()", "    pass")
    assert copies.rewrite(changed, ORIGINAL, [], []) == ORIGINAL
    assert "ONE = 3" in copies.rewrite(changed, ORIGINAL, ["ONE"], [])


@pytest.mark.parametrize(
    "lacking",
    [
        "# Why there are two.\nTWO = 2\n",
        "@cache\ndef two():\n    return 2\n\n\n",
        "def helper():\n    return os.sep\n\n\n",
        '\n\nif __name__ == "__main__":\n    three()\n',
    ],
)
def test_what_a_script_lacks_is_copied_into_its_place(lacking):
    assert lacking in ORIGINAL
    text = copies.rewrite(ORIGINAL.replace(lacking, "", 1), ORIGINAL, [], [])
    assert copies.definitions(text) == copies.definitions(ORIGINAL)
    assert text.split() == ORIGINAL.split()


def test_what_a_script_does_not_need_is_not_copied():
    (name,) = ("helper",)
    without = ORIGINAL.replace("def helper():\n    return os.sep\n\n\n", "")
    assert copies.rewrite(without, ORIGINAL, [], [name]) == without


def test_a_copy_that_uses_what_the_script_has_not_is_told():
    for gone, name in (("import os\n", "os"), ("def helper():\n    return os.sep\n\n\n", "helper")):
        lacks = ["helper"] if name == "helper" else []
        text = copies.rewrite(ORIGINAL.replace(gone, ""), ORIGINAL, [], lacks)
        with pytest.raises(copies.NotCopied, match=f"uses {name}, which x.py neither imports nor defines"):
            copies.check("x.py", text, ORIGINAL, [], lacks)
    copies.check("x.py", ORIGINAL, ORIGINAL, [], [])


def test_a_definition_that_one_script_has_alone_must_be_named():
    text = ORIGINAL + "\n\ndef my_own():\n    pass\n"
    with pytest.raises(copies.NotCopied, match="only x.py has my_own"):
        copies.check("x.py", text, ORIGINAL, [], [])
    copies.check("x.py", text, ORIGINAL, ["my_own"], [])


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
