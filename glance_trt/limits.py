"""What a bundle may hold at most, and checks that say where it does not.

The limits keep a hostile manifest from asking for absurd amounts of memory or time, and its numbers within what a
reader in C can hold. ``docs/bundle-format.md`` gives the same figures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from glance_trt.strict import Mismatch, shown

MANIFEST_BYTES = 1 << 20
"""Size of ``bundle.json``."""
IMAGE_SIDE = 8192
"""Height and width of an image, pixels."""
TENSOR_ELEMENTS = 1 << 28
"""Elements of a tensor, for one image."""
TENSOR_RANK = 8
SCHEDULE_STEPS = 1000
PROMPT_TOKENS = 1 << 16
INT32 = 2**31 - 1
INT64 = 2**63 - 1
FLOAT32 = float.fromhex("0x1.fffffep+127")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What Windows takes for a device, or cuts short, in every folder.
_NOT_PORTABLE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", re.IGNORECASE)


def check_name(path: str, name: str) -> None:
    """Raise `Mismatch`, as all checks here do, unless `name` may name something in a bundle."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise Mismatch(f"{path}: {shown(name)} is no valid name; names are 1 to 64 of A-Z a-z 0-9 . _ -, not . or ..")


def check_file_names(path: str, names: Iterable[str], *, reserved: str) -> None:
    """Names of files in one folder that also holds `reserved`: valid and distinct on every system."""
    seen = {reserved.lower(): reserved}
    for name in names:
        check_name(path, name)
        if _NOT_PORTABLE.fullmatch(name):
            raise Mismatch(f"{path}: {name!r} cannot be a file's name on Windows; rename it")
        if name.lower() in seen:
            raise Mismatch(f"{path}: {name!r} and {seen[name.lower()]!r} are one file where case does not count")
        seen[name.lower()] = name


def check_distinct(path: str, names: Sequence[str]) -> None:
    """No name stands twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Mismatch(f"{path}: {name!r} stands twice")
        seen.add(name)


def check_range(path: str, value: int, low: int, high: int) -> None:
    """``low <= value <= high``."""
    if not low <= value <= high:
        raise Mismatch(f"{path}: expected a whole number from {low} to {high}, got {shown(value)}")


def check_sizes(path: str, sizes: Sequence[Sequence[int]]) -> None:
    """Image sizes, each [height, width] in pixels."""
    for i, size in enumerate(sizes):
        if len(size) != 2:
            raise Mismatch(f"{path}[{i}]: expected [height, width], got {list(size)}")
        for side in size:
            check_range(f"{path}[{i}]", side, 1, IMAGE_SIDE)


def check_float32(path: str, value: float) -> None:
    """float32 can hold `value` without it becoming infinite."""
    if abs(value) > FLOAT32:
        raise Mismatch(f"{path}: expected a number that float32 can hold, got {value}")


def check_elements(path: str, shape: Iterable[int]) -> None:
    """A tensor of that shape is of a size that one image can need."""
    if (elements := math.prod(shape)) > TENSOR_ELEMENTS:
        raise Mismatch(f"{path}: expected at most {TENSOR_ELEMENTS} elements, got {shown(elements)}")


def check_sha256(path: str, digest: str) -> None:
    """A SHA-256 as this project writes it."""
    if not _SHA256.fullmatch(digest):
        raise Mismatch(f"{path}: expected 64 hexadecimal digits in lower case, got {shown(digest)}")
