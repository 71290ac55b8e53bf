"""A checkpoint in one file, as its authors published it: where in it each tensor lies that diffusers has a name for.

diffusers' own converters rename tensors, cut and join them, and drop dimensions of size one. Here they are given the
numbers of rows in place of the weights. So nothing is read but the file's header, and where every row of a result comes
from is known: nearly all results are ranges of bytes of the file.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from glance_trt import records
from glance_trt.errors import ModelError
from glance_trt.export.weights import Computed, TensorRef, read_header, torch_dtype
from glance_trt.staging import key_of
from glance_trt.worker import Worker

if TYPE_CHECKING:
    import torch

    Rows = list[tuple[str, int, int]]

_DENOISER = "model.diffusion_model."


@dataclass(frozen=True)
class Layout:
    """How a file holds a part: what its tensors' names begin with, and the converter that makes diffusers' names of the
    rest, a function of `diffusers.loaders.single_file_utils`; none where they are diffusers' already."""

    prefix: str
    converter: str = ""
    identity: bool = False
    """Whether the text encoder has no projection of its own, for which diffusers takes the identity."""


@dataclass(frozen=True)
class _Module:
    """A class of diffusers. prefixes: what the names of its tensors may begin with. original: the name of a tensor that
    only the authors' layout has; own: one that only diffusers' has."""

    prefixes: tuple[str, ...]
    own: str
    original: str = ""
    converter: str = ""


