"""``generate`` of many prompts, of sizes, and from images."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glance_trt.runtime.images import read_parameters
from glance_trt.runtime.pipeline import Pipeline

from ..models import rich
from .conftest import Run

NAMES = [
    "0001-a-red-circle-7.png",
    "0001-a-red-circle-8.png",
    "0002-a-star-9.png",
    "0002-a-star-10.png",
    "0003-a-red-circle-11.png",
    "0003-a-red-circle-12.png",
]


@pytest.fixture(scope="session")
def rich_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rich.make_bundle(tmp_path_factory.mktemp("rich") / "rich.bundle")


@pytest.fixture
def prompts(run: Run) -> Path:
    """A file, in the folder where `run` runs."""
    file = Path("prompts.txt")
    file.write_text("a red circle\n\n a star\t\na red circle\n")
    return file


def pngs(folder: str = "out") -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir())


# --- many prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--low-memory"], ["--batch-size", 1]])
def test_each_prompt_of_a_file_has_its_own_seeds(
    run: Run, rich_bundle: Path, prompts: Path, options: list[object]
) -> None:
    shown = run("generate", rich_bundle, "--prompts", prompts, "-n", 2, "--seed", 7, "-o", "out", *options)
    assert (shown.code, shown.err) == (0, "seed 7\n")
    assert shown.out.splitlines() == [f"out/{name}" for name in NAMES]
    assert pngs() == sorted(NAMES)
    with Pipeline.open(rich_bundle) as pipeline:
        for seed, name in enumerate(NAMES, start=7):
            prompt = "a star" if name.startswith("0002") else "a red circle"
            with Image.open(Path("out") / name) as found:
                assert found.tobytes() == pipeline.generate(prompt, seed=seed)[0].tobytes(), name


def test_a_dash_reads_prompts_from_standard_input(run: Run, rich_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a star\n")))
    shown = run("generate", rich_bundle, "--prompts", "-", "--seed", 3, "--json")
    assert [json.loads(line) for line in shown.out.splitlines()] == [
        {"file": "0001-a-star-3.png", "prompt": "a star", "seed": 3}
    ]


def test_a_run_goes_on_where_it_was_interrupted(
    run: Run, rich_bundle: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, batches = Pipeline._advance, []

    def spy(pipeline: Pipeline, part: Any, values: Any, on_step: Any) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(values["latents.0"]))
        return advance(pipeline, part, values, on_step)

    command = ("generate", rich_bundle, "--prompts", prompts, "-n", 2, "--seed", 7, "-o", "out", "--batch-size", 2)
    monkeypatch.setattr(Pipeline, "_advance", spy)
    shown = run(*command)
    assert (shown.code, shown.out.splitlines()) == (130, [f"out/{name}" for name in NAMES[:4]])
    monkeypatch.setattr(Pipeline, "_advance", advance)
    before = {name: (Path("out") / name).read_bytes() for name in NAMES[:4]}
    shown = run(*command)
    assert (shown.code, shown.out.splitlines()) == (0, [f"out/{name}" for name in NAMES[4:]])
    assert shown.err == "seed 7\n4 of 6 images are there already, made alike: left as they are\n"
    assert {name: (Path("out") / name).read_bytes() for name in before} == before
    shown = run(*command)
    assert (shown.code, shown.out) == (0, "")
    assert "6 of 6 images are there already" in shown.err
    whole = run(*command[:-4], "-o", "whole")
    assert whole.code == 0
    assert {name: (Path("whole") / name).read_bytes() for name in before} == before


def test_files_that_were_made_otherwise_stop_a_run_unless_they_may_be_replaced(
    run: Run, rich_bundle: Path, prompts: Path
) -> None:
    command = ("generate", rich_bundle, "--prompts", prompts, "--seed", 7, "-o", "out")
    assert run(*command).code == 0
    before = (Path("out") / "0002-a-star-8.png").read_bytes()
    shown = run(*command, "--guidance", 1.5)
    assert (shown.code, shown.out) == (9, "")
    text = "out/0001-a-red-circle-7.png exists, made with another guidance_scale (3.0, now 1.5); give --overwrite or "
    assert text in shown.err
    assert (Path("out") / "0002-a-star-8.png").read_bytes() == before
    shown = run(*command, "--guidance", 1.5, "--overwrite")
    assert (shown.code, len(shown.out.splitlines())) == (0, 3)
    assert read_parameters("out/0002-a-star-8.png").guidance_scale == 1.5


def test_a_wrong_file_of_prompts_is_said_before_any_work(
    run: Run, rich_bundle: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "open", None)  # fails if it is called
    prompts.write_bytes(b"a\n\n\xff\xfe\n")
    shown = run("generate", rich_bundle, "--prompts", prompts)
    assert (shown.code, shown.out) == (8, "")
    assert shown.err.startswith("error: prompts.txt: not a text in UTF-8; ")
    assert shown.err.endswith("and line 3 is none\n")
    shown = run("generate", rich_bundle, "--prompts", "none.txt")
    assert (shown.code, shown.err) == (
        (8, "error: none.txt: No such file or directory; expected a text file with a prompt per line\n")
    )


def test_warnings_name_the_line(run: Run, rich_bundle: Path, prompts: Path) -> None:
    prompts.write_text(f"a star\n\n{'red ' * 18}\n")
    shown = run("generate", rich_bundle, "--prompts", prompts, "--seed", 1, "-n", 3, "--batch-size", 1)
    assert shown.code == 0
    text = "warning: prompt in line 3: longer than the 20 tokens of the text encoder; cut: 'red'\n"
    assert shown.err == f"seed 1\n{text}"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give either prompts or --prompts FILE"),
        (["a star", "--prompts", "prompts.txt"], "give either prompts or --prompts FILE"),
        (["--prompts", "prompts.txt", "--sheet", "s.png"], "--sheet holds all images in memory; not with --prompts"),
    ],
)
def test_prompts_come_from_one_place(
    run: Run, rich_bundle: Path, prompts: Path, arguments: list[str], text: str
) -> None:
    shown = run("generate", rich_bundle, *arguments)
    assert (shown.code, shown.out) == (2, "")
    assert f"Error: {text}" in shown.err


# --- sizes, and images from images ----------------------------------------------------------------------------------


def test_size_is_that_which_was_asked_for(run: Run, rich_bundle: Path) -> None:
    shown = run("generate", rich_bundle, "a star", "--height", 20, "--width", 24, "--seed", 7, "-o", "x.png")
    assert shown.code == 0
    with Image.open("x.png") as image:
        assert image.size == (24, 20)
    parameters = read_parameters("x.png")
    assert (parameters.height, parameters.width, parameters.schedule) == (20, 24, "any")
    shown = run("generate", rich_bundle, "a star", "--height", 21, "-o", "y.png")
    assert (shown.code, shown.out) == (8, "")
    text = "size: 21 x 12 (height x width); this bundle makes 8 x 12, 12 x 8, 8 x 40, 20 x 24. The nearest is 20 x 24"
    assert f"error: {text}\n" in shown.err


def test_image_from_an_image_says_which_and_how(run: Run, rich_bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 9, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save("start.png")
    options = ("--image", "start.png", "--strength", 0.5, "--seed", 7)
    assert run("generate", rich_bundle, "a star", *options, "-n", 2, "-o", "out").code == 0
    with Pipeline.open(rich_bundle) as pipeline:
        expected = pipeline.generate("a star", seed=7, count=2, image=picture, strength=0.5)
    for name, image in zip(("out/a-star-7.png", "out/a-star-8.png"), expected, strict=True):
        with Image.open(name) as found:
            assert found.size == (8, 12), "its own, rounded down"
            assert found.tobytes() == image.tobytes()
        parameters = read_parameters(name)
        assert (parameters.strength, parameters.steps) == (0.5, 2)
        assert parameters.image_sha256 == hashlib.sha256(Path("start.png").read_bytes()).hexdigest()


def test_an_image_of_another_shape_is_mentioned(run: Run, rich_bundle: Path) -> None:
    for size, noted in (((30, 15), True), ((16, 24), False)):
        Image.new("RGB", size, "navy").save("start.png")
        options = ("--height", 8, "--width", 12) if noted else ()
        shown = run("generate", rich_bundle, "a star", "--image", "start.png", *options, "--seed", 7, "--overwrite")
        assert shown.code == 0
        note = "note: start.png is stretched from 15 x 30 to 8 x 12 (height x width)"
        assert (note in shown.err) == noted


def test_many_images_from_an_image_go_on_only_from_the_same_one(run: Run, rich_bundle: Path, prompts: Path) -> None:
    Image.new("RGB", (12, 8), "navy").save("start.png")
    command = ("generate", rich_bundle, "--prompts", prompts, "--image", "start.png", "--seed", 7, "-o", "out")
    assert run(*command).code == 0
    assert "3 of 3 images are there already" in run(*command).err
    shown = run(*command, "--strength", 0.5)
    assert "made with another steps (3, now 2)" in shown.err
    Image.new("RGB", (12, 8), "red").save("start.png")
    shown = run(*command)
    assert (shown.code, shown.out) == (9, "")
    assert "made with another image_sha256 (" in shown.err


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--image", "none.png"], 8, "none.png: cannot be read as an image: No such file or directory"),
        (["--image", "prompts.txt"], 8, "prompts.txt: cannot be read as an image: cannot identify image file"),
        (["--strength", "0.5"], 8, "strength: says how far to go from an image, and there is none; give one, or leave"),
        (["--image", "start.png", "--strength", "0.1"], 8, "strength: 0.1 runs none of the 4 steps; give 0.25 or more"),
        (["--image", "start.png", "--strength", "1.5"], 8, "strength: expected a number above 0, at most 1, got 1.5"),
        (["--width", "40", "--schedule", "usual"], 8, "schedule 'usual': is for 8 x 12, 12 x 8 (height x width), and"),
        (["--height", "0"], 2, "0 is not in the range x>=1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_setting_is_refused(
    run: Run, rich_bundle: Path, prompts: Path, options: list[str], code: int, text: str
) -> None:
    Image.new("RGB", (12, 8)).save("start.png")
    shown = run("generate", rich_bundle, "a star", "--seed", 7, "-o", "out", *options)
    assert (shown.code, shown.out) == (code, "")
    assert text in shown.err
    assert not Path("out").exists()


def test_bundle_without_an_encoder_names_the_recipe_s_key(run: Run, tiny_bundle: Path) -> None:
    Image.new("RGB", (12, 8)).save("start.png")
    shown = run("generate", tiny_bundle, "a star", "--image", "start.png")
    assert shown.code == 8
    assert (
        "error: image: this bundle makes images from text alone; build it from a recipe that says 'from_image: true'"
        in (shown.err)
    )
