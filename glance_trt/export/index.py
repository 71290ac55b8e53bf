"""model_index.json, in which a pipeline's folder says what its parts are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glance_trt.errors import ModelError

NAME = "model_index.json"


def read(folder: Path) -> dict[str, Any]:
    """The content of a pipeline's index. Raises `ModelError`."""
    return read_json(folder / NAME, f"{folder}: not a diffusers pipeline folder, it has no {NAME}")


def classes(folder: Path) -> dict[str, str]:
    """The class of each part that a pipeline has, by the part's name. Raises `ModelError`."""
    found = {}
    for part, entry in read(folder).items():
        if part.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(item, str) for item in entry) or Path(part).name != part:
            raise ModelError(f"{folder / NAME}: {part}: expected a library and a class, got {entry}")
        found[part] = entry[1]
    return found


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object; raises `ModelError` with `missing` if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(missing) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value
