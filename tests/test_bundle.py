"""Opening and checking bundles. What is done with bad ones is in ``hostile/``."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

import glance_trt
from glance_trt import bundle, hashing, manifest
from glance_trt.bundle import Bundle
from glance_trt.errors import BundleError

from .hostile import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.make_bundle(tmp_path / "tiny.bundle")


def test_open_reads_the_manifest(folder: Path) -> None:
    opened = glance_trt.Bundle.open(str(folder))
    assert opened.directory == folder
    assert opened.manifest == manifest.load(json.dumps(tiny.manifest()))
    assert opened.sha256 == hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()


def test_open_reads_no_file_but_the_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: read.append(path) or real(path, *rest))
    Bundle.open(folder)
    assert read == [folder / "bundle.json"]


def test_a_bundle_may_be_opened_through_a_link_to_its_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(tmp_path / "link").verify()


def test_check_reports_its_progress_in_bytes(folder: Path) -> None:
    opened = Bundle.open(folder)
    names = ["decoder.onnx", "tokenizer.json", "decoder.onnx"]
    sizes = [len(tiny.content(name)) for name in names]
    calls: list[tuple[str, float, float]] = []
    opened.check(names, progress=lambda *call: calls.append(call))
    total = sizes[0] + sizes[1]
    assert calls == [("check", 0, total), ("check", sizes[0], total), ("check", total, total)]


def test_verify_hashes_every_file(folder: Path) -> None:
    for name in tiny.manifest()["files"]:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-2] + b"!\n")
        with pytest.raises(
            BundleError, match=re.escape(f"{folder / name}: altered (its SHA-256 is not the listed one)")
        ):
            Bundle.open(folder).verify()
        (folder / name).write_bytes(good)
    Bundle.open(folder).verify()


def test_check_reads_only_what_it_is_asked(folder: Path) -> None:
    (folder / "decoder.onnx").write_bytes(b"x" * len(tiny.content("decoder.onnx")))
    Bundle.open(folder).check(["tokenizer.json"])


def test_check_trusts_the_record_and_verify_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "ALWAYS_BELOW", 1)
    monkeypatch.setattr(hashing, "_SETTLED_NS", -(10**9))
    opened = Bundle.open(folder)
    opened.verify()
    record = tmp_path / "cache" / "glance-trt" / "hashed.json"
    record.write_text(record.read_text().replace(opened.manifest.files["decoder.onnx"].sha256, "0" * 64))
    with pytest.raises(BundleError, match=r"decoder\.onnx: altered"):
        opened.check(["decoder.onnx"])
    opened.verify()


def test_an_altered_large_file_is_noticed_though_its_size_and_mtime_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "ALWAYS_BELOW", 1)
    opened = Bundle.open(folder)
    opened.check(["decoder.onnx"])
    path = opened.path("decoder.onnx")
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=r"decoder\.onnx: altered"):
        opened.check(["decoder.onnx"])


def test_path_is_that_of_a_listed_file_only(folder: Path) -> None:
    opened = Bundle.open(folder)
    assert opened.path("decoder.onnx") == folder / "decoder.onnx"
    for name in ("bundle.json", "../outside", "/etc/passwd", ""):
        with pytest.raises(BundleError, match=re.escape(f"{folder}: {name!r} is not listed in bundle.json")):
            opened.path(name)
        with pytest.raises(BundleError, match=r"is not listed in bundle\.json"):
            opened.check([name])


@pytest.mark.parametrize("name", ["no", "a\0b", "x" * 5000])
def test_a_folder_that_does_not_exist_is_a_bundle_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="no such folder; a bundle is made with: glance-trt build RECIPE -o"):
        Bundle.open(tmp_path / name)


def test_a_file_is_no_bundle(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json: a file; a bundle is a folder"):
        Bundle.open(folder / "bundle.json")


def test_the_parts_of_the_manifest_are_names_of_the_module_bundle() -> None:
    assert bundle.load(json.dumps(tiny.manifest())).graphs["decoder"].outputs[0] == bundle.Port(
        "images", "uint8", ("batch", 64, 64, 3)
    )
    assert all(hasattr(bundle, name) for name in bundle.__all__)
