"""``glance-trt verify``"""

from __future__ import annotations

import json
from pathlib import Path

import click

from glance_trt.bundle import Bundle
from glance_trt.cli.bars import bars


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", metavar="RECIPE", help="Compare with PyTorch: the model and LoRAs that this recipe names.")
@click.option(
    "--images",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Whole images to compare, with --against.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(bundle: Path, against: str | None, images: int, as_json: bool) -> None:
    """Hash every file of a bundle; with --against, compare its CPU engines with PyTorch, per graph and per image.

    \b
    Example: glance-trt verify out/shapes.bundle --against export/shapes.yaml
    """
    opened = Bundle.open(bundle)
    with bars() as progress:
        opened.verify(progress)
        result: dict[str, object] = {"files": len(opened.manifest.files)}
        lines = [f"{len(opened.manifest.files)} files as listed"]
        if against:
            from glance_trt.verify import compare

            report = compare(opened, against, images, progress)
            result["graphs"] = {item.graph: item.error for item in report.graphs}
            result["psnr_db"] = report.psnr
            lines += [
                f"{item.graph:<16} differs by {item.error:.1e}, at most {item.tolerance:g}" for item in report.graphs
            ]
            lines += [f"image {i:<10} {psnr:.1f} dB from diffusers" for i, psnr in enumerate(report.psnr, start=1)]
    click.echo(json.dumps(result) if as_json else "\n".join(lines))
