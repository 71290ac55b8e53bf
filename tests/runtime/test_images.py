"""PNG files appear whole or not at all, carry what made them, and never replace a file unasked."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import resource
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from glance_trt.errors import InputError, OutputError
from glance_trt.runtime.images import GenerationParameters, contact_sheet, read_image, read_parameters, save_png

PARAMETERS = GenerationParameters(
    prompt="a large red circle, left of a small blue star",
    negative_prompt="blurry",
    seed=7,
    steps=10,
    guidance_scale=4.0,
    schedule="glance",
    target="cpu",
    width=64,
    height=48,
    bundle="shapes",
    bundle_sha256="0123456789abcdef" * 4,
    version="1.2",
)

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG file by its specification (W3C PNG, section 5), checksums verified."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        found.append((kind, body))
        at += 12 + length
    return found


def text_of(path: Path, keyword: str) -> str:
    with Image.open(path) as image:
        return str(image.info[keyword])


# What is in the file


def test_pixels_come_back_exactly(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", IMAGE, PARAMETERS)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 48))
        np.testing.assert_array_equal(np.asarray(image), IMAGE)


def test_a_pil_image_is_saved_like_its_array(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", IMAGE, PARAMETERS)
    save_png(tmp_path / "b.png", Image.fromarray(IMAGE), PARAMETERS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_parameters_text_follows_the_automatic1111_convention(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", IMAGE, PARAMETERS)
    assert text_of(tmp_path / "a.png", "parameters") == (
        "a large red circle, left of a small blue star\n"
        "Negative prompt: blurry\n"
        "Steps: 10, Sampler: glance, CFG scale: 4, Seed: 7, Size: 64x48, Model hash: 0123456789, Model: shapes, "
        "RNG: CPU, Version: glance-trt 1.2"
    )


def test_parameters_text_has_no_negative_prompt_line_without_one(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", IMAGE, replace(PARAMETERS, negative_prompt="", guidance_scale=7.5))
    first, second = text_of(tmp_path / "a.png", "parameters").split("\n")
    assert first == PARAMETERS.prompt
    assert second.startswith("Steps: 10, Sampler: glance, CFG scale: 7.5, ")


def test_the_field_line_is_read_by_the_pattern_of_automatic1111_and_quotes_what_would_split(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", IMAGE, replace(PARAMETERS, schedule='two, "odd": names', bundle="a:b"))
    line = text_of(tmp_path / "a.png", "parameters").split("\n")[-1]
    # a name, a colon, then a quoted JSON string or anything up to the next comma
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
    fields = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert list(fields) == ["Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "RNG", "Version"]
    assert fields["Sampler"] == 'two, "odd": names'
    assert fields["Model"] == "a:b"
    assert fields["Version"] == "glance-trt 1.2"


def test_the_json_record_holds_every_field(tmp_path: Path) -> None:
    from_image = replace(PARAMETERS, strength=0.75, image_sha256="f" * 64)
    save_png(tmp_path / "a.png", IMAGE, from_image)
    assert json.loads(text_of(tmp_path / "a.png", "glance-trt")) == asdict(from_image)
    assert read_parameters(tmp_path / "a.png") == from_image
    save_png(tmp_path / "b.png", IMAGE, PARAMETERS)
    given = {name: value for name, value in asdict(PARAMETERS).items() if value is not None}
    assert json.loads(text_of(tmp_path / "b.png", "glance-trt")) == given
    assert read_parameters(tmp_path / "b.png") == PARAMETERS


def test_strength_is_automatic1111_s_denoising_strength(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", IMAGE, replace(PARAMETERS, strength=0.75, image_sha256="f" * 64))
    assert "Size: 64x48, Denoising strength: 0.75, Model hash: " in text_of(tmp_path / "a.png", "parameters")


def test_latin1_text_is_a_text_chunk_and_other_text_an_international_one(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", IMAGE, replace(PARAMETERS, prompt="café"))
    save_png(tmp_path / "b.png", IMAGE, replace(PARAMETERS, prompt="星 🔥"))
    latin = [body for kind, body in chunks(tmp_path / "a.png") if kind == b"tEXt"]
    assert [body.split(b"\0")[0] for body in latin] == [b"parameters", b"glance-trt"]
    assert latin[0].split(b"\0")[1].decode("latin-1").startswith("café\n")
    (other,) = (body for kind, body in chunks(tmp_path / "b.png") if kind == b"iTXt")
    assert other.startswith(b"parameters\0\0\0\0\0" + "星 🔥\n".encode())


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "two\nlines",
        "nul \0 mark",
        "Negative prompt: no\nSteps: 1",
        "星 🔥 e\u0301",
        "x" * 10**6,
    ],
)
def test_read_parameters_gives_back_what_was_saved(tmp_path: Path, prompt: str) -> None:
    saved = replace(PARAMETERS, prompt=prompt, negative_prompt=prompt, seed=2**64 - 1, guidance_scale=0.1 + 0.2)
    save_png(tmp_path / "a.png", IMAGE, saved)
    assert read_parameters(tmp_path / "a.png") == saved
    assert all(body.count(b"\0") == 1 for kind, body in chunks(tmp_path / "a.png") if kind == b"tEXt")


def test_parameters_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PARAMETERS.seed = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (IMAGE.astype(np.float32), r"float32 \[48, 64, 3\]"),
        (IMAGE[..., 0], r"uint8 \[48, 64\]"),
        (IMAGE[None], r"uint8 \[1, 48, 64, 3\]"),
        (IMAGE[:0], r"uint8 \[0, 64, 3\]"),
    ],
)
def test_an_array_that_is_no_image_is_refused(tmp_path: Path, image: NDArray[np.uint8], text: str) -> None:
    with pytest.raises(InputError, match=rf"^image: got {text}; expected uint8 \[H, W, 3\]$"):
        save_png(tmp_path / "a.png", image, PARAMETERS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("seed", "7", r"expected a whole number, got text \('7'\)"),
        ("guidance_scale", float("nan"), "expected a finite number, got nan"),
        ("prompt", "lone \ud800 surrogate", ".* is not valid Unicode"),
    ],
)
def test_parameters_that_could_not_be_read_back_are_refused(
    tmp_path: Path, field: str, value: object, text: str
) -> None:
    with pytest.raises(InputError, match=f"^parameters.{field}: {text}$"):
        save_png(tmp_path / "a.png", IMAGE, replace(PARAMETERS, **{field: value}))
    assert list(tmp_path.iterdir()) == []


# Reading files that others wrote


def png_with(record: str | None) -> bytes:
    text, file = PngInfo(), io.BytesIO()
    if record is not None:
        text.add_text("glance-trt", record)
    Image.fromarray(IMAGE).save(file, format="PNG", pnginfo=text)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", r"cannot be read as PNG: "),
        (b"GIF89a", r"cannot be read as PNG: "),
        (png_with(None)[:60], r"cannot be read as PNG: |no glance-trt record"),
        (png_with(None), r"no glance-trt record; glance-trt did not write this file, or a tool removed its text"),
        (png_with("{"), r"malformed glance-trt record: Expecting"),
        (png_with("[" * 100_000), r"malformed glance-trt record: "),
        (png_with("[]"), r"malformed glance-trt record: expected keys and values, got a list"),
        (
            png_with(json.dumps({**asdict(PARAMETERS), "sead": 1})),
            r"malformed glance-trt record: sead: unknown key; did you mean 'seed'\?",
        ),
        (
            png_with(json.dumps({**asdict(PARAMETERS), "seed": "7"})),
            r"malformed glance-trt record: seed: expected a whole number, got text",
        ),
        (png_with(json.dumps({"prompt": "a"})), r"malformed glance-trt record: negative_prompt: missing"),
    ],
)
def test_a_file_without_a_sound_record_is_refused_by_name(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.png: ({text})"):
        read_parameters(tmp_path / "x.png")


def test_a_compressed_text_that_expands_without_bound_is_refused(tmp_path: Path) -> None:
    body = b"glance-trt\0\0" + zlib.compress(b" " * 10**7)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    plain = png_with(None)
    (tmp_path / "x.png").write_bytes(plain[:33] + chunk + plain[33:])
    with pytest.raises(InputError, match=r"x\.png: cannot be read as PNG: "):
        read_parameters(tmp_path / "x.png")


def test_a_missing_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png: cannot be read as PNG: .*No such file"):
        read_parameters(tmp_path / "none.png")


# Writing


def test_an_existing_file_is_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/a.png").write_text("mine")
    with pytest.raises(OutputError, match=r"^out/a\.png exists; give --overwrite or another -o$"):
        save_png("out/a.png", IMAGE, PARAMETERS)
    assert Path("out/a.png").read_text() == "mine"
    assert os.listdir("out") == ["a.png"]


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(OutputError, match="exists; give --overwrite"):
        save_png(tmp_path / "a.png", IMAGE, PARAMETERS)
    assert not (tmp_path / "elsewhere.png").exists()


def test_overwrite_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("old")
    save_png(tmp_path / "a.png", IMAGE, PARAMETERS, overwrite=True)
    assert read_parameters(tmp_path / "a.png") == PARAMETERS
    assert os.listdir(tmp_path) == ["a.png"]


def no_hard_links(source: Path, destination: Path) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("link", [os.link, no_hard_links], ids=["hard links", "no hard links"])
def test_one_of_many_writers_wins_and_the_file_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: Callable[[Path, Path], None]
) -> None:
    monkeypatch.setattr(os, "link", link)
    path, barrier = tmp_path / "a.png", threading.Barrier(8)
    won: list[int] = []
    refusals: list[str] = []

    def write(seed: int) -> None:
        barrier.wait()
        try:
            save_png(path, IMAGE, replace(PARAMETERS, seed=seed))
            won.append(seed)
        except OutputError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [read_parameters(path).seed]
    assert refusals == [f"{path} exists; give --overwrite or another -o"] * 7
    assert os.listdir(tmp_path) == ["a.png"]


def test_the_file_has_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        save_png(tmp_path / "a.png", IMAGE, PARAMETERS)
    finally:
        os.umask(previous)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_the_system_cuts_short_is_removed(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "old.png").write_text("old")
    path = tmp_path / ("old.png" if overwrite else "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the image has 9 KB: the write really fails half way
    try:
        with pytest.raises(OutputError, match=r"\.png: cannot be written: File too large; free some space, or give"):
            save_png(path, IMAGE, PARAMETERS, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_text() == "old"


@pytest.mark.parametrize(("call", "overwrite"), [("link", False), ("replace", True)])
def test_a_full_disk_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, overwrite: bool
) -> None:
    def full(source: Path, destination: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    text = r"a\.png: cannot be written: No space left on device; free some space, or give another -o$"
    with pytest.raises(OutputError, match=text):
        save_png(tmp_path / "a.png", IMAGE, PARAMETERS, overwrite=overwrite)
    assert os.listdir(tmp_path) == []


def test_without_hard_links_a_failed_rename_gives_the_name_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, destination: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", no_hard_links)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(tmp_path / "a.png", IMAGE, PARAMETERS)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    text = r"none/a\.png: cannot be written: No such file or directory; check that its folder exists and may be written"
    with pytest.raises(OutputError, match=text):
        save_png(tmp_path / "none/a.png", IMAGE, PARAMETERS)


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png: cannot be written: Is a directory; "):
        save_png(tmp_path / "a.png", IMAGE, PARAMETERS, overwrite=True)
    assert os.listdir(tmp_path) == ["a.png"]


# Contact sheets


def plain(colour: tuple[int, int, int], width: int = 20, height: int = 10) -> NDArray[np.uint8]:
    return np.full((height, width, 3), colour, np.uint8)


def test_contact_sheet_places_images_row_by_row() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 100, 50)]
    sheet = np.asarray(contact_sheet([plain(colour) for colour in colours], columns=2))
    assert sheet.shape == (3 * 14 + 4, 2 * 24 + 4, 3)
    for i, colour in enumerate(colours):
        y, x = 4 + i // 2 * 14, 4 + i % 2 * 24
        assert (sheet[y : y + 10, x : x + 20] == colour).all()
    white = (sheet == 255).all(axis=2).sum()
    assert white == sheet.shape[0] * sheet.shape[1] - 5 * 200


def test_contact_sheet_is_no_wider_than_its_images() -> None:
    assert contact_sheet([plain((0, 0, 0)), plain((0, 0, 0))], columns=9).size == (2 * 24 + 4, 14 + 4)


def test_contact_sheet_takes_pil_images_of_different_sizes() -> None:
    wide, tall = Image.fromarray(plain((1, 2, 3), 30, 5)), plain((4, 5, 6), 8, 25)
    sheet = np.asarray(contact_sheet([wide, tall], columns=2))
    assert sheet.shape == (25 + 8, 2 * 34 + 4, 3)
    assert (sheet[4:9, 4:34] == (1, 2, 3)).all()
    assert (sheet[4:29, 38:46] == (4, 5, 6)).all()


def test_contact_sheet_labels_stay_within_their_cells() -> None:
    images = [plain((0, 0, 255), 60, 20), plain((0, 0, 255), 60, 20)]
    labels = ["a prompt that is far too long for its cell\nand has two lines 星", ""]
    sheet = np.asarray(contact_sheet(images, 2, labels))
    assert sheet.shape == (20 + 44 + 8, 2 * 64 + 4, 3)
    assert (sheet[4:24, 4:64] == (0, 0, 255)).all()
    for line in range(3):
        assert (sheet[24 + 14 * line : 38 + 14 * line, 4:64] < 128).all(axis=2).any()
    assert (sheet[24:68, 66:] == 255).all()
    assert (sheet[68:] == 255).all()


def test_contact_sheet_has_as_many_lines_as_its_labels() -> None:
    images = [plain((0, 0, 255), 60, 20)]
    assert contact_sheet(images, 1, ["a star"]).size == (60 + 8, 20 + 16 + 8)
    assert contact_sheet(images, 1, ["a star and a circle"]).size == (60 + 8, 20 + 30 + 8)


def test_contact_sheet_of_small_images_enlarges_them_pixel_for_pixel() -> None:
    image = np.random.default_rng(0).integers(0, 255, (10, 20, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([image], 1, least=50))
    assert (sheet[4:-4, 4:-4] == image.repeat(3, axis=0).repeat(3, axis=1)).all()
    assert contact_sheet([image], 1, least=20).size == (28, 18)


@pytest.mark.parametrize(
    ("images", "columns", "labels", "text"),
    [
        ([], 1, None, "got 0 images in 1 columns; both must be at least 1"),
        ([IMAGE], 0, None, "got 1 images in 0 columns; both must be at least 1"),
        ([IMAGE], 1, ["a", "b"], "got 2 labels for 1 images; each needs one"),
    ],
)
def test_contact_sheet_refuses_what_makes_no_sheet(
    images: list[NDArray[np.uint8]], columns: int, labels: list[str] | None, text: str
) -> None:
    with pytest.raises(InputError, match=f"^contact sheet: {text}$"):
        contact_sheet(images, columns, labels)


# Images to start from


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_an_image_to_start_from_is_that_of_diffusers_load_image(
    tmp_path: Path, suffix: str, orientation: int | None
) -> None:
    from diffusers.utils import load_image

    file = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    if orientation and suffix != "bmp":
        exif[0x0112] = orientation
    Image.fromarray(IMAGE).save(file, exif=exif)
    found, sha256 = read_image(file)
    assert found.mode == "RGB"
    assert found.size == ((48, 64) if orientation == 6 and suffix != "bmp" else (64, 48))
    assert found.tobytes() == load_image(str(file)).tobytes()
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "CMYK"])
def test_an_image_of_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    from diffusers.utils import load_image

    file = tmp_path / "a.tiff"
    Image.fromarray(IMAGE).convert(mode).save(file)
    assert read_image(file)[0].tobytes() == load_image(str(file)).tobytes()


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "a.gif")
    Image.fromarray(IMAGE).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 3000)
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "empty.png").touch()
    for name, reason in {
        "none.png": "No such file or directory",
        "a.gif": "cannot identify image file",
        "a.eps": "cannot identify image file",
        "empty.png": "cannot identify image file",
        "cut.png": "image file is truncated",
    }.items():
        with pytest.raises(InputError, match=rf"{name}: cannot be read as an image: {reason}"):
            read_image(tmp_path / name)
