"""Does a bundle make the images that diffusers makes? The same for every family, with a tiny model in a folder.

``made = make(model, tmp_path, height=64, width=64, sizes=[[64, 96]])``, then ``check_graphs(made)`` and
``check_images(made)``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers.utils import convert_state_dict_to_diffusers
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from glance_trt import recipe
from glance_trt.build import build
from glance_trt.export import inputs, parity
from glance_trt.export.reference import DiffusersReference
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.verify import psnr

from ...models.in_process import InProcess

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": "model",
    "teacher_steps": 8,
    "guidance": {"mode": "cfg", "scale": 3.0, "negative_prompt": "blue"},
    "engines": ["cpu"],
}
"""What a recipe says unless a test has it otherwise."""

TARGETS = ("to_v", "to_out.0")
RANK, STRENGTH = 4, 16.0  # strong enough to show in the images of a random model
PROMPT = "a large red circle"
RTX = {"name": "rtx89", "backend": "tensorrt-rtx", "dtype": "float16", "compute_capabilities": ["8.9"]}


@dataclass(frozen=True)
class Made:
    """A recipe with its two LoRAs, and the bundle that was built from it."""

    recipe: Path
    bundle: Path

    def load(self) -> tuple[recipe.Recipe, Path]:
        """The recipe, and its folder."""
        return recipe.load(self.recipe)


def write_lora(
    model: Path,
    path: Path,
    *,
    targets: Sequence[str] = TARGETS,
    encoders: Sequence[str] = (),
    strength: float = STRENGTH,
    seed: int = 0,
) -> Path:
    """Write a random LoRA of a model's denoiser, as its pipeline does, and return its path.

    encoders: CLIP text encoders that it changes too. strength: alpha / rank.
    """
    index = json.loads((model / "model_index.json").read_text())
    denoiser = "unet" if "unet" in index else "transformer"
    saved: dict[str, Any] = {}
    for part in (denoiser, *encoders):
        library, name = index[part]
        module = getattr(importlib.import_module(library), name).from_pretrained(model / part)
        layers, alpha = targets if part == denoiser else ("q_proj", "fc1"), RANK * (strength if part == denoiser else 1)
        # Without init, B is random as well as A.
        config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(layers), init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module.add_adapter(config)
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        found = get_peft_model_state_dict(module)
        # Of transformers' attention it makes names that diffusers then does not read.
        saved[f"{part}_lora_layers"] = found if part == "transformer" else convert_state_dict_to_diffusers(found)
        saved[f"{part}_lora_adapter_metadata"] = metadata
    getattr(diffusers, index["_class_name"]).save_lora_weights(path.parent, weight_name=path.name, **saved)
    return path


def make(
    model: Path,
    folder: Path,
    *,
    targets: Sequence[str] = TARGETS,
    encoders: Sequence[str] = (),
    strength: float = STRENGTH,
    rtx: bool = False,
    **changes: Any,
) -> Made:
    """Write a recipe of `RECIPE` and `changes`, which give at least a height and a width, and two LoRAs on the layers
    `targets`, and build the bundle, in this process. The build compares every graph with PyTorch.

    encoders: CLIP text encoders that the slow phase's LoRA changes too. strength: what multiplies ``B @ A`` in the slow
    phase, by the file; in the fast one it is half as much again, by the recipe. rtx: build for TensorRT-RTX in float16
    instead, for compute capability 8.9; the portable graphs are then compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").symlink_to(model)
    write_lora(model, folder / "slow.safetensors", targets=targets, encoders=encoders, strength=strength, seed=1)
    write_lora(model, folder / "fast.safetensors", targets=targets, strength=strength, seed=2)
    phases = [
        {"name": "slow", "steps": [1, 3], "lora": {"file": "slow.safetensors"}},
        {"name": "fast", "steps": [4, 7, 8], "lora": {"file": "fast.safetensors", "scale": 1.5 * strength}},
    ]
    file, output = folder / "tiny.yaml", folder / "tiny.bundle"
    if rtx:
        pytest.importorskip("tensorrt_rtx", reason="pip install glance-trt[rtx]")
        (folder / "rtx89.yaml").write_text(yaml.safe_dump(RTX))
        changes["engines"] = [str(folder / "rtx89.yaml")]
    file.write_text(yaml.safe_dump(RECIPE | {"phases": phases} | changes))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("build", "compiling"):
            patch.setattr(f"glance_trt.{module}.Worker", InProcess)
        build(str(file), output)
    return Made(file, output)


