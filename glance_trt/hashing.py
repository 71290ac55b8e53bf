"""SHA-256 of files, with a record of large files already hashed, so that opening a bundle does not read it twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from glance_trt.errors import BundleError

ALWAYS_BELOW = 4 << 20
"""Files smaller than this (bytes) are hashed every time: it takes two milliseconds, and needs no record."""

_IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
_RECORD_ENTRIES = 1000
_RECORD_LIMIT = 1 << 20

# A file that changes twice within one tick of its file system's clock keeps its times, so a file this young is not
# recorded. The coarsest clock in use is FAT's.
_SETTLED_NS = 2_000_000_000


def cache_folder() -> Path:
    """This user's cache folder: ``$XDG_CACHE_HOME/glance-trt``, or the platform's usual place.

    Raises `FileNotFoundError` for a user without a home folder.
    """
    if os.path.isabs(os.environ.get("XDG_CACHE_HOME", "")):  # the XDG specification has relative paths ignored
        return Path(os.environ["XDG_CACHE_HOME"]) / "glance-trt"
    try:
        home = Path.home()
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder; set XDG_CACHE_HOME") from None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home)) / "glance-trt" / "cache"
    return home / (("Library/Caches" if sys.platform == "darwin" else ".cache") + "/glance-trt")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, bytes. A link is not followed, a pipe not waited for, a device not touched.

    Raises `BundleError` for anything but a regular file, and where it cannot be opened.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # each where the platform has it
        flags |= getattr(os, name, 0)
    try:
        # Once before opening, because opening a device can do things, and once after: the path may have changed hands.
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise not_regular(path)
        descriptor = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise not_regular(path)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    return os.fdopen(descriptor, "rb")


def not_regular(path: Path) -> BundleError:
    """The error for a link, a folder, a pipe or a device where a file was expected."""
    return BundleError(f"{path}: not a regular file; links and folders are not allowed in a bundle")


def wrong_size(path: Path, found: int, expected: int) -> BundleError:
    """The error for a file that was cut, or that grew; sizes in bytes."""
    return BundleError(f"{path}: {found} bytes, expected {expected}; build the bundle again")


def sha256_of_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path, *, use_record: bool = True, size: int | None = None, follow_links: bool = True) -> str:
    """Hexadecimal SHA-256 of a regular file's content.

    With `use_record`, a file of `ALWAYS_BELOW` bytes or more that the record knows by device, inode, size, mtime and
    ctime is not read. With `size`, a file of another size (bytes) is not read either. A user's own files may be links,
    as in the cache of Hugging Face; those of a bundle may not, and are hashed without `follow_links`.

    Raises `BundleError` if the file cannot be read, is not regular, has another size than `size`, or grows meanwhile.
    """
    with open_regular(Path(os.path.realpath(path)) if follow_links else path) as file:
        status = os.fstat(file.fileno())
        if size is not None and status.st_size != size:
            raise wrong_size(path, status.st_size, size)
        identity = ":".join(str(getattr(status, name)) for name in _IDENTITY)
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
        large = status.st_size >= ALWAYS_BELOW
        if large and use_record and (known := _load_record().get(identity)):
            return known
        found, done = hashlib.sha256(), 0
        try:
            while block := file.read(1 << 20):
                found.update(block)
                done += len(block)
                if done > status.st_size:
                    raise BundleError(f"{path}: grew while it was read; try again when nothing writes to it")
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}") from None
    if large and settled:
        _remember(identity, found.hexdigest())
    return found.hexdigest()


def _record_path() -> Path:
    return cache_folder() / "hashed.json"


def _load_record() -> dict[str, str]:
    """SHA-256 by identity. A record that is damaged, or that another user could have written, counts as empty."""
    try:
        with open_regular(_record_path()) as file:
            record = json.loads(file.read(_RECORD_LIMIT)) if _is_ours(os.fstat(file.fileno())) else {}
    except (OSError, BundleError, ValueError, RecursionError):
        return {}
    return {key: item for key, item in record.items() if _is_sha256(item)} if isinstance(record, dict) else {}


def _is_ours(status: os.stat_result) -> bool:
    if sys.platform == "win32":  # a profile's cache folder is closed to others there
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _remember(identity: str, sha256: str) -> None:
    """Add to the record. A record that cannot be written only costs the next opening its time."""
    record = _load_record() | {identity: sha256}
    with contextlib.suppress(OSError):
        path = _record_path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")  # of mode 0600
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                json.dump(dict(list(record.items())[-_RECORD_ENTRIES:]), file)
            os.replace(draft, path)
        except OSError:
            os.unlink(draft)
            raise
