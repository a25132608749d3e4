# SPDX-License-Identifier: Apache-2.0
"""Keep what the scripts share identical: `python tests/copies.py` rewrites it as train_sap_lora_sd15.py has it.

What stands at the top level under one name is the same in all scripts, with the comment above it, but for what `OWN`
lists. What a script lacks is copied into it, but for what `LACKS` lists. Imports are not copied: a copy that uses a
name which the other script has not is told, and nothing is written.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / f"train_sap_lora_{base}.py" for base in ("sd15", "sdxl", "sd3")]
# What of sd15's a script has in another form, since its base asks for it.
OF_EVERY_BASE = """PIPELINE_CLASS TRAINABLE_TEXT_ENCODERS BASE_PARTS FOREIGN_PARTS BASE_KIND UNUSED_PARTS TRACKER
    LEARNING_RATE WEIGHT_DECAY FLAGS_OF_BASE check_base_flags describe_base MicroStep diffuse denoise
    to_target_space scale_latents encode_prompts encode_for_sampling training_scheduler sampling_scheduler
    load_text_pipeline""".split()
# And what a script alone has, in the lines after those.
OWN = {
    "train_sap_lora_sd15.py": [],
    "train_sap_lora_sdxl.py": [
        *OF_EVERY_BASE, "RESOLUTION", "KOHYA_PREFIXES", "draw_micro_step", "vae_source", "kohya_name", "base_version",
        "EDM_SCHEDULERS", "is_edm", "diffuse_edm", "edm_coefficients", "size_conditioning", "STABILITY_BLOCK",
        "STABILITY_SLOTS", "STABILITY_NAMES", "stability_name",
    ],
    "train_sap_lora_sd3.py": [
        *OF_EVERY_BASE, "DENOISER_CLASS", "DENOISER", "DENOISER_TARGETS", "LATENT_STRIDE", "FINAL_SAMPLING",
        "REPEATED_BLOCK", "LATENT_SCALE", "OUTPUT_DIR", "lora_targets", "write_loras",
        "TextPipeline", "transformer_config", "absent_parts", "BLOCKS",
    ],
}  # fmt: skip
# What of sd15's a script does not need.
LACKS = {
    "train_sap_lora_sd15.py": [],
    "train_sap_lora_sdxl.py": [],
    "train_sap_lora_sd3.py": [
        "KOHYA_PREFIXES", "KOHYA_PARTS", "min_snr_weights", "kohya_state", "kohya_name", "write_kohya_lora",
        "lora_metadata", "base_version", "fitting_sampler",
    ],
}  # fmt: skip


class NotCopied(Exception):
    """What cannot be brought in line without a decision."""


def name_of(node: ast.stmt) -> str:
    """What a statement at the top level is called: its definition's or variable's name, or else its first line."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]).strip("()").replace(" ", "")
    return ast.unparse(node).split("\n")[0]


def definitions(text: str) -> dict[str, tuple[int, int]]:
    """What stands at the top level, by name, with its first and last line, counted from 0: decorators and the comment
    directly above belong to it. The docstring and imports are left out."""
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
        while lines[first - 1].startswith("#") and not is_heading(lines[first - 1]):
            first -= 1
        found[name_of(node)] = (first, node.end_lineno)
    return found


def is_heading(line: str) -> bool:
    """Whether a line opens a section of a script."""
    return line.startswith("# ----")


def sources(text: str) -> dict[str, str]:
    """The source of every definition."""
    lines = text.splitlines()
    return {name: "\n".join(lines[first:last]) for name, (first, last) in definitions(text).items()}


def rewrite(text: str, original: str, own: list[str], lacks: list[str]) -> str:
    """`text` with the definitions that `original` has, but for its own ones and those that it does without."""
    wanted = {name: source for name, source in sources(original).items() if name not in [*own, *lacks]}
    lines = text.splitlines()
    for name, (first, last) in reversed(definitions(text).items()):
        if name in wanted:
            lines[first:last] = wanted[name].splitlines()
    text = "\n".join(lines) + "\n"
    known = definitions(text)
    for name in wanted:
        if name not in known:
            text = inserted(text, original, name)
    return text


def inserted(text: str, original: str, name: str) -> str:
    """`text` with one definition more, beside the neighbour that it has in `original`: the one before it, or, where a
    section begins between the two, the one after it."""
    theirs = definitions(original)
    ours = definitions(text)
    order = list(theirs)
    place = order.index(name)
    lines, their_lines = text.splitlines(), original.splitlines()
    first, last = theirs[name]
    source = their_lines[first:last]
    before = next((other for other in reversed(order[:place]) if other in ours), None)
    after = next((other for other in order[place + 1 :] if other in ours), None)
    between = their_lines[theirs[before][1] : first] if before is not None else ["# ----"]
    if after is not None and any(is_heading(line) for line in between):
        gap = their_lines[last : theirs[order[place + 1]][0]]
        lines[ours[after][0] : ours[after][0]] = [*source, *(line for line in gap if not line)]
    else:
        gap = their_lines[theirs[order[place - 1]][1] : first]
        lines[ours[before][1] : ours[before][1]] = [*(line for line in gap if not line), *source]
    return "\n".join(lines) + "\n"


def known_names(text: str) -> set[str]:
    """The names that a script defines or imports at its top level."""
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        else:
            found |= {inner.id for inner in ast.walk(node) if is_stored(inner)}
    return found


def is_stored(node: ast.AST) -> bool:
    """Whether a node is a name that is given a value."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def used_names(source: str) -> set[str]:
    """The names that a definition takes from elsewhere: all but its own variables and arguments."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    own = {node.id for node in nodes if is_stored(node)} | {node.arg for node in nodes if isinstance(node, ast.arg)}
    return names - own


def check(name: str, text: str, original: str, own: list[str], lacks: list[str]) -> None:
    """Raise `NotCopied` for a definition that only `text` has, unnamed, or whose copy uses a name that it has not."""
    theirs = definitions(original)
    alone = [one for one in definitions(text) if one not in theirs and one not in own]
    if alone:
        raise NotCopied(f"only {name} has {', '.join(alone)}: remove it, or name it in OWN")
    unknown = known_names(original) - known_names(text)
    for one, source in sources(original).items():
        missing = used_names(source) & unknown
        if one not in [*own, *lacks] and missing:
            raise NotCopied(f"{one} uses {', '.join(sorted(missing))}, which {name} neither imports nor defines")


def rewritten() -> dict[Path, str]:
    """What every script should be; raises `NotCopied`."""
    first, *others = SCRIPTS
    original = first.read_text(encoding="utf-8")
    found = {first: original}
    for script in others:
        choices = (OWN[script.name], LACKS[script.name])
        found[script] = rewrite(script.read_text(encoding="utf-8"), original, *choices)
        check(script.name, found[script], original, *choices)
    return found


if __name__ == "__main__":
    try:
        for script, text in rewritten().items():
            if text != script.read_text(encoding="utf-8"):
                script.write_text(text, encoding="utf-8")
                print(f"{script.name}: brought in line with train_sap_lora_sd15.py")
    except NotCopied as error:
        sys.exit(f"Nothing is written: {error}")
