"""A recipe for the tiny diffusers model: three phases, one of them the base model itself."""

from __future__ import annotations

from typing import Any

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": "model",
    "height": 16,
    "width": 16,
    "teacher_steps": 10,
    "phases": [
        {"name": "slow", "steps": [1, 3], "lora": {"file": "slow.safetensors"}},
        {"name": "middle", "steps": [5]},
        {"name": "fast", "steps": [6, 8, 10], "lora": {"file": "fast.safetensors", "scale": 2.0}},
    ],
    "guidance": {"scale": 3.0, "rescale": 0.7, "negative_prompt": "blue"},
    "engines": ["cpu"],
}
