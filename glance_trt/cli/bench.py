"""``glance-trt bench``"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glance_trt.bundle import Bundle
from glance_trt.cli.bars import bars

if TYPE_CHECKING:
    from glance_trt.bench import Report


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", metavar="RECIPE", help="Compare with diffusers: the model and LoRAs that this recipe names.")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="How often each thing is timed.")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 4),
    show_default=True,
    help="Images denoised at once; repeatable.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads, of both sides. Default: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    bundle: Path, against: str | None, runs: int, batches: tuple[int, ...], threads: int | None, as_json: bool
) -> None:
    """Time a bundle, stage by stage; with --against, also as ratios to diffusers, measured in the same run.

    Figures are medians, a first run is not counted. A ratio above 1 means that glance-trt is better. The peer is
    diffusers, switching the LoRAs of one denoiser; as the fused peer it has a denoiser per phase, and more memory.

    \b
    Example: glance-trt bench out/shapes.bundle --against export/shapes.yaml
    """
    from glance_trt.bench import measure

    opened = Bundle.open(bundle)
    with bars() as progress:
        report = measure(opened, against=against, runs=runs, batches=batches, threads=threads, progress=progress)
    click.echo(json.dumps(asdict(report), indent=1) if as_json else "\n".join(_table(report)))


def _table(report: Report) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"{report.bundle} on {report.target}: {versions}, {report.threads} threads, median of {report.runs}"
    yield ""
    yield f"{'milliseconds':<32}" + "".join(f"{f'batch {stages.batch}':>12}" for stages in report.stages)
    rows = {"text encoder, one prompt": [stages.text_encoder for stages in report.stages]}
    for phase in report.stages[0].step:
        rows[f"step, {phase}"] = [stages.step[phase] for stages in report.stages]
    rows["decoder"] = [stages.decoder for stages in report.stages]
    for name, values in rows.items():
        yield f"{name:<32}" + "".join(f"{value:>12.2f}" for value in values)
    yield f"{'outside the engine, per step, µs':<32}" + "".join(
        f"{stages.overhead_us:>12.1f}" for stages in report.stages
    )
    memory = report.memory
    kinds = f"{memory.private:.0f} MB private, {memory.mapped:.0f} MB mapped from files"
    yield f"memory: peak {memory.peak:.0f} MB; at the end {kinds}"
    if report.duels:
        yield ""
        yield f"peer: {report.peer}"
        yield f"{'':<36}{'glance-trt':>12}{'peer':>12}{'':<10}{'ratio':>8}"
        for duel in report.duels:
            yield f"{duel.quantity:<36}{duel.glance_trt:>12.2f}{duel.peer:>12.2f} {duel.unit:<9}{duel.ratio:>7.2f}x"
