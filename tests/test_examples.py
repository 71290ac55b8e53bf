"""The demonstration's experiments are recipes that the library reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ablate
import pytest
import yaml

from glance_trt import recipe

ARMS = {name: content for arms in ablate.groups().values() for name, content in arms.items()}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_of_the_ablation_is_a_recipe(name: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {"name": name, "model": "model", **ARMS[name]}
    if "distill" in content:
        content["distill"] = {key: value for key, value in content["distill"].items() if value is not None}
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(content))
    plan, _ = recipe.load(tmp_path / "arm.yaml")
    once = {"none", "embedded"}
    per_step = 1 if plan.guidance.mode in once else 2
    assert ablate.evaluations(ARMS[name]) == per_step * sum(len(phase.steps) for phase in plan.phases)
