"""LoRAs of text encoders: the weights that come out are those that diffusers, or PEFT for T5, loads and fuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from glance_trt.errors import LoraError
from glance_trt.export import lora
from glance_trt.export.weights import TensorRef, component_tensors

Tensors = dict[str, torch.Tensor]
Weights = Mapping[str, Mapping[str, TensorRef]]
RANK, ALPHA, ALPHA_2 = 2, 6.0, 5.0
KINDS = ("text_encoder", "text_encoder_2")
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
UNET_TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def _clip(kind: str) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        projection_dim=12,
    )
    return CLIPTextModel(config) if kind == "text_encoder" else CLIPTextModelWithProjection(config)


def _t5() -> T5EncoderModel:
    config = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's two text encoders, and a T5, small and random."""
    folder = tmp_path_factory.mktemp("encoders")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in KINDS:
            _clip(kind).save_pretrained(folder / kind)
        _t5().save_pretrained(folder / "t5")
    return folder


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    return {kind: component_tensors(folder / kind) for kind in (*KINDS, "t5")}


@pytest.fixture(scope="module")
def pipeline(folder: Path, tiny_model: Path) -> Callable[[], StableDiffusionXLPipeline]:
    """Makes an SDXL pipeline of the two text encoders, and of another model's UNet."""

    def make() -> StableDiffusionXLPipeline:
        encoders = {
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
            "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        }
        unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
        nothing = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
        return StableDiffusionXLPipeline(**nothing, **encoders, unet=unet, scheduler=FlowMatchEulerDiscreteScheduler())

    return make


def _adapt(pipe: StableDiffusionXLPipeline, **settings: Any) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Random LoRAs of both text encoders, and their configurations."""
    layers, configs = {}, {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for kind, alpha in zip(KINDS, (ALPHA, ALPHA_2), strict=True):
            config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(TARGETS), init_lora_weights=False)
            for name, value in settings.items():
                setattr(config, name, value)
            getattr(pipe, kind).add_adapter(config)
            layers[kind] = get_peft_model_state_dict(getattr(pipe, kind))
            configs[kind] = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return layers, configs


def _save(folder: Path, layers: Mapping[str, Tensors], configs: Mapping[str, Any] | None = None) -> Path:
    """A file by the pipeline's own writer."""
    arguments: dict[str, Any] = {f"{kind}_lora_layers": value for kind, value in layers.items()}
    arguments |= {f"{kind}_lora_adapter_metadata": value for kind, value in (configs or {}).items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, weight_name="lora.safetensors", **arguments)
    return folder / "lora.safetensors"


def _plain_names(model: nn.Module) -> Tensors:
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    return {name: value for name, value in state.items() if ".lora_" not in name}


def _check(weights: Mapping[str, TensorRef], pairs: Mapping[str, lora.Pair], expected: Tensors) -> None:
    """Every weight is what is expected, those that the LoRA names by fusing, the others as they are."""
    assert pairs.keys() == {name for name, ref in weights.items() if not torch.equal(ref.read(), expected[name])}
    for name, pair in pairs.items():
        value = lora.fused(weights[name], pair).read()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def _check_both(weights: Weights, found: lora.Lora, pipe: StableDiffusionXLPipeline, file: Path) -> None:
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=list(KINDS))
    assert found.encoders.keys() == set(KINDS)
    for kind in KINDS:
        _check(weights[kind], found.encoders[kind], _plain_names(getattr(pipe, kind)))


def _read(file: Path, unet_weights: Mapping[str, TensorRef], weights: Weights, *kinds: str) -> lora.Lora:
    return lora.read(file, unet_weights, encoders={kind: weights[kind] for kind in kinds or KINDS})


@pytest.mark.parametrize("renamed", [False, True], ids=["lora_A", "lora_linear_layer"])
@pytest.mark.parametrize("settings", [None, {}, {"use_rslora": True}, {"alpha_pattern": {r"layers\.1.*q_proj": 3.0}}])
def test_the_layouts_that_diffusers_writes(
    pipeline: Callable[[], StableDiffusionXLPipeline],
    weights: Weights,
    unet_weights: Mapping[str, TensorRef],
    tmp_path: Path,
    settings: dict[str, Any] | None,
    renamed: bool,
) -> None:
    layers, configs = _adapt(pipeline(), **(settings or {}))
    if renamed:
        layers = {kind: convert_state_dict_to_diffusers(value) for kind, value in layers.items()}
        assert any(".lora_linear_layer.down." in name for name in layers["text_encoder"])
    file = _save(tmp_path, layers, None if settings is None else configs)
    found = _read(file, unet_weights, weights)
    assert not found.pairs
    if settings == {}:
        scales = {kind: {pair.scale for pair in pairs.values()} for kind, pairs in found.encoders.items()}
        assert scales == {"text_encoder": {ALPHA / RANK}, "text_encoder_2": {ALPHA_2 / RANK}}
        assert found.alpha is None  # there are two
    _check_both(weights, found, pipeline(), file)


