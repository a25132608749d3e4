# SPDX-License-Identifier: Apache-2.0
"""Tests run offline and from the repository's root, on tiny pipelines that they make on disk."""

import functools
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
os.environ |= {"OMP_NUM_THREADS": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": ""}  # the same on every machine; examples/benchmark/gpu_check.py is for the GPU
# In one run of many, two of the threads by which transformers loads weights met in torch's thread pool, which asserts.
os.environ |= {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
sys.path.insert(0, str(ROOT))

import tiny_pipelines  # noqa: E402 (the environment comes first)

CAPTIONS = ["a photo of sks dog", "sks dog in the snow", "sks dog on the beach", "sks dog under water", "a sks dog"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what imports made out of garbage collections, which the scripts ask for after each stage: .5 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the tiny pipeline of a kind in `tiny_pipelines.KINDS`, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def make(kind: str) -> Path:
        _, save, options = tiny_pipelines.KINDS[kind]
        return save(folder / kind, **options)

    return make


@pytest.fixture(scope="session")
def sd15(base_of) -> Path:
    """A tiny Stable Diffusion 1.x pipeline (noise prediction)."""
    return base_of("sd15")


@pytest.fixture(scope="session")
def sd21(base_of) -> Path:
    """A tiny Stable Diffusion 2.x pipeline (v prediction, zero terminal SNR)."""
    return base_of("sd21")


@pytest.fixture(scope="session")
def bases(base_of) -> dict[str, Path]:
    """A tiny pipeline for each script, by the script's name."""
    return {tiny_pipelines.KINDS[kind][0]: base_of(kind) for kind in ("sd15", "sdxl", "sd3")}


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Five pictures that are not square, without captions."""
    return tiny_pipelines.save_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="session")
def captioned(tmp_path_factory) -> Path:
    """Five pictures, each with a caption of its own that holds "sks"."""
    return tiny_pipelines.save_photos(tmp_path_factory.mktemp("data") / "captioned", captions=CAPTIONS)
