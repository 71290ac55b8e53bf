"""Prompts to conditions: a bundle's tokenizers and text encoders, and what they last made of prompts."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from glance_trt.bundle import Bundle
from glance_trt.errors import InputError
from glance_trt.prompts import PromptTruncated
from glance_trt.runtime.tokenizing import Encoded, Tokenizer

Embeddings = dict[str, NDArray[Any]]
"""What all text encoders put out for one prompt, by name, each [1, ...] and of any dtype; shared and read-only."""
Run = Callable[[str, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""`Runner.run`."""

_CACHED_PROMPTS = 64
_CACHED_BYTES = 256 << 20
_SHOWN_TEXT = 200  # characters of a cut prompt that a warning shows


@dataclass(frozen=True, eq=False)
class Tokens:
    """A prompt as the text encoders take it: by graph and port, each [1, max_length] int64. key: the same for prompts
    that are the same to them."""

    feeds: dict[str, dict[str, NDArray[Any]]]
    key: bytes


class TextEncoders:
    """May be used from several threads at once."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._sources = {
            graph: [(port.name, *port.source.partition(".")[::2]) for port in manifest.graphs[graph].inputs]
            for graph in manifest.text_encoders()
        }
        used = {tokenizer for ports in self._sources.values() for _, _, tokenizer in ports}
        self._tokenizers = {
            name: Tokenizer(
                bundle.path(item.file),
                max_length=item.max_length,
                pad_token_id=item.pad_token_id,
                template=item.template,
            )
            for name, item in manifest.tokenizers.items()
            if name in used
        }
        self._lengths = {name: manifest.tokenizers[name].max_length for name in used}
        self._known: OrderedDict[bytes, Embeddings] = OrderedDict()
        self._lock = threading.Lock()

    def tokenize(self, prompt: str, name: str = "prompt") -> Tokens:
        """Warn of what no text encoder sees (`PromptTruncated`). name: what errors and warnings call the prompt. Raises
        `InputError` for one that is no text."""
        try:
            encoded = {tokenizer: item.encode(prompt) for tokenizer, item in self._tokenizers.items()}
        except InputError as error:
            raise InputError(str(error).replace("prompt", name, 1)) from None
        self._warn(encoded, name)
        feeds = {
            graph: {
                port: (encoded[tokenizer].mask if kind == "mask" else encoded[tokenizer].ids)[None]
                for port, kind, tokenizer in ports
            }
            for graph, ports in self._sources.items()
        }
        return Tokens(feeds, b"".join(array.tobytes() for ports in feeds.values() for array in ports.values()))

    def encode(self, prompts: Sequence[Tokens], run: Run) -> list[Embeddings]:
        """What the text encoders make of prompts; of those that were seen lately, without running them.

        Each text encoder takes all prompts before the next one begins, so that a runner that holds one engine at a time
        opens each once.
        """
        found: dict[bytes, Embeddings] = {}
        with self._lock:
            for tokens in prompts:
                if tokens.key in self._known:
                    self._known.move_to_end(tokens.key)
                    found[tokens.key] = self._known[tokens.key]
        new = {tokens.key: tokens for tokens in prompts if tokens.key not in found}
        made: dict[bytes, Embeddings] = {key: {} for key in new}
        for graph in self._sources:
            for key, tokens in new.items():
                for output, value in run(graph, tokens.feeds[graph]).items():
                    value.flags.writeable = False
                    made[key][output] = value
        with self._lock:
            self._known |= made
            while len(self._known) > _CACHED_PROMPTS or self._nbytes() > _CACHED_BYTES:
                self._known.popitem(last=False)
        return [(found | made)[tokens.key] for tokens in prompts]

    def _nbytes(self) -> int:
        return sum(value.nbytes for embeddings in self._known.values() for value in embeddings.values())

    def _warn(self, encoded: Mapping[str, Encoded], name: str) -> None:
        # The tokenizer with the most room decides: what it has kept, a text encoder has seen.
        tokenizer = min(encoded, key=lambda tokenizer: len(encoded[tokenizer].dropped))
        if cut := encoded[tokenizer].dropped.strip():
            cut = cut if len(cut) <= _SHOWN_TEXT else f"{cut[: _SHOWN_TEXT - 3]}..."
            limit = self._lengths[tokenizer]
            text = f"{name}: longer than the {limit} tokens of the text encoder; cut: {cut!r}"
            warnings.warn(text, PromptTruncated, stacklevel=2)
