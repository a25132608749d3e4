# SPDX-License-Identifier: Apache-2.0
"""examples/sap_anchor.py on small models of diffusers' classes, against anchors that are computed by hand."""

import ast
import copy
import socket
import sys
from pathlib import Path

import forks
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    EDMEulerScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model
from runner import ROOT, reset
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(ROOT / "examples"))
from sap_anchor import SemanticAnchor  # noqa: E402 (it lies in examples/)

FILE = ROOT / "examples" / "sap_anchor.py"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TIMESTEPS = torch.tensor([3.0, 700.0])
TIMES = TIMESTEPS / 1000

# ---- Denoisers: a model, its inputs for two samples in the order of its forward, how many of them the script gives by
# position, and the class prompt's inputs, of another length where the model takes that ----


def unet(**config):
    more = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(**more, down_block_types=down, up_block_types=up, cross_attention_dim=8, **config)


def sd15():
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": TIMESTEPS, "encoder_hidden_states": torch.randn(2, 5, 8)}
    return unet(), inputs | {"return_dict": False}, 3, {"encoder_hidden_states": torch.randn(1, 7, 8)}


def sdxl():
    time_ids = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    model = unet(**time_ids, projection_class_embeddings_input_dim=32)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": TIMESTEPS, "encoder_hidden_states": torch.randn(2, 5, 8)}
    inputs["added_cond_kwargs"] = {"time_ids": 64 * torch.rand(2, 6), "text_embeds": torch.randn(2, 8)}
    pooled = {"text_embeds": torch.randn(1, 8)}
    return model, inputs, 3, {"encoder_hidden_states": torch.randn(1, 7, 8), "added_cond_kwargs": pooled}


def sd3():
    widths = {"joint_attention_dim": 8, "caption_projection_dim": 32, "pooled_projection_dim": 8}
    channels = {"in_channels": 4, "out_channels": 4}
    model = SD3Transformer2DModel(8, num_layers=2, pos_embed_max_size=8, **channels, **HEADS, **widths)
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8)}
    inputs |= {"pooled_projections": torch.randn(2, 8), "timestep": TIMESTEPS, "return_dict": False}
    return model, inputs, 0, {"encoder_hidden_states": torch.randn(1, 7, 8), "pooled_projections": torch.randn(1, 8)}


def flux():
    widths = {"in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)}
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True, **HEADS, **widths)
    inputs = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 5, 8)}
    inputs |= {"pooled_projections": torch.randn(2, 8), "timestep": TIMES, "guidance": torch.ones(2)}
    inputs |= {"img_ids": torch.rand(16, 3), "txt_ids": torch.zeros(5, 3), "return_dict": False}
    return model, inputs, 0, {"encoder_hidden_states": torch.randn(1, 5, 8), "pooled_projections": torch.randn(1, 8)}


def flux2():
    widths = {"in_channels": 4, "joint_attention_dim": 8, "timestep_guidance_channels": 16}
    model = Flux2Transformer2DModel(num_layers=1, num_single_layers=1, axes_dims_rope=(4, 4, 4, 4), **HEADS, **widths)
    inputs = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 5, 8)}
    inputs |= {"timestep": TIMES, "guidance": torch.ones(2), "return_dict": False}
    inputs |= {"img_ids": torch.rand(1, 16, 4).expand(2, 16, 4), "txt_ids": torch.zeros(2, 5, 4)}
    return model, inputs, 0, {"encoder_hidden_states": torch.randn(1, 5, 8)}


def z_image():
    widths = {"in_channels": 4, "dim": 32, "cap_feat_dim": 8, "axes_dims": [4, 4, 8], "axes_lens": [64, 8, 8]}
    model = ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, **widths)
    model.x_pad_token.data.zero_()  # left as memory has it
    model.cap_pad_token.data.zero_()
    inputs = {"x": list(torch.randn(2, 4, 1, 8, 8)), "t": TIMES, "cap_feats": list(torch.randn(2, 5, 8))}
    return model, inputs | {"return_dict": False}, 3, {"cap_feats": [torch.randn(7, 8)]}


def qwen_image():
    widths = {"in_channels": 4, "out_channels": 1, "joint_attention_dim": 8, "axes_dims_rope": (4, 4, 8)}
    model = QwenImageTransformer2DModel(num_layers=1, **HEADS, **widths)
    inputs = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 5, 8)}
    inputs |= {"encoder_hidden_states_mask": None, "timestep": TIMES, "img_shapes": [(1, 4, 4)] * 2}
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    class_inputs = {"encoder_hidden_states": torch.randn(1, 7, 8), "encoder_hidden_states_mask": mask}
    return model, inputs | {"return_dict": False}, 0, class_inputs


