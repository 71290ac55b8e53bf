"""Plans of the demonstration model for every compute capability that a shipped target names, in float16 and float32."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from glance_trt import recipe
from glance_trt.bundle import Bundle
from glance_trt.compiling import compile_bundle
from glance_trt.engines import backends, targets
from glance_trt.export.compare import Taken
from glance_trt.export.parity import example_inputs

REPOSITORY = Path(__file__).parents[2]

SHIPPED = {name: targets.load(name).compute_capabilities for name in ("rtx", "rtx-turing")}
DENOISERS = ("denoiser.slow", "denoiser.fast")


@pytest.fixture(scope="module")
def compiled(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="pip install glance-trt[rtx]")
    folder = tmp_path_factory.mktemp("rtx")
    file = folder / "rtx32.yaml"
    file.write_text(f"name: rtx32\nbackend: tensorrt-rtx\ncompute_capabilities: {list(SHIPPED['rtx'])}\n")
    bundle = Path(shutil.copytree(shapes_bundle, folder / "shapes.bundle"))
    done = compile_bundle(bundle, ["rtx-turing", str(file)])
    for name in DENOISERS:
        assert set(done.precision["rtx-turing"][name]["convolution"]) == {"float16"}
        assert set(done.precision["rtx32"][name]["convolution"]) == {"float32"}
        assert set(done.precision["rtx-turing"][name]["matrix_multiply"]) == {"float16"}
    return bundle


@pytest.mark.parametrize(
    ("target", "capabilities"), [*SHIPPED.items(), ("rtx32", SHIPPED["rtx"])], ids=[*SHIPPED, "rtx in float32"]
)
def test_both_phases_have_code_for_every_capability(compiled: Path, target: str, capabilities: tuple[str, ...]) -> None:
    for name in DENOISERS:
        plan = (compiled / f"{target}.{name}.plan").read_bytes()
        for capability in capabilities:
            assert b"sm" + capability.replace(".", "").encode() in plan


def test_a_plan_in_float16_is_smaller(compiled: Path) -> None:
    sizes = {target: (compiled / f"{target}.denoiser.slow.plan").stat().st_size for target in ("rtx", "rtx32")}
    assert sizes["rtx"] < 0.8 * sizes["rtx32"]


@pytest.mark.parametrize("name", ["rtx", "tensorrt"])
def test_plans_are_compared_at_shapes_that_they_take(shapes_bundle: Path, name: str) -> None:
    """No GPU is here to refuse others."""
    from glance_trt.build import _Build
    from glance_trt.export import inputs
    from glance_trt.export.families import source_of

    work = object.__new__(_Build)
    plan, folder = recipe.load(str(REPOSITORY / "export/shapes.yaml"))
    target, work.inputs = targets.load(name), inputs.read(plan, folder)
    work.image = work.inputs.family.image()
    taken, sources = work._taken(target), work.inputs.family.sources()
    assert taken == Taken((1, 4), (16, 16))
    for graph, item in Bundle.open(shapes_bundle).manifest.graphs.items():
        (ranges,) = backends.ranges(item, target, work.image)
        for batch in taken.batches:
            given = example_inputs(source_of(sources, graph), batch, np.random.default_rng(0), latents=taken.latents)
            for port, (smallest, _, largest) in ranges.items():
                shape = given[port].shape
                assert all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))
