# SPDX-License-Identifier: Apache-2.0
"""Write one HTML page with the table, the trade-off plots and the images of every subject.

    python report.py results/scores.json --images_dir images --data_dir dreambench --output report.html
    python report.py results/scores.json --images_dir images --data_dir dreambench --output report.html --link

The page needs no server and no network. Images are put into it small, or with --link stay where they are and the page
refers to them. Its grids can be filtered by subject, prompt and method; the address then holds the filter.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import jinja2
import matplotlib
import table
from benchmark import Benchmark, HelpFormatter, UnreadableImage, image_files, read_benchmark, read_image
from PIL import Image
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)

matplotlib.rcParams["svg.hashsalt"] = "report"  # the same plot is the same file

HERE = Path(__file__).resolve().parent
TRADE_OFFS = (("clip_t", "clip_i"), ("clip_t", "dino"))


@dataclass(frozen=True)
class Cell:
    """The images of a method for a prompt, as addresses that an <img> understands."""

    prompt: str
    images: list[str]


@dataclass(frozen=True)
class Line:
    """A method's row in a subject's grid, with its scores there."""

    method: str
    scores: dict[str, str]
    cells: list[Cell]


@dataclass(frozen=True)
class Grid:
    """A subject: references, and a row a method with a column a prompt."""

    subject: str
    class_name: str
    references: list[str]
    prompts: list[str]
    lines: list[Line]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    table.add_arguments(parser)
    add("--images_dir", type=Path, required=True, help="METHOD/SUBJECT/PROMPT_INDEX/*.png below this")
    add("--data_dir", type=Path, required=True, help="DreamBench: a folder of references a subject")
    add("--prompts_file", type=Path, help="prompts and classes; DATA_DIR/prompts_and_classes.txt by default")
    add("--output", type=Path, default=Path("report.html"), help="the page")
    add("--title", default="Personalisation on DreamBench", help="of the page")
    add("--subjects", nargs="+", metavar="SUBJECT", help="only these, in this order")
    add("--images_per_prompt", type=int, default=1, help="shown in a cell, the first ones")
    add("--thumbnail", type=int, default=192, help="longer side of an embedded image at most, in pixels")
    add("--link", action="store_true", help="refer to the image files instead of embedding small copies")
    add("--figures", nargs="+", type=Path, metavar="PNG", help="show these instead of drawing the trade-off plots")
    args = parser.parse_args(arguments)
    for name in ("images_per_prompt", "thumbnail"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        args.methods_read = table.choose(table.read_methods(args.scores, args.group_by), args.methods)
        args.rows = table.rows_to_show(args.methods_read, args)
        args.benchmark = read_benchmark(args.data_dir, args.prompts_file)
        args.subjects = shown_subjects(args)
    except ValueError as error:
        parser.error(str(error))
    args.metrics = read_metrics(args.scores)
    missing = [figure for figure in args.figures or () if not figure.is_file()]
    if missing:
        parser.error(f"--figures: {missing[0]} is not there")
    return args


def shown_methods(args: argparse.Namespace) -> list[table.Method]:
    """Methods that have images: every seed by itself; printed numbers of others have none."""
    return [method for method in args.methods_read if (args.images_dir / method.name).is_dir()]


def shown_subjects(args: argparse.Namespace) -> list[str]:
    """Subjects that some method has images of. `ValueError`, one sentence, where there are none."""
    folders = [args.images_dir / method.name for method in shown_methods(args)]
    found = [s for s in args.benchmark.classes if any((folder / s).is_dir() for folder in folders)]
    unknown = [subject for subject in args.subjects or () if subject not in found]
    if unknown:
        raise ValueError(f"--subjects: no images of {unknown[0]} in {args.images_dir}; there are {', '.join(found)}")
    if not found:
        raise ValueError(f"--images_dir: {args.images_dir} has no images of the methods in {args.scores[0]}")
    return args.subjects or found


# --- Images -------------------------------------------------------------------------------------------------------


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def embedded(file: Path, longest: int) -> str:
    """A copy of at most `longest` pixels a side, within the address itself."""
    small = read_image(file)
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85, subsampling=0, optimize=True)
    return data_uri(buffer.getvalue(), "jpeg")


def linked(file: Path, page: Path) -> str:
    """The file's address relative to the page's folder."""
    return quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())


def address(args: argparse.Namespace, file: Path) -> str:
    """What stands in src for an image file."""
    return linked(file, args.output) if args.link else embedded(file, args.thumbnail)


# --- The page's parts ---------------------------------------------------------------------------------------------


def subject_grid(args: argparse.Namespace, subject: str) -> Grid:
    benchmark: Benchmark = args.benchmark
    prompts = benchmark.prompts(subject)
    lines = []
    for method in shown_methods(args):
        folder = args.images_dir / method.name / subject
        files = [image_files(folder / str(index))[: args.images_per_prompt] for index in range(len(prompts))]
        cells = [
            Cell(prompt, [address(args, file) for file in own]) for prompt, own in zip(prompts, files, strict=True)
        ]
        if any(files):
            own = method.subjects.get(subject, {})
            scores = {name: table.digits(own[metric]) for metric, name in table.ALL_METRICS.items() if metric in own}
            lines.append(Line(method.name, scores, cells))
    references = [address(args, file) for file in benchmark.references(subject)]
    return Grid(subject, benchmark.classes[subject], references, *without_empty_columns(prompts, lines))


def count_images(args: argparse.Namespace) -> int:
    """Images that the shown methods have of the shown subjects, in a cell or not."""
    folders = [args.images_dir / method.name / subject for method in shown_methods(args) for subject in args.subjects]
    return sum(len(image_files(index)) for folder in folders for index in folder.glob("*"))


def without_empty_columns(prompts: list[str], lines: list[Line]) -> tuple[list[str], list[Line]]:
    """Prompts that no method has images for are left out."""
    kept = [i for i in range(len(prompts)) if any(line.cells[i].images for line in lines)]
    shorter = [Line(line.method, line.scores, [line.cells[i] for i in kept]) for line in lines]
    return [prompts[i] for i in kept], shorter


def trade_off_plot(methods: Sequence[table.Method], x: str, y: str) -> str:
    """Metric y against metric x as an SVG in an address; a line joins methods that differ in w only."""
    series: dict[str, list[table.Method]] = {}
    for method in methods:
        if "w" in method.tags:
            rest = {name: value for name, value in method.tags.items() if name != "w"}
            series.setdefault(json.dumps([method.group, rest], sort_keys=True), []).append(method)
    figure, axis = plt.subplots(figsize=(4.8, 3.6 + 0.1 * len(methods)), layout="constrained")
    for members in series.values():
        ordered = sorted(members, key=lambda method: method.tags["w"])
        axis.plot([m.means[x] for m in ordered], [m.means[y] for m in ordered], color="0.7", zorder=1)
    for number, method in enumerate(methods):
        style = {"color": plt.get_cmap("tab10")(number % 10), "marker": "osD^vP"[number // 10 % 6]}
        axis.scatter(method.means[x], method.means[y], s=46, label=legend_text(method), zorder=2, **style)
    axis.set(xlabel=f"{table.METRICS[x]} (text alignment)", ylabel=table.METRICS[y])
    axis.locator_params(nbins=5)  # more labels would overlap
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return data_uri(buffer.getvalue(), "svg+xml")


def legend_text(method: table.Method) -> str:
    """The method's name and group. matplotlib hides what begins with an underscore and reads $ as mathematics."""
    return re.sub(r"^_", " _", f"{method.group} {method.name}".strip()).replace("$", r"\$")


