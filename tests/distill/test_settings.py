from __future__ import annotations

from typing import Any

import pytest

from glance_trt import strict
from glance_trt.recipe import Distill


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank: expected a positive number, got 0"),
        ({"alpha": -1.0}, "alpha: expected a positive number, got -1.0"),
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"weight_decay": -0.1}, "weight_decay: expected 0 or more, got -0.1"),
        ({"caption_dropout": 1.5}, "caption_dropout: expected a probability from 0 to 1, got 1.5"),
        ({"targets": []}, "targets: expected at least one layer, such as to_q"),
        ({"seed": -1}, r"seed: expected a whole number from 0 to 2\*\*63 - 1, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(strict.Mismatch, match=f"^{message}$"):
        strict.read(Distill, {"prompt": "a cat", **values})


def test_settings_default_to_the_papers_for_flux() -> None:
    settings = Distill("a cat")
    assert (settings.rank, settings.alpha, settings.learning_rate, settings.steps) == (16, 64.0, 5e-4, 60)
    assert settings.targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert (settings.batch_size, settings.weight_decay, settings.caption_dropout) == (1, 0.01, 0.0)
