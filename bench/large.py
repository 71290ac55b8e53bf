"""Are models of FLUX.1 [dev]'s and Qwen-Image's size fused and exported within small limits of memory, time and disk?

Makes checkpoints with the shapes of the published models in bfloat16 as sparse files, which hold zeros and take no
disk, and random LoRAs on the paper's layers. Then, part by part, copies the weights, and fuses and exports them, each
in a process of its own, and prints what it took beside its limit: FLUX.1 [dev] (12 billion parameters, T5-XXL, CLIP)
with both phases, Qwen-Image (20 billion, Qwen2.5-VL 7B) with one, for the disk's sake. Exits with 1 if a limit is
broken.

    python bench/large.py                     # or one of the two: flux, qwen-image
    python bench/large.py flux --part denoiser
    python bench/large.py --small             # a trial of the script: one block of each kind

Seconds are wall clock, imports included; memory is the largest resident size of a process (wait4). A copy is
shutil's, in blocks of 8 MiB. Needs 30 GB of disk for FLUX.1 and 45 GB for Qwen-Image, and removes what it wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figure, run_stage, show

from glance_trt.bundle import DType
from glance_trt.recipe import Guidance, Lora, Phase, Recipe

REPOSITORY = Path(__file__).parents[1]
DTYPE: DType = "bfloat16"
SHARD = 10 * 10**9
"""Bytes of a file, at most."""
SLOW = Phase("slow", (1, 3, 5, 7, 9), Lora("slow.safetensors", 4.0))
FAST = Phase("fast", (11, 21, 31, 41, 50), Lora("fast.safetensors", 4.0))
Modules = dict[str, Any]
"""A model's parts, on PyTorch's meta device: they have shapes and no values."""


@dataclass(frozen=True)
class Large:
    """A model, and what is measured of it. phases: that are exported. ratio: the weights of both phases on disk may be
    so many times the model's. save: writes tokenizers and scheduler into the model's folder; returns the tokenizers'
    classes."""

    recipe: Recipe
    pipeline: str
    parts: Callable[[bool], Modules]
    save: Callable[[Path], dict[str, str]]
    targets: tuple[str, ...]
    rank: int
    phases: int
    ratio: float


def flux(small: bool) -> Modules:
    """FLUX.1 [dev]: 19 double and 38 single blocks; T5-XXL has 24 layers."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    double, single, layers = (1, 1, 1) if small else (19, 38, 24)
    clip = CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": layers, "vocab_size": 32128}
    return {
        "transformer": FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True),
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    }


