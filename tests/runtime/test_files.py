"""Images of many prompts as files: names and seeds, what is there already, what was interrupted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from glance_trt import __version__
from glance_trt.errors import InputError, OutputError
from glance_trt.runtime import files
from glance_trt.runtime.images import GenerationParameters, read_parameters, save_png
from glance_trt.runtime.pipeline import Pipeline

from ..models import rich
from .recorder import Recorder

LINES = {2: "a red circle", 3: "Ein großer Kreis!", 7: "a red circle"}
PICTURE = Image.new("RGB", (12, 8), "navy")


def outputs(folder: Path, count: int = 2, seed: int = 10) -> list[files.Output]:
    return files.of_lines(folder, LINES, count, seed)


# --- names and seeds ------------------------------------------------------------------------------------------------


def test_each_line_has_seeds_and_files_of_its_own() -> None:
    found = outputs(Path("out"))
    assert [str(output.file) for output in found] == [
        "out/0001-a-red-circle-10.png",
        "out/0001-a-red-circle-11.png",
        "out/0002-ein-großer-kreis-12.png",
        "out/0002-ein-großer-kreis-13.png",
        "out/0003-a-red-circle-14.png",
        "out/0003-a-red-circle-15.png",
    ]
    assert [(output.request.seed, output.request.name) for output in found] == [
        *((10, "prompt in line 2"), (11, "prompt in line 2"), (12, "prompt in line 3"), (13, "prompt in line 3")),
        *((14, "prompt in line 7"), (15, "prompt in line 7")),
    ]
    assert [output.request.prompt for output in found] == [prompt for prompt in LINES.values() for _ in range(2)]


def test_lines_that_are_appended_change_no_name() -> None:
    more = dict(enumerate((f"star {i}" for i in range(2000)), start=1))
    few = {line: more[line] for line in range(1, 4)}
    assert files.of_lines(Path(), more, 3, 0)[:9] == files.of_lines(Path(), few, 3, 0)


def test_prompts_of_a_command_have_the_same_seeds() -> None:
    found = files.of_prompts(Path("out"), ["a", "b!"], 2, 7)
    assert [output.file.name for output in found] == ["01-a-7.png", "01-a-8.png", "02-b-7.png", "02-b-8.png"]
    assert {output.request.name for output in found} == {"prompt"}
    assert [output.file.name for output in files.of_prompts(Path("out"), ["🔥"], 1, -3)] == ["image--3.png"]
    assert [output.file.name for output in files.of_prompts(Path("out"), ["Ein rotes  Ö_ß"], 1, 7)] == [
        "ein-rotes-ö-ß-7.png"
    ]
    assert files.of_prompts(Path("out"), ["e\u0301toile"], 1, 7)[0].file.name == "\u00e9toile-7.png"
    assert files.of_prompts(Path("out"), ["𐌰" * 100], 1, 7)[0].file.name == "𐌰" * 45 + "-7.png"
    assert files.of_prompts(Path("x.png"), ["a"], 1, 7)[0].file == Path("x.png")
    with pytest.raises(InputError, match=r"^-o x\.png: one file for 3 images; give a folder$"):
        files.of_lines(Path("x.png"), LINES, 1, 0)


# --- making, and going on -------------------------------------------------------------------------------------------


def test_images_are_those_of_each_prompt_alone(rich_pipeline: Pipeline, tmp_path: Path) -> None:
    wanted = outputs(tmp_path)
    made = list(files.make(wanted, rich_pipeline, rich_pipeline.settings(), batch_size=4))
    assert [output for output, _ in made] == wanted
    for output, image in made:
        (alone,) = rich_pipeline.generate(output.request.prompt, seed=output.request.seed)
        assert image == alone
        with Image.open(output.file) as found:
            assert found.tobytes() == alone.tobytes()
        parameters = read_parameters(output.file)
        assert (parameters.prompt, parameters.seed) == (output.request.prompt, output.request.seed)
        assert (parameters.strength, parameters.image_sha256) == (None, None)


def test_the_file_says_what_an_image_was_made_from(rich_pipeline: Pipeline, tmp_path: Path) -> None:
    settings = rich_pipeline.settings(image=PICTURE, strength=0.5, height=12, width=8)
    list(files.make(outputs(tmp_path)[:1], rich_pipeline, settings, image_sha256="a" * 64))
    assert read_parameters(tmp_path / "0001-a-red-circle-10.png") == GenerationParameters(
        "a red circle",
        "a blue star",
        10,
        2,
        3.0,
        "usual",
        "cpu",
        8,
        12,
        "rich",
        rich_pipeline.bundle.sha256,
        __version__,
        0.5,
        "a" * 64,
    )


def test_an_interrupted_run_goes_on_where_it_stopped(rich_pipeline: Pipeline, tmp_path: Path) -> None:
    settings, wanted = rich_pipeline.settings(), outputs(tmp_path)
    assert files.missing(wanted, rich_pipeline, settings) == wanted
    run = files.make(wanted, rich_pipeline, settings, batch_size=2)
    for _ in range(3):
        next(run)
    run.close()
    left = files.missing(wanted, rich_pipeline, settings)
    assert left == wanted[3:]
    before = {output.file: output.file.stat().st_mtime_ns for output in wanted[:3]}
    list(files.make(left, rich_pipeline, settings))
    assert files.missing(wanted, rich_pipeline, settings) == []
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert sorted(tmp_path.iterdir()) == [output.file for output in wanted]


def test_an_image_that_another_version_made_is_as_good(rich_pipeline: Pipeline, tmp_path: Path) -> None:
    settings, (wanted, *_) = rich_pipeline.settings(), outputs(tmp_path)
    ((_, image),) = files.make([wanted], rich_pipeline, settings)
    save_png(wanted.file, image, replace(read_parameters(wanted.file), version="0.0"), overwrite=True)
    assert files.missing([wanted], rich_pipeline, settings) == []


def test_a_file_that_was_made_otherwise_is_an_error_or_made_anew(
    rich_pipeline: Pipeline, tmp_path: Path, rich_bundle: Path
) -> None:
    (wanted, *_), settings = outputs(tmp_path), rich_pipeline.settings()
    list(files.make([wanted], rich_pipeline, settings))
    for changed, text in {
        rich_pipeline.settings(guidance_scale=2.5): r"another guidance_scale \(3\.0, now 2\.5\)",
        rich_pipeline.settings(negative_prompt=""): r"another negative_prompt \('a blue star', now ''\)",
        rich_pipeline.settings(height=12, width=8): r"another width \(12, now 8\)",
        rich_pipeline.settings(schedule="any"): r"another steps \(4, now 2\)",
    }.items():
        with pytest.raises(
            OutputError,
            match=rf"^{wanted.file} exists, made with {text}; give --overwrite or another -o$",
        ):
            files.missing([wanted], rich_pipeline, changed)
        assert files.missing([wanted], rich_pipeline, changed, overwrite=True) == [wanted]
    other = replace(wanted, request=replace(wanted.request, prompt="a blue circle"))
    with pytest.raises(OutputError, match=r"made with another prompt \('a red circle', now 'a blue circle'\)"):
        files.missing([other], rich_pipeline, settings)
    picture = rich_pipeline.settings(image=PICTURE, strength=1)
    with pytest.raises(OutputError, match=r"made with another strength \(None, now 1\.0\)"):
        files.missing([wanted], rich_pipeline, picture, image_sha256="a" * 64)
    altered = rich.make_bundle(tmp_path / "altered.bundle", name="other")
    with Pipeline.open(altered) as another, pytest.raises(OutputError, match=r"another bundle \('rich', now 'other'\)"):
        files.missing([wanted], another, settings)
    assert files.missing([wanted], rich_pipeline, settings, overwrite=True) == [], "it is what is wanted"


@pytest.mark.parametrize("content", [b"precious", b""])
def test_a_file_of_someone_else_is_not_taken_for_an_image(
    rich_pipeline: Pipeline, tmp_path: Path, content: bytes
) -> None:
    wanted, settings = outputs(tmp_path), rich_pipeline.settings()
    wanted[4].file.write_bytes(content)
    with pytest.raises(
        OutputError, match=rf"^{re.escape(str(wanted[4].file))} exists; give --overwrite or another -o$"
    ):
        files.missing(wanted, rich_pipeline, settings)
    wanted[4].file.unlink()
    wanted[4].file.symlink_to("nowhere")
    with pytest.raises(OutputError, match=r" exists; give --overwrite or another -o$"):
        files.missing(wanted, rich_pipeline, settings)
    Image.new("RGB", (12, 8)).save(tmp_path / "other.png")
    wanted[4].file.unlink()
    wanted[4].file.symlink_to("other.png")
    with pytest.raises(OutputError, match=r" exists; give --overwrite or another -o$"):
        files.missing(wanted, rich_pipeline, settings)
    assert files.missing(wanted, rich_pipeline, settings, overwrite=True) == wanted


def test_progress_is_over_all_images(rich_pipeline: Pipeline, tmp_path: Path) -> None:
    calls: list[tuple[str, float, float]] = []
    settings = rich_pipeline.settings(schedule="any")
    drawn = files.make(
        outputs(tmp_path), rich_pipeline, settings, batch_size=4, progress=lambda *call: calls.append(call)
    )
    list(drawn)
    assert calls == [("generate", done, 12) for done in (0, 4, 8, 10, 12)]


def test_a_prompt_that_cannot_be_encoded_is_said_before_anything_runs(rich_pipeline: Pipeline, tmp_path: Path) -> None:
    recorder = Recorder(rich_pipeline)
    wanted = files.of_lines(tmp_path, {1: "a", 4: "b \udcff"}, 2, 0)
    with pytest.raises(InputError, match=r"^prompt in line 4: got the surrogate U\+DCFF at character 2; "):
        list(files.make(wanted, rich_pipeline, rich_pipeline.settings()))
    assert recorder.calls == []
    assert list(tmp_path.iterdir()) == []
