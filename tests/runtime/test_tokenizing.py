"""Tokens are those of transformers' CLIPTokenizer; what was cut is told; bad prompts and files are refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from glance_trt.errors import BundleError, InputError
from glance_trt.runtime.tokenizing import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[2] / "examples/shapes/model/tokenizer"
FILE = FOLDER / "tokenizer.json"
START, END = 0, 1

CORPUS = [
    "",
    " ",
    "a large red circle left of a small blue star",
    "A LARGE Red CiRcLe",
    "  leading,\t tabs \n newlines \u00a0 and \u3000 wide spaces  ",
    "🔥 a 👩\u200d👩\u200d👧\u200d👦 family, 👋🏽 skin, 🇩🇪 flag",
    "漢字とかな 한국어 \u1112\u1161\u11ab",
    "cafe\u0301 n\u0303 a\u0308\u0323 caf\u00e9 Z\u0351\u036b\u0343a\u0363lgo",
    "don't I'll we've 'tis ... --- !?!? (parentheses) [brackets] #tag @you a_b-c/d\\e",
    "3 apples, 12345 stars, ٣٤ ४ Ⅷ ½",
    "İstanbul ıßẞ ΣΑΣ ﬃ ǅ",
    "<|endoftext|> and <|startoftext|> inside <|endoftext",
    "nul \x00 bell \x07 unit \x1f zero\u200bwidth \ufeffmark",
    "long " * 100,
    "🔥" * 40,
    "x" * 500,
]


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(FOLDER)


def random_prompts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabet = sorted(set("".join(CORPUS)) | set("'s't're've'm'll'd<|>  \n"))
    return ["".join(rng.choices(alphabet, k=rng.choice([1, 5, 20, 80]))) for _ in range(count)]


def test_a_file_that_makes_the_library_panic_is_refused_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    file.write_text(json.dumps(json.loads(FILE.read_text()) | {"normalizer": broken}))
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer that this version of tokenizers reads: "):
        Tokenizer(file, max_length=77, pad_token_id=1)


@pytest.mark.parametrize("max_length", [3, 32, 77])
def test_ids_equal_those_of_the_clip_tokenizer(clip: CLIPTokenizer, max_length: int) -> None:
    tokenizer = Tokenizer(FILE, max_length=max_length, pad_token_id=END)
    for prompt in CORPUS + random_prompts(200):
        expected = clip(prompt, padding="max_length", truncation=True, max_length=max_length).input_ids
        ids = tokenizer.encode(prompt).ids
        assert ids.dtype == np.int64
        assert ids.tolist() == expected, prompt


def test_text_is_dropped_exactly_where_the_clip_tokenizer_truncates(clip: CLIPTokenizer) -> None:
    tokenizer = Tokenizer(FILE, max_length=16, pad_token_id=END)
    dropped_some = 0
    for prompt in CORPUS + random_prompts(200):
        dropped = tokenizer.encode(prompt).dropped
        assert prompt.endswith(dropped)
        assert (dropped != "") == (len(clip(prompt).input_ids) > 16), prompt
        dropped_some += dropped != ""
    assert 50 < dropped_some < 200


def test_dropped_is_the_prompt_as_written_from_the_first_lost_word() -> None:
    tokenizer = Tokenizer(FILE, max_length=6, pad_token_id=END)
    encoded = tokenizer.encode("  A  LARGE\tRed circle   Left of\na Star ")
    assert encoded.dropped == "Left of\na Star "
    assert encoded.ids.tolist() == tokenizer.encode("a large red circle").ids.tolist()


def test_dropped_keeps_combining_marks_and_starts_with_the_character_that_the_cut_goes_through() -> None:
    # e + acute is composed into one character, so offsets after it shift, and the one at the end leaves the acute out
    accented = Tokenizer(FILE, max_length=3, pad_token_id=END).encode("e\u0301 star e\u0301")
    assert accented.dropped == "star e\u0301"
    assert Tokenizer(FILE, max_length=5, pad_token_id=END).encode("star 🔥 red").dropped == "🔥 red"  # 4 tokens, 2 fit


def test_the_mask_is_that_of_the_clip_tokenizer(clip: CLIPTokenizer) -> None:
    tokenizer = Tokenizer(FILE, max_length=16, pad_token_id=END)
    for prompt in CORPUS + random_prompts(100):
        expected = clip(prompt, padding="max_length", truncation=True, max_length=16).attention_mask
        mask = tokenizer.encode(prompt).mask
        assert mask.dtype == np.int64
        assert mask.tolist() == expected, prompt


# --- templates, and tokenizers of other kinds -----------------------------------------------------------------------


def byte_level(folder: Path) -> PreTrainedTokenizerFast:
    """Of Qwen2's kind: bytes, marks of a chat, and nothing added by the post-processor."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer = tokenizers.normalizers.NFC()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS * 3, trainer)
    inner.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>", padding_side="right")


