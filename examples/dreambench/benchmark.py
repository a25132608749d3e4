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
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from PIL import Image

PROMPTS_FILE = "prompts_and_classes.txt"
CLASS_FOLDER = "class"  # below IMAGES/METHOD/SUBJECT: pictures of the class prompts
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


def path(text: str) -> Path:
    """A flag's value as a path, in which "~" is the home folder, also behind a "=" where no shell expands it."""
    return Path(text).expanduser()


def model_name(text: str) -> str:
    """A name on the hub as it is, or a local folder as `path` reads it."""
    return str(path(text)) if text.startswith("~") else text


def read_text(file: Path) -> str:
    """A file's text. `ValueError`, one sentence, where it is not there, no ordinary file, or not UTF-8."""
    if not file.is_file():  # a pipe would be waited for
        what = "is not an ordinary file" if file.exists() else "is not there"
        raise ValueError(f"{file} {what}")
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8") from error


def read_json(file: Path) -> dict:
    """The object that a JSON file holds. `ValueError`, one sentence, for any other file, and for NaN and infinity."""
    try:
        content = json.loads(read_text(file), parse_constant=not_json)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (it holds no JSON object): make it again")
    return content


def not_json(constant: str) -> None:
    raise json.JSONDecodeError(f"{constant} is no number", constant, 0)


def write_json(file: Path, content: object) -> None:
    """Write JSON as `write_file` does."""
    write_file(file, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, and make its folder; a device or a pipe is written into.

    Raises:
        ValueError: one sentence, where the place is a folder or cannot be written to.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if file.exists() and not file.is_file():
            file.write_bytes(data)  # a folder refuses it
            return
        target = file.resolve()  # what a link points to, and not the link, is replaced
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, data)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror or error}") from error


def replace_file(file: Path, data: bytes) -> None:
    """Write beside a file, then rename; where that fails, nothing is left beside it."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def image_files(folder: Path) -> list[Path]:
    """Pictures directly in a folder, by name; what is hidden or no ordinary file is left out."""
    if not folder.is_dir():
        return []
    named = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(file for file in named if file.is_file() and not file.name.startswith("."))


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
    if not file.exists():
        raise ValueError(f"{file} is not there: it has DreamBench's classes and prompts, and comes with its pictures")
    text = read_text(file)
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
    """Raise `ValueError`, which begins with `what`, for a name that is not that of a folder within another one.

    It is also a cell of tables: a spreadsheet would compute what begins like a formula, and "|" ends a cell.
    """
    if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
        raise ValueError(f'{what} "{name}" is no name for a folder: leave slashes and leading dots out')
    if name[0] in "=+-@" or "|" in name:
        raise ValueError(f'{what} "{name}" would break tables: begin with a letter or a number, and leave "|" out')


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
