"""Every text encoder is fed as its tokenizer and its mask say, each prompt once; what no encoder saw is told."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glance_trt import schema
from glance_trt.errors import BundleError, InputError
from glance_trt.prompts import PromptTruncated
from glance_trt.runtime import prompting
from glance_trt.runtime.pipeline import Pipeline, Request
from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner

from ..models import rich, tiny
from .recorder import Recorder

PROMPT = "a large red circle"
ENCODERS = ["text_encoder", "text_encoder_2"]


@pytest.mark.parametrize("prompt", [PROMPT, "a", "red " * 40, "🔥 {}"])
def test_text_encoders_are_fed_tokens_and_masks(rich_pipeline: Pipeline, prompt: str) -> None:
    recorder, expected = Recorder(rich_pipeline), rich.tokens(prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncated)
        found = rich_pipeline.encode(prompt)
    assert recorder.graphs == ENCODERS
    for (_, feeds), wanted in zip(
        recorder.calls,
        ({"input_ids": expected["ids"]}, {"input_ids": expected["ids_2"], "attention_mask": expected["mask_2"]}),
        strict=True,
    ):
        assert feeds.keys() == wanted.keys()
        for port, value in feeds.items():
            assert value.dtype == np.int64
            np.testing.assert_array_equal(value, wanted[port])
    conditions = rich.encode(**expected)
    assert found.keys() == conditions.keys()
    for name, value in found.items():
        assert value.dtype == conditions[name].dtype
        np.testing.assert_array_equal(value, conditions[name])


def test_conditions_of_any_dtype_reach_every_step_as_batches(rich_pipeline: Pipeline) -> None:
    recorder = Recorder(rich_pipeline)
    requests = [Request(PROMPT, 1), Request("a star", 2), Request(PROMPT, 3)]
    list(rich_pipeline.draw(requests, rich_pipeline.settings()))
    own = [rich.encode(**rich.tokens(prompt)) for prompt in (PROMPT, "a star", PROMPT)]
    negative = rich.encode(**rich.tokens(tiny.GUIDANCE.negative_prompt))
    steps = [feeds for graph, feeds in recorder.calls if graph.startswith("denoiser.")]
    assert len(steps) == 4
    for feeds in steps:
        for name, value in negative.items():
            assert feeds[name].dtype == value.dtype
            np.testing.assert_array_equal(feeds[name], np.concatenate([conditions[name] for conditions in own]))
            np.testing.assert_array_equal(feeds[f"negative_{name}"], np.repeat(value, 3, axis=0))


def test_a_prompt_that_was_seen_runs_no_text_encoder(rich_pipeline: Pipeline) -> None:
    recorder = Recorder(rich_pipeline)
    rich_pipeline.generate(PROMPT)
    assert [recorder.graphs.count(graph) for graph in ENCODERS] == [2, 2]
    rich_pipeline.generate(PROMPT, seed=5, guidance_scale=1.5)
    rich_pipeline.generate(tiny.GUIDANCE.negative_prompt, negative_prompt=PROMPT)
    assert [recorder.graphs.count(graph) for graph in ENCODERS] == [2, 2]
    rich_pipeline.generate("a star")
    assert [recorder.graphs.count(graph) for graph in ENCODERS] == [3, 3]


def test_prompts_that_differ_in_their_mask_alone_are_not_mixed_up(tmp_path: Path) -> None:
    plain = {
        name: schema.Tokenizer("tokenizer.json", length, pad_token_id=1)
        for name, length in (("tokenizer", tiny.LENGTH), ("tokenizer_2", rich.LENGTH))
    }
    with Pipeline.open(rich.make_bundle(tmp_path / "plain", tokenizers=plain)) as pipeline:
        recorder = Recorder(pipeline)
        short, long = pipeline.encode("a"), pipeline.encode("a <|endoftext|>")  # whose id is that of padding
        (_, (_, first), _, (_, second)) = recorder.calls
    np.testing.assert_array_equal(first["input_ids"], second["input_ids"])
    assert (short["mask_2"].sum(), long["mask_2"].sum()) == (3, 4)


def test_what_a_text_encoder_with_more_room_saw_is_no_loss(rich_pipeline: Pipeline) -> None:
    words = ["red"] * 30
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptTruncated)
        rich_pipeline.encode(" ".join(words[:17]))  # 18 besides start and end, and the template's own word before
    text = r"^prompt: longer than the 20 tokens of the text encoder; cut: 'red red red'$"
    with pytest.warns(PromptTruncated, match=text):
        rich_pipeline.encode(" ".join(words[:20]))


def test_a_prompt_is_warned_of_once_by_the_name_it_was_given(rich_pipeline: Pipeline) -> None:
    long = "red " * 18
    requests = [Request(long, seed, f"prompt in line {line}") for line in (3, 9) for seed in range(5)]
    with pytest.warns(PromptTruncated) as caught:
        list(rich_pipeline.draw(requests, rich_pipeline.settings(), batch_size=2))
    assert [str(warning.message).partition(":")[0] for warning in caught] == ["prompt in line 3", "prompt in line 9"]


def test_what_is_wrong_with_any_prompt_is_said_before_anything_runs(rich_pipeline: Pipeline) -> None:
    recorder = Recorder(rich_pipeline)
    good: Any = [Request(PROMPT, seed) for seed in range(3)]
    for prompt, text in (
        ("", "empty; say what the image should show"),
        ("a \ud83d", r"got the surrogate U\+D83D at character 2; a prompt is text that UTF-8 can hold"),
        (["a"], "got list; a prompt is text"),
    ):
        with pytest.raises(InputError, match=f"^prompt in line 7: {text}$"):
            rich_pipeline.draw([*good, Request(prompt, 0, "prompt in line 7")], rich_pipeline.settings())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^seed: got 18446744073709551616; "):
        rich_pipeline.draw([*good, Request(PROMPT, 2**64)], rich_pipeline.settings())
    assert recorder.calls == []


def test_embeddings_are_kept_up_to_a_number_of_bytes(rich_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    one = sum(value.nbytes for value in rich_pipeline.encode("a").values())
    monkeypatch.setattr(prompting, "_CACHED_BYTES", 3 * one)
    recorder = Recorder(rich_pipeline)
    for prompt in ("red", "blue", "a", "star"):
        rich_pipeline.encode(prompt)
    assert recorder.graphs.count("text_encoder") == 3
    rich_pipeline.encode("a")
    rich_pipeline.encode("blue")  # made room for the star
    rich_pipeline.encode("red")
    assert recorder.graphs.count("text_encoder") == 4


def test_tokenizers_that_no_text_encoder_uses_are_not_read(tmp_path: Path) -> None:
    unused = {"tokenizer_3": schema.Tokenizer("other.json", 8, 1)}
    folder = tiny.make_bundle(
        tmp_path / "bundle",
        extra={"other.json": b"no tokenizer"},
        tokenizers={"tokenizer": schema.Tokenizer("tokenizer.json", tiny.LENGTH, 1), **unused},
    )
    with Pipeline.open(folder) as pipeline:
        assert pipeline.encode("a star")


def test_a_template_without_room_for_a_prompt_makes_the_bundle_unusable(tmp_path: Path) -> None:
    full = {
        "tokenizer": schema.Tokenizer("tokenizer.json", tiny.LENGTH, 1),
        "tokenizer_2": schema.Tokenizer("tokenizer.json", rich.LENGTH, 1, "red " * 20 + "{}"),
    }
    folder = rich.make_bundle(tmp_path / "full", tokenizers=full)
    with pytest.raises(BundleError, match=r"tokenizer\.json: max_length: got 20; the template alone takes as many"):
        Pipeline.open(folder)


# --- low memory -----------------------------------------------------------------------------------------------------


def test_low_memory_opens_each_engine_once_for_many_prompts_and_holds_no_other(
    rich_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    alive: list[weakref.ref[Any]] = []
    held: list[int] = []
    real = OnnxRuntimeRunner._open

    def spy(runner: OnnxRuntimeRunner, file: str) -> Any:
        held.append(sum(session() is not None for session in alive))
        session = real(runner, file)
        opened.append(file.removesuffix(".onnx"))
        alive.append(weakref.ref(session))
        return session

    requests = [Request(f"a star {i}", i) for i in range(11)]
    with Pipeline.open(rich_bundle, threads=1) as pipeline:
        expected = [image.tobytes() for image in pipeline.draw(requests, pipeline.settings(), batch_size=3)]
    monkeypatch.setattr(OnnxRuntimeRunner, "_open", spy)
    with Pipeline.open(rich_bundle, threads=1, low_memory=True) as pipeline:
        found = [image.tobytes() for image in pipeline.draw(requests, pipeline.settings(), batch_size=3)]
    assert found == expected
    assert opened == [*ENCODERS, "denoiser.slow", "denoiser.fast", "decoder"]
    assert held == [0] * 5, "whatever was open was released before"


def test_low_memory_takes_64_images_at_a_time(rich_bundle: Path) -> None:
    requests = [Request(f"a star {i}", i) for i in range(70)]
    with Pipeline.open(rich_bundle, threads=1, low_memory=True) as pipeline:
        recorder = Recorder(pipeline)
        drawn = pipeline.draw(requests, pipeline.settings(schedule="any"), batch_size=10)
        assert recorder.calls == []
        next(drawn)
        assert changes(recorder.graphs) == [*ENCODERS, "denoiser.slow", "denoiser.fast", "decoder"]
        assert sizes(recorder.calls, "decoder") == [10] * 6
        assert recorder.graphs.count("text_encoder") == 61, "the negative prompt, too"
        list(drawn)
        assert sizes(recorder.calls, "decoder") == [10] * 7


def changes(graphs: list[str]) -> list[str]:
    return [graph for i, graph in enumerate(graphs) if i == 0 or graphs[i - 1] != graph]


def sizes(calls: list[tuple[str, Mapping[str, NDArray[Any]]]], graph: str) -> list[int]:
    return [len(feeds["latents"]) for name, feeds in calls if name == graph]
