# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at random moments, again and again: what is resumed ends as if nothing had happened."""

import dataclasses
import random
import shutil
import time
from pathlib import Path

import forks
import pytest
from runner import assert_equal, flags, left_in, lora, without

STEPS = 6
ACCUMULATED = ["--gradient_accumulation_steps=2", "--lora_dropout=0.1", "--lr_scheduler=cosine", "--lr_warmup_steps=1"]
CHECKPOINTS = ["--checkpointing_steps=1", "--checkpoints_total_limit=2", "--resume_from_checkpoint=latest"]
KINDS = {
    "sd15, text encoder, accumulation": ("sd15", 1, ["--train_text_encoder", "--random_flip", *ACCUMULATED]),
    "sdxl, text encoders": ("sdxl", 1, ["--train_text_encoder", "--output_kohya_format"]),
    "sd3, text encoders, accumulation": ("sd3", 1, ["--train_text_encoder", *ACCUMULATED]),
    "sd15, 2 processes, accumulation": ("sd15", 2, ACCUMULATED),
    "sd3, 2 processes, text encoders": ("sd3", 2, ["--train_text_encoder"]),
}


@dataclasses.dataclass
class Course:
    """One kind of run in one folder: how long it takes when nothing happens, and what it ends with."""

    script: str
    arguments: list[str]
    ranks: int
    output: Path
    seconds: float = 0.0
    result: dict = dataclasses.field(default_factory=dict)

    def start(self) -> forks.Forked:
        return forks.Forked(self.script, self.arguments, self.output.with_suffix(".log"), self.ranks)

    def finish(self) -> dict:
        """Run to the end; the LoRA."""
        assert set(self.start().wait()) == {0}, self.output.with_suffix(".log").read_text()
        assert not [name for name in left_in(self.output) if name.startswith(".")]
        return lora(self.output)

    def undisturbed(self) -> None:
        started = self.start()
        started.training.wait(forks.PATIENCE)
        begin = time.monotonic()
        assert set(started.wait()) == {0}, self.output.with_suffix(".log").read_text()
        self.seconds, self.result = time.monotonic() - begin, lora(self.output)
        shutil.rmtree(self.output)


def kill_and_resume(kind: str, kills: int, bases: dict, photos: Path, output: Path) -> None:
    """Kill a run `kills` times at random moments, mostly in training, and resume it each time; compare at each end."""
    base, ranks, more = KINDS[kind]
    forks.start_server()
    arguments = flags(bases[f"train_sap_lora_{base}"], photos, output, *more, *CHECKPOINTS, steps=STEPS)
    arguments = without(arguments, "--center_crop") if "--random_flip" in more else arguments
    course = Course(f"train_sap_lora_{base}", arguments, ranks, output)
    course.undisturbed()
    chance = random.Random(kind)
    while kills > 0:
        within_training = chance.random() < 0.8
        if course.start().kill_after(chance.uniform(0, course.seconds), within_training):
            kills -= 1
        else:
            assert_equal(course.finish(), course.result)
            shutil.rmtree(output)
    assert_equal(course.finish(), course.result)


@pytest.mark.parametrize("kind", list(KINDS)[1:4])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(kind, bases, photos, tmp_path):
    kill_and_resume(kind, 1, bases, photos, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_that_are_killed_eight_times_go_on_as_if_nothing_had_happened(kind, bases, photos, tmp_path):
    kill_and_resume(kind, 8, bases, photos, tmp_path / "out")
