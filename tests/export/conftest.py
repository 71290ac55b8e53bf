"""What the tests of the export tier share: the tiny model's recipe, family and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glance_trt.export.families import Family, open_model
from glance_trt.export.model import Model
from glance_trt.export.weights import TensorRef, component_tensors
from glance_trt.recipe import Guidance, Phase, Recipe


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Makes a recipe for the tiny model; keyword arguments replace its parts."""

    def make(**changes: Any) -> Recipe:
        parts: dict[str, Any] = {"model": "model", "height": 16, "width": 16, "guidance": Guidance(rescale=0.7)}
        return Recipe(name="tiny", phases=(Phase("all", (1, 50)),), **(parts | changes))

    return make


@pytest.fixture
def family(tiny_model: Path, make_recipe: Callable[..., Recipe]) -> Family:
    """The tiny model's adapter, for guidance with rescale."""
    return open_model(Model(tiny_model, "tiny"), make_recipe())


@pytest.fixture(scope="session")
def unet_weights(tiny_model: Path) -> dict[str, TensorRef]:
    """Where the tiny UNet's tensors lie; float16."""
    return component_tensors(tiny_model / "unet")
