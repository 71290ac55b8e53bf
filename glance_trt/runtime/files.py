"""Images of one or many prompts as files: what they are called, which are there already, writing them when made."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image

from glance_trt import __version__, strict
from glance_trt.errors import InputError, OutputError
from glance_trt.progress import Progress, silent
from glance_trt.runtime import images
from glance_trt.runtime.images import GenerationParameters
from glance_trt.runtime.pipeline import Pipeline, Request
from glance_trt.runtime.settings import Settings

MOST = 100_000
"""Images of a prompt; all their names are checked before the first is made."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Output:
    """An image that is wanted, and its file."""

    file: Path
    request: Request


def of_prompts(output: Path, prompts: Sequence[str], count: int, seed: int) -> list[Output]:
    """`count` images of each prompt, image i from ``seed + i``; with several prompts, their numbers come first in the
    names. output: a folder, or a .png file for one image. Raises `InputError`."""
    digits = 2 if len(prompts) > 1 else 0
    return _outputs(output, [Request(prompt, seed) for prompt in prompts], count, digits)


def of_lines(output: Path, prompts: Mapping[int, str], count: int, seed: int) -> list[Output]:
    """`count` images of each prompt, all from seeds of their own: those of the second begin with ``seed + count``, and
    so on. prompts: by the numbers of their lines, which errors name. output: as above. Raises `InputError`."""
    requests = [
        Request(prompt, seed + i * count, f"prompt in line {line}") for i, (line, prompt) in enumerate(prompts.items())
    ]
    return _outputs(output, requests, count, 4)  # always 4, so that names stay when lines are appended


def check(outputs: Sequence[Output], sheet: Path | None, bundle: Path, *, may_exist: bool) -> None:
    """Refuse what would fail when the images are there. Raises `InputError` and `OutputError`."""
    if sheet and sheet.suffix.lower() not in _SUFFIXES:
        raise InputError(f"--sheet {sheet}: expected a name that ends in .png, .jpg or .webp")
    files = dict.fromkeys((output.file for output in outputs), "-o")
    if sheet in files:
        raise InputError(f"--sheet {sheet}: an image goes there already; give another name")
    files |= {sheet: "--sheet"} if sheet else {}
    inside = [folder for folder in {file.parent for file in files} if folder.resolve() == bundle.resolve()]
    for file, option in files.items():
        if file.parent in inside:
            raise OutputError(f"{file}: is inside the bundle, which holds no other files; give another {option}")
        if not may_exist and os.path.lexists(file):
            raise OutputError(f"{file} exists; give --overwrite or another {option}")


def missing(
    outputs: Sequence[Output],
    pipeline: Pipeline,
    settings: Settings,
    *,
    image_sha256: str | None = None,
    overwrite: bool = False,
) -> list[Output]:
    """Those that are not there yet: an image of the same prompt, seed and settings, by any version, need not be made.

    image_sha256: of the file of the settings' image. Raises `OutputError` for a file that is something else, unless it
    may be overwritten.
    """
    found = []
    for output in outputs:
        if os.path.lexists(output.file):
            difference = _difference(output.file, _parameters(output.request, pipeline, settings, image_sha256))
            if difference is None:
                continue
            if not overwrite:
                raise OutputError(f"{output.file} exists{difference}; give --overwrite or another -o")
        found.append(output)
    return found


