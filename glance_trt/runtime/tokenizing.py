"""Prompts to token ids, by the `tokenizer.json` of a bundle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import BundleError, InputError
from glance_trt.schema import PROMPT

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, eq=False)
class Encoded:
    """One prompt as token ids.

    Attributes:
        ids: [max_length] int64: the start token, the prompt in its template, the end token, padding.
        mask: [max_length] int64: 1 for tokens, the start and the end token included, 0 for padding.
        dropped: the end of the prompt that did not fit, as the user wrote it; '' if all of it did. Where the cut goes
            through a character (a byte-level vocabulary spells an emoji in several tokens), it starts with that one.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    dropped: str


class Tokenizer:
    """A tokenizer of fixed length over a `tokenizer.json`. May be used from several threads at once.

    Args:
        source: path of the file, or its bytes.
        max_length: tokens in every encoding, those that the file's post-processor adds included (77 for CLIP).
        pad_token_id: fills the encoding after the end token. The file's own truncation and padding are switched off.
        template: what is encoded, with the prompt in the place of its ``{}``.

    Raises:
        BundleError: the file cannot be read, is no tokenizer, has no such padding token, or adds so many tokens, with
            those of the template before the prompt, that `max_length` leaves none for the prompt.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        max_length: int,
        pad_token_id: int,
        template: str = PROMPT,
    ) -> None:
        import tokenizers  # here, for a command that encodes no prompt need not wait for it

        name = "tokenizer.json" if isinstance(source, bytes) else os.fspath(source)
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
        except OSError as error:
            raise BundleError(f"{name}: cannot be read: {error.strerror}") from error
        with _sound(f"{name}: not a tokenizer that this version of tokenizers reads"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if not 0 <= pad_token_id < 2**32 or self._tokenizer.id_to_token(pad_token_id) is None:
            raise BundleError(f"{name}: pad_token_id: got {pad_token_id}; no token of the vocabulary has this id")
        added = self._tokenizer.num_special_tokens_to_add(False)
        if max_length <= added:
            raise BundleError(f"{name}: max_length: got {max_length}; {added} are taken by the start and end tokens")
        self._unsound = f"{name}: fails on a prompt, so the file is not sound"
        self._room = max_length - added
        self._max_length = max_length
        self._pad_token_id = pad_token_id
        self._before, _, self._after = template.partition(PROMPT)
        if self._before and len(self._tokens(self._before)) >= self._room:
            raise BundleError(f"{name}: max_length: got {max_length}; the template alone takes as many tokens")

    def encode(self, prompt: str) -> Encoded:
        """Encode a prompt; one that is too long loses its end, never the end token. What stands in the template after
        the prompt is lost first.

        Token for token what `transformers` gives for the prompt in its template, with `padding="max_length",
        truncation=True` and padding on the right.

        Raises:
            InputError: `prompt` is not a str, or holds surrogates, which no UTF-8 text does.
            BundleError: the file loads, and yet cannot encode.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt: got {type(prompt).__name__}; a prompt is text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            found = f"U+{ord(prompt[error.start]):04X} at character {error.start}"
            raise InputError(f"prompt: got the surrogate {found}; a prompt is text that UTF-8 can hold") from error
        encoding = self._tokens(self._before + prompt + self._after)
        dropped = ""
        if len(encoding) > self._room:
            # To the end of the prompt: an offset's end may leave out combining marks that normalisation composed.
            dropped = prompt[max(encoding.offsets[self._room][0] - len(self._before), 0) :]
            encoding.truncate(self._room)
        with _sound(self._unsound):
            encoding = self._tokenizer.post_process(encoding)
        ids, mask = np.full(self._max_length, self._pad_token_id, np.int64), np.zeros(self._max_length, np.int64)
        ids[: len(encoding)], mask[: len(encoding)] = encoding.ids, 1
        return Encoded(ids, mask, dropped)

    def _tokens(self, text: str) -> tokenizers.Encoding:
        with _sound(self._unsound):
            return self._tokenizer.encode(text, add_special_tokens=False)


@contextlib.contextmanager
def _sound(what: str) -> Iterator[None]:
    """Turns what the tokenizers library raises into a `BundleError` that begins with `what`."""
    try:
        yield
    except BaseException as error:
        # tokenizers 0.23 panics on some malformed files, and a panic in Rust arrives as a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{what}: {error}") from error
