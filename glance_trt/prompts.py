"""Prompts: read from a file, one per line, and cut where they are too long."""

from __future__ import annotations

from pathlib import Path

from glance_trt.errors import InputError


class PromptTruncated(UserWarning):
    """A prompt was longer than the text encoder takes; the message shows what was cut."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line; blank lines do not count. Raises `InputError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a text file with a prompt per line") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text in UTF-8; expected a text file with a prompt per line") from None
    if not (prompts := [line.strip() for line in text.splitlines() if line.strip()]):
        raise InputError(f"{path}: no prompt in it; expected one per line")
    return prompts
