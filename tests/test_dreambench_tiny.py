# SPDX-License-Identifier: Apache-2.0
"""The experiments on the tiny world, in miniature, and the numbers of their report on made-up data."""

import csv
import importlib
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from runner import ROOT

FOLDER = ROOT / "examples" / "experiments"
WORLD = ROOT / "examples" / "tiny_world"


@pytest.fixture(scope="module")
def scripts():
    """The example's modules, which import one another by name."""
    sys.path[:0] = [str(FOLDER), str(ROOT / "examples" / "dreambench")]
    names = ["benchmark", "generate", "neighbours", "evaluate", "table"]
    names += ["tiny_numbers", "tiny_plan", "tiny_tables", "tiny_experiments", "tiny_report"]
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def args(scripts, tmp_path_factory):
    output = tmp_path_factory.mktemp("tiny")
    return scripts["tiny_experiments"].parse_args(["--backbone=sd15", f"--output_dir={output}"])


# --- The plan -----------------------------------------------------------------------------------------------------


def test_the_core_has_every_subject_with_every_seed(scripts, args):
    tiny = scripts["tiny_experiments"]
    runs = {run.name: run for run in tiny.planned()["core"]}
    assert set(runs) == {"w0-pretrained", "w0.5-pretrained", "w1-pretrained", "w0.5-finetuned", "prior"}
    assert all(list(tiny.seeds_of(run, args)) == [0, 1, 2] for run in runs.values())
    assert all(len(tiny.subjects_of(run, args)) == 8 for run in runs.values())
    assert all(set(run.early) <= set(run.kept) for run in runs.values())
    anchored = [runs[name] for name in ("w0-pretrained", "w0.5-pretrained", "w1-pretrained")]
    assert len({run.early for run in anchored}) == 1  # a curve of the anchor has as many stops as its rival's


def test_every_run_has_a_name_of_its_own_and_flags_that_the_script_reads(scripts):
    tiny = scripts["tiny_experiments"]
    runs = [run for runs in tiny.planned().values() for run in runs]
    assert len({run.name for run in runs}) == len(runs)
    script = scripts["benchmark"].load_script(ROOT / "train_sap_lora_sd15.py")
    photos = WORLD / "dataset" / "ball"
    needed = ["--pretrained_model_name_or_path=x", f"--instance_data_dir={photos}", "--instance_prompt=a sks x"]
    for run in (run for run in runs if run.method == "sap"):
        read = script.parse_args([*needed, "--class_prompt=an x", *run.flags])
        assert (read.anchor_weight, read.learning_rate, read.rank) == tuple(run.tags[k] for k in ("w", "rate", "rank"))


def test_rates_are_chosen_on_subjects_that_are_not_scored(scripts, args, monkeypatch):
    tiny = scripts["tiny_experiments"]
    tuning = {subject for run in tiny.planned()["rates"] for subject in tiny.subjects_of(run, args)}
    monkeypatch.setattr(tiny, "best_rates", lambda args: {tiny.SAP: 2 * tiny.RATE, tiny.PRIOR: tiny.RATE / 2})
    runs = tiny.budget_runs(args)
    assert [run.name for run in runs] == ["w0.5-pretrained-rate0.004", "prior-rate0.001"]
    scored = {subject for run in runs for subject in tiny.subjects_of(run, args)}
    assert tuning == {"star2", "fish2"} and tuning.isdisjoint(scored) and len(scored) == 6
    monkeypatch.setattr(tiny, "best_rates", lambda args: {tiny.SAP: tiny.RATE, tiny.PRIOR: tiny.RATE})
    assert tiny.budget_runs(args) == []  # the core has these


