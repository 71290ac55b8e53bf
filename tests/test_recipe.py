"""Recipes: what is read, what is shipped, and the texts with which the rest is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from glance_trt import recipe
from glance_trt.engines import targets
from glance_trt.errors import LoraError, ModelError, RecipeError

GOOD = """
name: tiny
model: models/tiny
height: 64
width: 64
phases:
  - name: slow
    steps: [1, 3]
    lora: {file: slow.safetensors}
  - {name: fast, steps: [11, 50], lora: {file: fast.safetensors, scale: 4}}
guidance: {mode: cfg, scale: 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(GOOD)
    return path


def test_load_reads_a_file_and_says_where_its_paths_start(file: Path) -> None:
    loaded, folder = recipe.load(file)
    assert folder == file.parent
    assert loaded == recipe.Recipe(
        name="tiny",
        model="models/tiny",
        phases=(
            recipe.Phase("slow", (1, 3), recipe.Lora("slow.safetensors")),
            recipe.Phase("fast", (11, 50), recipe.Lora("fast.safetensors", 4.0)),
        ),
        height=64,
        width=64,
        guidance=recipe.Guidance(scale=4.0),
    )


def test_defaults_are_those_of_the_paper(file: Path) -> None:
    loaded, _ = recipe.load(str(file))
    assert loaded.teacher_steps == 50
    assert loaded.sampler == "consistent"
    assert loaded.distill is None
    # arXiv 2512.02899 and its released code, for FLUX
    distill = recipe.Distill(prompt="a cat")
    assert (distill.rank, distill.alpha, distill.steps, distill.learning_rate) == (16, 64.0, 60, 5e-4)
    assert (distill.batch_size, distill.weight_decay) == (1, 0.01)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("model:", "modle:", "modle: unknown key; did you mean 'model'?"),
        ("guidance: {mode: cfg,", "guidance: {mode: none, scael: 1,", "guidance.scael: unknown key; did you mean"),
        ("model: models/tiny", "", "model: missing"),
        ("height: 64", "height: '64'", "height: expected a whole number, got text ('64')"),
        ("height: 64", "height: 64.0", "height: expected a whole number, got a number (64.0)"),
        ("height: 64", "height: yes", "height: expected a whole number, got true or false (True)"),
        ("height: 64", "height: 0", "height: expected a whole number from 1 to 8192, got 0"),
        ("height: 64", "height: 8208", "height: expected a whole number from 1 to 8192, got 8208"),
        ("width: 64", "width: -8", "width: expected a whole number from 1 to 8192, got -8"),
        ("width: 64", "width: 64\nteacher_steps: 0", "teacher_steps: expected a whole number from 1 to 1000, got 0"),
        ("width: 64", "width: 64\nengines: []", "engines: a recipe needs at least one, such as cpu"),
        ("width: 64", "width: 2001-01-01", "width: expected a whole number, got date"),
        ("name: tiny", "name: 5", "name: expected text, got a whole number (5)"),
        ("name: tiny", "name: my model", "name: 'my model' is no valid name; names are 1 to 64 of"),
        ("name: tiny", "name: tiny\n1: 2", "1: unknown key; known: name, model, phases"),
        ("[1, 3]", "3", "phases[0].steps: expected a list, got a whole number (3)"),
        ("[1, 3]", "[1, three]", "phases[0].steps[1]: expected a whole number, got text ('three')"),
        ("name: fast", "name: slow", "phases[1].name: 'slow' stands twice"),
        ("name: fast", "name: fast.1", "phases[1].name: 'fast.1' is not 1 to 16 of A-Z a-z 0-9 _ -"),
        ("name: fast", "name: ''", "phases[1].name: '' is not 1 to 16 of"),
        ("mode: cfg", "mode: cgf", "guidance.mode: expected one of none, cfg, embedded; got text ("),
        ("[1, 3]", "[1, 3]\n    guide: 5", "phases[0].guide: expected text, got a whole number (5)"),
        ("[1, 3]", "[1, 3]\n    giude: x", "phases[0].giude: unknown key; did you mean 'guide'?"),
        ("mode: cfg", "rescale: 1.5", "guidance.rescale: expected 0 to 1, got 1.5"),
        ("scale: 4}\n", "scale: .inf}\n", "guidance.scale: expected a finite number, got inf"),
        ("scale: 4}\n", "scale: .nan}\n", "guidance.scale: expected a finite number, got nan"),
        ("width: 64", "width: 64\nwidth: 32", "not valid YAML: key 'width' stands twice"),
        ("{file: slow.safetensors}", "{file: a, file: b}", "not valid YAML: key 'file' stands twice"),
        ("width: 64", "width: [", "not valid YAML: "),
        ("width: 64", "width: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
        ("width: 64", "width: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("width: 64", "width: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("width: 64", "width: -0x" + "f" * 5000, "width: expected a whole number from 1 to 8192, got a number of"),
        ("width: 64", "width: " + "[" * 1200, "not valid YAML: "),
        ("width: 64", "width: &a [*a]", "width: expected a whole number, got a list"),
        ("width: 64", "width: \x01", "not valid YAML: "),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_with_its_place(file: Path, old: str, new: str, text: str) -> None:
    assert old in GOOD
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError, match="^" + re.escape(f"{file}: {text}")):
        recipe.load(file)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "expected keys and values, got nothing"),
        (b"- a", "expected keys and values, got a list"),
        (b"name: \xff", "not valid YAML: 'utf-8' codec can't decode"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML: expected a single document"),
    ],
)
def test_what_is_no_recipe_at_all_is_refused(file: Path, content: bytes, text: str) -> None:
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(f"{file}: {text}")):
        recipe.load(file)


