"""The check that every build ends with: it passes what is right, and refuses what is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from glance_trt.errors import ParityError
from glance_trt.export import lora, parity
from glance_trt.export.families import Family, open_model, stored
from glance_trt.export.model import Model
from glance_trt.export.weights import TensorRef, component_tensors
from glance_trt.recipe import Recipe


class Altered:
    """A runner that answers with the reference's outputs, times a factor."""

    def __init__(self, reference: parity.Reference, factor: float) -> None:
        self.reference, self.factor, self.batches = reference, factor, []

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ((name, found),) = self.reference.run(graph, inputs).items()
        self.batches.append(len(found))
        if found.dtype == np.uint8:
            return {name: np.clip(found.astype(int) + self.factor, 0, 255).astype(np.uint8)}
        return {name: (found * self.factor).astype(np.float32)}

    def close(self) -> None:
        pass


@pytest.fixture
def reference(family: Family, tiny_model: Path) -> parity.Reference:
    return parity.Reference(family, {"all": None})


def _check(reference: parity.Reference, family: Family, graph: str, factor: float, dtype: str) -> list[parity.Parity]:
    return parity.check(Altered(reference, factor), {graph: dtype}, reference, family.sources())


@pytest.mark.parametrize(
    ("graph", "dtype", "right", "wrong"),
    [
        ("denoiser.all", "float32", 1 + 5e-5, 1 + 5e-4),
        ("denoiser.all", "float16", 1.02, 1.05),
        ("denoiser.all", "bfloat16", 1.05, 1.2),
        ("text_encoder", "float32", 1 - 5e-5, float("nan")),
        ("decoder", "float32", 1, 2),
        ("decoder", "float16", 4, 5),
    ],
)
def test_errors_are_accepted_up_to_the_tolerance(
    reference: parity.Reference, family: Family, graph: str, dtype: str, right: float, wrong: float
) -> None:
    (found,) = _check(reference, family, graph, right, dtype)
    assert 0 < found.error <= found.tolerance
    assert found.graph == graph
    with pytest.raises(ParityError, match=rf"{graph}: differs from PyTorch by .*; at most .* is accepted for {dtype}"):
        _check(reference, family, graph, wrong, dtype)


def test_every_graph_is_compared_at_batch_1_and_3(reference: parity.Reference, family: Family) -> None:
    runner = Altered(reference, 1)
    calls: list[tuple[str, float, float]] = []
    parity.check(
        runner,
        {"denoiser.all": "float32", "text_encoder": "float32"},
        reference,
        family.sources(),
        lambda *call: calls.append(call),
    )
    assert runner.batches == [1, 3, 1, 3]
    assert calls == [("parity", 0, 2), ("parity", 1, 2), ("parity", 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_diffusers_unet_with_the_lora_that_diffusers_loads(
    tiny_model: Path,
    make_recipe: Callable[..., Recipe],
    write_lora: Callable[..., Path],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    """With weights in float32 diffusers leaves the LoRA unfused; those in bfloat16 are rounded after fusing."""
    for part in ("unet", "text_encoder", "vae", "model_index.json", "scheduler"):
        (tmp_path / part).symlink_to(tiny_model / part)
    (tmp_path / "unet").unlink()
    UNet2DConditionModel.from_pretrained(tiny_model / "unet", dtype=dtype).save_pretrained(tmp_path / "unet")
    file = write_lora(tmp_path / "lora.safetensors", targets=("to_q", "to_out.0", "conv1"))
    family = open_model(Model(tmp_path, "tiny"), make_recipe())
    found = lora.read(file, component_tensors(tmp_path / "unet"))
    reference = parity.Reference(family, {"slow": found, "fast": None})
    inputs = parity.example_inputs(family.sources()["denoiser"], 2, np.random.default_rng(0))
    changed, base = (reference.run(f"denoiser.{name}", inputs)["latents_out"] for name in ("slow", "fast"))
    assert np.abs(changed - base).max() > 1e-2 * np.abs(base).max()

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", dtype=torch.float32)
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    if dtype != torch.float32:
        unet.fuse_lora()
        unet.unload_lora()
        unet = unet.to(dtype).float()
    latents, embeds = (torch.from_numpy(inputs[n]) for n in ("latents", "prompt_embeds"))
    negative, (c_in, a, b) = torch.from_numpy(inputs["negative_prompt_embeds"]), inputs["coefficients"]
    with torch.no_grad():
        without = unet(latents * c_in, 500.0, negative).sample
        with_ = unet(latents * c_in, 500.0, embeds).sample
    guided = without + 4.0 * (with_ - without)
    guided *= 0.7 * with_.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True) + 0.3
    expected = (a * latents + b * guided).numpy()
    assert np.abs(changed - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_reference_reads_the_names_of_early_files(
    tiny_model: Path, make_recipe: Callable[..., Recipe], reference: parity.Reference, tmp_path: Path
) -> None:
    """Stable Diffusion 1's published files: other names in the VAE's attention, and position ids among the weights."""
    for part in ("unet", "model_index.json", "scheduler"):
        (tmp_path / part).symlink_to(tiny_model / part)
    for part, file in (("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_bytes((tiny_model / part / "config.json").read_bytes())
        tensors = load_file(tiny_model / part / file)
        if part == "vae":
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                tensors = {n.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for n, t in tensors.items()}
        else:
            tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, tmp_path / part / file)
    family = open_model(Model(tmp_path, "tiny"), make_recipe())
    early = parity.Reference(family, {"all": None})
    for graph in ("decoder", "text_encoder"):
        inputs = parity.example_inputs(family.sources()[graph], 2, np.random.default_rng(0))
        ((name, found),) = early.run(graph, inputs).items()
        assert np.array_equal(found, reference.run(graph, inputs)[name])


def test_portable_graphs_run_where_no_engine_is(
    family: Family, tiny_model: Path, traced: Callable[..., Any], reference: parity.Reference, tmp_path: Path
) -> None:
    from glance_trt.export import trace, weights
    from glance_trt.export.weights import read_header

    refs: dict[str, TensorRef] = component_tensors(tiny_model / "text_encoder")
    source = family.sources()["text_encoder"]
    chosen = stored(family, trace.parameter_names(source), refs, tiny_model)
    weights.write(tmp_path / "w.safetensors", chosen)
    trace.bind(traced(source, "float32"), read_header(tmp_path / "w.safetensors")[0], tmp_path / "t.onnx")
    runner = parity.PortableRunner(tmp_path, {"text_encoder": "t.onnx"})
    (found,) = parity.check(runner, {"text_encoder": "float32"}, reference, family.sources())
    assert found.error < 1e-5
    runner.close()
