"""``distill`` hands its arguments on, prints the LoRAs' files, and refuses a bad recipe before PyTorch is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from glance_trt.errors import TrainingError

from .conftest import Run

RECIPE = """
name: small
model: model
height: 8
width: 8
phases: [{name: only, steps: [1], lora: {file: only.safetensors}}]
distill: {prompt: a star}
"""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the training, which needs PyTorch and is not done here."""
    calls: list[Any] = []

    def train(plan: Any, folder: Path, *, progress: Any, **options: Any) -> list[Path]:
        calls.append((plan.name, folder, options))
        if plan.name == "small":
            progress("train only", 0, 60)
        if options["device"] == "cuda":
            raise TrainingError("step 3: the loss is not a number")
        return [Path("slow.safetensors"), Path("fast.safetensors")]

    module = ModuleType("glance_trt.distill.experts")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "glance_trt.distill.experts", module)
    return calls


def test_arguments_reach_the_library_and_files_are_printed(run: Run, trained: list[Any]) -> None:
    Path("recipes").mkdir()
    Path("recipes/small.yaml").write_text(RECIPE)
    shown = run("distill", "recipes/small.yaml")
    assert (shown.code, shown.out, shown.err) == (0, "slow.safetensors\nfast.safetensors\n", "")
    given = ["-o", "loras", "--work", "work", "--samples", "taken"]
    run("distill", "recipes/small.yaml", *given, "--device", "cpu", "--overwrite")
    beside = Path("recipes/.distill/small")
    assert trained == [
        ("small", Path("recipes"), {"work": beside, "samples": None, "out": None, "overwrite": False, "device": None}),
        (
            "small",
            Path("recipes"),
            {
                "work": Path("work"),
                "samples": Path("taken"),
                "out": Path("loras"),
                "overwrite": True,
                "device": "cpu",
            },
        ),
    ]


def test_what_was_trained_already_is_said(run: Run, trained: list[Any]) -> None:
    Path("done.yaml").write_text(RECIPE.replace("name: small", "name: done"))
    shown = run("distill", "done.yaml")
    assert (shown.code, shown.out) == (0, "slow.safetensors\nfast.safetensors\n")
    assert shown.err == "trained already, by this recipe; --overwrite trains again\n"


def test_error_of_the_training_is_an_exit_code(run: Run, trained: list[Any]) -> None:
    Path("small.yaml").write_text(RECIPE)
    shown = run("distill", "small.yaml", "--device", "cuda")
    assert (shown.code, shown.out, shown.err) == (11, "", "error: step 3: the loss is not a number\n")
    assert trained


def test_bad_recipe_is_refused_before_pytorch_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "glance_trt.distill.experts", None)  # cannot be imported
    Path("wrong.yaml").write_text(RECIPE.replace("height: 8", "hight: 8"))
    shown = run("distill", "wrong.yaml")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err == "error: wrong.yaml: hight: unknown key; did you mean 'height'?\n"
    assert run("distill", "none.yaml").code == 3
    Path("empty.yaml").write_text(RECIPE.replace(", lora: {file: only.safetensors}", ""))
    shown = run("distill", "empty.yaml")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err == ("error: empty.yaml: phases: none names a lora or a guide file, so there is nothing to train\n")


def test_missing_pytorch_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("glance_trt.distill.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    Path("small.yaml").write_text(RECIPE)
    shown = run("distill", "small.yaml")
    assert (shown.code, shown.out) == (7, "")
    assert shown.err == "error: this command needs torch; glance-trt doctor says what to install\n"