def test_a_recipe_without_phases_is_refused(file: Path) -> None:
    file.write_text(GOOD[: GOOD.index("phases")] + "phases: []\n")
    with pytest.raises(RecipeError, match=re.escape(f"{file}: phases: a recipe needs at least one phase")):
        recipe.load(file)


@pytest.mark.parametrize("name", ["no-such", "no/such.yaml", "", "x" * 5000, "a\0b"])
def test_a_missing_recipe_is_named_beside_the_shipped_ones(name: str) -> None:
    with pytest.raises(
        RecipeError, match=re.escape(f"{name}: no such file, and no shipped recipe of that name (")
    ) as error:
        recipe.load(name)
    assert "shapes" in str(error.value)


def test_a_name_that_is_nearly_a_shipped_one_is_suggested() -> None:
    with pytest.raises(RecipeError, match=r"^rtx-bf16: .* no shipped target .* did you mean 'rtx-bfloat16'\?$"):
        targets.load("rtx-bf16")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a folder; a recipe is a YAML file"):
        recipe.load(tmp_path)


def test_a_guide_stands_beside_a_lora_or_alone(file: Path) -> None:
    guided = GOOD.replace("steps: [1, 3]", "steps: [1, 3]\n    guide: slow.guide.safetensors")
    file.write_text(guided)  # a guide in one phase, two evaluations in the other
    slow, fast = recipe.load(file)[0].phases
    assert slow == recipe.Phase("slow", (1, 3), recipe.Lora("slow.safetensors"), "slow.guide.safetensors")
    assert fast.guide is None
    file.write_text(guided.replace("mode: cfg", "mode: none"))
    with pytest.raises(RecipeError, match=re.escape("phases[0].guide: takes a guidance scale, and guidance.mode is")):
        recipe.load(file)
    alone = GOOD.replace("lora: {file: slow.safetensors}", "guide: a").replace(
        "lora: {file: fast", "guide: b, lora: {file: fast"
    )
    file.write_text(alone.replace("mode: cfg", "mode: embedded"))
    loaded = recipe.load(file)[0]
    assert (loaded.guidance.mode, loaded.phases[0]) == ("embedded", recipe.Phase("slow", (1, 3), guide="a"))


DISTILL = "prompt: a cat, method: trajectory, guidance: {mode: none}, scales: [1, 8], guide: tiny"


def test_distillation_is_read_with_all_of_its_settings(file: Path) -> None:
    file.write_text(GOOD + f"distill: {{{DISTILL}, on_policy: no, samples: 64, decay: linear, precision: bfloat16}}\n")
    assert recipe.load(file)[0].distill == recipe.Distill(
        method="trajectory",
        prompt="a cat",
        samples=64,
        guidance=recipe.Guidance(mode="none"),
        scales=(1.0, 8.0),
        guide="tiny",
        on_policy=False,
        decay="linear",
        precision="bfloat16",
    )


