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
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from glance_trt import bundle as format_
from glance_trt import hashing, trust
from glance_trt.bundle import Bundle, FileEntry, Manifest
from glance_trt.errors import BundleError, OutputError
from glance_trt.progress import Progress, silent

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


def key_of(*parts: object) -> str:
    """A content key: SHA-256 over the JSON of everything that an artefact depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Staging:
    """The workplace for a bundle at `output`; `folder` is what will stand there.

    Artefacts of `previous`, a bundle that is there already, are taken over by their keys, as links: a finished file is
    replaced, and never written to. Plans, which are native code, are taken over only if they were built here: a key is
    what the bundle says of itself. Where `output` is a link, what it leads to is replaced.
    """

    def __init__(self, output: Path, previous: Bundle | None = None) -> None:
        self._output = Path(os.path.realpath(output))
        self._place = _place(output)
        self.folder = self._place / "bundle"
        self._unfinished = self._place / "unfinished"
        self._replaced = self._place / "replaced"
        if self._replaced.exists() and not self._output.exists():  # killed between the two renames of `finish`
            os.replace(self._replaced, self._output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._finished = self._read_record()
        self._previous = previous
        self._earlier: dict[str, list[str]] = {}
        for name, entry in previous.manifest.files.items() if previous else ():
            if not trust.is_foreign(name, entry.sha256):
                self._earlier.setdefault(entry.key, []).append(name)
        self._clean({name for names in self._finished.values() for name in names})

    def stage(self, key: str, make: Callable[[Path], Iterable[str]]) -> list[str]:
        """The names of the files that `key` stands for.

        If there are none yet, `make` writes them into the folder it is given and returns their names.
        """
        if not self._has(key):
            with self._scratch() as scratch:
                self._accept(key, scratch, list(dict.fromkeys(make(scratch))))
        return self._finished[key]

    def keep(self, name: str) -> None:
        """Take a file of `previous` over as it is, under a key that nothing else has. Raises `BundleError`."""
        assert self._previous is not None
        self._previous.check([name])
        with self._scratch() as scratch:
            _link(self._previous.path(name), scratch / name)
            self._accept(key_of("kept", name, self._previous.manifest.files[name].sha256), scratch, [name])

    def key(self, name: str) -> str:
        """The key of a finished file."""
        return next(key for key, names in self._finished.items() if name in names)

    def entries(self, names: Iterable[str], progress: Progress = silent) -> dict[str, FileEntry]:
        """Size, SHA-256 and key of finished files, for the manifest. Progress counts bytes."""
        sizes = {name: (self.folder / name).stat().st_size for name in sorted(set(names))}
        entries: dict[str, FileEntry] = {}
        done, total = 0, sum(sizes.values())
        progress("hash", 0, total)
        for name, size in sizes.items():
            entries[name] = FileEntry(size, hashing.sha256_of_file(self.folder / name), self.key(name))
            done += size
            progress("hash", done, total)
        return entries

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
                self._accept(key, scratch, names)
        return key in self._finished

    def _accept(self, key: str, scratch: Path, names: list[str]) -> None:
        """Move files from the scratch folder to the finished ones; what they replace is forgotten beforehand."""
        kept = {k: known for k, known in self._finished.items() if set(known).isdisjoint(names)}
        if kept != self._finished:
            self._finished = kept
            self._write_record()
        for name in names:
            os.replace(scratch / name, self.folder / name)
        self._finished[key] = names
        self._write_record()

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        self._unfinished.mkdir(exist_ok=True)
        # Never the same folder: a process of a killed build may still be about to finish what it wrote into its own.
        scratch = tempfile.mkdtemp(dir=self._unfinished)
        try:
            yield Path(scratch)
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


def present(output: Path, previous: Bundle | None = None) -> int:
    """Bytes of a bundle at `output` that need no new space: in its workplace, and in a bundle that is there already."""
    files = [path for path in _place(output).rglob("*") if path.is_file()]
    files += [previous.path(name) for name in previous.manifest.files] if previous else []
    found = {(status.st_dev, status.st_ino): status.st_size for status in map(os.stat, files)}  # links count once
    return sum(found.values())


def _place(output: Path) -> Path:
    output = Path(os.path.realpath(output))
    return output.parent / f".{output.name}.building"


@contextlib.contextmanager
def locked(output: Path, progress: Progress = silent) -> Iterator[None]:
    """Hold the only right to build at `output`; waits for another process that holds it, and reports that it does.

    The lock is a file beside the output, which is gone afterwards. One that a killed process left behind locks nothing.
    """
    output = Path(os.path.realpath(output))
    file = output.with_name(f".{output.name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # below /proc, or a dangling link
        raise OutputError(f"{output.parent}: folder cannot be made; give another -o") from None
    if sys.platform == "win32":  # without flock: nothing keeps two builds apart there
        yield
        return
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # in /proc, where there are folders in which nothing can be made
            raise OutputError(f"{output.parent}: no file can be made there; give another -o") from None
        try:
            _wait_for(descriptor, f"wait for another build of {output.name}", progress)
            # Its last holder removed the file that was waited for: others may have locked a new one since.
            if not _is_at(descriptor, file):
                continue
            try:
                yield
            finally:
                file.unlink()  # while it is locked: no one else can hold, or remove, what is here now
            return
        finally:
            os.close(descriptor)


def _wait_for(descriptor: int, stage: str, progress: Progress) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress(stage, 0, 1)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        progress(stage, 1, 1)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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
