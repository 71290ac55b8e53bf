"""How fast and how exact are the engines on this machine's GPU, and which of them load there?

For the demonstration model and for UNets of Stable Diffusion 1.5's and SDXL's size with random weights, ten guided
steps: builds a bundle for every target that this machine can build, runs each in a process of its own beside PyTorch,
eager and compiled (max-autotune, with CUDA graphs), and prints a table per model, as Markdown. Needs the extras export,
gpu, and rtx or tensorrt, and a PyTorch for CUDA; nothing is fetched.

    python bench/gpu.py > docs/gpu-NAME.md
    python bench/gpu.py --models tiny --device cpu      # a trial of the script, without a GPU

ms per image: median over 20 images, from noise on the host to pixels on the host, text encoder not included; host ms:
until the work is enqueued. gap: part of the steps' device time that lies between them, against ten times a step alone.
PSNR: against PyTorch in float32 with the same weights and noise. TFLOP/s: of the denoiser's matrix products and
convolutions, as PyTorch counts them; peak: of a product of 8192 x 8192 matrices in the same dtype. MB: device memory
that opening and running took, for both phases and for the first alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import random_models

from glance_trt import gpu, recipe
from glance_trt.bundle import Bundle
from glance_trt.engines import backends, targets
from glance_trt.errors import GlanceError, TargetError
from glance_trt.runtime.pipeline import Pipeline

REPOSITORY = Path(__file__).parent.parent
PROMPT = "a large red circle left of a small blue star on a white background"
IMAGES = 20
DTYPES = {"cuda": ("float16", "bfloat16", "float32"), "cpu": ("float32",)}
TARGETS = {"cuda": ("tensorrt", "rtx", "cuda"), "cpu": ("cpu",)}


# --- one side, in a process of its own ------------------------------------------------------------------------------


def run_engines(bundle: Path, target: str) -> dict[str, Any]:
    """Images of one target's engines, and their figures."""
    before = _memory_used()
    with Pipeline.open(bundle, target) as pipeline:
        calls, values = pipeline.prepare(PROMPT, pipeline.settings())
        run, first = pipeline.runner.chain, [call for call in calls if call.graph == calls[0].graph]
        run(first, values, [first[-1].outputs[0][1]])
        one_engine = _memory_used() - before
        found = run(calls, values, ["pixels"])
        for _ in range(2):  # the second is captured
            run(calls, values, ["pixels"])
        times = [_timed(lambda: run(calls, values, ["pixels"])) for _ in range(IMAGES)]
        chained = []
        for _ in range(IMAGES):
            whole = run(calls, values, ["pixels"]).milliseconds
            chained.append(sum(ms for graph, ms in whole.items() if graph != "decoder"))
        host = []
        for _ in range(IMAGES + 2):
            host.append(_timed(lambda: run(calls, values, ["pixels"], on_device=True)))
            run(calls, values, ["pixels"])  # waits, so that the next one is not held up by this one
        alone = 0.0
        for call in calls[:-1]:  # each step in a row of its own, so that it is captured and warm
            given, wanted = _inputs_of(call, values), [call.outputs[0][1]]
            runs = [sum(run([call], given, wanted).milliseconds.values()) for _ in range(IMAGES)]
            alone += median(runs[2:])
        np.save(_images(bundle, target), found.values["pixels"])
        return {
            "ms": median(times),
            "host": median(host[2:]),
            "steps": median(chained),
            "gap": 1 - alone / median(chained),
            "memory": [_memory_used() - before, one_engine],
        }


