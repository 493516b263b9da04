"""Shared fixtures: small real models, saved as folders and loaded again; nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product on a GPU

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from cppo.builtin import ShapesTask
from cppo.builtin.policy import IMAGE_PIXELS, build_model, build_tokenizer
from cppo.device import choose
from cppo.policy import Policy, load

BACKEND = "CPPO_TEST_BACKEND"  # for what runs in processes of its own, too
SLOWEST = ("test_simulated.py", "test_trainer.py", "test_study.py", "test_doctor.py")
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", help="run the tests marked `device` alone, on this backend")


def pytest_configure(config: pytest.Config) -> None:
    os.environ[BACKEND] = config.getoption("--backend") or "cpu"
    if os.environ[BACKEND] == "cpu":  # kernels are interpreted; Triton reads this on its import
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") is None:
        # Where two processes share the files, the longest must not come last.
        place = {name: number for number, name in enumerate(SLOWEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(place)))
    else:
        others = [item for item in items if item.get_closest_marker("device") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def skip_or_fail(reason: str) -> NoReturn:
    """Skips a test that needs what a machine may lack; fails it where CI says that it must not."""
    if os.environ.get("CPPO_TEST_NOTHING_MISSING") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def two_devices() -> None:
    """For tests in two processes: on an accelerator each takes one."""
    device = choose(os.environ[BACKEND]).device
    if device != "cpu" and (there := torch.accelerator.device_count()) < 2:
        skip_or_fail(f"two processes need two devices of type {device}, and there is {there}")


@pytest.fixture
def tensors_on_device() -> Iterator[None]:
    """What a test makes without naming a device is made on that of --backend."""
    device = choose(os.environ[BACKEND]).device
    with torch.device(device) if device != "cpu" else nullcontext():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The built-in architecture with random weights."""
    from transformers import Qwen2VLImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = build_model(tokenizer, seed=1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer, Qwen2VLImageProcessorPil(**IMAGE_PIXELS)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_policy(tiny_folder: Path) -> Policy:
    """A fresh copy for each test, in float32 on the CPU."""
    return load(str(tiny_folder), dtype=torch.float32, attention="sdpa")


@pytest.fixture(scope="session")
def puzzles() -> ShapesTask:
    return ShapesTask(split="train", size=1000, seed=3)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """The folder of a real data set; skips, naming the path, where it is absent."""

    def find(name: str) -> Path:
        folder = SHARED_DATA / name
        if not folder.exists():
            pytest.skip(f"real data not found at {folder}")
        return folder

    return find
