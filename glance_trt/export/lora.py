"""Reads LoRA files and matches them with a model's weights: layouts of diffusers, PEFT, kohya, ComfyUI and XLabs.

Only headers are read, and without PyTorch: what a pair's factors hold is read when it is fused.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glance_trt.errors import LoraError, ModelError
from glance_trt.export import lora_keys, lora_layouts, pickles
from glance_trt.export.lora_keys import DENOISER, Module
from glance_trt.export.weights import Fused, TensorRef, read_header

if TYPE_CHECKING:
    import torch

PROVENANCE = "glance_trt"
"""Key of a file's metadata under which `glance-trt distill` says, as JSON, how it was made."""
GUIDE = "glance_trt_guide"
"""Key of the metadata under which a file that is a guide, and no LoRA, says as JSON what it is made for."""
_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
"""How `struct` reads single values; bfloat16 is the upper half of float32."""


@dataclass(frozen=True)
class Rows:
    """A tensor whose rows stand apart in a file, or in another order: read, it is one, as a `TensorRef` is."""

    blocks: tuple[TensorRef, ...]

    @property
    def dtype(self) -> str:
        """safetensors' name."""
        return self.blocks[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of all blocks, one below the other."""
        return sum(block.shape[0] for block in self.blocks), *self.blocks[0].shape[1:]

    def read_bytes(self) -> bytes:
        """The tensor's bytes."""
        return b"".join(block.read_bytes() for block in self.blocks)

    def read(self) -> torch.Tensor:
        """The tensor, in its stored dtype; the caller owns it."""
        import torch

        return torch.cat([block.read() for block in self.blocks])


@dataclass(frozen=True)
class Pair:
    """The two factors of one weight's update, ``scale * up @ down``: down [rank, in, ...], up [out, rank, 1...].

    `alpha` is what the file declares for this weight, if it does.
    """

    down: TensorRef
    up: TensorRef | Rows
    scale: float
    alpha: float | None


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its factors by the name of the weight they change: `pairs` of the denoiser, `encoders` of the text
    encoders that it changes, by kind. One of both may be empty.

    `alpha` is nothing where the file does not give one for all weights alike. `scale` is that of the first weight.
    `timesteps` are those that it was trained at, where the file says that it was trained at some only.
    """

    file: Path
    pairs: dict[str, Pair]
    alpha: float | None
    scale: float
    timesteps: tuple[float, ...] = ()
    encoders: dict[str, dict[str, Pair]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Declared:
    """What an adapter configuration says of scales: alpha, alphas by a pattern of module names, and rsLoRA
    (arXiv 2312.03732), which divides alpha by the root of the rank."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module, patterns first, as PEFT matches them."""
        for pattern, alpha in self.patterns.items():
            # A text encoder's names lack text_model. where a newer transformers wrote the model than the LoRA.
            if any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) for name in (module, f"text_model.{module}")):
                return alpha
        return self.alpha


def check_exists(path: Path) -> None:
    """Raises `LoraError` where there is no such file."""
    if path.is_dir():
        raise LoraError(f"{path}: a folder; expected a .safetensors file")
    if not path.is_file():
        raise LoraError(
            f"{path}: no such LoRA file; correct the path, or for Stable Diffusion 1 and 2 train one: "
            "glance-trt distill RECIPE"
        )


def read(
    path: Path,
    weights: Mapping[str, TensorRef],
    scale: float | None = None,
    encoders: Mapping[str, Mapping[str, TensorRef]] | None = None,
) -> Lora:
    """Read a LoRA for a model whose denoiser's tensors are `weights`, named as in diffusers.

    encoders: the tensors of the model's text encoders by kind, ``text_encoder``, ``text_encoder_2`` and
    ``text_encoder_3``; a LoRA that changes others is refused.

    scale: in place of alpha / rank, for all weights. Where the file has neither alpha tensors nor a configuration
    (diffusers' in its metadata, PEFT's ``adapter_config.json`` beside ``adapter_model.safetensors``), the scale is 1.

    Raises `LoraError`: for a file that is not readable or not plain LoRA, for keys that match no weight, which it
    lists, for a module that lacks a factor, and for factors that do not fit.
    """
    check_exists(path)
    if path.suffix in pickles.SUFFIXES:
        raise LoraError(str(pickles.refused(path, pickles.converted(path))))
    try:
        tensors, metadata = read_header(path)
    except ModelError as error:
        raise LoraError(str(error)) from None
    if not tensors:
        raise LoraError(f"{path}: empty, it has no tensors")
    if GUIDE in metadata:
        raise LoraError(f"{path}: a guide, no LoRA; a phase names it under guide")
    parts = {DENOISER: weights, **(encoders or {})}
    layouts = {DENOISER: lora_layouts.denoiser(weights)}
    layouts |= {kind: lora_layouts.text_encoder(refs) for kind, refs in (encoders or {}).items()}
    modules = lora_keys.sort(path, tensors, layouts)
    declared = _declared(path, metadata)
    pairs: dict[str, dict[str, Pair]] = {part: {} for part in parts}
    for module in modules:
        for name, pair in _pairs(path, module, parts[module.part], declared[module.part], scale).items():
            if name in pairs[module.part]:
                raise LoraError(f"{path}: {module.name} is not the only one that changes {name}")
            pairs[module.part][name] = pair
    every = [pair for found in pairs.values() for pair in found.values()]
    given = {pair.alpha for pair in every}
    changed = {part: found for part, found in pairs.items() if found and part != DENOISER}
    alpha = every[0].alpha if len(given) == 1 else None
    return Lora(path, pairs[DENOISER], alpha, every[0].scale, _timesteps(metadata), changed)