def sana():
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    model = SanaTransformer2DModel(4, 4, num_layers=1, sample_size=8, caption_channels=8, **HEADS, **cross)
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8)}
    inputs |= {"timestep": TIMESTEPS, "encoder_attention_mask": torch.ones(2, 5)}
    class_inputs = {"encoder_hidden_states": torch.randn(1, 7, 8), "encoder_attention_mask": torch.ones(1, 7)}
    return model, inputs, 0, class_inputs


DENOISERS = [sd15, sdxl, sd3, flux, flux2, z_image, qwen_image, sana]


def for_two(value, of_student):
    """A class input for two samples, by hand."""
    if isinstance(value, dict):
        return {**of_student, **{name: for_two(part, None) for name, part in value.items()}}
    return 2 * value if isinstance(value, list) else torch.cat([value, value])


class Student:
    """A model with a LoRA that has an effect, and a copy from before it had one."""

    def __init__(self, denoiser, **config):
        torch.manual_seed(0)
        self.model, self.inputs, self.positional, self.class_inputs = denoiser()
        for parameter in self.model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # some start as zero
        self.base = copy.deepcopy(self.model)
        self.model.requires_grad_(False).train()
        self.model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **config))
        self.forward = self.model

    def watched(self) -> SemanticAnchor:
        return SemanticAnchor(self.model, **self.class_inputs)

    def predict(self) -> Tensor:
        """What a script does."""
        values = list(self.inputs.values())[: self.positional]
        named = dict(list(self.inputs.items())[self.positional :])
        return stacked(self.forward(*values, **named))

    def anchor(self, **more) -> Tensor:
        """By hand."""
        changed = {name: for_two(value, self.inputs[name]) for name, value in self.class_inputs.items()}
        with torch.no_grad():
            return stacked(self.base(**{**self.inputs, **changed, **more}))

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        names = self.trained()
        return dict(zip(names, torch.autograd.grad(loss, list(names.values()), retain_graph=True), strict=True))


def stacked(output) -> Tensor:
    prediction = output[0]
    return torch.stack(prediction).float() if isinstance(prediction, list) else prediction.float()


def distance(prediction: Tensor, anchor: Tensor) -> Tensor:
    return (prediction - anchor).square().mean()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-5
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=tolerance * largest), name


def same(one: Tensor, other: Tensor, rtol: float = 1e-5) -> bool:
    return torch.allclose(one, other, rtol=rtol)


# ---- The anchor, and the gradient of its term ----


HOW = [*((denoiser, how) for denoiser in DENOISERS for how in ("float32", "bf16")), (sana, "fp16")]


@pytest.mark.parametrize(("denoiser", "how"), HOW)
def test_drift_and_gradient_are_those_of_an_anchor_by_hand(denoiser, how):
    student = Student(denoiser)
    before = {name: one.requires_grad for name, one in student.model.named_parameters()}
    anchor = student.watched()
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[how]
    with torch.autocast("cpu", dtype, enabled=how != "float32"):
        if how == "bf16":
            student.model.enable_gradient_checkpointing()
        prediction = student.predict()
        by_hand = student.anchor()
        for_subject = stacked(student.base(**student.inputs))
    drift = anchor.drift()  # outside of autocast, as in the scripts
    expected = distance(prediction, by_hand)
    assert drift.dtype == torch.float32
    assert same(drift, expected)
    assert not torch.allclose(by_hand, for_subject, atol=1e-4)
    assert_close(student.gradients(drift), student.gradients(expected), 1e-3 if how == "fp16" else 1e-5)
    assert {name: one.requires_grad for name, one in student.model.named_parameters()} == before
    assert student.model.active_adapters() == ["default"]


def test_inputs_that_learn_get_the_students_gradient_alone():
    student = Student(sana)
    by_hand = student.anchor()
    latents = student.inputs["hidden_states"].requires_grad_(True)
    anchor = student.watched()
    expected = distance(student.predict(), by_hand)
    (found,) = torch.autograd.grad(anchor.drift(), latents, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, latents)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max())


@pytest.mark.parametrize("made", ["before prepare", "after prepare"])
def test_a_prepared_model_predicts_the_anchor_in_its_own_mixed_precision(made):
    """accelerate puts autocast around `forward`, where no autocast is to be seen from outside."""
    student = Student(qwen_image)
    reset()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    anchor = student.watched() if made == "before prepare" else None
    student.forward = accelerator.prepare(student.model)
    anchor = anchor or SemanticAnchor(student.forward, **student.class_inputs)
    prediction = student.predict()
    with torch.autocast("cpu", torch.bfloat16):
        expected = distance(prediction, student.anchor())
    assert same(anchor.drift(), expected)
    assert not same(distance(prediction, student.anchor()), expected)


