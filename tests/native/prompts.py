"""Prompts as token ids, by the Python package."""

from __future__ import annotations

from pathlib import Path

from glance_trt.bundle import Bundle
from glance_trt.runtime.tokenizing import Tokenizer

Tokens = dict[str, list[int]]
"""Ids without padding, by tokenizer."""


def tokens(folder: Path, prompt: str) -> Tokens:
    """What all tokenizers of a bundle make of a prompt."""
    found = {}
    for name, item in Bundle.open(folder).manifest.tokenizers.items():
        tokenizer = Tokenizer(
            folder / item.file, max_length=item.max_length, pad_token_id=item.pad_token_id, template=item.template
        )
        encoded = tokenizer.encode(prompt)
        found[name] = [int(token) for token in encoded.ids[encoded.mask == 1]]
    return found
