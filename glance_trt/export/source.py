"""What a model family gives to be traced. Reading it needs no PyTorch; building its module does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glance_trt.bundle import Port

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Source:
    """A graph to be traced.

    `build` makes the module, in any dtype; its forward takes `inputs` in order and returns `outputs`. `prefix`
    leads from the module's state-dict names to the weights' names. For the named dimensions (``h`` in ``8*h``), `sizes`
    gives example values, at least 2, and `limits` the largest ones.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    prefix: str
    sizes: Mapping[str, int]
    limits: Mapping[str, int]
