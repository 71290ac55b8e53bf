"""Models and bundles that several test files share; each is made once per run."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
TOKENIZER = REPOSITORY / "examples" / "shapes" / "model" / "tokenizer"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models of the tests are too small for several threads to pay."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration bundle, built from its recipe: for the CPU, and for TensorRT-RTX where that is installed."""
    from glance_trt.build import build
    from glance_trt.engines import backends, targets

    # Of several processes that run tests, one builds it and the others wait.
    folder = tmp_path_factory.getbasetemp()
    output = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shapes.bundle"
    engines = [name for name in ("cpu", "rtx") if backends.unavailable(targets.load(name)) is None]
    build(str(REPOSITORY / "export/shapes.yaml"), output, engines=engines)
    return output


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of tiny generated graphs with engines for the CPU; copy it before changing it."""
    from .models import tiny

    return tiny.make_bundle(tmp_path_factory.mktemp("tiny") / "tiny.bundle")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion model of random weights in float16; 16 x 16 pixels are 8 x 8 latents."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from .models import parts

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(parts.clip_config(tokenizer, 16, 1))
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            mid_block_type=None,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = parts.autoencoder(scaling_factor=0.7)
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        beta_schedule="scaled_linear",
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def traced() -> Callable[..., Any]:
    """`trace.trace` of the tiny model's graphs; each takes seconds, so is made once per run."""
    from glance_trt.export import trace

    known: dict[str, Any] = {}
    real = trace.trace

    def trace_once(source: Any, dtype: str) -> Any:
        arguments = getattr(source.build, "args", ())  # a guide's config, which the inputs do not show
        family = getattr(getattr(source.build, "func", source.build), "__self__", None)
        rescale = family.recipe.guidance.rescale if family else None  # nor do they show this
        key = repr((source.inputs, source.outputs, arguments, rescale, dtype))
        if key not in known:
            known[key] = real(source, dtype)
        return known[key]

    return trace_once


@pytest.fixture(scope="session")
def write_lora(tiny_model: Path) -> Callable[..., Path]:
    """Writes a random LoRA of the tiny model's UNet, as diffusers does, and returns its path.

    ``write(path, seed=0, rank=2, alpha=6.0, targets=("to_q", "to_v"), with_metadata=True,
    text=False)``; with `text`, the text encoder has one as well, at scale 8
    """
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    def write(
        path: Path,
        *,
        seed: int = 0,
        rank: int = 2,
        alpha: float = 6.0,
        targets: tuple[str, ...] = ("to_q", "to_v"),
        with_metadata: bool = True,
        text: bool = False,
        **settings: object,
    ) -> Path:
        unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
        # Without init, B is random as well as A.
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet.add_adapter(config)
        encoder = {}
        if text:
            changed = _encoder_with(tiny_model, rank, seed)
            encoder["text_encoder_lora_layers"] = get_peft_model_state_dict(changed)
            encoder["text_encoder_lora_adapter_metadata"] = _plain(changed.peft_config["default"])
        path.parent.mkdir(exist_ok=True)
        StableDiffusionPipeline.save_lora_weights(
            path.parent,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=_plain(config) if with_metadata else None,
            weight_name=path.name,
            **encoder,
        )
        return path

    return write


def _plain(config: Any) -> dict[str, Any]:
    """PEFT's configuration, as diffusers writes it into a file."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _encoder_with(tiny_model: Path, rank: int, seed: int) -> Any:
    """The tiny model's text encoder, with a random LoRA on its attention."""
    import torch
    from peft import LoraConfig
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(tiny_model / "text_encoder")
    config = LoraConfig(r=rank, lora_alpha=8 * rank, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder.add_adapter(config)
    return encoder


@pytest.fixture(scope="session")
def write_guide(tiny_model: Path) -> Callable[..., Path]:
    """Writes a random guide of the tiny model's UNet, and returns its path.

    ``write(path, kind, seed=0, scales=())``
    """
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    from glance_trt import strict
    from glance_trt.export import guide, lora

    unet = UNet2DConditionModel.load_config(tiny_model / "unet")

    def write(path: Path, kind: guide.Kind, *, seed: int = 0, scales: tuple[float, ...] = ()) -> Path:
        config = guide.configure("full" if kind == "tiny" else kind, unet, 0)
        if kind == "tiny":  # the model is too small for one of 1 %
            config = dataclasses.replace(config, kind=kind, widths=dict.fromkeys(config.channels, 3))
        config = dataclasses.replace(config, scales=scales)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in guide.Guide(config).state_dict().items()
        }
        save_file(tensors, path, {lora.GUIDE: json.dumps(strict.write(config))})
        return path

    return write