def test_drift_inside_an_autocast_region_leaves_the_lora_its_gradient():
    """Both forwards in one region: weights that were cast for the one without gradient must not serve the other."""
    student = Student(sd3)
    anchor = student.watched()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            student.predict()
            assert min(gradient.abs().max() for gradient in student.gradients(anchor.drift()).values()) > 0


def test_gradients_of_accumulated_micro_steps_are_averaged():
    student = Student(sana)
    by_hand = student.anchor()
    reset()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    student.forward = accelerator.prepare(student.model)
    anchor = student.watched()
    for factor in (1.0, 3.0):
        with accelerator.accumulate(student.forward):
            student.predict()
            accelerator.backward(anchor.drift(torch.full((2,), factor)))
    found = {name: parameter.grad for name, parameter in student.trained().items()}
    assert_close(found, student.gradients(2.0 * distance(student.predict(), by_hand)))


def student_of(rank: int) -> Student:
    student = Student(qwen_image)
    student.inputs["hidden_states"] = student.inputs["hidden_states"] * (1 + rank)
    return student


def one_rank(rank: int, port: int, gradients: Path) -> None:
    """One of two processes, each with a sample of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    student = student_of(rank)
    student.forward = nn.parallel.DistributedDataParallel(student.model)
    anchor = SemanticAnchor(student.model if rank == 0 else student.forward, **student.class_inputs)
    student.predict()
    anchor.drift().backward()
    torch.save({name: one.grad for name, one in student.trained().items()}, gradients / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_train_on_the_mean_of_their_gradients(tmp_path):
    forks.start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [forks.CONTEXT.Process(target=one_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(forks.PATIENCE)
    assert [process.exitcode for process in ranks] == [0, 0]
    students = [student_of(rank) for rank in range(2)]
    first, second = (one.gradients(distance(one.predict(), one.anchor())) for one in students)
    mean = {name: (gradient + second[name]) / 2 for name, gradient in first.items()}
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), mean)


@pytest.mark.parametrize("kind", ["dora", "dropout", "rslora", "wrapped by peft", "compiled", "compiled blocks"])
def test_kinds_of_models(kind):
    configs = {"dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.5}, "rslora": {"use_rslora": True}}
    student = Student(qwen_image if "compiled" in kind else sd15, **configs.get(kind, {}))
    if kind == "wrapped by peft":
        config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
        student.model = student.forward = get_peft_model(copy.deepcopy(student.base), config)
    anchor = student.watched()
    if kind == "compiled":
        student.forward = torch.compile(student.model, backend="eager")
    if kind == "compiled blocks":
        student.model.compile_repeated_blocks(backend="eager")
    for _ in range(2):
        prediction = student.predict()
        assert same(anchor.drift(), distance(prediction, student.anchor()))


# ---- Maps, weights, prompts ----


def test_student_and_anchor_go_through_the_same_output_map():
    student = Student(sd3)
    anchor = student.watched()
    sigmas = torch.tensor([0.02, 0.7])[:, None, None, None]
    noisy = student.inputs["hidden_states"]
    scheduler = EDMEulerScheduler()
    for output_map in (lambda p: p * (-sigmas) + noisy, lambda p: scheduler.precondition_outputs(noisy, p, sigmas)):
        prediction = student.predict()
        drift = anchor.drift(output_map=output_map)
        assert same(drift, distance(output_map(prediction), output_map(student.anchor())), 1e-4)
        assert not same(drift, distance(prediction, student.anchor()), 0.1)


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1, 1), (2, 1, 1, 1, 1)])
@pytest.mark.parametrize("denoiser", [flux, z_image])
def test_weights_of_samples(denoiser, shape):
    student = Student(denoiser)
    anchor = student.watched()
    first, second = (student.predict() - student.anchor()).square()
    drift = anchor.drift(torch.tensor([3.0, 0.5]).reshape(shape))
    assert same(drift, (3 * first.mean() + 0.5 * second.mean()) / 2)
    student.predict()
    assert same(anchor.drift(torch.tensor([1, 0])), first.mean() / 2)  # the second one left out
    student.predict()
    with pytest.raises(ValueError, match="weighting is for 1 samples, the student's call for 2"):
        anchor.drift(torch.ones(1))


@pytest.mark.parametrize("denoiser", [sdxl, z_image])
def test_class_prompts_for_each_caption(denoiser):
    """What a call names replaces the constructor's for this call; a tensor of two and a list of two go as they are."""
    student = Student(denoiser)
    anchor = student.watched()
    class_inputs = {"cap_feats": [torch.randn(3, 8), torch.randn(6, 8)]}
    changed = class_inputs
    if denoiser is sdxl:
        pooled = {"text_embeds": torch.randn(2, 8)}
        class_inputs = {"encoder_hidden_states": torch.randn(2, 6, 8), "added_cond_kwargs": pooled}
        changed = class_inputs | {"added_cond_kwargs": {**student.inputs["added_cond_kwargs"], **pooled}}
    prediction = student.predict()
    drift = anchor.drift(class_inputs=class_inputs)
    assert same(drift, distance(prediction, student.anchor(**changed)))
    student.predict()
    usual = anchor.drift()
    assert same(usual, distance(prediction, student.anchor()))
    assert not same(usual, drift, 1e-3)


