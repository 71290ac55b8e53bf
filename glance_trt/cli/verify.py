"""``glance-trt verify``"""

from __future__ import annotations

import json
from pathlib import Path

import click

from glance_trt.bundle import Bundle
from glance_trt.cli import options
from glance_trt.cli.bars import bars


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", metavar="RECIPE", help="Compare with PyTorch: the model and LoRAs that this recipe names.")
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts of the images, one per line. Default: the recipe's.",
)
@click.option(
    "--images",
    type=click.IntRange(min=0),
    help="Whole images to compare; image i has the seed i. Default: one per line of --prompts, or 2.",
)
@options.engines
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    bundle: Path,
    against: str | None,
    prompts_file: Path | None,
    images: int | None,
    target: str | None,
    device: int,
    trust: bool,
    as_json: bool,
) -> None:
    """Hash every file of a bundle; with --against, compare a target's engines with PyTorch, per graph and per image.

    \b
    Example: glance-trt verify out/shapes.bundle --against export/shapes.yaml
    """
    if not against and (prompts_file or images is not None or target or trust):
        raise click.UsageError("--prompts, --images, --target and --trust say what to compare; add --against RECIPE")
    prompts: list[str] = []
    if prompts_file:
        from glance_trt.prompts import read_prompts

        prompts = read_prompts(prompts_file)
    opened = Bundle.open(bundle)
    with bars() as progress:
        opened.verify(progress)
        result: dict[str, object] = {"files": len(opened.manifest.files)}
        lines = [f"{len(opened.manifest.files)} files as listed"]
        if against:
            from glance_trt.verify import compare

            report = compare(
                opened,
                against,
                prompts=prompts,
                images=images,
                target=target,
                device=device,
                trust=trust,
                progress=progress,
            )
            result["graphs"] = {item.graph: item.error for item in report.graphs}
            result["psnr_db"] = report.psnr
            lines += [f"{item.graph:<16} differs by {item}" for item in report.graphs]
            lines += [f"image {i:<10} {psnr:.1f} dB from diffusers" for i, psnr in enumerate(report.psnr, start=1)]
            if report.psnr:
                lines.append(f"{f'{len(report.psnr)} images':<16} at least {min(report.psnr):.1f} dB")
    click.echo(json.dumps(result) if as_json else "\n".join(lines))
