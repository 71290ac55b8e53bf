"""``build`` hands its arguments on, prints the bundle on stdout, and refuses a bad recipe before PyTorch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glance_trt import build
from glance_trt.bundle import Bundle
from glance_trt.errors import OutputError
from glance_trt.export.parity import Parity

from .conftest import Run

MAIN = "from glance_trt.cli.main import main\nmain()"


def report(bundle: Path, **changes: Any) -> build.Report:
    fields: dict[str, Any] = {
        "bundle": Bundle.open(bundle),
        "seconds": {"fuse and export": 1.25, "engine cpu": 62.0},
        "parity": {"cpu": [Parity("denoiser.slow", 1.5e-6, 1e-4)]},
        "page": Path("x.bundle.report.html"),
        "notes": ("slow.safetensors names no alpha",),
    }
    return build.Report(**fields | changes)


def test_arguments_reach_the_library_and_the_bundle_is_printed(
    run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def record(recipe: str, output: Path, *, progress: Any, **options: Any) -> build.Report:
        calls.append((recipe, output, options["engines"], options["overwrite"], options["check_resources"]))
        progress("fuse", 0, 1)
        return report(tiny_bundle)

    monkeypatch.setattr(build, "build", record)
    shown = run("build", "r.yaml", "-o", "x.bundle", "--engine", "cpu", "--engine", "rtx", "--overwrite")
    assert (shown.code, shown.out) == (0, "x.bundle\n")
    assert [" ".join(line.split()) for line in shown.err.splitlines()] == [
        "fuse",
        "note: slow.safetensors names no alpha",
        "fuse and export 1.2 s",
        "engine cpu 62.0 s",
        "parity cpu denoiser.slow 1.5e-06 of the largest value, at most 0.0001",
        "report x.bundle.report.html",
    ]
    run("build", "shapes", "-o", "y.bundle", "--no-preflight")
    assert calls == [
        ("r.yaml", Path("x.bundle"), ("cpu", "rtx"), True, True),
        ("shapes", Path("y.bundle"), (), False, False),
    ]


def test_lora_scales_are_for_all_phases_or_one(run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def record(*_: Any, lora_scales: Any, **__: Any) -> build.Report:
        found.append(lora_scales)
        return report(tiny_bundle)

    monkeypatch.setattr(build, "build", record)
    run("build", "r.yaml", "-o", "x.bundle", "--lora-scale", "0.5", "--lora-scale", "slow=-1")
    assert found == [{None: 0.5, "slow": -1.0}]
    for wrong in ("nan", "=1", "slow", "slow="):
        shown = run("build", "r.yaml", "-o", "x.bundle", "--lora-scale", wrong)
        assert (shown.code, f"expected a number, or PHASE=NUMBER, got {wrong!r}" in shown.err) == (2, True)


def test_bundle_that_is_there_already_is_printed_as_well(
    run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged = report(tiny_bundle, seconds={}, parity={}, page=None, notes=(), unchanged=True)
    monkeypatch.setattr(build, "build", lambda *_, **__: unchanged)
    shown = run("build", "r.yaml", "-o", "x.bundle")
    assert (shown.code, shown.out, shown.err) == (0, "x.bundle\n", "x.bundle is up to date\n")


def test_error_of_the_library_is_an_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> build.Report:
        raise OutputError("x.bundle exists and differs; give --overwrite or another -o")

    monkeypatch.setattr(build, "build", fail)
    shown = run("build", "r.yaml", "-o", "x.bundle")
    assert (shown.code, shown.out) == (9, "")
    assert shown.err == "error: x.bundle exists and differs; give --overwrite or another -o\n"


def test_output_is_required(run: Run) -> None:
    shown = run("build", "r.yaml")
    assert shown.code == 2
    assert "Missing option '-o' / '--output'" in shown.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["none.yaml"], 3, r"error: none.yaml: no such file, and no shipped recipe of that name (flux-1-dev, "),
        (["wrong.yaml"], 3, r"error: wrong.yaml: phases: missing"),
        (["shapes", "--engine", "gpu"], 3, r"error: gpu: no such file, and no shipped target of that name (cpu, "),
        (
            ["shapes", "--engine", "half.yaml"],
            7,
            r"error: target half: ONNX Runtime engines compute in float32 on a CPU",
        ),
        (["shapes", "-o", "full"], 9, r"error: full: exists and is no bundle; give another -o"),
    ],
    ids=["no recipe", "wrong recipe", "no target", "unfit target", "output exists"],
)
def test_bad_input_is_refused_before_pytorch_is_loaded(
    tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    (tmp_path / "wrong.yaml").write_text("name: x\nmodel: x\nheight: 8\nwidth: 8\n")
    (tmp_path / "half.yaml").write_text("name: half\nbackend: onnxruntime\ndtype: float16\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    if "-o" not in arguments:
        arguments = [*arguments, "-o", "x.bundle"]
    blocked = "import sys\nsys.modules['torch'] = None\n" + MAIN
    command = [sys.executable, "-c", blocked, "build", *arguments]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (code, "")
    assert shown.stderr.startswith(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "half.yaml", "wrong.yaml"]
