"""Options that several commands have: which engines they open, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def engines(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``target``, ``device`` and ``trust``, as `glance_trt.Pipeline.open` takes them."""
    for option in (
        click.option(
            "--trust", is_flag=True, help="Open TensorRT plans that were not built here: they are native code."
        ),
        click.option(
            "--device", type=click.IntRange(min=0), default=0, show_default=True, help="GPU, as CUDA counts them."
        ),
        click.option("--target", help="One of the bundle's targets. Default: the first that runs here."),
    ):
        command = option(command)
    return command
