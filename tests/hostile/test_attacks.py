"""Every attack is answered with a `BundleError` that names the place, never with a hang or another exception."""

from __future__ import annotations

import copy
import json
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from glance_trt import manifest
from glance_trt.bundle import Bundle
from glance_trt.errors import BundleError

from . import tiny
from .attacks import ATTACKS, LATE_ATTACKS, Attack

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


_NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 8, 64, 2**31, 2**63, 2**64, 10**19, 0.5, -0.0, 1e39, 1e308, float("nan")),
    *(
        float("-inf"),
        "",
        " ",
        ".",
        "..",
        "/",
        "\0",
        "\n",
        "\ud800",
        "\u202e",
        "latents",
        "float32",
        "x" * 65,
        "x" * 9999,
    ),
    *([], {}, [[]], [None], [1, 2, 3], ["a", "a"], {"": {}}, {"a": None}, {"../x": 1}, {"format": 1}, [{}] * 3),
]


def _pick(value: Any, choose: random.Random) -> tuple[Any, Any]:
    """A container anywhere inside a JSON value, and one of its keys or indices."""
    while True:
        key = choose.choice(list(value)) if isinstance(value, dict) else choose.randrange(len(value))
        item = value[key]
        if not (isinstance(item, (dict, list)) and item) or choose.random() < 0.2:
            return value, key
        value = item


def _mutate(value: dict[str, Any], choose: random.Random) -> None:
    container, key = _pick(value, choose)
    other, place = _pick(value, choose)
    kind = choose.randrange(5)
    if kind == 0:
        container[key] = copy.deepcopy(choose.choice(_NASTY))
    elif kind == 1:
        container[key] = copy.deepcopy(other[place])
    elif kind == 2:
        del container[key]
    elif kind == 3 and isinstance(container, dict):
        container[choose.choice(["x", key + "x", key.upper(), *container])] = container.pop(key)
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(choose.choice([*container, *_NASTY])))


def _load_or_refuse(data: str | bytes) -> bool:
    try:
        loaded = manifest.load(data)
    except BundleError:
        return False
    assert manifest.load(manifest.dump(loaded)) == loaded
    return True


def test_2000_mutated_manifests_are_loaded_or_refused() -> None:
    choose = random.Random(0)
    good = json.dumps(tiny.manifest())
    loaded = 0
    for _ in range(2000):
        value = json.loads(good)
        for _ in range(choose.randint(1, 3)):
            _mutate(value, choose)
        loaded += _load_or_refuse(json.dumps(value))
    assert 20 < loaded < 1000  # neither all harmless nor all refused at the first look


def test_2000_manifests_of_altered_bytes_are_loaded_or_refused() -> None:
    choose = random.Random(0)
    good = json.dumps(tiny.manifest()).encode()
    loaded = 0
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(choose.randint(1, 3)):
            start = choose.randrange(len(data))
            data[start : start + choose.randrange(3)] = choose.choice([b"", b"9", b'"', b"[", b"\x00", b"\xff", b"e9"])
        loaded += _load_or_refuse(bytes(data))
    assert 20 < loaded < 1000
