"""SHA-256 of files, with a record of large files already hashed, so that opening a bundle does not read it twice."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path
from typing import BinaryIO

from glance_trt import records
from glance_trt.errors import BundleError

ALWAYS_BELOW = 4 << 20
"""Files smaller than this (bytes) are hashed every time: it takes two milliseconds, and needs no record."""

_IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
_RECORD = "hashed.json"

# A file that changes twice within one tick of its file system's clock keeps its times, so a file this young is not
# recorded. The coarsest clock in use is FAT's.
_SETTLED_NS = 2_000_000_000


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
        if large and use_record and len(known := records.load(_RECORD).get(identity, "")) == 64:
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
        records.add(_RECORD, {identity: found.hexdigest()})
    return found.hexdigest()
