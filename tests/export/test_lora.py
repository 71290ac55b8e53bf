"""LoRA files in every layout: what is read is compared with what diffusers and PEFT make of the same file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from glance_trt.errors import LoraError
from glance_trt.export import lora
from glance_trt.export.weights import TensorRef

from ..models.loras import kohya

Tensors = dict[str, torch.Tensor]
Refs = Mapping[str, TensorRef]
TARGETS = ("to_q", "to_out.0", "conv1")
ALPHA, RANK = 6.0, 2
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def diffusers_file(write_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention projections and convolutions, as diffusers saves them, with its metadata."""
    return write_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", targets=TARGETS, alpha=ALPHA, rank=RANK)


@pytest.fixture(scope="module")
def factors(diffusers_file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Down and up factor by module."""
    tensors = load_file(diffusers_file)
    names = [key.removeprefix("unet.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    return {name: (tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"]) for name in names}


def _attention_processors(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    tensors = {}
    for name, (down, up) in factors.items():
        attention, _, layer = name.replace(".to_out.0", ".to_out").rpartition(".")
        if layer.startswith("to_"):
            stem = f"unet.{attention}.processor.{layer}_lora"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return tensors


def _scales_by_diffusers(tiny_model: Path, path: Path) -> dict[str, float]:
    """The scale of every weight that diffusers changes when it loads the file."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(path), unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    return {f"{name}.weight": next(iter(layer.scaling.values())) for name, layer in layers.items()}


def test_diffusers_layout_has_the_scale_of_its_metadata(
    diffusers_file: Path, unet_weights: Refs, tiny_model: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    found = lora.read(diffusers_file, unet_weights)
    assert {name: pair.scale for name, pair in found.pairs.items()} == _scales_by_diffusers(tiny_model, diffusers_file)
    assert (found.alpha, found.scale) == (ALPHA, ALPHA / RANK)
    for name, (down, up) in factors.items():
        assert torch.equal(found.pairs[f"{name}.weight"].down.read(), down)
        assert torch.equal(found.pairs[f"{name}.weight"].up.read(), up)


def test_kohya_layout_has_the_scale_of_its_alphas(
    unet_weights: Refs, tiny_model: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "kohya.safetensors"
    save_file(kohya(factors, ALPHA), path)
    found = lora.read(path, unet_weights)
    assert {name: pair.scale for name, pair in found.pairs.items()} == _scales_by_diffusers(tiny_model, path)
    assert found.pairs.keys() == {f"{name}.weight" for name in factors}
    assert found.alpha == ALPHA
    for name, (down, up) in factors.items():
        assert torch.equal(found.pairs[f"{name}.weight"].down.read(), down)
        assert torch.equal(found.pairs[f"{name}.weight"].up.read(), up)


def test_the_layout_of_early_attention_processors_is_read(
    unet_weights: Refs, tiny_model: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "old.safetensors"
    save_file(_attention_processors(factors), path)
    found = lora.read(path, unet_weights)
    assert {name: pair.scale for name, pair in found.pairs.items()} == _scales_by_diffusers(tiny_model, path)
    for name in found.pairs:
        assert torch.equal(found.pairs[name].down.read(), factors[name.removesuffix(".weight")][0])
    assert any("to_out.0" in name for name in found.pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {r"down_blocks.*to_q": 3.0, "up_blocks.*attn1.to_q": 5.0}, "rank_pattern": {"to_q": 4}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_peft_layout_takes_alpha_from_the_configuration_beside_it(
    tiny_model: Path, unet_weights: Refs, tmp_path: Path, settings: dict[str, object]
) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), init_lora_weights=False, **settings)
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path)
    expected = {
        f"{name.removeprefix('base_model.model.')}.weight": layer.scaling["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    found = lora.read(tmp_path / "adapter_model.safetensors", unet_weights)
    assert {name: pair.scale for name, pair in found.pairs.items()} == expected
    if settings == {"use_rslora": True}:
        assert found.scale == ALPHA / math.sqrt(RANK)
    (tmp_path / "adapter_config.json").unlink()
    alone = lora.read(tmp_path / "adapter_model.safetensors", unet_weights)
    assert (alone.alpha, alone.scale) == (None, 1.0)


def test_patterns_in_diffusers_metadata_are_followed(
    write_lora: Callable[..., Path], tiny_model: Path, unet_weights: Refs, tmp_path: Path
) -> None:
    path = write_lora(
        tmp_path / "x.safetensors", targets=TARGETS, alpha_pattern={"attn2.to_q": 5.0, "up_blocks.*conv1": 9.0}
    )
    found = lora.read(path, unet_weights)
    assert {name: pair.scale for name, pair in found.pairs.items()} == _scales_by_diffusers(tiny_model, path)
    assert found.alpha is None  # there are several


def test_a_file_without_alpha_has_scale_one(
    write_lora: Callable[..., Path], unet_weights: Refs, tmp_path: Path
) -> None:
    found = lora.read(write_lora(tmp_path / "x.safetensors", with_metadata=False), unet_weights)
    assert (found.alpha, found.scale) == (None, 1.0)
    assert {(pair.alpha, pair.scale) for pair in found.pairs.values()} == {(None, 1.0)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alphas_are_read_in_every_dtype(
    unet_weights: Refs, tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    alpha = {f"{TO_Q}.alpha": torch.full(shape, 3, dtype=dtype)}
    factors = {f"{TO_Q}.lora_A.weight": torch.ones(2, 8), f"{TO_Q}.lora_B.weight": torch.ones(8, 2)}
    found = _read(factors | alpha, tmp_path, unet_weights)
    assert (found.alpha, found.scale) == (3.0, 1.5)


def test_reading_takes_no_pytorch(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], tiny_model: Path, tmp_path: Path
) -> None:
    save_file(kohya(factors, ALPHA), tmp_path / "kohya.safetensors")
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from glance_trt.export import lora, weights\n"
        "unet = weights.component_tensors(Path(sys.argv[1]))\n"
        "found = lora.read(Path(sys.argv[2]), unet, encoders={'text_encoder': unet})\n"
        "print(len(found.pairs), found.alpha)"
    )
    command = [sys.executable, "-c", script, str(tiny_model / "unet"), str(tmp_path / "kohya.safetensors")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.split() == [str(len(factors)), str(ALPHA)]


def test_an_explicit_scale_replaces_alpha_over_rank(diffusers_file: Path, unet_weights: Refs) -> None:
    found = lora.read(diffusers_file, unet_weights, 0.25)
    assert {pair.scale for pair in found.pairs.values()} == {0.25}
    assert (found.scale, found.alpha) == (0.25, ALPHA)


def _read(tensors: Tensors, folder: Path, weights: Refs) -> lora.Lora:
    save_file(tensors, folder / "x.safetensors")
    return lora.read(folder / "x.safetensors", weights)


def test_keys_that_match_nothing_are_listed(unet_weights: Refs, tmp_path: Path) -> None:
    pair = {f"{TO_Q}.lora_A.weight": torch.ones(2, 8), f"{TO_Q}.lora_B.weight": torch.ones(8, 2)}
    others = {f"lora_te_{i}.lora_down.weight": torch.ones(1) for i in range(10)}
    with pytest.raises(LoraError, match="10 of 12 keys match nothing in the model") as caught:
        _read(pair | others, tmp_path, unet_weights)
    text = str(caught.value)
    assert "lora_te_0.lora_down.weight" in text
    assert "and 2 more" in text
    assert "a text encoder's have to be removed" in text


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((2, 9), (8, 2)),
        ((2, 8), (9, 2)),
        ((2, 8), (8, 3)),
        ((0, 8), (8, 0)),
        ((8,), (8,)),
        ((), ()),
        ((2, 8, 1, 1), (8, 2, 1, 1)),
    ],
)
def test_factors_that_do_not_fit_are_named(
    unet_weights: Refs, tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    with pytest.raises(LoraError, match=r"attn1\.to_q: factors .* do not fit the weight \[8, 8\]; is it a LoRA for"):
        _read(
            {f"{TO_Q}.lora_A.weight": torch.ones(down), f"{TO_Q}.lora_B.weight": torch.ones(up)}, tmp_path, unet_weights
        )


def test_a_convolution_whose_up_factor_is_spatial_is_refused(unet_weights: Refs, tmp_path: Path) -> None:
    tensors = {"conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "conv_in.lora_B.weight": torch.ones(8, 2, 3, 3)}
    with pytest.raises(LoraError, match=r"conv_in: factors .* do not fit"):
        _read(tensors, tmp_path, unet_weights)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{TO_Q}.lora_A.weight": torch.ones(2, 8)}, "to_q has no up factor; the file is incomplete"),
        ({f"{TO_Q}.lora_B.weight": torch.ones(8, 2)}, "to_q has no down factor; the file is incomplete"),
        ({f"{TO_Q}.alpha": torch.tensor(1.0)}, "to_q has no down factor; the file is incomplete"),
        (
            {
                f"{TO_Q}.lora_A.weight": torch.ones(2, 8),
                f"{TO_Q}.lora_B.weight": torch.ones(8, 2),
                f"{TO_Q}.alpha": torch.ones(2),
            },
            r"the alpha of .*to_q has shape \[2\]; expected one number",
        ),
        (
            {f"{TO_Q}.lora_A.weight": torch.ones(2, 8), f"unet.{TO_Q}.lora_A.weight": torch.ones(2, 8)},
            "to_q.lora_A.weight is not the only one of its kind for",
        ),
        ({f"{TO_Q}.dora_scale": torch.ones(1)}, "belongs to a DoRA adapter; only plain LoRA can be fused"),
        ({f"{TO_Q}.lora_magnitude_vector": torch.ones(1)}, "belongs to a DoRA adapter"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "belongs to a LoHa adapter"),
        ({"lora_unet_conv_in.lokr_w1": torch.ones(1)}, "belongs to a LoKr adapter"),
        ({"lora_unet_conv_in.lora_mid.weight": torch.ones(1)}, "belongs to a LoCon with a Tucker core adapter"),
        ({"lora_unet_conv_in.oft_blocks": torch.ones(1)}, "belongs to an OFT adapter"),
        ({"conv_in.lora_B.bias": torch.ones(1)}, "belongs to a LoRA with biases"),
        ({"diffusion_model.conv_in.diff": torch.ones(1)}, "belongs to a difference of whole weights"),
        ({"text_model.token_embedding.lora_embedding_A": torch.ones(1)}, "belongs to a LoRA of an embedding"),
        ({}, "empty, it has no tensors"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(
    unet_weights: Refs, tmp_path: Path, tensors: Tensors, message: str
) -> None:
    with pytest.raises(LoraError, match=rf"x\.safetensors: .*{message}"):
        _read(tensors, tmp_path, unet_weights)


def test_a_truncated_file_is_refused(diffusers_file: Path, unet_weights: Refs, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(diffusers_file.read_bytes()[:-1])
    with pytest.raises(LoraError, match=r"x\.safetensors: not a readable safetensors file: .* which may be truncated"):
        lora.read(path, unet_weights)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(
    suffix: str, diffusers_file: Path, unet_weights: Refs, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save(load_file(diffusers_file), path)
    message = rf"x\{suffix}: weights in a pickle, .* convert it:\n  python -c .*x\.safetensors$"
    with pytest.raises(LoraError, match=message):
        lora.read(path, unet_weights)


def test_a_guide_is_no_lora(write_guide: Callable[..., Path], unet_weights: Refs, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"x\.safetensors: a guide, no LoRA; a phase names it under guide"):
        lora.read(write_guide(tmp_path / "x.safetensors", "tiny"), unet_weights)


def test_a_folder_is_no_lora(unet_weights: Refs, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"a folder; expected a \.safetensors file"):
        lora.read(tmp_path, unet_weights)


def test_a_missing_file_says_how_to_make_one(unet_weights: Refs, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"no\.safetensors: no such LoRA file; correct the path, or for Stable Diff"):
        lora.read(tmp_path / "no.safetensors", unet_weights)


@pytest.mark.parametrize(
    "config", ["{", "[]", json.dumps({"unet.lora_alpha": "much"}), json.dumps({"unet.alpha_pattern": {"(": 1}})]
)
def test_a_configuration_that_cannot_be_read_is_refused(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], unet_weights: Refs, tmp_path: Path, config: str
) -> None:
    tensors = {f"{name}.lora_{'AB'[i]}.weight": pair[i] for name, pair in factors.items() for i in range(2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": config})
    with pytest.raises(LoraError, match=r"x\.safetensors: its adapter configuration is not readable"):
        lora.read(tmp_path / "x.safetensors", unet_weights)