def test_distillation_defaults_to_the_papers_ground_truth() -> None:
    distill = recipe.Distill(prompt="a cat")
    assert (distill.method, distill.guide, distill.scales) == ("ground-truth", "embedding", (2.0, 9.0))
    assert distill.targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert (distill.decay, distill.precision, distill.caption_dropout, distill.on_policy) == (
        "none",
        "float32",
        0.0,
        True,
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt": None}, "distill: expected one of prompt, prompts and images, got none"),
        ({"prompts": "p.txt"}, "distill: expected one of prompt, prompts and images, got prompt, prompts"),
        (
            {"prompt": None, "prompts": "p.txt", "images": "x"},
            "distill: expected one of prompt, prompts and images, got prompts, images",
        ),
        (
            {"prompt": None, "prompts": "p.txt", "image": "x.png"},
            "distill.image: belongs to a prompt; several images go into a folder, named by images",
        ),
        ({"method": "trajectory", "image": "x.png"}, "distill.method: trajectory needs prompts only; leave the images"),
        ({"method": "trajectory", "prompt": None, "images": "x"}, "distill.method: trajectory needs prompts only"),
        ({"method": "guided"}, "distill.method: expected one of ground-truth, guidance, trajectory; got text"),
        ({"samples": 4, "image": "x.png"}, "distill.samples: the images are given; leave one of the two out"),
        ({"samples": 4, "prompt": None, "images": "x"}, "distill.samples: the images are given"),
        ({"samples": 0}, "distill.samples: expected a positive number, got 0"),
        ({"rank": 0}, "distill.rank: expected a positive number, got 0"),
        ({"alpha": -1.0}, "distill.alpha: expected a positive number, got -1.0"),
        ({"steps": 0}, "distill.steps: expected a positive number, got 0"),
        ({"learning_rate": 0.0}, "distill.learning_rate: expected a positive number, got 0.0"),
        ({"batch_size": 0}, "distill.batch_size: expected a positive number, got 0"),
        ({"scales": [4.0]}, "distill.scales: expected the lowest and the highest one, 0 or more, got [4.0]"),
        ({"scales": [-1, 2]}, "distill.scales: expected the lowest and the highest one, 0 or more, got [-1"),
        ({"scales": [9, 2]}, "distill.scales: expected the lowest and the highest one, 0 or more, got [9"),
        ({"scales": [4, 4]}, "distill.scales: expected the lowest and the highest one, 0 or more, got [4"),
        ({"guidance": {"mode": "embedded"}}, "distill.guidance.mode: the teacher's is cfg or none"),
        ({"guidance": {"rescale": 2}}, "distill.guidance.rescale: expected 0 to 1, got 2"),
        ({"guide": "huge"}, "distill.guide: expected one of embedding, tiny, full; got text ('huge')"),
        ({"decay": "cosine"}, "distill.decay: expected one of none, linear; got text ('cosine')"),
        ({"precision": "float16"}, "distill.precision: expected one of float32, bfloat16; got text ('float16')"),
        ({"on_policy": 1}, "distill.on_policy: expected true or false, got a whole number (1)"),
        ({"targets": []}, "distill.targets: expected at least one layer, such as to_q"),
        ({"weight_decay": -0.1}, "distill.weight_decay: expected 0 or more, got -0.1"),
        ({"caption_dropout": 1.5}, "distill.caption_dropout: expected a probability from 0 to 1, got 1.5"),
        ({"seed": -1}, "distill.seed: expected a whole number from 0 to 2**63 - 1, got -1"),
    ],
)
def test_a_wrong_distillation_is_refused_with_its_place(file: Path, changes: dict[str, Any], text: str) -> None:
    settings = {key: value for key, value in {"prompt": "a cat", **changes}.items() if value is not None}
    file.write_text(GOOD + yaml.safe_dump({"distill": settings}))
    with pytest.raises(RecipeError, match="^" + re.escape(f"{file}: {text}")):
        recipe.load(file)


def test_numbers_in_scientific_notation_are_numbers(file: Path) -> None:
    file.write_text(GOOD + "distill: {prompt: a cat, learning_rate: 5e-4, weight_decay: 1E-2, alpha: 6.4e1}\n")
    distill = recipe.load(file)[0].distill
    assert distill is not None
    assert (distill.learning_rate, distill.weight_decay, distill.alpha) == (0.0005, 0.01, 64.0)


def test_a_merged_key_may_be_overridden(file: Path) -> None:
    anchored = GOOD.replace("lora: {file: slow.safetensors}", "lora: &lora {file: slow.safetensors, scale: 2}")
    file.write_text(anchored.replace("lora: {file: fast.safetensors, scale: 4}", "lora: {<<: *lora, scale: 4}"))
    assert recipe.load(file)[0].phases[1].lora == recipe.Lora("slow.safetensors", 4.0)


def test_shipped_recipes_and_targets_are_found_by_name() -> None:
    recipes, engines = recipe.shipped_files("recipe"), recipe.shipped_files("target")
    assert "shapes" in recipes
    assert {"cpu", "rtx"} <= engines.keys()
    for name, path in recipes.items():
        loaded, folder = recipe.load(name)
        assert (loaded.name, folder) == (name, path.parent)
        assert set(loaded.engines) <= engines.keys()
    for name in engines:
        assert targets.load(name).name == name


def test_a_file_comes_before_a_shipped_recipe_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shapes").write_text(GOOD)
    assert recipe.load("shapes")[0].name == "tiny"


@pytest.mark.parametrize("kind", [ModelError, LoraError])
def test_what_a_shipped_recipe_lacks_is_said_to_be_for_the_user_s_copy(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = recipe.shipped_files("recipe")["flux-1-dev"]
    text = f"gone\nflux-1-dev is a shipped recipe; copy {shipped} to where your model and LoRAs are, and give the copy"
    with pytest.raises(kind) as caught, recipe.naming("flux-1-dev"):
        raise kind("gone")
    assert str(caught.value) == text
    with pytest.raises(kind, match=r"^gone\n.*flux-1-dev\.yaml is a shipped recipe"), recipe.naming(str(shipped)):
        raise kind("gone")
    for own in ("flux-1-dev", "other.yaml"):
        Path(own).touch()
        with pytest.raises(kind, match=r"^gone$"), recipe.naming(own):
            raise kind("gone")


@pytest.mark.parametrize("schema", [recipe.Recipe, recipe.Phase, recipe.Guidance, recipe.Distill, targets.Target])
def test_every_key_is_documented_with_its_default(schema: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(schema):
        assert f"`{field.name}`" in page
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            (row,) = (line for line in page.splitlines() if line.startswith("| ") and f"`{field.name}`" in line)
            assert any(float(number) == field.default for number in re.findall(r"[\d.]+(?:e-?\d+)?", row)), row
