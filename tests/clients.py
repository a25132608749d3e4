# SPDX-License-Identifier: Apache-2.0
"""What other programs make of a LoRA file: which keys they know, and the change of each weight that they compute.

Written from each program's naming and arithmetic, of the versions named in CLIENTS (looked up in 2026-11); no code of
theirs. `read` takes the structure of the model from `structures.weights`.
"""

import functools
import re

import torch
from structures import weights

CLIENTS = {
    "comfyui": "ComfyUI 0.3.77",
    "forge": "stable-diffusion-webui-forge, 2025-06",
    "a1111": "stable-diffusion-webui 1.10.1",
    "sd-scripts": "kohya-ss/sd-scripts, 2026-02",
    "invokeai": "InvokeAI, 2026-08",
    "sd.cpp": "stable-diffusion.cpp, 2026-08",
    "onetrainer": "OneTrainer, 2026-08",
    "diffusers": "diffusers 0.31 to 0.42: decides a part's style of keys by its first key",
}
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
TEXT = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
ATTENTION = ("_lora.down.weight", "_lora.up.weight")  # diffusers before 0.22
STYLES = {
    "comfyui": (KOHYA, ATTENTION, PEFT, DIFFUSERS, TEXT),
    "forge": (KOHYA, ATTENTION, PEFT, DIFFUSERS, TEXT),
    "a1111": (KOHYA, PEFT),
    "sd-scripts": (KOHYA,),
    "invokeai": (KOHYA,),
    "sd.cpp": (KOHYA, DIFFUSERS, ATTENTION, PEFT),
    "onetrainer": (KOHYA, PEFT, DIFFUSERS),
}
CLIP_LAYERS = ("mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj")
UNET_BASES = ("sd15", "sd2", "sdxl")


class Refused(Exception):
    """The program says that it cannot read the file."""


# ---- Names ----


def flat(name: str) -> str:
    return name.replace(".", "_")


def layers_of(base: str, part: str) -> list[str]:
    return [layer.removeprefix(f"{part}.") for layer in weights(base) if layer.startswith(f"{part}.")]


@functools.cache
def stability_unet(base: str) -> dict[str, str]:
    """{layer of the UNet: its name in Stability's code}, by numbering blocks in the order in which it adds them."""
    names, found = layers_of(base, "unet"), {}
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    inner |= {"conv_shortcut": "skip_connection"}

    def put(prefix: str, target: str) -> bool:
        held = [name for name in names if name.startswith(prefix)]
        for name in held:
            rest = name.removeprefix(prefix)
            rest = inner.get(rest, rest) if "resnets" in prefix else rest
            found[name] = target + ("op" if "downsamplers" in prefix else rest)
        return bool(held)

    for name, target in (("conv_in", "input_blocks.0.0"), ("conv_out", "out.2")):
        put(name, target)
    for ours, theirs in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        for index in (1, 2):
            put(f"{ours}.linear_{index}", f"{theirs}.{2 * index - 2}")
    for slot, place in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        put(f"mid_block.{place}.", f"middle_block.{slot}.")
    blocks = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("down_blocks."))
    row = 1
    for block in range(blocks):
        for layer in range(2):
            for slot, kind in enumerate(("resnets", "attentions")):
                put(f"down_blocks.{block}.{kind}.{layer}.", f"input_blocks.{row}.{slot}.")
            row += 1
        row += put(f"down_blocks.{block}.downsamplers.0.", f"input_blocks.{row}.0.")
    for row in range(3 * blocks):
        block, layer, slot = row // 3, row % 3, 0
        for kind in (f"resnets.{layer}", f"attentions.{layer}", *(["upsamplers.0"] if layer == 2 else [])):
            slot += put(f"up_blocks.{block}.{kind}.", f"output_blocks.{row}.{slot}.")
    return found