def test_the_layout_of_early_diffusers_versions(
    pipeline: Callable[[], StableDiffusionXLPipeline],
    weights: Weights,
    unet_weights: Mapping[str, TensorRef],
    tmp_path: Path,
) -> None:
    layers, _ = _adapt(pipeline())
    old = {}
    for kind, tensors in layers.items():
        renamed = convert_state_dict_to_diffusers(tensors)
        for last, early in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
            renamed = {k.replace(f"{last}.lora_linear_layer", f"{early}_lora"): v for k, v in renamed.items()}
        old[kind] = renamed
    assert any(".self_attn.to_out_lora.up." in name for name in old["text_encoder"])
    file = _save(tmp_path, old)
    _check_both(weights, _read(file, unet_weights, weights), pipeline(), file)


@pytest.mark.parametrize("prefix", ["lora_te1", "lora_te"])
def test_kohyas_layout(
    pipeline: Callable[[], StableDiffusionXLPipeline],
    weights: Weights,
    unet_weights: Mapping[str, TensorRef],
    tmp_path: Path,
    prefix: str,
) -> None:
    layers, _ = _adapt(pipeline())
    tensors: Tensors = {}
    for kind, value in layers.items():
        # kohya names modules as in older versions of transformers.
        named = {f"{kind}.text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in value.items()}
        tensors |= convert_state_dict_to_kohya(named)
    tensors = {name.replace("lora_te1", prefix): tensor for name, tensor in tensors.items()}
    tensors = {name: torch.tensor(ALPHA) if name.endswith("alpha") else value for name, value in tensors.items()}
    assert any(name.startswith("lora_te2_text_model_encoder_layers_0_mlp_fc1.") for name in tensors)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = _read(tmp_path / "lora.safetensors", unet_weights, weights)
    assert (found.alpha, found.scale) == (ALPHA, ALPHA / RANK)
    _check_both(weights, found, pipeline(), tmp_path / "lora.safetensors")


@pytest.mark.parametrize("prefixed", [False, True], ids=["model without text_model", "model with text_model"])
def test_names_match_whichever_transformers_wrote_model_and_lora(
    pipeline: Callable[[], StableDiffusionXLPipeline],
    weights: Weights,
    unet_weights: Mapping[str, TensorRef],
    tmp_path: Path,
    prefixed: bool,
) -> None:
    layers, configs = _adapt(pipeline(), alpha_pattern={r"text_model\.encoder\.layers\.0\.mlp\.fc1": 3.0})
    short = {name.removeprefix("text_model."): ref for name, ref in weights["text_encoder"].items()}
    base = {f"text_model.{name}": ref for name, ref in short.items()} if prefixed else short
    updates = []
    for prefix in ("", "text_model."):
        named = {f"{prefix}{name.removeprefix('text_model.')}": t for name, t in layers["text_encoder"].items()}
        file = _save(tmp_path, {"text_encoder": named}, {"text_encoder": configs["text_encoder"]})
        pairs = lora.read(file, unet_weights, encoders={"text_encoder": base}).encoders["text_encoder"]
        assert len(pairs) == 2 * len(TARGETS)
        assert pairs.keys() <= base.keys()
        updates.append({name: (pair.scale, pair.up.read(), pair.down.read()) for name, pair in pairs.items()})
    for name, (scale, up, down) in updates[0].items():
        assert scale == (3.0 if "layers.0.mlp.fc1" in name else ALPHA) / RANK
        assert updates[1][name][0] == scale
        assert torch.equal(updates[1][name][1], up)
        assert torch.equal(updates[1][name][2], down)


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [
        ("lora_te2", "text_encoder_2"),
        ("lora_te3", "text_encoder_2"),
        ("lora_te3", "text_encoder_3"),
        ("text_encoders.t5xxl.transformer.", "text_encoder_2"),
        ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
        ("text_encoder_2.", "text_encoder_2"),
        ("text_encoder_3.base_model.model.", "text_encoder_3"),
    ],
)
def test_t5_by_the_number_that_each_writer_gives_it(
    folder: Path, weights: Weights, unet_weights: Mapping[str, TensorRef], tmp_path: Path, prefix: str, kind: str
) -> None:
    """FLUX's second text encoder, Stable Diffusion 3's third."""
    targets = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(T5EncoderModel.from_pretrained(folder / "t5"), config)
    layers = {n.removeprefix("base_model.model."): t for n, t in get_peft_model_state_dict(model).items()}
    if prefix.endswith("."):
        tensors = {f"{prefix}{name}": tensor for name, tensor in layers.items()}
    else:
        tensors = {}
        for name, tensor in layers.items():
            module, _, factor = name.removesuffix(".weight").rpartition(".")
            role = {"lora_A": "lora_down", "lora_B": "lora_up"}[factor]
            tensors[f"{prefix}_{module.replace('.', '_')}.{role}.weight"] = tensor
        assert f"{prefix}_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight" in tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    encoders = {"text_encoder": weights["text_encoder"], kind: weights["t5"]}
    found = lora.read(tmp_path / "lora.safetensors", unet_weights, encoders=encoders)
    assert found.encoders.keys() == {kind}
    merged = dict(model.merge_and_unload().state_dict())
    _check(weights["t5"], found.encoders[kind], merged)