def sentence_piece(folder: Path) -> PreTrainedTokenizerFast:
    """Of T5's kind: pieces that begin with a mark for the space before them, and an end token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    inner.normalizer = tokenizers.normalizers.NFKC()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(CORPUS * 3, trainer)
    end = inner.token_to_id("</s>")
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", end)])
    inner.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", padding_side="right")


CHAT = "<|im_start|>system\nDescribe:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", ["{}", CHAT, "{} in oil", " \n{}\t"])
@pytest.mark.parametrize("kind", [byte_level, sentence_piece])
@pytest.mark.parametrize("max_length", [70, 100])
def test_ids_and_mask_are_those_of_transformers_for_the_text_in_its_template(
    tmp_path: Path, kind: Callable[[Path], PreTrainedTokenizerFast], template: str, max_length: int
) -> None:
    theirs = kind(tmp_path)
    pad = theirs.pad_token_id
    ours = Tokenizer(tmp_path / "tokenizer.json", max_length=max_length, pad_token_id=pad, template=template)
    cut = 0
    for prompt in [*CORPUS, "{}", "a {} b {", "<|im_end|> a <|im_start|>", "</s>", *random_prompts(150)]:
        text = template.replace("{}", prompt)
        expected = theirs(text, padding="max_length", truncation=True, max_length=max_length)
        found = ours.encode(prompt)
        assert found.ids.tolist() == expected.input_ids, prompt
        assert found.mask.tolist() == expected.attention_mask, prompt
        assert prompt.endswith(found.dropped)
        cut += len(theirs(text).input_ids) > max_length
    assert cut


def test_the_template_s_end_is_lost_before_the_prompt_s_and_is_no_loss_of_it() -> None:
    template = "a {} and no stars"
    tokenizer = Tokenizer(FILE, max_length=10, pad_token_id=END, template=template)  # 8 besides start and end
    dropped = [tokenizer.encode(" ".join(["red"] * count)).dropped for count in range(1, 10)]
    assert dropped == ["", "", "", "", "", "", "", "red", "red red"]
    plain = Tokenizer(FILE, max_length=10, pad_token_id=END)
    assert tokenizer.encode("red " * 9).ids.tolist() == plain.encode("a" + " red" * 9).ids.tolist()


def test_a_template_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(BundleError, match=r"max_length: got 5; the template alone takes as many tokens$"):
        Tokenizer(FILE, max_length=5, pad_token_id=END, template="a large red {}")
    assert (
        Tokenizer(FILE, max_length=5, pad_token_id=END, template="a red {} star star star").encode("blue").dropped == ""
    )


def test_a_prompt_that_just_fits_drops_nothing() -> None:
    exact = Tokenizer(FILE, max_length=6, pad_token_id=END).encode("a large red circle ")
    assert exact.dropped == ""
    assert exact.ids[0] == START
    assert exact.ids[5] == END
    assert END not in exact.ids[1:5]


def test_an_empty_prompt_is_start_end_and_padding() -> None:
    encoded = Tokenizer(FILE, max_length=5, pad_token_id=300).encode("")
    assert encoded.ids.tolist() == [START, END, 300, 300, 300]
    assert encoded.dropped == ""


def test_truncation_and_padding_of_the_file_itself_are_switched_off() -> None:
    plain = Tokenizer(FILE, max_length=32, pad_token_id=END).encode(CORPUS[2])
    content = json.loads(FILE.read_text())
    content["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 9,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    other = Tokenizer(json.dumps(content).encode(), max_length=32, pad_token_id=END).encode(CORPUS[2])
    assert other.ids.tolist() == plain.ids.tolist()
    assert other.dropped == ""


@pytest.mark.parametrize(("prompt", "kind"), [(7, "int"), (None, "NoneType"), (b"star", "bytes"), (["star"], "list")])
def test_a_prompt_that_is_no_text_is_refused(prompt: object, kind: str) -> None:
    with pytest.raises(InputError, match=f"^prompt: got {kind}; a prompt is text$"):
        Tokenizer(FILE, max_length=32, pad_token_id=END).encode(prompt)  # type: ignore[arg-type]


def test_a_prompt_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InputError, match=r"^prompt: got the surrogate U\+D83D at character 2; .* UTF-8"):
        Tokenizer(FILE, max_length=32, pad_token_id=END).encode("a \ud83d star")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"version": "9.0"}', b"[" * 10_000])
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer that this version of tokenizers reads: ."):
        Tokenizer(path, max_length=32, pad_token_id=END)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.json: cannot be read: No such file or directory$"):
        Tokenizer(tmp_path / "none.json", max_length=32, pad_token_id=END)


def test_a_file_on_which_the_tokenizers_library_panics_is_refused() -> None:
    content = json.loads(FILE.read_text())
    content["normalizer"]["normalizers"][1]["pattern"]["Regex"] = "\\s?"  # matches the empty string
    tokenizer = Tokenizer(json.dumps(content).encode(), max_length=32, pad_token_id=END)
    with pytest.raises(BundleError, match=r"^tokenizer\.json: fails on a prompt, so the file is not sound: "):
        tokenizer.encode("a large red circle 🔥 'hello")


@pytest.mark.parametrize("pad", [-1, 694, 2**40])
def test_a_padding_token_outside_the_vocabulary_is_refused(pad: int) -> None:
    with pytest.raises(BundleError, match=f"pad_token_id: got {pad}; no token of the vocabulary has this id"):
        Tokenizer(FILE, max_length=32, pad_token_id=pad)


@pytest.mark.parametrize("max_length", [-1, 0, 2])
def test_a_length_without_room_for_a_prompt_is_refused(max_length: int) -> None:
    with pytest.raises(BundleError, match=f"max_length: got {max_length}; 2 are taken by the start and end tokens"):
        Tokenizer(FILE, max_length=max_length, pad_token_id=END)


def test_importing_the_module_does_not_import_tokenizers() -> None:
    code = "import sys, glance_trt.runtime.tokenizing; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
