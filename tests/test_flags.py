# SPDX-License-Identifier: Apache-2.0
"""Command lines that cannot work end in one sentence that names the flag; those that can work train."""

import json
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from runner import LORA_FILE, ROOT, flags, lora, reset, without

SD15, SDXL, SD3 = SCRIPTS = [f"train_sap_lora_{kind}" for kind in ("sd15", "sdxl", "sd3")]


def run_script(script: str, arguments: list[str]) -> int:
    """Run a script as `python SCRIPT ...` does, to its last line, in this process; returns its exit status."""
    reset()
    before = sys.argv, sys.stdout, sys.stderr
    sys.argv = [f"{script}.py", *arguments]
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    except SystemExit as stopped:
        return stopped.code
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    return 0


# ---- Bases: whole ones of the three kinds, and damaged ones ----


@pytest.fixture(scope="module")
def two_photos(tmp_path_factory) -> Path:
    """Two pictures: an epoch is short."""
    return tiny_pipelines.save_photos(tmp_path_factory.mktemp("data") / "two", count=2)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, path.with_suffix(".bin"))
    path.unlink()


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
BASE = "--pretrained_model_name_or_path"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
UNET_CONFIG, VAE_CONFIG, TEXT = "unet/config.json", "vae/config.json", "text_encoder/model.safetensors"
T5, UNKNOWN = ["transformers", "T5EncoderModel"], ["transformers", "NoSuchModel"]
DAMAGES = [  # what happens to which file of the base of SD1.5, and what the sentence says
    (remove, INDEX, {}, INDEX),
    (cut, INDEX, {"size": 10}, INDEX),
    (edit, INDEX, {"vae": [None, None]}, "without vae"),
    (edit, INDEX, {"unet": [None, None]}, "without unet"),
    (edit, INDEX, {"text_encoder": [None, None]}, "without text_encoder"),
    (edit, INDEX, {"text_encoder": T5}, "T5EncoderModel"),
    (edit, INDEX, {"text_encoder": UNKNOWN}, "NoSuchModel"),
    (edit, INDEX, {"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DCondition"),
    (remove, "unet", {}, "unet/config.json is missing"),
    (remove, UNET, {}, "unet holds no weights"),
    (remove, "tokenizer", {}, "tokenizer/tokenizer_config.json is missing"),
    (remove, "scheduler", {}, "scheduler/scheduler_config.json is missing"),
    (remove, "vae", {}, "vae/config.json is missing"),
    (cut, UNET, {"size": 1000}, f"{UNET} is damaged"),
    (cut, TEXT, {"size": 0}, f"{TEXT} is damaged"),
    (cut, VAE, {"size": -1}, f"{VAE} is damaged"),
    (pickle, UNET, {}, "safetensors"),
    (pickle, TEXT, {}, "safetensors"),
    (cut, UNET_CONFIG, {"size": 10}, UNET_CONFIG),
    (edit, UNET_CONFIG, {"in_channels": 9}, "have 4 channels and the unet of"),
    (edit, UNET_CONFIG, {"cross_attention_dim": 48}, "reads 48 numbers a token"),
    (edit, "text_encoder/config.json", {"hidden_size": 48}, "make 48"),
    (edit, VAE_CONFIG, {"scaling_factor": None}, "scaling_factor"),
    (edit, SCHEDULER, {"num_train_timesteps": 1}, "timestep"),
    (edit, SCHEDULER, {"beta_schedule": "steep"}, "steep"),
    (edit, SCHEDULER, {"prediction_type": "sample"}, "prediction_type is sample"),
    (Path.rename, UNET, {"target": "diffusion_pytorch_model.fp16.safetensors"}, "--variant"),
]


@pytest.mark.parametrize(("damage", "name", "how", "words"), DAMAGES)
def test_a_damaged_base_is_refused_before_anything_is_loaded(
    damage, name, how, words, bases, photos, tmp_path, capsys
):
    base = tmp_path / "base"
    shutil.copytree(bases[SD15], base)
    if "target" in how:
        how = {"target": base / "unet" / how["target"]}
    damage(base / name, **how)
    status = run_script(SD15, flags(base, photos, tmp_path / "out"))
    sentence = only_sentence(capsys.readouterr().err)
    assert status == 2
    assert words in sentence
    assert BASE in sentence or "--variant" in sentence


def only_sentence(err: str) -> str:
    """The one line that begins with the script's name and says what is wrong."""
    assert "Traceback" not in err
    (sentence,) = [line for line in err.splitlines() if ".py: error: " in line]
    assert len(sentence) < 600
    return sentence


# ---- The table: script, flags (a flag ending in "=" is left out), what the sentence names ----

MISTAKES = [
    (SD15, "--rank=0", "--rank: must be at least 1, not '0'"),
    (SD15, "--rank=2.5", "--rank"),
    (SD15, "--max_train_steps=0", "--max_train_steps"),
    (SD15, "--max_train_steps=many", "--max_train_steps: must be at least 1, not 'many'"),
    (SD15, "--train_batch_size=0", "--train_batch_size"),
    (SD15, "--gradient_accumulation_steps=0", "--gradient_accumulation_steps"),
    (SD15, "--num_train_epochs=-1", "--num_train_epochs"),
    (SD15, "--learning_rate=inf", "--learning_rate"),
    (SD15, "--learning_rate=-1e-4", "--learning_rate"),
    (SD15, "--text_encoder_lr=nan", "--text_encoder_lr"),
    (SD15, "--lr_power=nan", "--lr_power"),
    (SD15, "--lr_num_cycles=0", "--lr_num_cycles"),
    (SD15, "--lr_warmup_steps=-1", "--lr_warmup_steps"),
    (SD15, "--lr_scheduler=piecewise_constant", "--lr_scheduler: must be one of linear, cosine"),
    (SD15, "--optimizer=sgd", "--optimizer: must be AdamW or prodigy"),
    (SD15, "--prodigy_beta3=2", "--prodigy_beta3"),
    (SD15, "--prodigy_decouple=maybe", "--prodigy_decouple: invalid bool value"),
    (SD15, "--adam_beta1=1", "--adam_beta1"),
    (SD15, "--adam_epsilon=0", "--adam_epsilon"),
    (SD15, "--max_grad_norm=nan", "--max_grad_norm"),
    (SD15, "--seed=-1", "--seed"),
    (SD15, "--seed=9223372036854775808", "--seed: must be from 0 to 9223372036854775807"),
    (SD15, "--mixed_precision=int8", "--mixed_precision"),
    (SD15, "--resolution=500", "--resolution: must be a multiple of 8"),
    (SD15, "--aspect_ratio_buckets=64x64", '"h,w;h,w"'),
    (SD15, "--aspect_ratio_buckets=64,60", '--aspect_ratio_buckets: must be "h,w;h,w" in multiples of 8'),
    (SD15, "--aspect_ratio_buckets=0,0", "--aspect_ratio_buckets"),
    (SD15, "--caption_dropout=1", "--caption_dropout"),
    (SD15, "--image_interpolation_mode=cubic", "--image_interpolation_mode"),
    (SD15, "--anchor_weight=-1", "--anchor_weight"),
    (SD15, "--anchor_weight=nan", "--anchor_weight"),
    (SD15, "--anchor_weight=half", "--anchor_weight"),
    (SD15, "--anchor_source=ema", "--anchor_source"),
    (SD15, "--anchor_batch_size=0", "--anchor_batch_size"),
    (SD15, "--class_prompt= --instance_prompt=dog", "the anchor needs a prompt for the class: --class_prompt"),
    (SD15, "--instance_prompt=", "--instance_prompt"),
    (SD15, "--class_token=dog", "--subject_token"),
    (SD15, "--class_prompt= --subject_token=zwx", '"a photo of sks dog" does not hold the word "zwx"'),
    (SD15, "--lora_alpha=0", "--lora_alpha"),
    (SD15, "--lora_dropout=-.1", "--lora_dropout"),
    (SD15, "--lora_layers=to_k,,to_v", "--lora_layers"),
    (SD15, "--lora_layers=nothing", "--lora_layers: "),
    (SD15, "--lora_layers=norm1", "--lora_layers"),
    (SD15, "--init_lora=/nowhere", "--init_lora /nowhere"),
    (SD15, "--snr_gamma=0", "--snr_gamma"),
    (SD15, "--unmasked_weight=2", "--unmasked_weight: must be from 0 to 1"),
    (SD15, "--alpha_mask --anchor_weight=0", "masks need the anchor"),
    (SD15, "--class_share=.5 --anchor_weight=0", "--class_share trains on the anchor"),
    (SD15, "--class_share=.5 --anchor_source=finetuned", "--class_share needs --anchor_source pretrained"),
    (SD15, "--class_share=1", "--class_share: must be at least 0 and below 1"),
    (SD15, "--alpha_mask", "--alpha_mask: the mask of 00.jpg: 100% of it is white"),
    (SD15, "--instance_data_dir=/nowhere", "--instance_data_dir: must be a folder that is there, not '/nowhere'"),
    (SD15, "--instance_data_dir=", "either --instance_data_dir or --dataset_name"),
    (SD15, "--dataset_name=some/dataset", "either --instance_data_dir or --dataset_name"),
    (SD15, "--instance_data_dir= --dataset_name=/nowhere/at/all", "--dataset_name /nowhere/at/all"),
    (SD15, f"{BASE}=/nowhere", f"{BASE} /nowhere"),
    (SD15, f"{BASE}=nobody/nothing", f"{BASE} nobody/nothing"),
    (SD15, f"{BASE}={__file__}", "is a single file"),
    (SD15, f"{BASE}=", f"{BASE}"),
    (SD15, f"{BASE}={SDXL}", "StableDiffusionXLPipeline with text_encoder_2: this script trains Stable Diffusion 1.x"),
    (SD15, f"{BASE}={SD3}", "SDXL and SD3 have scripts of their own"),
    (SD15, "--variant=fp16", "variant=fp16"),
    (SD15, "--tokenizer_name=/nowhere", "--tokenizer_name /nowhere"),
    (SD15, "--tokenizer_max_length=2", "--tokenizer_max_length"),
    (SD15, "--tokenizer_max_length=78", "--tokenizer_max_length 78: the text encoder reads 77"),
    (SD15, "--validation_images a.png", "--validation_images"),
    (SD15, "--class_labels_conditioning=timesteps", "--class_labels_conditioning"),
    (SD15, "--train_text_encoder --pre_compute_text_embeddings", "--train_text_encoder"),
    (SD15, "--enable_xformers_memory_efficient_attention", "pip install xformers"),
    (SD15, "--num_validation_images=-1", "--num_validation_images"),
    (SD15, "--validation_prompts_file=/nowhere", "--validation_prompts_file"),
    (SD15, "--checkpointing_steps=0", "--checkpointing_steps"),
    (SD15, "--checkpoints_total_limit=0", "--checkpoints_total_limit"),
    (SD15, "--resume_from_checkpoint=checkpoint-7", "--resume_from_checkpoint checkpoint-7"),
    (SD15, "--report_to=paper", "--report_to must be one of"),
    (SD15, "--report_to=clearml", "pip install clearml"),
    (SD15, "--report_to=wandb --hub_token=secret", "--hub_token"),
    (SD15, f"--output_dir={__file__}", "--output_dir"),
    (SD15, "--output_dir=a\0b", "--output_dir a"),
    (SD15, "--output_dir=~nobody-of-this-name/out", "--output_dir"),
    (SD15, f"{BASE}=C:\\models\\sd15", "is no folder here, and no name on the hub"),
    (SD15, "--push_to_hub --hub_model_id=a/b/c", "--hub_model_id"),
    (SD15, "--push_to_hub", "HF_HUB_OFFLINE"),
    (SD15, "--output_dir=PHOTOS", "is in the folder of the photos"),
    (SD15, "--output_dir=PHOTOS/out", "is in the folder of the photos"),
    (SD15, f"--output_dir={'ä' * 128}", "--output_dir"),
    (SD15, "--learning_rate=4e38", "--learning_rate"),
    (SD15, "--alpha_mask --mask_dir=PHOTOS", "two sources of masks"),
    (SD15, "--train_text_encoder_ti", "--train_text_encoder_ti of diffusers' advanced scripts is not supported; --"),
    (SD15, "--train_text_encoder_frac=0.5", "--train_text_encoder_frac of diffusers' advanced scripts is not"),
    (SD15, "--token_abstraction=TOK", "--token_abstraction of diffusers' advanced scripts is not supported; --"),
    (SD15, "--clas_prompt=x", "--clas_prompt=x; did you mean --class_prompt?"),
    (SD15, "--lerning_rate=1", "--lerning_rate=1; did you mean --learning_rate?"),
    (SD15, "--do_edm_style_training", "--do_edm_style_training"),
    (SDXL, f"{BASE}={SD15}", "without text_encoder_2: this script trains Stable"),
    (SDXL, f"{BASE}={SD3}", "this script trains Stable Diffusion XL"),
    (SDXL, "--do_edm_style_training --snr_gamma=5", "--snr_gamma cannot go with --do_edm_style_training"),
    (SDXL, "--pretrained_vae_model_name_or_path=/nowhere", "--pretrained_vae_model_name_or_path /nowhere"),
    (SDXL, f"--pretrained_vae_model_name_or_path={SD3}/vae", "the VAE's latents have 16 channels"),
    (SDXL, "--tokenizer_name=x", "--tokenizer_name"),
    (SDXL, "--anchor_weight=inf", "--anchor_weight"),
    (SDXL, "--resolution=1023", "--resolution"),
    (SD3, f"{BASE}={SD15}", "this script trains Stable Diffusion 3"),
    (SD3, f"{BASE}={SDXL}", "this script trains Stable Diffusion 3"),
    (SD3, "--resolution=520", "--resolution: must be a multiple of 16"),
    (SD3, "--resolution=528", "--resolution and --aspect_ratio_buckets: the base knows edges of 512 pixels at most"),
    (SD3, "--max_sequence_length=0", "--max_sequence_length: must be from 1 to 512"),
    (SD3, "--max_sequence_length=513", "--max_sequence_length: must be from 1 to 512"),
    (SD3, "--logit_std=-1", "--logit_std"),
    (SD3, "--logit_mean=nan", "--logit_mean"),
    (SD3, "--mode_scale=inf", "--mode_scale"),
    (SD3, "--precondition_outputs=2", "--precondition_outputs"),
    (SD3, "--weighting_scheme=none", "--weighting_scheme"),
    (SD3, "--lora_blocks=0,2", "--lora_blocks 0,2: the base has the blocks 0 to 1"),
    (SD3, "--lora_blocks=0,x", "--lora_blocks"),
    (SD3, "--snr_gamma=5", "--snr_gamma"),
    (SD3, "--output_kohya_format", "--output_kohya_format"),
    (SD3, "--enable_xformers_memory_efficient_attention", "--enable_xformers_memory_efficient_attention"),
    (SD3, "--lora_layers=to_nothing", "--lora_layers: "),
    (SD3, "--lora_blocks=1 --lora_layers=to_add_out", "--lora_layers: "),
]


@pytest.mark.parametrize(("script", "mistake", "words"), MISTAKES, ids=[f"{s[-4:]} {m}" for s, m, _ in MISTAKES])
def test_a_mistake_ends_in_one_sentence_and_status_2(script, mistake, words, bases, photos, tmp_path, capsys):
    for other, base in (bases | {"PHOTOS": photos}).items():
        mistake = mistake.replace(f"={other}", f"={base}")
    more = mistake.split()
    left_out = [flag.rstrip("=") for flag in more if flag.endswith("=")]
    arguments = without(flags(bases[script], photos, tmp_path / "out", *more), *left_out)
    assert run_script(script, arguments) == 2
    sentence = only_sentence(capsys.readouterr().err)
    assert words in sentence
    assert "secret" not in sentence
    assert not list(tmp_path.glob("out/[!.]*"))


EMPTY = ["instance_prompt", "class_prompt", "output_dir", "instance_data_dir", "resume_from_checkpoint", "revision",
         "mask_dir", "validation_data_dir", "init_lora"]  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_value_is_a_mistake(name, bases, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photos)  # where an empty path would lead
    assert run_script(SD15, flags(bases[SD15], photos, tmp_path, f"--{name}=")) == 2
    assert f"argument --{name}: must be " in only_sentence(capsys.readouterr().err)


def test_what_a_user_sees_of_a_mistake(bases, photos, tmp_path):
    launcher = ["--quiet", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    arguments = [f"{ROOT / SD15}.py", *flags(bases[SDXL], photos, tmp_path / "out")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 1  # accelerate's own
    assert f"{BASE} {bases[SDXL]} is a StableDiffusionXLPipeline" in only_sentence(result.stderr)
    assert result.stdout == ""


# ---- Any combination of valid flags trains, or is refused in one sentence ----

ANY = {
    "train_batch_size": st.integers(1, 3), "gradient_accumulation_steps": st.integers(1, 3), "rank": st.integers(1, 9),
    "anchor_weight": st.sampled_from([0, 0.5, 2]), "anchor_source": st.sampled_from(["pretrained", "finetuned"]),
    "anchor_batch_size": st.integers(1, 9), "subject_token": st.sampled_from(["sks", "zwx"]),
    "class_token": st.sampled_from(["", "dog"]), "resolution": st.sampled_from([32, 64, 72, 80]),
    "repeats": st.integers(1, 2), "caption_dropout": st.floats(0, 0.9), "lora_dropout": st.floats(0, 0.9),
    "lora_alpha": st.floats(0.1, 99), "lora_layers": st.sampled_from(["to_k", "to_q,to_v", "to_out.0", "proj_in"]),
    "aspect_ratio_buckets": st.sampled_from(["64,64", "64,96;96,64", "32,48"]), "seed": st.integers(0, 2**63 - 1),
    "mixed_precision": st.sampled_from(["no", "bf16"]), "snr_gamma": st.floats(0.1, 9),
    "lr_scheduler": st.sampled_from(["linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                                     "constant_with_warmup", "piecewise_constant"]),
    "lr_warmup_steps": st.integers(0, 3), "lr_num_cycles": st.integers(1, 3), "lr_power": st.floats(0, 3),
    "optimizer": st.sampled_from(["AdamW", "adamw", "Prodigy"]), "adam_beta1": st.floats(0, 0.99),
    "adam_beta2": st.floats(0, 0.999), "adam_weight_decay": st.floats(0, 1), "prodigy_beta3": st.floats(0, 0.99),
    "prodigy_decouple": st.booleans(), "prodigy_use_bias_correction": st.booleans(),
    "prodigy_safeguard_warmup": st.booleans(), "max_grad_norm": st.floats(0.01, 9),
    "checkpointing_steps": st.integers(1, 3), "checkpoints_total_limit": st.integers(1, 3),
    "validation_prompt": st.sampled_from(["", "sks dog in the snow"]), "num_validation_images": st.integers(0, 1),
    "validation_steps": st.integers(1, 2), "validation_epochs": st.integers(1, 2),
    "final_validation_prompt": st.sampled_from(["a dog"]), "num_train_epochs": st.just(1),
    "image_interpolation_mode": st.sampled_from(["bicubic", "box", "nearest_exact", "lanczos"]),
    "dataloader_num_workers": st.just(0), "resume_from_checkpoint": st.just("latest"),
    "report_to": st.sampled_from(["none", "tensorboard"]), "learning_rate": st.sampled_from([0, 1e-4, 1e-2, 1]),
    "text_encoder_lr": st.sampled_from([0, 1e-3]), "class_prompt": st.sampled_from(["a photo of a dog", "Hund ö"]),
    "tokenizer_max_length": st.sampled_from([3, 20, 77, 90]), "max_sequence_length": st.sampled_from([1, 77, 300]),
    "weighting_scheme": st.sampled_from(["sigma_sqrt", "logit_normal", "mode", "cosmap"]),
    "logit_mean": st.floats(-100, 100), "logit_std": st.floats(0, 100), "mode_scale": st.floats(-2, 2),
    "unmasked_weight": st.floats(0, 1), "validation_guidance_scale": st.floats(0, 9),
    "validation_inference_steps": st.integers(1, 3), "precondition_outputs": st.integers(0, 1),
    "lora_blocks": st.sampled_from(["0", "0,1", "2"]),
}  # fmt: skip
SWITCHES = """center_crop random_flip cache_latents use_dora train_text_encoder gradient_checkpointing scale_lr
    allow_tf32 use_8bit_adam skip_final_inference output_kohya_format with_prior_preservation
    text_encoder_use_attention_mask pre_compute_text_embeddings do_edm_style_training without_t5 alpha_mask
    upcast_before_saving use_aspect_ratio_buckets""".split()
OF_ONE_SCRIPT = {
    SD15: {"tokenizer_max_length", "text_encoder_use_attention_mask", "pre_compute_text_embeddings"},
    SDXL: {"do_edm_style_training"},
    SD3: {"max_sequence_length", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs",
          "lora_blocks", "without_t5", "upcast_before_saving"},
}  # fmt: skip


def combinations(script: str):
    """Up to ten flags that the script has, each with a value that it may have."""
    of_others = set().union(*(names for other, names in OF_ONE_SCRIPT.items() if other != script))
    valued = [name for name in ANY if name not in of_others]
    switches = [name for name in SWITCHES if name not in of_others]
    chosen = st.lists(st.sampled_from(valued), min_size=3, max_size=8, unique=True)
    values = chosen.flatmap(lambda names: st.fixed_dictionaries({name: ANY[name] for name in names}))
    return st.tuples(values, st.lists(st.sampled_from(switches), max_size=3, unique=True))


def check_combination(script: str, base: Path, photos: Path, folder: Path, combination, capsys) -> None:
    values, switches = combination
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    more = [f"--{name}={value}" for name, value in values.items()] + [f"--{name}" for name in switches]
    arguments = flags(base, photos, output, "--num_validation_images=1", "--validation_inference_steps=2", *more)
    if "num_train_epochs" in values:
        arguments = without(arguments, "--max_train_steps")
    if "subject_token" in values and "class_prompt" not in values:
        arguments = without(arguments, "--class_prompt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = run_script(script, arguments)
    err = capsys.readouterr().err
    assert status in (0, 2), err
    if status == 2:
        assert "--" in only_sentence(err)
        return
    tensors = lora(output)
    assert tensors
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    if "validation_prompt" not in values and "final_validation_prompt" not in values:
        assert not list(output.glob("*.png"))
    assert not [path for path in output.rglob("*") if path.name.endswith((".partial", ".old"))]
    assert (output / LORA_FILE).stat().st_size > 1000


@pytest.mark.parametrize("schedule", ["polynomial", "cosine", "linear", "cosine_with_restarts"])
def test_a_warm_up_as_long_as_the_run_trains(schedule, bases, photos, tmp_path):
    more = [f"--lr_scheduler={schedule}", "--lr_warmup_steps=2"]
    assert run_script(SD15, flags(bases[SD15], photos, tmp_path, *more, steps=2)) == 0


QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
QUIET["phases"] = [Phase.generate]  # shrinking takes long


@pytest.mark.parametrize("examples", [10, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_combinations_of_valid_flags_train_or_are_refused(script, examples, bases, two_photos, tmp_path, capsys):
    @settings(max_examples=examples, **QUIET)
    @given(combinations(script))
    def check(combination):
        check_combination(script, bases[script], two_photos, tmp_path, combination, capsys)

    check()
