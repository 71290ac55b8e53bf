"""Every attack on a bundle is answered as in Python: by an error of the same kind, and in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest

from glance_trt.bundle import Bundle
from glance_trt.errors import BundleError

from ..hostile import tiny
from ..hostile.attacks import ATTACKS, LATE_ATTACKS, Attack
from ..hostile.mutations import altered, mutated
from .abi import Library, NativeError

NOT_JSON = "not valid JSON: "
LAX = (b"NaN", b"Infinity", b"e9", b"\\ud8")
"""What Python's parser takes, for the strict reader behind it to refuse: to the native parser it is no JSON."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.make_bundle(tmp_path / "tiny.bundle")


def test_the_bundle_that_is_attacked_is_good(native: Library, folder: Path) -> None:
    native.verify(folder)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_refused_as_in_python(native: Library, folder: Path, attack: Attack) -> None:
    attack.damage(folder)
    expected = _refusal(folder)
    assert expected is not None
    with pytest.raises(NativeError) as caught:
        native.verify(folder)
    assert caught.value.kind == "bundle"
    assert _same(str(caught.value), expected, folder), (str(caught.value), expected)
    assert str(caught.value).startswith(str(folder))
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("attack", LATE_ATTACKS, ids=lambda attack: attack.name)
def test_attack_on_an_opened_bundle_is_refused(native: Library, folder: Path, attack: Attack) -> None:
    def damage(_stage: str, done: int, _total: int) -> None:
        if done == 0:  # the manifest was read, and no file yet
            attack.damage(folder)

    with pytest.raises(NativeError) as caught:
        native.verify(folder, progress=damage)
    assert caught.value.kind == "bundle"
    assert attack.error in str(caught.value)


def test_300_mutated_manifests_are_taken_or_refused_as_in_python(native: Library, folder: Path) -> None:
    taken = 0
    for text in mutated(300, 1):
        (folder / "bundle.json").write_text(text)
        taken += _check(native, folder)
    assert 5 < taken < 150


def test_300_manifests_of_altered_bytes_are_taken_or_refused_as_in_python(native: Library, folder: Path) -> None:
    taken = 0
    for data in altered(300, 1):
        (folder / "bundle.json").write_bytes(data)
        taken += _check(native, folder)
    assert 5 < taken < 150


def _check(native: Library, folder: Path) -> bool:
    """Whether both take the bundle; both must refuse it alike."""
    expected, found = _refusal(folder), None
    try:
        native.verify(folder)
    except NativeError as error:
        found = error
    if expected is None or found is None:
        assert (expected, found) == (None, None)
        return True
    assert found.kind == "bundle"
    assert _same(str(found), expected, folder), (str(found), expected)
    return False


def _refusal(folder: Path) -> str | None:
    try:
        Bundle.open(folder).verify()
    except BundleError as error:
        return str(error)
    return None


def _same(native: str, python: str, folder: Path) -> bool:
    """The native library has another JSON parser, and writes what is not ASCII as escapes, which are cut earlier."""
    if NOT_JSON in native:
        manifest = (folder / "bundle.json").read_bytes()
        return NOT_JSON in python or any(text in manifest for text in LAX)
    if not python.isascii():
        python, native = (text.partition("\\")[0] for text in (_escaped(python), native))
    return native == python


def _escaped(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
