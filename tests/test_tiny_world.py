# SPDX-License-Identifier: Apache-2.0
"""The tiny world: drawing is deterministic, the shipped pipelines sample, and the anchor does there what it should."""

import hashlib
import pathlib
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
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


def test_the_shipped_references_are_the_drawn_ones():
    from PIL import Image

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
    assert hashlib.sha256(images[0].tobytes()).digest() != hashlib.sha256(images[1].tobytes()).digest()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The demo's arguments and two short runs of the trainer, without and with the anchor, side by side."""
    out = tmp_path_factory.mktemp("demo")
    arguments = ["demo.py", "--steps", str(STEPS), "--out", str(out), "--images", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        args = demo.parse_args()
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
