"""What the tests of a build share: a home with a recipe, and bundles that are built without other processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from glance_trt.build import Report, build

from ..models.in_process import InProcess
from ..models.recipes import RECIPE


class Home:
    """A folder with a recipe, the tiny model and two LoRAs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out" / "tiny.bundle"
        self.write()

    def write(self, **changes: Any) -> None:
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE | changes))

    def build(self, **options: Any) -> Report:
        return build(str(self.folder / "tiny.yaml"), self.output, **options)

    def stages(self, **options: Any) -> list[str]:
        """Build, and say which stages did something."""
        started: list[str] = []
        self.build(progress=lambda stage, done, total: started.append(stage) if done == 0 else None, **options)
        return started


BUILT = ["tiny.bundle", "tiny.bundle.report.html"]
"""What lies beside each other when a build has ended, and nothing more."""


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a bundle, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def _quickly(traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glance_trt.export.trace.trace", traced)
    for module in ("build", "compiling"):
        monkeypatch.setattr(f"glance_trt.{module}.Worker", InProcess)


@pytest.fixture(scope="session")
def loras(write_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        "slow": write_lora(folder / "slow.safetensors", seed=1),
        "fast": write_lora(folder / "fast.safetensors", seed=2, targets=("to_q", "conv1")),
        "other": write_lora(folder / "other.safetensors", seed=3, targets=("to_q", "conv1")),
    }


@pytest.fixture
def home(tiny_model: Path, loras: dict[str, Path], tmp_path: Path) -> Home:
    (tmp_path / "model").symlink_to(tiny_model)
    for phase in ("slow", "fast"):
        shutil.copy(loras[phase], tmp_path)
    return Home(tmp_path)


@pytest.fixture(scope="session")
def first(tiny_model: Path, loras: dict[str, Path], traced: Any, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose bundle is built; not to be altered."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "model").symlink_to(tiny_model)
    for phase in ("slow", "fast"):
        shutil.copy(loras[phase], folder)
    home = Home(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glance_trt.export.trace.trace", traced)
        for module in ("build", "compiling"):
            patch.setattr(f"glance_trt.{module}.Worker", InProcess)
        home.build()
    return home


@pytest.fixture
def built(home: Home, first: Home) -> Home:
    """A home of the test's own, whose bundle is built."""
    shutil.copytree(first.output, home.output)
    return home
