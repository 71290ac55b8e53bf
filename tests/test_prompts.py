"""Files of prompts: one per line, by the numbers that an editor shows."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from glance_trt.errors import InputError
from glance_trt.prompts import STDIN, read_numbered, read_prompts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blank_lines_are_skipped_and_count(tmp_path: Path, end: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(
        b"\xef\xbb\xbf" + end.join(["", "  a red circle\t", "", " \u3000", "ein großer Kreis", ""]).encode()
    )
    assert read_numbered(file) == {2: "a red circle", 5: "ein großer Kreis"}
    assert read_prompts(file) == ["a red circle", "ein großer Kreis"]


def test_lines_end_where_an_editor_ends_them(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\u2028b\x0bc\x0cd\x85e\nsecond", encoding="utf-8")
    assert read_numbered(file) == {1: "a\u2028b\x0bc\x0cd\x85e", 2: "second"}


def test_one_prompt_may_stand_twice(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\na\n")
    assert read_prompts(file) == ["a", "a"]


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\n\nein Stück".encode()), encoding="ascii"))
    assert read_numbered(STDIN) == {1: "a", 3: "ein Stück"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match=r"^standard input: no prompt in it; expected one per line$"):
        read_numbered(STDIN)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\n \n", "no prompt in it; expected one per line"),
        (b"", "no prompt in it; expected one per line"),
        (
            b"a\r\nb\r\n\xff\n",
            "not a text in UTF-8; expected a text file with a prompt per line, and line 3 is none",
        ),
        (None, "No such file or directory; expected a text file with a prompt per line"),
    ],
)
def test_what_holds_no_prompts_is_refused_by_name(tmp_path: Path, content: bytes | None, text: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(f'{file}: {text}')}$"):
        read_prompts(file)