def check_graphs(made: Made, batches: Sequence[int] = (1, 3)) -> None:
    """Compare every engine with PyTorch at each of the recipe's sizes. Raises `ParityError`."""
    plan, folder = made.load()
    known = inputs.read(plan, folder)
    reference = parity.Reference(known.family, known.loras, known.encoders)
    sources, scale = known.family.sources(), known.family.image().latent_scale
    with Pipeline.open(made.bundle, trust=True) as pipeline:
        graphs = dict.fromkeys(pipeline.bundle.manifest.graphs, "float32")
        for height, width in sizes(plan):
            latents = (height // scale, width // scale)
            parity.check(pipeline.runner, graphs, reference, sources, batches=batches, latents=latents)


def check_images(made: Made, seeds: Sequence[int] = (7, 8, 9), *, least: float = 50.0) -> list[float]:
    """Compare whole images with diffusers, at each of the recipe's sizes, alone and in a batch; returns their PSNR.

    Also that there is something to see in them, that seeds differ, and that each LoRA shows.
    """
    plan, folder = made.load()
    reference, found = DiffusersReference(plan, folder), []
    with Pipeline.open(made.bundle, trust=True) as pipeline:
        for height, width in sizes(plan):
            expected = reference.generate(PROMPT, seeds, height, width)
            assert expected.shape == (len(seeds), height, width, 3)
            assert min(image.std() for image in expected) > 10, "there is something to see"
            assert psnr(expected[0], expected[1]) < 25, "seeds differ"
            for count in (1, len(seeds)):
                options: dict[str, Any] = {"count": count, "batch_size": count, "height": height, "width": width}
                images = pipeline.generate(PROMPT, seed=seeds[0], **options)
                found += [psnr(np.asarray(image), other) for image, other in zip(images, expected, strict=False)]
            assert min(found) >= least, f"{height} x {width}: {found}"
    usual = reference.generate(PROMPT, seeds[:1])
    for name in (phase.name for phase in plan.phases if phase.lora):
        assert psnr(_without(plan, folder, name, seeds[:1]), usual) < 45, f"the LoRA of {name} shows"
    return found


def check_rtx(made: Made) -> None:
    """The bundle of ``make(..., rtx=True)`` has a plan for every graph, for the compute capability that was asked for.

    That the graphs in float16 compute what PyTorch computes is compared when the bundle is built.
    """
    for plan in made.bundle.glob("*.plan"):
        assert b"sm89" in plan.read_bytes()
    names = {path.name for path in made.bundle.glob("rtx89.*.plan")}
    assert {"rtx89.denoiser.slow.plan", "rtx89.denoiser.fast.plan", "rtx89.decoder.plan"} <= names


def sizes(plan: recipe.Recipe) -> list[tuple[int, ...]]:
    """A recipe's sizes, (height, width); at least two."""
    found = [(plan.height, plan.width), *plan.sizes]
    assert len(found) >= 2
    return found


def _without(plan: recipe.Recipe, folder: Path, name: str, seeds: Sequence[int]) -> NDArray[np.uint8]:
    """Images without the LoRA of a phase."""
    phases = tuple(dataclasses.replace(p, lora=None) if p.name == name else p for p in plan.phases)
    return DiffusersReference(dataclasses.replace(plan, phases=phases), folder).generate(PROMPT, seeds)
