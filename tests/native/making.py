"""Builds CMake projects for the tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_LACKING = re.compile(r"could not be had|could not find|No CMAKE_CXX_COMPILER could be found", re.IGNORECASE)
"""What CMake says where the machine lacks something, rather than the project being wrong."""


def make(source: Path, folder: Path, *options: str) -> str:
    """Build a project into a folder; returns what CMake said. What needs it is skipped where the machine lacks
    something."""
    if shutil.which("cmake") is None:
        pytest.skip(f"{source.name} needs cmake to be built")
    configured = _run("-S", source, "-B", folder, *options)
    lacking = [line.strip() for line in configured.stderr.splitlines() if _LACKING.search(line)]
    if configured.returncode and lacking:
        pytest.skip(f"{source.name} cannot be built: {lacking[0]}")
    assert configured.returncode == 0, configured.stderr
    built = _run("--build", folder, "--parallel", "2")
    assert built.returncode == 0, built.stdout + built.stderr
    return configured.stdout


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True, check=False)
