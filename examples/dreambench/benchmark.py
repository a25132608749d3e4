# SPDX-License-Identifier: Apache-2.0
"""The benchmark's files: subjects, classes, references and prompts in DreamBench's layout.

    DATA/SUBJECT/*.jpg                 references
    DATA/prompts_and_classes.txt       a table "subject_name,class" and one or two lists of prompts

Prompts hold {0} for the token and {1} for the class. Where there are two lists, the one under a heading with "Live" is
for cats and dogs, the other for everything else, as in DreamBench.
"""

import argparse
import ast
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from PIL import Image

PROMPTS_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = {"cat", "dog"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for odd files


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of a flag where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        empty = action.default is None or action.default is False or action.default == []
        return action.help if empty else super()._get_help_string(action)


class UnreadableImage(ValueError):
    """A file that is named like an image and is none, breaks off, or would fill the memory."""


@dataclass(frozen=True)
class Benchmark:
    """A folder of subjects with the classes and prompt templates of its text file."""

    folder: Path
    classes: dict[str, str]
    object_prompts: list[str]
    live_prompts: list[str]

    def templates(self, subject: str) -> list[str]:
        """The subject's prompts with {0} for the token and {1} for the class; `KeyError` for an unknown subject."""
        return self.live_prompts if self.classes[subject] in LIVE_CLASSES else self.object_prompts

    def prompts(self, subject: str, token: str = "") -> list[str]:
        """The subject's prompts. Without a token they speak of the class alone: "a dog in the snow"."""
        filled = (template.format(token, self.classes[subject]) for template in self.templates(subject))
        return [" ".join(prompt.split()) for prompt in filled]

    def references(self, subject: str) -> list[Path]:
        """The subject's pictures by name; none where there is no such folder."""
        return image_files(self.folder / subject)

    def subjects(self) -> list[str]:
        """Subjects of the text file that have references here: a part of DreamBench will do."""
        return [subject for subject in self.classes if self.references(subject)]


def load_script(file: Path) -> ModuleType:
    """A script as a module, whatever folder it stands in."""
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def image_files(folder: Path) -> list[Path]:
    """Pictures directly in a folder, by name; hidden files are left out."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))


def check_image(file: Path) -> None:
    """`UnreadableImage` for what is no image; reads the header only, which is quick."""
    try:
        Image.open(file).close()
    except UNREADABLE as error:
        raise UnreadableImage(f"{file} is not an image: delete it or make it again ({error})") from error


def read_image(file: Path) -> Image.Image:
    """The whole image in RGB; `UnreadableImage` where it breaks off."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise UnreadableImage(f"{file} is damaged: delete it or make it again ({error})") from error


def read_benchmark(folder: Path, prompts_file: Path | None = None) -> Benchmark:
    """Read the text file of a DreamBench folder. `ValueError`, one sentence, where it cannot be understood."""
    file = prompts_file or folder / PROMPTS_FILE
    if not file.is_file():
        raise ValueError(f"{file} is not there: it has DreamBench's classes and prompts, and comes with its pictures")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8") from error
    classes = read_classes(text)
    lists = read_prompt_lists(text)
    if not classes:
        raise ValueError(f'{file} has no table of classes: a line "subject_name,class", then one line a subject')
    if not lists:
        raise ValueError(f'{file} has no prompts: a list "prompt_list = [...]" of strings with {{0}} and {{1}}')
    for name in classes:
        check_name(name, f"{file}: the subject")
    for template in (template for _, templates in lists for template in templates):
        if re.search("[{}]", re.sub(r"\{[01]\}", "", template)):
            raise ValueError(
                f'{file}: the prompt "{template}" may hold {{0}}, the token, and {{1}}, but no other braces'
            )
    live = next((prompts for heading, prompts in lists if "live" in heading.lower()), lists[0][1])
    other = next((prompts for heading, prompts in lists if "live" not in heading.lower()), live)
    return Benchmark(folder, classes, other, live)


def check_name(name: str, what: str) -> None:
    """Raise `ValueError`, which begins with `what`, for a name that is not that of a folder within another one."""
    if name in (".", "..") or Path(name).name != name:
        raise ValueError(f'{what} "{name}" is no name for a folder: leave slashes and leading dots out')


def read_classes(text: str) -> dict[str, str]:
    """The lines under "subject_name,class", up to an empty one, as {subject: class}."""
    table = re.search(r"^subject_name,\s*class[ \t]*\n((?:[^\n]*\S[^\n]*\n?)*)", text, re.MULTILINE)
    rows = [line.split(",", 1) for line in table[1].splitlines()] if table else []
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}


def read_prompt_lists(text: str) -> list[tuple[str, list[str]]]:
    """(heading, templates) of each "prompt_list = [...]": its strings are read, nothing in it is executed."""
    lists = []
    for match in re.finditer(r"^prompt_list\s*=\s*(\[.*?^\s*\])", text, re.MULTILINE | re.DOTALL):
        above = text[: match.start()].split("\n")
        heading = next((line for line in reversed(above) if line.strip()), "")
        try:
            strings = ast.walk(ast.parse(match[1].strip(), mode="eval"))
        except SyntaxError as error:
            raise ValueError(f'the prompt list under "{heading}" is not a Python list: {error}') from error
        prompts = [node.value for node in strings if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        lists.append((heading, prompts))
    return [(heading, prompts) for heading, prompts in lists if prompts]
