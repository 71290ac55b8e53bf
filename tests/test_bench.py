"""Timing: stages add up, figures follow what is really slow or large, and both sides of a comparison work alike."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from glance_trt import bench, duel
from glance_trt.bundle import Bundle
from glance_trt.cli.main import commands
from glance_trt.errors import InputError, TargetError
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.runtime.runners import Runner

# Answers batches as the peer does, after 20 ms per image, or 10 ms with fused LoRAs, and notes the requests.
PEER = """
import json, os, sys, time
if len(sys.argv) > 3:
    open(sys.argv[4], "w").write(os.environ["OMP_NUM_THREADS"])
else:
    fused = sys.argv[2:] == ["--fused"]
    with open({log!r} + ".fused" * fused, "a") as log:
        for line in sys.stdin:
            log.write(line)
            log.flush()
            seconds = (0.01 if fused else 0.02) * len(json.loads(line)["seeds"])
            time.sleep(seconds)
            print(seconds, flush=True)
"""

RECIPE = """
name: {name}
model: {model}
height: 8
width: 8
phases: [{{name: slow, steps: [1]}}]
"""


class Slow:
    """A runner that takes at least 100 ms longer for a step of the slow phase, and 50 ms for the decoder."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.decoded: list[int] = []

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        time.sleep({"denoiser.slow": 0.1, "decoder": 0.05}.get(graph, 0))
        if graph == "decoder":
            self.decoded.append(len(inputs["latents"]))
        return self.runner.run(graph, inputs)

    def close(self) -> None:
        self.runner.close()


def write_recipe(path: Path, name: str, model: Path = Path("nowhere")) -> Path:
    path.write_text(RECIPE.format(name=name, model=model))
    return path


def test_stages_are_told_apart(tiny_bundle: Path) -> None:
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        pipeline.runner = slow = Slow(pipeline.runner)
        stages = bench.time_stages(pipeline, "a star", 2, 3)
        assert pipeline.runner is slow
    assert stages.batch == 2
    assert list(stages.step) == ["slow", "fast"]
    assert stages.step["slow"] >= 100 > stages.step["fast"] > 0
    assert stages.decoder >= 50
    assert 0 < stages.text_encoder < 10
    assert slow.decoded == [2] * 4, "three runs, and one before them that does not count"


