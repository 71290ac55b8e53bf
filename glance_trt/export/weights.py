"""Weights as safetensors files: where each tensor lies, and writing a file one tensor at a time.

A safetensors file is a JSON header and a flat buffer, so a tensor is (file, offset, length): exactly what an ONNX
external-data reference holds. Nothing here ever has more than one tensor in memory, and only the values of tensors need
PyTorch, not where they lie.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glance_trt.errors import ModelError
from glance_trt.export import pickles
from glance_trt.progress import Progress, silent

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
}
"""Supported tensor types, by their safetensors names: PyTorch's name, and bytes per value. Text encoders of old files
hold integers: position ids."""

_HEADER_LIMIT = 100 << 20
_PICKLES = (b"PK\x03\x04", b"\x80")
"""What files of torch.save begin with."""
_BLOCK = 1 << 20
"""Bytes that are copied at a time, by way of the processor's cache."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: `offset` and `length` are bytes from the file's beginning; `dtype` is safetensors' name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    def read_bytes(self) -> bytes:
        """The tensor's bytes."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def read(self) -> torch.Tensor:
        """The tensor, in its stored dtype; the caller owns it."""
        import torch

        value = torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            _fill(file, value)
        return value

    def read_rows(self, count: int) -> Iterator[torch.Tensor]:
        """Its rows [n, columns] in order, at most `count` at a time, in one buffer: a block is overwritten by the next.

        A weight's pages of memory take longer to be had than its values to be computed, so large ones are not read
        whole.
        """
        import torch

        rows, columns = self.shape[0], math.prod(self.shape[1:])
        buffer = torch.empty((min(count, rows), columns), dtype=torch_dtype(self.dtype))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, rows, count):
                block = buffer[: min(count, rows - start)]
                _fill(file, block)
                yield block


@dataclass(frozen=True)
class Computed(TensorRef):
    """A tensor that no file holds as it is: read, it is computed from what `file` holds elsewhere."""

    compute: Callable[[], torch.Tensor]

    def read(self) -> torch.Tensor:
        """See `TensorRef.read`."""
        return self.compute()

    def read_rows(self, count: int) -> Iterator[torch.Tensor]:
        """See `TensorRef.read_rows`."""
        yield from self.compute().flatten(1).split(count)


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of safetensors' name for it."""
    import torch

    return getattr(torch, _DTYPES[name][0])


def read_header(path: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Raises `ModelError`."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, _HEADER_LIMIT):
                if first.startswith(_PICKLES):
                    raise ValueError("it is a pickle under another name; call it .pt, to be told how to convert it")
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(isinstance(n, int) and n >= 0 for n in shape):
                raise ValueError(f"{name} has the shape {list(shape)}")
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"{name} lies outside the file, which may be truncated")
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
            if end - start != math.prod(shape) * _DTYPES[entry["dtype"]][1]:
                raise ValueError(f"{name} has {end - start} bytes, which its shape {list(shape)} does not explain")
            tensors[name] = TensorRef(path, entry["dtype"], shape, 8 + length + start, end - start)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except struct.error:
        raise ModelError(f"{path}: not a readable safetensors file: it has only {size} bytes") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from None
    return tensors, metadata


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _fill(file: FileIO, tensor: torch.Tensor) -> None:
    """Read a contiguous tensor's bytes from where a file stands."""
    target = _bytes_of(tensor)
    while target:
        target = target[_read_into(file, target) :]


def _read_into(file: FileIO, target: memoryview) -> int:
    """Read some bytes from where a file stands; returns how many."""
    count = file.readinto(target)
    if not count:
        raise ModelError(f"{file.name!s}: ended while it was read")
    return count


def component_tensors(folder: Path) -> dict[str, TensorRef]:
    """The tensors of a model component (a folder in diffusers' layout): one file, or shards with an index.

    Raises `ModelError`, for instance where there are only pickle files.
    """
    names = sorted(path.name for path in folder.glob("*"))
    name = preferred(names)
    if name is None:
        if pickled := [other for other in names if other.endswith(".bin")]:
            raise pickles.refused(folder / pickled[0], pickles.saved_again(str(folder.parent), f"{folder.parent}-safe"))
        others = ", ".join(other for other in names if ".safetensors" in other)
        raise ModelError(
            f"{folder}: no weights (expected diffusion_pytorch_model.safetensors or model.safetensors, in one file or "
            f"as shards with an index{f'; there is {others}' if others else ''})"
        )
    return _sharded(folder / name) if name.endswith(".json") else read_header(folder / name)[0]


