"""Training of the phase experts (needs the `distill` extra)."""

from __future__ import annotations

from glance_trt.distill.experts import train

__all__ = ["train"]
