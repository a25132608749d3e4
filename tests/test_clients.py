# SPDX-License-Identifier: Apache-2.0
"""Other programs read the LoRA files whole and make of them the change that was trained."""

import functools
import hashlib
import inspect
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import clients
import diffusers
import pytest
import safetensors.torch
import structures
import torch
from diffusers.loaders import single_file_utils
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

import train_sap_lora_sd3
import train_sap_lora_sd15
import train_sap_lora_sdxl

RANK, ALPHA = 2, 6  # each program's rule for alpha counts
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ATTENTION += ("q_proj", "k_proj", "v_proj", "out_proj")
WIDE = dict.fromkeys(("sd3", "sd35"), ("net.0.proj", "net.2", "fc1", "fc2"))
UNET = ("fc1", "fc2", "proj", "proj_in", "proj_out", "ff.net.2", "conv_in", "conv_out", "conv1", "conv2", "conv")
WIDE |= dict.fromkeys(("sd15", "sd2", "sdxl"), (*UNET, "conv_shortcut", "linear_1", "linear_2", "time_emb_proj"))
SCRIPTS = {"sd15": train_sap_lora_sd15, "sd2": train_sap_lora_sd15, "sdxl": train_sap_lora_sdxl,
           "sd3": train_sap_lora_sd3, "sd35": train_sap_lora_sd3}  # fmt: skip
PIPELINES = {"sd15": diffusers.StableDiffusionPipeline, "sd2": diffusers.StableDiffusionPipeline,
             "sdxl": diffusers.StableDiffusionXLPipeline, "sd3": diffusers.StableDiffusion3Pipeline,
             "sd35": diffusers.StableDiffusion3Pipeline}  # fmt: skip

REFUSED = "refused"
OUTER, TEXT, NOTHING, ALL = r"conv_in|conv_out|_embedding", "^text_", "$.", ""
# What each program leaves out, as a pattern for layers: (SD1.5, SD2, SDXL; SD3, SD3.5). README's table is this one.
LEFT_OUT = {
    ("comfyui", "diffusers"): (r"\.to_", r"\.to_", r"\.to_", NOTHING, NOTHING),
    ("comfyui", "kohya"): (NOTHING,) * 5,
    ("forge", "diffusers"): (r"\.to_", r"\.to_", r"\.to_", "^transformer", "^transformer"),
    ("forge", "kohya"): (NOTHING,) * 5,
    ("a1111", "diffusers"): (ALL, ALL, ALL, r"^text_|add_|attn2|ff", r"^text_|add_|attn2|ff"),
    ("a1111", "kohya"): (NOTHING, NOTHING, NOTHING, REFUSED, REFUSED),
    ("sd-scripts", "diffusers"): (ALL,) * 5,
    ("sd-scripts", "kohya"): (OUTER, OUTER, OUTER, NOTHING, NOTHING),
    ("invokeai", "diffusers"): (REFUSED,) * 5,
    ("invokeai", "kohya"): (NOTHING, NOTHING, NOTHING, REFUSED, REFUSED),
    ("sd.cpp", "diffusers"): (f"{TEXT}|{OUTER}",) * 3 + (TEXT, TEXT),
    ("sd.cpp", "kohya"): (OUTER, OUTER, "_embedding", ALL, ALL),
    ("onetrainer", "diffusers"): (NOTHING,) * 5,
    ("onetrainer", "kohya"): (NOTHING,) * 5,
    ("diffusers", "diffusers"): (NOTHING,) * 5,  # its reader of kohya's keys is tried as it is
}


def run_of(base: str, layers: dict, **more):
    """As much of a run as the trainers' writers look at."""
    args = {"rank": RANK, "lora_alpha": ALPHA, "use_dora": False, "lora_layers": None, "lora_blocks": None,
            "resolution": 512, "output_dir": "/home/anna/dog", "instance_prompt": "a photo of sks dog",
            "pretrained_model_name_or_path": "/home/anna/secret/models/my-base"}  # fmt: skip
    config = SimpleNamespace(prediction_type="v_prediction" if base == "sd2" else "epsilon")
    unet = SimpleNamespace(cross_attention_dim={"sd2": 1024}.get(base, 768), layers_per_block=2)
    return SimpleNamespace(
        args=SimpleNamespace(**args | more),
        images=SimpleNamespace(count=5),
        scheduler=SimpleNamespace(config=config),
        student=SimpleNamespace(denoiser=SimpleNamespace(config=unet)),
        layers=layers,
    )


