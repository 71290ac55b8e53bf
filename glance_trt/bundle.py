"""The bundle: a directory that holds everything a deployed model needs, described by ``bundle.json``.

``docs/bundle-format.md`` specifies the format, `glance_trt.manifest` reads the description, and `Bundle` opens a
directory and vouches for its files. Nothing in a bundle is trusted: every name is checked, every file is a regular file
inside the directory, listed with size and SHA-256, and its content is checked before anything reads it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from glance_trt import hashing, limits
from glance_trt.errors import BundleError
from glance_trt.manifest import FORMAT, MANIFEST, Manifest, dump, load
from glance_trt.progress import Progress, silent
from glance_trt.schema import (
    DType,
    Engine,
    EngineSet,
    FileEntry,
    Graph,
    Guidance,
    GuidanceMode,
    GuideSource,
    Image,
    LoraSource,
    Port,
    Provenance,
    Schedule,
    Step,
    Tokenizer,
)

MANIFEST_LIMIT = limits.MANIFEST_BYTES
"""Largest manifest that is read, bytes."""

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MANIFEST_LIMIT",
    "Bundle",
    "DType",
    "Engine",
    "EngineSet",
    "FileEntry",
    "Graph",
    "Guidance",
    "GuidanceMode",
    "GuideSource",
    "Image",
    "LoraSource",
    "Manifest",
    "Port",
    "Provenance",
    "Schedule",
    "Step",
    "Tokenizer",
    "dump",
    "load",
]


class Bundle:
    """An opened bundle: its directory, its manifest, and checked access to its files."""

    def __init__(self, directory: Path, manifest: Manifest, sha256: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.sha256 = sha256
        """SHA-256 of ``bundle.json``, which lists every other file's: it identifies the bundle's whole content."""

    @classmethod
    def open(cls, directory: str | Path) -> Bundle:
        """Read the manifest, and check that the directory holds exactly the listed files, with their sizes.

        Contents are not read here; `check` does that for the files that are about to be used. Raises `BundleError`.
        """
        directory = Path(directory)
        if os.path.isfile(directory):
            raise BundleError(f"{directory}: a file; a bundle is a folder, which glance-trt build makes")
        if not os.path.isdir(directory):
            raise BundleError(
                f"{directory}: no such folder; a bundle is made with: glance-trt build RECIPE -o {directory}"
            )
        text = _read_manifest(directory / MANIFEST)
        bundle = cls(directory, load(text, str(directory / MANIFEST)), hashing.sha256_of_bytes(text))
        try:
            bundle._check_listing()
        except OSError as error:
            raise BundleError(f"{error.filename or directory}: {error.strerror}") from None
        return bundle

    def path(self, name: str) -> Path:
        """The path of a listed file. Raises `BundleError` for a name that is not listed."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.directory}: {name!r} is not listed in {MANIFEST}")
        return self.directory / name

    def check(self, names: Iterable[str], *, thorough: bool = False, progress: Progress = silent) -> None:
        """Compare the contents of files with their listed SHA-256. Raises `BundleError` at the first that differs.

        A large file that this user's record knows unchanged (same inode, size and times) is not read again, unless
        `thorough`.
        """
        paths = {name: self.path(name) for name in names}
        total = sum(self.manifest.files[name].size for name in paths)
        done = 0
        progress("check", 0, total)
        for name, path in paths.items():
            entry = self.manifest.files[name]
            found = hashing.sha256_of_file(path, use_record=not thorough, size=entry.size, follow_links=False)
            if found != entry.sha256:
                raise BundleError(f"{path}: altered (its SHA-256 is not the listed one); build the bundle again")
            done += entry.size
            progress("check", done, total)

    def verify(self, progress: Progress = silent) -> None:
        """Hash every file. Raises `BundleError`."""
        self.check(self.manifest.files, thorough=True, progress=progress)

    def _check_listing(self) -> None:
        files = self.manifest.files
        missing = dict.fromkeys(files)
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name == MANIFEST:
                    continue
                if entry.name not in files:
                    what = f"{entry.name!r} is not listed in {MANIFEST}"
                    raise BundleError(f"{self.directory}: {what}; remove it, or build the bundle again")
                path, size = self.directory / entry.name, files[entry.name].size
                status = os.lstat(path)
                if not stat.S_ISREG(status.st_mode):
                    raise hashing.not_regular(path)
                if status.st_size != size:
                    raise hashing.wrong_size(path, status.st_size, size)
                del missing[entry.name]
        for name in missing:
            raise BundleError(f"{self.directory / name}: missing; build the bundle again")


def _read_manifest(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise BundleError(f"{path.parent}: not a bundle, it has no {path.name}")
    with hashing.open_regular(path) as file:
        try:
            text = file.read(MANIFEST_LIMIT + 1)
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}") from None
    if len(text) > MANIFEST_LIMIT:
        raise BundleError(f"{path}: more than {MANIFEST_LIMIT} bytes, which is the most that is read")
    return text
