# SPDX-License-Identifier: Apache-2.0
"""Keep what the scripts share identical: `python tests/copies.py` rewrites every marked copy from its original.

A copy is a function, class or constant at the top level with the line `# Copied from train_sap_lora_sd15.<name>` above
it. The original is found by that name in train_sap_lora_sd15.py.
"""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL = ROOT / "train_sap_lora_sd15.py"
SCRIPTS = [path for path in sorted(ROOT.glob("train_sap_lora_*.py")) if path != ORIGINAL]
MARK = re.compile(r"# Copied from train_sap_lora_sd15\.(\w+)$")


@functools.lru_cache
def definitions(text: str) -> dict[str, tuple[int, int]]:
    """Names defined at the top level, with their first and last line, counted from 0, decorators included."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = (first - 1, node.end_lineno)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = (node.lineno - 1, node.end_lineno)
    return found


def source(text: str, name: str) -> str:
    """The source of one top-level definition."""
    first, last = definitions(text)[name]
    return "\n".join(text.splitlines()[first:last])


def marked(text: str) -> dict[str, str]:
    """Names of the definitions that are marked as copies, with the names of their originals."""
    lines, found = text.splitlines(), {}
    for name, (first, _) in definitions(text).items():
        mark = MARK.match(lines[first - 1]) if first else None
        if mark:
            found[name] = mark.group(1)
    return found


def rewrite(text: str, original: str) -> str:
    """`text` with each marked copy replaced by the original's source."""
    for name, origin in marked(text).items():
        lines = text.splitlines()
        first, last = definitions(text)[name]
        lines[first:last] = source(original, origin).splitlines()
        text = "\n".join(lines) + "\n"
    return text


if __name__ == "__main__":
    for script in SCRIPTS:
        before = script.read_text(encoding="utf-8")
        after = rewrite(before, ORIGINAL.read_text(encoding="utf-8"))
        if after != before:
            script.write_text(after, encoding="utf-8")
            print(f"{script.name}: copies rewritten")
