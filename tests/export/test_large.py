"""Parity above the size that is compared whole: the same blocks in small, and samples of the fused weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from glance_trt.engines import onnxruntime
from glance_trt.errors import ParityError
from glance_trt.export import fuse, guide, large, lora, parity, weights
from glance_trt.export import inputs as inputs_
from glance_trt.export.compare import compare
from glance_trt.export.exporter import export
from glance_trt.export.families import Family, open_model, stored
from glance_trt.export.families.stable_diffusion import StableDiffusion
from glance_trt.export.guide import GuideFile
from glance_trt.export.model import Model
from glance_trt.export.trace import parameter_names
from glance_trt.export.weights import TensorRef, read_header
from glance_trt.recipe import Lora, Phase, Recipe
from glance_trt.runtime.runners import Runner
from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner
from glance_trt.staging import Staging

from ..models import sdxl

TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": TEXT | {"max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu"},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}
"""Stable Diffusion 1.5's, as far as they differ from the classes' defaults."""

KINDS = {"text_encoder": "F32", "denoiser": "F16", "decoder": "BF16"}
FLOAT32 = dict.fromkeys(KINDS, "float32")


@pytest.fixture
def full_size(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> StableDiffusion:
    """A Stable Diffusion 1.5 that has no weights at all."""
    for part, config in CONFIGS.items():
        (tmp_path / "large" / part).mkdir(parents=True)
        (tmp_path / "large" / part / "config.json").write_text(json.dumps(config))
    index = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "large" / "model_index.json").write_text(json.dumps(index))
    return StableDiffusion(Model(tmp_path / "large", "large"), make_recipe())


@pytest.fixture
def reduced(full_size: StableDiffusion) -> StableDiffusion:
    return full_size.reduced({})[0]


@pytest.fixture(autouse=True)
def _trace_once(traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glance_trt.export.trace.trace", traced)


# --- the reduced model ----------------------------------------------------------------------------------------------


def test_a_reduced_model_has_the_blocks_of_the_large_one(reduced: StableDiffusion) -> None:
    step = reduced.sources()["denoiser"].build()
    small = {type(module).__name__ for module in step.denoiser.modules()}
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(CONFIGS["unet"])
    assert small == {type(module).__name__ for module in whole.modules()}
    assert (
        sum(p.numel() for p in step.parameters()) < 5_000_000 < 800_000_000 < sum(p.numel() for p in whole.parameters())
    )


def _engines(folder: Path, files: Mapping[str, str]) -> Runner:
    """Engines for the CPU, as a build makes them."""
    graphs = {name: folder / file for name, file in files.items()}
    built = onnxruntime.build(graphs, directory=folder, prefix="cpu")
    return OnnxRuntimeRunner(folder, {name: engine.file for name, engine in built.items()})


@pytest.mark.parametrize("open_graphs", [parity.PortableRunner, _engines], ids=["portable", "engines"])
def test_graphs_of_a_reduced_model_are_compared_whole(open_graphs: Any, full_size: StableDiffusion) -> None:
    config = guide.configure("tiny", CONFIGS["unet"], 860_000_000)
    family, guides = full_size.reduced(dict.fromkeys(["middle", "fast"], GuideFile(Path("guide"), config, {})))
    found = large.check_reduced(family, guides, KINDS, FLOAT32, open_graphs=open_graphs)
    assert [item.graph for item in found] == ["text_encoder", "denoiser", "denoiser.middle", "decoder"]
    assert all(item.error <= item.tolerance for item in found)


def test_a_reduced_decoders_images_have_contrast_for_a_difference_to_show_in(reduced: StableDiffusion) -> None:
    source = reduced.sources()["decoder"]
    decoder = source.build().eval()
    decoder.load_state_dict({f"vae.{name}": value for name, value in large._random_weights(source, "F32").items()})
    with torch.no_grad():
        image = decoder(torch.randn(1, 4, 8, 8)).float()
    assert image.std() > 20
    assert ((image == 0) | (image == 255)).float().mean() < 0.2


def test_a_graph_that_differs_is_refused(reduced: StableDiffusion) -> None:
    class Altered(parity.PortableRunner):
        def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return {name: 1.001 * value for name, value in super().run(graph, inputs).items()}

    with pytest.raises(ParityError, match=r"^in a reduced model.*, text_encoder: differs .* by 0\.00.*for float32"):
        large.check_reduced(reduced, {}, {"text_encoder": "F16"}, FLOAT32, open_graphs=Altered)


def test_components_are_measured_in_float32(unet_weights: dict[str, TensorRef], monkeypatch: Any) -> None:
    parameters = sum(ref.length for ref in unet_weights.values()) // 2
    monkeypatch.setattr(large, "LIMIT", 4 * parameters)
    assert large.oversized({"denoiser": unet_weights}) == {}
    monkeypatch.setattr(large, "LIMIT", 4 * parameters - 1)
    assert large.oversized({"denoiser": unet_weights}) == {"denoiser": "F16"}


# --- samples of the fused weights -----------------------------------------------------------------------------------


@pytest.fixture
def loras(tmp_path: Path, tiny_model: Path, unet_weights: dict[str, TensorRef], write_lora: Any) -> dict[str, Any]:
    file = write_lora(tmp_path / "slow.safetensors", rank=8, targets=("to_q", "to_out.0", "conv1"))
    return {"slow": lora.read(file, unet_weights), "fast": None}


@pytest.fixture
def check(family: Family, tmp_path: Path, loras: dict[str, Any]) -> Callable[..., list[parity.Parity]]:
    """`check_fused` of the phase slow, over a base of the test's own."""
    changes = {"denoiser.slow": loras["slow"].pairs}
    return lambda base: large.check_fused(family, tmp_path, {"denoiser": base}, changes)


