"""``verify`` reads every byte, whatever the record says, and shows what a comparison with PyTorch found."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glance_trt import hashing, verify
from glance_trt.bundle import Bundle
from glance_trt.errors import ParityError
from glance_trt.export.parity import Parity

from ..models import tiny
from .conftest import Run


def test_good_bundle_is_said_to_be_good(run: Run, tiny_bundle: Path) -> None:
    count = len(Bundle.open(tiny_bundle).manifest.files)
    shown = run("verify", tiny_bundle)
    assert (shown.code, shown.out, shown.err) == (0, f"{count} files as listed\n", "")
    assert json.loads(run("verify", tiny_bundle, "--json").out) == {"files": count}


def test_altered_byte_of_a_large_file_is_found_though_the_record_says_unchanged(run: Run, tmp_path: Path) -> None:
    folder = tiny.make_bundle(tmp_path / "bundle", extra={"large.bin": bytes(hashing.ALWAYS_BELOW)})
    bundle = Bundle.open(folder)
    with open(folder / "large.bin", "r+b") as file:
        file.seek(hashing.ALWAYS_BELOW // 2)
        file.write(b"\1")
    status = os.stat(folder / "large.bin")
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    record = tmp_path / "cache" / "glance-trt" / "hashed.json"  # where `run` puts the cache
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({":".join(map(str, identity)): bundle.manifest.files["large.bin"].sha256}))
    record.chmod(0o600)
    assert run("inspect", folder).code == 0
    bundle.check(["large.bin"])  # believes the record
    shown = run("verify", folder)
    assert (shown.code, shown.out) == (6, "")
    assert shown.err == (
        f"error: {folder}/large.bin: altered (its SHA-256 is not the listed one); build the bundle again\n"
    )


USUAL = {"target": None, "device": 0, "trust": False}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the comparison, which needs PyTorch and is not made here."""
    calls: list[Any] = []

    def compare(
        bundle: Bundle, recipe: str, *, prompts: Sequence[str], images: int | None, progress: object, **engines: object
    ) -> verify.Comparison:
        calls.append((bundle.directory, recipe, [*prompts], images, engines))
        if recipe == "wrong.yaml":
            raise ParityError("decoder: differs by 3")
        return verify.Comparison([Parity("denoiser.slow", 1.5e-6, 1e-4), Parity("decoder", 1, 1)], [48.26, 51.0])

    monkeypatch.setattr(verify, "compare", compare)
    return calls


def test_comparison_is_shown(run: Run, tiny_bundle: Path, compared: list[Any]) -> None:
    shown = run("verify", tiny_bundle, "--against", "recipe.yaml")
    assert (shown.code, shown.err) == (0, "")
    assert [" ".join(line.split()) for line in shown.out.splitlines()[1:]] == [
        "denoiser.slow differs by 1.5e-06 of the largest value, at most 0.0001",
        "decoder differs by 1 of 255, at most 1",
        "image 1 48.3 dB from diffusers",
        "image 2 51.0 dB from diffusers",
        "2 images at least 48.3 dB",
    ]
    shown = run("verify", tiny_bundle, "--against", "recipe.yaml", "--images", 0, "--json")
    found = json.loads(shown.out)
    assert found["graphs"] == {"denoiser.slow": 1.5e-6, "decoder": 1}
    assert found["psnr_db"] == [48.26, 51.0]
    assert compared == [(tiny_bundle, "recipe.yaml", [], None, USUAL), (tiny_bundle, "recipe.yaml", [], 0, USUAL)]


def test_prompts_are_the_lines_of_a_file(run: Run, tiny_bundle: Path, compared: list[Any]) -> None:
    Path("prompts.txt").write_text("\ufeffa red circle\r\n\n  ein grünes Quadrat \n", encoding="utf-8")
    options = ("--against", "recipe.yaml", "--prompts", "prompts.txt")
    assert run("verify", tiny_bundle, *options).code == 0
    assert run("verify", tiny_bundle, *options, "--images", 20).code == 0
    prompts = ["a red circle", "ein grünes Quadrat"]
    assert compared == [
        (tiny_bundle, "recipe.yaml", prompts, None, USUAL),
        (tiny_bundle, "recipe.yaml", prompts, 20, USUAL),
    ]


def test_the_engines_to_compare_are_chosen(run: Run, tiny_bundle: Path, compared: list[Any]) -> None:
    options = ("--target", "rtx", "--device", 1, "--trust")
    assert run("verify", tiny_bundle, "--against", "recipe.yaml", *options).code == 0
    assert compared[0][-1] == {"target": "rtx", "device": 1, "trust": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"prompts\.txt: No such file or directory; expected a text file with a prompt per line"),
        (b"\xff\xfe\x00", r"prompts\.txt: not a text in UTF-8; expected a text file .*, and line 1 is none"),
        (b" \n\n", r"prompts\.txt: no prompt in it; expected one per line"),
    ],
    ids=["absent", "binary", "blank"],
)
def test_a_file_without_prompts_is_code_8(
    content: bytes | None, message: str, run: Run, tiny_bundle: Path, compared: list[Any]
) -> None:
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    shown = run("verify", tiny_bundle, "--against", "recipe.yaml", "--prompts", "prompts.txt")
    assert (shown.code, shown.out) == (8, "")
    assert re.fullmatch(f"error: {message}\n", shown.err)
    assert compared == []


@pytest.mark.parametrize("option", [("--prompts", "prompts.txt"), ("--images", 3)])
def test_what_to_compare_needs_something_to_compare_with(
    option: tuple[object, ...], run: Run, tiny_bundle: Path
) -> None:
    shown = run("verify", tiny_bundle, *option)
    assert (shown.code, shown.out) == (2, "")
    assert "--prompts, --images, --target and --trust say what to compare; add --against RECIPE" in shown.err


def test_difference_from_pytorch_is_code_10(run: Run, tiny_bundle: Path, compared: list[Any]) -> None:
    shown = run("verify", tiny_bundle, "--against", "wrong.yaml")
    assert (shown.code, shown.out, shown.err) == (10, "", "error: decoder: differs by 3\n")
    assert compared


def test_damaged_bundle_is_not_compared(run: Run, tmp_path: Path, compared: list[Any]) -> None:
    folder = tiny.make_bundle(tmp_path / "bundle", extra={"unused.bin": b"0"})
    (folder / "unused.bin").write_bytes(b"1")
    assert run("verify", folder, "--against", "recipe.yaml").code == 6
    assert compared == []


def test_psnr_is_that_of_its_definition() -> None:
    black, other = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert verify.psnr(black, black) == 99
    assert verify.psnr(black, other) == 0
    assert verify.psnr(other, black) == 0  # no wrap around
    assert verify.psnr(black, black + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)  # 20 log10 255
