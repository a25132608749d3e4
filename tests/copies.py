# SPDX-License-Identifier: Apache-2.0
"""Keep what the scripts share identical: `python tests/copies.py` rewrites it as train_sap_lora_sd15.py has it.

What is defined at the top level under one name is the same in all scripts, but for what `OWN` lists.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / f"train_sap_lora_{base}.py" for base in ("sd15", "sdxl", "sd3")]
# What of sd15's a script has in another form, since its base asks for it.
OF_EVERY_BASE = """PIPELINE_CLASS TRAINABLE_TEXT_ENCODERS BASE_PARTS FOREIGN_PARTS BASE_KIND UNUSED_PARTS TRACKER
    RESOLUTION,LEARNING_RATE,WEIGHT_DECAY,OUTPUT_DIR FLAGS_OF_BASE mistakes_of_base describe_base MicroStep diffuse
    to_target_space denoise scale_latents encode_prompts encode_for_sampling training_scheduler sampling_scheduler
    load_text_pipeline""".split()
OWN = {
    "train_sap_lora_sd15.py": [],
    "train_sap_lora_sdxl.py": [
        *OF_EVERY_BASE, "KOHYA_PREFIXES", "draw_micro_step", "vae_source", "kohya_name", "base_version",
    ],
    "train_sap_lora_sd3.py": [
        *OF_EVERY_BASE, "DENOISER_CLASS,DENOISER", "DENOISER_TARGETS", "LATENT_STRIDE", "FINAL_SAMPLING",
        "REPEATED_BLOCK", "LATENT_SCALE", "lora_targets", "write_loras",
    ],
}  # fmt: skip


def definitions(text: str) -> dict[str, tuple[int, int]]:
    """What is defined at the top level, by name, with its first and last line, counted from 0, decorators included."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = (first - 1, node.end_lineno)
        elif isinstance(node, ast.Assign):
            names = ast.unparse(node.targets[0]).strip("()").replace(" ", "")
            found[names] = (node.lineno - 1, node.end_lineno)
    return found


def sources(text: str) -> dict[str, str]:
    """The source of every definition."""
    lines = text.splitlines()
    return {name: "\n".join(lines[first:last]) for name, (first, last) in definitions(text).items()}


def rewrite(text: str, originals: dict[str, str], own: list[str]) -> str:
    """`text` with the original's source of every definition that has an original and is not its own."""
    lines = text.splitlines()
    for name, (first, last) in reversed(definitions(text).items()):
        if name in originals and name not in own:
            lines[first:last] = originals[name].splitlines()
    return "\n".join(lines) + "\n"


def rewritten() -> dict[Path, str]:
    """What every script should be. The original of a definition is that of the first script that has it."""
    originals, found = {}, {}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        found[script] = rewrite(text, originals, OWN[script.name])
        originals = sources(found[script]) | originals
    return found


if __name__ == "__main__":
    for script, text in rewritten().items():
        if text != script.read_text(encoding="utf-8"):
            script.write_text(text, encoding="utf-8")
            print(f"{script.name}: brought in line with train_sap_lora_sd15.py")
