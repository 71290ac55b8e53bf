"""Safetensors files: compared with the safetensors library's own reading and writing."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from glance_trt.errors import ModelError
from glance_trt.export import weights
from glance_trt.export.weights import Computed, Fused, component_tensors, read_header


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """One of each kind: dtypes, a scalar, none at all, and lengths that leave the next one unaligned."""
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 5, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "single": torch.randn(2, 3, 1, 1, generator=generator),
        "double": torch.randn(1, generator=generator).double(),
        "scalar": torch.tensor(4.0),
        "none": torch.empty(0, 4),
        "position_ids": torch.arange(77)[None],
    }


def test_header_leads_to_the_tensors_that_safetensors_wrote(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    refs, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert refs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = refs[name].read()
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_safetensors_reads_what_is_written(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    refs = read_header(tmp_path / "x.safetensors")[0]
    computed = Fused(refs["half"], lambda: (tensors["half"].T.contiguous().T * 2).split(1))
    calls: list[tuple[str, float, float]] = []
    written = weights.write(
        tmp_path / "y.safetensors", {**refs, "half": computed}, lambda *call: calls.append(call), "copy"
    )
    found = load_file(tmp_path / "y.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in (tensors | {"half": tensors["half"] * 2}).items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(written[name].read(), tensor)
    assert written == read_header(tmp_path / "y.safetensors")[0]
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[0] == ("copy", 0, total)
    assert calls[-1] == ("copy", total, total)


def test_what_is_computed_is_read_and_written_as_if_it_were_stored(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "x.safetensors")
    ref = read_header(tmp_path / "x.safetensors")[0]["a"]
    transposed = Computed(ref.file, ref.dtype, (3, 2), ref.offset, ref.length, lambda: ref.read().T)
    weights.write(tmp_path / "y.safetensors", {"a": transposed})
    assert torch.equal(transposed.read(), torch.arange(6.0).view(2, 3).T)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["a"], transposed.read())


def test_large_tensors_are_copied_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 7)
    save_file({"a": torch.arange(40.0), "b": torch.ones(3)}, tmp_path / "x.safetensors")
    weights.write(tmp_path / "y.safetensors", read_header(tmp_path / "x.safetensors")[0])
    assert torch.equal(load_file(tmp_path / "y.safetensors")["a"], torch.arange(40.0))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_write_that_fails_leaves_no_file(tmp_path: Path, error: Any) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    ref = read_header(tmp_path / "x.safetensors")[0]["a"]

    def fail() -> torch.Tensor:
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        weights.write(tmp_path / "y.safetensors", {"a": ref, "b": Fused(ref, fail)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_source_that_shrank_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    refs = read_header(tmp_path / "x.safetensors")[0]
    (tmp_path / "x.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"x\.safetensors: ended while it was read"):
        weights.write(tmp_path / "y.safetensors", refs)


@pytest.mark.parametrize("size", [0, 3, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"x\.safetensors: not a readable safetensors file: .*(header|outside|bytes)"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "pop"),
        ({"a": 1}, "subscriptable"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}, "a lies outside the file"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "a lies outside the file"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, r"a has 8 bytes, which its shape \[3\]"),
        ({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, r"a has the shape \[-1, -2\]"),
        ({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, "a has dtype F8_E4M3; supported: F64, F32"),
        ({"__metadata__": ["x"]}, "items"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, message: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError, match=f"not a readable safetensors file: .*{message}"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_another_name_is_told_apart(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.ones(8)}, tmp_path / "x.safetensors", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"x\.safetensors: not a readable .* it is a pickle under another name"):
        read_header(tmp_path / "x.safetensors")


def test_a_header_may_have_the_length_that_a_pickle_begins_with(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(8)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"padding": "0" * 500})
    while (length := (tmp_path / "x.safetensors").read_bytes()[:2]) != b"\x80\x02":
        grown = 500 + 0x280 - int.from_bytes(length, "little")
        save_file(tensors, tmp_path / "x.safetensors", metadata={"padding": "0" * grown})
    assert read_header(tmp_path / "x.safetensors")[0].keys() == tensors.keys()


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    text = b"[" * 100_000
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no\.safetensors: No such file"):
        read_header(tmp_path / "no.safetensors")


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    found = component_tensors(tmp_path)
    assert {name: ref.file.name for name, ref in found.items()} == {"a": "one.safetensors", "b": "two.safetensors"}
    assert torch.equal(found["b"].read(), torch.zeros(3))


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (
            {"a": "one", "b": "two", "c": "one"},
            r"index\.json: c should be in one\.safetensors, which does not have it$",
        ),
        ({"a": "one", "b": "one"}, r"index\.json: b should be in one\.safetensors, which does not have it$"),
        ({"a": "two", "b": "two"}, r"index\.json: a should be in two\.safetensors, which does not have it$"),
        (
            {"a": "one", "b": "three"},
            r"index\.json: names three\.safetensors, which is missing; copy or download it too$",
        ),
        (
            {"a": "one", "b": "more"},
            r"index\.json: does not name c, which is in more\.safetensors; they are not of one model$",
        ),
        (
            {"a": "one", "b": "same"},
            r"index\.json: a is in one\.safetensors and in same\.safetensors; they are not of one model$",
        ),
        (
            {"a": "../one"},
            r"index\.json: not a readable index: '\.\./one\.safetensors' is not the name of a file beside",
        ),
        ({"a": ""}, r"index\.json: names \.safetensors, which is missing"),
    ],
)
def test_shards_that_disagree_with_their_index_are_refused(
    listed: dict[str, str], message: str, tmp_path: Path
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.zeros(3)}, tmp_path / "more.safetensors")
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "same.safetensors")
    content = {"weight_map": {name: f"{file}.safetensors" for name, file in listed.items()}}
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        component_tensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "list indices"),
        ("{", "Expecting"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "no attribute"),
        ('{"weight_map": {"a": 1}}', "int"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a stands twice"),
    ],
)
def test_an_index_that_cannot_be_read_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError, match=rf"index\.json: not a readable index: .*{message}"):
        component_tensors(tmp_path)


def test_what_an_index_says_of_sizes_makes_no_difference(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    content = {"metadata": {"total_size": 12345}, "weight_map": {"a": "one.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(content))
    assert component_tensors(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_of_several_files_of_weights_one_is_read(stem: str, tmp_path: Path) -> None:
    """In this order: all in one file before shards, and the usual weights before those in float16."""
    order = [
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors.index.json",
    ]
    for i, name in enumerate(order):
        shard = f"shard-{i}.safetensors"
        save_file({str(i): torch.ones(1)}, tmp_path / (shard if name.endswith(".json") else name))
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps({"weight_map": {str(i): shard}}))
    for i, name in enumerate(order):
        assert component_tensors(tmp_path).keys() == {str(i)}
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=r"no weights \(expected .*; there is shard-1\.safetensors, shard-3"):
        component_tensors(tmp_path)


def test_diffusers_and_transformers_name_their_shards_so(tiny_model: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    encoder = CLIPTextModel.from_pretrained(tiny_model / "text_encoder")
    for variant in (None, "fp16"):
        for model in (unet, encoder):
            folder = tmp_path / f"{type(model).__name__}.{variant}"
            model.save_pretrained(folder, max_shard_size="20KB", variant=variant)
            assert len(list(folder.glob("*.safetensors"))) > 1
            found = component_tensors(folder)
            state = model.state_dict()
            assert {name.removeprefix("text_model.") for name in found} == state.keys()
            for name, ref in found.items():
                assert torch.equal(ref.read(), state[name.removeprefix("text_model.")])


def test_full_precision_is_preferred_and_the_fp16_variant_accepted(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).half()}, tmp_path / "model.fp16.safetensors")
    assert component_tensors(tmp_path)["a"].dtype == "F16"
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert component_tensors(tmp_path)["a"].dtype == "F32"


def test_pickle_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        ModelError,
        match=r"diffusion_pytorch_model\.bin: weights in a pickle, which can run code when it is read, .*\n"
        r"  python -c '.*safe_serialization=True\)' ",
    ):
        component_tensors(tmp_path)


def test_a_folder_without_weights_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights \(expected diffusion_pytorch_model\.safetensors or model"):
        component_tensors(tmp_path)
