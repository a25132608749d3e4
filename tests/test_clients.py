# SPDX-License-Identifier: Apache-2.0
"""The LoRA files have the keys that other programs know, and diffusers makes of them the change that was trained.

The models have the real ones' blocks, a few channels wide.
"""

import hashlib
import inspect
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train_sap_lora_sd3
import train_sap_lora_sd15
import train_sap_lora_sdxl

SD15 = (train_sap_lora_sd15, diffusers.StableDiffusionPipeline)
SDXL = (train_sap_lora_sdxl, diffusers.StableDiffusionXLPipeline)
SD3 = (train_sap_lora_sd3, diffusers.StableDiffusion3Pipeline)
BASES = {"sd15": SD15, "sd2": SD15, "sdxl": SDXL, "sd35": SD3}
SD15_UNET = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (4, 8, 12, 12),
    "attention_head_dim": 2,
    "cross_attention_dim": 768,
}
SDXL_UNET = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "block_out_channels": (4, 8, 12),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 14,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}
UNETS = {
    "sd15": SD15_UNET,
    "sd2": SD15_UNET | {"use_linear_projection": True, "cross_attention_dim": 1024},
    "sdxl": SDXL_UNET,
}
TRANSFORMER = {
    "sample_size": 4,
    "num_layers": 24,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "joint_attention_dim": 14,
    "caption_projection_dim": 8,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 2,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),  # in SD3.5; SD3 has none
}
TEXT_LAYERS = {"sd15": [12], "sd2": [23], "sdxl": [12, 32], "sd35": [12, 32]}
UNET_LAYERS = "to_q,to_k,to_v,to_out.0,proj,proj_in,proj_out,ff.net.2,conv_in,conv_out,conv1,conv2,conv,conv_shortcut"
UNET_LAYERS += ",linear_1,linear_2,time_emb_proj"
TRANSFORMER_LAYERS = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.0.proj,net.2"


def build(base: str) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that may hold a LoRA, at each call with the same weights."""
    torch.manual_seed(0)
    if base in UNETS:
        parts = {"unet": diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=2, **UNETS[base])}
    else:
        parts = {"transformer": diffusers.SD3Transformer2DModel(**TRANSFORMER)}
    for index, layers in enumerate(TEXT_LAYERS[base]):
        size = {"hidden_size": 6 + 2 * index, "intermediate_size": 10, "num_attention_heads": 2, "vocab_size": 9}
        config = CLIPTextConfig(num_hidden_layers=layers, max_position_embeddings=7, projection_dim=4, **size)
        kind = CLIPTextModelWithProjection if index or base == "sd35" else CLIPTextModel
        parts[f"text_encoder_{index + 1}" if index else "text_encoder"] = kind(config).requires_grad_(False)
    return parts


def run_of(base: str, use_dora: bool = False) -> SimpleNamespace:
    """As much of a run as the writers look at, with a random LoRA on all layers that may have one."""
    args = SimpleNamespace(
        seed=0,
        rank=2,
        lora_alpha=6,  # each program's rule for alpha counts
        lora_dropout=0,
        use_dora=use_dora,
        lora_layers=UNET_LAYERS if base in UNETS else TRANSFORMER_LAYERS,
        lora_blocks=None,
        resolution=512,
        output_dir="/home/anna/dog",
        instance_prompt="a photo of sks dog",
        pretrained_model_name_or_path="/home/anna/secret/models/my-base",
    )
    parts = build(base)
    BASES[base][0].add_adapters(args, parts)
    for parameter in itertools.chain.from_iterable(model.parameters() for model in parts.values()):
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    scheduler = SimpleNamespace(prediction_type="v_prediction" if base == "sd2" else "epsilon")
    return SimpleNamespace(
        args=args,
        images=SimpleNamespace(count=5),
        scheduler=SimpleNamespace(config=scheduler),
        student=SimpleNamespace(denoiser=next(iter(parts.values())), adapted=parts),
    )


def adapted(parts: dict[str, torch.nn.Module]) -> dict[str, BaseTunerLayer]:
    """The layers with a LoRA, by their names in diffusers' files."""
    found = {}
    for part, model in parts.items():
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                if part.startswith("text_encoder"):
                    name = f"text_model.{name.removeprefix('text_model.')}"
                found[f"{part}.{name}"] = module
    return found


