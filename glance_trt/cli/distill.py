"""``glance-trt distill``"""

from __future__ import annotations

import os
from pathlib import Path

import click

from glance_trt.cli.bars import bars


@click.command("distill")
@click.argument("recipe")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the results. Default: the files that the recipe's phases name.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for checkpoints and loss logs. Default: .distill/NAME beside the recipe.",
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Folder for what the teacher samples, which recipes can share. Default: samples in the work folder.",
)
@click.option("--device", help="PyTorch device. Default: cuda if there is one, else cpu.")
@click.option("--overwrite", is_flag=True, help="Train again where a result exists.")
def command(
    recipe: str, output: Path | None, work: Path | None, samples: Path | None, device: str | None, overwrite: bool
) -> None:
    """Train the LoRAs and guides that a recipe's phases name, of Stable Diffusion 1 and 2.

    RECIPE is a YAML file, or the name of a shipped recipe. An interrupted run goes on from its last checkpoint.

    \b
    Example: glance-trt distill export/shapes.yaml
    """
    from glance_trt import recipe as recipes
    from glance_trt.distill import checks

    plan, folder = recipes.load(recipe)
    with recipes.naming(recipe):
        checks.settings_of(plan)
    from glance_trt.distill.experts import train

    stages = set()
    with bars() as shown, recipes.naming(recipe):

        def progress(stage: str, done: float, total: float) -> None:
            stages.add(stage.partition(" ")[0])
            shown(stage, done, total)

        files = train(
            plan,
            folder,
            work=work or folder / ".distill" / plan.name,
            samples=samples,
            out=output,
            overwrite=overwrite,
            device=device,
            progress=progress,
        )
    if "train" not in stages:
        click.echo("trained already, by this recipe; --overwrite trains again", err=True)
    for file in files:
        click.echo(os.fsencode(file))