_MODULES = {
    "UNet2DConditionModel": _Module(
        (_DENOISER, ""), "conv_in.weight", "input_blocks.0.0.weight", "convert_ldm_unet_checkpoint"
    ),
    "FluxTransformer2DModel": _Module(
        (_DENOISER, ""), "x_embedder.weight", "img_in.weight", "convert_flux_transformer_checkpoint_to_diffusers"
    ),
    "SD3Transformer2DModel": _Module(
        (_DENOISER, ""),
        "pos_embed.proj.weight",
        "x_embedder.proj.weight",
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "QwenImageTransformer2DModel": _Module((_DENOISER, ""), "txt_norm.weight"),
    "AutoencoderKL": _Module(
        ("first_stage_model.", "vae."),
        "decoder.mid_block.resnets.0.conv1.weight",
        "decoder.mid.block_1.conv1.weight",
        "convert_ldm_vae_checkpoint",
    ),
}
_OPEN_CLIP = "convert_open_clip_checkpoint"
_CLIP_L = Layout("text_encoders.clip_l.transformer.")
_CLIPS = {
    "text_encoder": (
        Layout("cond_stage_model.transformer."),  # Stable Diffusion 1
        Layout("cond_stage_model.model.", _OPEN_CLIP),  # Stable Diffusion 2
        Layout("conditioner.embedders.0.transformer."),  # Stable Diffusion XL
        _CLIP_L,  # Stable Diffusion 3, FLUX
    ),
    "text_encoder_2": (
        Layout("conditioner.embedders.1.model.", _OPEN_CLIP),  # Stable Diffusion XL
        Layout("text_encoders.clip_g.transformer."),  # Stable Diffusion 3
    ),
}
_T5 = Layout("text_encoders.t5xxl.transformer.")
_DENOISERS = ("unet", "transformer")


def layouts(file: Path, classes: Mapping[str, str]) -> dict[str, Layout]:
    """How a file holds the parts of a pipeline, given with their classes; those that it does not hold are left out.

    Raises `ModelError` for a file without the denoiser.
    """
    names = read_header(file)[0].keys()
    found = {part: layout for part, kind in classes.items() if (layout := _layout(part, kind, names))}
    if wanted := [part for part in classes if part in _DENOISERS and part not in found]:
        first = next(iter(names), "nothing")
        raise ModelError(
            f"{file}: holds no {classes[wanted[0]]}, neither under its authors' names nor under diffusers' "
            f"(its first tensor is {first}); give a whole checkpoint, or one of the {wanted[0]}"
        )
    return found


def _layout(part: str, kind: str, names: Iterable[str]) -> Layout | None:
    names = set(names)
    if kind in _MODULES:
        module = _MODULES[kind]
        for prefix in module.prefixes:
            if module.original and prefix + module.original in names:
                return Layout(prefix, module.converter)
            if prefix + module.own in names:
                return Layout(prefix)
        return None
    known = _CLIPS.get(part, ()) if kind.startswith("CLIPTextModel") else (_T5,) if kind == "T5EncoderModel" else ()
    for layout in known:
        if any(name.startswith(layout.prefix) for name in names):
            return Layout(layout.prefix, layout.converter, layout is _CLIP_L and kind.endswith("WithProjection"))
    return None


def tensors(
    file: Path, part: str, parts: Mapping[str, Layout], configs: Mapping[str, dict[str, Any]]
) -> dict[str, TensorRef]:
    """Where the tensors of a part lie in a file, by diffusers' names, given the layouts and configurations of all parts
    that it holds. What diffusers computes of them, such as a transposed matrix, is computed whenever it is read.

    Needs no PyTorch: a converter runs in a process of its own, once, for its answers are kept in the user's cache
    folder. Raises `ModelError`.
    """
    stored, layout = read_header(file)[0], parts[part]
    found = own = _named(stored, layout)
    if layout.converter:
        origins = _recorded(stored, layout, configs[part]) or _converted(file, stored, parts, configs)[part]
        try:
            found = {name: origin.ref(own) for name, origin in origins.items()}
        except ValueError as error:
            raise ModelError(
                f"{file}: diffusers converts its {part} in a way that is not known here: {error}"
            ) from None
    if layout.identity:
        like = max(found.values(), key=lambda ref: ref.length)  # the embeddings of tokens
        size = configs[part]["hidden_size"]
        length = like.length // like.size * size * size
        compute = functools.partial(_identity, size, like.dtype)
        found["text_projection.weight"] = Computed(file, like.dtype, (size, size), 0, length, compute)
    return found


def _named(stored: Mapping[str, TensorRef], layout: Layout) -> dict[str, TensorRef]:
    """A part's tensors as the file has them, by their names without the prefix."""
    return {name.removeprefix(layout.prefix): ref for name, ref in stored.items() if name.startswith(layout.prefix)}


def _identity(size: int, dtype: str) -> torch.Tensor:
    import torch

    return torch.eye(size, dtype=torch_dtype(dtype))


@dataclass(frozen=True)
class Origin:
    """What a converted tensor is made of: ranges of rows of stored tensors, one below the other, of which the first
    `dims` dimensions are left (the others have size one), and which are transposed then."""

    rows: Rows
    dims: int
    transposed: bool

    def ref(self, stored: Mapping[str, TensorRef]) -> TensorRef:
        """Where the tensor lies, or how it is computed. Raises `ValueError` where it does not fit what is stored."""
        blocks = tuple(self._block(stored[name], start, stop) for name, start, stop in self.rows)
        first = blocks[0]
        if len(blocks) == 1 and not self.transposed:
            return first
        if any((block.dtype, block.shape[1:]) != (first.dtype, first.shape[1:]) for block in blocks):
            raise ValueError("joins tensors of different shapes")
        shape: tuple[int, ...] = (sum(block.shape[0] for block in blocks), *first.shape[1:])
        length = sum(block.length for block in blocks)
        compute = functools.partial(_joined, blocks, self.transposed)
        return Computed(
            first.file, first.dtype, shape[::-1] if self.transposed else shape, first.offset, length, compute
        )

    def _block(self, ref: TensorRef, start: int, stop: int) -> TensorRef:
        if any(size != 1 for size in ref.shape[self.dims :]) or not 0 <= start < stop <= _rows(ref.shape):
            raise ValueError("is no range of rows of what is stored")
        size = ref.length // _rows(ref.shape)
        shape = (stop - start, *ref.shape[1 : self.dims]) if self.dims else ()
        return TensorRef(ref.file, ref.dtype, shape, ref.offset + start * size, (stop - start) * size)


def _joined(blocks: tuple[TensorRef, ...], transposed: bool) -> torch.Tensor:
    import torch

    found = torch.cat([block.read() for block in blocks])
    return found.T.contiguous() if transposed else found


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _record(stored: Mapping[str, TensorRef], layout: Layout, config: Mapping[str, Any]) -> str:
    """The name of the record of a part's conversion, which depends on names and shapes alone."""
    shapes = {name: ref.shape for name, ref in _named(stored, layout).items()}
    return f"converted/{key_of(layout.converter, config, shapes, metadata.version('diffusers'))}.json"


def _recorded(stored: Mapping[str, TensorRef], layout: Layout, config: Mapping[str, Any]) -> dict[str, Origin] | None:
    found = records.load(_record(stored, layout, config))
    own = _named(stored, layout)
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):  # a damaged record
        origins = {name: Origin(*json.loads(item)) for name, item in found.items()}
        for origin in origins.values():
            origin.ref(own)
        return origins or None
    return None