def _in(dtype: torch.dtype, tensors: Mapping[str, TensorRef], file: Path) -> dict[str, TensorRef]:
    save_file({name: ref.read().to(dtype) for name, ref in tensors.items()}, file)
    return read_header(file)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fused_weights_pass_and_so_do_those_that_peft_merges(
    dtype: torch.dtype, unet_weights: Any, loras: Any, tiny_model: Path, tmp_path: Path, check: Any
) -> None:
    base = _in(dtype, unet_weights, tmp_path / "base.safetensors")
    contents = fuse.plan(base, loras)
    weights.write(tmp_path / "denoiser.slow.safetensors", contents["denoiser.slow.safetensors"])
    assert check(base) == [parity.Parity("denoiser.slow.safetensors", 0.0, 0.0)]

    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet", torch_dtype=torch.float32)
    unet.load_state_dict({name: ref.read().float() for name, ref in base.items()})
    file = str(tmp_path / "slow.safetensors")
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(file, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
    merged = {name: unet.state_dict()[name].to(dtype) for name in loras["slow"].pairs}
    save_file(merged, tmp_path / "denoiser.slow.safetensors")
    check(base)
    save_file(dict(list(merged.items())[1:]), tmp_path / "denoiser.slow.safetensors")
    with pytest.raises(ParityError, match=rf"^denoiser\.slow\.safetensors: lacks {next(iter(merged))}, which a LoRA"):
        check(base)


@pytest.mark.parametrize("mistake", ["one bit", "scale", "half precision", "not a number", "base"])
def test_a_wrong_value_is_found(
    mistake: str, unet_weights: Any, loras: Any, tmp_path: Path, check: Any, monkeypatch: Any
) -> None:
    file = tmp_path / "denoiser.slow.safetensors"
    base = _in(torch.bfloat16, unet_weights, tmp_path / "base.safetensors")
    weights.write(file, fuse.plan(base, loras)[file.name])
    fused = load_file(file)
    pairs = loras["slow"].pairs
    name = max(sorted(pairs), key=lambda name: base[name].length)
    if mistake == "one bit":
        fused[name].view(torch.int16).view(-1)[7] ^= 1
    elif mistake == "not a number":
        fused[name].view(-1)[7] = float("nan")
    else:
        for each, pair in pairs.items():
            up, down, weight = pair.up.read(), pair.down.read(), base[each].read()
            if mistake == "half precision":
                update = pair.scale * (up.bfloat16().flatten(1) @ down.bfloat16().flatten(1))
            else:
                scale = pair.scale * (1.01 if mistake == "scale" else 0)
                update = scale * (up.float().flatten(1) @ down.float().flatten(1))
            fused[each] = (weight + update.view(weight.shape)).to(weight.dtype)
    save_file(fused, file)
    monkeypatch.setattr(large, "SAMPLES", 0)
    count = "1" if mistake in ("one bit", "not a number") else r"\d{2,}"
    message = (
        rf"denoiser\.slow\.safetensors: {count} values of {name} are not .*slow\.safetensors, rounded once to BF16"
    )
    with pytest.raises(ParityError, match=message):
        check(base)


@pytest.mark.parametrize("graph", ["text_encoder", "denoiser.slow"])
def test_a_build_s_comparison_reads_what_was_fused_into_each_component_too_large_to_be_loaded(
    graph: str, tiny_model: Path, write_lora: Any, make_recipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    write_lora(tmp_path / "slow.safetensors", text=True)
    phases = (Phase("slow", (1, 25), Lora("slow.safetensors")), Phase("fast", (50,)))
    inputs = inputs_.read(replace(make_recipe(model=str(tiny_model)), phases=phases), tmp_path)
    graphs = export(inputs, tmp_path / "x.bundle", None, ["float32"]).graphs
    folder = Staging(tmp_path / "x.bundle").folder
    monkeypatch.setattr(large, "oversized", lambda _: {graph.partition(".")[0]: "F16"})
    files = {name: item.files["float32"] for name, item in graphs.items()}
    found = compare(inputs, folder, files, dict.fromkeys(files, "float32"))
    assert found[-1] == parity.Parity(f"{graph}.safetensors", 0.0, 0.0)

    fused = load_file(folder / f"{graph}.safetensors")
    for name in inputs.changes()[graph]:
        fused[name] = inputs.tensors[graph.partition(".")[0]][name].read()
    save_file(fused, folder / f"{graph}.safetensors")
    with pytest.raises(ParityError, match=rf"^{graph}\.safetensors: \d+ values .*slow\.safetensors, rounded once"):
        compare(inputs, folder, files, dict.fromkeys(files, "float32"))


def test_a_layer_that_a_text_encoder_s_graph_leaves_out_is_not_asked_for(tmp_path: Path, make_recipe: Any) -> None:
    """SDXL reads the last but one of the hidden states."""
    folder = sdxl.make(tmp_path / "model")
    model = open_model(Model(folder, "sdxl"), make_recipe())
    base = model.model.tensors("text_encoder")
    names = [name for name in base if "q_proj.weight" in name]
    shapes = {"down": (2, 16), "up": (16, 2)}
    random = {f"{name}.{part}": torch.randn(shape) for name in names for part, shape in shapes.items()}
    save_file(random, tmp_path / "x.safetensors")
    factors = read_header(tmp_path / "x.safetensors")[0]
    pairs = {name: lora.Pair(factors[f"{name}.down"], factors[f"{name}.up"], 0.5, None) for name in names}
    tensors = {**base, **{name: lora.fused(base[name], pair) for name, pair in pairs.items()}}
    written = stored(model, parameter_names(model.sources()["text_encoder"]), tensors, folder)
    assert 0 < len(written.keys() & pairs.keys()) < len(pairs)
    weights.write(tmp_path / "text_encoder.safetensors", written)
    changes = {"text_encoder": pairs}
    assert large.check_fused(model, tmp_path, {"text_encoder": base}, changes)
