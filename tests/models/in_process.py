"""A stand-in for `glance_trt.worker.Worker` that starts no process: importing PyTorch anew takes seconds."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any


class InProcess:
    """Runs functions here, upon copies of what they are given, as another process would."""

    def __init__(self, what: str) -> None:
        pass

    def call(self, function: Callable[..., Any], *arguments: Any, progress: Any = None, **named: Any) -> Any:
        function, arguments, named = pickle.loads(pickle.dumps((function, arguments, named)))
        reporting = {"progress": progress} if progress else {}
        return pickle.loads(pickle.dumps(function(*arguments, **named, **reporting)))

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass
