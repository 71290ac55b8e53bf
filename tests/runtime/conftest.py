"""A tiny bundle with all that the format knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from glance_trt.runtime.pipeline import Pipeline

from ..models import rich


@pytest.fixture(scope="session")
def rich_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rich.make_bundle(tmp_path_factory.mktemp("rich") / "rich.bundle")


@pytest.fixture
def rich_pipeline(rich_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(rich_bundle, threads=1) as opened:
        yield opened
