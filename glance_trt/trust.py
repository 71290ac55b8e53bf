"""Which compiled engines this user trusts: the plans that were built here, and those that they said yes to.

A TensorRT plan is native code, so opening one runs whatever its maker put in it. What is built here is remembered by
its SHA-256, in the user's cache folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from glance_trt import hashing, records
from glance_trt.errors import BundleError, TargetError

PLAN = ".plan"
"""What the names of plans end in."""
_RECORD = "trusted.json"


def remember(sha256s: Iterable[str]) -> None:
    """Trust engines of these hashes from now on. A record that cannot be written costs a question later, no more."""
    records.add(_RECORD, dict.fromkeys(sha256s, ""))


def known(sha256: str) -> bool:
    """Whether a plan of this hash was built here."""
    return sha256 in records.load(_RECORD)


def is_foreign(name: str, sha256: str) -> bool:
    """Whether a bundle's file is a plan that was not built here."""
    return name.endswith(PLAN) and not known(sha256)


def read(path: Path, sha256: str, *, trusted: bool = False) -> bytes:
    """The bytes of a plan, which have this SHA-256, from the one file that was opened.

    trusted: whether the user vouches for a plan that was not built here. Raises `BundleError` where the hash differs,
    and `TargetError` for a plan that nobody vouches for.
    """
    with hashing.open_regular(path) as file:
        plan = file.read()
    if hashlib.sha256(plan).hexdigest() != sha256:
        raise BundleError(f"{path}: altered: its SHA-256 is not the manifest's; build the bundle again")
    if not trusted and not known(sha256):
        raise TargetError(
            f"{path}: a plan is native code, and this one was not built here by you. If you trust where it comes from, "
            "give --trust; else compile it anew from the graphs beside it: glance-trt compile BUNDLE --engine TARGET"
        )
    return plan
