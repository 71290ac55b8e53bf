"""Checkpoints: everything that the rest of a training run depends on, and the settings that it belongs to."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glance_trt.distill import files
from glance_trt.errors import TrainingError

_DIGESTS = {"captions": "the captions or images", "model": "the base model's weights"}
"""What settings have only digests of."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps: trained parameters by name, AdamW's state_dict, the generator's state."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]
    generator: Tensor


def save(path: Path, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Write a checkpoint of a run with these `settings` (what JSON can hold). Raises `OutputError`."""
    # In memory first: torch turns a full disk into a RuntimeError.
    buffer = io.BytesIO()
    torch.save({"settings": json.dumps(settings), **vars(checkpoint)}, buffer)
    files.write_bytes(path, buffer.getbuffer())


def load(path: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    """Read the checkpoint at `path`, on the CPU; nothing if there is none.

    Raises `TrainingError` if it cannot be read, or if its run had other settings; the text names the first of them.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(state.pop("settings"))
        checkpoint = Checkpoint(**state)
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        EOFError,
        pickle.PickleError,
    ) as error:
        raise TrainingError(f"{path}: not a readable checkpoint; delete it to train from the start") from error
    if difference := first_difference(saved, settings):
        raise TrainingError(
            f"{path}: a checkpoint of another recipe: {difference}. Delete it to train from the start, restore the "
            "recipe to go on, or give another work folder"
        )
    return checkpoint


def first_difference(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first setting that is not the same, in words."""
    wanted = json.loads(json.dumps(settings))
    for key in [*wanted, *saved]:
        if saved.get(key) != wanted.get(key):
            if key in _DIGESTS:
                return f"{_DIGESTS[key]} were others"
            return f"{key} was {_short(saved.get(key))}, and is {_short(wanted.get(key))} now"
    return None


def _short(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
