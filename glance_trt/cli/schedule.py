"""``glance-trt schedule``"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from glance_trt.cli.bars import bars
from glance_trt.errors import InputError, OutputError, RecipeError
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from glance_trt.distill.search import Knots


@click.command("schedule")
@click.argument("recipe")
@click.option("--search", "searching", is_flag=True, help="Search the best knots, for Stable Diffusion 1 and 2.")
@click.option("-k", "--knots", type=click.IntRange(1), default=10, show_default=True, help="How many to choose.")
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True, help="Trajectories to sample.")
@click.option("--prompts", type=click.Path(path_type=Path), help="A caption per line. Default: the recipe's.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for trajectories. Default: as for distill.")
@click.option("--device", help="PyTorch device. Default: cuda if there is one, else cpu.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw costs and knots into this PNG or SVG.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the recipe with the best knots, without comments."
)
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.pass_context
def command(
    context: click.Context,
    recipe: str,
    searching: bool,
    knots: int,
    samples: int,
    prompts: Path | None,
    work: Path | None,
    device: str | None,
    plot: Path | None,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Show a recipe's schedule, or search the best one for its model.

    A search samples the teacher on a few prompts, and finds the knots between which straight jumps stay nearest to its
    trajectories, and the best place to change from the slow to the fast phase. It prints them beside a uniform grid
    and, where the teacher has 50 steps, the paper's, and the best cost for every number of knots.

    \b
    Example: glance-trt schedule export/shapes.yaml --search -k 6 -o shapes6.yaml
    """
    from glance_trt import recipe as recipes

    plan, folder = recipes.load(recipe)
    for option in ("knots", "samples", "prompts", "work", "device", "plot", "output"):
        if not searching and context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{option} needs --search")
    for file in filter(None, (output, plot)):
        if file.exists() and not overwrite:
            raise OutputError(f"{file}: exists; give another, or --overwrite")
    if plot and plot.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"--plot {plot}: expected a name that ends in .png or .svg")
    if not searching:
        with recipes.naming(recipe):
            _show(plan, folder)
        return
    if output and len(plan.phases) > 2:
        raise RecipeError(f"{recipe}: has {len(plan.phases)} phases; searched knots are for one or two")
    if output and knots < len(plan.phases):
        raise InputError(f"--knots {knots}: {recipe} has {len(plan.phases)} phases, and each needs one")
    from glance_trt.distill import data, files, search
    from glance_trt.prompts import read_prompts

    for file in filter(None, (output, plot)):
        files.make_folder(file.parent)
    captions: Sequence[str]
    with bars() as progress, recipes.naming(recipe):
        if prompts:
            captions = read_prompts(prompts)
        elif plan.distill:
            captions = data.read(plan.distill, plan, folder).captions
        else:
            raise RecipeError("has no prompts under distill; give --prompts")
        found = search.search(
            plan,
            folder,
            captions,
            knots,
            samples=samples,
            work=work or folder / ".distill" / plan.name,
            device=device,
            progress=progress,
        )
    best = found.best[knots - 1]
    click.echo(_line("best", best))
    click.echo(_line("uniform", found.uniform))
    if found.paper:
        click.echo(_line("paper", found.paper))
    click.echo("\nknots     cost")
    for row in found.best[:-1]:
        click.echo(f"{len(row.steps):5} {row.cost:8.4f}")
    if output:
        files.write_bytes(output, written(plan, folder, best, output).encode())
        if any(phase.lora or phase.guide for phase in plan.phases):
            click.echo(f"train its experts for these knots: glance-trt distill {output}", err=True)
    if plot:
        search.plot(found, knots, plot)


def _show(plan: Recipe, folder: Path) -> None:
    from glance_trt import build
    from glance_trt.cli.inspect import table
    from glance_trt.engines import targets
    from glance_trt.export.families import from_recipe

    with bars() as progress:
        family = from_recipe(plan, folder, progress, whole=False)
    family.image()
    targets.load_all(plan.engines, folder)
    knots = [step for phase in plan.phases for step in phase.steps]
    for name, schedule in build.schedules(family, plan).items():
        for line in table(name, schedule, knots):
            click.echo(line)


def _line(name: str, knots: Knots) -> str:
    parts = (" ".join(map(str, part)) for part in (knots.steps[: knots.slow], knots.steps[knots.slow :]))
    return f"{name:8} cost {knots.cost:.4f}: {' | '.join(filter(None, parts))}"


def written(plan: Recipe, folder: Path, knots: Knots, output: Path) -> str:
    """The recipe with these knots, as YAML for the file `output`, which it is named for, as are the LoRAs and guides
    that have to be trained for these knots. Other paths lead to what the recipe has."""
    import yaml

    from glance_trt import strict

    parts = [knots.steps] if len(plan.phases) == 1 else [knots.steps[: knots.slow], knots.steps[knots.slow :]]
    phases = tuple(replace(phase, steps=steps) for phase, steps in zip(plan.phases, parts, strict=True))

    def moved(path: str) -> str:
        return os.path.relpath(folder / path, output.parent)

    content = strict.write(replace(plan, name=output.stem, phases=phases))
    for key in ("model", "config", "decoder"):
        if key in content and (folder / content[key]).exists():  # or it is an id on the Hub
            content[key] = moved(content[key])
    for phase in content["phases"]:
        if "lora" in phase:
            phase["lora"]["file"] = f"{output.stem}.{phase['name']}.safetensors"
        if "guide" in phase:
            phase["guide"] = f"{output.stem}.{phase['name']}.guide.safetensors"
    for key in ("prompts", "image", "images"):
        if key in content.get("distill", {}):
            content["distill"][key] = moved(content["distill"][key])
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
