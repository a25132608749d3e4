# SPDX-License-Identifier: Apache-2.0
"""The semantic anchor (Eq. 5 of arXiv 2511.22245) in any diffusers LoRA script, by one hook on the denoiser.

To be copied beside the script (paste_into_your_script.md has the lines for each of diffusers' own), which gains:
    anchor = SemanticAnchor(transformer, encoder_hidden_states=class_prompt_embeds)  # once, after add_adapter()
    loss = loss + args.anchor_weight * anchor.drift(weighting)  # in each micro-step, before backward()
"""

import contextlib
import inspect

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


class SemanticAnchor(contextlib.AbstractContextManager):
    """Keeps the student's call of `denoiser` (UNet or transformer with a LoRA) until `drift` repeats it as the anchor.

    `class_inputs` are those inputs of its `forward` that depend on the prompt, made of the class prompt by text
    encoders that have not learned yet: tensors (1, ...), lists of one, or dicts of some entries (`added_cond_kwargs`).
    Calls without gradient (sampling) are left alone; `remove()`, or the end of a `with` block, takes the hook away.
    Raises `TypeError` for an unknown input, `ValueError` where "adapters off" would not be the pretrained model.
    """

    def __init__(self, denoiser, **class_inputs):
        denoiser = extract_model_from_parallel(denoiser, keep_torch_compile=False)  # DDP is for the student alone
        self.denoiser = denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser
        self.signature = inspect.signature(type(self.denoiser).forward)
        self.signature.bind_partial(**class_inputs)
        self.class_inputs = class_inputs
        self.adapters = adapter_layers(self.denoiser)
        self.call = None
        self.hook = self.denoiser.register_forward_hook(self.keep_call, with_kwargs=True)

    def drift(self, weighting=None, output_map=lambda prediction: prediction, class_inputs=None):
        """The anchor's term for the student's last call: a float32 scalar with gradient, to be multiplied by w.

        weighting: a weight for each sample, (B,) or (B, 1, ...), as in the loss; 0 leaves one out (a dropped caption).
        output_map: what the script makes of a prediction (SD3's and EDM's preconditioning); gets both in float32.
        class_inputs: for this call alone, (B, ...): a class prompt for each caption, the empty one for a dropped one.
        """
        if self.call is None:
            raise RuntimeError("drift() found no call of the denoiser with gradient since the last drift()")
        if any(layer.merged for layer in self.adapters):
            raise RuntimeError("the adapters are merged into the weights: call unmerge_adapter() first")
        if getattr(self.denoiser, "_is_fsdp_managed_module", False):
            raise RuntimeError("under FSDP the denoiser has no whole weights between the student's calls: use DDP")
        call, autocast, student = self.call
        self.call = None
        class_inputs = self.class_inputs if class_inputs is None else class_inputs
        self.signature.bind_partial(**class_inputs)
        if not class_inputs:
            raise ValueError("no class inputs: the anchor would be that of the subject's prompt")
        for name, value in class_inputs.items():
            call.arguments[name] = expand(name, value, call.arguments.get(name), len(student))
        anchor = self.predict_anchor(call, autocast)
        distance = (output_map(student) - output_map(anchor)).square().flatten(1).mean(1)
        weights = torch.ones_like(distance) if weighting is None else weighting.flatten().float()
        if len(weights) != len(distance):
            raise ValueError(f"weighting is for {len(weights)} samples, the student's call for {len(distance)}")
        return (weights * distance).mean()

    def remove(self):
        self.hook.remove()
        self.call = None

    def __exit__(self, *exception):
        self.remove()

    def keep_call(self, denoiser, args, kwargs, output):
        student = prediction_of(output) if torch.is_grad_enabled() else None
        if student is None or not student.requires_grad:
            return
        if self.call is not None:
            self.call = None
            raise RuntimeError("the denoiser was called twice with gradient, without a drift() in between")
        device = student.device.type  # the repeat gets the same autocast, in a region of its own, without its cache
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False)
        self.call = (self.signature.bind(denoiser, *args, **kwargs), autocast, student)

    def predict_anchor(self, call, autocast):
        before = [layer._disable_adapters for layer in self.adapters]
        try:
            for layer in self.adapters:
                layer._disable_adapters = True  # the flag alone: disable_adapters() moves requires_grad too
            with torch.no_grad(), autocast:
                return prediction_of(self.denoiser(*call.args[1:], **call.kwargs))
        finally:
            for layer, disabled in zip(self.adapters, before, strict=True):
                layer._disable_adapters = disabled


def adapter_layers(denoiser):
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    parts = {part for layer in layers for part in layer.adapter_layer_names}
    if not layers:
        raise ValueError("the denoiser has no adapters: make its anchor after add_adapter()")
    for name, parameter in denoiser.named_parameters():
        path = set(name.split("."))
        if "modules_to_save" in path or (parameter.requires_grad and not path & parts):
            raise ValueError(f"{name} trains but is no adapter (modules_to_save?): it cannot be switched off")
    return layers


def expand(name, value, of_student, batch):
    if isinstance(value, dict):
        return of_student | {key: expand(key, part, of_student.get(key), batch) for key, part in value.items()}
    if isinstance(value, torch.Tensor | list) and len(value) not in (1, batch):
        raise ValueError(f"{name} is for {len(value)} samples, the student's call for {batch}: give 1, or {batch}")
    if isinstance(value, list):
        return value * (batch // len(value))
    return value.expand(batch, *value.shape[1:]) if isinstance(value, torch.Tensor) else value


def prediction_of(output):
    if not isinstance(output, torch.Tensor | list):
        output = output[0]
    return (torch.stack(output) if isinstance(output, list) else output).float()
