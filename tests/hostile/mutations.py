"""Manifests that are damaged at random, the same for a seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from . import tiny

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


def mutated(count: int, seed: int) -> Iterator[str]:
    """Manifests in which values, keys and places were changed; all are JSON to Python."""
    choose, good = random.Random(seed), json.dumps(tiny.manifest())
    for _ in range(count):
        value = json.loads(good)
        for _ in range(choose.randint(1, 3)):
            _mutate(value, choose)
        yield json.dumps(value)


def altered(count: int, seed: int) -> Iterator[bytes]:
    """Manifests in which some bytes were changed."""
    choose, good = random.Random(seed), json.dumps(tiny.manifest()).encode()
    for _ in range(count):
        data = bytearray(good)
        for _ in range(choose.randint(1, 3)):
            start = choose.randrange(len(data))
            data[start : start + choose.randrange(3)] = choose.choice([b"", b"9", b'"', b"[", b"\x00", b"\xff", b"e9"])
        yield bytes(data)