def save_flux(model: Path) -> dict[str, str]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTokenizer, T5TokenizerFast

    CLIPTokenizer.from_pretrained(REPOSITORY / "examples/shapes/model/tokenizer").save_pretrained(model / "tokenizer")
    T5TokenizerFast(vocab=[("<pad>", 0), ("</s>", 0), ("<unk>", 0), ("▁", -2)]).save_pretrained(model / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_config(model / "scheduler")
    return {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}


def qwen_image(small: bool) -> Modules:
    """Qwen-Image: 60 blocks, the default; Qwen2.5-VL 7B has 28 layers."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 1 if small else 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 1 if small else 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    return {
        "transformer": QwenImageTransformer2DModel(num_layers=1 if small else 60),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        "vae": AutoencoderKLQwenImage(),
    }


def save_qwen_image(model: Path) -> dict[str, str]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import Qwen2Tokenizer

    Qwen2Tokenizer().save_pretrained(model / "tokenizer")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02).save_config(model / "scheduler")
    return {"tokenizer": "Qwen2Tokenizer"}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
WIDE = ("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1")
MODELS = {
    "flux": Large(
        Recipe("flux", "model", (SLOW, FAST), 1024, 1024, guidance=Guidance("embedded", 3.5)),
        "FluxPipeline",
        flux,
        save_flux,
        ATTENTION,
        rank=16,
        phases=2,
        ratio=1.2,
    ),
    "qwen-image": Large(
        Recipe("qwen-image", "model", (SLOW, FAST), 1024, 1024, guidance=Guidance("cfg", 5.0, negative_prompt=" ")),
        "QwenImagePipeline",
        qwen_image,
        save_qwen_image,
        ATTENTION + JOINT + WIDE,
        rank=32,
        phases=1,
        ratio=1.85,
    ),
}


# --- the stages, each in a process of its own -----------------------------------------------------------------------


def make(work: Path, large: Large, small: bool) -> dict[str, Any]:
    """The model's folder and the LoRAs. Nothing larger than a LoRA's factor is ever in memory."""
    import torch

    with torch.device("meta"):
        parts = large.parts(small)
    model = work / large.recipe.model
    for name, part in parts.items():
        (part.config.save_pretrained if name.startswith("text") else part.save_config)(model / name)
        shapes = {key: tuple(value.shape) for key, value in part.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)  # T5's second name for its embedding, which files leave out
        _write_zeros(model / name, shapes)
        if name == "transformer":
            _write_loras(work, large, shapes)
    index = {name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in parts.items()}
    index |= {name: ["transformers", kind] for name, kind in large.save(model).items()}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (model / "model_index.json").write_text(json.dumps({"_class_name": large.pipeline, **index}))
    files = list(model.rglob("*.safetensors"))
    inputs = _inputs(work, large)
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "disk": sum(file.stat().st_blocks for file in files) * 512,
        "both": _size_of_both(inputs),
        "parts": inputs.family.components,
    }


def _inputs(work: Path, large: Large, phases: int = 2) -> Any:
    from glance_trt.export import inputs

    recipe = dataclasses.replace(large.recipe, phases=large.recipe.phases[:phases])
    return inputs.read(recipe, work)


def _size_of_both(inputs: Any) -> int:
    """The bytes of all weights with both phases, as they would be written."""
    from glance_trt.export import fuse
    from glance_trt.export.weights import Fused

    tensors = [ref for kind, refs in inputs.tensors.items() if kind != "denoiser" for ref in refs.values()]
    for file in fuse.plan(inputs.tensors["denoiser"], inputs.loras).values():
        tensors += [item.base if isinstance(item, Fused) else item for item in file.values()]
    return sum(ref.length for ref in tensors)


def _write_zeros(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Safetensors files of zeros, in bfloat16, that take no disk: shards of at most 10 GB, as diffusers writes them."""
    shards: list[dict[str, Any]] = [{}]
    position = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if position + size > SHARD:
            shards.append({})
            position = 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for path, header in zip(files, shards, strict=True):
        text = json.dumps(header).encode()
        with open(folder / path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    index = {name: path for path, header in zip(files, shards, strict=True) for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _write_loras(work: Path, large: Large, shapes: Mapping[str, tuple[int, ...]]) -> None:
    import torch

    from glance_trt.export import weights

    def random(*shape: int) -> weights.Fused:
        ref = weights.TensorRef(Path(), "BF16", shape, 0, 2 * math.prod(shape))
        return weights.Fused(ref, lambda: [torch.randn(shape).mul_(0.02).bfloat16()])

    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    for phase in large.recipe.phases:
        factors = {}
        for layer in layers:
            if layer.endswith(tuple(f".{target}" for target in large.targets)):
                wide, deep = shapes[f"{layer}.weight"]
                factors[f"transformer.{layer}.lora_A.weight"] = random(large.rank, deep)
                factors[f"transformer.{layer}.lora_B.weight"] = random(wide, large.rank)
        assert phase.lora
        weights.write(work / phase.lora.file, factors)


def copy(work: Path, large: Large, kind: str) -> dict[str, Any]:
    """A part's weights, read and written like those that no LoRA changes."""
    part = _inputs(work, large).family.components[kind]
    target = work / "copy"
    with open(target, "wb") as writer:
        for source in sorted((work / large.recipe.model / part).glob("*.safetensors")):
            with open(source, "rb") as reader:
                shutil.copyfileobj(reader, writer, 8 << 20)
    target.unlink()
    return {}


def export(work: Path, large: Large, kind: str) -> dict[str, Any]:
    """A part's weights and graphs, for the phases that are exported."""
    from glance_trt.export import exporter
    from glance_trt.staging import Staging

    started: dict[str, float] = {}
    tracing = 0.0

    def progress(stage: str, done: float, total: float) -> None:
        nonlocal tracing
        if stage.startswith("trace"):
            if done:
                tracing += time.perf_counter() - started[stage]
            else:
                started[stage] = time.perf_counter()

    staging = Staging(work / "bundle", None)
    # A build exports all parts in one process; here each has one, for its own memory to be seen.
    exporter._Exporter(_inputs(work, large, large.phases), staging, [DTYPE], False, progress).export(kind)
    made = list(staging.folder.iterdir())
    sizes = {
        suffix: sum(file.stat().st_size for file in made if file.suffix == f".{suffix}")
        for suffix in ("safetensors", "onnx")
    }
    shutil.rmtree(work / ".bundle.building")
    return {"tracing": tracing, **sizes}


# --- all of them ----------------------------------------------------------------------------------------------------


def measure(work: Path, name: str, small: bool, only: list[str]) -> Iterator[Figure]:
    """Run the stages in order. only: these parts, or all."""
    large = MODELS[name]

    def run(*stage: str) -> tuple[float, float, Any]:
        return run_stage(__file__, work, stage, "--model", name, *(["--small"] if small else []))

    _, _, model = run("make")
    yield Figure(f"{name}: weights", model["bytes"] / 1e9, "GB")
    yield Figure(f"{name}: weights on disk, as sparse files", model["disk"] / 1e6, "MB")
    yield Figure(f"{name}: weights of both phases / model", model["both"] / model["bytes"], "x", large.ratio)
    phases = f"{large.phases} phase{'s' if large.phases > 1 else ''}"
    for kind, part in model["parts"].items():
        if only and kind not in only:
            continue
        shards = (work / large.recipe.model / part).glob("*.safetensors")
        size = sum(shard.stat().st_size for shard in shards)
        what = f"{name} {kind}" + (f", {phases}" if kind == "denoiser" else "")
        if (free := shutil.disk_usage(work).free) < 1.25 * size:
            raise SystemExit(f"{work}: {free / 1e9:.0f} GB are free, and {1.25 * size / 1e9:.0f} GB are needed")
        copying, _, _ = run("copy", kind)
        seconds, peak, found = run("export", kind)
        yield Figure(f"{what}: bytes", size / 1e9, "GB")
        yield Figure(f"{what}: written", found["safetensors"] / 1e9, "GB")
        yield Figure(f"{what}: trace", found["tracing"], "s")
        yield Figure(f"{what}: the rest", seconds - found["tracing"], "s")
        yield Figure(f"{what}: a plain copy of what is read", copying, "s")
        # Of what takes seconds; a small part's time is that of imports. What LoRAs change is read and written for each
        # phase, so the copy that this stands beside is of as many bytes as are written.
        limit, beside = 2.0 if size > 5e9 else None, copying * found["safetensors"] / size
        yield Figure(f"{what}: the rest / a copy of what is written", (seconds - found["tracing"]) / beside, "x", limit)
        yield Figure(f"{what}: peak memory", peak, "MB", 3000)
        yield Figure(f"{what}: graphs", found["onnx"] / 1e6, "MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default: both")
    parser.add_argument("--work", type=Path, help="folder to make a temporary one in; default: the system's")
    parser.add_argument("--part", action="append", default=[], help="such as denoiser, once or more; default: all")
    parser.add_argument("--small", action="store_true", help="one block of each kind; limits do not hold")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stages: dict[str, Callable[..., dict[str, Any]]] = {"copy": copy, "export": export}
        stage, *kind = options.stage
        large = MODELS[options.model]
        found = (
            make(options.work, large, options.small) if stage == "make" else stages[stage](options.work, large, *kind)
        )
        options.figures.write_text(json.dumps(found))
        return 0
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    broken = 0
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory(prefix="glance-bench-", dir=options.work) as folder:
            broken |= show(measure(Path(folder), name, options.small, options.part), limited=not options.small)
    return broken


if __name__ == "__main__":
    sys.exit(main())