def written(base: str, layers: dict, kohya: bool = False, **more) -> Path:
    """The file that the trainer of a base writes of these layers."""
    script, folder = SCRIPTS[base], Path(tempfile.mkdtemp())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(script, "lora_layers", lambda run: run.layers)
        (script.write_kohya_lora if kohya else script.write_lora)(run_of(base, layers, **more), folder)
    return folder / ("pytorch_lora_weights_kohya.safetensors" if kohya else "pytorch_lora_weights.safetensors")


@functools.cache
def trained(base: str, use_dora: bool = False) -> tuple[dict, dict]:
    """A LoRA on all layers that may have one: attention, feed-forward, projections, convolutions, text encoders."""
    return structures.trained(base, ATTENTION + WIDE[base], RANK, ALPHA, use_dora)


@functools.cache
def paths(base: str, use_dora: bool = False) -> dict[str, Path]:
    """The files of a LoRA on all layers; SD3 has none of kohya's."""
    layers, _ = trained(base, use_dora)
    kinds = {"diffusers": False} | ({} if base.startswith("sd3") else {"kohya": True})
    return {kind: written(base, layers, kohya, use_dora=use_dora) for kind, kohya in kinds.items()}


@functools.cache
def files(base: str, use_dora: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: safetensors.torch.load_file(path) for kind, path in paths(base, use_dora).items()}


def worst(changes: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest error of a layer's change, relative to it."""
    return max(((changes[layer] - expected[layer]).norm() / expected[layer].norm()).item() for layer in changes)


# ---- The yardsticks themselves ----


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_stabilitys_names_of_the_unet_are_those_that_diffusers_converts(base):
    names = clients.stability_unet(base)
    config = dict(structures.parts(base)["unet"].config)
    checkpoint = {f"model.diffusion_model.{name}.weight": layer for layer, name in names.items()}
    checkpoint |= {f"model.diffusion_model.{name}.bias": None for name in names.values()}
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
    found = {key.removesuffix(".weight"): layer for key, layer in converted.items() if key.endswith(".weight")}
    assert found == {layer: layer for layer in names}


@pytest.mark.parametrize("base", ["sd3", "sd35"])
def test_stabilitys_names_of_sd3_are_those_that_diffusers_converts(base):
    weights = {layer: tensor for layer, tensor in structures.weights(base).items() if layer.startswith("transformer.")}

    class Checkpoint(dict):
        def pop(self, key, default=None):
            return super().pop(key, torch.zeros(24))  # biases and norms, which it asks for

    checkpoint = Checkpoint()
    for name, layers in clients.stability_mmdit(base).items():
        checkpoint[f"{name}.weight"] = torch.cat([weights[f"transformer.{layer}"] for layer in layers])
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    for layer in sum(clients.stability_mmdit(base).values(), ()):
        assert torch.equal(converted[f"{layer}.weight"], weights[f"transformer.{layer}"]), layer


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_expected_change_is_pefts_and_alpha_can_go_into_b(use_dora):
    layers, expected = trained("sd15", use_dora)
    scaled = {key: tensor * (ALPHA / RANK) if ".lora_B." in key else tensor for key, tensor in layers["unet"].items()}
    for alpha, state in ((ALPHA, layers["unet"]), (RANK, scaled)):
        unet = structures.build("sd15")["unet"]
        targets = [layer.removeprefix("unet.") for layer in expected if layer.startswith("unet.")]
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, target_modules=targets, use_dora=use_dora))
        assert not set_peft_model_state_dict(unet, dict(state)).unexpected_keys
        assert worst(merged_changes({"unet": unet}), expected) < 1e-5


