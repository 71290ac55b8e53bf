"""Small records in this user's cache folder: what was hashed already, which engines are trusted."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_ENTRIES = 1000
_LIMIT = 1 << 20
"""Bytes that are read of a record."""


def folder() -> Path:
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


def load(name: str) -> dict[str, str]:
    """The entries of a record. One that is damaged, or that another user could have written, counts as empty."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(folder() / name, flags), "rb") as file:
            status = os.fstat(file.fileno())
            record = json.loads(file.read(_LIMIT)) if stat.S_ISREG(status.st_mode) and _is_ours(status) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    return {key: item for key, item in record.items() if isinstance(item, str)}


def add(name: str, entries: Mapping[str, str]) -> None:
    """Add entries to a record, whose oldest go. What cannot be written is left: a record saves time, no more."""
    record = load(name) | dict(entries)
    with contextlib.suppress(OSError):
        write(name, json.dumps(dict(list(record.items())[-_ENTRIES:])).encode())


def write(name: str, content: bytes) -> None:
    """Put a file into the cache folder, which only this user can read. Raises `OSError`."""
    path = folder() / name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")  # of mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(draft, path)
    except OSError:
        os.unlink(draft)
        raise


def _is_ours(status: os.stat_result) -> bool:
    if sys.platform == "win32":  # a profile's cache folder is closed to others there
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
