# SPDX-License-Identifier: Apache-2.0
"""Writes docs/flags.md, the flags of the three scripts, from their parsers: `make docs`."""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "flags.md"
BASES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3"}
HEAD = """<!-- SPDX-License-Identifier: Apache-2.0 -->
# Flags

Written by `make docs` from the parsers of the three scripts; `--help` shows the same. Those marked "ours" are not in
diffusers' DreamBooth-LoRA examples, all others are. Where a base is named, the flag or the default is of this base
only.
"""


def upstream_flags() -> set[str]:
    """The flags of diffusers' examples, of all three together."""
    scripts = json.loads((ROOT / "tests" / "upstream_flags.json").read_text(encoding="utf-8"))
    return {name for flags in scripts.values() for flag in flags for name in flag["option_strings"]}


def groups_of(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """The flags under each heading of `--help`."""
    found = {}
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            found[group.title] = actions
    return found


def default_of(action: argparse.Action) -> str:
    """How the page shows a default: nothing where the flag is a switch or has none."""
    if action.required:
        return "required"
    if action.default is None or action.default is False:
        return ""
    return str(action.default)


def meaning_of(action: argparse.Action) -> str:
    """The flag's help without the default, which has a column, and with its choices."""
    text = re.sub(r" \(default: [^()]*\)$", "", action.help)
    if action.choices is not None:
        text += f" One of {', '.join(action.choices)}."
    return text.replace("|", r"\|").replace("%%", "%")


def row(flag: str, actions: dict[str, argparse.Action], upstream: set[str]) -> str:
    """A line of the table for a flag, from its action in each script that has it."""
    first = next(iter(actions))
    default = default_of(actions[first])
    meaning = meaning_of(actions[first])
    if len({default_of(action) for action in actions.values()}) > 1:
        default = ", ".join(f"{BASES[base]} {default_of(action)}" for base, action in actions.items())
    if len(actions) < len(BASES):
        meaning = f"{' and '.join(BASES[base] for base in actions)} only: {meaning}"
    ours = "" if flag in upstream else "ours"
    return f"| `{flag}` | {default} | {meaning} | {ours} |"


def page() -> str:
    """The whole page."""
    sys.path.insert(0, str(ROOT))
    upstream = upstream_flags()
    sections: dict[str, dict[str, dict[str, argparse.Action]]] = {}
    for base in BASES:
        parser = importlib.import_module(f"train_sap_lora_{base}").make_parser()
        for title, actions in groups_of(parser).items():
            section = sections.setdefault(title, {})
            for action in actions:
                section.setdefault(action.option_strings[-1], {})[base] = action
    lines = [HEAD]
    for title, flags in sections.items():
        lines += [f"## {title}\n", "| flag | default | | |", "|---|---|---|---|"]
        lines += [row(flag, actions, upstream) for flag, actions in flags.items()]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Written: {PAGE.relative_to(ROOT)}")
