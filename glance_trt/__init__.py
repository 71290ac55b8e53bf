"""glance-trt: few-step diffusion with phase experts, in production.

The public API is `Pipeline`, its `Request`, `Bundle` and the errors. Importing this package costs no more than the
standard library: numpy is loaded with the first name that needs it, and nothing here ever needs PyTorch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from glance_trt.errors import (
    BundleError,
    GlanceError,
    InputError,
    LoraError,
    ModelError,
    OutputError,
    ParityError,
    RecipeError,
    TargetError,
    TrainingError,
)

# ONNX Runtime 1.31 for Linux writes a device id to the user's cache and reports to its makers, from its import on. A
# server that was not asked does neither; ORT_DISABLE_TELEMETRY=0 lets it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from glance_trt.bundle import Bundle
    from glance_trt.runtime.pipeline import Pipeline, Request

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "BundleError",
    "GlanceError",
    "InputError",
    "LoraError",
    "ModelError",
    "OutputError",
    "ParityError",
    "Pipeline",
    "RecipeError",
    "Request",
    "TargetError",
    "TrainingError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "Bundle":
        from glance_trt.bundle import Bundle

        return Bundle
    if name in ("Pipeline", "Request"):
        from glance_trt.runtime import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'glance_trt' has no attribute {name!r}")
