"""Tokens are those of the Python runtime, token for token, for the tokenizers of every family."""

from __future__ import annotations

import json
import random
import string
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glance_trt.errors import BundleError
from glance_trt.runtime.tokenizing import Tokenizer

from ..models import qwen_image
from ..runtime.test_tokenizing import CORPUS
from ..runtime.test_tokenizing import FILE as CLIP

TEXTS = [text for text in CORPUS if "\0" not in text] + [
    "a e\u0301\u0323 \u1112\u1161\u11ab\u1112 \u0344 \u212b \u2126 \ufb01 \uff21 \u2460 \u33a1 \u3000 \ufdfa",
    "\u0301 starts with a mark, \u0b92\u0bbe and \u0915\u094d\u0937\u093f",
    "\r\n\r\n  two\r\n\r\rlines\n \n\t\v\x85 end  ",
    "I'LL we'VE don'\u017f 'S '\u017f",
    "\u2581already \u2581\u2581marked\u2581",
    "<pad></s><unk> <extra_id_0> x<|im_start|>user\n<|im_end|><|im_start|",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f \u2764\ufe0f \U0001f468\u200d\U0001f4bb",
    "\ufffd \ufeff \u00ad \u200b \u2028 \u2029 \u180e \u1680 \ue000 \U0010ffff",
]
RESULT = tuple[list[int], list[int], str]


def _random(count: int) -> list[str]:
    rng = random.Random(0)
    letters = sorted(set("".join(TEXTS)) - {"\0"})
    plain = [point for point in map(chr, range(1, 0x2FFFF)) if point.isprintable()]
    found = []
    for _ in range(count):
        pool = rng.choice([letters, plain, string.printable])
        found.append("".join(rng.choices(pool, k=rng.choice([1, 3, 10, 60]))))
    return found


def _t5() -> str:
    """With the table of characters of SentencePiece's models, such as T5's, and a vocabulary in which the ways to cut a
    word compete."""
    import sentencepiece
    from transformers import T5TokenizerFast

    rng = random.Random(1)
    spans = [(begin, begin + length) for begin in range(8) for length in range(1, 5)]
    words = sorted({word[begin:end] for word in " ".join(CORPUS).split() for begin, end in spans} - {""})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, rng.uniform(-9, -5)) for letter in string.ascii_letters if letter not in "qQ"]
    known = {token for token, _ in vocabulary}
    found = [mark + word for word in words for mark in ("", "▁")]
    vocabulary += [(token, rng.uniform(-12, -5)) for token in found if token not in known]
    model = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto()
    made = T5TokenizerFast(vocab=vocabulary, extra_ids=0, _spm_precompiled_charsmap=_charsmap(model))
    return str(made.backend_tokenizer.to_str())