def test_step_is_engine_and_overhead(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by one second per look, a step is three: two looks of its own and two of the engine."""
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        ticks = iter(range(10_000))
        monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
        stages = bench.time_stages(pipeline, "a star", 1, 1)
    engine = stages.text_encoder  # measured alike: one second
    assert engine == 1e3
    assert stages.step == {"slow": 3e3, "fast": 3e3}
    assert stages.overhead_us == (3e3 - engine) * 1e3


def test_overhead_of_the_runtime_is_microseconds_not_milliseconds(tiny_bundle: Path) -> None:
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        pipeline.runner = Slow(pipeline.runner)
        stages = bench.time_stages(pipeline, "a star", 1, 5)
    assert 0 < stages.overhead_us < 2000, "whatever the engine takes"


def test_memory_counts_what_a_process_touches() -> None:
    before = bench.memory()
    kept = bytearray(b"x" * 50_000_000)
    after = bench.memory()
    assert after.private - before.private >= 45
    assert after.peak >= after.private
    assert after.mapped > 1
    del kept


def test_run_process_reports_seconds_and_peak_memory() -> None:
    seconds, peak = duel.run_process([sys.executable, "-c", "import time; time.sleep(0.3); b'x' * 400_000_000"], 1)
    assert 0.3 <= seconds < 30
    assert 400 <= peak < 4000


def test_run_process_raises_what_the_process_said_last() -> None:
    with pytest.raises(TargetError, match="ValueError: no such thing"):
        duel.run_process([sys.executable, "-c", "raise ValueError('no such thing')"], 1)


def test_against_runs_both_sides_alike(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, log = Bundle.open(tiny_bundle), tmp_path / "requests"
    monkeypatch.setattr(duel, "_PEER", ("-c", PEER.format(log=str(log))))
    monkeypatch.setattr(duel, "_BLOCK", 0.01)
    seen = []
    report = bench.measure(
        bundle,
        against=str(write_recipe(tmp_path / "recipe.yaml", bundle.manifest.name, tiny_model)),
        runs=2,
        batches=[1, 3],
        threads=1,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert report.peer is not None
    for package in ("diffusers", "torch"):
        assert f"{package} {metadata.version(package)}" in report.peer
    assert "1 threads" in report.peer
    cold, memory, *steady = report.duels
    assert [item.quantity for item in steady] == [
        f"steady state, batch {batch}{peer}" for batch in (1, 3) for peer in ("", ", fused peer")
    ]
    for item in report.duels:
        assert len(item.pairs) == 2
        assert item.glance_trt == median(pair[0] for pair in item.pairs)
        assert item.peer == median(pair[1] for pair in item.pairs)
    for item in (cold, memory):
        assert item.ratio == pytest.approx(median(b / a for a, b in item.pairs))
    for item in steady:
        assert item.unit == "images/s"
        assert item.peer == pytest.approx(100 if "fused" in item.quantity else 50), "one image in 10 or 20 ms"
        assert item.ratio == pytest.approx(median(a / b for a, b in item.pairs))
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert {len(request["seeds"]) for request in requests} == {1, 3}
    of_three = [request["prompt"] for request in requests if len(request["seeds"]) == 3]
    assert len(set(of_three)) == len(of_three), "a repeated prompt would spare one side its text encoder"
    assert (tmp_path / "requests.fused").read_text() == log.read_text(), "both peers do the same work"
    for switched, fused in (steady[:2], steady[2:]):
        assert [a for a, _ in switched.pairs] == [a for a, _ in fused.pairs], "glance-trt is measured once"
    for stage in {stage for stage, _, _ in seen}:
        calls = [(done, total) for name, done, total in seen if name == stage]
        assert calls[0][0] == 0
        assert calls[-1][0] == calls[-1][1]


def test_against_a_peer_that_dies_shows_its_last_words(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys\nif len(sys.argv) == 2: raise MemoryError('the model is too large')"
    monkeypatch.setattr(duel, "_PEER", ("-c", code))
    bundle = Bundle.open(tiny_bundle)
    recipe = write_recipe(tmp_path / "recipe.yaml", bundle.manifest.name, tiny_model)
    with pytest.raises(TargetError, match="MemoryError: the model is too large"):
        bench.measure(bundle, against=str(recipe), runs=1, batches=[1], threads=1)


def test_against_more_than_memory_holds_is_refused_before_anything_runs(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duel, "run_process", None)
    monkeypatch.setattr("glance_trt.preflight.free_memory", lambda: 1)
    bundle = Bundle.open(tiny_bundle)
    recipe = write_recipe(tmp_path / "recipe.yaml", bundle.manifest.name, tiny_model)
    with pytest.raises(TargetError, match=r"^timing diffusers takes at least 0\.0 GB .* or time the bundle without"):
        bench.measure(bundle, against=str(recipe), runs=1, batches=[1], threads=1)


def test_against_the_recipe_of_another_bundle_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "another")
    with pytest.raises(InputError, match=r"is the recipe of another, .*; give the recipe that it was built from"):
        bench.measure(Bundle.open(tiny_bundle), against=str(recipe))


def test_against_without_diffusers_says_what_to_install(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(TargetError, match=r"--against needs peft, .*; pip install glance-trt\[distill\]"):
        bench.measure(Bundle.open(tiny_bundle), against=str(write_recipe(tmp_path / "recipe.yaml", "tiny")))


def test_command_prints_stable_json(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(
        commands, ["bench", str(tiny_bundle), "--runs", "1", "--batch", "2", "--threads", "1", "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    manifest = Bundle.open(tiny_bundle).manifest
    assert list(report) == [field.name for field in dataclasses.fields(bench.Report)]
    assert set(report) == {
        "bundle", "bundle_sha256", "target", "versions", "threads", "runs", "stages", "memory", "peer", "duels",
    }  # fmt: skip
    assert (report["bundle"], report["threads"], report["runs"]) == (manifest.name, 1, 1)
    assert report["versions"]["onnxruntime"] == metadata.version("onnxruntime")
    assert (report["peer"], report["duels"]) == (None, [])
    (stages,) = report["stages"]
    assert set(stages) == {"batch", "text_encoder", "step", "decoder", "overhead_us"}
    assert set(report["memory"]) == {"peak", "private", "mapped"}


def test_command_prints_a_table(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(commands, ["bench", str(tiny_bundle), "--runs", "1", "--threads", "1"])
    assert result.exit_code == 0, result.output
    for expected in ("batch 1", "batch 4", "step, slow", "step, fast", "decoder", "outside the engine", "1 threads"):
        assert expected in result.stdout


def test_reference_process_makes_one_image_or_answers_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    import numpy as np
    from PIL import Image

    from glance_trt.export import reference

    made: list[bool] = []

    class Stub:
        def __init__(self, plan: Any, folder: Path, *, fused: bool) -> None:
            assert (plan.name, folder) == ("tiny", tmp_path)
            made.append(fused)

        def generate(self, prompt: str, seeds: list[int]) -> NDArray[np.uint8]:
            assert prompt == "a star"
            time.sleep(0.01 * len(seeds))
            return np.stack([np.full((4, 6, 3), seed, np.uint8) for seed in seeds])

    monkeypatch.setattr(reference, "DiffusersReference", Stub)
    recipe = str(write_recipe(tmp_path / "recipe.yaml", "tiny"))
    reference._main(recipe, "a star", "7", str(tmp_path / "out.png"))
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (6, 4)
        assert image.getpixel((0, 0)) == (7, 7, 7)
    for options in ([], ["--fused"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "a star", "seeds": [1, 2, 3]}\n' * 2))
        reference._main(recipe, *options)
        answers = [float(line) for line in capsys.readouterr().out.split()]
        assert len(answers) == 2
        assert min(answers) >= 0.03
    assert made == [False, False, True]
