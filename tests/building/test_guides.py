"""Guides in a bundle: the base stays as it is, and images follow the guidance scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from glance_trt.cli.inspect import describe
from glance_trt.errors import InputError, OutputError, RecipeError
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.verify import psnr

from .conftest import Home, contents

GUIDED: dict[str, Any] = {  # two evaluations in the slow phase, one in the others
    "phases": [
        {"name": "slow", "steps": [1, 3]},
        {"name": "middle", "steps": [5], "guide": "middle.guide"},
        {"name": "fast", "steps": [6, 8, 10], "lora": {"file": "fast.safetensors"}, "guide": "fast.guide"},
    ]
}


@pytest.fixture
def guided(home: Home, write_guide: Callable[..., Path]) -> Home:
    """A home with two guides beside its LoRAs."""
    write_guide(home.folder / "middle.guide", "tiny", seed=1)
    write_guide(home.folder / "fast.guide", "embedding", seed=2)
    home.write(**GUIDED)
    return home


def _image(pipe: Pipeline, scale: float | None = None, **options: Any) -> Any:
    return np.asarray(pipe.generate("a red circle", seed=7, guidance_scale=scale, **options)[0])


def test_guides_are_built_into_their_phases_and_leave_the_base_alone(
    guided: Home, tiny_model: Path, write_guide: Callable[..., Path]
) -> None:
    report = guided.build()
    graphs = ["text_encoder", "denoiser.slow", "denoiser.middle", "denoiser.fast", "decoder"]
    assert [item.graph for item in report.parity["cpu"]] == graphs
    assert all(item.error <= item.tolerance for item in report.parity["cpu"])
    manifest = report.bundle.manifest
    modes = {name: graph.guidance for name, graph in manifest.graphs.items() if name.startswith("denoiser")}
    assert modes == {"denoiser.slow": "cfg", "denoiser.middle": "embedded", "denoiser.fast": "embedded"}
    assert [(item.phase, item.file, item.kind) for item in manifest.provenance.guides] == [
        ("middle", "middle.guide", "tiny"),
        ("fast", "fast.guide", "embedding"),
    ]
    lines = describe(manifest)
    assert "  middle       middle.guide, guide (tiny)" in lines
    assert "  fast         fast.guide, guide (embedding)" in lines
    assert "  guidance     cfg, embedded, scale 3 by default" in lines

    base = load_file(guided.output / "denoiser.base.safetensors")
    model = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert base.keys() == model.keys()
    assert all(np.array_equal(base[name], model[name]) for name in model)
    added = load_file(guided.output / "denoiser.middle.safetensors")
    assert added.keys() == {f"guide.{name}" for name in load_file(guided.folder / "middle.guide")}

    with Pipeline.open(report.bundle) as pipe:
        usual = _image(pipe)
        assert np.array_equal(_image(pipe, 3.0), usual)
        assert psnr(_image(pipe, 6.0), usual) < 40
        assert psnr(_image(pipe, negative_prompt="a star"), usual) < 60  # of the slow phase

    before = contents(guided.output)
    assert guided.build().unchanged
    write_guide(guided.folder / "middle.guide", "tiny", seed=3)
    with pytest.raises(OutputError, match="is not what the recipe makes now; give --overwrite"):
        guided.build()
    stages = guided.stages(overwrite=True)
    assert [stage for stage in stages if stage.startswith(("trace", "write"))] == ["write denoiser.middle"]
    after = contents(guided.output)
    changed = {name for name in before if after[name] != before[name]}
    assert {"denoiser.middle.safetensors", "bundle.json"} <= changed
    assert all(name.startswith(("denoiser.middle", "cpu.denoiser", "bundle.json")) for name in changed)


def test_a_bundle_takes_only_scales_that_all_its_guides_were_trained_for(
    guided: Home, write_guide: Callable[..., Path]
) -> None:
    write_guide(guided.folder / "middle.guide", "tiny", scales=(2.0, 9.0))
    write_guide(guided.folder / "fast.guide", "embedding", scales=(1.0, 4.0))
    bundle = guided.build().bundle
    assert bundle.manifest.guidance.range == (2.0, 4.0)
    assert "  guidance     cfg, embedded, scale 3 by default, from 2 to 4" in describe(bundle.manifest)
    with Pipeline.open(bundle) as pipeline:
        _image(pipeline, 4.0)
        with pytest.raises(
            InputError, match=r"^guidance scale: 4\.5 is outside 2 to 4, which the guide in this bundle"
        ):
            _image(pipeline, 4.5)
    guided.write(**GUIDED, guidance={"mode": "cfg", "scale": 5.0})
    with pytest.raises(
        RecipeError, match=r"tiny\.yaml: guidance\.scale: 5 is outside 1 to 4, which the guide of phase fast was"
    ):
        guided.build(overwrite=True)


def test_an_embedded_scale_gives_the_images_of_diffusers_own_embedding(guided: Home) -> None:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    phase = {"name": "all", "steps": list(range(1, 11)), "lora": {"file": "slow.safetensors"}, "guide": "fast.guide"}
    guided.write(phases=[phase], guidance={"mode": "embedded", "scale": 4.0})
    guided.build()
    reference = StableDiffusionPipeline.from_pretrained(guided.folder / "model", dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    state = reference.unet.state_dict()
    reference.unet = UNet2DConditionModel.from_config({**reference.unet.config, "time_cond_proj_dim": 256}).eval()
    embedding = torch.from_numpy(load_file(guided.folder / "fast.guide")["cond_proj.weight"])
    reference.unet.load_state_dict({**state, "time_embedding.cond_proj.weight": embedding})
    reference.load_lora_weights(guided.folder / "slow.safetensors")
    with Pipeline.open(guided.output) as pipe:
        for scale in (4.0, 7.5):
            (expected,) = reference(
                "a red circle",
                height=16,
                width=16,
                num_inference_steps=10,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(7),
                output_type="np",
            ).images
            assert expected.std() > 0.04  # there is something to see
            assert psnr(_image(pipe, scale), (expected * 255).round().astype(np.uint8)) >= 50
        assert np.array_equal(_image(pipe, 4.0), _image(pipe))
        assert psnr(_image(pipe, 4.0), _image(pipe, 7.5)) < 40
        with pytest.raises(InputError, match="negative prompt: this bundle takes none"):
            _image(pipe, negative_prompt="blue")
