"""``schedule`` prints a recipe's table, and writes searched knots into a recipe of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from glance_trt import recipe as recipes

from .conftest import Run

RECIPE = """
name: tiny
model: model
height: 16
width: 16
teacher_steps: 10
phases:
  - {name: slow, steps: [1, 3], lora: {file: loras/slow.safetensors}}
  - {name: fast, steps: [6, 9], lora: {file: loras/fast.safetensors}}
guidance: {mode: cfg, scale: 3.0}
distill: {prompts: captions.txt}
"""


@pytest.fixture
def home(tiny_model: Path) -> Path:
    folder = Path("home")
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model)
    (folder / "captions.txt").write_text("a red circle\n\na blue star\n")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def test_without_search_it_shows_the_compiled_steps(run: Run, home: Path) -> None:
    shown = run("schedule", "home/tiny.yaml")
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert lines[0] == "schedule default: 4 steps, initial noise x 1"
    assert [line.split()[:4] for line in lines[1:]] == [
        ["step", "knot", "phase", "timestep"],
        ["1", "1", "slow", "999.00000"],
        ["2", "3", "slow", "799.00000"],
        ["3", "6", "fast", "499.00000"],
        ["4", "9", "fast", "199.00000"],
    ]


def test_searched_knots_are_printed_and_written_into_a_recipe_that_loads(run: Run, home: Path) -> None:
    Path("new").mkdir()
    shown = run(
        "schedule", "home/tiny.yaml", "--search", "-k", "3", "--samples", "2", "-o", "new/three.yaml", "--plot", "k.png"
    )
    assert shown.code == 0, shown.err
    assert shown.out.startswith("best     cost ")
    best = shown.out.splitlines()[0].split(": ")[1]
    slow, fast = ([int(step) for step in part.split()] for part in best.split("|"))
    assert len(slow) + len(fast) == 3
    assert Path("k.png").stat().st_size > 1000
    plan, folder = recipes.load("new/three.yaml")
    assert [list(phase.steps) for phase in plan.phases] == [slow, fast]
    assert (folder / plan.model).resolve() == (home / "model").resolve()
    assert plan.name == "three"
    # Its own, for those that are there were trained for other knots.
    assert [phase.lora and phase.lora.file for phase in plan.phases] == [
        "three.slow.safetensors",
        "three.fast.safetensors",
    ]
    before = yaml.safe_load(RECIPE)
    assert plan.guidance.scale == before["guidance"]["scale"]
    assert run("schedule", "new/three.yaml").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "x.yaml"], 2, "--output needs --search"),
        (["-k", "5"], 2, "--knots needs --search"),
        (["--search", "-o", "home/tiny.yaml"], 9, "home/tiny.yaml: exists; give another, or --overwrite"),
        (["--search", "-k", "11"], 3, "knots: 11 of 10 teacher steps"),
        (["--search", "-k", "1", "-o", "x.yaml"], 8, "--knots 1: home/tiny.yaml has 2 phases, and each needs one"),
        (["--search", "--plot", "x.txt"], 8, "--plot x.txt: expected a name that ends in .png or .svg"),
        (["--search", "--device", "none"], 8, "device 'none': "),
        (["--search", "--prompts", "none.txt"], 8, "none.txt: No such file or directory; expected a text file"),
    ],
)
def test_bad_options_are_refused(run: Run, home: Path, arguments: list[str], code: int, message: str) -> None:
    shown = run("schedule", "home/tiny.yaml", *arguments)
    assert shown.code == code
    assert message in shown.err
    assert shown.out == ""