# ---- What it refuses ----


def peft_model(**config) -> nn.Module:
    return get_peft_model(copy.deepcopy(Student(sana).base), LoraConfig(target_modules=["to_q"], **config))


def with_trained_output() -> nn.Module:
    model = Student(sana).model
    model.proj_out.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (with_trained_output, "proj_out.weight trains but is no adapter"),
        (lambda: Student(sana).base, "the denoiser has no adapters"),
        (lambda: peft_model(bias="all"), "bias trains but is no adapter"),
        (lambda: peft_model(modules_to_save=["proj_out"]).requires_grad_(False), "modules_to_save"),
    ],
)
def test_what_cannot_be_switched_off(make, says):
    with pytest.raises(ValueError, match=says):
        SemanticAnchor(make(), encoder_hidden_states=torch.randn(1, 7, 8))


def test_inputs_that_do_not_fit():
    student = Student(sana)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cap_feats'"):
        SemanticAnchor(student.model, cap_feats=[torch.randn(7, 8)])
    anchor = SemanticAnchor(student.model)
    for error, says, more in (
        (TypeError, "unexpected keyword argument 'prompt_embeds'", {"prompt_embeds": torch.randn(1, 7, 8)}),
        (ValueError, "no class inputs", None),
        (
            ValueError,
            "_states is for 3 samples, the student's call for 2",
            {"encoder_hidden_states": torch.ones(3, 7, 8)},
        ),
    ):
        student.predict()
        with pytest.raises(error, match=says):
            anchor.drift(class_inputs=more)


def test_merged_adapters():
    student = Student(sana)
    anchor = student.watched()
    student.predict()
    student.model.fuse_lora()
    with pytest.raises(RuntimeError, match="merged into the weights"):
        anchor.drift()


def test_one_call_of_the_denoiser_for_each_drift():
    student = Student(sana)
    anchor = student.watched()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="found no call"):
            anchor.drift()
        student.predict()
        anchor.drift()
    student.predict()
    with pytest.raises(RuntimeError, match="called twice"):
        student.predict()
    student.predict()  # a cell of a notebook that is run again
    anchor.drift()


def test_a_model_under_fsdp(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = Student(sana)
        anchor = student.watched()
        fully_shard(student.model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        student.predict()
        with pytest.raises(RuntimeError, match="FSDP"):
            anchor.drift()
    finally:
        torch.distributed.destroy_process_group()


# ---- It disturbs nothing ----


def test_adapters_come_back_after_an_error_in_the_repeat():
    student = Student(sana)
    anchor = student.watched()
    before = student.predict()
    with pytest.raises(RuntimeError):
        anchor.drift(class_inputs={"encoder_hidden_states": torch.randn(1, 7, 9)})
    after = student.predict()
    assert torch.equal(before, after)
    assert after.requires_grad


def test_sampling_and_saving_between_call_and_drift(tmp_path):
    student = Student(sana)
    names = student.model.state_dict().keys()
    anchor = student.watched()
    prediction = student.predict()
    with torch.no_grad():
        assert torch.equal(student.predict(), prediction)
    with torch.inference_mode():
        student.predict()
    student.model.save_lora_adapter(tmp_path)
    student.model.requires_grad_(False)
    student.predict()  # nothing trains
    student.model.enable_lora()
    assert student.model.state_dict().keys() == names
    assert same(anchor.drift(), distance(prediction, student.anchor()))


def test_sampling_pictures_of_two_sizes():
    """Z-Image's list may hold them; they could not be stacked."""
    student = Student(z_image)
    student.watched()
    student.inputs["x"] = [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 4, 8)]
    with torch.no_grad():
        sizes = [one.shape for one in student.model(**student.inputs)[0]]
    assert sizes == [(4, 1, 8, 8), (4, 1, 4, 8)]


def test_removing_it():
    student = Student(sana)
    with student.watched() as anchor:
        student.predict()
        anchor.drift()
    assert not student.model._forward_hooks
    student.predict()
    student.predict()
    with pytest.raises(RuntimeError, match="found no call"):
        anchor.drift()
    student.watched().remove()
    assert not student.model._forward_hooks


def test_the_file_is_small_and_stands_alone():
    source = FILE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name if isinstance(node, ast.Import) else node.module for node in imports for alias in node.names}
    assert {name.split(".")[0] for name in names} == {"accelerate", "contextlib", "inspect", "peft", "torch"}