def _pairs(
    path: Path, module: Module, weights: Mapping[str, TensorRef], declared: _Declared, scale: float | None
) -> dict[str, Pair]:
    """The factors of the weights that a module changes, several where it is split."""
    down, up = module.down, module.up
    rank = down.shape[0] if down.shape else 0
    rows = sum(stop - start for target in module.targets for start, stop in target.rows)
    pairs = {}
    for target in module.targets:
        inner = weights[target.weight].shape[1:]
        if not rank or down.shape[1:] != inner or up.shape != (rows, rank, *(1,) * len(inner[1:])):
            raise LoraError(
                f"{path}: {module.name}: factors {list(up.shape)} x {list(down.shape)} do not fit the weight "
                f"{[rows, *inner]}; is it a LoRA for another model?"
            )
        name = target.weight.removesuffix(".weight")
        alpha = _number(module.alpha) if module.alpha else declared.alpha_of(name)
        if scale is not None or alpha is None:
            chosen = 1.0 if scale is None else scale
        else:
            chosen = alpha / (math.sqrt(rank) if declared.rank_stabilised else rank)
        pairs[target.weight] = Pair(down, _rows(up, target.rows), chosen, alpha)
    return pairs


def _rows(tensor: TensorRef, ranges: Sequence[tuple[int, int]]) -> TensorRef | Rows:
    """Ranges of a tensor's rows, one below the other. Rows are contiguous, so each range is a tensor of the file."""
    size = tensor.length // tensor.shape[0]
    blocks = tuple(
        TensorRef(
            tensor.file,
            tensor.dtype,
            (stop - start, *tensor.shape[1:]),
            tensor.offset + start * size,
            (stop - start) * size,
        )
        for start, stop in ranges
    )
    return blocks[0] if len(blocks) == 1 else Rows(blocks)


def _number(tensor: TensorRef) -> float:
    """The only value of a tensor."""
    with open(tensor.file, "rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.length)
    if tensor.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack(_NUMBERS[tensor.dtype], data)[0])


def _timesteps(metadata: Mapping[str, str]) -> tuple[float, ...]:
    try:
        return tuple(float(timestep) for timestep in json.loads(metadata[PROVENANCE])["timesteps"])
    except (KeyError, ValueError, TypeError):  # a file of another tool, or damaged in what only informs
        return ()


_ROWS = 64
"""Of a weight, so many are computed at a time, which stay in the processor's cache: three times as fast as all."""


def fused(base: TensorRef, pair: Pair) -> Fused:
    """``W + scale * up @ down``, computed in float32 and rounded once to W's own dtype.

    That is bit by bit PEFT's merge of factors in float32, as it keeps them unless told otherwise. Factors in half
    precision it merges less exactly: it rounds the update to half precision, and the sum once more.
    """

    def blocks() -> Iterator[torch.Tensor]:
        up, down = pair.up.read().float().flatten(1), pair.down.read().float().flatten(1)
        start = 0
        for rows in base.read_rows(_ROWS):
            part = slice(start, start + len(rows))
            rows[:] = (up[part] @ down).mul_(pair.scale).add_(rows)
            yield rows
            start = part.stop

    return Fused(base, blocks)


def _declared(path: Path, metadata: Mapping[str, str]) -> dict[str, _Declared]:
    """The adapter configurations of the model's parts, which diffusers writes into the metadata; PEFT writes one beside
    the file, the denoiser's."""
    beside = path.with_name("adapter_config.json")
    config: dict[str, Any] = {}
    try:
        if "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            path, config = beside, json.loads(beside.read_text(encoding="utf-8"))
        parts: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in config.items():
            part, dot, setting = key.partition(".")
            if not dot or part in ("unet", "transformer"):
                part, setting = DENOISER, setting or part
            parts[part][setting] = value
        return defaultdict(_Declared, {part: _declare(settings) for part, settings in parts.items()})
    except (OSError, ValueError, TypeError, AttributeError, re.error) as error:
        raise LoraError(f"{path}: its adapter configuration is not readable: {error}") from None


def _declare(settings: Mapping[str, Any]) -> _Declared:
    patterns = {key: float(value) for key, value in (settings.get("alpha_pattern") or {}).items()}
    for pattern in patterns:
        re.compile(pattern)
    alpha = settings.get("lora_alpha")
    return _Declared(None if alpha is None else float(alpha), patterns, bool(settings.get("use_rslora")))
