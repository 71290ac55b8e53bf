"""Models and bundles that several test files share; each is made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration bundle, built from its recipe for the CPU."""
    from glance_trt.build import build

    output = tmp_path_factory.mktemp("bundles") / "shapes.bundle"
    build(str(REPOSITORY / "export/shapes.yaml"), output, engines=["cpu"])
    return output
