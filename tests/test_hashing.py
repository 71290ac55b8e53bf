"""Hashes against hashlib, and a record that saves reading and is never trusted too far.

Whether a large file was read is seen by planting a false hash in the record: it is returned where the record is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from glance_trt import hashing, records
from glance_trt.errors import BundleError

FALSE = "f" * 64


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record's path, in a cache folder of the test's own; files count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "_SETTLED_NS", -(10**9))
    return tmp_path / "cache" / "glance-trt" / "hashed.json"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(hashing.ALWAYS_BELOW))
    return path


def true_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plant_false_hash(record: Path) -> None:
    entries = json.loads(record.read_text())
    record.write_text(json.dumps(dict.fromkeys(entries, FALSE)))


def test_sha256_is_that_of_hashlib(tmp_path: Path, large: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"abc")
    # FIPS 180-4, example of one block
    assert hashing.sha256_of_file(small) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hashing.sha256_of_bytes(b"abc") == hashing.sha256_of_file(small)
    assert hashing.sha256_of_file(large) == true_hash(large)


def test_a_large_file_is_not_read_again(large: Path, record: Path) -> None:
    hashing.sha256_of_file(large)
    plant_false_hash(record)
    assert hashing.sha256_of_file(large) == FALSE


def test_a_small_file_is_read_every_time(tmp_path: Path, record: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"a" * (hashing.ALWAYS_BELOW - 1))
    hashing.sha256_of_file(small)
    assert not record.exists()


def test_without_the_record_a_large_file_is_read_and_the_record_mended(large: Path, record: Path) -> None:
    hashing.sha256_of_file(large)
    plant_false_hash(record)
    assert hashing.sha256_of_file(large, use_record=False) == true_hash(large)
    assert hashing.sha256_of_file(large) == true_hash(large)


def _alter_and_restore_the_mtime(path: Path) -> None:
    before = path.stat()
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _replace_by_a_copy(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [_alter_and_restore_the_mtime, _append, _replace_by_a_copy, _touch])
def test_a_changed_file_is_read_again(large: Path, record: Path, change: Callable[[Path], None]) -> None:
    hashing.sha256_of_file(large)
    plant_false_hash(record)
    time.sleep(0.02)  # more than a tick of the file system's clock
    change(large)
    assert hashing.sha256_of_file(large) == true_hash(large)


def test_a_file_that_has_just_changed_is_not_recorded(
    large: Path, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(record.parent.parent))
    hashing.sha256_of_file(large)
    assert not record.exists()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3_000_000_000)
    hashing.sha256_of_file(large)
    assert record.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not JSON", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b"{}" + b" " * (2 << 20), b'{"a": 1, "b": [2]}'],
    ids=lambda content: repr(content[:8]),
)
def test_a_damaged_record_only_costs_time(large: Path, record: Path, content: bytes) -> None:
    record.parent.mkdir(parents=True)
    record.write_bytes(content)
    record.chmod(0o600)
    assert hashing.sha256_of_file(large) == true_hash(large)
    plant_false_hash(record)  # it was written anew
    assert hashing.sha256_of_file(large) == FALSE


@pytest.mark.parametrize("value", [1, None, "", "ff", [FALSE]], ids=repr)
def test_an_entry_that_is_no_hash_is_not_used(large: Path, record: Path, value: object) -> None:
    hashing.sha256_of_file(large)
    record.write_text(json.dumps(dict.fromkeys(json.loads(record.read_text()), value)))
    assert hashing.sha256_of_file(large) == true_hash(large)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_record_that_is_no_file_only_costs_time(large: Path, record: Path, make: Callable[[Path], object]) -> None:
    record.parent.mkdir(parents=True)
    make(record)
    assert hashing.sha256_of_file(large) == true_hash(large)


def test_a_cache_folder_that_cannot_be_made_only_costs_time(tmp_path: Path, large: Path) -> None:
    (tmp_path / "cache").write_bytes(b"in the way")
    assert hashing.sha256_of_file(large) == true_hash(large)


def test_a_record_that_cannot_be_replaced_leaves_no_draft(large: Path, record: Path) -> None:
    record.mkdir(parents=True)
    hashing.sha256_of_file(large)
    assert list(record.parent.iterdir()) == [record]


def test_the_record_is_the_users_own(large: Path, record: Path) -> None:
    hashing.sha256_of_file(large)
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert stat.S_IMODE(record.parent.stat().st_mode) == 0o700
    assert list(record.parent.iterdir()) == [record]


def test_a_record_of_another_user_is_not_used(large: Path, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashing.sha256_of_file(large)
    plant_false_hash(record)
    owner = record.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert hashing.sha256_of_file(large) == true_hash(large)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_record_that_others_may_write_is_not_used(large: Path, record: Path, mode: int) -> None:
    hashing.sha256_of_file(large)
    plant_false_hash(record)
    record.chmod(mode)
    assert hashing.sha256_of_file(large) == true_hash(large)


def test_the_record_forgets_its_oldest_entries(large: Path, record: Path) -> None:
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({str(i): FALSE for i in range(1000)}))
    record.chmod(0o600)
    hashing.sha256_of_file(large)
    entries = json.loads(record.read_text())
    assert len(entries) == 1000
    assert "0" not in entries
    assert "1" in entries
    assert true_hash(large) in entries.values()


def test_the_cache_folder_honours_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records.folder() == tmp_path / "cache" / "glance-trt"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert records.folder().is_relative_to(tmp_path)
        assert records.folder().name == "glance-trt"


def test_a_user_without_a_home_only_loses_time(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(FileNotFoundError, match="no home folder; set XDG_CACHE_HOME"):
        records.folder()
    assert hashing.sha256_of_file(large) == true_hash(large)


def test_a_file_of_another_size_is_not_read(large: Path) -> None:
    text = f"{large}: {hashing.ALWAYS_BELOW} bytes, expected 5; build the bundle again"
    with pytest.raises(BundleError, match=re.escape(text)):
        hashing.sha256_of_file(large, size=5)


def test_a_file_that_keeps_growing_is_given_up(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Appends:
        def update(self, block: bytes) -> None:
            if large.stat().st_size < 2 * hashing.ALWAYS_BELOW:
                with large.open("ab") as file:
                    file.write(block)

        def hexdigest(self) -> str:
            return FALSE

    monkeypatch.setattr(hashlib, "sha256", Appends)
    with pytest.raises(BundleError, match=re.escape(f"{large}: grew while it was read")):
        hashing.sha256_of_file(large)


def test_links_are_followed_only_if_asked(tmp_path: Path, large: Path) -> None:
    (tmp_path / "link").symlink_to(large)
    assert hashing.sha256_of_file(tmp_path / "link") == true_hash(large)
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'link'}: not a regular file")):
        hashing.sha256_of_file(tmp_path / "link", follow_links=False)


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("follow_links", [True, False])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, _link_to_itself])
def test_only_regular_files_are_hashed(tmp_path: Path, make: Callable[[Path], object], follow_links: bool) -> None:
    make(tmp_path / "x")
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'x'}: not a regular file; links and folders")):
        hashing.sha256_of_file(tmp_path / "x", follow_links=follow_links)


def test_a_device_is_not_read_even_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=r"^/dev/zero: not a regular file"):
        hashing.sha256_of_file(tmp_path / "link")


def test_what_becomes_a_pipe_before_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "regular").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    looks = (tmp_path / "regular").lstat()
    monkeypatch.setattr(os, "lstat", lambda _path: looks)
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'pipe'}: not a regular file")):
        hashing.open_regular(tmp_path / "pipe")


def test_what_becomes_a_link_before_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "regular").write_bytes(b"")
    (tmp_path / "link").symlink_to("regular")
    looks = (tmp_path / "regular").lstat()
    monkeypatch.setattr(os, "lstat", lambda _path: looks)
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'link'}: Too many levels of symbolic links")):
        hashing.open_regular(tmp_path / "link")


def test_a_missing_file_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'no'}: No such file or directory")):
        hashing.sha256_of_file(tmp_path / "no")