@functools.cache
def stability_mmdit(base: str) -> dict[str, tuple[str, ...]]:
    """{layer in Stability's code: its layers in diffusers}, which for qkv are three."""
    names = set(layers_of(base, "transformer"))
    found = {"context_embedder": ("context_embedder",), "x_embedder.proj": ("pos_embed.proj",)}
    found |= {"final_layer.linear": ("proj_out",)}
    for index in (1, 2):
        found[f"t_embedder.mlp.{2 * index - 2}"] = (f"time_text_embed.timestep_embedder.linear_{index}",)
        found[f"y_embedder.mlp.{2 * index - 2}"] = (f"time_text_embed.text_embedder.linear_{index}",)
    for block in range(24):
        for side, attention, add, out, ff in (
            ("x_block.attn", "attn", "to_{}", "to_out.0", "ff"),
            ("x_block.attn2", "attn2", "to_{}", "to_out.0", None),
            ("context_block.attn", "attn", "add_{}_proj", "to_add_out", "ff_context"),
        ):
            theirs, ours = f"joint_blocks.{block}.{side}", f"transformer_blocks.{block}.{attention}"
            found[f"{theirs}.qkv"] = tuple(f"{ours}.{add.format(letter)}" for letter in "qkv")
            found[f"{theirs}.proj"] = (f"{ours}.{out}",)
            for theirs, ours in (("fc1", "net.0.proj"), ("fc2", "net.2")) if ff else ():
                half = side.split(".")[0]
                found[f"joint_blocks.{block}.{half}.mlp.{theirs}"] = (f"transformer_blocks.{block}.{ff}.{ours}",)
    return {theirs: ours for theirs, ours in found.items() if names.issuperset(ours)}


# ---- Each program's table: {what stands before `.lora_...` in a key: the layers that it changes} ----


def text_table(base: str, prefixes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """`prefixes` says for each text encoder how its layers begin in a key; with `.` at the end, they stay dotted."""
    table = {}
    for part, starts in prefixes.items():
        for layer in layers_of(base, part):
            if layer.endswith(CLIP_LAYERS):
                for start in starts:
                    table[start + (layer if start.endswith(".") else flat(layer))] = (f"{part}.{layer}",)
    return table


def comfy_table(base: str, diffusers_sd3: bool) -> dict[str, tuple[str, ...]]:
    starts = {"text_encoder": ("lora_te_", "lora_te1_", "text_encoder.")}
    table = text_table(base, starts | {"text_encoder_2": ("lora_te2_", "text_encoder_2.")})
    if base in UNET_BASES:
        for layer, theirs in stability_unet(base).items():
            processor = layer.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
            for stem in (f"lora_unet_{flat(theirs)}", f"lora_unet_{flat(layer)}", f"diffusion_model.{theirs}"):
                table[stem] = (f"unet.{layer}",)
            table |= {processor: (f"unet.{layer}",), f"unet.{processor}": (f"unet.{layer}",)}
        return table
    for theirs, ours in stability_mmdit(base).items():
        full = tuple(f"transformer.{layer}" for layer in ours)
        table |= {f"lora_unet_{flat(theirs)}": full, f"diffusion_model.{theirs}": full}
        for layer in full if diffusers_sd3 else ():
            table |= {layer: (layer,), f"lora_{flat(layer)}": (layer,)}
    return table


def a1111_table(base: str, tensors: dict) -> dict[str, tuple[str, ...]]:
    """Names of Stability's code, and diffusers' names by a fixed formula, which misses SDXL's first upsampler."""
    if base.startswith("sd3"):  # only the picture's side
        if any(key.count(".") < 2 for key in tensors):
            raise Refused("not enough values to unpack")  # it expects three parts in each key
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
        return {f"transformer.{layer}": (f"transformer.{layer}",) for layer in layers_of(base, "transformer")
                if layer.endswith(names)}  # fmt: skip
    starts = {"sd15": ("lora_te_", "lora_te1_"), "sd2": ("lora_te_",), "sdxl": ("lora_te1_",)}[base]
    table = text_table(base, {"text_encoder": starts, "text_encoder_2": ("lora_te2_",)})
    for layer, theirs in stability_unet(base).items():
        table[f"lora_unet_{flat(theirs)}"] = (f"unet.{layer}",)
        first = re.match(r"up_blocks\.0\.upsamplers", layer) and ".1.conv" not in theirs
        if not first and not layer.startswith("add_embedding"):
            table[f"lora_unet_{flat(layer)}"] = (f"unet.{layer}",)
    return table


def sd_scripts_table(base: str) -> dict[str, tuple[str, ...]]:
    """Layers inside attention blocks, resnets, samplers; SDXL's and SD3's own names."""
    numbered = {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)}
    table = text_table(base, {"text_encoder": ("lora_te_",)} if base in ("sd15", "sd2") else numbered)
    if base.startswith("sd3"):
        table |= {f"lora_unet_{flat(theirs)}": tuple(f"transformer.{layer}" for layer in ours)
                  for theirs, ours in stability_mmdit(base).items() if theirs.startswith("joint_blocks.")}  # fmt: skip
        return table
    for layer, theirs in stability_unet(base).items():
        if re.search(r"\.(attentions|resnets|downsamplers|upsamplers)\.", layer):
            table[f"lora_unet_{flat(theirs if base == 'sdxl' else layer)}"] = (f"unet.{layer}",)
    return table