def merged_changes(parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What peft changes in each weight when it merges."""
    changes = {}
    for name, module in adapted(parts).items():
        before = module.get_base_layer().weight.detach().clone()
        module.merge()
        changes[name] = module.get_base_layer().weight.detach() - before
    return changes


def assert_close(changes: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert changes.keys() == expected.keys()
    for name, change in expected.items():
        assert (changes[name] - change).norm() < 1e-5 * change.norm(), name


def write(base: str, run: SimpleNamespace, folder: Path, kohya: bool) -> Path:
    """The file that the trainer of a base writes."""
    script = BASES[base][0]
    if kohya:
        script.write_kohya_lora(run, folder)
        return folder / script.KOHYA_FILE
    script.write_lora(run, folder)
    return folder / script.LORA_FILE


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---- Keys ----


def known_keys(base: str) -> set[str]:
    """The keys in lora_keys.txt for a base, where {1..3} counts and {a,b} are alternatives."""
    found, bases = set(), []
    for line in Path(__file__).with_name("lora_keys.txt").read_text().splitlines():
        if line.startswith("["):
            bases = line.strip("[]").split()
        elif base in bases and line:
            parts = [[part] for part in re.split("[{}]", line)]
            for index in range(1, len(parts), 2):
                first, _, last = parts[index][0].partition("..")
                parts[index] = range(int(first), int(last) + 1) if last else first.split(",")
            found |= {"".join(map(str, chosen)) for chosen in itertools.product(*parts)}
    return found


@pytest.mark.parametrize("base", BASES)
def test_keys_are_those_that_other_programs_know(base, tmp_path):
    run = run_of(base)
    layers = adapted(run.student.adapted).keys()
    stored = load_file(write(base, run, tmp_path, kohya=False))
    # diffusers takes a part's first key for all of them: with two styles in it, it drops layers.
    assert stored.keys() == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    if base == "sd35":
        assert layers == known_keys(base)
        return
    tensors = load_file(write(base, run, tmp_path, kohya=True))
    parts = ("alpha", "lora_down.weight", "lora_up.weight")
    assert tensors.keys() == {f"{key}.{part}" for key in known_keys(base) for part in parts}


# ---- Values ----


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        *[(base, kind) for base in ("sd15", "sd2", "sdxl", "sd35") for kind in ("diffusers", "dora")],
        ("sd15", "kohya"),
        ("sdxl", "kohya"),
    ],
)
def test_load_lora_weights(base, kind, tmp_path):
    run = run_of(base, kind == "dora")
    path = write(base, run, tmp_path, kind == "kohya")
    parts = build(base)
    pipeline = BASES[base][1]
    needed = inspect.signature(pipeline).parameters.items()
    others = {name: None for name, parameter in needed if parameter.default is parameter.empty}
    pipeline(**others | parts).load_lora_weights(path.parent, weight_name=path.name)  # no LoRA changes the others
    assert_close(merged_changes(parts), merged_changes(run.student.adapted))


def test_dora_in_a_kohya_file(tmp_path):
    """As OneTrainer reads it, of these programs alone: with one norm an output, as in the paper and in peft."""
    run = run_of("sd15", use_dora=True)
    tensors = load_file(write("sd15", run, tmp_path, kohya=True))
    changes = {}
    for name, module in adapted(run.student.adapted).items():
        weight = module.get_base_layer().weight.detach()
        key = "lora_" + name.replace("text_encoder", "te").replace(".", "_")
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        merged = weight + (up.flatten(1) @ down.flatten(1) * tensors[f"{key}.alpha"] / len(down)).view_as(weight)
        size = tensors[f"{key}.dora_scale"]
        assert size.shape == (len(up), *(1 for _ in weight.shape[1:]))  # by which ComfyUI and Forge know the axis
        changes[name] = size / merged.flatten(1).norm(dim=1).view_as(size) * merged - weight
    assert_close(changes, merged_changes(run.student.adapted))


# ---- Metadata and bytes ----


@pytest.mark.parametrize(
    ("base", "version", "architecture"),
    [
        ("sd15", "sd_v1", "stable-diffusion-v1"),
        ("sd2", "sd_v2_v", "stable-diffusion-v2-768-v"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    ],
)
def test_metadata_says_for_which_base_the_file_is(base, version, architecture, tmp_path):
    """A1111 and Forge hide a file of another base, and take one without a word of it for SD1.5's."""
    metadata = metadata_of(write(base, run_of(base), tmp_path, kohya=True))
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(base == "sd2")
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    needed = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}  # MUST in ModelSpec 1.0.1
    assert {f"modelspec.{key}" for key in needed} <= metadata.keys()
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"a photo of sks dog": 5}}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "6")
    assert metadata["ss_sd_model_name"] == "my-base"
    assert not any("anna" in value for value in metadata.values())


@pytest.mark.parametrize("kohya", [False, True])
def test_equal_content_gives_equal_bytes_and_the_hash_is_that_of_the_tensors(kohya, tmp_path):
    run = run_of("sd15")
    path = write("sd15", run, tmp_path, kohya)
    data = path.read_bytes()
    assert data == write("sd15", run, tmp_path, kohya).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    digest = hashlib.sha256(data[size:]).hexdigest()
    assert metadata_of(path)["sshs_model_hash"] == digest
    assert metadata_of(path)["modelspec.hash_sha256"] == f"0x{digest}"
