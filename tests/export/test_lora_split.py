"""LoRAs under the names of the original FLUX and Stable Diffusion 3 code, whose projections diffusers splits.

The reference is a checkpoint under those names with the LoRA merged into it, as diffusers' single-file loader converts
it, and for FLUX diffusers' converters of LoRA files too. Both converters have FLUX's width built in where they split
single blocks, so those are as high here as FLUX's, but narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from glance_trt.errors import LoraError
from glance_trt.export import lora
from glance_trt.export.weights import TensorRef, read_header

Tensors = dict[str, torch.Tensor]
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
Shapes = dict[str, tuple[int, ...]]
Bases = Mapping[str, Mapping[str, TensorRef]]
RANK, ALPHA = 4, 6.0
WIDTH, HIGH = 16, 3072


def _flux() -> Shapes:
    shapes: Shapes = {"img_in": (WIDTH, 4), "txt_in": (WIDTH, 12)}
    shapes |= {"final_layer.linear": (4, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    for name, width in (("time_in", 256), ("vector_in", 20), ("guidance_in", 256)):
        shapes |= {f"{name}.in_layer": (WIDTH, width), f"{name}.out_layer": (WIDTH, WIDTH)}
    for i in range(2):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= {f"{block}_attn.qkv": (3 * WIDTH, WIDTH), f"{block}_attn.proj": (WIDTH, WIDTH)}
            shapes |= {f"{block}_mlp.0": (4 * WIDTH, WIDTH), f"{block}_mlp.2": (WIDTH, 4 * WIDTH)}
            shapes |= {f"{block}_mod.lin": (6 * WIDTH, WIDTH)}
        block = f"single_blocks.{i}"
        shapes |= {f"{block}.linear1": (7 * HIGH, WIDTH), f"{block}.linear2": (WIDTH, 5 * WIDTH)}
        shapes |= {f"{block}.modulation.lin": (3 * WIDTH, WIDTH)}
    return shapes


def _stable_diffusion_3() -> Shapes:
    shapes: Shapes = {"x_embedder.proj": (WIDTH, 4, 2, 2), "context_embedder": (WIDTH, WIDTH)}
    shapes |= {"final_layer.linear": (16, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    for name, width in (("t_embedder", 256), ("y_embedder", 20)):
        shapes |= {f"{name}.mlp.0": (WIDTH, width), f"{name}.mlp.2": (WIDTH, WIDTH)}
    for i in range(3):
        dual, last = i < 2, i == 2
        for stream in ("x", "context"):
            block = f"joint_blocks.{i}.{stream}_block"
            vectors = 2 if stream == "context" and last else 9 if stream == "x" and dual else 6
            shapes |= {f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.adaLN_modulation.1": (vectors * WIDTH, WIDTH)}
            if stream == "x" and dual:
                shapes |= {f"{block}.attn2.qkv": (3 * WIDTH, WIDTH), f"{block}.attn2.proj": (WIDTH, WIDTH)}
            if stream == "x" or not last:
                shapes |= {f"{block}.attn.proj": (WIDTH, WIDTH)}
                shapes |= {f"{block}.mlp.fc1": (4 * WIDTH, WIDTH), f"{block}.mlp.fc2": (WIDTH, 4 * WIDTH)}
    return shapes


SHAPES = {"flux": _flux(), "sd3": _stable_diffusion_3()}


def _convert(family: str, modules: Tensors) -> Tensors:
    """A checkpoint's weights under diffusers' names, by diffusers' converter."""
    checkpoint = dict(modules)
    for name, weight in modules.items():
        checkpoint[name.replace(".weight", ".bias")] = torch.zeros(len(weight))
    if family == "sd3":
        checkpoint["pos_embed"] = torch.zeros(1, 4, WIDTH)
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    for i in range(2):
        for norm in ("img_attn.norm", "txt_attn.norm"):
            checkpoint |= {f"double_blocks.{i}.{norm}.{kind}_norm.scale": torch.ones(8) for kind in ("query", "key")}
        checkpoint |= {f"single_blocks.{i}.norm.{kind}_norm.scale": torch.ones(8) for kind in ("query", "key")}
    return single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)


