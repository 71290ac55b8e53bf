"""Training of the phase experts (needs the `distill` extra, whose modules are loaded with the first name from here)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glance_trt.distill.experts import train

__all__ = ["train"]


def __getattr__(name: str) -> object:
    if name == "train":
        from glance_trt.distill.experts import train

        return train
    raise AttributeError(f"module 'glance_trt.distill' has no attribute {name!r}")
