"""Prompts: read from a file, one per line, and cut where they are too long."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from glance_trt.errors import InputError

STDIN = Path("-")
"""The name of standard input."""

_LINE_END = re.compile(r"\r\n?|\n")  # as editors count lines; str.splitlines knows more ends


class PromptTruncated(UserWarning):
    """A prompt was longer than the text encoder takes; the message shows what was cut."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line; blank lines do not count. Raises `InputError`."""
    return list(read_numbered(path).values())


def read_numbered(path: Path) -> dict[int, str]:
    """The same by the numbers of their lines, from 1. ``-`` is standard input."""
    name = "standard input" if path == STDIN else str(path)
    data = b""
    try:
        data = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; expected a text file with a prompt per line") from None
    except UnicodeDecodeError as error:
        line = len(_LINE_END.findall(data[: error.start].decode("latin-1"))) + 1
        raise InputError(
            f"{name}: not a text in UTF-8; expected a text file with a prompt per line, and line {line} is none"
        ) from None
    lines = enumerate(map(str.strip, _LINE_END.split(text)), start=1)
    if not (prompts := {number: line for number, line in lines if line}):
        raise InputError(f"{name}: no prompt in it; expected one per line")
    return prompts