def _converted(
    file: Path, stored: Mapping[str, TensorRef], parts: Mapping[str, Layout], configs: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Origin]]:
    """All parts at once, for starting a process takes the most time."""
    wanted = {
        part: (layout, configs[part], {name: ref.shape for name, ref in _named(stored, layout).items()})
        for part, layout in parts.items()
        if layout.converter
    }
    with Worker("conversion") as worker:
        found = worker.call(convert, str(file), wanted)
    for part, origins in found.items():
        entries = {name: json.dumps([item.rows, item.dims, item.transposed]) for name, item in origins.items()}
        with contextlib.suppress(OSError):  # a record saves time, no more
            records.write(_record(stored, parts[part], configs[part]), json.dumps(entries).encode())
    return found


def convert(
    file: str, parts: Mapping[str, tuple[Layout, dict[str, Any], dict[str, tuple[int, ...]]]]
) -> dict[str, dict[str, Origin]]:
    """Of each part, given with its layout, its configuration, and shapes of tensors by name without the prefix: what
    the tensors are made of that diffusers has.

    Runs in a process that may import PyTorch. file: for errors only. Raises `ModelError`.
    """
    from glance_trt.export.quiet import quiet

    found = {}
    for part, (layout, config, shapes) in parts.items():
        try:
            with quiet():
                numbered = dict(_numbered(shapes))
                results = _run(layout, numbered, config)
            found[part] = {
                name: _origin(value, shapes) for name, value in results.items() if value is not None and value.numel()
            }
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
            raise ModelError(f"{file}: diffusers cannot convert its {part}: {reason}") from None
    return found


def _run(layout: Layout, numbered: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders import single_file_utils as converters

    if layout.converter == _OPEN_CLIP:
        own = {layout.prefix + name: value for name, value in numbered.items()}
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        return converters.convert_open_clip_checkpoint(model, own, layout.prefix)
    if layout.converter == "convert_ldm_unet_checkpoint":
        return converters.convert_ldm_unet_checkpoint({_DENOISER + name: v for name, v in numbered.items()}, config)
    return getattr(converters, layout.converter)(numbered, config=config)


def _numbered(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """For each tensor one of the same number of dimensions, all but the first of size one, that holds the numbers of
    its rows, counted over all tensors."""
    import torch

    first = 0
    for name, shape in shapes.items():
        rows = torch.arange(first, first + _rows(shape))
        yield name, rows.view(rows.numel(), *[1] * (len(shape) - 1)) if shape else rows[0]
        first += _rows(shape)


def _origin(value: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Origin:
    if value.is_floating_point():
        raise ValueError("it computes with weights")
    transposed = value.ndim == 2 and value.shape[1] > 1  # columns of the numbered tensors have size one
    if value.ndim > 1 and value.numel() != value.shape[0] and not transposed:
        raise ValueError(f"it makes a tensor of the shape {list(value.shape)} from rows")
    names = list(shapes)
    ends = np.cumsum([_rows(shape) for shape in shapes.values()])
    rows = value.flatten().numpy()
    tensor = np.searchsorted(ends, rows, side="right")
    cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(tensor) != 0)) + 1
    found = []
    for run, owner in zip(np.split(rows, cuts), tensor[[0, *cuts]], strict=True):
        start = int(run[0] - ends[owner] + _rows(shapes[names[owner]]))
        found.append((names[owner], start, start + len(run)))
    return Origin(found, value.ndim, transposed)
