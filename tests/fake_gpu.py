# SPDX-License-Identifier: Apache-2.0
"""A fake GPU for a CPU build of torch: its tensors have a CUDA device, a dtype and a shape, and no numbers.

    LD_PRELOAD=GUARD.so python tests/fake_gpu.py CASES.json      # a report of each case, beside the file

On it the scripts' own stages and training loop run, at any size, and meet what they would meet on a GPU: tensors on
two devices, wrong dtypes, copies that wait. Not seen: numbers, kernels, streams. `test_fake_gpu.py` builds the library
and starts this file as a program of its own, since torch must find the device when it is imported.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.training_utils import cast_training_params
from memory import LiveBytes, flash_attention
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer as optimizers
from torch.utils import _foreach_utils as foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
GPU = torch.device("cuda", 0)
COPIES, INDEXED = (aten._to_copy, aten.copy_), (aten.index, aten.index_put, aten.index_put_)
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
# Their results have as many elements as the numbers say.
COUNTED = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor)
# What makes a tensor without starting a kernel, beside views.
FREE = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view)
FREE += (aten.detach, aten.lift_fresh, aten.is_pinned, aten._pin_memory, torch.ops.prim.device)
# A CPU build takes this apart into seven operations, unless it has a kernel for CUDA; it is never called.
KERNELS = torch.library.Library("aten", "IMPL", "CUDA")
KERNELS.impl("silu_backward", lambda gradient, inputs: gradient)


class Traffic(TorchDispatchMode):
    """Counts what the host waits for, by what it is and by the function of a script that it is in.

    A copy does not wait if it says so and the memory on the host is pinned, which fake tensors do not model: pinned
    ones are marked here. Reading a number gives an answer with which training goes on: nothing is inf or NaN.
    """

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == ROOT]
        self.seen[f"{what} in {frames[-1].name if frames else 'a library'}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, first = kwargs or {}, args[0] if args else None
        if func is aten.is_pinned.default:
            return getattr(first, "pinned", False)
        if func is aten._pin_memory.default:
            result = first.clone()
            result.pinned = True
            return result
        if func in READS:
            if first.device.type == "cuda":
                self.note("reading a number")
            # The step that AdamW counts on the CPU is at least 1, what the scaler counts on the GPU is 0.
            if first.dtype == torch.bool or func is aten.equal.default:
                return True
            return float(first.device.type == "cpu") if first.dtype.is_floating_point else 0
        if func in COUNTED and first.device.type == "cuda":
            self.note(f"counting for {func.overloadpacket.__name__}")
        if func.overloadpacket in INDEXED and first.device.type == "cuda":
            for index in (index for index in args[1] if index is not None):
                if index.dtype in (torch.bool, torch.uint8) or index.device.type == "cpu":
                    self.note(f"{index.device.type} indices of {index.dtype}")
        result = func(*args, **kwargs)
        if func.overloadpacket in COPIES:
            source, target = (first, result) if func is aten._to_copy.default else (args[1], first)
            free = getattr(source, "pinned", False) and (kwargs.get("non_blocking") or args[2:] == (True,))
            if source.device.type != target.device.type:
                self.note(f"{'free' if free else 'blocking'} copy from {source.device.type} to {target.device.type}")
        return result


class Launches(TorchDispatchMode):
    """Counts the operations that start kernels on the GPU, and those among them that only change a dtype.

    One operation counts once, though some (a convolution's backward, what works on a list of tensors) start two or
    three. Views and allocations start none.
    """

    def __init__(self):
        super().__init__()
        self.total = 0
        self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if views or func.overloadpacket in FREE:
            return result
        if any(isinstance(one, torch.Tensor) and one.device.type == "cuda" for one in tree_leaves((args, result))):
            self.total += 1
            self.casts += func is aten._to_copy.default and args[0].dtype != result.dtype
        return result


def pretend() -> None:
    """Answer what torch and accelerate ask the driver."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    # What goes over lists of tensors does so with these too.
    optimizers._foreach_supported_types.append(FakeTensor)
    foreach_utils._foreach_supported_types.append(FakeTensor)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    PartialState()
    PartialState._shared_state["device"] = GPU


def convert(self, function, recurse=True) -> torch.nn.Module:
    """`nn.Module._apply` with new parameters in place of old ones, which cannot change their device where they are."""
    for child in self.children():
        child._apply(function)
    with torch.no_grad():
        for name, parameter in self._parameters.items():
            if parameter is not None and (moved := function(parameter)) is not parameter:
                self._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        self._buffers.update({name: function(one) for name, one in self._buffers.items() if one is not None})
    return self


def load_part(kind: type, flag: str, source: str, subfolder=None, dtype=torch.float32, **_) -> torch.nn.Module:
    """A model of the base by its configuration alone."""
    if issubclass(kind, transformers.PreTrainedModel):
        model = kind(kind.config_class.from_pretrained(source, subfolder=subfolder))
    else:
        model = kind.from_config(kind.load_config(source, subfolder=subfolder))
    return model.to(dtype).requires_grad_(False)


def measure_stages(sap, counted: LiveBytes) -> dict[str, int]:
    """Have the stages of a script leave the most bytes that there were on the GPU meanwhile."""
    peaks = {}

    def measured(stage):
        def function(*args):
            counted.peak = counted.live
            result = stage(*args)
            peaks[stage.__name__] = counted.peak
            return result

        return function

    for name in ("load_text_pipeline", "encode_texts", "encode_images", "load_denoiser", "train"):
        setattr(sap, name, measured(getattr(sap, name)))
    return peaks


def report(script: str, arguments: list[str], memory: bool = False) -> dict:
    """What waits in a whole training, what it leaves free to run ahead, and the dtypes and devices of what trains; if
    asked for, which takes long, what its stages need."""
    sap = importlib.import_module(script)
    sap.load_part, torch.nn.Module._apply = load_part, convert
    args = sap.parse_args(arguments)
    args.steps_per_epoch = 1
    pretend()
    accelerator = sap.start_accelerator(args)
    images, scheduler = sap.SubjectImages(args), sap.training_scheduler(args)
    gradients, traffic, peaks = [], Traffic(), {}
    with contextlib.ExitStack() as modes:
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        modes.enter_context(traffic)
        if memory:  # with the attention that GPUs have
            torch.nn.functional.scaled_dot_product_attention = flash_attention
            peaks = measure_stages(sap, modes.enter_context(LiveBytes(device="cuda")))
        run = sap.prepare(args, accelerator, images, scheduler=scheduler, record={}, signals=sap.StopRequests())
        training, parameters = sap.start_training(run, None, 0), run.student.trained().values()
        for parameter in parameters:
            parameter.register_hook(lambda gradient: gradients.append((gradient.dtype, gradient.device)))
        traffic.seen.clear()
        sap.train(run, training)
        places = {"trained": parameters, "parameters": run.student.parameters()}
        places = {name: [(one.dtype, one.device) for one in found] for name, found in places.items()}
    kinds = {name: sorted({f"{dtype} {device}" for dtype, device in found})
             for name, found in (places | {"gradients": gradients}).items()}  # fmt: skip
    fused = training.optimizer.optimizer.param_groups[0].get("fused") is True
    return {"traffic": traffic.seen, "peaks": peaks, "fused": fused, **kinds}


class EnoughError(Exception):
    """Two steps are counted."""


def launches(script: str, arguments: list[str]) -> dict:
    """What one optimizer step of a script starts, its share of a group's anchors included: [all, casts of these].

    The first step draws a group and computes its anchors, and counts as if the optimizer had its state already; the
    second one is like all that are left of the group.
    """
    sap = importlib.import_module(script)
    sap.load_part, torch.nn.Module._apply = load_part, convert
    torch.nn.functional.scaled_dot_product_attention = flash_attention
    args = sap.parse_args(arguments)
    args.steps_per_epoch = 1
    pretend()
    accelerator = sap.start_accelerator(args)
    images, scheduler = sap.SubjectImages(args), sap.training_scheduler(args)
    counted, before, after = Launches(), [], []

    def count(*_) -> None:
        after.append((counted.total, counted.casts))
        if len(after) == 2:
            raise EnoughError

    with FakeTensorMode(allow_non_fake_inputs=True), Traffic():
        run = sap.prepare(args, accelerator, images, scheduler=scheduler, record={}, signals=sap.StopRequests())
        training = sap.start_training(run, None, 0)
        optimizer = training.optimizer.optimizer
        optimizer.register_step_pre_hook(lambda *_: before.append(counted.total))
        optimizer.register_step_post_hook(count)
        with counted, contextlib.suppress(EnoughError):
            sap.train(run, training)
    (first, first_casts), (both, both_casts) = after
    state = (first - before[0]) - (both - before[1])
    group = args.max_train_steps
    found = [first - state + (group - 1) * (both - first), first_casts + (group - 1) * (both_casts - first_casts)]
    return {"launches": [number / group for number in found]}


def original_launches(script: str, arguments: list[str]) -> dict:
    """What a step of the script's original starts, counted in the same way: the same models, without an anchor.

    Written down here is what diffusers' script does with them at each step: a picture goes through the VAE, the models
    run in autocast, a LoRA is in half precision in bf16 and in float32 in fp16; prompts are encoded once unless their
    encoders train, and then T5 reads them too. The few operations that draw and noise are the fewest that can do it.
    """
    sap = importlib.import_module(script)
    sap.load_part, torch.nn.Module._apply = load_part, convert
    torch.nn.functional.scaled_dot_product_attention = flash_attention
    args = sap.parse_args(arguments)
    pretend()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    half = torch.float16 if args.mixed_precision == "fp16" else torch.bfloat16
    source, prompts = args.pretrained_model_name_or_path, [args.instance_prompt]
    counted = Launches()
    with FakeTensorMode(allow_non_fake_inputs=True), Traffic():
        vae = load_part(diffusers.AutoencoderKL, "", source, "vae", half).to(GPU)
        parts = {}
        for name, entry in sap.PIPELINE_CLASS.load_config(source).items():
            if name.startswith("text_encoder"):
                parts[name] = load_part(getattr(transformers, entry[1]), "", source, name, half)
        options = dict.fromkeys((sap.DENOISER, "vae")) | sap.UNUSED_PARTS
        pipeline = sap.PIPELINE_CLASS.from_pretrained(source, **parts, **options).to(GPU)
        denoiser = load_part(sap.DENOISER_CLASS, "", source, sap.DENOISER, half).to(GPU)
        adapted = {sap.DENOISER: (denoiser, sap.DENOISER_TARGETS)}
        if args.train_text_encoder:
            for name in sap.TRAINABLE_TEXT_ENCODERS:
                adapted[name] = (getattr(pipeline, name), sap.TEXT_ENCODER_TARGETS)
        parameters = []
        for module, targets in adapted.values():
            module.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
            cast_training_params(module, torch.float32 if half == torch.float16 else half)
            parameters += [parameter for parameter in module.parameters() if parameter.requires_grad]
            module.train()
        optimizer = accelerator.prepare(torch.optim.AdamW(parameters))
        edge = args.resolution
        pixels = torch.empty(1, 3, edge, edge, device=GPU, dtype=half)
        conditioning = sap.encode_prompts(pipeline, prompts, GPU)
        more = {}
        if "text_embeds" in conditioning:
            more = {"time_ids": torch.empty(1, 6, device=GPU)}
        for _ in range(2):  # the first step makes the optimizer's state
            before = counted.total, counted.casts
            with counted:
                with torch.no_grad():
                    latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(1000, (1,), device=GPU)
                model_input = latents + 0.5 * (noise - latents)
                with accelerator.autocast():
                    if args.train_text_encoder:
                        conditioning = sap.encode_prompts(pipeline, prompts, GPU)
                    prediction = sap.denoise(denoiser, model_input, timesteps, conditioning | more)
                loss = torch.nn.functional.mse_loss(prediction.float(), noise.float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    return {"launches": [counted.total - before[0], counted.casts - before[1]]}


def main(cases: Path) -> None:
    """Write what each case asks for beside them, or a log of what went wrong; each has a fork of this process.

    A case is the name of a function above, and its arguments.
    """
    for name, (function, *case) in json.loads(cases.read_text()).items():
        pid = os.fork()
        if pid == 0:
            log = cases.with_name(f"{name}.log").open("w")
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            cases.with_name(f"{name}.json").write_text(json.dumps(globals()[function](*case)))
            os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    for kind in ("sd15", "sdxl", "sd3"):
        importlib.import_module(f"train_sap_lora_{kind}")
    torch.set_num_threads(1)
    gc.freeze()  # or each stage would look through all of it for garbage
    main(Path(sys.argv[1]))