def preferred(names: Collection[str]) -> str | None:
    """Of the names of the files of a component's folder, that of its weights, or of the index of their shards: those
    without a variant, else the float16 ones. Nothing where there are none in safetensors."""
    known = [
        f"{stem}{name}"
        for name in (
            ".safetensors",
            ".safetensors.index.json",
            ".fp16.safetensors",
            ".safetensors.index.fp16.json",  # as diffusers and transformers name it
            ".fp16.safetensors.index.json",
        )
        for stem in ("diffusion_pytorch_model", "model")
    ]
    return next((name for name in known if name in names), None)


def shards(index: Path) -> dict[str, str]:
    """The file that each tensor is in, as the index of shards beside them has it. Raises `ModelError`."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_once)["weight_map"]
        if strange := [file for file in found.values() if Path(file).name != file]:
            raise ValueError(f"{strange[0]!r} is not the name of a file beside it")
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a readable index: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice")
    return found


def _sharded(index: Path) -> dict[str, TensorRef]:
    listed = shards(index)
    found: dict[str, TensorRef] = {}
    for file in sorted(set(listed.values())):
        if not (index.parent / file).is_file():
            raise ModelError(f"{index}: names {file}, which is missing; copy or download it too")
        for name, ref in read_header(index.parent / file)[0].items():
            if name in found:
                other = found[name].file.name
                raise ModelError(f"{index}: {name} is in {other} and in {file}; they are not of one model")
            if name not in listed:
                raise ModelError(f"{index}: does not name {name}, which is in {file}; they are not of one model")
            found[name] = ref
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise ModelError(f"{index}: {name} should be in {file}, which does not have it")
    return {name: found[name] for name in listed}


@dataclass(frozen=True)
class Fused:
    """A tensor that is computed when it is written; its dtype and shape are those of `base`.

    blocks: its values in order, in any shapes; a block may be overwritten by the next.
    """

    base: TensorRef
    blocks: Callable[[], Iterable[torch.Tensor]]

    def read(self) -> torch.Tensor:
        """The tensor, whole."""
        import torch

        return torch.cat([block.flatten().clone() for block in self.blocks()]).view(self.base.shape)


def write(
    path: Path, tensors: Mapping[str, TensorRef | Fused], progress: Progress = silent, stage: str = "fuse"
) -> dict[str, TensorRef]:
    """Write a safetensors file tensor by tensor, copying or computing each; returns where they lie in it.

    The file appears under its name only when it is complete. Progress counts bytes.
    """
    refs, header, position = {}, {}, 0
    for name, tensor in tensors.items():
        base = tensor.base if isinstance(tensor, Fused) else tensor
        header[name] = {
            "dtype": base.dtype,
            "shape": list(base.shape),
            "data_offsets": [position, position + base.length],
        }
        position += base.length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # the buffer starts 8 bytes off a multiple of 64, as the format has it
    progress(stage, 0, position)
    draft = path.with_name(path.name + ".draft")
    try:
        with open(draft, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, tensor in tensors.items():
                base = tensor.base if isinstance(tensor, Fused) else tensor
                refs[name] = TensorRef(path, base.dtype, base.shape, file.tell(), base.length)
                for block in _blocks(tensor):
                    file.write(block)
                progress(stage, file.tell() - 8 - len(text), position)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return refs


def _blocks(tensor: TensorRef | Fused) -> Iterable[bytes | memoryview]:
    if isinstance(tensor, (Fused, Computed)):
        for block in tensor.blocks() if isinstance(tensor, Fused) else [tensor.read()]:
            yield _bytes_of(block.contiguous())
        return
    buffer, left = memoryview(bytearray(min(_BLOCK, tensor.length))), tensor.length
    with open(tensor.file, "rb", buffering=0) as source:
        source.seek(tensor.offset)
        while left:
            count = _read_into(source, buffer[:left])
            left -= count
            yield buffer[:count]
