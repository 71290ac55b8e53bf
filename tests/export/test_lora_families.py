"""LoRA files of each model family: the weights that come out are those that diffusers loads and fuses.

Where diffusers does not load a layout, the reference is a checkpoint under the original code's names, with the LoRA
merged into it, as diffusers' single-file loader converts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from glance_trt.export import lora, lora_layouts
from glance_trt.export.weights import TensorRef, component_tensors

from ..models.loras import kohya

Tensors = dict[str, torch.Tensor]
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
RANK, ALPHA = 2, 6.0
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLPS = {"sdxl": ("ff.net.2", "conv1"), "flux": ("proj_mlp", "ff.net.2"), "sd3": ("ff.net.2",), "qwen": ("img_mod.1",)}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sdxl": (
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": 2,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
        },
    ),
    "flux": (
        "FluxPipeline",
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 20,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
    ),
    "qwen": (
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (8, 4, 4),
        },
    ),
}


class Denoiser:
    """A family's tiny denoiser of random weights: `folder` has it, `weights` are its tensors."""

    def __init__(self, family: str, folder: Path) -> None:
        pipeline, model, config = FAMILIES[family]
        self.family, self.folder = family, folder
        self.pipeline, self._class = getattr(diffusers, pipeline), getattr(diffusers, model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._class(**config).save_pretrained(folder)
        self.weights = component_tensors(folder)
        self.part = "unet" if family == "sdxl" else "transformer"

    def load(self) -> nn.Module:
        return self._class.from_pretrained(self.folder)

    def fused_by_diffusers(self, file: Path) -> Tensors:
        """The weights after diffusers has loaded and fused a file, without any network but the denoiser."""
        model = self.load()
        empty = dict.fromkeys(self.pipeline._get_signature_keys(self.pipeline)[0])
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = self.pipeline(**{**empty, self.part: model, "scheduler": scheduler})
        pipe.load_lora_weights(str(file))
        pipe.fuse_lora(components=[self.part])
        state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        return {name: value for name, value in state.items() if ".lora_" not in name}

    def adapter(self, targets: Iterable[str], **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
        """The model with a random LoRA, and its configuration."""
        model, config = self.load(), LoraConfig(r=RANK, target_modules=list(targets), **settings)
        config.init_lora_weights = False  # B too is random
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.add_adapter(config)
        return model, {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}

    def save(self, folder: Path, layers: Tensors, metadata: dict[str, Any] | None = None) -> Path:
        """A file by the pipeline's own writer."""
        arguments = {f"{self.part}_lora_layers": layers, f"{self.part}_lora_adapter_metadata": metadata}
        self.pipeline.save_lora_weights(folder, weight_name="lora.safetensors", **arguments)
        return folder / "lora.safetensors"


@pytest.fixture(scope="module")
def denoisers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Denoiser]:
    made: dict[str, Denoiser] = {}

    def get(family: str) -> Denoiser:
        if family not in made:
            made[family] = Denoiser(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def _check(weights: Mapping[str, TensorRef], found: lora.Lora, expected: Tensors, tolerance: float = 0.0) -> None:
    """Every weight is what is expected, those that the LoRA names by fusing, the others as they are.

    Linear weights are bit by bit those of PEFT, which adds in another order where it merges convolutions.
    """
    assert expected.keys() == weights.keys()
    assert found.pairs.keys() == {name for name, ref in weights.items() if not torch.equal(ref.read(), expected[name])}
    for name, pair in found.pairs.items():
        value = lora.fused(weights[name], pair).read()
        atol = max(tolerance, 1e-6 if value.ndim > 2 else 0.0)
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
        assert pair.up.shape == tuple(pair.up.read().shape)
        assert pair.up.shape[0] == weights[name].shape[0]


def _factors(shapes: Mapping[str, tuple[int, ...]]) -> Factors:
    """A random down and up factor for each weight."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: (
            torch.randn(RANK, *shape[1:], generator=generator) / 4,
            torch.randn(shape[0], RANK, *(1,) * len(shape[2:]), generator=generator) / 4,
        )
        for name, shape in shapes.items()
    }


def _dotted(factors: Factors, prefix: str, adapter: str = "") -> Tensors:
    """PEFT's names of factors, under a prefix; `adapter` is a name that some writers leave in."""
    tensors = {}
    for name, (down, up) in factors.items():
        stem = f"{prefix}{name}"
        tensors |= {f"{stem}.lora_A{adapter}.weight": down, f"{stem}.lora_B{adapter}.weight": up}
    return tensors


def _shapes(weights: Mapping[str, TensorRef], names: str) -> dict[str, tuple[int, ...]]:
    """The shapes of those modules that a LoRA can change and whose names match a pattern."""
    modules = {name.removesuffix(".weight"): ref.shape for name, ref in weights.items() if name.endswith(".weight")}
    return {name: shape for name, shape in modules.items() if len(shape) > 1 and re.search(names, name)}


def _write(tensors: Tensors, folder: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def _read(denoiser: Denoiser, file: Path) -> lora.Lora:
    return lora.read(file, denoiser.weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [None, {"lora_alpha": ALPHA}, {"lora_alpha": ALPHA, "use_rslora": True}])
def test_the_layout_that_diffusers_writes(
    denoisers: Callable[[str], Denoiser], tmp_path: Path, family: str, settings: dict[str, Any] | None
) -> None:
    denoiser = denoisers(family)
    model, config = denoiser.adapter([*ATTENTION, *MLPS[family]], **(settings or {}))
    file = denoiser.save(tmp_path, get_peft_model_state_dict(model), config if settings else None)
    _check(denoiser.weights, _read(denoiser, file), denoiser.fused_by_diffusers(file))


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_the_layout_of_the_papers_code_has_scale_one(
    denoisers: Callable[[str], Denoiser], tmp_path: Path, family: str
) -> None:
    """The names of PEFT's factors, some of them renamed as in early diffusers versions, and no alpha."""
    denoiser = denoisers(family)
    model, _ = denoiser.adapter([*ATTENTION, *MLPS[family]], lora_alpha=4 * RANK)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    assert any(".lora.down." in name for name in layers)
    assert any(".lora_A." in name for name in layers)
    found = _read(denoiser, file := denoiser.save(tmp_path, layers))
    assert (found.alpha, found.scale) == (None, 1.0)
    if family == "flux":
        assert set(found.pairs) == {name.split(".lora")[0] + ".weight" for name in layers}
    _check(denoiser.weights, found, denoiser.fused_by_diffusers(file))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_that_peft_writes(denoisers: Callable[[str], Denoiser], tmp_path: Path, family: str) -> None:
    denoiser = denoisers(family)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ATTENTION), init_lora_weights=False)
    model = get_peft_model(denoiser.load(), config)
    model.save_pretrained(tmp_path)
    found = _read(denoiser, tmp_path / "adapter_model.safetensors")
    assert found.scale == ALPHA / RANK
    _check(denoiser.weights, found, model.merge_and_unload().state_dict())


def _original_names(denoiser: Denoiser) -> dict[str, str]:
    """The original name of each of the UNet's modules, according to diffusers' converter of such checkpoints."""
    inner = {name.split("transformer_blocks.")[1] for name in denoiser.weights if "transformer_blocks." in name}
    layers = ["in_layers.2", "out_layers.3", "emb_layers.1", "skip_connection", "op", "conv", "proj_in", "proj_out"]
    layers += [f"transformer_blocks.{name.removesuffix('.weight')}" for name in inner if name.endswith(".weight")]
    blocks = [f"{side}_blocks.{i}.{part}" for side in ("input", "output") for i in range(9) for part in range(3)]
    blocks += [f"middle_block.{i}" for i in range(3)]
    names = ["input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2"]
    names += [f"{block}.{layer}" for block in blocks for layer in layers]
    checkpoint = {f"model.diffusion_model.{name}.{kind}": name for name in names for kind in ("weight", "bias")}
    config = {**denoiser.load().config}
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
    return {name.removesuffix(".weight"): other for name, other in converted.items() if name in denoiser.weights}


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("conv_in", "input_blocks_0_0"),
        ("down_blocks.0.attentions.0.proj_in", "input_blocks_1_1_proj_in"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        (
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k",
            "input_blocks_8_1_transformer_blocks_0_attn2_to_k",
        ),
        ("down_blocks.3.resnets.1.conv1", "input_blocks_11_0_in_layers_2"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
        ("up_blocks.0.resnets.2.conv_shortcut", "output_blocks_2_0_skip_connection"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_1_conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        ("up_blocks.3.attentions.2.proj_out", "output_blocks_11_1_proj_out"),
        ("time_embedding.linear_2", "time_embed_2"),
    ],
)
def test_the_original_block_names_of_stable_diffusion_1(name: str, original: str) -> None:
    """Those of its checkpoint; its first decoder block has an upsampler and no attention."""
    with torch.device("meta"):
        state = diffusers.UNet2DConditionModel().state_dict()
    weights = {key: TensorRef(Path(), "F32", tuple(value.shape), 0, 0) for key, value in state.items()}
    layout = lora_layouts.denoiser(weights)
    assert [target.weight for target in layout[original]] == [f"{name}.weight"]
    originals = {key for key in layout if re.match("(in|out)put_blocks|middle_block|out_2|time_embed_|label_emb", key)}
    assert len(originals) == len(_shapes(weights, ""))  # all of them


@pytest.mark.parametrize("prefix", ["kohya", "diffusion_model."])
def test_the_original_block_names_of_sdxl(denoisers: Callable[[str], Denoiser], tmp_path: Path, prefix: str) -> None:
    denoiser = denoisers("sdxl")
    shapes = _shapes(denoiser.weights, "")
    names = _original_names(denoiser)
    assert names.keys() >= shapes.keys()
    factors = _factors({names[name]: shape for name, shape in shapes.items()})
    expected = denoiser.fused_by_diffusers(_write(kohya(factors, ALPHA), tmp_path))
    if prefix != "kohya":
        tensors = _dotted(factors, prefix) | {f"{prefix}{name}.alpha": torch.tensor(ALPHA) for name in factors}
        _write(tensors, tmp_path)
    found = _read(denoiser, tmp_path / "lora.safetensors")
    assert len(found.pairs) == len(shapes)
    _check(denoiser.weights, found, expected, 1e-6)


def test_kohya_with_the_block_names_of_diffusers(denoisers: Callable[[str], Denoiser], tmp_path: Path) -> None:
    denoiser = denoisers("sdxl")
    model, _ = denoiser.adapter([*ATTENTION, *MLPS["sdxl"]])
    layers = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
    file = _write(convert_state_dict_to_kohya(layers), tmp_path)
    found = _read(denoiser, file)
    assert found.alpha == RANK
    _check(denoiser.weights, found, denoiser.fused_by_diffusers(file), 1e-6)


QWEN = r"attn\.(to|add)|_mod\.1|_mlp|^proj_out|_in$|norm_out|time_text"


@pytest.mark.parametrize("layout", ["kohya", "comfyui", "diffsynth"])
def test_layouts_of_qwen_image(denoisers: Callable[[str], Denoiser], tmp_path: Path, layout: str) -> None:
    denoiser = denoisers("qwen")
    factors = _factors(_shapes(denoiser.weights, QWEN))
    if layout == "kohya":
        tensors = kohya(factors, ALPHA)
    elif layout == "comfyui":
        tensors = _dotted(factors, "diffusion_model.")
        tensors |= {f"diffusion_model.{name}.alpha": torch.tensor(ALPHA) for name in factors}
    else:
        tensors = _dotted(factors, "", ".default")
    found = _read(denoiser, file := _write(tensors, tmp_path))
    assert found.scale == (1.0 if layout == "diffsynth" else ALPHA / RANK)
    _check(denoiser.weights, found, denoiser.fused_by_diffusers(file), 1e-6)


@pytest.mark.parametrize("layout", ["kohya", "alpha beside peft", "onetrainer"])
def test_layouts_of_flux(denoisers: Callable[[str], Denoiser], tmp_path: Path, layout: str) -> None:
    denoiser = denoisers("flux")
    if layout == "kohya":
        blocks = [f"double_blocks.{i}.{stream}_attn" for i in range(2) for stream in ("img", "txt")]
        names: dict[str, tuple[int, ...]] = {f"{block}.proj": (32, 32) for block in blocks}
        names |= {f"{block}.qkv": (96, 32) for block in blocks}
        names |= {f"single_blocks.{i}.linear2": (32, 160) for i in range(2)}
        tensors = kohya(_factors(names), ALPHA)
    else:
        factors = _factors(_shapes(denoiser.weights, r"attn\."))
        if layout == "onetrainer":
            tensors = {name.replace("lora_unet_", "lora_transformer_"): t for name, t in kohya(factors, ALPHA).items()}
        else:
            tensors = _dotted(factors, "transformer.")
            tensors |= {f"transformer.{name}.alpha": torch.tensor(ALPHA) for name in factors}
    expected = denoiser.fused_by_diffusers(file := _write(tensors, tmp_path))
    found = _read(denoiser, file)
    assert found.scale == ALPHA / RANK
    _check(denoiser.weights, found, expected, 1e-6)
    if layout == "onetrainer":  # SimpleTuner's differs in the prefix only; diffusers does not load it
        tensors = {name.replace("lora_transformer_", "lycoris_"): tensor for name, tensor in tensors.items()}
        _check(denoiser.weights, _read(denoiser, _write(tensors, tmp_path)), expected, 1e-6)