def make(
    outputs: Sequence[Output],
    pipeline: Pipeline,
    settings: Settings,
    *,
    image_sha256: str | None = None,
    overwrite: bool = False,
    batch_size: int = 4,
    progress: Progress = silent,
) -> Iterator[tuple[Output, Image.Image]]:
    """Make images and write them, each batch as soon as it is there. The files' folders exist.

    Raises `InputError` before anything runs, and `OutputError`.
    """
    done, total = 0, len(outputs) * settings.steps
    # On a GPU an image is one launch, and to be asked after every step would cost it that.
    watched = pipeline.bundle.manifest.engines[pipeline.target].backend == "onnxruntime"

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        progress("generate", done, total)

    drawn = pipeline.draw(
        [output.request for output in outputs],
        settings,
        batch_size=batch_size,
        on_step=(lambda step: advance(len(step.latents))) if watched else None,
    )
    advance(0)
    for output, image in zip(outputs, drawn, strict=True):
        if not watched:
            advance(settings.steps)
        parameters = _parameters(output.request, pipeline, settings, image_sha256)
        images.save_png(output.file, image, parameters, overwrite=overwrite)
        yield output, image


@contextlib.contextmanager
def folders(files: Iterable[Path]) -> Iterator[None]:
    """Make the folders of files that are not there; where nothing comes of them, they are removed again."""
    made: list[Path] = []
    try:
        for folder in dict.fromkeys(file.parent for file in files):
            made += [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{folder}: {error.strerror}") from None
        yield
    finally:
        for folder in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # it is not there, or has files in it
                folder.rmdir()


def save_sheet(image: Image.Image, sheet: Path) -> None:
    """Write a contact sheet, whole or not at all; one that exists is replaced. Raises `OutputError`."""
    draft = sheet.with_name(f".{secrets.token_hex(8)}{sheet.suffix}")
    try:
        image.save(draft)
        os.replace(draft, sheet)
    except (OSError, ValueError) as error:  # ValueError: more pixels than the format takes
        raise OutputError(f"{sheet}: cannot be written: {error}") from None
    finally:
        draft.unlink(missing_ok=True)


def _outputs(output: Path, requests: Sequence[Request], count: int, digits: int) -> list[Output]:
    """requests: the first image of each prompt. digits: of the prompt's number in the names, at least."""
    if not 1 <= count <= MOST:
        raise InputError(f"--count: expected 1 to {MOST}, got {count}")
    if output.suffix.lower() in _SUFFIXES - {".png"} and not output.is_dir():
        raise InputError(f"-o {output}: images are PNG files; give a name that ends in .png, or a folder")
    if output.suffix.lower() == ".png":
        if len(requests) * count != 1:
            raise InputError(f"-o {output}: one file for {len(requests) * count} images; give a folder")
        return [Output(output, requests[0])]
    found = []
    for i, first in enumerate(requests, start=1):
        words = _words(first.prompt) or "image"
        number = f"{i:0{digits}d}-" if digits else ""
        for seed in range(first.seed, first.seed + count):
            found.append(Output(output / f"{number}{words}-{seed}.png", replace(first, seed=seed)))
    return found


def _words(prompt: str) -> str:
    """The letters and digits that a prompt begins with, as part of a file's name: at most 60, and 180 bytes."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    return words[:60].encode()[:180].decode(errors="ignore").strip("-")


def _parameters(
    request: Request, pipeline: Pipeline, settings: Settings, image_sha256: str | None
) -> GenerationParameters:
    return GenerationParameters(
        prompt=request.prompt,
        negative_prompt=settings.negative_prompt,
        seed=request.seed,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        schedule=settings.schedule,
        target=pipeline.target,
        width=settings.width,
        height=settings.height,
        bundle=pipeline.bundle.manifest.name,
        bundle_sha256=pipeline.bundle.sha256,
        version=__version__,
        strength=settings.strength if settings.image is not None else None,
        image_sha256=image_sha256,
    )


def _difference(file: Path, wanted: GenerationParameters) -> str | None:
    """How a file that exists differs from the image that is wanted, in words; None if it is that."""
    try:
        there = images.read_parameters(file)
    except InputError:
        return ""
    for field in fields(there):
        theirs, ours = getattr(there, field.name), getattr(wanted, field.name)
        if theirs != ours and field.name != "version":
            return f", made with another {field.name} ({strict.shown(theirs)}, now {strict.shown(ours)})"
    return None
