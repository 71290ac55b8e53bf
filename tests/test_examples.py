"""The demonstration's experiments are recipes that the library reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ablate
import pytest
import train_teacher
import yaml
from arms import ARMS, WORDS
from data import all_scenes

from glance_trt import recipe, strict
from glance_trt.prompts import read_prompts
from glance_trt.recipe import Distill


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_of_the_ablation_is_a_recipe(name: str, tmp_path: Path) -> None:
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump({"name": name, "model": "model", **ARMS[name].recipe}))
    plan, _ = recipe.load(tmp_path / "arm.yaml")
    per_step = 2 if plan.guidance.mode == "cfg" else 1
    assert ARMS[name].evaluations == per_step * sum(len(phase.steps) for phase in plan.phases)


def test_the_demonstration_is_an_arm_of_the_ablation() -> None:
    plan, folder = recipe.load("shapes")
    assert plan.distill is not None
    arm = ARMS["trajectory-10"].recipe
    assert [list(phase.steps) for phase in plan.phases] == [phase["steps"] for phase in arm["phases"]]
    assert strict.write(plan.distill) == strict.write(
        strict.read(Distill, arm["distill"] | {"prompts": plan.distill.prompts})
    )
    trainable = {scene.caption for scene in all_scenes() if not scene.held_out}
    captions = read_prompts(folder / str(plan.distill.prompts))
    assert len(captions) == 2000
    assert set(captions) <= trainable, "none is held out"


def test_scenes_of_words_that_the_sample_has_and_of_others() -> None:
    seen, unseen = (ablate.scenes_of(ARMS[f"words-base-{kind}"], 100) for kind in ("seen", "unseen"))
    assert len(seen) == len(unseen) == 100
    words = set(WORDS["prompt"].split())
    assert all(set(scene.caption.split()) <= words for scene in seen)
    assert all(set(scene.caption.split()) & words <= {"a", "of", "on", "background"} for scene in unseen)
    assert len({scene.caption for scene in seen}) > 10
    assert len({scene.caption for scene in unseen}) == 100


def test_a_stage_that_was_interrupted_is_timed_as_a_whole_one() -> None:
    assert ablate.duration([(10.0, 0, 8), (10.0, 4, 8), (11.0, 5, 8), (14.0, 8, 8)]) == 8.0
    assert ablate.duration([(10.0, 0, 8), (11.0, 1, 8), (18.0, 8, 8)]) == 8.0
    assert ablate.duration([(10.0, 0, 8), (10.0, 8, 8)]) == 0.0


def test_stages_of_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All without a name; with another style the denoiser of a copy."""
    done: list[tuple[str, Path, int]] = []

    def stage(name: str) -> tuple[Callable[..., None], int]:
        return lambda model, work, steps, style: done.append((name, model, steps)), 7

    monkeypatch.setattr(train_teacher, "STAGES", {name: stage(name) for name in train_teacher.STAGES})
    (tmp_path / "model").mkdir()
    folders = ["--model", str(tmp_path / "model"), "--work", str(tmp_path / "work")]

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["train_teacher.py", *arguments, *folders])
        train_teacher.main()

    run()
    assert done == [(name, tmp_path / "model", 7) for name in ("tokenizer", "vae", "text", "unet")]
    done.clear()
    run("--style", "night", "--steps", "3")
    run("vae")
    assert done == [("unet", tmp_path / "work/night/model", 3), ("vae", tmp_path / "model", 7)]
    with pytest.raises(SystemExit):
        run("vea")