def _pair(name: str, columns: int = 8, rows: int = 8) -> Tensors:
    return {f"{name}.lora_A.weight": torch.ones(RANK, columns), f"{name}.lora_B.weight": torch.ones(rows, RANK)}


def test_denoiser_and_text_encoders_come_from_one_file(
    weights: Weights, unet_weights: Mapping[str, TensorRef], tmp_path: Path
) -> None:
    q_proj = "encoder.layers.0.self_attn.q_proj"
    tensors = _pair(f"unet.{UNET_TO_Q}") | _pair(f"text_encoder.text_model.{q_proj}", 16, 16)
    metadata = {"unet.lora_alpha": 4.0, "text_encoder.lora_alpha": 10.0}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    found = _read(tmp_path / "x.safetensors", unet_weights, weights)
    assert found.pairs.keys() == {f"{UNET_TO_Q}.weight"}
    assert found.encoders.keys() == {"text_encoder"}
    assert found.encoders["text_encoder"].keys() == {f"{q_proj}.weight"}
    assert found.scale == found.pairs[f"{UNET_TO_Q}.weight"].scale == 2.0
    assert found.encoders["text_encoder"][f"{q_proj}.weight"].scale == 5.0
    kinds = {kind: weights[kind] for kind in KINDS}
    scaled = lora.read(tmp_path / "x.safetensors", unet_weights, 0.5, kinds)
    assert scaled.pairs[f"{UNET_TO_Q}.weight"].scale == 0.5
    assert scaled.encoders["text_encoder"][f"{q_proj}.weight"].scale == 0.5


def test_a_text_encoder_that_is_not_there_is_named(
    weights: Weights, unet_weights: Mapping[str, TensorRef], tmp_path: Path
) -> None:
    q_proj = "text_model.encoder.layers.0.self_attn.q_proj"
    save_file(_pair(UNET_TO_Q) | _pair(f"text_encoder_2.{q_proj}", 16, 16), tmp_path / "x.safetensors")
    message = r"2 of 4 keys match nothing in the model; 2 are for text_encoder_2: "
    with pytest.raises(LoraError, match=message + "only the denoiser's are fused here"):
        lora.read(tmp_path / "x.safetensors", unet_weights)
    with pytest.raises(LoraError, match=message + "the model has text_encoder; is it a LoRA for another family"):
        _read(tmp_path / "x.safetensors", unet_weights, weights, "text_encoder")


def test_a_text_encoders_factors_are_checked_too(
    weights: Weights, unet_weights: Mapping[str, TensorRef], tmp_path: Path
) -> None:
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    save_file(_pair(name), tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match=r"q_proj: factors \[8, 2\] x \[2, 8\] do not fit the weight \[16, 16\]"):
        _read(tmp_path / "x.safetensors", unet_weights, weights)
    save_file({f"{name}.lora_linear_layer.down.weight": torch.ones(2, 16)}, tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match=r"text_encoder\..*q_proj has no up factor; the file is incomplete"):
        _read(tmp_path / "x.safetensors", unet_weights, weights)