@pytest.fixture(scope="module")
def factors() -> dict[str, Factors]:
    """A random down and up factor for each module of each family."""
    generator = torch.Generator().manual_seed(1)
    return {
        family: {
            name: (
                torch.randn(RANK, *shape[1:], generator=generator),
                torch.randn(shape[0], RANK, *(1,) * len(shape[2:]), generator=generator),
            )
            for name, shape in shapes.items()
        }
        for family, shapes in SHAPES.items()
    }


@pytest.fixture(scope="module")
def original() -> dict[str, Tensors]:
    """Random weights of each family under the original names."""
    generator = torch.Generator().manual_seed(0)
    return {
        family: {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for family, shapes in SHAPES.items()
    }


@pytest.fixture(scope="module")
def bases(original: dict[str, Tensors], tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """The same in diffusers' layout, on disk."""
    bases = {}
    for family, modules in original.items():
        path = tmp_path_factory.mktemp("base") / f"{family}.safetensors"
        save_file(_convert(family, modules), path)
        bases[family] = read_header(path)[0]
    return bases


def _kohya(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    stem = f"lora_unet_{name.replace('.', '_')}"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}


def _comfyui(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    stem = f"diffusion_model.{name}"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}


def _plain(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def _peft(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    return {f"base_model.model.{key}": tensor for key, tensor in _plain(name, down, up).items()}


def _write(
    folder: Path,
    modules: Factors,
    layout: Callable[[str, torch.Tensor, torch.Tensor], Tensors],
) -> Path:
    tensors: Tensors = {}
    for name, (down, up) in modules.items():
        tensors |= layout(name, down, up)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.parametrize("layout", [_kohya, _comfyui, _plain, _peft])
@pytest.mark.parametrize("family", SHAPES)
def test_every_weight_is_that_of_the_merged_original(
    factors: dict[str, Factors],
    original: dict[str, Tensors],
    bases: Bases,
    tmp_path: Path,
    family: str,
    layout: Callable[[str, torch.Tensor, torch.Tensor], Tensors],
) -> None:
    found = lora.read(_write(tmp_path, factors[family], layout), bases[family])
    scale = ALPHA / RANK if layout in (_kohya, _comfyui) else 1.0
    assert found.scale == scale
    merged = {}
    for name, (down, up) in factors[family].items():
        weight = original[family][f"{name}.weight"]
        merged[f"{name}.weight"] = weight + scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    expected = _convert(family, merged)
    changeable = {name for name, ref in bases[family].items() if name.endswith(".weight") and len(ref.shape) > 1}
    assert found.pairs.keys() == changeable
    for name, pair in found.pairs.items():
        value = lora.fused(bases[family][name], pair).read()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def _updates_by_diffusers(file: Path) -> Tensors:
    """What diffusers' converter of FLUX LoRAs makes each weight's update."""
    state = FluxPipeline.lora_state_dict(str(file))
    ups = {key: value for key, value in state.items() if ".lora_B" in key}
    return {
        key.removeprefix("transformer.").replace(".lora_B", ""): up @ state[key.replace("lora_B", "lora_A")]
        for key, up in ups.items()
    }


def _updates(found: lora.Lora) -> Tensors:
    return {name: pair.scale * (pair.up.read() @ pair.down.read()) for name, pair in found.pairs.items()}


def _assert_same(updates: Tensors, expected: Tensors) -> None:
    assert updates.keys() == expected.keys()
    for name, update in updates.items():
        torch.testing.assert_close(update, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_kohya_files_of_flux_are_those_that_diffusers_converts(
    factors: dict[str, Factors],
    bases: Bases,
    tmp_path: Path,
) -> None:
    # diffusers ignores the alpha of the final layer.
    modules = {name: pair for name, pair in factors["flux"].items() if not name.startswith("final_layer")}
    file = _write(tmp_path, modules, _kohya)
    _assert_same(_updates(lora.read(file, bases["flux"])), _updates_by_diffusers(file))


def test_a_projection_whose_parts_were_trained_apart_is_split_alike(
    factors: dict[str, Factors],
    bases: Bases,
    tmp_path: Path,
) -> None:
    """kohya's split_qkv writes an up factor that is zero off its diagonal blocks; diffusers takes these apart."""
    down = torch.cat([factors["flux"]["double_blocks.0.img_attn.qkv"][0]] * 3)
    up = torch.block_diag(*factors["flux"]["double_blocks.0.img_attn.qkv"][1].split(WIDTH))
    file = _write(tmp_path, {"double_blocks.0.img_attn.qkv": (down, up)}, _kohya)
    found = lora.read(file, bases["flux"])
    assert found.scale == ALPHA / (3 * RANK)
    _assert_same(_updates(found), _updates_by_diffusers(file))


def test_attention_processors_of_xlabs(bases: Bases, tmp_path: Path) -> None:
    generator, tensors = torch.Generator().manual_seed(3), {}
    shapes = {f"double_blocks.{i}.processor.qkv_lora{s}": (3 * WIDTH, WIDTH) for i in range(2) for s in (1, 2)}
    shapes |= {f"double_blocks.{i}.processor.proj_lora{s}": (WIDTH, WIDTH) for i in range(2) for s in (1, 2)}
    shapes |= {f"single_blocks.{i}.processor.proj_lora": (WIDTH, 5 * WIDTH) for i in range(2)}
    shapes |= {f"single_blocks.{i}.processor.qkv_lora": (3 * HIGH, WIDTH) for i in range(2)}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.down.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"{name}.up.weight"] = torch.randn(rows, RANK, generator=generator)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = lora.read(tmp_path / "lora.safetensors", bases["flux"])
    assert (found.alpha, found.scale) == (None, 1.0)
    _assert_same(_updates(found), _updates_by_diffusers(tmp_path / "lora.safetensors"))


def test_parts_share_the_files_factors(
    factors: dict[str, Factors],
    bases: Bases,
    tmp_path: Path,
) -> None:
    name = "double_blocks.0.txt_attn.qkv"
    found = lora.read(_write(tmp_path, {name: factors["flux"][name]}, _kohya), bases["flux"])
    parts = [found.pairs[f"transformer_blocks.0.attn.add_{part}_proj.weight"] for part in "qkv"]
    assert len({pair.down for pair in parts}) == 1
    assert [pair.up.offset for pair in parts] == [parts[0].up.offset + i * WIDTH * RANK * 4 for i in range(3)]


def test_the_last_modulations_rows_are_exchanged(
    factors: dict[str, Factors],
    bases: Bases,
    tmp_path: Path,
) -> None:
    name = "final_layer.adaLN_modulation.1"
    up = factors["sd3"][name][1]
    found = lora.read(_write(tmp_path, {name: factors["sd3"][name]}, _kohya), bases["sd3"])
    pair = found.pairs["norm_out.linear.weight"]
    assert torch.equal(pair.up.read(), torch.cat([up[WIDTH:], up[:WIDTH]]))
    assert (pair.up.shape, pair.up.dtype) == ((2 * WIDTH, RANK), "F32")


def test_a_projection_of_another_height_is_refused(
    factors: dict[str, Factors],
    bases: Bases,
    tmp_path: Path,
) -> None:
    down, up = factors["flux"]["double_blocks.0.img_attn.qkv"]
    file = _write(tmp_path, {"double_blocks.0.img_attn.qkv": (down, up[:-1])}, _kohya)
    with pytest.raises(LoraError, match=r"attn_qkv: factors \[47, 4\] x \[4, 16\] do not fit the weight \[48, 16\]"):
        lora.read(file, bases["flux"])


def test_a_weight_that_is_changed_whole_and_as_a_part_is_refused(
    factors: dict[str, Factors],
    bases: Bases,
    tmp_path: Path,
) -> None:
    pair = factors["flux"]["double_blocks.0.img_attn.proj"]
    whole = {"double_blocks.0.img_attn.qkv": factors["flux"]["double_blocks.0.img_attn.qkv"]}
    file = _write(tmp_path, {**whole, "transformer_blocks.0.attn.to_k": pair}, _plain)
    with pytest.raises(LoraError, match=r"is not the only one that changes transformer_blocks\.0\.attn\.to_k\.weight"):
        lora.read(file, bases["flux"])


def test_a_lora_of_another_family_is_refused(
    factors: dict[str, Factors],
    bases: Bases,
    tmp_path: Path,
) -> None:
    file = _write(tmp_path, factors["flux"], _kohya)
    with pytest.raises(LoraError, match=r"keys match nothing in the model; is it a LoRA for another family\?"):
        lora.read(file, bases["sd3"])
