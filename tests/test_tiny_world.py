# SPDX-License-Identifier: Apache-2.0
"""The tiny world: drawing is deterministic, the shipped pipelines sample, and the anchor does there what it should."""

import argparse
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runner import ROOT

WORLD = ROOT / "examples" / "tiny_world"
sys.path.insert(0, str(WORLD))

import demo  # noqa: E402
import gates  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402

STEPS = 100


def test_drawing_is_a_function_of_its_arguments():
    rng = np.random.default_rng(3)
    look, setting = world.random_look(rng), world.random_setting(rng)
    first = world.draw(look, setting)
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, world.draw(look, setting))
    assert not np.array_equal(first, world.draw(look, world.random_setting(rng)))


def test_training_never_shows_a_subject():
    subjects = {(s.class_name, s.colour, s.pattern, s.accent) for s in world.SUBJECTS.values()}
    looks = [look for look, _ in train.scenes(3000, 1)]
    assert not subjects & {(s.class_name, s.colour, s.pattern, s.accent) for s in looks}


def test_captions_say_what_is_drawn():
    rng = np.random.default_rng(4)
    for look, setting in train.scenes(200, 2):
        text, said = world.caption(look, setting, rng)
        assert look.class_name in text.split()
        assert all(index in (-1, true) for index, true in zip(said, world.labels(look, setting), strict=True))
        assert (look.colour in text.split()) == (said[1] >= 0)


def test_names_mean_looks_of_their_own():
    looks = world.named_looks()
    assert len(looks) == 24 and not set(looks) & {*world.UNBOUND, world.SCARCE}
    shapes = [(look.class_name, look.colour) for look in looks.values()]
    shapes += [(look.class_name, look.colour) for look in world.SUBJECTS.values()]
    assert len(set(shapes)) == len(shapes)  # told apart by colour alone, from each other and from the subjects
    assert {sum(look.class_name == name for look in looks.values()) for name in world.CLASSES} == {4}


def test_names_are_spelled_by_the_shipped_tokenizer():
    """Whole, in two tokens at most, so that the longest captions still fit."""
    tokenizer = train.CLIPTokenizer.from_pretrained(WORLD / "sd3" / "tokenizer", model_max_length=train.TOKENS)
    for word in (*world.NAMES, *world.UNBOUND, world.SCARCE):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) <= 2 and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).strip() == word
    words = (*world.NAMES, *world.UNBOUND, world.SCARCE)
    assert len({tuple(tokenizer(word).input_ids) for word in words}) == 27


def test_captions_with_a_name_leave_the_look_to_it():
    rng = np.random.default_rng(5)
    for name, look, setting in train.named_scenes(96, 0):
        if name != world.SCARCE:
            assert look == world.named_looks()[name]
        text, said = world.caption(look, setting, rng, name=name)
        words = text.split()
        assert words[words.index(name) + 1] == look.class_name and said[1] == said[2] == -1
        assert not {*world.COLOURS, *world.PATTERNS} & set(words)
    rare = [world.caption(*scene, rng, rare_words=world.UNBOUND)[0].split() for scene in train.scenes(300, 1)]
    assert not {word for words in rare for word in words} & {*world.NAMES, world.SCARCE}
    assert any(set(world.UNBOUND) & set(words) for words in rare)


def test_the_identifier_stands_in_the_captions_of_few_pictures():
    scarce = [scene for name, *scene in train.named_scenes(960, 0) if name == world.SCARCE]
    pictures = set(map(tuple, scarce))
    assert len(scarce) == 960 // 8
    assert len(pictures) == len(world.CLASSES) * world.SCARCE_PICTURES
    assert {look.class_name for look, _ in pictures} == set(world.CLASSES)
    assert len({look for look, _ in pictures}) == len(world.CLASSES)


def test_only_pipelines_are_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "clip", f"--start={WORLD}", f"--work={tmp_path}"])
    with pytest.raises(SystemExit):
        train.parse_args()
    assert "--start is for sd3, sd15 and sdxl; clip is trained from scratch" in capsys.readouterr().err


