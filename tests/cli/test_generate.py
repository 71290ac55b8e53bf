"""``generate`` writes images that say how they were made, prints where they are, and refuses bad input early."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glance_trt import __version__
from glance_trt.bundle import Bundle
from glance_trt.runtime import images
from glance_trt.runtime.images import GenerationParameters, read_parameters
from glance_trt.runtime.pipeline import Pipeline

from ..models import tiny
from .conftest import Run

PROMPT = "a large red circle"
MAIN = "from glance_trt.cli.main import main\nmain()"


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.bundle"))


# --- what it does ---------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_pipeline_and_their_paths_are_printed(run: Run, tiny_bundle: Path) -> None:
    shown = run("generate", tiny_bundle, PROMPT, "a star!", "-n", 3, "--seed", 7, "-o", "out/new", "--batch-size", 2)
    names = [f"out/new/{name}-{seed}.png" for name in ("01-a-large-red-circle", "02-a-star") for seed in (7, 8, 9)]
    assert (shown.code, shown.out.splitlines(), shown.err) == (0, names, "seed 7\n")
    assert sorted(map(str, Path("out/new").iterdir())) == names  # no drafts
    with Pipeline.open(tiny_bundle) as pipeline:
        expected = [image for prompt in (PROMPT, "a star!") for image in pipeline.generate(prompt, seed=7, count=3)]
    for name, image in zip(names, expected, strict=True):
        with Image.open(name) as found:
            assert found.convert("RGB").tobytes() == image.tobytes()


def test_low_memory_makes_the_same_images(run: Run, tiny_bundle: Path) -> None:
    for folder, options in {"usual": (), "low": ("--low-memory",)}.items():
        shown = run("generate", tiny_bundle, PROMPT, "-n", 5, "--seed", 1, "--batch-size", 2, "-o", folder, *options)
        assert (shown.code, len(shown.out.splitlines())) == (0, 5)
    for usual, low in zip(sorted(Path("usual").iterdir()), sorted(Path("low").iterdir()), strict=True):
        assert usual.read_bytes() == low.read_bytes()


def test_image_carries_all_that_it_was_made_from(run: Run, tiny_bundle: Path) -> None:
    options = ("--seed", 7, "--guidance", 2.5, "--negative-prompt", "a star", "--schedule", "short", "--target", "cpu")
    assert run("generate", tiny_bundle, PROMPT, *options, "-o", "x.png").out == "x.png\n"
    sha256 = Bundle.open(tiny_bundle).sha256
    expected = GenerationParameters(
        PROMPT, "a star", 7, 1, 2.5, "short", "cpu", tiny.WIDTH, tiny.HEIGHT, "tiny", sha256, __version__
    )
    assert read_parameters("x.png") == expected
    run("generate", tiny_bundle, PROMPT, "--seed", -1, "-n", 2)
    found = read_parameters("a-large-red-circle-0.png")
    guidance = tiny.GUIDANCE
    assert (found.seed, found.steps, found.guidance_scale, found.negative_prompt, found.schedule) == (
        (0, 4, guidance.scale, guidance.negative_prompt, "default")
    )


def test_image_without_guidance_says_scale_one(run: Run, tmp_path: Path) -> None:
    assert run("generate", tiny.make_bundle(tmp_path / "b", guidance="none"), PROMPT, "-o", "x.png").code == 0
    assert (read_parameters("x.png").guidance_scale, read_parameters("x.png").negative_prompt) == (1, "")


def test_random_seed_is_printed_and_makes_the_image_again(run: Run, tiny_bundle: Path) -> None:
    seeds = []
    for name in ("a.png", "b.png"):
        shown = run("generate", tiny_bundle, PROMPT, "-o", name)
        match = re.fullmatch(r"seed (\d+)\n", shown.err)
        assert match
        seeds.append(match[1])
    assert seeds[0] != seeds[1]
    run("generate", tiny_bundle, PROMPT, "-o", "c.png", "--seed", seeds[0])
    assert Path("c.png").read_bytes() == Path("a.png").read_bytes()


def test_json_is_one_ascii_record_per_image(run: Run, tiny_bundle: Path) -> None:
    shown = run("generate", tiny_bundle, "ein großer Kreis", "-n", 2, "--seed", 1, "--json")
    assert shown.out.isascii()
    assert [json.loads(line) for line in shown.out.splitlines()] == [
        {"file": f"ein-großer-kreis-{seed}.png", "prompt": "ein großer Kreis", "seed": seed} for seed in (1, 2)
    ]


def test_sheet_shows_every_image(run: Run, tiny_bundle: Path) -> None:
    shown = run("generate", tiny_bundle, "a", "b", "-n", 2, "--seed", 1, "--sheet", "sheets/all.png", "-o", "out")
    assert len(shown.out.splitlines()) == 4
    with Image.open("sheets/all.png") as sheet:
        assert sheet.width >= 2 * tiny.WIDTH
        assert sheet.height >= 2 * tiny.HEIGHT
    assert [file.name for file in Path("sheets").iterdir()] == ["all.png"]


def test_images_are_written_batch_by_batch(run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance, seen = Pipeline._advance, []

    def spy(pipeline: Pipeline, part: Any, values: Any, on_step: Any) -> Any:
        seen.append((len(values["latents.0"]), len(list(Path("out").glob("*.png")))))
        return advance(pipeline, part, values, on_step)

    monkeypatch.setattr(Pipeline, "_advance", spy)
    assert run("generate", tiny_bundle, "a", "b", "-n", 3, "--batch-size", 2, "--seed", 5, "-o", "out").code == 0
    assert seen == [(2, 0), (2, 2), (2, 4)], "the second batch is of both prompts"


def test_every_step_is_reported(run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float, float]] = []

    @contextlib.contextmanager
    def recorded() -> Iterator[Callable[[str, float, float], None]]:
        yield lambda *call: calls.append(call)

    monkeypatch.setattr("glance_trt.cli.generate.bars", recorded)
    run("generate", tiny_bundle, PROMPT, "-n", 3, "--batch-size", 2)
    assert calls == [("generate", done, 12) for done in (0, 2, 4, 6, 8, 9, 10, 11, 12)]


def test_path_that_is_no_text_is_printed_as_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAIN, "generate", tiny_bundle, PROMPT, "--seed", "7", "-o", b"\xff"]
    for options, expected in (
        ([], b"\xff/a-large-red-circle-7.png\n"),
        (["--json", "--overwrite"], rb'"file": "\udcff/'),
    ):
        shown = subprocess.run(command + options, cwd=tmp_path, capture_output=True, check=False)
        assert (shown.returncode, shown.stderr) == (0, b"seed 7\n")
        assert expected in shown.stdout


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt_is_refused(run: Run, tiny_bundle: Path, prompt: str) -> None:
    shown = run("generate", tiny_bundle, prompt, "--seed", 7)
    assert (shown.code, shown.out) == (8, "")
    assert shown.err == "seed 7\nerror: prompt: empty; say what the image should show\n"


def test_too_long_prompt_is_cut_with_a_warning(run: Run, tiny_bundle: Path) -> None:
    shown = run("generate", tiny_bundle, "a large red circle left of a small blue star", "-n", 5, "--seed", 7)
    assert (shown.code, len(shown.out.splitlines())) == (0, 5)
    text = "warning: prompt: longer than the 8 tokens of the text encoder; cut: 'a small blue star'\n"
    assert shown.err == f"seed 7\n{text}"


@pytest.mark.parametrize("option", [[], ["--negative-prompt"]])
def test_bytes_that_are_no_text_are_refused(tiny_bundle: Path, tmp_path: Path, option: list[str]) -> None:
    prompts = [b"a \xff", *option] if not option else [b"a star", *option, b"a \xff"]
    command = [sys.executable, "-c", MAIN, "generate", tiny_bundle, *prompts]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (8, "")
    name = "negative prompt" if option else "prompt"
    assert (
        f"error: {name}: got the surrogate U+DCFF at character 2; a prompt is text that UTF-8 can hold" in shown.stderr
    )
    assert "Traceback" not in shown.stderr


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--target", "rtx"], 7, "target 'rtx': this bundle has engines for cpu"),
        (["-o", "below/x.jpg"], 8, "-o below/x.jpg: images are PNG files; give a name that ends in .png, or a folder"),
        (["-o", "new/folder", "--schedule", "slow"], 8, "schedule 'slow': this bundle has default, short"),
        (["--schedule", "slow"], 8, "schedule 'slow': this bundle has default, short"),
        (["--count", "0"], 8, "--count: expected 1 to 100000, got 0"),
        (["-n", "-2"], 8, "--count: expected 1 to 100000, got -2"),
        (["-n", "100001"], 8, "--count: expected 1 to 100000, got 100001"),
        (["--threads", "513"], 8, "threads: expected 1 to 512, got 513"),
        (["--guidance", "nan"], 8, "guidance scale: expected a finite number, got nan"),
        (["--seed", str(2**64)], 8, "seed: got 18446744073709551616; a seed is a whole number from -"),
        (["-n", "2", "-o", "x.png"], 8, "-o x.png: one file for 2 images; give a folder"),
        (["another", "-o", "x.PNG"], 8, "-o x.PNG: one file for 2 images; give a folder"),
        (["--sheet", "sheet.txt"], 8, "--sheet sheet.txt: expected a name that ends in .png, .jpg or .webp"),
        (["-o", "x.png", "--sheet", "x.png"], 8, "--sheet x.png: an image goes there already; give another name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_setting_is_refused(run: Run, tiny_bundle: Path, options: list[str], code: int, text: str) -> None:
    shown = run("generate", tiny_bundle, PROMPT, *options)
    assert (shown.code, shown.out) == (code, "")
    assert f"error: {text}" in shown.err
    assert list(Path().iterdir()) == []


def test_guidance_for_a_bundle_without_it_is_refused(run: Run, tmp_path: Path) -> None:
    bundle = tiny.make_bundle(tmp_path / "bundle", guidance="none")
    for option, text in (
        ("--guidance", "guidance scale: this bundle was built without guidance"),
        ("--negative-prompt", "negative prompt: this bundle takes none"),
    ):
        shown = run("generate", bundle, PROMPT, option, "2")
        assert shown.code == 8
        assert f"error: {text}" in shown.err


# --- outputs --------------------------------------------------------------------------------------------------------


def test_output_that_exists_is_refused_before_any_work(
    run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "open", None)  # fails if it is called
    Path("a-star-8.png").write_text("precious")
    os.symlink("nowhere", "link.png")
    for options, name, option in (
        (["-n", 2], "a-star-8.png", "-o"),
        (["-o", "a-star-8.png"], "a-star-8.png", "-o"),
        (["-o", "link.png"], "link.png", "-o"),
        (["-o", "new.png", "--sheet", "a-star-8.png"], "a-star-8.png", "--sheet"),
    ):
        shown = run("generate", tiny_bundle, "a star", "--seed", 7, *options)
        assert (shown.code, shown.out) == (9, "")
        assert shown.err == f"error: {name} exists; give --overwrite or another {option}\n"
    assert Path("a-star-8.png").read_text() == "precious"


@pytest.mark.parametrize("options", [["-o", "{}"], ["-o", "{}/x.png"], ["-o", "out", "--sheet", "{}/sheet.png"]])
def test_nothing_is_written_into_the_bundle(run: Run, tiny_bundle: Path, options: list[str]) -> None:
    shown = run("generate", tiny_bundle, "a star", "--overwrite", *(option.format(tiny_bundle) for option in options))
    assert (shown.code, shown.out) == (9, "")
    assert "is inside the bundle, which holds no other files; give another " in shown.err
    assert not list(tiny_bundle.glob("*.png"))


def test_overwrite_replaces_what_exists(run: Run, tiny_bundle: Path) -> None:
    for name in ("x.png", "sheet.png"):
        Path(name).write_text("old")
    shown = run("generate", tiny_bundle, "a star", "--overwrite", "-o", "x.png", "--sheet", "sheet.png")
    assert (shown.code, shown.out) == (0, "x.png\n")
    for name in ("x.png", "sheet.png"):
        with Image.open(name) as image:
            image.load()


def test_folder_that_cannot_be_made_is_named(run: Run, tiny_bundle: Path) -> None:
    Path("file").touch()
    for folder, reason in (
        ("file", "File exists"),
        ("file/below", "Not a directory"),
        ("x" * 300, "File name too long"),
    ):
        shown = run("generate", tiny_bundle, "a star", "-o", folder)
        assert (shown.code, shown.out, shown.err) == (9, "", f"error: {folder}: {reason}\n")


def test_full_disk_is_said_and_leaves_nothing(run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, mode: str) -> Any:
        Path(file).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(images, "open", full, raising=False)
    shown = run("generate", tiny_bundle, "a star", "-o", "x.png", "--seed", 7)
    assert (shown.code, shown.out) == (9, "")
    text = "x.png: cannot be written: No space left on device; free some space, or give another -o"
    assert shown.err == f"seed 7\nerror: {text}\n"
    assert list(Path().iterdir()) == []


def test_full_disk_at_the_sheet_is_said_and_leaves_no_draft(
    run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(image: Image.Image, file: Path) -> None:
        Path(file).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("sheet.png").write_text("old")
    monkeypatch.setattr("glance_trt.runtime.images.save_png", lambda path, *_, **__: path.touch())
    monkeypatch.setattr(Image.Image, "save", full)
    shown = run("generate", tiny_bundle, "a star", "-o", "x.png", "--sheet", "sheet.png", "--overwrite")
    assert (shown.code, shown.out) == (9, "x.png\n")
    assert "error: sheet.png: cannot be written: [Errno 28] No space left on device" in shown.err
    assert Path("sheet.png").read_text() == "old"
    assert sorted(map(str, Path().iterdir())) == ["sheet.png", "x.png"]


# --- damaged bundles ------------------------------------------------------------------------------------------------


def remove(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()


def truncate(folder: Path) -> None:
    os.truncate(folder / "decoder.onnx", 100)


def alter(folder: Path) -> None:
    content = bytearray((folder / "decoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "decoder.onnx").write_bytes(content)


def add(folder: Path) -> None:
    (folder / "new.onnx").touch()


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "bundle.json").read_text())
        change(content)
        (folder / "bundle.json").write_text(json.dumps(content))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (remove, r"copy\.bundle/decoder\.onnx: missing; build the bundle again"),
    "truncated": (truncate, r"copy\.bundle/decoder\.onnx: 100 bytes, expected \d+; build the bundle again"),
    "altered": (alter, r"copy\.bundle/decoder\.onnx: altered \(its SHA-256 is not the listed one\); build .*"),
    "unlisted": (add, r"copy\.bundle: 'new\.onnx' is not listed in bundle\.json; remove it, or build .*"),
    "type": (
        rewrite(lambda content: content["image"].update(width="6")),
        r"copy\.bundle/bundle\.json: image\.width: expected a whole number, got text \('6'\)",
    ),
    "newer": (
        rewrite(lambda content: content.update(format=2)),
        r"copy\.bundle/bundle\.json: format 2 is newer than 1, which this version reads; upgrade glance-trt",
    ),
    "no manifest": (lambda folder: (folder / "bundle.json").unlink(), r"copy\.bundle: not a bundle, .*"),
    "no JSON": (
        lambda folder: (folder / "bundle.json").write_text("{"),
        r"copy\.bundle/bundle\.json: not valid JSON: .*",
    ),
    "no folder": (shutil.rmtree, r"copy\.bundle: no such folder; a bundle is made with: glance-trt build RECIPE -o .*"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["generate", "inspect", "verify"])
def test_damaged_bundle_is_refused(run: Run, copy: Path, command: str, damage: str) -> None:
    apply, text = DAMAGES[damage]
    apply(copy)
    shown = run(command, copy, *(["a star"] if command == "generate" else []))
    if (command, damage) == ("inspect", "altered"):  # it reads the manifest alone
        assert shown.code == 0
        return
    assert (shown.code, shown.out) == (6, "")
    assert re.fullmatch(rf"(seed \d+\n)?error: \S+/{text}\n", shown.err)
