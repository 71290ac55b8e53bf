"""Homes for recipes around the tiny model, which is small enough to train in a test."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from glance_trt.recipe import Distill, Guidance, Lora, Phase, Recipe


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def home(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder for a recipe, with the model in ``model``."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model)
    return folder


@pytest.fixture
def own_home(tiny_model: Path, tmp_path: Path) -> Path:
    """The same with a model of its own, to be altered."""
    shutil.copytree(tiny_model, tmp_path / "home" / "model")
    return tmp_path / "home"


@pytest.fixture
def read_log() -> Callable[[Path], list[dict[str, str]]]:
    """Reads a log of losses: its rows, by the names of its columns."""

    def read(file: Path) -> list[dict[str, str]]:
        return list(csv.DictReader(file.read_text().splitlines()))

    return read


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Makes a recipe of two experts around the untrained base; keyword arguments go to its `Distill` or `Recipe`."""

    def make(**changes: object) -> Recipe:
        distill: dict[str, object] = {"prompt": "a red circle", "rank": 2, "alpha": 6.0, "steps": 3}
        recipe: dict[str, object] = {
            "phases": (
                Phase("slow", (1, 3), Lora("loras/slow.safetensors")),
                Phase("middle", (5,)),
                Phase("fast", (6, 8, 10), Lora("loras/fast.safetensors")),
            ),
            "height": 16,
            "width": 16,
            "teacher_steps": 10,
            "guidance": Guidance(scale=3.0),
        }
        for key, value in changes.items():
            (recipe if key in Recipe.__dataclass_fields__ else distill)[key] = value
        return Recipe("tiny", "model", **{"distill": Distill(**distill), **recipe})  # type: ignore[arg-type]

    return make
