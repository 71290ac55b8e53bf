"""``glance-trt compile``"""

from __future__ import annotations

import os
from pathlib import Path

import click

from glance_trt.cli.bars import bars


@click.command("compile")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--engine", "engines", multiple=True, required=True, metavar="TARGET", help="For this target; repeatable."
)
def command(bundle: Path, engines: tuple[str, ...]) -> None:
    """Compile a bundle's graphs for more targets, or anew, on the machine that is to run them.

    Needs neither the model nor PyTorch. Engines of other targets stay as they are; those that the bundle has for the
    same target are replaced. TARGET is a YAML file, or the name of a shipped target.

    \b
    Example: glance-trt compile my-model.bundle --engine tensorrt
    """
    from glance_trt.compiling import compile_bundle

    with bars() as progress:
        done = compile_bundle(bundle, engines, progress=progress)
    for target, seconds in done.seconds.items():
        click.echo(f"engines {target:<12} {seconds:7.1f} s", err=True)
    click.echo(os.fsencode(bundle))
