"""What `strict.read` takes, and the texts with which it refuses the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from glance_trt import strict


@dataclass(frozen=True)
class Wheel:
    diameter: float
    spokes: int = 32

    def __post_init__(self) -> None:
        if self.spokes < 1:
            raise strict.Mismatch("spokes: expected at least 1")
        if self.diameter < 0:
            raise strict.Mismatch("a wheel cannot be smaller than nothing")


@dataclass(frozen=True)
class Bicycle:
    name: str
    kind: Literal["road", "city"]
    wheels: tuple[Wheel, ...]
    light: bool = False
    owner: str | None = None
    sizes: tuple[int | str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    spare: Wheel | None = None
    anything: object = None


GOOD: dict[str, Any] = {"name": "a", "kind": "road", "wheels": [{"diameter": 28}, {"diameter": 27.5, "spokes": 36}]}


def test_read_builds_the_dataclass_with_its_defaults() -> None:
    assert strict.read(Bicycle, GOOD) == Bicycle("a", "road", (Wheel(28.0), Wheel(27.5, 36)))


def test_a_whole_number_becomes_a_float_where_one_is_asked() -> None:
    diameter = strict.read(Bicycle, GOOD).wheels[0].diameter
    assert isinstance(diameter, float)
    assert diameter == 28.0


def test_a_union_takes_each_of_its_types_as_it_is() -> None:
    assert strict.read(Bicycle, GOOD | {"sizes": [1, "big"], "owner": "me"}).sizes == (1, "big")


def test_null_is_taken_where_the_type_allows_it() -> None:
    assert strict.read(Bicycle, GOOD | {"owner": None, "spare": None}).owner is None


def test_object_takes_anything_as_it_is() -> None:
    assert strict.read(Bicycle, GOOD | {"anything": [1, {"a": None}]}).anything == [1, {"a": None}]


def test_write_is_the_inverse_of_read() -> None:
    bicycle = strict.read(Bicycle, GOOD | {"notes": {"colour": "red"}, "spare": {"diameter": 20}, "sizes": [1, "b"]})
    written = strict.write(bicycle)
    assert strict.read(Bicycle, written) == bicycle
    assert written["wheels"] == [{"diameter": 28.0, "spokes": 32}, {"diameter": 27.5, "spokes": 36}]
    assert "owner" not in written


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"nmae": "b"}, "nmae: unknown key; did you mean 'name'?"),
        ({"x": 1}, "x: unknown key; known: name, kind, wheels, light"),
        ({1: 1}, "1: unknown key; known: name"),
        ({"\x1b[2J": 1}, "'\\x1b[2J': unknown key"),
        ({10**5000: 1}, "a number of thousands of digits: unknown key"),
        ({"name": 5}, "name: expected text, got a whole number (5)"),
        ({"name": None}, "name: expected text, got nothing"),
        ({"name": "\udfff"}, "name: '\\udfff' is not valid Unicode"),
        ({"kind": "rood"}, "kind: expected one of road, city; got text ('rood'); did you mean 'road'?"),
        ({"kind": "x"}, "kind: expected one of road, city; got text ('x')"),
        ({"kind": ["road"]}, "kind: expected one of road, city; got a list"),
        ({"light": 1}, "light: expected true or false, got a whole number (1)"),
        ({"wheels": {}}, "wheels: expected a list, got keys and values"),
        ({"wheels": ["round"]}, "wheels[0]: expected keys and values, got text ('round')"),
        ({"wheels": [{}]}, "wheels[0].diameter: missing"),
        ({"wheels": [{"diameter": True}]}, "wheels[0].diameter: expected a number, got true or false (True)"),
        ({"wheels": [{"diameter": float("nan")}]}, "wheels[0].diameter: expected a finite number, got nan"),
        ({"wheels": [{"diameter": float("inf")}]}, "wheels[0].diameter: expected a finite number, got inf"),
        ({"wheels": [{"diameter": 10**400}]}, "wheels[0].diameter: expected a finite number, got 1000"),
        ({"wheels": [{"diameter": 10**5000}]}, "wheels[0].diameter: expected a finite number, got a number of"),
        ({"wheels": [{"diameter": 1, "spokes": 1.0}]}, "wheels[0].spokes: expected a whole number, got a number (1.0)"),
        ({"wheels": [{"diameter": 1, "spokes": True}]}, "wheels[0].spokes: expected a whole number, got true or false"),
        ({"sizes": [1, True]}, "sizes[1]: expected a whole number or text, got true or false (True)"),
        ({"sizes": [None]}, "sizes[0]: expected a whole number or text, got nothing"),
        ({"sizes": ["\ud800"]}, "sizes[0]: '\\ud800' is not valid Unicode"),
        ({"notes": []}, "notes: expected keys and values, got a list"),
        ({"notes": {"a": 1}}, "notes.a: expected text, got a whole number (1)"),
        ({"notes": {2: "a"}}, "notes: key 2 is a whole number (2), expected text"),
        ({"notes": {"\ud800": "a"}}, "notes: '\\ud800' is not valid Unicode"),
        ({"owner": 5}, "owner: expected text, got a whole number (5)"),
        ({"spare": {"diameter": 1, "spoke": 1}}, "spare.spoke: unknown key; did you mean 'spokes'?"),
    ],
    ids=strict.shown,
)
def test_read_says_where_a_value_is_wrong(change: dict[Any, Any], text: str) -> None:
    with pytest.raises(strict.Mismatch, match="^" + re.escape(text)) as caught:
        strict.read(Bicycle, GOOD | change)
    assert len(str(caught.value)) < 200
    with pytest.raises(strict.Mismatch, match="^" + re.escape(f"garage[3].{text}")):
        strict.read(Bicycle, {**GOOD, **change}, "garage[3]")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(strict.Mismatch, match=r"^kind: missing$"):
        strict.read(Bicycle, {"name": "a"})


def test_only_keys_and_values_are_read() -> None:
    with pytest.raises(strict.Mismatch, match=r"^expected keys and values, got a list$"):
        strict.read(Bicycle, [])


def test_a_check_of_the_dataclass_gets_its_key_path() -> None:
    with pytest.raises(strict.Mismatch, match=r"^wheels\[0\]\.spokes: expected at least 1$"):
        strict.read(Bicycle, GOOD | {"wheels": [{"diameter": 1, "spokes": 0}]})
    with pytest.raises(strict.Mismatch, match=r"^spare: a wheel cannot be smaller than nothing$"):
        strict.read(Bicycle, GOOD | {"spare": {"diameter": -1}})
    with pytest.raises(strict.Mismatch, match=r"^spokes: expected at least 1$"):
        strict.read(Wheel, {"diameter": 1, "spokes": 0})


def test_what_an_error_quotes_is_short_and_printable() -> None:
    assert strict.shown("a\n\u202e") == "'a\\n\\u202e'"
    assert strict.shown("x" * 10**6) == "'" + "x" * 36 + "..."
    assert strict.shown(10**5000) == "a number of thousands of digits"
    assert strict.shown_key("denoiser.slow") == "denoiser.slow"
    assert strict.shown_key("") == "''"
