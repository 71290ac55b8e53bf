"""Images on disk: PNG files that say how they were made, and sheets of several images."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from glance_trt import strict
from glance_trt.errors import InputError, OutputError
from glance_trt.hashing import sha256_of_bytes

_RECORD = "glance-trt"  # keyword of the PNG text chunk with the JSON record
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LINE_HEIGHT = 14  # pixels, of a label
_LABEL_LINES = 3
_GAP = 4  # pixels


@dataclass(frozen=True)
class GenerationParameters:
    """All that is needed to make an image again.

    Attributes:
        prompt, negative_prompt: as the user wrote them; the negative one is '' if there was none.
        seed: of this image, not of its batch.
        steps: denoising steps, all phases together.
        guidance_scale: 1 is no guidance.
        schedule, target: names in the bundle.
        width, height: pixels.
        strength, image_sha256: of an image that it was made from, how much of the schedule ran, and the SHA-256 of its
            file; None for one that was made from text alone.
        bundle: the bundle's name.
        bundle_sha256: 64 hexadecimal digits, of its `bundle.json`.
        version: of glance-trt.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    schedule: str
    target: str
    width: int
    height: int
    bundle: str
    bundle_sha256: str
    version: str
    strength: float | None = None
    image_sha256: str | None = None


def save_png(
    path: str | os.PathLike[str],
    image: Image.Image | NDArray[np.uint8],
    parameters: GenerationParameters,
    *,
    overwrite: bool = False,
) -> None:
    """Write an image with two text chunks: `parameters`, as AUTOMATIC1111 writes it, and a JSON record of every field.

    The file appears whole or not at all: it is written under another name in the same folder, then renamed. Without
    `overwrite`, a file that another process creates meanwhile is not touched either.

    Args:
        path: of the PNG file; its folder exists.
        image: [H, W, 3] uint8, RGB, or a PIL image.

    Raises:
        InputError: `image` has another shape or dtype, or a field of `parameters` another type.
        OutputError: the file exists and `overwrite` is False, or it cannot be written; then nothing is left behind.
    """
    record = strict.write(parameters)
    try:
        strict.read(GenerationParameters, record)  # what could not be read back is not written
    except strict.Mismatch as error:
        raise InputError(f"parameters.{error}") from error
    text = PngInfo()
    text.add_text("parameters", _infotext(parameters))  # as iTXt where it is not Latin-1
    text.add_text(_RECORD, json.dumps(record))
    encoded = io.BytesIO()
    as_image(image).save(encoded, format="PNG", pnginfo=text)
    try:
        _write_whole(Path(path), encoded.getbuffer(), overwrite)
    except FileExistsError as error:
        raise OutputError(f"{os.fspath(path)} exists; give --overwrite or another -o") from error
    except OSError as error:
        remedy = "free some space" if error.errno in _NO_SPACE else "check that its folder exists and may be written"
        raise OutputError(
            f"{os.fspath(path)}: cannot be written: {error.strerror}; {remedy}, or give another -o"
        ) from error


