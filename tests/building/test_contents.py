"""What is in a bundle: the images are those of diffusers, and the manifest says what it was made of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from glance_trt import recipe
from glance_trt.bundle import Bundle
from glance_trt.distill.loras import with_metadata
from glance_trt.engines import backends
from glance_trt.engines.targets import Target
from glance_trt.errors import LoraError
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


def test_images_made_from_an_image_are_those_of_diffusers(home: Home) -> None:
    """All of the teacher's steps, so that diffusers can make them: it has no other knots for this scheduler."""
    phases = [{"name": "slow", "steps": [1, 2, 3, 4, 5]}, {"name": "fast", "steps": [6, 7, 8, 9, 10]}]
    home.write(phases=phases, sizes=[[24, 16]], from_image=True, guidance={"scale": 3.0, "negative_prompt": "blue"})
    home.build()
    reference = StableDiffusionImg2ImgPipeline.from_pretrained(home.folder / "model", torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 29, 3), np.uint8))
    with Pipeline.open(home.output) as pipe:
        for (height, width), strength in itertools.product(((16, 16), (24, 16)), (1.0, 0.75, 0.33)):
            found = pipe.generate("a star", seed=7, count=2, image=start, strength=strength, height=height, width=width)
            for seed, image in enumerate(found, start=7):
                expected = reference(
                    "a star",
                    image=start.resize((width, height), Image.Resampling.LANCZOS),
                    strength=strength,
                    num_inference_steps=10,
                    guidance_scale=3.0,
                    negative_prompt="blue",
                    generator=torch.Generator("cpu").manual_seed(seed),
                ).images[0]
                assert psnr(np.asarray(image), np.asarray(expected)) >= 50


def test_a_lora_changes_the_text_encoder_as_diffusers_has_it(home: Home, first: Home, write_lora: Any) -> None:
    from glance_trt.export.reference import DiffusersReference

    write_lora(home.folder / "slow.safetensors", seed=1, text=True)
    home.build()
    reference = DiffusersReference(*recipe.load(home.folder / "tiny.yaml"))
    with Pipeline.open(home.output) as pipe, Pipeline.open(first.output) as plain:
        (image,), (without,) = (
            [np.asarray(image) for image in one.generate("a red circle", seed=7)] for one in (pipe, plain)
        )
    assert psnr(image, reference.generate("a red circle", [7])[0]) >= 50
    assert psnr(image, without) < 40


def test_loras_that_change_the_text_encoder_differently_are_refused(home: Home, write_lora: Any) -> None:
    write_lora(home.folder / "slow.safetensors", seed=1, text=True)
    write_lora(home.folder / "fast.safetensors", seed=2, targets=("to_q", "conv1"), text=True)
    with pytest.raises(LoraError, match=r"fast\.safetensors: changes the text encoders in another way than .*slow"):
        home.build()


def test_a_build_for_bfloat16_alone_is_compared_in_float32(home: Home) -> None:
    """ONNX Runtime computes in no bfloat16 on a CPU."""
    target = {"name": "half", "backend": "onnxruntime-gpu", "dtype": "bfloat16"}
    (home.folder / "half.yaml").write_text(yaml.safe_dump(target))
    report = home.build(engines=[str(home.folder / "half.yaml")])
    assert {(item.graph, item.tolerance) for item in report.parity["portable graphs"]} >= {("denoiser.slow", 1e-4)}
    for graph in report.bundle.manifest.graphs.values():
        assert sorted(graph.files) == ["bfloat16", "float32"]


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
        whole = self._family.model.folder == home.folder / "model"
        loaded.append(graph if whole else f"reduced {graph}")
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