def run_torch(bundle: Path, dtype: str, device: str, compiled: bool) -> dict[str, Any]:
    """The same steps and decoder in PyTorch, with the bundle's own fused weights."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as in the engines
    modules, manifest = _modules(bundle, dtype, device), Bundle.open(bundle).manifest
    run: dict[str, Callable[..., Any]] = dict(modules)
    if compiled:
        run = {name: torch.compile(module, mode="max-autotune") for name, module in modules.items()}
    cpu = next(name for name, item in manifest.engines.items() if item.backend == "onnxruntime")
    with Pipeline.open(bundle, cpu) as pipeline:  # for tokens, text embeddings and noise
        calls, values = pipeline.prepare(PROMPT, pipeline.settings())

    def image() -> Any:
        known = {name: torch.from_numpy(np.asarray(value)).to(device) for name, value in values.items()}
        for call in calls:
            by_port = dict(call.inputs)
            ports = [port.name for port in manifest.graphs[call.graph].inputs]
            if compiled and device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            known[call.outputs[0][1]] = run[call.graph](*(known[by_port[port]] for port in ports)).clone()
        return known["pixels"].cpu()

    with torch.no_grad():
        for _ in range(3):
            pixels = image()
        times = [_timed(image) for _ in range(IMAGES)]
        np.save(_images(bundle, f"torch{' compiled' * compiled}.{dtype}"), pixels.numpy())
        used = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else float("nan")
        return {"ms": median(times), "memory": [used, float("nan")]}


def run_device(bundle: Path, dtype: str, device: str) -> dict[str, Any]:
    """The denoiser's operations for one image, and the machine's peak."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    manifest = Bundle.open(bundle).manifest
    steps = manifest.schedules["default"].steps
    graph = f"denoiser.{steps[0].phase}"
    module = _modules(bundle, "float32", "meta", [graph])[graph]
    _, height, width = manifest.image.latent_shape
    sizes = {"batch": 1, "h": height, "w": width}
    inputs = [
        torch.zeros(
            [dim if isinstance(dim, int) else sizes[dim.rpartition("*")[2]] for dim in port.shape], device="meta"
        )
        for port in manifest.graphs[graph].inputs
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    side = 8192 if device == "cuda" else 512
    a, b = (torch.randn(side, side, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    (a @ b).sum().item()
    times = [_timed(lambda: (a @ b)[0, 0].item()) for _ in range(IMAGES)]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "flop": counter.get_total_flops() * len(steps),
        "peak": 2 * side**3 / (median(times) / 1e3) / 1e12,
        "device": f"{name}, PyTorch {torch.__version__}",
    }


def _modules(bundle: Path, dtype: str, device: str, names: list[str] | None = None) -> dict[str, Any]:
    """PyTorch modules of the denoiser's phases and the decoder, with the weights of the bundle's files."""
    import torch
    from safetensors.torch import load_file

    from glance_trt.export.families import from_recipe, source_of

    plan, folder = recipe.load(str(bundle.with_suffix(".yaml")))
    sources, manifest = from_recipe(plan, folder).sources(), Bundle.open(bundle).manifest
    modules = {}
    for graph, item in manifest.graphs.items():
        if graph == "text_encoder" or graph not in (names or manifest.graphs):
            continue
        source = source_of(sources, graph)
        with torch.device("meta" if device == "meta" else "cpu"):
            module = source.build().eval().requires_grad_(False)
        if device != "meta":
            tensors = {name: tensor for file in item.weights for name, tensor in load_file(bundle / file).items()}
            module.load_state_dict({name: tensors[name.removeprefix(source.prefix)] for name in module.state_dict()})
            module = module.to(device, getattr(torch, dtype))
        modules[graph] = module
    return modules


def _inputs_of(call: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a step alone: any latents will do for its time."""
    return {name: values["latents.0"] if name.startswith("latents.") else values[name] for _, name in call.inputs}


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _memory_used() -> float:
    """Of the first GPU, by whom ever, MB; not a number without one."""
    try:
        from cuda.bindings import driver
        from cuda.core import Device

        Device().set_current()
        code, free, total = driver.cuMemGetInfo()
        return float("nan") if code else (total - free) / 1e6
    except Exception:  # no package, or no driver
        return float("nan")


def _images(bundle: Path, side: str) -> Path:
    return bundle.with_name(f"{bundle.stem}.{side}.npy")


# --- all of them ----------------------------------------------------------------------------------------------------


def model_table(name: str, device: str, work: Path) -> Iterator[str]:
    """Build a model's bundle and run every side."""
    sides = [f"{target}.{dtype}" for target in TARGETS[device] for dtype in DTYPES[device]]
    bundle, problems = _build(name, device, sides, work)
    figures: dict[str, dict[str, Any]] = {}

    def run(side: str, *arguments: str) -> None:
        print(f"{name}: {side}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--side", *arguments, "--work", str(bundle), "--device", device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            problems[side] = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"code {done.returncode}"
        else:
            figures[side] = json.loads(done.stdout.splitlines()[-1])

    for dtype in DTYPES[device]:
        run(f"device {dtype}", "device", dtype)
        run(f"torch.{dtype}", "torch", dtype)
        run(f"torch compiled.{dtype}", "compiled", dtype)
    for side in sides:
        if side not in problems:
            run(side, "engines", side)
    machine = next((item["device"] for side, item in figures.items() if side.startswith("device")), "unknown device")
    yield f"### {name} on {machine}\n"
    yield "| | dtype | ms per image | against compiled | host ms | gap | PSNR | TFLOP/s | of peak | MB, both / one |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for side in [*(f"torch{kind}.{dtype}" for dtype in DTYPES[device] for kind in ("", " compiled")), *sides]:
        if side in figures:
            yield _row(side, figures, bundle)
    yield from ("", *(f"- `{side}` did not run: {reason}" for side, reason in problems.items()), "")


def _build(name: str, device: str, sides: list[str], work: Path) -> tuple[Path, dict[str, str]]:
    """A bundle with every side that can be built here, and why the others cannot."""
    import yaml

    from glance_trt.build import build

    problems: dict[str, str] = {}
    files: dict[str, str] = {}
    for side in sides:
        shipped, dtype = side.split(".")
        content = yaml.safe_load((REPOSITORY / f"engines/{shipped}.yaml").read_text())
        target = work / f"{side}.target.yaml"
        target.write_text(yaml.safe_dump(content | {"name": side, "dtype": dtype}))
        reason = backends.unavailable(targets.load(str(target)))
        problems |= {side: reason} if reason else {}
        files |= {} if reason else {side: str(target)}
    source = work / f"{name}.yaml"
    if name == "shapes":
        content = yaml.safe_load((REPOSITORY / "export/shapes.yaml").read_text())
        content["model"] = str(REPOSITORY / "export" / content["model"])
        for phase in content["phases"]:
            phase["lora"]["file"] = str(REPOSITORY / "export" / phase["lora"]["file"])
        source.write_text(yaml.safe_dump(content))
    else:
        random_models.write(work, name)
    for side, file in list(files.items()):  # by one, so that one that fails does not take the others along
        try:
            build(str(source), work / f"{name}.trial", engines=[file], overwrite=True)
        except GlanceError as error:
            problems[side] = str(error).splitlines()[0]
            del files[side]
    bundle = work / f"{name}.bundle"
    cpu = [] if "cpu.float32" in files else ["cpu"]  # its tokenizer and text encoder serve the PyTorch sides
    build(str(source), bundle, engines=[*cpu, *files.values()], overwrite=True)
    return bundle, problems


def _row(side: str, figures: dict[str, dict[str, Any]], bundle: Path) -> str:
    what, dtype = side.split(".")
    item, device = figures[side], figures.get(f"device {dtype}", {})
    compiled = figures.get(f"torch compiled.{dtype}", {}).get("ms", float("nan"))
    speed = device.get("flop", float("nan")) / (item.get("steps", float("nan")) / 1e3) / 1e12
    file, reference = _images(bundle, side), _images(bundle, "torch.float32")
    cells = [
        f"{item['ms']:.2f}",
        f"{compiled / item['ms']:.2f} x",
        f"{item['host']:.2f}" if "host" in item else "",
        f"{item['gap']:.1%}" if "gap" in item else "",
        _psnr(file, reference),
        f"{speed:.2f}" if "steps" in item else "",
        f"{speed / device['peak']:.0%}" if "steps" in item and device else "",
        " / ".join(f"{value:.0f}" for value in item["memory"]),
    ]
    return f"| {what} | {dtype} | {' | '.join(cells)} |"


def _psnr(file: Path, reference: Path) -> str:
    if not (file.is_file() and reference.is_file()) or file == reference:
        return ""
    error = np.mean((np.load(file).astype(np.float64) - np.load(reference)) ** 2)
    return "equal" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["shapes", "sd15", "sdxl"], choices=[*random_models.SIZES, "shapes"]
    )
    parser.add_argument("--device", default="cuda", choices=list(DTYPES))
    parser.add_argument("--work", type=Path, help="folder for models and bundles, kept; default: a temporary one")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        kind, what = options.side
        bundle, device = options.work, options.device
        sides = {
            "engines": lambda: run_engines(bundle, what),
            "torch": lambda: run_torch(bundle, what, device, compiled=False),
            "compiled": lambda: run_torch(bundle, what, device, compiled=True),
            "device": lambda: run_device(bundle, what, device),
        }
        print(json.dumps(sides[kind]()))
        return
    if options.device == "cuda":
        try:
            gpu.compute_capability()
        except TargetError as error:
            sys.exit(f"{error}; a trial of this script without a GPU: --models tiny --device cpu")
    with tempfile.TemporaryDirectory(prefix="glance-bench-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for name in options.models:
            for line in model_table(name, options.device, work):
                print(line, flush=True)


if __name__ == "__main__":
    main()