def test_the_best_rate_is_told_to_the_report(scripts, tmp_path, monkeypatch):
    tiny, numbers = scripts["tiny_experiments"], scripts["tiny_numbers"]
    args = tiny.parse_args(["--backbone=sd15", f"--output_dir={tmp_path}", "--seeds", "0"])
    with pytest.raises(ValueError, match="run the parts core and rates before"):
        tiny.best_rates(args)
    scores, found = {}, numbers.Found("sd15")
    monkeypatch.setattr(tiny, "score", lambda args, methods: {name: {"subjects": scores[name]} for name in methods})
    for run, fidelity in ((tiny.SAP, 0.5), (tiny.PRIOR, 0.4)):
        for rate, alignment in zip(tiny.RATES, (0.1, 0.2, 0.3 if run == tiny.SAP else 0.1), strict=True):
            name = tiny.method_name(args, tiny.at_rate(run, rate), 0, args.steps)
            scores[name] = {s: {"clip_t": alignment, "clip_i": fidelity, "dino": fidelity} for s in args.subjects}
            for subject in args.subjects:
                (tmp_path / "images" / name / subject).mkdir(parents=True)
                for step in (150, 200):
                    for metric, value in (("clip_t", alignment), ("fidelity", fidelity)):
                        found.put(tiny.at_rate(run, rate), step, metric, (subject, 0), value)
    assert tiny.best_rates(args) == {tiny.SAP: 2 * tiny.RATE, tiny.PRIOR: tiny.RATE}
    told = scripts["tiny_tables"].budget([found])
    # The two that were tuned on are left out.
    assert "| .100 [.100, .100] | .100 [.100, .100] |  |  | 6 of 6 |" in told
    assert "w = 0.5 0.600 at 0.001, 0.700 at 0.002, 0.800 at 0.004, taken is 0.004" in told


def test_masks_cover_the_thing_and_nothing_else(scripts, args):
    tiny = scripts["tiny_experiments"]
    tiny.make_masks(args)
    world = scripts["benchmark"].load_script(WORLD / "world.py")
    for subject, photos in ((s, args.benchmark.references(s)) for s in args.subjects):
        for photo in photos:
            mask = np.asarray(Image.open(args.output_dir / "masks" / subject / photo.name), np.float32) / 255
            assert mask.shape == (64, 64) and 0.1 < mask.mean() < 0.7
            pixels, colour = np.asarray(Image.open(photo), np.float32), world.COLOURS[world.SUBJECTS[subject].colour]
            of_its_colour = np.abs(pixels - np.asarray(colour)).max(-1) < 2
            assert mask[of_its_colour].mean() > 0.9  # the ground may have a few such pixels, as snow has of white
            assert mask[0].max() == mask[:, 0].max() == 0


