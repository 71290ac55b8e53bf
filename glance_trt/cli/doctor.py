"""``glance-trt doctor``"""

from __future__ import annotations

import json

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(as_json: bool) -> None:
    """Say what this machine can build and run, and why not.

    \b
    Example: glance-trt doctor
    """
    from glance_trt.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings]))
        return
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        click.echo(f"{'ok' if finding.ok else '--'}  {finding.what:<{width}}  {' '.join(finding.detail.split())}")
