"""What cannot be trained is an error that names the key or the file, and what was there stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glance_trt import distill
from glance_trt.errors import ModelError, OutputError, RecipeError, TrainingError
from glance_trt.recipe import Distill, Guidance, Lora, Phase, Recipe

from .conftest import EMBEDDED, TINY

MakeRecipe = Callable[..., Recipe]


def test_a_checkpoint_of_another_recipe_is_refused(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    work = tmp_path / "work"
    distill.train(make_recipe(), home, work=work)
    shutil.rmtree(home / "loras")
    guidance = Distill("guidance", "a red circle", guidance=Guidance(scale=3.0))
    for changes, difference in (
        ({"learning_rate": 0.001}, r"learning_rate was 0\.0005, and is 0\.001 now"),
        ({"prompt": "a blue star"}, 'prompt was "a red circle", and is "a blue star" now'),
        ({"distill": guidance, "guidance": Guidance(mode="none")}, 'method was "ground-truth", and is "guidance" now'),
        ({"samples": 2}, "samples was 1, and is 2 now"),
        ({"height": 32}, "height was 16, and is 32 now"),
        ({"guidance": Guidance(scale=4.0)}, "guidance was .*3.0.*, and is .*4.0.* now"),
    ):
        with pytest.raises(TrainingError, match=rf"slow\.pt: a checkpoint of another recipe: {difference}"):
            distill.train(make_recipe(**changes), home, work=work)


def test_an_existing_lora_is_never_overwritten_unasked(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    work = tmp_path / "work"
    files = distill.train(make_recipe(), home, work=work)
    kept = files[1].read_bytes()
    with pytest.raises(OutputError, match=r"slow\.safetensors: exists, from another run: steps was 3, and is 4 now"):
        distill.train(make_recipe(steps=4), home, work=work)
    assert distill.train(make_recipe(steps=4), home, work=work, overwrite=True) == files
    assert files[1].read_bytes() != kept
    files[1].write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"fast\.safetensors: exists, and is no result of this training"):
        distill.train(make_recipe(steps=4), home, work=work)
    assert files[1].read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": None}, "^distill: missing; training needs at least a prompt"),
        ({"phases": (Phase("all", (1, 2)),)}, "^phases: none names a lora or a guide file, so there is nothing"),
        (
            {"phases": (Phase("a", (1,), Lora("x")), Phase("b", (2,), Lora("x")))},
            r"^phases\[1\]: x is a result of a too; give each its own file",
        ),
        (
            {**TINY, "phases": (Phase("a", (1,), Lora("x"), "x"),)},
            r"^phases\[0\]: x is a result of a too; give each its own file",
        ),
        ({"phases": (Phase("a", (11,), Lora("x")),)}, r"^phases\.a: step 11 is outside the teacher's 1\.\.10"),
        ({"width": 20}, "^width: 20 is not a multiple of 8"),
        ({"targets": ("to_q", "to_kk")}, r"^distill\.targets\[1\]: 'to_kk' names no linear.*did you mean 'to_k'\?"),
        ({"targets": ("attn1",)}, r"^distill\.targets\[0\]: 'attn1' names no linear"),
        ({**EMBEDDED, "method": "ground-truth"}, r"^phases\[0\]\.guide: ground truth holds no guidance to learn; use"),
        (
            {**TINY, "distill": Distill("guidance", "a star", guide="tiny", guidance=Guidance("none"))},
            r"^distill\.guidance\.mode: none holds no guidance to learn; give the teacher's, cfg",
        ),
        (
            {"method": "guidance", "guidance": Guidance("none")},
            r"^distill\.guidance\.mode: none holds no guidance to learn; give the teacher's, cfg",
        ),
        (
            {**TINY, "scales": (6.0, 9.0)},
            r"^guidance\.scale: 5 is not among the scales that the guides would learn, distill\.scales, 6 to 9",
        ),
        (
            {**TINY, "guide": "embedding"},
            r"^phases\[0\]: an embedding of the scale acts through a LoRA; name one, or another guide",
        ),
        (
            {"method": "guidance"},
            r"^guidance\.mode: cfg would guide twice what distill\.method guidance teaches the LoRA of phase slow; set",
        ),
        ({"prompt": None, "prompts": "x.txt"}, r"^distill\.prompts: .*x\.txt: No such file"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused(
    changes: dict[str, Any], message: str, home: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        distill.train(make_recipe(**changes), home, work=tmp_path / "work")


def test_a_model_with_no_room_for_a_tiny_guide_is_refused(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a tiny guide has at most 1% of the UNet's 35572 parameters, and the small"):
        distill.train(make_recipe(**TINY), home, work=tmp_path)


def test_a_model_of_another_family_is_refused(own_home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    text = "the scheduler is a FlowMatchEulerDiscreteScheduler, and this model was trained for diffusion"
    with pytest.raises(ModelError, match=text):
        distill.train(make_recipe(scheduler="FlowMatchEulerDiscreteScheduler"), own_home, work=tmp_path)
    index = own_home / "model" / "model_index.json"
    whole = index.read_text()
    index.write_text(whole.replace("StableDiffusionPipeline", "KolorsPipeline"))
    with pytest.raises(ModelError, match="KolorsPipeline is not supported; supported pipelines: StableDiffusionPipe"):
        distill.train(make_recipe(), own_home, work=tmp_path)
    index.write_text(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glance_trt.export.families.stable_diffusion.StableDiffusion.name", "kandinsky")
        patch.setattr("glance_trt.distill.base.StableDiffusion", SimpleNamespace(name="stable-diffusion"))
        with pytest.raises(ModelError, match="model: a kandinsky; distill trains Stable Diffusion 1 and 2"):
            distill.train(make_recipe(), own_home, work=tmp_path)
    index.unlink()
    with pytest.raises(ModelError, match=r"model: not a diffusers pipeline folder, it has no model_index\.json"):
        distill.train(make_recipe(), own_home, work=tmp_path)
