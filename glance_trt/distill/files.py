"""Writing of results: a file is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from glance_trt.errors import OutputError


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a file beside `path`, and rename it into its place. The folder is made where it is missing.

    Raises `OutputError` if that fails; an older file at `path` then is as it was.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        make_folder(path.parent)
        with open(draft, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """The same with a content that is there already."""
    write(path, lambda file: file.write(content))


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises `OutputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}") from error