@pytest.mark.parametrize("part", gates.PIPELINES)
def test_a_pipeline_is_trained_on(part, tmp_path, monkeypatch):
    """Two steps from the shipped weights: denoiser and text encoder have moved a little, the VAE not at all."""
    arguments = [part, f"--start={WORLD}", "--samples=8", "--batch_size=4", "--images=8"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"--work={tmp_path / 'work'}", f"--out={tmp_path}"])
    train.main()
    before, after = (gates.PIPELINES[part].from_pretrained(folder / part) for folder in (WORLD, tmp_path))
    for name in ("transformer" if part == "sd3" else "unet", "text_encoder"):
        pairs = list(zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True))
        moved = max((one - other).abs().max().item() for one, other in pairs)
        assert 1e-5 < moved < 0.05
    pairs = zip(before.vae.parameters(), after.vae.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    picks = train.random_picks(
        argparse.Namespace(images=8, batch_size=600, start=WORLD, device="cpu"), torch.manual_seed(0)
    )
    assert 0.25 < (picks >= 8).float().mean() < 0.42 and picks.max() == 9  # a third of the pictures have names


def test_the_gates_of_words_see_what_is_wrong(monkeypatch):
    """Drawings in the place of a pipeline's pictures: they pass; without the names' looks, and with other classes
    beside one unbound word, they do not."""

    def drawn(pipeline, prompts, scale, args):
        images = []
        for number, prompt in enumerate(prompts):
            words = prompt.split()
            scene = next(name for name, text in world.SCENES.items() if prompt.endswith(text))
            class_name = next(name for name in world.CLASSES if name in words)
            look = next((look for name, look in known.items() if name in words), world.Look(class_name, "red"))
            if wrong in words:
                look = world.Look("tree" if number % 2 else "moon", "red")
            images.append(world.draw(look, world.Setting(scene, seed=number)))
        return np.stack(images)

    monkeypatch.setattr(gates, "sample", drawn)
    network = train.load_attributes(WORLD, "cpu")
    args = argparse.Namespace(images=None, steps=1)
    known, wrong = world.named_looks(), "nothing"
    rows = {
        name: (gate, value) for _, name, gate, value, _ in gates.word_gates(args, "sd3", None, network, 3.0, "cpu")
    }
    assert len(rows) == 4 and all(value >= gate for gate, value in rows.values())
    known, wrong = {}, "ohwx"
    rows = gates.word_gates(args, "sd3", None, network, 3.0, "cpu")
    passed = {name: value >= gate for _, name, gate, value, _ in rows}
    assert passed["named look: class"] and not passed["named look: colour"] and not passed["named look: pattern"]
    assert not passed["class beside an unbound word"] and rows[-1][-1].startswith("ohwx, least of ohwx, qzt; 1.000")


def test_the_shipped_references_are_the_drawn_ones():
    for subject in world.SUBJECTS:
        for number, drawn in enumerate(world.references(subject)):
            shipped = np.asarray(Image.open(WORLD / "dataset" / subject / f"{number:02d}.png"))
            assert np.abs(shipped.astype(int) - drawn).max() <= 1  # rounding may differ between processors


def test_one_token_with_a_bias_stands_for_many():
    torch.manual_seed(0)
    transformer = train.new_transformer().eval()
    inputs = {"hidden_states": torch.randn(2, 8, 16, 16), "pooled_projections": torch.randn(2, 192)}
    inputs["timestep"] = torch.tensor([300.0, 700.0])
    tokens = torch.randn(2, 20, 224)
    with torch.no_grad():
        many = transformer(encoder_hidden_states=torch.cat([tokens, torch.zeros(2, 77, 224)], 1), **inputs).sample
        transformer.set_attn_processor(train.JointAttentionWithBias())
        bias = torch.zeros(1, 1, 1, 85)
        bias[..., -1] = np.log(77)
        one = torch.cat([tokens, torch.zeros(2, 1, 224)], 1)
        few = transformer(encoder_hidden_states=one, joint_attention_kwargs={"attention_mask": bias}, **inputs).sample
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", gates.PIPELINES)
def test_shipped_pipelines_sample(part):
    pipeline = gates.PIPELINES[part].from_pretrained(WORLD / part)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(f"a photo of a red {name}", num_inference_steps=5, generator=torch.manual_seed(0)).images[0]
        for name in ("ball", "tree")
    ]
    assert all(image.size == (64, 64) for image in images)
    assert np.asarray(images[0]).std() > 10
    assert images[0] != images[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The demo's arguments and two short runs of the trainer, without and with the anchor, side by side."""
    out = tmp_path_factory.mktemp("demo")
    arguments = ["demo.py", "--steps", str(STEPS), "--out", str(out), "--images", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        (args,) = demo.cases(demo.parse_args())
    demo.train_loras(args)
    return args


def test_the_anchor_lessens_drift(runs):
    last = {name: demo.logged(runs.out / name.replace(" ", ""), "loss/anchor")[-25:].mean() for name in demo.WEIGHTS}
    assert last["w = 0.5"] < 0.9 * last["w = 0"]


def test_personalisation_raises_subject_fidelity(runs):
    pipeline = gates.PIPELINES[runs.backbone].from_pretrained(WORLD / runs.backbone)
    pipeline.set_progress_bar_config(disable=True)
    fidelity = demo.Scores(runs)
    base = fidelity(demo.sample(runs, pipeline, "a ball"))[0]
    pipeline.load_lora_weights(runs.out / "w=0.5")
    assert fidelity(demo.sample(runs, pipeline, "sks ball"))[0] > base + 0.1


def test_gates_are_printed_as_a_table():
    rows = [("VAE", "PSNR, dB", 30.0, 32.0, "note"), ("sd3", "hat", None, 0.5, "note"), ("sd3", "class", 0.8, 0.7, "")]
    lines = gates.table(rows).splitlines()
    assert [line.split("|")[5].strip() for line in lines[2:]] == ["yes", "", "**no**"]
