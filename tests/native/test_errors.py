"""What cannot be made is refused as in Python: an error of the same kind, in the same words where there are such."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from glance_trt import schema
from glance_trt.errors import GlanceError
from glance_trt.runtime.pipeline import Pipeline

from ..hostile.attacks import put
from ..models import rich, tiny
from .abi import Bundle, Library, NativeError
from .prompts import tokens

PROMPT = "a large red circle"
PICTURE = np.zeros((8, 12, 3), np.uint8)


def refusal(act: Callable[[], object]) -> NativeError:
    with pytest.raises(NativeError) as caught:
        act()
    return caught.value


# --- wishes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 x 12, 12 x 8, 8 x 40 and 20 x 24; scales from 1 to 8."""
    guidance = schema.Guidance(scale=3.0, negative_prompt="a star", range=(1.0, 8.0))
    return rich.make_bundle(tmp_path_factory.mktemp("rich") / "rich.bundle", guidance=guidance)


@pytest.fixture(scope="module")
def both(native: Library, folder: Path) -> Iterator[tuple[Bundle, Pipeline]]:
    with native.open(folder, threads=1) as bundle, Pipeline.open(folder, threads=1) as pipeline:
        yield bundle, pipeline


@pytest.mark.parametrize(
    "wishes",
    [
        {"height": 12},
        {"height": 13, "width": 9},
        {"width": -12},
        {"height": 1024, "width": 1024},
        {"schedule": "no"},
        {"schedule": "usual", "width": 40},
        {"guidance_scale": float("nan")},
        {"guidance_scale": float("-inf")},
        {"guidance_scale": 1e39},
        {"guidance_scale": 0.5},
        {"guidance_scale": 9.25},
        {"count": 0},
        {"batch_size": -1},
        {"strength": 0.5},
        {"image": PICTURE, "strength": 1.5},
        {"image": PICTURE, "strength": float("nan")},
        {"image": PICTURE, "strength": 0.2},
        {"image": PICTURE, "strength": 0.0, "schedule": "any"},
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_met_is_refused_as_in_python(
    both: tuple[Bundle, Pipeline], folder: Path, wishes: dict[str, Any]
) -> None:
    bundle, pipeline = both
    with pytest.raises(GlanceError) as caught:
        pipeline.generate(PROMPT, **wishes)
    size = {"size": (wishes.get("height", 0), wishes.get("width", 0))}
    given = {name: value for name, value in wishes.items() if name not in ("height", "width")}
    error = refusal(lambda: bundle.generate(tokens=tokens(folder, PROMPT), **size, **given))
    assert (error.kind, str(error)) == ("input", str(caught.value))


def test_a_bundle_without_guidance_refuses_a_scale_and_a_negative_prompt(native: Library, tmp_path: Path) -> None:
    folder = tiny.make_bundle(tmp_path / "tiny.bundle", guidance="none")
    given = {"tokens": tokens(folder, PROMPT)}
    with native.open(folder) as bundle, Pipeline.open(folder) as pipeline:
        for native_wish, wish in (
            ({"guidance_scale": 2.0}, {"guidance_scale": 2.0}),
            ({"negative_tokens": given["tokens"]}, {"negative_prompt": "a star"}),
            ({"image": PICTURE}, {"image": PICTURE}),
        ):
            with pytest.raises(GlanceError) as caught:
                pipeline.generate(PROMPT, **wish)
            error = refusal(lambda wish=native_wish: bundle.generate(**given, **wish))
            assert (error.kind, str(error)) == ("input", str(caught.value))


def test_an_image_of_another_size_is_not_resized(both: tuple[Bundle, Pipeline], folder: Path) -> None:
    error = refusal(lambda: both[0].generate(tokens=tokens(folder, PROMPT), image=np.zeros((9, 13, 3), np.uint8)))
    assert error.kind == "unsupported"
    text = "image: 9 x 13 (height x width), and the size is 8 x 12; this library does not resize, give one of that size"
    assert str(error) == text


def test_latents_fit_the_images(both: tuple[Bundle, Pipeline], folder: Path) -> None:
    given = {"tokens": tokens(folder, PROMPT), "negative_tokens": tokens(folder, "")}
    error = refusal(lambda: both[0].generate(latents=np.zeros(10), count=2, **given))
    assert (error.kind, str(error)) == ("input", "latents: expected (2,3,4,6), which is 144 numbers, got 10")
    error = refusal(lambda: both[0].generate(latents=np.zeros(72), image=PICTURE, **given))
    assert str(error) == "latents: to start from, and an image as well; give one of them"


# --- prompts and tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wishes", "text"),
    [
        ({}, "prompt: there is none; say what the image should show"),
        ({"prompt": ""}, "prompt: empty; say what the image should show"),
        ({"prompt": " \n"}, "prompt: empty; say what the image should show"),
        ({"prompt": b"a \xff star"}, "prompt: not UTF-8 at byte 2; a prompt is text"),
        ({"tokens": {"no": [1]}}, "prompt: tokens of 'no': this bundle has the tokenizers tokenizer, tokenizer_2"),
        (
            {"tokens": {"tokenizer": [1]}},
            "prompt: tokens of 'tokenizer_2': missing; this bundle takes those of tokenizer, tokenizer_2",
        ),
        ({"tokens": {"tokenizer": []}}, "prompt: tokens of 'tokenizer': expected 1 to 8 token ids, got 0"),
        ({"tokens": {"tokenizer": [1] * 9}}, "prompt: tokens of 'tokenizer': expected 1 to 8 token ids, got 9"),
        (
            {"tokens": {"tokenizer": [1, -1]}},
            "prompt: tokens of 'tokenizer': expected token ids from 0 to 2147483647, got -1",
        ),
    ],
    ids=str,
)
def test_a_prompt_that_is_none_is_refused(both: tuple[Bundle, Pipeline], wishes: dict[str, Any], text: str) -> None:
    error = refusal(lambda: both[0].generate(**wishes))
    assert (error.kind, str(error)) == ("input", text)


def test_a_token_that_no_text_encoder_has_is_what_the_engine_says(both: tuple[Bundle, Pipeline], folder: Path) -> None:
    wrong = tokens(folder, PROMPT) | {"tokenizer": [100_000]}
    error = refusal(lambda: both[0].generate(tokens=wrong, negative_tokens=tokens(folder, "")))
    assert error.kind == "target"
    assert str(error).startswith("text_encoder: ONNX Runtime could not run text_encoder.onnx: ")


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path, tiny_bundle: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.bundle"))


def rehash(folder: Path, name: str) -> None:
    """List a file's new content."""
    import hashlib

    data = (folder / name).read_bytes()
    put("files", name, {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})(folder)


def test_a_target_that_is_not_there_is_refused_as_in_python(native: Library, tiny_bundle: Path) -> None:
    with pytest.raises(GlanceError) as caught:
        Pipeline.open(tiny_bundle, "rtx")
    error = refusal(lambda: native.open(tiny_bundle, target="rtx"))
    assert (error.kind, str(error)) == ("target", str(caught.value))


@pytest.mark.parametrize(("key", "value"), [("onnxruntime", "1.2.3"), ("cpu", "x86_64-avx9")])
def test_engines_for_another_machine_are_refused(native: Library, damaged: Path, key: str, value: str) -> None:
    put("engines", "cpu", "requires", key, value)(damaged)
    with pytest.raises(GlanceError) as caught:
        Pipeline.open(damaged)
    error = refusal(lambda: native.open(damaged))
    start = str(caught.value).partition("; ")[0]
    assert error.kind == "target"
    assert str(error).startswith(f"{start}; ")
    assert f"built for {key} {value}, but this is " in str(error)


def test_an_engine_that_says_that_it_is_for_another_machine_is_refused(native: Library, damaged: Path) -> None:
    model = onnx.load(damaged / "decoder.onnx")
    onnx.helper.set_model_props(model, {"onnxruntime": "1.2.3"})
    onnx.save(model, damaged / "decoder.onnx")
    rehash(damaged, "decoder.onnx")
    error = refusal(lambda: native.open(damaged))
    assert error.kind == "target"
    assert str(error).startswith("decoder.onnx: built for onnxruntime 1.2.3, but this is ")


def test_plans_are_not_for_a_library_without_tensorrt(native: Library, damaged: Path) -> None:
    put("engines", "cpu", "backend", "tensorrt")(damaged)
    error = refusal(lambda: native.open(damaged))
    assert error.kind == "target"
    reason = "cpu: this library was built to run engines of onnxruntime, onnxruntime-gpu, not of tensorrt"
    assert str(error).startswith(f"{damaged}: none of its targets runs here:\n  {reason}; ")


def test_a_provider_that_is_not_there_or_not_trusted_is_refused(native: Library, damaged: Path) -> None:
    put("engines", "cpu", "backend", "onnxruntime-gpu")(damaged)
    put("engines", "cpu", "requires", {"provider": "CUDAExecutionProvider"})(damaged)
    error = refusal(lambda: native.open(damaged, target="cpu"))
    assert error.kind == "target"
    assert str(error).startswith("cpu: this ONNX Runtime has no CUDAExecutionProvider, but ")
    put("engines", "cpu", "requires", {"provider": "CPUExecutionProvider"})(damaged)
    error = refusal(lambda: native.open(damaged))
    assert error.kind == "target"
    assert "a graph can hold a plan, which is native code. If you trust where it comes from" in str(error)
    native.open(damaged, trust=1).free()


def test_an_onnxruntime_that_is_none_is_refused(native: Library, tiny_bundle: Path, build: Path) -> None:
    error = refusal(lambda: native.open(tiny_bundle, onnxruntime="/no/such.so"))
    assert error.kind == "target"
    assert "ONNX Runtime cannot be loaded: /no/such.so: " in str(error)
    error = refusal(lambda: native.open(tiny_bundle, onnxruntime=str(build / "libglance.so.1")))
    assert "is not ONNX Runtime, it has no OrtGetApiBase; name its shared library in " in str(error)


# --- engines ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_no_model_is_refused(native: Library, damaged: Path) -> None:
    (damaged / "decoder.onnx").write_bytes(b"no model")
    rehash(damaged, "decoder.onnx")
    error = refusal(lambda: native.open(damaged))
    assert error.kind == "bundle"
    assert str(error).startswith("decoder.onnx: ONNX Runtime ")
    assert "It is damaged, or was built for another version" in str(error)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("inputs", 0, "name"), "x", "has no input 'x', which the manifest lists"),
        (("outputs", 0, "name"), "y", "has no output 'y', which the manifest lists"),
        (("outputs", 0, "dtype"), "float32", "its output 'images' is uint8, and float32 in the manifest"),
    ],
)
def test_an_engine_of_other_ports_is_refused(
    native: Library, damaged: Path, path: tuple[Any, ...], value: str, text: str
) -> None:
    put("graphs", "decoder", *path, value)(damaged)
    error = refusal(lambda: native.open(damaged))
    assert (error.kind, str(error)) == ("bundle", f"decoder.onnx: {text}; build the bundle again")