def read_parameters(path: str | os.PathLike[str]) -> GenerationParameters:
    """Read back the record of a PNG file that `save_png` wrote; the pixels are not decoded.

    Raises:
        InputError: the file cannot be read, is no PNG, or has no record, or a malformed one.
    """
    name = os.fspath(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = image.info.get(_RECORD)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: cannot be read as PNG: {error}") from error
    if record is None:
        raise InputError(f"{name}: no {_RECORD} record; glance-trt did not write this file, or a tool removed its text")
    try:
        return strict.read(GenerationParameters, json.loads(record))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: malformed {_RECORD} record: {error}") from error


def read_image(path: str | os.PathLike[str]) -> tuple[Image.Image, str]:
    """An image to start from, upright: turned as its EXIF data says, as `diffusers.utils.load_image` does.

    Returns:
        An RGB image, and the SHA-256 of its file.

    Raises:
        InputError: the file cannot be read, or is none of PNG, JPEG, WebP, BMP and TIFF.
    """
    try:
        data = Path(path).read_bytes()
        # Of PIL's formats those that are usual: others start programs (EPS) or have been little looked at.
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP", "BMP", "TIFF"]) as image:
            return ImageOps.exif_transpose(image).convert("RGB"), sha256_of_bytes(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{os.fspath(path)}: cannot be read as an image: {reason}") from error


def contact_sheet(
    images: Sequence[Image.Image | NDArray[np.uint8]],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    least: int = 1,
) -> Image.Image:
    """Lay images out on a white sheet, row by row, each with its label below.

    Args:
        images: PIL images or [H, W, 3] uint8 arrays, at least one; cells are as large as the largest.
        columns: images in a row, at least 1.
        labels: up to three lines for each image, then shortened; without them the sheet has no room for text.
        least: pixels of width; where all images are narrower, each becomes a whole number of times as large.

    Raises:
        InputError: no images, no columns, an array of another shape or dtype, or labels of another number than images.
    """
    if not images or columns < 1:
        raise InputError(f"contact sheet: got {len(images)} images in {columns} columns; both must be at least 1")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"contact sheet: got {len(labels)} labels for {len(images)} images; each needs one")
    pictures = [as_image(image) for image in images]
    times = -(-least // max(picture.width for picture in pictures))
    pictures = [picture.resize((picture.width * times, picture.height * times), 0) for picture in pictures]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_width = max(picture.width for picture in pictures)
    font = ImageFont.load_default(size=12)
    texts = [_lines(label, cell_width, font) for label in labels or ()]
    label_height = _LINE_HEIGHT * max(map(len, texts)) + 2 if texts else 0
    cell_height = max(picture.height for picture in pictures) + label_height
    size = (columns * (cell_width + _GAP) + _GAP, rows * (cell_height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x = _GAP + i % columns * (cell_width + _GAP)
        y = _GAP + i // columns * (cell_height + _GAP)
        sheet.paste(picture, (x, y))
        for j, line in enumerate(texts[i] if texts else ()):
            draw.text((x, y + cell_height - label_height + j * _LINE_HEIGHT), line, fill="black", font=font)
    return sheet


def as_image(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    """An RGB image of PIL, from one of any mode or from [H, W, 3] uint8. Raises `InputError`."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, np.ndarray):
        raise InputError(f"image: got {type(image).__name__}; expected one of PIL, or an array uint8 [H, W, 3]")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"image: got {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3]")
    return Image.fromarray(image)


def _infotext(parameters: GenerationParameters) -> str:
    """The text that AUTOMATIC1111 parses: the prompt, the negative prompt if there is one, a line of fields."""
    fields = {
        "Steps": parameters.steps,
        "Sampler": parameters.schedule,
        "CFG scale": f"{parameters.guidance_scale:g}",
        "Seed": parameters.seed,
        "Size": f"{parameters.width}x{parameters.height}",
        **({} if parameters.strength is None else {"Denoising strength": f"{parameters.strength:g}"}),
        "Model hash": parameters.bundle_sha256[:10],
        "Model": parameters.bundle,
        "RNG": "CPU",  # its absence would mean that the seed is one of CUDA's generator
        "Version": f"glance-trt {parameters.version}",
    }
    lines = [parameters.prompt]
    if parameters.negative_prompt:
        lines.append(f"Negative prompt: {parameters.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quote(str(value))}" for name, value in fields.items()))
    return "\n".join(lines).strip().replace("\0", " ")  # PNG text cannot hold NUL; in the JSON record it is escaped


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",\n:") else value


def _write_whole(path: Path, data: memoryview, overwrite: bool) -> None:
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_new(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone already where it was renamed


def _rename_new(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path`, or raise FileExistsError: unlike a rename, a link never replaces a file."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with open(path, "xb"):  # FAT and some network file systems have no links: claim the name, then fill it
            pass
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise


def _lines(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """A label in lines that fit, at least one; words that find no room any more become dots."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) <= width and font.getlength(longer) <= width:  # a glyph is a pixel wide at least
            lines[-1] = longer
        elif lines[-1] and len(lines) < _LABEL_LINES:
            lines.append(_shorten(word, width, font))
        else:
            lines[-1] = _shorten(f"{longer}...", width, font)
            break
    return lines


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or its start and dots."""
    if len(text) <= width and font.getlength(text) <= width:
        return text
    kept = text[:width]  # measuring a whole long prompt is slow
    while kept and font.getlength(kept + "...") > width:
        kept = kept[:-1]
    return kept + "..."
