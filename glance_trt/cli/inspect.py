"""``glance-trt inspect``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from glance_trt import strict
from glance_trt.bundle import Bundle, Manifest, Schedule


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle: where it comes from, its schedules as tables, graphs, engines and files.

    \b
    Example: glance-trt inspect out/shapes.bundle
    """
    opened = Bundle.open(bundle)
    if as_json:
        click.echo(json.dumps(strict.write(opened.manifest), indent=1))
        return
    for line in describe(opened.manifest):
        click.echo(line)


def describe(manifest: Manifest) -> list[str]:
    """The manifest for people, line by line."""
    image, source = manifest.image, manifest.provenance
    lines = [
        f"{manifest.name}  ({manifest.family}, format {manifest.format})",
        f"  base model   {source.model}",
    ]
    for lora in source.loras:
        alpha = "no alpha in the file" if lora.alpha is None else f"alpha {lora.alpha:g}"
        lines.append(f"  {lora.phase:<12} {lora.file}, scale {lora.scale:g} ({alpha})")
    lines += [f"  {guide.phase:<12} {guide.file}, guide ({guide.kind})" for guide in source.guides]
    lines.append(f"  images       {image.described()}, latents {' x '.join(map(str, image.latent_shape))}")
    guided = {name: graph.guidance for name, graph in manifest.graphs.items() if name.startswith("denoiser.")}
    modes = sorted(set(guided.values()))
    scale = "" if modes == ["none"] else f", scale {manifest.guidance.scale:g} by default"
    if bounds := manifest.guidance.range:
        scale += f", from {bounds[0]:g} to {bounds[1]:g}"
    lines.append(f"  guidance     {', '.join(modes)}{scale}")
    for name, schedule in manifest.schedules.items():
        lines += table(name, schedule)
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    lines.append("graphs")
    for name, graph in manifest.graphs.items():
        weights = f"; weights {', '.join(graph.weights)}" if graph.weights else ""
        lines.append(f"  {name:<16} {', '.join(graph.files)}{weights}")
    for name, engines in manifest.engines.items():
        needs = ", ".join(f"{key} {value}" for key, value in engines.requires.items()) or "nothing else"
        files = {file for engine in engines.graphs.values() for file in (engine.file, *engine.weights)}
        total = sum(sizes[file] for file in files)
        lines.append(f"engines {name}: {engines.backend}, {engines.dtype}, {_size(total)}; needs {needs}")
    lines.append(f"files: {len(sizes)}, {_size(sum(sizes.values()))}")
    lines += [f"  {_size(size):>9}  {name}" for name, size in sizes.items()]
    return ["".join(c if c.isprintable() else "?" for c in line) for line in lines]  # a bundle is not to be trusted


def table(name: str, schedule: Schedule, knots: Sequence[int] = ()) -> list[str]:
    """A schedule, line by line. knots: of its steps, where they are known."""
    count = f"{len(schedule.steps)} step{'s' if len(schedule.steps) > 1 else ''}"
    columns = "".join(f" {column:>10}" for column in schedule.coefficients)
    sizes = "".join(f", {height} x {width}" for height, width in schedule.sizes)
    sizes += " (height x width)" * bool(sizes)
    width = max(len(phase) for phase in ("phase", *(step.phase for step in schedule.steps)))
    lines = [
        f"schedule {name}: {count}, initial noise x {schedule.initial_noise_scale:g}{sizes}",
        f"  {'step':>4}{' knot' if knots else ''} {'phase':<{width}} {'timestep':>10}{columns}",
    ]
    for i, step in enumerate(schedule.steps, start=1):
        numbers = "".join(f" {value:10.5f}" for value in (step.timestep, *step.coefficients))
        knot = f" {knots[i - 1]:>4}" if knots else ""
        lines.append(f"  {i:>4}{knot} {step.phase:<{width}}{numbers}")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
