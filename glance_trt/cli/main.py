"""The command group, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from typing import TextIO

import click

from glance_trt import __version__, strict
from glance_trt.errors import GlanceError, OutputError, TargetError

_COMMANDS = ("schedule", "distill", "build", "compile", "generate", "inspect", "verify", "bench", "doctor")


class _Commands(click.Group):
    """Loads a command's module when the command is asked for, so that none pays for another's imports."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            if hint := strict.did_you_mean(name, _COMMANDS):
                raise click.UsageError(f"No such command {name!r}; {hint}", context)
            return None
        command: click.Command = importlib.import_module(f"glance_trt.cli.{name}").command
        return command

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except BrokenPipeError:  # the reader of stdout, such as `head`, has left; click would say exit code 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
            return 128 + 13  # as a shell says that SIGPIPE ended a program


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glance-trt")
def commands() -> None:
    """Few-step diffusion with phase experts: train them, build engines, and run them without PyTorch.

    Results go to stdout, everything else to stderr.
    """


def main() -> None:
    """Run the command line; never returns. Exit codes: README, "Exit codes"."""
    warnings.showwarning = _show_warning
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import tells of processors that nobody asked for
    try:
        code = commands(prog_name="glance-trt", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except GlanceError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        click.echo(f"error: {error.filename or 'output'}: {error.strerror}", err=True)
        code = OutputError.exit_code
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("glance_trt"):
            raise
        click.echo(f"error: this command needs {error.name}; glance-trt doctor says what to install", err=True)
        code = TargetError.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """This package's own warnings, in one line; those of libraries are not for the user."""
    if category.__module__.startswith("glance_trt."):
        click.echo(f"warning: {message}", err=True)
