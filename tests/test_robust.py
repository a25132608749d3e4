# SPDX-License-Identifier: Apache-2.0
"""What happens to a run that is stopped, killed or goes wrong: nothing is lost, and the reason is said."""

import importlib
import itertools
import os
import signal
import threading
import types
from pathlib import Path

import forks
import pytest
import torch
from accelerate.utils import DistributedType
from runner import LORA_FILE, ROOT, assert_equal, flags, launch, left_in, lora, metrics, train, without
from safetensors.torch import load_file

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"
SCRIPTS = [SCRIPT, "train_sap_lora_sdxl", "train_sap_lora_sd3"]
ACCUMULATED = ["--gradient_accumulation_steps=2", "--lora_dropout=0.2", "--lr_scheduler=cosine", "--lr_warmup_steps=1"]


@pytest.fixture(scope="module")
def undisturbed(sd15, photos, tmp_path_factory) -> Path:
    """A run of 4 steps of 2 micro-steps."""
    output = tmp_path_factory.mktemp("undisturbed")
    train(SCRIPT, flags(sd15, photos, output, *ACCUMULATED, steps=4))
    return output


@pytest.fixture(autouse=True)
def usual_handlers():
    """Python's own signal handlers, whatever a test before left in this process."""
    usual = dict.fromkeys([signal.SIGTERM, signal.SIGHUP], signal.SIG_DFL)
    usual[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send_at(monkeypatch, micro_step: int, *numbers: int) -> None:
    """Send signals to this process during a micro-step of the next run."""
    loss_terms = sap.loss_terms

    def disturbed(step, *rest):
        if step.index == micro_step:
            for number in numbers:
                signal.raise_signal(number)  # in this thread, so that two do not become one
        return loss_terms(step, *rest)

    monkeypatch.setattr(sap, "loss_terms", disturbed)


@pytest.mark.parametrize(
    ("number", "micro_step", "kept"),
    [(signal.SIGTERM, 3, 2), (signal.SIGINT, 4, 2), (signal.SIGHUP, 1, 1), (signal.SIGINT, 7, 4)],
)
def test_a_run_that_is_asked_to_stop_goes_on_later(
    number, micro_step, kept, undisturbed, sd15, photos, tmp_path, monkeypatch, caplog
):
    arguments = flags(sd15, photos, tmp_path, *ACCUMULATED, steps=4)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        send_at(patched, micro_step, number)
        train(SCRIPT, arguments)
    assert stopped.value.code == 128 + number
    assert handlers == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    said = f"{number.name}: stopped after step {kept} of 4. To go on, add --resume_from_checkpoint latest to the same"
    assert said in caplog.text
    assert f"Written: {tmp_path / LORA_FILE}" in caplog.text
    (checkpoint,) = sap.list_checkpoints(tmp_path)
    assert checkpoint.name == f"checkpoint-{kept}"
    assert_equal(lora(tmp_path), lora(checkpoint))
    train(SCRIPT, [*arguments, "--resume_from_checkpoint=latest"])
    assert_equal(lora(tmp_path), lora(undisturbed))


def test_a_stop_before_the_first_step_is_done_leaves_nothing(sd15, photos, tmp_path, monkeypatch, caplog):
    send_at(monkeypatch, 0, signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        train(SCRIPT, flags(sd15, photos, tmp_path, *ACCUMULATED))
    assert "stopped after step 0 of 2" in caplog.text
    assert left_in(tmp_path) == set()


def test_a_second_signal_stops_at_once(sd15, photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sap.time, "monotonic", itertools.count(0, 10).__next__)
    send_at(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        train(SCRIPT, flags(sd15, photos, tmp_path))
    assert "SIGINT: stopped at once" in caplog.text
    assert left_in(tmp_path) == {"metrics.jsonl"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_launcher_that_passes_a_signal_on_does_not_stop_at_once(sd15, photos, tmp_path, monkeypatch):
    send_at(monkeypatch, 1, signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(SystemExit, match="130"):
        train(SCRIPT, flags(sd15, photos, tmp_path))
    assert lora(tmp_path)


@pytest.mark.parametrize("writes", ["write_lora", "write_kohya_lora"])
def test_a_stop_while_the_result_is_written_waits_for_it(writes, sd15, photos, tmp_path, monkeypatch, caplog):
    real = getattr(sap, writes)
    monkeypatch.setattr(sap, writes, lambda *rest: (signal.raise_signal(signal.SIGTERM), real(*rest)))
    with pytest.raises(SystemExit, match="143"):
        train(SCRIPT, flags(sd15, photos, tmp_path, "--output_kohya_format"))
    assert "SIGTERM: stopped after step 2 of 2" in caplog.text
    assert left_in(tmp_path) == {LORA_FILE, sap.KOHYA_FILE, sap.FINISHED_FILE, "metrics.jsonl"}


def test_a_terminal_that_closes_does_not_matter_under_nohup(sd15, photos, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    send_at(monkeypatch, 0, signal.SIGHUP)
    train(SCRIPT, flags(sd15, photos, tmp_path))
    assert (tmp_path / sap.FINISHED_FILE).is_file()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("pictures", [0, 1])
def test_a_stop_does_not_wait_for_all_pictures(pictures, sd15, photos, tmp_path, monkeypatch):
    made, sample, begin = [], sap.PIPELINE_CLASS.__call__, sap.sampling_scheduler

    def stop_after(number: int) -> None:
        if number == pictures:
            signal.raise_signal(signal.SIGTERM)

    def sampled(pipeline, **options):
        made.append(sample(pipeline, **options))
        stop_after(len(made))
        return made[-1]

    def begun(run):
        stop_after(0)
        return begin(run)

    monkeypatch.setattr(sap.PIPELINE_CLASS, "__call__", sampled)
    monkeypatch.setattr(sap, "sampling_scheduler", begun)
    more = ["--validation_prompt=a dog", "--validation_steps=1", "--report_to=tensorboard"]
    with pytest.raises(SystemExit, match="143"):
        train(SCRIPT, flags(sd15, photos, tmp_path, *more))
    assert len(made) == pictures
    assert lora(tmp_path)


@pytest.mark.parametrize("stage", ["SubjectImages", "encode_images", "finish"])
def test_a_signal_outside_of_training_stops_at_once(stage, sd15, photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sap, stage, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        train(SCRIPT, flags(sd15, photos, tmp_path))
    assert "SIGTERM: stopped at once, nothing more is kept" in caplog.text


def test_training_in_a_thread_leaves_signals_alone(sd15, photos, tmp_path):
    thread = threading.Thread(target=train, args=(SCRIPT, flags(sd15, photos, tmp_path, steps=1)))
    thread.start()
    thread.join()
    assert lora(tmp_path)


def test_a_stop_reaches_a_run_whose_pictures_threads_prepare(sd15, photos, tmp_path, monkeypatch):
    send_at(monkeypatch, 1, signal.SIGTERM)
    arguments = flags(sd15, photos, tmp_path, "--dataloader_num_workers=2", "--resolution=32", steps=4)
    with pytest.raises(SystemExit, match="143"):
        train(SCRIPT, without(arguments, "--center_crop"))
    assert left_in(tmp_path) == {LORA_FILE, sap.KOHYA_FILE, sap.FINISHED_FILE, "checkpoint-2", "metrics.jsonl"}


def test_a_loss_that_is_not_finite_ends_the_run_and_is_explained(sd15, photos, tmp_path, monkeypatch):
    loss_terms = sap.loss_terms

    def overflowing(step, *rest):
        factor = float("nan") if step.index == 3 else 1.0
        return {name: factor * term for name, term in loss_terms(step, *rest).items()}

    train(SCRIPT, flags(sd15, photos, tmp_path, steps=1))
    before = (tmp_path / LORA_FILE).read_bytes()
    monkeypatch.setattr(sap, "loss_terms", overflowing)
    arguments = flags(sd15, photos, tmp_path, "--checkpointing_steps=1", "--logging_steps=100", steps=5)
    with pytest.raises(sap.RunError) as error:
        train(SCRIPT, arguments)
    (((picture, _),),) = sap.SubjectImages(sap.parse_args(arguments)).draws(0, 1, 3, 4)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    for part in (
        f"the loss of step 4 is nan, with {picture:02d}.jpg",
        "--learning_rate 0.01",
        "checkpoints: checkpoint-1, checkpoint-2, checkpoint-3",
    ):
        assert part in str(error.value)
    assert (tmp_path / "earlier-1" / LORA_FILE).read_bytes() == before


@pytest.mark.parametrize("more", [[], ["--checkpointing_steps=2"]])
def test_weights_that_are_not_finite_reach_no_file(more, sd15, photos, tmp_path, monkeypatch):
    def poisoned(run, *rest):
        next(iter(run.student.trained().values())).data.fill_(float("inf"))

    train(SCRIPT, flags(sd15, photos, tmp_path, "--output_kohya_format", steps=1))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    monkeypatch.setattr(sap, "log_steps", poisoned)
    with pytest.raises(sap.RunError, match="the LoRA of unet is no longer finite.*checkpoints: none"):
        train(SCRIPT, flags(sd15, photos, tmp_path, "--output_kohya_format", *more, steps=2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier-1").glob("*.safetensors")} == before
    assert list(tmp_path.glob("*.safetensors")) == []
    assert [name for name in left_in(tmp_path) if name.startswith(".")] == []


def test_a_vae_that_overflows_is_found_before_training(sd15, photos, tmp_path, monkeypatch):
    def overflowing(self, latents):
        parameters = latents.new_full((1, 8, 8, 8), float("nan"))
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(parameters=parameters))

    monkeypatch.setattr(sap.AutoencoderKL, "encode", overflowing)
    with pytest.raises(sap.UsageError, match="its VAE makes numbers of 00.jpg that are not finite"):
        train(SCRIPT, flags(sd15, photos, tmp_path))


@pytest.mark.parametrize(("script", "ranks"), list(zip(SCRIPTS, (3, 2, 2), strict=True)))
def test_processes_agree_and_draw_different_noise(script, ranks, bases, photos, tmp_path):
    forks.start_server()
    log, more = tmp_path / "run.log", ["--train_text_encoder", "--gradient_accumulation_steps=2"]
    arguments = flags(bases[script], photos, tmp_path / "out", *more, steps=3)
    assert forks.Forked(script, arguments, log, ranks).wait() == [0] * ranks, log.read_text()
    ends = [load_file(tmp_path / f"run-{rank}.safetensors") for rank in range(ranks)]
    targets = torch.cat([end.pop("targets") for end in ends])
    for other in ends[1:]:
        assert_equal(ends[0], other)
    moved = {key.split(".")[0] for key, tensor in ends[0].items() if "lora_B" in key and tensor.any()}
    module = importlib.import_module(script)
    assert moved == {module.DENOISER, *module.TRAINABLE_TEXT_ENCODERS}
    assert len(targets) >= ranks * 3 * 2
    assert len(targets.flatten(1).unique(dim=0)) == len(targets)
    assert len(metrics(tmp_path / "out")) == 3


def test_a_rank_that_crashes_ends_all_and_says_why(sd15, photos, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_sap_lora_sd15 as sap\n"
        "original = sap.loss_terms\n"
        "def crash(step, *rest):\n"
        "    if step.index == 1 and os.environ['RANK'] == '1':\n"
        "        raise MemoryError('no room on the second device')\n"
        "    return original(step, *rest)\n"
        "sap.loss_terms = crash\n"
        "sap.main(sap.parse_args())\n"
    )
    with pytest.raises(AssertionError, match="MemoryError: no room on the second device"):
        launch(str(probe.with_suffix("")), flags(sd15, photos, tmp_path / "out", steps=50), ranks=2)
    # The other rank, if its connection ends before it is ended itself, keeps what it needs no agreement for.
    results = {LORA_FILE, sap.KOHYA_FILE, sap.FINISHED_FILE}
    assert left_in(tmp_path / "out") in ({"metrics.jsonl"}, {"metrics.jsonl"} | results)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_a_launch_that_cannot_work_ends_in_a_sentence(kind, sd15, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sap, "Accelerator", lambda **_: types.SimpleNamespace(distributed_type=kind))
    with pytest.raises(sap.UsageError, match=f"accelerate is configured for {kind.value}.* choose .*MULTI_GPU"):
        train(SCRIPT, flags(sd15, photos, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