def either_names(base: str, tensors: dict, extra: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """kohya keys with Stability's names or with diffusers', whichever the file has: for SDXL not both in one file."""
    starts = {"text_encoder": ("lora_te_", *extra), "text_encoder_2": ()}
    if base == "sdxl":
        starts = {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)}
    stability = {f"lora_unet_{flat(theirs)}": (f"unet.{layer}",) for layer, theirs in stability_unet(base).items()}
    diffusers = {f"lora_unet_{flat(layer)}": (f"unet.{layer}",) for layer in stability_unet(base)}
    stems = {key.split(".")[0] for key in tensors}
    if base == "sdxl" and stems & stability.keys() and stems & diffusers.keys():
        raise Refused("the SDXL LoRA could only be partially converted")
    return text_table(base, starts) | (stability if base == "sdxl" and stems & stability.keys() else diffusers)


def invokeai_table(base: str, tensors: dict) -> dict[str, tuple[str, ...]]:
    if base.startswith("sd3"):
        raise Refused("no LoRA for SD3")
    if not all(key.startswith("lora_") for key in tensors):
        raise Refused("unrecognised key prefix")
    return either_names(base, tensors)


def onetrainer_table(base: str, tensors: dict) -> dict[str, tuple[str, ...]]:
    known = (".lora_down.weight", ".lora_up.weight", *PEFT, *DIFFUSERS, ".alpha", ".dora_scale")
    known += (".lora_magnitude_vector.weight",)
    if strange := [key for key in tensors if not key.endswith(known)]:
        raise Refused(f"an adapter type that cannot be loaded for training: {strange[0]}")
    if any(key.startswith(("unet.", "transformer.")) for key in tensors):
        return {layer: (layer,) for layer in weights(base)}
    return either_names(base, tensors, ("lora_te1_",)) if base in UNET_BASES else sd_scripts_table(base)


def sd_cpp_name(stem: str, base: str) -> str:
    """A key's stem as sd.cpp spells it out: `_` becomes `.` but in the words that it knows."""
    name = stem.removeprefix("lora_")
    if base in UNET_BASES or name.startswith(("unet_", "te_", "te1_", "te2_")):
        words = (
            "self_attn out_proj q_proj k_proj v_proj to_k to_q to_v to_out text_model down_blocks mid_block up_block"
        )
        words += " proj_in proj_out transformer_blocks conv_in conv_out time_emb_proj conv_shortcut time_embedding"
        words += " input_blocks output_blocks middle_block skip_connection emb_layers in_layers out_layers ff_context"
        for word in words.split():
            name = name.replace(word, word.replace("_", " "))
        name = name.replace("_", ".").replace(" ", "_")
    return name


def sd_cpp_table(base: str, tensors: dict) -> dict[str, tuple[str, ...]]:
    """Diffusers' names outside the blocks are known without a LoRA's ending only: conv_in and the like are missed."""
    known = {f"te.{layer}": f"text_encoder.{layer}" for layer in layers_of(base, "text_encoder")}
    known |= {f"te1.{layer}": f"text_encoder.{layer}" for layer in layers_of(base, "text_encoder")}
    known |= {f"te2.{layer}": f"text_encoder_2.{layer}" for layer in layers_of(base, "text_encoder_2")}
    if base in UNET_BASES:
        for layer, theirs in stability_unet(base).items():
            known[f"unet.{theirs}"] = f"unet.{layer}"
            if "_block" in layer:
                known[f"unet.{layer}"] = f"unet.{layer}"
    else:
        known = {layer: layer for layer in weights(base) if layer.startswith("transformer.")}
    stems = {re.split(r"[._]lora[._]|\.alpha$|\.dora_scale$", key)[0] for key in tensors}
    stems |= {key.rsplit(".lora_", 1)[0] for key in tensors}
    return {stem: (known[name],) for stem in stems if (name := sd_cpp_name(stem, base)) in known}


# ---- Arithmetic ----


