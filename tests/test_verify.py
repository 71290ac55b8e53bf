"""The comparison with diffusers: which image is made of what, and the LoRAs fused or not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer

from glance_trt import recipe
from glance_trt.build import build
from glance_trt.bundle import Bundle
from glance_trt.errors import InputError, ParityError, TargetError
from glance_trt.export import inputs
from glance_trt.export.reference import DiffusersReference
from glance_trt.verify import compare, psnr

from .models.in_process import InProcess
from .models.recipes import RECIPE


@pytest.fixture(scope="module")
def home(tiny_model: Path, write_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, the tiny model and two LoRAs."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "model").symlink_to(tiny_model)
    write_lora(folder / "slow.safetensors", seed=1)
    write_lora(folder / "fast.safetensors", seed=2, targets=("to_q", "conv1"))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture(scope="module")
def bundle(home: Path, traced: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The recipe's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glance_trt.export.trace.trace", traced)
        for module in ("build", "compiling"):
            patch.setattr(f"glance_trt.{module}.Worker", InProcess)
        return build(str(home / "tiny.yaml"), tmp_path_factory.mktemp("built") / "tiny.bundle").bundle


@pytest.mark.parametrize("missing", ["peft", None])
def test_what_cannot_be_compared_is_refused_before_pytorch_is_loaded(
    bundle: Bundle, home: Path, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "glance_trt.export.reference", None)  # which would load it
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ModuleNotFoundError) as caught:
            compare(bundle, str(home / "tiny.yaml"))
        assert caught.value.name == missing
    else:
        with pytest.raises(TargetError, match=r"^cpu: runs on the CPU; for GPU 3, take a target for one$"):
            compare(bundle, str(home / "tiny.yaml"), target="cpu", device=3)


def test_the_recipe_of_another_bundle_is_refused_before_its_model_is_read(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(RECIPE | {"name": "other", "model": "nowhere"}))
    with pytest.raises(InputError, match=r"other\.yaml is the recipe of other, the bundle is tiny; give "):
        compare(bundle, str(tmp_path / "other.yaml"))


def test_a_model_that_memory_does_not_hold_is_refused_and_less_is_offered(
    bundle: Bundle, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_from = inputs.read(*recipe.load(str(home / "tiny.yaml")))
    assert set(made_from.parts()) == {"text_encoder", "unet", "vae"}
    free = 4 * sum(made_from.parts().values())
    monkeypatch.setattr("glance_trt.preflight.free_memory", lambda: free)
    assert len(compare(bundle, str(home / "tiny.yaml"), images=1).psnr) == 1
    free -= 1
    with pytest.raises(TargetError, match=r"^comparing images with diffusers takes .* the graphs alone"):
        compare(bundle, str(home / "tiny.yaml"), images=1)
    assert compare(bundle, str(home / "tiny.yaml"), images=0).graphs
    free = 1
    with pytest.raises(TargetError, match=r"^comparing unet with PyTorch takes"):
        compare(bundle, str(home / "tiny.yaml"), images=0)


def test_image_i_is_of_prompt_i_and_seed_i(bundle: Bundle, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, generate = [], DiffusersReference.generate

    def spy(self: DiffusersReference, prompt: str, seeds: Sequence[int]) -> NDArray[np.uint8]:
        calls.append((prompt, *seeds))
        return generate(self, prompt, seeds)

    monkeypatch.setattr(DiffusersReference, "generate", spy)
    found = compare(bundle, str(home / "tiny.yaml"), prompts=["a star", "a circle"], images=3)
    assert calls == [("a star", 0), ("a circle", 1), ("a star", 2)]
    assert len(found.psnr) == 3
    assert min(found.psnr) >= 50, "glance-trt's are of the same prompts and seeds"
    calls.clear()
    assert len(compare(bundle, str(home / "tiny.yaml"), prompts=["a star", "a circle", "a heart"]).psnr) == 3
    assert [prompt for prompt, _ in calls] == ["a star", "a circle", "a heart"]
    assert len(compare(bundle, str(home / "tiny.yaml")).psnr) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_steps": 11}, r"^schedule: \S+tiny\.yaml compiles to other steps than the bundle's$"),
        (
            {"guidance": {**RECIPE["guidance"], "scale": 4.0}},
            r"^guidance: scale 4 and negative prompt 'blue' in \S+, 3 ",
        ),
    ],
)
def test_a_recipe_that_makes_another_bundle_is_refused(
    changes: dict[str, Any], message: str, bundle: Bundle, home: Path, tmp_path: Path
) -> None:
    for file in home.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tiny.yaml").unlink()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    with pytest.raises(ParityError, match=message):
        compare(bundle, str(tmp_path / "tiny.yaml"), images=0)


def test_an_image_that_diffusers_does_not_make_is_refused(
    bundle: Bundle, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = DiffusersReference.generate
    monkeypatch.setattr(DiffusersReference, "generate", lambda self, prompt, seeds: generate(self, prompt, [9]))
    with pytest.raises(ParityError, match=r"^image 1: \d+\.\d dB from diffusers, expected 50 or more$"):
        compare(bundle, str(home / "tiny.yaml"))


def test_fused_reference_makes_the_images_of_the_one_that_switches(home: Path) -> None:
    plan, folder = recipe.load(home / "tiny.yaml")
    switching, fused = DiffusersReference(plan, folder), DiffusersReference(plan, folder, fused=True)
    expected, images = (side.generate("a red circle", [7, 8]) for side in (switching, fused))
    assert psnr(images, expected) >= 50
    assert np.array_equal(fused.generate("a red circle", [7, 8]), images)

    layers = [[m for m in unet.modules() if isinstance(m, LoraLayer)] for unet in fused._fused.values()]
    assert layers == [[], [], []], "nothing is left to be added in each step"
    weights = [unet.state_dict() for unet in fused._fused.values()]
    changed = [sum(not np.array_equal(w[name], weights[1][name]) for name in w) for w in (weights[0], weights[2])]
    assert all(changed)

    phases = tuple(replace(phase, lora=None) if phase.name == "fast" else phase for phase in plan.phases)
    without = DiffusersReference(replace(plan, phases=phases), folder, fused=True)
    assert psnr(without.generate("a red circle", [7, 8]), images) < 40, "each LoRA shows in the images"
