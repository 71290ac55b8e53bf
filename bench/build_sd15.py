"""Is a model of Stable Diffusion 1.5's size built within small limits of time, memory and disk?

Makes such a model of random weights (its UNet has 860M parameters, float16) and two LoRAs of rank 32, then runs each
stage of a build in a process of its own, and prints what it took beside its limit. Exits with 1 if a limit is broken.

    python bench/build_sd15.py
    python bench/build_sd15.py --channels 32,64,128,128     # a trial of the script, in a minute

Seconds are wall clock and include each process's imports; memory is the largest resident size of the process or of one
it started (wait4). An engine's private memory is what each process pays anew, its mapped memory belongs to the page
cache and is shared. Needs about 25 GB of disk, and 8 GB of memory for the CPU engines.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import Figure, run_stage, show

from glance_trt.bench import memory
from glance_trt.engines import targets
from glance_trt.recipe import Lora, Phase, Recipe

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CHANNELS = (320, 640, 1280, 1280)
RANK = 32
DTYPES = {"cpu": "float32", "rtx": "float16"}
RECIPE = Recipe(
    name="sd15-random",
    model="model",
    phases=(
        Phase("slow", (1, 3, 5, 7, 9), Lora("slow.safetensors")),
        Phase("fast", (11, 21, 31, 41, 50), Lora("fast.safetensors")),
    ),
    height=512,
    width=512,
)
PHASES = tuple(phase.name for phase in RECIPE.phases)


def unet_of(channels: tuple[int, ...]) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion 1.5's architecture, with random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=channels,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


# --- the stages, each in a process of its own -----------------------------------------------------------------------


def make(work: Path, channels: tuple[int, ...]) -> dict[str, Any]:
    """The model's folder and the LoRAs, tensor by tensor. Only the UNet has weights: nothing else is built here."""
    import torch

    from glance_trt.export import weights

    with torch.device("meta"):
        unet = unet_of(channels)
    model = work / RECIPE.model
    unet.save_config(model / "unet")
    configs = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "text_encoder": ["transformers", "CLIPTextModel"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "text_encoder/config.json": {"hidden_size": 768, "max_position_embeddings": 77},
        "vae/config.json": {"block_out_channels": [128, 256, 512, 512]},
    }
    for name, config in configs.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(json.dumps(config))

    def random(*shape: int) -> weights.Fused:
        ref = weights.TensorRef(Path(), "F16", shape, 0, 2 * torch.Size(shape).numel())
        return weights.Fused(ref, lambda: [torch.randn(shape).mul_(0.02).half()])

    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    path = model / "unet/diffusion_pytorch_model.safetensors"
    weights.write(path, {name: random(*shape) for name, shape in shapes.items()})
    attention = tuple(f".{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    for phase in RECIPE.phases:
        factors = {}
        for name, shape in shapes.items():
            if name.endswith(attention):
                module = f"unet.{name.removesuffix('.weight')}"
                factors[f"{module}.lora_A.weight"] = random(RANK, shape[1])
                factors[f"{module}.lora_B.weight"] = random(shape[0], RANK)
        assert phase.lora
        weights.write(work / phase.lora.file, factors)
    return {"parameters": sum(torch.Size(shape).numel() for shape in shapes.values())}


def export(work: Path) -> dict[str, Any]:
    """Both phases: weights files, and graphs in each dtype that an engine needs."""
    from glance_trt.export import fuse, lora, trace, weights
    from glance_trt.export.families import from_recipe

    source = from_recipe(RECIPE, work).sources()["denoiser"]
    tensors = weights.component_tensors(work / RECIPE.model / "unet")
    loras = {phase.name: lora.read(work / phase.lora.file, tensors) for phase in RECIPE.phases if phase.lora}
    graphs = {dtype: trace.trace(source, dtype) for dtype in DTYPES.values()}
    files = fuse.plan({name: tensors[name] for name in trace.parameter_names(source)}, loras)
    written = {file: weights.write(work / file, content) for file, content in files.items()}
    for phase in PHASES:
        refs = written[fuse.BASE] | written[f"denoiser.{phase}.safetensors"]
        for dtype, graph in graphs.items():
            trace.bind(graph, refs, work / f"denoiser.{phase}.{dtype}.onnx")
    base = {ref.file for ref in tensors.values()}
    return {"ratio": sum((work / file).stat().st_size for file in files) / sum(file.stat().st_size for file in base)}


def plan(work: Path, phase: str) -> dict[str, Any]:
    """The TensorRT-RTX plan of one phase."""
    from glance_trt.engines import tensorrt
    from glance_trt.export.families import from_recipe

    target = targets.load("rtx")
    source = from_recipe(RECIPE, work).sources()["denoiser"]
    sizes = {"8*h": RECIPE.height // 8, "8*w": RECIPE.width // 8}
    (profile,) = target.profiles
    ranges = {
        port.name: tuple(
            tuple(batch if dim == "batch" else sizes.get(dim, dim) for dim in port.shape) for batch in profile.batch
        )
        for port in source.inputs
        if "batch" in port.shape
    }
    name = f"denoiser.{phase}"
    graphs = {name: work / f"{name}.{target.dtype}.onnx"}
    tensorrt.build(graphs, directory=work, target=target, ranges={name: [ranges]})
    return {}


def optimise(work: Path) -> dict[str, Any]:
    """The CPU engines of both phases."""
    from glance_trt.engines import onnxruntime

    graphs = {f"denoiser.{phase}": work / f"denoiser.{phase}.float32.onnx" for phase in PHASES}
    onnxruntime.build(graphs, directory=work, prefix="cpu", groups=dict.fromkeys(graphs, "denoiser"))
    return {}


def open_engines(work: Path) -> dict[str, Any]:
    """The CPU engines of both phases: opened, then each run once on the smallest image, which reads every weight."""
    import numpy as np

    from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner

    graphs = [f"denoiser.{phase}" for phase in PHASES]
    runner = OnnxRuntimeRunner(work, {graph: f"cpu.{graph}.onnx" for graph in graphs})
    before, start = memory(), time.perf_counter()
    sessions = [runner._session(graph) for graph in graphs]  # opening alone, which the protocol leaves to the first run
    seconds, opened = time.perf_counter() - start, memory()
    sizes = {"batch": 1, "8*h": 8, "8*w": 8}
    inputs = {
        port.name: np.ones([sizes.get(dim, dim) for dim in port.shape], np.float32) for port in sessions[0].get_inputs()
    }
    for graph in graphs:
        runner.run(graph, inputs)
    ran = memory()
    return {
        "seconds": seconds,
        "opened": [opened.private - before.private, opened.mapped - before.mapped],
        "ran": [ran.private - before.private, ran.mapped - before.mapped],
    }


# --- all of them ----------------------------------------------------------------------------------------------------


def measure(work: Path, channels: tuple[int, ...], engines: bool) -> Iterator[Figure]:
    """Run the stages in order."""

    def run(*stage: str) -> tuple[float, float, Any]:
        return run_stage(__file__, work, stage, "--channels", ",".join(map(str, channels)))

    seconds, peak, found = run("make")
    yield Figure("model: parameters of the UNet", found["parameters"] / 1e6, "M")
    yield from _costs("model: made", seconds, peak)
    seconds, peak, found = run("export")
    yield from _costs("fuse + export, both phases", seconds, peak, 120, 3000)
    yield Figure("denoiser weights on disk / base", found["ratio"], "x", 1.15)
    if not engines:
        return
    if importlib.util.find_spec("tensorrt_rtx"):
        for phase in PHASES:
            seconds, peak, _ = run("plan", phase)
            yield from _costs(f"TensorRT-RTX plan, {phase}", seconds, peak, 45)
    seconds, peak, _ = run("optimise")
    yield from _costs("CPU engines, both phases", seconds, peak)
    _, peak, found = run("open")
    yield Figure("CPU engines: both opened", found["seconds"], "s", 1)
    for when, key in (("opened", "opened"), ("after a step of each", "ran")):
        private, mapped = found[key]
        yield Figure(f"CPU engines {when}: private", private, "MB")
        yield Figure(f"CPU engines {when}: mapped", mapped, "MB")


def _costs(
    what: str, seconds: float, peak: float, most_seconds: float | None = None, most_memory: float | None = None
) -> Iterator[Figure]:
    yield Figure(f"{what}: time", seconds, "s", most_seconds)
    yield Figure(f"{what}: peak memory", peak, "MB", most_memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the files, kept; default: a temporary one, removed")
    parser.add_argument("--skip-engines", action="store_true", help="only fuse and export")
    parser.add_argument("--channels", default=",".join(map(str, CHANNELS)), help="of the UNet's four blocks, multiples "
                        "of 32; the limits hold for the default, %(default)s")  # fmt: skip
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    channels = tuple(map(int, options.channels.split(",")))
    if options.stage:
        stages: dict[str, Callable[..., dict[str, Any]]] = {
            "make": make, "export": export, "plan": plan, "optimise": optimise, "open": open_engines,
        }  # fmt: skip
        name, *rest = options.stage
        figures = stages[name](options.work, *([channels] if name == "make" else rest))
        options.figures.write_text(json.dumps(figures))
        return 0
    with tempfile.TemporaryDirectory(prefix="glance-bench-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        return show(measure(work, channels, not options.skip_engines), limited=channels == CHANNELS)


if __name__ == "__main__":
    sys.exit(main())
