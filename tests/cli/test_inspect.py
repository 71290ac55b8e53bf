"""``inspect`` says what is in a bundle, for people and for programs."""

from __future__ import annotations

import os
from pathlib import Path

from glance_trt.bundle import Bundle, LoraSource, Provenance, load

from ..models import tiny
from .conftest import Run


def test_schedule_is_a_table(run: Run, tiny_bundle: Path) -> None:
    shown = run("inspect", tiny_bundle)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    start = lines.index("schedule default: 4 steps, initial noise x 2")
    assert lines[start + 1].split() == ["step", "phase", "timestep", "c_in", "a", "b"]
    rows = [line.split() for line in lines[start + 2 : start + 6]]
    for i, (row, step) in enumerate(zip(rows, tiny.SCHEDULES["default"].steps, strict=True), start=1):
        assert row[:2] == [str(i), step.phase]
        assert [float(cell) for cell in row[2:]] == [step.timestep, *step.coefficients]
    assert len({len(line) for line in lines[start + 1 : start + 6]}) == 1  # aligned
    assert "schedule short: 1 step, initial noise x 1" in lines


def test_origin_engines_and_every_file_are_shown(run: Run, tiny_bundle: Path) -> None:
    shown = run("inspect", tiny_bundle).out
    manifest = Bundle.open(tiny_bundle).manifest
    assert "base model   tiny-model" in shown
    assert "slow         slow.safetensors, scale 4 (no alpha in the file)" in shown
    assert "images       4 x 6 (height x width), latents 3 x 4 x 6" in shown
    assert "guidance     cfg, scale 3 by default" in shown
    assert "engines cpu: onnxruntime, float32, " in shown
    assert f"needs onnxruntime {manifest.engines['cpu'].requires['onnxruntime']}" in shown
    for name, entry in manifest.files.items():
        assert f"{entry.size / 1e3:.1f} kB  {name}\n" in shown


def test_json_is_a_manifest_that_reads_back(run: Run, tiny_bundle: Path) -> None:
    shown = run("inspect", tiny_bundle, "--json")
    assert (shown.code, shown.err) == (0, "")
    assert load(shown.out) == Bundle.open(tiny_bundle).manifest


def test_hostile_text_does_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    lora = LoraSource("slow", "\x1b]0;owned\x07\u202e.safetensors", "0" * 64, 1.0)
    folder = tiny.make_bundle(tmp_path / "bundle", provenance=Provenance("\x1b[2J\r\nmodel\u2028", (lora,)))
    text = run("inspect", folder).out
    assert "base model   ?[2J??model?" in text
    assert text.replace("\n", "").isprintable()
    shown = run("inspect", folder, "--json").out
    assert shown.isascii()
    assert shown.replace("\n", "").isprintable()


def test_inspect_reads_only_the_manifest(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sparse.bundle"
    folder.mkdir()
    (folder / "bundle.json").write_bytes((tiny_bundle / "bundle.json").read_bytes())
    for name, entry in Bundle.open(tiny_bundle).manifest.files.items():
        (folder / name).touch()
        os.truncate(folder / name, entry.size)
    assert run("inspect", folder).out == run("inspect", tiny_bundle).out
