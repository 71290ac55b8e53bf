"""Is a model of FLUX.1 [dev]'s size fused and exported within small limits of memory, time and disk?

Makes checkpoints with the shapes of FLUX.1 [dev] in bfloat16 (a denoiser of 12 billion parameters, T5-XXL, CLIP, a VAE)
as sparse files, which hold zeros and take no disk, and two random LoRAs of rank 16. Then copies the checkpoints, and
fuses and exports them with both phases, each in a process of its own, and prints what it took beside its limit. Exits
with 1 if a limit is broken.

    python bench/large.py
    python bench/large.py --blocks 1,1,1      # a trial of the script: so many double, single and T5 blocks

Seconds are wall clock, imports included; memory is the largest resident size of the process (wait4). The copy is read
and written in blocks of 8 MiB, as weights are that no LoRA changes. Needs 42 GB of disk, and removes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from figures import Figure, run_stage, show

from glance_trt.bundle import DType
from glance_trt.recipe import Guidance, Lora, Phase, Recipe

REPOSITORY = Path(__file__).parents[1]
BLOCKS = (19, 38, 24)
"""Double and single blocks of the denoiser, and blocks of T5."""
RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
DTYPE: DType = "bfloat16"
RECIPE = Recipe(
    name="flux-1-dev-zeros",
    model="model",
    phases=(
        Phase("slow", (1, 3, 5, 7, 9), Lora("slow.safetensors", 4.0)),
        Phase("fast", (11, 21, 31, 41, 50), Lora("fast.safetensors", 4.0)),
    ),
    height=1024,
    width=1024,
    guidance=Guidance("embedded", 3.5),
)
PARTS = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}


# --- the stages, each in a process of its own -----------------------------------------------------------------------


def make(work: Path, blocks: tuple[int, ...]) -> dict[str, Any]:
    """The model's folder and the LoRAs. Nothing larger than a LoRA's factor is ever in memory."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    double, single, layers = blocks
    t5 = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": layers, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        parts = {
            "transformer": FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
            ),
            "text_encoder_2": T5EncoderModel(T5Config(vocab_size=32128, d_kv=64, **t5)),
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
    model = work / RECIPE.model
    for name, part in parts.items():
        (part.config.save_pretrained if name.startswith("text") else part.save_config)(model / name)
        shapes = {key: tuple(value.shape) for key, value in part.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)  # T5's second name for its embedding, which files leave out
        _write_zeros(model / name / "model.safetensors", shapes)
        if name == "transformer":
            _write_loras(work, shapes)
    CLIPTokenizer.from_pretrained(REPOSITORY / "examples/shapes/model/tokenizer").save_pretrained(model / "tokenizer")
    T5TokenizerFast(vocab=[("<pad>", 0), ("</s>", 0), ("<unk>", 0), ("▁", -2)]).save_pretrained(model / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_config(model / "scheduler")
    index = {"_class_name": "FluxPipeline", **{name: list(kind) for name, kind in PARTS.items()}}
    (model / "model_index.json").write_text(json.dumps(index))
    files = list(model.rglob("*.safetensors"))
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "disk": sum(file.stat().st_blocks for file in files) * 512,
    }


def _write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros, in bfloat16, that takes no disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)


def _write_loras(work: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    import torch

    from glance_trt.export import weights

    def random(*shape: int) -> weights.Fused:
        ref = weights.TensorRef(Path(), "BF16", shape, 0, 2 * math.prod(shape))
        return weights.Fused(ref, lambda: torch.randn(shape).mul_(0.02).bfloat16())

    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    for phase in RECIPE.phases:
        factors = {}
        for layer in layers:
            if layer.endswith(tuple(f".{target}" for target in TARGETS)):
                wide, deep = shapes[f"{layer}.weight"]
                factors[f"transformer.{layer}.lora_A.weight"] = random(RANK, deep)
                factors[f"transformer.{layer}.lora_B.weight"] = random(wide, RANK)
        assert phase.lora
        weights.write(work / phase.lora.file, factors)


def copy(work: Path) -> dict[str, Any]:
    """The model's weights, read and written like those that no LoRA changes."""
    for i, path in enumerate((work / RECIPE.model).rglob("*.safetensors")):
        with open(path, "rb") as source, open(work / f"copy-{i}", "wb") as target:
            while block := source.read(8 << 20):
                target.write(block)
    return {}


def export(work: Path) -> dict[str, Any]:
    """Both phases' weights and graphs."""
    from glance_trt.export import exporter, inputs

    started: dict[str, float] = {}
    tracing = 0.0

    def progress(stage: str, done: float, total: float) -> None:
        nonlocal tracing
        if stage.startswith("trace"):
            if done:
                tracing += time.perf_counter() - started[stage]
            else:
                started[stage] = time.perf_counter()

    exporter.export(inputs.read(RECIPE, work), work / "bundle", None, [DTYPE], progress=progress)
    made = list((work / ".bundle.building" / "bundle").iterdir())
    return {"tracing": tracing} | {
        suffix: sum(file.stat().st_size for file in made if file.suffix == f".{suffix}")
        for suffix in ("safetensors", "onnx")
    }


# --- all of them ----------------------------------------------------------------------------------------------------


def measure(work: Path, blocks: tuple[int, ...]) -> Iterator[Figure]:
    """Run the stages in order."""

    def run(stage: str) -> tuple[float, float, Any]:
        return run_stage(__file__, work, (stage,), "--blocks", ",".join(map(str, blocks)))

    _, _, model = run("make")
    yield Figure("model: weights", model["bytes"] / 1e9, "GB")
    yield Figure("model: weights on disk, as sparse files", model["disk"] / 1e6, "MB")
    needed, free = 1.25 * model["bytes"], shutil.disk_usage(work).free
    if free < needed:
        raise SystemExit(f"{work}: {free / 1e9:.0f} GB are free, and {needed / 1e9:.0f} GB are needed; give --work")
    copying, _, _ = run("copy")
    yield Figure("plain copy: time", copying, "s")
    for path in work.glob("copy-*"):
        path.unlink()
    seconds, peak, found = run("export")
    yield Figure("fuse + export, both phases: time", seconds, "s")
    yield Figure("of it tracing", found["tracing"], "s")
    yield Figure("the rest / plain copy", (seconds - found["tracing"]) / copying, "x", 2)
    yield Figure("fuse + export, both phases: peak memory", peak, "MB", 3000)
    yield Figure("weights / model", found["safetensors"] / model["bytes"], "x", 1.2)
    yield Figure("graphs", found["onnx"] / 1e6, "MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder to make a temporary one in; default: the system's")
    usual = ",".join(map(str, BLOCKS))
    parser.add_argument("--blocks", default=usual, help=f"double, single and T5 blocks; limits hold for {usual}")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    blocks = tuple(map(int, options.blocks.split(",")))
    if options.stage:
        stages: dict[str, Callable[..., dict[str, Any]]] = {"make": make, "copy": copy, "export": export}
        figures = stages[options.stage](options.work, *([blocks] if options.stage == "make" else []))
        options.figures.write_text(json.dumps(figures))
        return 0
    with tempfile.TemporaryDirectory(prefix="glance-bench-", dir=options.work) as folder:
        return show(measure(Path(folder), blocks), limited=blocks == BLOCKS)


if __name__ == "__main__":
    sys.exit(main())