def test_a_dataset_that_the_world_did_not_draw_has_no_masks(scripts, tmp_path, capsys, monkeypatch):
    dataset = tmp_path / "dataset"
    (dataset / "ball").mkdir(parents=True)
    shutil.copy(WORLD / "dataset" / "prompts_and_classes.txt", dataset)
    for number in range(5):
        Image.new("RGB", (64, 64)).save(dataset / "ball" / f"{number:02}.png")
    script = FOLDER / "tiny_experiments.py"
    arguments = ["--backbone=sd15", f"--output_dir={tmp_path / 'out'}", f"--world={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().err
    assert "make the dataset again" in told and "Traceback" not in told


# --- The whole way ------------------------------------------------------------------------------------------------


def test_the_whole_way_in_miniature(scripts, tmp_path, monkeypatch):
    """One subject, one prompt, eight steps; begun again, as after a stop."""
    for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        monkeypatch.setenv(name, value)
    tiny, report = scripts["tiny_experiments"], scripts["tiny_report"]
    small = ["--backbone=sd15", f"--output_dir={tmp_path}", "--subjects", "ball", "--seeds", "0"]
    small += ["--steps=8", "--prompts", "0", "--train_batch_size=1"]
    small += ["--runs", "w0-pretrained", "w0.5-pretrained", "prior"]
    tiny.main(tiny.parse_args([*small, "--parts", "core"]))
    lora = tmp_path / "loras" / "sd15-w0-pretrained-seed0" / "ball"
    before = (lora / "pytorch_lora_weights.safetensors").stat().st_mtime_ns
    assert sorted(path.name for path in lora.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    (lora.parents[1] / "sd15-prior-seed0" / "ball" / "seconds.json").unlink()  # as if it had been broken off
    tiny.main(tiny.parse_args([*small, "--parts", "core"]))
    assert (lora / "pytorch_lora_weights.safetensors").stat().st_mtime_ns == before
    told = json.loads((tmp_path / "images" / "sd15-w0-pretrained-step1-seed0" / "manifest.json").read_text())
    assert told["tags"]["steps"] == 1
    assert all(one["weights"].endswith("ball/checkpoint-1") for one in told["images"])
    assert [one["file"] for one in told["images"]] == ["ball/0/0.png", "ball/class/0/0.png"]

    report.main(report.parse_args([f"--output_dir={tmp_path}"]))
    results = tmp_path / "results"
    figures = {"answer.png", "frontier.png", "drift.png", "pictures.jpg"}
    assert {path.name for path in results.iterdir()} == {"subjects.csv", "tables.md"} | figures
    with (results / "subjects.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    (core,) = [row for row in rows if (row["run"], row["steps"]) == ("w0-pretrained", "8")]
    assert all(core.values())  # every metric was measured
    (base,) = [row for row in rows if row["run"] == "base"]
    assert base["pres"] == base["dino"]
    written = (results / "tables.md").read_text()
    assert "| core | prior | 1 of 1 | not run | not run |" in written
    assert "| SD1.5 | w = 0, 1 steps |" in written and "| prior preservation |" in written

    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- class -->\nold\n<!-- end of class -->\nAfter.\n")
    script = FOLDER / "tiny_tables.py"
    monkeypatch.setattr(sys, "argv", [str(script), f"--results_dir={results}", f"--page={page}"])
    runpy.run_path(str(script), run_name="__main__")
    told = page.read_text()
    assert told.startswith("Before.\n<!-- class -->\n|  |  | CLIP-T |") and told.endswith("of class -->\nAfter.\n")
    printed = f"{float(core['pres']):.3f}".replace("0.", ".", 1)
    assert "old" not in told and f"| {printed} |" in told


# --- The report's numbers -----------------------------------------------------------------------------------------


def test_an_interval_is_students_over_subjects_whose_seeds_are_averaged(scripts):
    numbers = scripts["tiny_numbers"]
    one = numbers.estimate({(f"s{i}", 0): value for i, value in enumerate([1.0, 2.0, 3.0, 6.0])})
    assert (one.value, one.subjects, one.pairs) == (3.0, 4, 4)
    reach = 3.182 * np.std([1, 2, 3, 6], ddof=1) / 2
    assert (one.low, one.high) == pytest.approx((3 - reach, 3 + reach))
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 5.0}
    assert numbers.estimate(values).value == pytest.approx(3.5)
    assert numbers.estimate(values).count() == "3 of 2"  # pairs, not subjects times seeds
    assert numbers.difference(values, {("a", 1): 1.0, ("b", 0): 2.0}).value == pytest.approx(2.5)
    assert numbers.difference(values, {("c", 0): 1.0}) is None


def test_the_file_of_all_numbers_gives_them_back(scripts, tmp_path):
    numbers = scripts["tiny_numbers"]
    found = numbers.Found("sdxl")
    for metric, value in (("clip_i", 0.5), ("dino", 0.25), ("pres", 0.75), ("seconds", 12.5)):
        found.put("w0-pretrained", 8, metric, ("ball", 2), value)
    found.put("base", 0, "dino", ("ball", 0), -0.0625)
    numbers.write_subjects(tmp_path / "subjects.csv", [found])
    (again,) = numbers.read_subjects(tmp_path / "subjects.csv")
    assert (again.name, again.points) == ("SDXL", found.points)
    assert again.get("w0-pretrained", "fidelity") == {("ball", 2): 0.375}
    assert again.get("w0-pretrained", "apart") == {("ball", 2): -0.5}
    assert again.without(["ball"]).points == {}
    (tmp_path / "subjects.csv").write_text("backbone,run\nsd15,base\n")
    with pytest.raises(ValueError, match=r"is no subjects\.csv"):
        numbers.read_subjects(tmp_path / "subjects.csv")


def found_of(scripts, **runs):
    """Runs with (alignment, fidelity) of three subjects; NAME_STEP, or NAME for the last step, 8."""
    report = scripts["tiny_tables"]
    found = scripts["tiny_numbers"].Found("sd15")
    for name, (alignment, fidelity) in runs.items():
        run, _, step = name.partition("_")
        run = {"w0": report.W0, "sap": report.SAP, "w1": report.W1}.get(run, run)
        for metric, value in (("clip_t", alignment), ("fidelity", fidelity)):
            put(found, run, int(step or (0 if run == "base" else 8)), metric, value, 0.001)
    return found


def put(found, run, step, metric, value, apart=0.0):
    """A number of three subjects, which differ by `apart`."""
    for subject in range(3):
        found.put(run, step, metric, (f"s{subject}", 0), value + apart * subject)


def test_verdicts(scripts):
    report = scripts["tiny_tables"]
    rises = report.Tendency("", "clip_t", 1, ((report.SAP, report.W0), (report.W1, report.SAP)))
    up = found_of(scripts, w0=(0.1, 0), sap=(0.2, 0), w1=(0.3, 0))
    assert report.judge(rises, up)[0] == "holds"
    assert report.judge(rises, found_of(scripts, w0=(0.1, 0), sap=(0.2, 0), w1=(0.1, 0)))[0] == "does not"
    assert report.judge(rises, found_of(scripts, w0=(0.1, 0), sap=(0.2, 0)))[0] == "not run"
    up.points[report.SAP, 8]["clip_t"]["s0", 0] += 0.5
    assert report.judge(rises, up)[0] == "not sure"


def test_what_needs_an_identifier_is_judged_where_one_means_something(scripts):
    """Both w = 0, at its best stop, and prior preservation must keep the two prompts apart by .2 of DINO."""
    report = scripts["tiny_tables"]
    claim = report.Tendency("", "clip_t", 1, ((report.SAP, report.PRIOR),), of_identifiers=True)
    found = found_of(scripts, w0=(0.1, 0), w0_4=(0.1, 0), sap=(0.3, 0), prior=(0.1, 0))
    assert report.judge(claim, found)[0] == "untestable here"  # PRES was not measured
    for run, step, apart in ((report.W0, 4, 0.25), (report.W0, 8, 0.0), (report.PRIOR, 8, 0.15)):
        put(found, run, step, "dino", 0.5)
        put(found, run, step, "pres", 0.5 - apart)
    assert report.judge(claim, found)[0] == "untestable here"
    put(found, report.PRIOR, 8, "pres", 0.2)
    assert report.judge(claim, found)[0] == "holds"


def test_the_gain_over_early_stopping(scripts):
    """The line from (.8, .1) over (.6, .5) to (.4, .6): at .6 it has .5, at fidelity .3 it has .7."""
    report, numbers = scripts["tiny_tables"], scripts["tiny_numbers"]

    def gain(found, along):
        return numbers.gain(found, (report.SAP, 8), numbers.stops(found, report.W0), along)

    path = {"base": (0.8, 0.1), "w0_4": (0.6, 0.5), "w0_8": (0.4, 0.6)}
    above = found_of(scripts, **path, sap=(0.6, 0.58))
    assert gain(above, 0).value == pytest.approx(0.08, abs=0.005)
    assert gain(above, 0).side() == 1
    beside = found_of(scripts, **path, sap=(0.65, 0.3))
    assert gain(beside, 1).value == pytest.approx(-0.05, abs=0.005)
    beyond = found_of(scripts, **path, sap=(0.5, 0.7), sap_4=(0.6, 0.58))
    assert gain(beyond, 1).low == np.inf
    written = report.frontier([beyond])
    early, whole = (line for line in written.splitlines() if "| w = 0.5" in line)
    assert "| **.15" in whole and "| **beyond [beyond, beyond]** |" in whole
    assert "w = 0.5, 4 steps | **.08" in early  # the anchor is stopped early, too
    assert "Of 4 intervals 4 are above zero and 0 below; chance alone would put about 0" in written


def test_changes_of_the_anchor_are_judged_against_the_line_of_w(scripts):
    """w = 1, w = 0.5 at .2 and .6; an offer at .5 aligns as the line at .3 and halves PRES."""
    report = scripts["tiny_tables"]
    curve = {"base": (0.8, 0.1), "w1": (0.7, 0.2), "sap": (0.6, 0.6), "w0": (0.5, 0.7)}
    found = found_of(scripts, **curve, **{"share0.1": (0.675, 0.5)})
    for run, pres in (("base", 0.1), (report.SAP, 0.7), (report.W1, 0.1), ("share0.1", 0.4)):
        put(found, run, 0 if run == "base" else 8, "pres", pres, 0.01)
    share, stronger = report.offers([found]).splitlines()[2:]
    cells = [cell.strip(" *") for cell in share.split("|")]
    assert cells[2:4] == ["w = 0.5", "10% of samples see the class prompt"] and cells[7] == "50%"
    assert [cells[i].split(" [")[0] for i in (4, 5, 6)] == [".075", "-.100", "-.300"]
    assert float(cells[8].split(" [")[0]) == pytest.approx(0.2, abs=0.005)
    assert [cell.strip() for cell in stronger.split("|")][7:10] == ["100%", "", ""]


def test_a_gain_is_that_of_the_means_and_not_of_pseudo_values(scripts):
    """Three subjects whose own gains are far from that of their means: the line has a corner between them."""
    numbers = scripts["tiny_numbers"]
    table = np.array([[[0.6, 0.5], [0.8, 0.1], [0.6 + shift, 0.5], [0.4, 0.6]] for shift in (-0.1, 0.0, 0.15)])
    value = float(numbers.gains(table.mean(0), 0))
    # The mean corner is 1/60 before the point and 13/60 before the end of the line.
    at_the_point = 0.5 + 0.1 * (1 / 60) / (13 / 60)
    assert value == pytest.approx(0.5 - at_the_point, abs=0.003)  # the mean of pseudo-values would be -.05
    low, high = numbers.bootstrap_gain(table, 0)
    assert low < value < high
    one_by_one = [float(numbers.gains(own, 0)) for own in table]
    assert min(one_by_one) <= low and high <= max(one_by_one)  # resamples of subjects lie among the subjects


def test_intervals_of_gains_hold_the_truth(scripts):
    """As many worlds as seconds allow: 19 of 20 hold, give or take five."""
    shares = scripts["tiny_numbers"].coverage(6, worlds=40, resamples=400)
    assert len(shares) == 4 and all(0.85 <= share <= 1 for share in shares.values())


def test_what_masks_change_is_said_beside_the_leaks(scripts):
    report = scripts["tiny_tables"]
    masked = f"{report.SAP}-masked"
    found = found_of(scripts, base_0=(0.8, 0.1), w0=(0.6, 0.6), sap=(0.65, 0.5), **{masked: (0.65, 0.6)})
    for run, leak in ((report.BASE, 0.25), (report.W0, 1.0), (report.SAP, 0.75), (masked, 0.5)):
        put(found, run, 0 if run == report.BASE else 8, "leak", leak)
    row = next(line for line in report.masks([found]).splitlines() if "w = 0.5" in line)
    assert row.startswith("| SD1.5 | w = 0.5 | .250 | 1.000 | .750 | .500 | **-.250 [-.250, -.250]** | .000 ")
    assert row.endswith("| **.100 [.100, .100]** | 3 of 3 |")
    beside = report.neighbour_rows([found]).splitlines()
    assert beside[-1].startswith("| SD1.5 | w = 0 | **-.050 [-.050, -.050]** | **.100 [.100, .100]** |")
    assert len(beside) == 4  # what was not run has no row


def test_numbers_are_short(scripts):
    estimate = scripts["tiny_numbers"].Estimate
    assert str(estimate(0.1234, -0.05, 0.3, 8, 3)) == ".123 [-.050, .300]"
    assert str(estimate(12.34, 10.21, 14.5, 8, 3)) == "12.3 [10.2, 14.5]"
    assert str(estimate(-3.149, -4, -2, 1, 1)) == "-3.15"
    assert str(estimate(0.5, -0.25, 10.125, 3, 1)) == ".500 [-.250, 10.125]"


def test_a_report_of_one_run_alone(scripts, tmp_path):
    report, found = scripts["tiny_tables"], found_of(scripts, sap=(0.5, 0.5))
    assert "| core | w0.5-pretrained | 3 of 3 | not run | not run |" in report.what_was_run([found])
    assert report.tendencies([found]).count("not run") == len(report.TENDENCIES)
    assert "Not run." in report.frontier([found]) and "Not run." in report.budget([found])
    assert report.masks([found]) == "Not run." and "| w = 0.5 |" in report.neighbour_rows([found])
    figures = scripts["tiny_report"]
    for draw in (figures.draw_answer, figures.draw_frontier, figures.draw_drift):
        draw(tmp_path / "figure.png", [found])


def test_the_command_lines_answer(scripts, capsys, tmp_path):
    for name in ("tiny_experiments", "tiny_report"):
        with pytest.raises(SystemExit, match="0"):
            scripts[name].parse_args(["--help"])
    with pytest.raises(SystemExit, match="2"):
        scripts["tiny_report"].parse_args([f"--output_dir={tmp_path}"])
    assert "run tiny_experiments.py first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the table class has no line <!-- end of class -->"):
        scripts["tiny_tables"].filled("<!-- class -->\n", {"class": "text"})


# --- The shipped results ------------------------------------------------------------------------------------------

RESULTS = ROOT / "examples" / "results"
PAGE = ROOT / "examples" / "RESULTS.md"


def test_the_results_page_is_what_the_report_makes_of_the_shipped_numbers(scripts):
    report = scripts["tiny_tables"]
    backbones = scripts["tiny_numbers"].read_subjects(RESULTS / "subjects.csv")
    made = report.tables(backbones)
    page = PAGE.read_text(encoding="utf-8")
    assert {name for name in made if f"<!-- {name} -->" in page} >= {"class", "frontier", "run"}
    assert report.filled(page, made) == page
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert len(set(lines)) == len(lines)  # no row of a table stands twice


def column(run: str, steps: str, metric: str) -> dict[str, float]:
    """A metric of the SD3 type by subject, without the report's code; fidelity is the mean of two columns."""
    with (RESULTS / "subjects.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["subject"] not in ("star2", "fish2")]
    own = [row for row in rows if (row["backbone"], row["run"], row["steps"]) == ("sd3", run, steps)]
    names = ("clip_i", "dino") if metric == "fidelity" else (metric,)
    return {row["subject"]: sum(float(row[name]) for name in names) / len(names) for row in own}


@pytest.mark.parametrize(
    ("run", "metric"),
    [("w0-pretrained", "pres"), ("w0.5-pretrained", "fidelity"), ("prior", "clip_t")],
)
def test_intervals_of_the_page_can_be_computed_from_the_shipped_numbers(run, metric):
    values = np.array(list(column(run, "200", metric).values()))
    count = len(values)
    reach = {3: 4.3027, 6: 2.5706}[count] * values.std(ddof=1) / count**0.5  # Student's t
    shown = [f"{number:.3f}" for number in (values.mean(), values.mean() - reach, values.mean() + reach)]
    mean, low, high = (text.replace("0.", ".", 1) for text in shown)
    assert f"{mean} [{low}, {high}]" in PAGE.read_text(encoding="utf-8")
