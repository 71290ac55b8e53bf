"""The command line in this process: exit code, stdout and stderr, as a shell would see them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from glance_trt.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs ``glance-trt`` with arguments, in an empty folder and with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["glance-trt", *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.resetwarnings()  # as outside of tests, where a warning is no error
            with pytest.raises(SystemExit) as caught:
                main()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, *capsys.readouterr())

    return call
