"""A build's workplace: finished artefacts with the keys of what they were made from, so that no work is done twice.

The folder stands beside the bundle it becomes, under a hidden name. What is in its record is complete; anything else
in it is thrown away when the next build begins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from glance_trt import bundle as format_
from glance_trt import hashing
from glance_trt.bundle import Bundle, FileEntry, Manifest
from glance_trt.errors import OutputError

_RECORD = "finished.json"


def key_of(*parts: object) -> str:
    """A content key: SHA-256 over the JSON of everything that an artefact depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Staging:
    """The workplace for a bundle at `output`. Artefacts of an earlier bundle there are taken over by their keys."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f".{output.name}.building"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keys = self._load_record()
        for entry in self.folder.iterdir():
            if entry.name not in self._keys and entry.name != _RECORD:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def take_over(self, previous: Bundle) -> None:
        """Link the files of an earlier bundle in, so that those whose keys still hold need not be made again."""
        for name, entry in previous.manifest.files.items():
            if entry.key and name not in self._keys:
                with contextlib.suppress(FileExistsError):
                    _link(previous.path(name), self.folder / name)
                self._keys[name] = entry.key

    def stage(self, key: str, make: Callable[[], Iterable[str]]) -> list[str]:
        """The names of the files that `key` stands for; `make` is called, and its names recorded, if there are none."""
        names = [name for name, known in self._keys.items() if known == key]
        if not names:
            names = list(make())
            self._keys |= dict.fromkeys(names, key)
            draft = self.folder / f"{_RECORD}.draft"
            draft.write_text(json.dumps(self._keys))
            os.replace(draft, self.folder / _RECORD)
        return names

    def has(self, key: str) -> bool:
        """True if there are files that `key` stands for."""
        return key in self._keys.values()

    def entries(self, names: Iterable[str]) -> dict[str, FileEntry]:
        """Size, SHA-256 and key of files, for the manifest."""
        return {
            name: FileEntry(
                (self.folder / name).stat().st_size, hashing.sha256_of_file(self.folder / name), self._keys[name]
            )
            for name in sorted(set(names))
        }

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, drop what it does not list, and put the folder in the bundle's place."""
        for entry in self.folder.iterdir():
            if entry.name not in manifest.files:
                entry.unlink()
        (self.folder / format_.MANIFEST).write_text(format_.dump(manifest), encoding="utf-8")
        old = self.output.parent / f".{self.output.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.output.exists():
            os.replace(self.output, old)
        os.replace(self.folder, self.output)
        shutil.rmtree(old, ignore_errors=True)

    def _load_record(self) -> dict[str, str]:
        try:
            record = json.loads((self.folder / _RECORD).read_text())
        except (OSError, ValueError):
            return {}
        return {name: key for name, key in record.items() if (self.folder / name).is_file()}


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into an `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(place.parent if place.parent.exists() else Path()).free
            raise OutputError(f"{place}: disk full ({free / 1e6:.0f} MB free); free some space and build again") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(f"{error.filename or place}: {error.strerror}") from None
        raise


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        shutil.copy2(source, target)