def _charsmap(model: bytes) -> bytes:
    """ModelProto.normalizer_spec.precompiled_charsmap of sentencepiece_model.proto."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (model[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if model[at - 1] < 0x80:
                return value, at

    at = 0
    for wanted in (3, 2):
        while True:
            key, at = number(at)
            size, at = number(at)
            assert key & 7 == 2, "fields before it are texts and messages"
            if key >> 3 == wanted:
                break
            at += size
    return model[at : at + size]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """A tokenizer.json for each family of tokenizers, and a template."""
    folder = tmp_path_factory.mktemp("tokenizers")
    t5, qwen = folder / "t5.json", folder / "qwen.json"
    t5.write_text(_t5())
    qwen.write_text(qwen_image.tokenizer().backend_tokenizer.to_str())
    return {"clip": (CLIP, "{}"), "t5": (t5, "{}"), "qwen": (qwen, qwen_image.TEMPLATE)}


def _natively(
    build: Path, file: Path, length: int, pad: int, template: str, prompts: list[str]
) -> subprocess.CompletedProcess[bytes]:
    program = build / "tests/glance_tokenize"
    given = b"".join(prompt.encode() + b"\0" for prompt in prompts)
    return subprocess.run(
        [program, file, str(length), str(pad), template], input=given, capture_output=True, check=False
    )


def _results(printed: bytes) -> list[RESULT]:
    found = []
    for line in printed.decode().splitlines():
        numbers, dropped = line.split("\t")
        ids = numbers.split(" ")
        mask = [int(item[0] != "-") for item in ids]
        found.append(([int(item.lstrip("-")) for item in ids], mask, json.loads(dropped)))
    return found


@pytest.mark.parametrize("length", [48, 80, 4096])
@pytest.mark.parametrize("kind", ["clip", "t5", "qwen"])
def test_tokens_are_those_of_the_tokenizers_library(
    build: Path, files: dict[str, tuple[Path, str]], kind: str, length: int
) -> None:
    file, template = files[kind]
    tokenizer = Tokenizer(file, max_length=length, pad_token_id=1, template=template)
    prompts = TEXTS + _random(3000)
    shown = _natively(build, file, length, 1, template, prompts)
    assert shown.returncode == 0, shown.stderr
    results = _results(shown.stdout)
    assert len(results) == len(prompts)
    for prompt, (ids, mask, dropped) in zip(prompts, results, strict=True):
        expected = tokenizer.encode(prompt)
        assert ids == expected.ids.tolist(), prompt
        assert mask == expected.mask.tolist(), prompt
        # A cut through marks that normalisation composes or sorts is told a mark or two away.
        assert prompt.endswith(dropped)
        assert abs(len(dropped) - len(expected.dropped)) <= (0 if prompt in TEXTS else 3)


def test_a_long_word_takes_no_longer_than_its_letters(build: Path) -> None:
    words = ["x" * 200_000, "ab" * 100_000, "🔥" * 50_000, " " * 200_000 + "a"]
    shown = _natively(build, CLIP, 77, 1, "{}", words)
    expected = [Tokenizer(CLIP, max_length=77, pad_token_id=1).encode(word).ids.tolist() for word in words]
    assert [ids for ids, _, _ in _results(shown.stdout)] == expected


def _changed(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(CLIP.read_text())
    return content | changes


def _table(text: str) -> dict[str, Any]:
    return _changed(normalizer={"type": "Precompiled", "precompiled_charsmap": text})


PAIR = {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}
UNKNOWN = {"type": "Unigram", "vocab": [["a", 0]], "unk_id": 1}


@pytest.mark.parametrize(
    ("content", "length", "pad", "text"),
    [
        ("{", 77, 1, "tokenizer.json: not a tokenizer that can be read: "),
        ("[]", 77, 1, "tokenizer.json: not a tokenizer that can be read: expected keys and values"),
        ({}, 77, 1, "tokenizer.json: not a tokenizer that can be read: model is missing"),
        (_changed(), 77, 9999, "tokenizer.json: pad_token_id: got 9999; no token of the vocabulary has this id"),
        (_changed(), 2, 1, "tokenizer.json: max_length: got 2; 2 are taken by the start and end tokens"),
        (_changed(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}), 77, 0, "model.vocab: expected the id of a"),
        (_changed(model=PAIR), 77, 0, "a merge of what is not in the vocabulary"),
        (_changed(model=UNKNOWN), 77, 0, "unk_id: no token of the vocabulary has this id"),
        (_table("AAAA"), 77, 0, "not a table of characters"),
        (_table("?"), 77, 0, "not base64"),
    ],
)
def test_files_that_the_python_runtime_refuses_are_refused(
    build: Path, tmp_path: Path, content: Any, length: int, pad: int, text: str
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    shown = _natively(build, file, length, pad, "{}", ["a"])
    assert (shown.returncode, shown.stderr[:2]) == (1, b"6 ")
    assert text in shown.stderr.decode()
    with pytest.raises(BundleError):
        Tokenizer(file, max_length=length, pad_token_id=pad).encode("a")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"normalizer": {"type": "BertNormalizer"}}, "normalizer: 'BertNormalizer' is not supported"),
        ({"pre_tokenizer": {"type": "Punctuation"}}, "pre_tokenizer: 'Punctuation' is not supported"),
        ({"model": {"type": "WordPiece"}}, "model: 'WordPiece' is not supported"),
        ({"post_processor": {"type": "Other"}}, "post_processor: 'Other' is not supported"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "(?<a>x)"}, "content": ""}},
            "normalizer.pattern.Regex: the regular expression has '(?<a', which is not supported",
        ),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "\\h+"}, "content": ""}},
            "normalizer.pattern.Regex: the regular expression has '\\\\h', which is not supported",
        ),
    ],
)
def test_what_this_version_cannot_do_is_unsupported_by_name(
    build: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(_changed(**changes)))
    shown = _natively(build, file, 77, 1, "{}", ["a"])
    assert (shown.returncode, shown.stderr[:3]) == (1, b"12 ")
    assert f"tokenizer.json: {text}" in shown.stderr.decode()
    assert "give token ids in place of prompts" in shown.stderr.decode()


def test_damaged_files_end_in_an_error(build: Path, tmp_path: Path, files: dict[str, tuple[Path, str]]) -> None:
    rng = np.random.default_rng(0)
    for kind in ("clip", "t5"):
        data = bytearray(files[kind][0].read_bytes())
        for i in range(30):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 20):
                damaged[place] = rng.integers(32, 127)
            file = tmp_path / f"{kind}{i}.json"
            file.write_bytes(damaged)
            shown = _natively(build, file, 32, 1, "{}", TEXTS[:12])
            assert shown.returncode in (0, 1), shown.returncode
            assert shown.returncode == 0 or shown.stderr.split()[0] in (b"6", b"12")
