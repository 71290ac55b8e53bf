"""Homes for recipes around the tiny model, which is small enough to train in a test, and what such recipes train."""

from __future__ import annotations

import copy
import csv
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from glance_trt.distill.base import Base, load_base
from glance_trt.distill.data import Examples
from glance_trt.export.families import open_model
from glance_trt.export.model import Model
from glance_trt.recipe import Distill, Guidance, Lora, Phase, Recipe

SLOW, FAST = Lora("slow.safetensors"), Lora("fast.safetensors")
ON_TRAJECTORIES: dict[str, Any] = {
    "method": "trajectory",
    "phases": (Phase("slow", (1, 3), SLOW), Phase("fast", (5, 8), FAST)),
    "guidance": Guidance(mode="none"),
    "samples": 2,
}
EMBEDDED: dict[str, Any] = {
    **ON_TRAJECTORIES,
    "phases": (Phase("slow", (1, 3), SLOW, "slow.guide"), Phase("fast", (5, 8), FAST, "fast.guide")),
    "guidance": Guidance(mode="embedded"),
}
TINY: dict[str, Any] = {
    "method": "guidance",
    "guide": "tiny",
    "phases": (Phase("slow", (1, 3), guide="slow.guide"), Phase("fast", (5, 8), guide="fast.guide")),
    "guidance": Guidance(mode="embedded"),
}


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


@pytest.fixture(scope="session")
def base(tiny_model: Path) -> Base:
    """The tiny model's components; not to be altered."""
    return load_base(tiny_model)


@pytest.fixture
def unet(base: Base) -> UNet2DConditionModel:
    """The tiny UNet, for LoRAs to be added to."""
    return copy.deepcopy(base.unet)


@pytest.fixture
def pipeline(tiny_model: Path) -> StableDiffusionPipeline:
    """The tiny model in diffusers' own pipeline, in float32."""
    found = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def by_diffusers(
    pipeline: StableDiffusionPipeline, prompt: str, guidance: Guidance, seeds: Sequence[int], **options: Any
) -> Any:
    """What diffusers' own pipeline samples in ten steps, an image per seed."""
    return pipeline(
        prompt,
        height=16,
        width=16,
        num_inference_steps=10,
        num_images_per_prompt=len(seeds),
        guidance_scale=guidance.scale if guidance.mode == "cfg" else 1,
        guidance_rescale=guidance.rescale,
        negative_prompt=guidance.negative_prompt,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **options,
    ).images


@pytest.fixture
def scheduler_config(tiny_model: Path, make_recipe: Callable[..., Recipe]) -> Mapping[str, Any]:
    return open_model(Model(tiny_model, "tiny"), make_recipe()).scheduler_config()


@pytest.fixture
def examples() -> Examples:
    """Three random images, two of which have the same caption; embeddings say in their first number which they are."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 3, 16, generator=generator)
    embeds[:, 0, 0] = torch.tensor([1.0, 2.0])
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    return Examples(latents, embeds, torch.tensor([0, 1, 0]), torch.zeros(1, 3, 16))


class Recorder(nn.Module):
    """Stands for a student: keeps what it is given and predicts zero."""

    guide: object = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, sample: Tensor, timestep: Tensor, embeds: Tensor, scale: Tensor) -> Tensor:
        self.calls.append((sample, timestep, embeds, scale))
        return torch.zeros_like(sample) + self.weight


@pytest.fixture
def recorder() -> Any:
    return Recorder()


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
        distill = {key: value for key, value in distill.items() if value is not None}
        return Recipe("tiny", "model", **{"distill": Distill(**distill), **recipe})  # type: ignore[arg-type]

    return make