def merged_changes(parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What peft changes in each weight when it merges."""
    changes = {}
    for part, model in parts.items():
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                before = module.get_base_layer().weight.detach().clone()
                module.merge()
                if part.startswith("text_") and not name.startswith("text_model."):
                    name = f"text_model.{name}"
                changes[f"{part}.{name}"] = module.get_base_layer().weight.detach() - before
    return changes


# ---- Every program on every base ----


@pytest.mark.parametrize("base", structures.BASES)
@pytest.mark.parametrize(("client", "kind"), LEFT_OUT)
def test_each_program_reads_what_the_readme_says(client, kind, base):
    if kind == "kohya" and base.startswith("sd3"):
        pytest.skip("there is no such file: ComfyUI and others read the diffusers file of SD3")
    pattern = LEFT_OUT[client, kind][structures.BASES.index(base)]
    _, expected = trained(base)
    if pattern == REFUSED:
        with pytest.raises(clients.Refused):
            clients.read(client, base, files(base)[kind], {})
        return
    changes, leftover = clients.read(client, base, files(base)[kind], {})
    assert changes.keys() == {layer for layer in expected if not re.search(pattern, layer)}
    assert bool(leftover) == (len(changes) < len(expected))
    if changes:
        assert worst(changes, expected) < 1e-5


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_with_the_layers_of_the_default_the_kohya_file_is_read_whole_everywhere(base):
    layers, expected = structures.trained(base, ATTENTION, RANK, ALPHA)
    path = written(base, layers, kohya=True)
    for client in ("comfyui", "forge", "a1111", "sd-scripts", "invokeai", "sd.cpp", "onetrainer"):
        changes, leftover = clients.read(client, base, safetensors.torch.load_file(path), {})
        assert not leftover and changes.keys() == expected.keys(), client
        assert worst(changes, expected) < 1e-5, client


def test_sdxl_needs_the_names_of_sd_scripts(monkeypatch):
    """With diffusers' names, sd-scripts finds nothing of the UNet and A1111 misses an upsampler and the embeddings."""
    monkeypatch.setattr(train_sap_lora_sdxl, "stability_name", lambda module, depth: module)
    tensors = safetensors.torch.load_file(written("sdxl", trained("sdxl")[0], kohya=True))
    unet = {layer for layer in trained("sdxl")[1] if layer.startswith("unet.")}
    assert not unet & clients.read("sd-scripts", "sdxl", tensors, {})[0].keys()
    missed = unet - clients.read("a1111", "sdxl", tensors, {})[0].keys()
    assert missed == {
        "unet.up_blocks.0.upsamplers.0.conv",
        "unet.add_embedding.linear_1",
        "unet.add_embedding.linear_2",
    }


# ---- diffusers, as installed ----


@pytest.mark.parametrize(("base", "kind"), [(base, "diffusers") for base in ("sd15", "sd2", "sdxl", "sd35")]
                         + [("sd15", "kohya"), ("sdxl", "kohya")])  # fmt: skip
def test_load_lora_weights(base, kind, tmp_path):
    check_load(base, kind, False, tmp_path)


@pytest.mark.parametrize("base", ["sd15", "sd35"])
def test_dora_is_right_in_diffusers(base, tmp_path):
    check_load(base, "diffusers", True, tmp_path)


def check_load(base, kind, use_dora, tmp_path):
    layers, expected = trained(base, use_dora)
    # The trainers give a text encoder's LoRA to its attention alone.
    expected = {name: change for name, change in expected.items() if ".mlp." not in name}
    layers = {part: {k: one for k, one in state.items() if ".mlp." not in k} for part, state in layers.items()}
    parts = structures.build(base)
    named = ",".join(ATTENTION + WIDE[base])
    path = written(base, layers, kind == "kohya", use_dora=use_dora, lora_layers=named)
    needed = inspect.signature(PIPELINES[base]).parameters.items()
    others = {name: None for name, parameter in needed if parameter.default is parameter.empty}
    pipeline = PIPELINES[base](**others | parts)  # which no LoRA changes
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    changes = merged_changes(parts)
    assert changes.keys() == expected.keys()
    assert worst(changes, expected) < 1e-5


@pytest.mark.parametrize("base", ["sd15", "sd2", "sdxl"])
def test_one_style_of_keys(base, tmp_path):
    """diffusers takes a part's first key for all of them: with two styles in it, it drops all attention layers."""
    layers, expected = trained(base)
    mixed = {f"{part}.{key}": tensor for part, state in layers.items()
             for key, tensor in convert_state_dict_to_diffusers(dict(state)).items()}  # fmt: skip
    read = {}
    for name, tensors in (("one", files(base)["diffusers"]), ("mixed", mixed)):
        safetensors.torch.save_file(tensors, tmp_path / name)
        stored = safetensors.torch.load_file(tmp_path / name)  # in the order in which diffusers meets them
        read[name], leftover = clients.read("diffusers", base, stored, {})
        assert bool(leftover) == (name == "mixed")
    assert read["one"].keys() == expected.keys()
    assert not any(".attn" in layer for layer in read["mixed"])


def test_text_encoders_have_the_style_of_keys_that_onetrainer_reads():
    old = {key.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up."): tensor
           for key, tensor in files("sdxl")["diffusers"].items() if key.startswith("text_")}  # fmt: skip
    with pytest.raises(clients.Refused, match="lora_linear_layer"):
        clients.read("onetrainer", "sdxl", old, {})
    assert clients.read("comfyui", "sdxl", old, {})[0]


# ---- DoRA ----


def test_where_dora_is_right():
    """In OneTrainer (set to decompose the output axis) and diffusers: the others divide by another norm or by none."""
    errors = {}
    for client in clients.CLIENTS:
        if client != "diffusers":
            changes, _ = clients.read(client, "sdxl", files("sdxl", True)["kohya"], {})
            errors[client] = worst(changes, trained("sdxl", True)[1])
    assert errors.pop("onetrainer") < 1e-5
    assert min(errors.values()) > 0.1, errors
    changes, leftover = clients.read("onetrainer", "sdxl", files("sdxl", True)["diffusers"], {})
    assert not leftover and worst(changes, trained("sdxl", True)[1]) < 1e-5


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_dora_scale_has_one_entry_an_output_and_the_axes_of_the_weight(base):
    """Then ComfyUI and Forge know the axis, where inputs and outputs are as many."""
    shapes = {tensor.shape[1:] for key, tensor in files(base, True)["kohya"].items() if key.endswith(".dora_scale")}
    assert shapes == {(1,), (1, 1, 1)}
    ups = files(base, True)["kohya"]
    assert all(
        len(ups[key]) == len(ups[key.replace("dora_scale", "lora_up.weight")]) for key in ups if "dora_scale" in key
    )


# ---- Metadata and bytes ----

VERSIONS = {
    "sd15": ("sd_v1", "stable-diffusion-v1"),
    "sd2": ("sd_v2_v", "stable-diffusion-v2-768-v"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("base", VERSIONS)
def test_metadata_says_for_which_base_the_file_is(base):
    metadata = metadata_of(paths(base)["kohya"])
    assert clients.a1111_version(metadata) == base
    assert clients.forge_version(metadata) == base
    assert clients.a1111_version({"format": "pt"}) == "sd15"  # as which it took SDXL's file before
    assert metadata["modelspec.architecture"] == f"{VERSIONS[base][1]}/lora"
    needed = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}  # MUST in ModelSpec 1.0.1
    assert {f"modelspec.{key}" for key in needed} <= metadata.keys()
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"a photo of sks dog": 5}}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "6")
    assert metadata["ss_sd_model_name"] == "my-base"
    assert not any("anna" in value for value in metadata.values())


@pytest.mark.parametrize("kohya", [False, True])
def test_equal_content_gives_equal_bytes_and_the_hash_is_that_of_the_tensors(kohya):
    layers, _ = trained("sd15")
    turned = {part: {key: layers[part][key].clone() for key in reversed(layers[part])} for part in reversed(layers)}
    path = written("sd15", layers, kohya)
    data = path.read_bytes()
    assert {key: value for key, value in metadata_of(path).items() if "path" in key} == {}
    assert data == written("sd15", layers, kohya).read_bytes()
    assert len(data) == len(written("sd15", turned, kohya).read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    digest = hashlib.sha256(data[size:]).hexdigest()
    assert metadata_of(path)["sshs_model_hash"] == digest
    assert metadata_of(path)["modelspec.hash_sha256"] == f"0x{digest}"