def figures(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(address, description) of each plot."""
    if not args.figures:
        named = [(x, y, f"{table.METRICS[y]} against {table.METRICS[x]}, one point a method") for x, y in TRADE_OFFS]
        return [(trade_off_plot(args.rows, x, y), description) for x, y, description in named]
    return [
        (linked(file, args.output) if args.link else data_uri(file.read_bytes(), "png"), file.stem.replace("_", " "))
        for file in args.figures
    ]


def read_metrics(files: Sequence[Path]) -> dict[str, str]:
    """What the scores were measured with, as the first file of evaluate.py says."""
    written = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.suffix != ".csv"]
    return written[0].get("metrics", {}) if written else {}


def render(args: argparse.Namespace) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = table.columns(args.rows)
    grouped = table.groups(args.rows)
    grids = [subject_grid(args, subject) for subject in tqdm(args.subjects, desc="images", unit="subject")]
    return environment.get_template("report.html.j2").render(
        title=args.title,
        columns=list(shown.values()),
        groups={name: table.table_rows(rows, args.intervals, list(shown)) for name, rows in grouped.items()},
        intervals=args.intervals,
        models=", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in args.metrics.items() if value),
        figures=figures(args),
        grids=grids,
        methods=[method.name for method in shown_methods(args)],
        shown=sum(len(cell.images) for grid in grids for line in grid.lines for cell in line.cells),
        count=count_images(args),
        with_n=table.counts_subjects(args.rows),
        notes=table.notes(args.rows),
        linked=args.link,
    )


def main(args: argparse.Namespace) -> None:
    page = render(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(f".{args.output.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UnreadableImage as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