def dora_norm(client: str, weight: torch.Tensor, merged: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """What a program divides by under `dora_scale`; right, as in the paper, is one norm of `merged` an output."""
    outputs = tuple(range(1, weight.ndim))
    if client in ("comfyui", "forge") and len(size) == len(weight):
        return torch.linalg.vector_norm(weight, dim=outputs, keepdim=True)  # of the weight before the change
    if client == "onetrainer":  # with its setting "decompose output axis"
        return torch.linalg.vector_norm(merged, dim=outputs, keepdim=True)
    return torch.linalg.vector_norm(merged, dim=(0, *outputs[1:]), keepdim=True)  # one norm an input


def changes_of(client: str, base: str, tensors: dict, table: dict) -> tuple[dict[str, torch.Tensor], list[str]]:
    changes, used = {}, set()
    for stem, layers in table.items():
        for down_key, up_key in ((stem + down, stem + up) for down, up in STYLES[client]):
            if up_key not in tensors or down_key not in tensors:
                continue
            used |= {up_key, down_key}
            down, up = tensors[down_key], tensors[up_key]
            scale = tensors[f"{stem}.alpha"].item() / len(down) if f"{stem}.alpha" in tensors else 1
            weight = torch.cat([weights(base)[layer] for layer in layers])
            change = (up.flatten(1) @ down.flatten(1) * scale).view_as(weight)
            magnitude = f"{stem}.lora_magnitude_vector.weight" if client == "onetrainer" else None
            size = tensors.get(f"{stem}.dora_scale")
            if size is None and magnitude in tensors:
                size = tensors[magnitude]
                size = size[:, None] if size.ndim == 1 else size.transpose(0, 1)
            if size is not None and client not in ("sd-scripts", "sd.cpp"):
                merged = weight + change
                change = size / dora_norm(client, weight, merged, size) * merged - weight
                used.add(f"{stem}.dora_scale" if f"{stem}.dora_scale" in tensors else magnitude)
            used.add(f"{stem}.alpha")
            changes |= zip(layers, change.chunk(len(layers)), strict=True)
    if client == "a1111" and base != "sd15":  # Open CLIP's q, k, v and out are patched together or not at all
        part = "text_encoder_2." if base == "sdxl" else "text_encoder."
        for layer in [layer for layer in changes if layer.startswith(part) and ".self_attn." in layer]:
            block = layer.rsplit(".", 1)[0]
            if not all(f"{block}.{name}_proj" in changes for name in ("q", "k", "v", "out")):
                del changes[layer]
    return changes, [key for key in tensors if key not in used]


def read_diffusers(base: str, tensors: dict, metadata: dict) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The decision of the loaders since 0.33: a part whose first key has `lora_A` is in peft's style as a whole.

    Alpha is the rank, as before 0.34 (later versions read it in the metadata).
    """
    changes, leftover = {}, []
    for part in {key.split(".")[0]: None for key in tensors}:
        state = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
        styles = (PEFT,) if "lora_A" in next(iter(state)) else (PEFT, DIFFUSERS, TEXT)
        for layer, weight in weights(base).items():
            for down, up in styles:
                if layer + up in state:
                    change = state.pop(layer + up).flatten(1) @ state.pop(layer + down).flatten(1)
                    changes[layer] = change.view_as(weight)
        leftover += state
    return changes, leftover


def read(client: str, base: str, tensors: dict, metadata: dict) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read a file's tensors as a program does: the change of each layer's weight, and the keys that it does not use.

    Raises:
        Refused: where the program stops with an error.
    """
    if client == "diffusers":
        return read_diffusers(base, tensors, metadata)
    tables = {
        "comfyui": lambda: comfy_table(base, diffusers_sd3=True),
        "forge": lambda: comfy_table(base, diffusers_sd3=False),
        "a1111": lambda: a1111_table(base, tensors),
        "sd-scripts": lambda: sd_scripts_table(base),
        "invokeai": lambda: invokeai_table(base, tensors),
        "sd.cpp": lambda: sd_cpp_table(base, tensors),
        "onetrainer": lambda: onetrainer_table(base, tensors),
    }
    return changes_of(client, base, tensors, tables[client]())


def a1111_version(metadata: dict[str, str]) -> str:
    """Which base A1111 1.10 believes a file to be for; it hides the file while a model of another base is loaded."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    if metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd15" if metadata else "unknown"


def forge_version(metadata: dict[str, str]) -> str:
    """The same in Forge, which asks the ModelSpec too and hides nothing that it does not know."""
    architecture = metadata.get("modelspec.architecture")
    if architecture == "stable-diffusion-xl-v1-base/lora":
        return "sdxl"
    version = a1111_version(metadata)
    return "unknown" if version == "sd15" and architecture != "stable-diffusion-v1/lora" else version
