"""Keeps diffusers and transformers from drawing bars and logging on the terminal while they load a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """While open, errors alone are logged; afterwards everything is as it was.

    Diffusers warns, for instance, that a LoRA of a UNet has no keys for the text encoder.
    """
    modules = (diffusers_logging, transformers_logging)
    before = [(module, module.is_progress_bar_enabled(), module.get_verbosity()) for module in modules]
    for module in modules:
        module.disable_progress_bar()
        module.set_verbosity_error()
    try:
        yield
    finally:
        for module, bars, verbosity in before:
            if bars:
                module.enable_progress_bar()
            module.set_verbosity(verbosity)
