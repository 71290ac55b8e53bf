"""``glance-trt build``"""

from __future__ import annotations

import math
import os
from pathlib import Path

import click

from glance_trt.cli.bars import bars


@click.command("build")
@click.argument("recipe")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the bundle goes.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="TARGET",
    help="Build for this target; repeatable. Default: the recipe's.",
)
@click.option(
    "--lora-scale",
    "lora_scales",
    multiple=True,
    metavar="[PHASE=]SCALE",
    help="Fuse the LoRAs, or one phase's, at this scale; repeatable. Default: the recipe's, else alpha / rank.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that differs.")
@click.option(
    "--preflight/--no-preflight",
    default=True,
    help="Whether to refuse, before the work begins, what disk or memory cannot hold.",
)
def command(
    recipe: str,
    output: Path,
    engines: tuple[str, ...],
    lora_scales: tuple[str, ...],
    overwrite: bool,
    preflight: bool,
) -> None:
    """Build a bundle: fuse the LoRAs, export the graphs, compile engines, compare with PyTorch.

    RECIPE is a YAML file, or the name of a shipped recipe. A build that was interrupted goes on where it stopped.

    \b
    Example: glance-trt build export/shapes.yaml -o out/shapes.bundle --engine cpu
    """
    from glance_trt.build import build

    with bars() as progress:
        report = build(
            recipe,
            output,
            engines=engines,
            lora_scales=dict(map(_scale, lora_scales)),
            overwrite=overwrite,
            check_resources=preflight,
            progress=progress,
        )
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    if report.unchanged:
        click.echo(f"{output} is up to date", err=True)
    for stage, seconds in report.seconds.items():
        click.echo(f"{stage:<20} {seconds:7.1f} s", err=True)
    for name, results in report.parity.items():
        for item in results:
            click.echo(f"parity {name} {item.graph:<16} {item}", err=True)
    if report.page:
        click.echo(f"report {os.fspath(report.page)}", err=True)
    click.echo(os.fsencode(output))


def _scale(text: str) -> tuple[str | None, float]:
    """``slow=0.8`` as the phase and the scale; ``0.8`` is for all phases."""
    phase, equals, number = text.rpartition("=")
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) or (equals and not phase):
        raise click.BadParameter(f"expected a number, or PHASE=NUMBER, got {text!r}", param_hint="--lora-scale")
    return phase or None, scale
