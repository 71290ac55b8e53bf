"""What engines need of the machine that runs them, and whether it is here."""

from __future__ import annotations

from glance_trt.bundle import EngineSet
from glance_trt.errors import TargetError


def unrunnable(engines: EngineSet) -> str | None:
    """Why a target's engines cannot run on this machine; None if they can."""
    if engines.backend == "onnxruntime":
        from glance_trt.runtime.runners.onnxruntime import unmet

        try:
            return unmet(engines.requires)
        except TargetError as error:
            return str(error)
    return "not yet"
