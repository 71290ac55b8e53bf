"""What is in a bundle: the images are those of diffusers, and the manifest says what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glance_trt import recipe
from glance_trt.bundle import Bundle
from glance_trt.distill.loras import with_metadata
from glance_trt.engines import backends
from glance_trt.engines.targets import Target
from glance_trt.export import parity
from glance_trt.export.families.stable_diffusion import StableDiffusion
from glance_trt.export.lora import PROVENANCE
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.verify import psnr

from .conftest import Home


def test_a_bundle_makes_the_images_that_diffusers_makes(first: Home) -> None:
    from glance_trt.export.reference import DiffusersReference

    reference = DiffusersReference(*recipe.load(first.folder / "tiny.yaml"))
    with Pipeline.open(first.output) as pipe:
        images = [np.asarray(image) for image in pipe.generate("a red circle", seed=7, count=2)]
    expected = reference.generate("a red circle", [7, 8])
    for image, wanted in zip(images, expected, strict=True):
        assert wanted.std() > 10  # there is something to see
        assert psnr(image, wanted) >= 50
    assert psnr(images[0], images[1]) < 20


def test_the_report_has_the_parity_of_every_graph_and_notes(
    built: Home, loras: dict[str, Path], write_lora: Any
) -> None:
    write_lora(built.folder / "slow.safetensors", seed=1, with_metadata=False)
    report = built.build(overwrite=True)
    graphs = ["text_encoder", "denoiser.slow", "denoiser.middle", "denoiser.fast", "decoder"]
    assert [item.graph for item in report.parity["cpu"]] == graphs
    assert all(item.error <= item.tolerance for item in report.parity["cpu"])
    (note,) = report.notes
    assert note.startswith(f"{built.folder / 'slow.safetensors'} gives no alpha; its scale is taken as 1.")


def test_a_lora_that_was_trained_for_other_steps_is_noted(built: Home) -> None:
    file = built.folder / "slow.safetensors"
    for timesteps, text in (
        ([999.0, 799.0], ""),
        ([999.0, 899.0], f"{file} was not trained at timesteps 799 of phase slow. "),
    ):
        file.write_bytes(with_metadata(file.read_bytes(), {PROVENANCE: json.dumps({"timesteps": timesteps})}))
        notes = " ".join(built.build(overwrite=True).notes)
        assert notes.startswith(text), notes
        assert bool(notes) == bool(text)


def test_the_bundle_says_what_it_was_made_of(first: Home) -> None:
    manifest = Bundle.open(first.output).manifest
    assert [(lora.phase, lora.file, lora.scale, lora.alpha) for lora in manifest.provenance.loras] == [
        ("slow", "slow.safetensors", 3.0, 6.0),
        ("fast", "fast.safetensors", 2.0, 6.0),
    ]
    assert manifest.guidance.negative_prompt == "blue"
    assert [step.phase for step in manifest.schedule(None).steps] == ["slow"] * 2 + ["middle"] + ["fast"] * 3
    assert manifest.graphs["denoiser.middle"].weights == ("denoiser.base.safetensors",)
    assert manifest.graphs["denoiser.fast"].weights == ("denoiser.base.safetensors", "denoiser.fast.safetensors")
    for graph in manifest.graphs.values():
        for file in graph.files.values():
            assert str(first.folder).encode() not in (first.output / file).read_bytes()


def test_what_is_too_large_to_be_loaded_is_compared_in_small_and_by_samples(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glance_trt.export.large.oversized", lambda tensors: {"denoiser": "F16"})
    loaded: list[str] = []
    run = parity.Reference.run

    def watched(self: Any, graph: str, inputs: Any) -> Any:
        loaded.append(graph if self._model == home.folder / "model" else f"reduced {graph}")
        return run(self, graph, inputs)

    monkeypatch.setattr(parity.Reference, "run", watched)
    found = home.build()
    compared = [item.graph for item in found.parity["cpu"]]
    samples = ["denoiser.slow.safetensors", "denoiser.fast.safetensors"]
    assert compared == ["text_encoder", "decoder", "denoiser", *samples]
    assert set(loaded) == {"text_encoder", "decoder", "reduced denoiser"}


def write_plans(
    target: Target,
    graphs: Mapping[str, Path],
    ranges: Any,
    *,
    group: str,
    directory: Path,
    dtypes: Mapping[str, str],
    progress: Any,
) -> dict[str, backends.Built]:
    """In place of `backends.build`: plans that say what they were compiled from."""
    for name, graph in graphs.items():
        (directory / f"{target.name}.{name}.plan").write_text(f"{target.name} {graph.name} {dtypes[name]}")
    return {
        name: backends.Built(f"{target.name}.{name}.plan", (), {"CONVOLUTION": {dtypes[name]: 1}}) for name in graphs
    }


def test_a_part_may_compute_in_another_dtype_than_its_target(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def dtype(_: StableDiffusion, kind: str, wanted: str) -> str:
        return "float32" if kind == "decoder" else wanted

    monkeypatch.setattr(StableDiffusion, "dtype", dtype)
    monkeypatch.setattr("glance_trt.engines.backends.unavailable", lambda target: None)
    monkeypatch.setattr("glance_trt.engines.backends.requires", lambda target: {"tensorrt": "11"})
    monkeypatch.setattr("glance_trt.engines.backends.build", write_plans)
    (home.folder / "half.yaml").write_text("name: half\nbackend: tensorrt\ndtype: float16\n")
    report = home.build(engines=[str(home.folder / "half.yaml")])
    manifest = report.bundle.manifest
    for name, graph in manifest.graphs.items():
        dtype = "float32" if name == "decoder" else "float16"
        assert graph.files == {dtype: f"{name}.{dtype}.onnx"}
        assert (home.output / f"half.{name}.plan").read_text() == f"half {graph.files[dtype]} {dtype}"
    engines = manifest.engines["half"]
    assert engines.dtype == "float16"
    assert {name: engine.dtype for name, engine in engines.graphs.items() if engine.dtype} == {"decoder": "float32"}
    assert report.page
    assert "half, decoder: 1 float32" in report.page.read_text()
    assert list(report.parity) == ["portable graphs"], "no plan runs here"
    assert {item.graph: item.tolerance for item in report.parity["portable graphs"]} == {
        name: 1 if name == "decoder" else parity.TOLERANCES["float16"] for name in manifest.graphs
    }


def test_the_report_shows_an_image_of_every_example(home: Home) -> None:
    home.write(examples=["a red circle", "a <blue> star"])
    report = home.build()
    assert report.page == home.output.with_name("tiny.bundle.report.html")
    page = report.page.read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "a &lt;blue&gt; star" in page
    assert "examples" in report.seconds
    assert home.build().unchanged
    home.write(examples=["another"])
    assert home.build().unchanged, "the bundle is the same"
