"""``glance-trt generate``"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glance_trt import __version__
from glance_trt.cli import options
from glance_trt.cli.bars import bars, echo
from glance_trt.errors import InputError, OutputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from glance_trt.runtime.pipeline import StepResult

_IMAGES = {".png", ".jpg", ".jpeg", ".webp"}
_MOST = 100_000  # images of a prompt; all their names are checked before the first is made


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("-n", "--count", default=1, show_default=True, help="Images per prompt; image i uses seed + i.")
@click.option("--seed", type=int, help="Seed of each prompt's first image. Default: random; it is printed.")
@click.option("--negative-prompt", help="What the images should not show. Default: the bundle's.")
@click.option("--guidance", type=float, help="Guidance scale. Default: the bundle's.")
@click.option("--schedule", help="One of the bundle's schedules. Default: its first.")
@options.engines
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: one per core.")
@click.option(
    "--low-memory", is_flag=True, help="Hold one phase at a time, and take all images of a prompt through it."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Images denoised at once.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="A folder, or a .png file for one image. Default: here.",
)
@click.option(
    "--sheet", type=click.Path(path_type=Path), help="Also write all on one contact sheet (.png, .jpg, .webp)."
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON record per image instead of its path.")
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    count: int,
    seed: int | None,
    negative_prompt: str | None,
    guidance: float | None,
    schedule: str | None,
    target: str | None,
    threads: int | None,
    device: int,
    trust: bool,
    low_memory: bool,
    batch_size: int,
    output: Path,
    sheet: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Generate images from a bundle. Prints the file of each image; the PNGs carry prompt, seed and settings.

    \b
    Example: glance-trt generate out/shapes.bundle "a large red circle on a white background" -n 4 --seed 7 -o out
    """
    from glance_trt.runtime.images import GenerationParameters, contact_sheet, save_png
    from glance_trt.runtime.pipeline import Pipeline

    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
    if not 1 <= count <= _MOST:
        raise InputError(f"--count: expected 1 to {_MOST}, got {count}")
    files = _file_names(output, prompts, count, seed)
    _check(files, sheet, overwrite, bundle)
    made: list[Image] = []
    with (
        Pipeline.open(bundle, target, threads=threads, device=device, trust=trust, low_memory=low_memory) as pipeline,
        _folders({file.parent for file in (*files, *([sheet] if sheet else []))}),
        bars() as progress,
    ):
        manifest = pipeline.bundle.manifest
        settings = pipeline.settings(negative_prompt=negative_prompt, guidance_scale=guidance, schedule=schedule)
        click.echo(f"seed {seed}", err=True)
        done, total = 0, len(files) * settings.steps
        # On a GPU an image is one launch, and to be asked after every step would cost it that.
        watched = not low_memory and pipeline.bundle.manifest.engines[pipeline.target].backend == "onnxruntime"
        at_once = count if low_memory else batch_size

        def on_step(result: StepResult) -> None:
            nonlocal done
            done += len(result.latents)
            progress("generate", done, total)

        progress("generate", 0, total)
        for i, prompt in enumerate(prompts):
            for start in range(0, count, at_once):
                images = pipeline.generate(
                    prompt,
                    seed=seed + start,
                    count=min(at_once, count - start),
                    negative_prompt=negative_prompt,
                    guidance_scale=guidance,
                    schedule=schedule,
                    batch_size=batch_size,
                    on_step=on_step if watched else None,
                )
                if not watched:
                    done += len(images) * settings.steps
                    progress("generate", done, total)
                for j, image in enumerate(images, start):
                    parameters = GenerationParameters(
                        prompt=prompt,
                        negative_prompt=settings.negative_prompt,
                        seed=seed + j,
                        steps=settings.steps,
                        guidance_scale=settings.guidance_scale,
                        schedule=settings.schedule,
                        target=pipeline.target,
                        width=image.width,
                        height=image.height,
                        bundle=manifest.name,
                        bundle_sha256=pipeline.bundle.sha256,
                        version=__version__,
                    )
                    file = files[i * count + j]
                    save_png(file, image, parameters, overwrite=overwrite)
                    record = {"file": str(file), "prompt": prompt, "seed": seed + j}
                    echo(json.dumps(record) if as_json else os.fsencode(file))
                if sheet:
                    made += images
        if sheet:
            _save_sheet(contact_sheet(made, columns=max(count, 3)), sheet)


def _file_names(output: Path, prompts: Sequence[str], count: int, seed: int) -> list[Path]:
    if output.suffix.lower() in _IMAGES - {".png"} and not output.is_dir():
        raise InputError(f"-o {output}: images are PNG files; give a name that ends in .png, or a folder")
    if output.suffix.lower() == ".png":
        if len(prompts) * count != 1:
            raise InputError(f"-o {output}: one file for {len(prompts) * count} images; give a folder")
        return [output]
    names = []
    for i, prompt in enumerate(prompts, start=1):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "image"
        number = f"{i:02d}-" if len(prompts) > 1 else ""
        names += [output / f"{number}{words}-{seed + j}.png" for j in range(count)]
    return names


def _check(files: Sequence[Path], sheet: Path | None, overwrite: bool, bundle: Path) -> None:
    """Refuse now what would fail when the images are there."""
    if sheet and sheet.suffix.lower() not in _IMAGES:
        raise InputError(f"--sheet {sheet}: expected a name that ends in .png, .jpg or .webp")
    if sheet in files:
        raise InputError(f"--sheet {sheet}: an image goes there already; give another name")
    outputs = dict.fromkeys(files, "-o") | ({sheet: "--sheet"} if sheet else {})
    inside = [folder for folder in {file.parent for file in outputs} if folder.resolve() == bundle.resolve()]
    for file, option in outputs.items():
        if file.parent in inside:
            raise OutputError(f"{file}: is inside the bundle, which holds no other files; give another {option}")
        if os.path.lexists(file) and not overwrite:
            raise OutputError(f"{file} exists; give --overwrite or another {option}")


@contextlib.contextmanager
def _folders(folders: Iterable[Path]) -> Iterator[None]:
    """Make the folders that are not there; where nothing comes of them, they are removed again."""
    made: list[Path] = []
    try:
        for folder in folders:
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


def _save_sheet(image: Image, sheet: Path) -> None:
    draft = sheet.with_name(f".{secrets.token_hex(8)}{sheet.suffix}")
    try:
        image.save(draft)
        os.replace(draft, sheet)
    except (OSError, ValueError) as error:  # ValueError: more pixels than the format takes
        raise OutputError(f"{sheet}: cannot be written: {error}") from None
    finally:
        draft.unlink(missing_ok=True)
