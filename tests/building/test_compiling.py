"""A bundle's graphs are compiled for more targets where they are to run, without the model and without PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glance_trt import records, trust
from glance_trt.bundle import Bundle
from glance_trt.compiling import compile_bundle
from glance_trt.engines import backends
from glance_trt.errors import BundleError, RecipeError, TargetError
from glance_trt.runtime.pipeline import Pipeline

from .conftest import Home, contents
from .test_contents import write_plans


@pytest.fixture(autouse=True)
def _own_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """A target whose plans `write_plans` writes: ``plans(name, dtype="float32")`` gives its file."""
    monkeypatch.setattr("glance_trt.engines.backends.unavailable", lambda target: None)
    monkeypatch.setattr("glance_trt.engines.backends.requires", lambda target: {"tensorrt": "11"})
    monkeypatch.setattr("glance_trt.engines.backends.build", write_plans)

    def write(name: str, dtype: str = "float32") -> str:
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"name: {name}\nbackend: tensorrt\ndtype: {dtype}\n")
        return str(file)

    return write


def test_a_target_is_added_and_the_rest_stays(built: Home, plans: Callable[..., str]) -> None:
    before = contents(built.output)
    done = compile_bundle(built.output, [plans("gpu")])
    after = contents(built.output)
    graphs = done.bundle.manifest.graphs
    assert after.keys() - before.keys() == {f"gpu.{name}.plan" for name in graphs}
    assert all(after[name] == content for name, content in before.items() if name != "bundle.json")
    assert list(done.bundle.manifest.engines) == ["cpu", "gpu"]
    assert done.precision == {"gpu": {name: {"CONVOLUTION": {"float32": 1}} for name in graphs}}
    done.bundle.verify()
    with Pipeline.open(built.output) as pipeline:
        assert pipeline.generate("a red circle")


def test_cpu_engines_made_anew_make_the_same_images(built: Home) -> None:
    with Pipeline.open(built.output) as pipeline:
        expected = np.asarray(pipeline.generate("a red circle", seed=3)[0])
    manifest = Bundle.open(built.output).manifest
    compile_bundle(built.output, ["cpu"])
    assert Bundle.open(built.output).manifest.graphs == manifest.graphs
    with Pipeline.open(built.output) as pipeline:
        assert np.array_equal(np.asarray(pipeline.generate("a red circle", seed=3)[0]), expected)


def test_the_portable_graphs_serve_onnx_runtime_on_a_gpu(built: Home, tmp_path: Path) -> None:
    (tmp_path / "ort.yaml").write_text("name: ort\nbackend: onnxruntime-gpu\ndtype: float32\n")
    before = contents(built.output)
    engines = compile_bundle(built.output, [str(tmp_path / "ort.yaml")]).bundle.manifest.engines["ort"]
    assert contents(built.output).keys() == before.keys(), "nothing is compiled"
    assert engines.requires == {"provider": "CUDAExecutionProvider"}
    for name, graph in Bundle.open(built.output).manifest.graphs.items():
        assert (engines.graphs[name].file, engines.graphs[name].weights) == (graph.files["float32"], graph.weights)


def test_a_plan_that_came_with_the_bundle_is_not_taken_for_one_of_ours(
    built: Home, plans: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = plans("gpu")
    first = compile_bundle(built.output, [target]).bundle
    hashes = {name: entry.sha256 for name, entry in first.manifest.files.items() if name.endswith(".plan")}
    assert set(hashes.values()) == records.load("trusted.json").keys()

    # As another user gets it: with keys that say that the plans are what would be compiled.
    shutil.rmtree(records.folder())
    plan = built.output / "gpu.decoder.plan"
    with pytest.raises(TargetError, match="native code"):
        trust.read(plan, hashes[plan.name])
    compile_bundle(built.output, [target])
    assert trust.read(plan, hashes[plan.name])

    shutil.rmtree(records.folder())
    monkeypatch.setattr("glance_trt.engines.backends.build", refuse)
    with pytest.raises(AssertionError, match="compiled"):
        compile_bundle(built.output, [target])
    assert contents(built.output)[plan.name], "as before"


def test_a_plan_from_elsewhere_for_another_target_stays_and_stays_foreign(
    built: Home, plans: Callable[..., str]
) -> None:
    compile_bundle(built.output, [plans("theirs")])
    shutil.rmtree(records.folder())
    before = contents(built.output)
    bundle = compile_bundle(built.output, [plans("ours")]).bundle
    assert contents(built.output)["theirs.decoder.plan"] == before["theirs.decoder.plan"]
    assert "theirs" in bundle.manifest.engines
    known = {name: trust.known(entry.sha256) for name, entry in bundle.manifest.files.items() if ".plan" in name}
    assert known["ours.decoder.plan"]
    assert not known["theirs.denoiser.slow.plan"]


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("compiled")


def test_a_dtype_that_no_graph_has_is_refused(built: Home, plans: Callable[..., str]) -> None:
    before = contents(built.output)
    with pytest.raises(
        TargetError,
        match=r"tiny\.bundle: its graphs are in float32, and target gpu computes in float16; build the bundle",
    ):
        compile_bundle(built.output, [plans("gpu", "float16")])
    assert contents(built.output) == before


def test_a_damaged_bundle_is_not_compiled(built: Home, plans: Callable[..., str]) -> None:
    file = built.output / "denoiser.base.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BundleError, match="changed while it was compiled; check it with glance-trt verify"):
        compile_bundle(built.output, [plans("gpu")])


def test_what_cannot_be_built_here_is_refused_beforehand(built: Home, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no shipped target of that name"):
        compile_bundle(built.output, ["nothing"])
    if backends.unavailable(backends.Target("x", "tensorrt")) is None:
        pytest.skip("this machine has TensorRT and a GPU")
    with pytest.raises(TargetError, match=r"target tensorrt: .*Buildable here: .*cpu"):
        compile_bundle(built.output, ["tensorrt"])
    with pytest.raises(BundleError, match="no such folder"):
        compile_bundle(tmp_path / "absent", ["cpu"])


def test_neither_pytorch_nor_the_model_is_needed(built: Home) -> None:
    (built.folder / "model").unlink()
    code = (
        "import json, sys; from pathlib import Path; from glance_trt.compiling import compile_bundle\n"
        f"compile_bundle(Path({str(built.output)!r}), ['cpu'])\n"
        "print(json.dumps(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
