"""A build's workplace: finished artefacts with the keys of what they were made from, so that no work is done twice.

It stands beside the bundle it becomes, under a hidden name. What its record lists is complete; anything else in it is
thrown away when the next build begins.
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
from glance_trt.errors import BundleError, OutputError

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


def key_of(*parts: object) -> str:
    """A content key: SHA-256 over the JSON of everything that an artefact depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Staging:
    """The workplace for a bundle at `output`; `folder` is what will stand there.

    Artefacts of `previous`, a bundle that is there already, are taken over by their keys, as links: a finished file is
    replaced, and never written to. Where `output` is a link, what it leads to is replaced.
    """

    def __init__(self, output: Path, previous: Bundle | None = None) -> None:
        self._output = Path(os.path.realpath(output))
        self._place = self._output.parent / f".{self._output.name}.building"
        self.folder = self._place / "bundle"
        self._unfinished = self._place / "unfinished"
        self._replaced = self._place / "replaced"
        if self._replaced.exists() and not self._output.exists():  # killed between the two renames of `finish`
            os.replace(self._replaced, self._output)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # below /proc, or a dangling link
            raise OutputError(f"{self._output.parent}: folder cannot be made; give another -o") from None
        self._finished = self._read_record()
        self._previous = previous
        self._earlier: dict[str, list[str]] = {}
        for name, entry in previous.manifest.files.items() if previous else ():
            self._earlier.setdefault(entry.key, []).append(name)
        self._clean({name for names in self._finished.values() for name in names})

    def stage(self, key: str, make: Callable[[Path], Iterable[str]]) -> list[str]:
        """The names of the files that `key` stands for.

        If there are none yet, `make` writes them into the folder it is given and returns their names.
        """
        if not self._has(key):
            with self._scratch() as scratch:
                self._accept(key, list(dict.fromkeys(make(scratch))))
        return self._finished[key]

    def key(self, name: str) -> str:
        """The key of a finished file."""
        return next(key for key, names in self._finished.items() if name in names)

    def entries(self, names: Iterable[str]) -> dict[str, FileEntry]:
        """Size, SHA-256 and key of finished files, for the manifest."""
        paths = {name: self.folder / name for name in sorted(set(names))}
        return {
            name: FileEntry(path.stat().st_size, hashing.sha256_of_file(path), self.key(name))
            for name, path in paths.items()
        }

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, drop what it does not list, and put the folder in the bundle's place."""
        self._clean(set(manifest.files))
        (self.folder / format_.MANIFEST).write_text(format_.dump(manifest), encoding="utf-8")
        try:
            if self._output.exists():
                os.replace(self._output, self._replaced)
            os.replace(self.folder, self._output)
        except BaseException:
            if self._replaced.exists() and not self._output.exists():
                os.replace(self._replaced, self._output)
            raise
        shutil.rmtree(self._place, ignore_errors=True)

    def _has(self, key: str) -> bool:
        if key not in self._finished and key in self._earlier:
            assert self._previous is not None
            names = self._earlier.pop(key)
            with contextlib.suppress(BundleError), self._scratch() as scratch:  # damaged: made again
                self._previous.check(names)
                for name in names:
                    _link(self._previous.path(name), scratch / name)
                self._accept(key, names)
        return key in self._finished

    def _accept(self, key: str, names: list[str]) -> None:
        """Move files from the scratch folder to the finished ones; what they replace is forgotten beforehand."""
        self._finished = {k: known for k, known in self._finished.items() if set(known).isdisjoint(names)}
        self._write_record()
        for name in names:
            os.replace(self._unfinished / name, self.folder / name)
        self._finished[key] = names
        self._write_record()

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        self._unfinished.mkdir()
        try:
            yield self._unfinished
        finally:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _clean(self, keep: set[str]) -> None:
        for place in (self._unfinished, self._replaced):
            if place.exists():
                shutil.rmtree(place)
        for entry in self.folder.iterdir():
            if entry.name not in keep:
                entry.unlink()

    def _read_record(self) -> dict[str, list[str]]:
        try:
            record = json.loads((self._place / "finished.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {key: names for key, names in record.items() if all((self.folder / name).is_file() for name in names)}

    def _write_record(self) -> None:
        draft = self._place / "finished.json.draft"
        draft.write_text(json.dumps(self._finished), encoding="utf-8")
        os.replace(draft, self._place / "finished.json")


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into an `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(parent for parent in place.absolute().parents if parent.exists())).free
            raise OutputError(
                f"{place}: disk full ({free / 1e6:.0f} MB free); free some space and build again: it goes on from here"
            ) from None
        if error.errno in _REFUSED:
            raise OutputError(f"{error.filename or place}: {error.strerror}; give another -o") from None
        raise


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        shutil.copy2(source, target)
