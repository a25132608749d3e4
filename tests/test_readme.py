# SPDX-License-Identifier: Apache-2.0
"""The pages hold: README's commands and snippet run, on tiny models for real ones; what pages name is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import flags_page
import pytest
import tiny_pipelines
import yaml
from runner import LORA_FILE, ROOT, launch, reset

README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN_PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ALL_PAGES = [*OWN_PAGES, *sorted((ROOT / "examples").rglob("*.md"))]
BASES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_pipelines.save_sd15,
    "stabilityai/stable-diffusion-xl-base-1.0": tiny_pipelines.save_sdxl,
    "stabilityai/stable-diffusion-3-medium-diffusers": tiny_pipelines.save_sd3,
}
# What a CPU and a test's patience ask for; everything else in a command stays as the README says it.
SUBSTITUTES = {"--resolution": "64", "--max_train_steps": "2", "--mixed_precision": "no"}
# Flags on the pages that are other programs'.
FOREIGN_FLAGS = {"--num_processes", "--quiet", "--help"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def split(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def commands() -> list[str]:
    """The README's shell commands, each on one line."""
    return [line for line in "".join(blocks("bash")).replace("\\\n", " ").splitlines() if split(line)]


TRAINING = [command for command in commands() if "train_sap_lora_" in command]
OTHERS = [command for command in commands() if "train_sap_lora_" not in command]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save(folder / name.replace("/", "_")) for name, save in BASES.items()}


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with photos in `dog`, as the README's reader has it, which is the working directory."""
    tiny_pipelines.save_photos(tmp_path / "dog")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def substituted(command: str, bases: dict[str, Path]) -> tuple[str, list[str]]:
    """The script's name and its arguments, on tiny models and for few steps."""
    words = split(command)
    position = next(i for i, word in enumerate(words) if word.startswith("train_sap_lora_"))
    arguments = words[position + 1 :]
    for i, word in enumerate(arguments):
        if arguments[i - 1] in SUBSTITUTES:
            arguments[i] = SUBSTITUTES[arguments[i - 1]]
        elif word in bases:
            arguments[i] = str(bases[word])
    return words[position].removesuffix(".py"), arguments


def test_the_readme_trains_every_base_with_the_same_settings():
    scripts = {re.search(r"train_sap_lora_\w+", command)[0] for command in TRAINING}
    assert scripts == {"train_sap_lora_sd15", "train_sap_lora_sdxl", "train_sap_lora_sd3"}
    for command in TRAINING:
        words = split(command)
        settings = {words[words.index(flag) + 1] for flag in ("--rank", "--learning_rate", "--max_train_steps")}
        assert settings == {"16", "1e-4", "500"}, command


@pytest.mark.parametrize("command", TRAINING, ids=range(len(TRAINING)))
def test_a_training_command_trains(command, bases, desk):
    script, arguments = substituted(command, bases)
    launch(script, arguments, cwd=desk)
    output = desk / arguments[arguments.index("--output_dir") + 1]
    assert (output / LORA_FILE).is_file()
    kohya_file = output / "pytorch_lora_weights_kohya.safetensors"
    assert kohya_file.is_file() == (script != "train_sap_lora_sd3")


@pytest.mark.parametrize("command", OTHERS, ids=range(len(OTHERS)))
def test_another_command_means_something_here(command):
    """`make` targets and the files that commands name are there; examples show their help."""
    words = split(command)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:3] == ["pip", "install", "-r"]:
        assert (ROOT / words[3]).is_file()
    elif words[:2] == ["git", "clone"]:
        assert OTHERS[OTHERS.index(command) + 1] == f"cd {words[3]}"
    elif words[0] == "cd":
        assert OTHERS[OTHERS.index(command) - 1].startswith("git clone")
    elif words[0] == "python":
        subprocess.run([sys.executable, words[1], "--help"], cwd=ROOT, check=True, capture_output=True)
    else:
        pytest.fail(f"no test knows what to do with: {command}")


def test_the_snippet_runs_on_what_the_first_command_trained(bases, desk):
    script, arguments = substituted(TRAINING[0], bases)
    module = __import__(script)
    reset()
    module.main(module.parse_args(arguments))
    for snippet in blocks("python"):
        for name, folder in bases.items():
            snippet = snippet.replace(name, str(folder))
        exec(snippet.replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32"), {})
    assert (desk / "dog.png").is_file()


def test_the_demo_installs_only_what_it_needs(tmp_path):
    """Its packages are lines of requirements.txt, so that versions agree, but for the one that draws its figures."""
    lines = {
        name: set((ROOT / name).read_text().splitlines()) for name in ("requirements.txt", "requirements-demo.txt")
    }
    own = lines["requirements-demo.txt"] - lines["requirements.txt"]
    assert [line for line in own if not line.startswith(("#", "matplotlib"))] == []
    command = ["make", "--dry-run", "demo", f"VENV={tmp_path / 'venv'}"]
    planned = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "requirements-demo.txt" in planned
    assert "requirements-dev.txt" not in planned


def test_the_flags_page_is_what_the_parsers_say():
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page(), "run `make docs`"


def test_flags_on_the_pages_exist():
    known = set(re.findall(r"`(--\w+)`", flags_page.PAGE.read_text(encoding="utf-8"))) | FOREIGN_FLAGS
    for example in (ROOT / "examples").rglob("*.py"):
        known |= set(re.findall(r"add_argument\(\s*\"(--\w+)\"", example.read_text(encoding="utf-8")))
    for page in OWN_PAGES:
        unknown = set(re.findall(r"(?<![\w-])--\w+", page.read_text(encoding="utf-8"))) - known
        assert unknown == set(), page


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize("page", OWN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    """Such as `test_resume.py` or examples/sap_anchor.py, by its path or the end of it."""
    there = [f"/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("[!.]*/**/*.*")]
    there += [f"/{path.name}" for path in ROOT.iterdir()]
    for name in re.findall(r"(?<![\w/.-])[\w/-]+\.(?:py|md|sh|cff|ipynb)\b", page.read_text(encoding="utf-8")):
        assert any(path.endswith(f"/{name}") for path in there), name


def test_the_paper_is_cited_alike():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = citation["references"]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    assert f"author = {{{authors}}}" in README
    assert f"title = {{{paper['title']}}}" in README
    assert citation["license"] == "Apache-2.0"


def test_the_workflow_runs_the_tests_on_every_python_that_the_readme_names():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["tests"]
    assert "make lint test" in [step.get("run") for step in job["steps"]]
    first, last = re.search(r"Python (3\.\d+) to (3\.\d+)", README).groups()
    pythons = job["strategy"]["matrix"]["python"]
    assert (pythons[0], pythons[-1]) == (first, last)
