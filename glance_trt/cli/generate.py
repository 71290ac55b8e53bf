"""``glance-trt generate``"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from glance_trt.cli import options
from glance_trt.cli.bars import bars, echo

_STRETCH = 0.02  # of a given image, beyond which it is mentioned: sides are rounded to what a model can make
_CELL = 192  # pixels of a contact sheet's cells, at least: a caption has to be read


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="A file with a prompt per line; - is stdin.",
)
@click.option("-n", "--count", default=1, show_default=True, help="Images per prompt; image i uses seed + i.")
@click.option(
    "--seed",
    type=int,
    help="Seed of each prompt's first image; of --prompts, the first's. Default: random; it is printed.",
)
@click.option("--negative-prompt", help="What the images should not show. Default: the bundle's.")
@click.option("--guidance", type=float, help="Guidance scale. Default: the bundle's.")
@click.option("--schedule", help="One of the bundle's schedules. Default: the first for the size.")
@click.option("--height", type=click.IntRange(min=1), help="Pixels. Default: the bundle's, or the image's.")
@click.option("--width", type=click.IntRange(min=1), help="Pixels, likewise.")
@click.option("--image", "start", type=click.Path(path_type=Path), help="An image to start from, resized to the size.")
@click.option("--strength", type=float, help="How much of the schedule runs from there, up to 1. Default: 0.8.")
@options.engines
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: one per core.")
@click.option("--low-memory", is_flag=True, help="Hold one engine at a time, and take up to 64 images through it.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Images denoised at once.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="A folder, or a .png file for one image. Default: here.",
)
@click.option(
    "--sheet",
    type=click.Path(path_type=Path),
    help="Also write all on one sheet, captioned (.png, .jpg, .webp); not with --prompts.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON record per image instead of its path.")
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    file: Path | None,
    count: int,
    seed: int | None,
    negative_prompt: str | None,
    guidance: float | None,
    schedule: str | None,
    height: int | None,
    width: int | None,
    start: Path | None,
    strength: float | None,
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

    With --prompts, each prompt has seeds of its own: the second's begin with seed + count, and so on. A run that was
    interrupted goes on when it is started again with the same seed: images that are there already are left as they are.

    \b
    Example: glance-trt generate out/shapes.bundle "a large red circle on a white background" -n 4 --seed 7 -o out
    """
    from glance_trt.prompts import read_numbered
    from glance_trt.runtime import files
    from glance_trt.runtime.images import contact_sheet, read_image
    from glance_trt.runtime.pipeline import Pipeline

    if bool(prompts) == bool(file):
        raise click.UsageError("give either prompts or --prompts FILE")
    if file and sheet:
        raise click.UsageError("--sheet holds all images in memory; not with --prompts")
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
    if file:
        outputs = files.of_lines(output, read_numbered(file), count, seed)
    else:
        outputs = files.of_prompts(output, prompts, count, seed)
    files.check(outputs, sheet, bundle, may_exist=overwrite or file is not None)
    image, image_sha256 = read_image(start) if start else (None, None)
    with (
        Pipeline.open(bundle, target, threads=threads, device=device, trust=trust, low_memory=low_memory) as pipeline,
        files.folders([*(wanted.file for wanted in outputs), *([sheet] if sheet else [])]),
        bars() as progress,
    ):
        settings = pipeline.settings(
            negative_prompt=negative_prompt,
            guidance_scale=guidance,
            schedule=schedule,
            height=height,
            width=width,
            image=image,
            strength=strength,
        )
        if image and abs(image.width * settings.height / (image.height * settings.width) - 1) > _STRETCH:
            shapes = f"{image.height} x {image.width} to {settings.height} x {settings.width} (height x width)"
            click.echo(f"note: {start} is stretched from {shapes}", err=True)
        click.echo(f"seed {seed}", err=True)
        if file:
            every = len(outputs)
            outputs = files.missing(outputs, pipeline, settings, image_sha256=image_sha256, overwrite=overwrite)
            if there := every - len(outputs):
                click.echo(f"{there} of {every} images are there already, made alike: left as they are", err=True)
        made, labels = [], []
        for wanted, drawn in files.make(
            outputs,
            pipeline,
            settings,
            image_sha256=image_sha256,
            overwrite=overwrite,
            batch_size=batch_size,
            progress=progress,
        ):
            record = {"file": str(wanted.file), "prompt": wanted.request.prompt, "seed": wanted.request.seed}
            echo(json.dumps(record) if as_json else os.fsencode(wanted.file))
            if sheet:
                made.append(drawn)
                labels.append(f"{wanted.request.prompt} ({wanted.request.seed})")
        if sheet:
            files.save_sheet(contact_sheet(made, max(count, 3), labels, least=_CELL), sheet)