def test_an_engine_that_gives_other_images_is_refused(native: Library, damaged: Path) -> None:
    manifest = json.loads((damaged / "bundle.json").read_text())
    manifest["image"] |= {"height": 2, "width": 12}  # as many latents, of another shape
    for graph in manifest["graphs"].values():
        for port in (*graph["inputs"], *graph["outputs"]):
            port["shape"] = [
                "h" if size == tiny.HEIGHT else "w" if size == tiny.WIDTH else size for size in port["shape"]
            ]
    (damaged / "bundle.json").write_text(json.dumps(manifest))
    given = {"tokens": tokens(damaged, PROMPT), "negative_tokens": tokens(damaged, "")}
    with native.open(damaged) as bundle:
        assert bundle.generate(**given)[0].shape == (2, 12, 3)
    model = onnx.load(damaged / "decoder.onnx")
    model.graph.node[0].attribute[0].ints[:] = [0, 3, 2, 1]  # width before height
    onnx.save(model, damaged / "decoder.onnx")
    rehash(damaged, "decoder.onnx")
    with native.open(damaged) as bundle:
        error = refusal(lambda: bundle.generate(**given))
    text = "decoder: gave (1,12,2,3) uint8 where (1,2,12,3) uint8 was expected; build the bundle again"
    assert (error.kind, str(error)) == ("bundle", text)
