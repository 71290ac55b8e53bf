"""Every attack is answered with a `BundleError` that names the place, never with a hang or another exception."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from glance_trt import manifest
from glance_trt.bundle import Bundle
from glance_trt.errors import BundleError

from . import tiny
from .attacks import ATTACKS, LATE_ATTACKS, Attack
from .mutations import altered, mutated

SECONDS = 60


@pytest.fixture
def _in_time() -> Iterator[None]:
    """A pipe that is waited for, or a number that takes minutes to read, fails the test."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not answered within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.make_bundle(tmp_path / "tiny.bundle")


def test_the_bundle_that_is_attacked_is_good(folder: Path) -> None:
    Bundle.open(folder).verify()


@pytest.mark.usefixtures("_in_time")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_refused(folder: Path, attack: Attack) -> None:
    attack.damage(folder)
    with pytest.raises(BundleError, match=re.escape(attack.error)) as caught:
        Bundle.open(folder).verify()
    assert str(caught.value).startswith(str(folder))
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("_in_time")
@pytest.mark.parametrize("attack", LATE_ATTACKS, ids=lambda attack: attack.name)
def test_attack_on_an_opened_bundle_is_refused(folder: Path, attack: Attack) -> None:
    bundle = Bundle.open(folder)
    attack.damage(folder)
    with pytest.raises(BundleError, match=re.escape(attack.error)) as caught:
        bundle.check(bundle.manifest.graphs["denoiser.slow"].weights)
    assert str(caught.value).startswith(str(folder))


def test_names_of_attacks_are_distinct() -> None:
    for attacks in (ATTACKS, LATE_ATTACKS):
        assert len({attack.name for attack in attacks}) == len(attacks)


def _load_or_refuse(data: str | bytes) -> bool:
    try:
        loaded = manifest.load(data)
    except BundleError:
        return False
    assert manifest.load(manifest.dump(loaded)) == loaded
    return True


def test_2000_mutated_manifests_are_loaded_or_refused() -> None:
    loaded = sum(map(_load_or_refuse, mutated(2000, 0)))
    assert 20 < loaded < 1000  # neither all harmless nor all refused at the first look


def test_2000_manifests_of_altered_bytes_are_loaded_or_refused() -> None:
    loaded = sum(map(_load_or_refuse, altered(2000, 0)))
    assert 20 < loaded < 1000
