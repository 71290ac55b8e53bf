from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import torch
from onnx import TensorProto, helper, parser
from torch.nn import functional as F

from glance_trt.bundle import Engine
from glance_trt.engines.onnxruntime import build
from glance_trt.errors import ModelError, OutputError, TargetError
from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner, requirements

# A denoiser in small: convolutions, attention over the pixels, and a product whose width is no multiple of a vector's.
STEP = """<ir_version: 10, opset_import: ["" : 20]>
    step (float[batch,4,"8*h","8*w"] latents, float[] timestep) => (float[batch,4,"8*h","8*w"] denoised)
    <int64[3] flat = {0, 32, -1}, int64[4] heads = {0, 0, 2, 16}, int64[3] merged = {0, 0, 32},
     float half = {0.5}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4},
     int64[1] one = {1}, int64[1] c = {32}> {
        hot = Conv<pads = [1, 1, 1, 1]>(latents, conv_in)
        warm = Add(hot, timestep)
        cold = Sigmoid(warm)
        features = Mul(warm, cold)
        rows = Reshape(features, flat)
        tokens = Transpose<perm = [0, 2, 1]>(rows)
        q = MatMul(tokens, to_q)
        k = MatMul(tokens, to_k)
        v = MatMul(tokens, to_v)
        q4 = Reshape(q, heads)
        k4 = Reshape(k, heads)
        v4 = Reshape(v, heads)
        qh = Transpose<perm = [0, 2, 1, 3]>(q4)
        kh = Transpose<perm = [0, 2, 1, 3]>(k4)
        vh = Transpose<perm = [0, 2, 1, 3]>(v4)
        kt = Transpose<perm = [0, 1, 3, 2]>(kh)
        qs = Mul(qh, half)
        ks = Mul(kt, half)
        scores = MatMul(qs, ks)
        weights = Softmax<axis = -1>(scores)
        mixed = MatMul(weights, vh)
        back = Transpose<perm = [0, 2, 1, 3]>(mixed)
        joined = Reshape(back, merged)
        up = MatMul(joined, net_up)
        gelu = Gelu(up)
        down = MatMul(gelu, net_down)
        columns = Transpose<perm = [0, 2, 1]>(down)
        all = Shape(latents)
        size = Slice(all, two, four, zero)
        first = Slice(all, zero, one, zero)
        image = Concat<axis = 0>(first, c, size)
        map = Reshape(columns, image)
        denoised = Conv<pads = [1, 1, 1, 1]>(map, conv_out)
    }"""
SHAPES = {
    "conv_in": (32, 4, 3, 3),
    "to_q": (32, 32),
    "to_k": (32, 32),
    "to_v": (32, 32),
    "net_up": (32, 300),
    "net_down": (300, 32),
    "conv_out": (4, 32, 3, 3),
}
PHASES = {"denoiser.slow": ("to_q", "net_up"), "denoiser.fast": ("to_q", "net_up")}
"""By graph: the weights that its phase changes."""
GROUPS = dict.fromkeys(PHASES, "denoiser")
FAN_IN = {name: np.prod(shape[1:] if len(shape) == 4 else shape[:1]) for name, shape in SHAPES.items()}

Arrays = Mapping[str, np.ndarray]


def write_graph(path: Path, text: str, weights: Mapping[str, Arrays]) -> None:
    """Save a portable graph: float16 weights in safetensors files, given by file, with a Cast behind each."""
    model = parser.parse_model(text)
    model.metadata_props.add(key="source", value=str(path))
    casts = []
    for file, arrays in weights.items():
        if not (stored := path.parent / file).exists():
            safetensors.numpy.save_file(dict(arrays), stored)
        data = stored.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        for name, array in arrays.items():
            start, end = header[name]["data_offsets"]
            tensor = TensorProto(name=f"{name}.stored", data_type=TensorProto.FLOAT16, dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": file, "offset": 8 + length + start, "length": end - start}.items():
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT, doc_string=str(path)))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, np.ndarray]]:
    """By graph, all its weights."""
    draw = np.random.default_rng(0)

    def new(name: str) -> np.ndarray:
        return (draw.standard_normal(SHAPES[name]) / FAN_IN[name] ** 0.5).astype(np.float16)

    base = {name: new(name) for name in SHAPES}
    return {graph: {**base, **{name: new(name) for name in changed}} for graph, changed in PHASES.items()}


@pytest.fixture(scope="module")
def sources(weights: Mapping[str, Arrays], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    for graph, changed in PHASES.items():
        own = {name: weights[graph][name] for name in changed}
        shared = {name: array for name, array in weights[graph].items() if name not in changed}
        files = {"denoiser.base.safetensors": shared, f"{graph}.safetensors": own}
        write_graph(folder / f"{graph}.float32.onnx", STEP, files)
    return {graph: folder / f"{graph}.float32.onnx" for graph in PHASES}


@pytest.fixture(scope="module")
def built(sources: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Engine]]:
    directory = tmp_path_factory.mktemp("engines")
    return directory, build(sources, directory=directory, prefix="cpu", groups=GROUPS)


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    latents = np.random.default_rng(1).standard_normal((2, 4, 24, 16), dtype=np.float32)
    return {"latents": latents, "timestep": np.array(0.25, np.float32)}


def in_pytorch(weights: Arrays, latents: np.ndarray, timestep: np.ndarray) -> np.ndarray:
    w = {name: torch.from_numpy(array).float() for name, array in weights.items()}
    x = F.silu(F.conv2d(torch.from_numpy(latents), w["conv_in"], padding=1) + float(timestep))
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = ((tokens @ w[name]).unflatten(2, (2, 16)).transpose(1, 2) for name in ("to_q", "to_k", "to_v"))
    mixed = F.scaled_dot_product_attention(q, k, v, scale=0.25).transpose(1, 2).flatten(2)
    tokens = F.gelu(mixed @ w["net_up"]) @ w["net_down"]
    return F.conv2d(tokens.transpose(1, 2).reshape(x.shape), w["conv_out"], padding=1).numpy()


def regions(path: Path) -> list[tuple[str, int, int]]:
    """(file, offset, length) of everything that a graph has stored outside."""
    found = []
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found.append((entries["location"], int(entries["offset"]), int(entries["length"])))
        for key, value in entries.items():
            if key.startswith("prepacked_"):
                offset, length, _ = value.rpartition("|")[2].split(";")
                found.append((entries["location"], int(offset), int(length)))
    return found


# --- what an engine computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", PHASES)
def test_engine_computes_what_pytorch_computes(
    graph: str, built: tuple[Path, dict[str, Engine]], weights: Mapping[str, Arrays], inputs: Arrays
) -> None:
    directory, engines = built
    runner = OnnxRuntimeRunner(directory, {name: engine.file for name, engine in engines.items()})
    outputs = runner.run(graph, inputs)
    expected = in_pytorch(weights[graph], **inputs)
    assert list(outputs) == ["denoised"]
    assert np.abs(expected).max() > 0.25
    np.testing.assert_allclose(outputs["denoised"], expected, atol=1e-5)


@pytest.mark.parametrize("graph", PHASES)
def test_engine_computes_what_a_plain_session_computes(
    graph: str, built: tuple[Path, dict[str, Engine]], sources: Mapping[str, Path], inputs: Arrays
) -> None:
    directory, engines = built
    plain = onnxruntime.InferenceSession(sources[graph], providers=["CPUExecutionProvider"])
    outputs = OnnxRuntimeRunner(directory, {graph: engines[graph].file}).run(graph, inputs)
    np.testing.assert_allclose(outputs["denoised"], plain.run(None, dict(inputs))[0], atol=1e-5)


# --- what it consists of --------------------------------------------------------------------------------------------


def test_weights_that_several_phases_have_are_stored_once(built: tuple[Path, dict[str, Engine]]) -> None:
    directory, engines = built
    contents: dict[str, list[str]] = {}
    for file, offset, length in {region for engine in engines.values() for region in regions(directory / engine.file)}:
        data = (directory / file).read_bytes()[offset : offset + length]
        assert len(data) == length
        contents.setdefault(hashlib.sha256(data).hexdigest(), []).append(file)
    # ONNX Runtime stores convolutions' weights reordered, and the others as they are and packed.
    assert sum(files == ["cpu.denoiser.base.bin"] for files in contents.values()) >= 6
    assert all(len(set(files)) == 1 for files in contents.values())


def test_engines_name_their_files(built: tuple[Path, dict[str, Engine]]) -> None:
    directory, engines = built
    assert engines == {
        graph: Engine(f"cpu.{graph}.onnx", ("cpu.denoiser.base.bin", f"cpu.{graph}.bin")) for graph in PHASES
    }
    for engine in engines.values():
        assert {file for file, _, _ in regions(directory / engine.file)} == set(engine.weights)
    listed = {file for engine in engines.values() for file in (engine.file, *engine.weights)}
    assert {path.name for path in directory.iterdir()} == listed


def test_every_weight_lies_on_pages_of_its_own(built: tuple[Path, dict[str, Engine]]) -> None:
    directory, engines = built
    found = [region for engine in engines.values() for region in regions(directory / engine.file)]
    assert found
    assert {offset % 4096 for _, offset, _ in found} == {0}


def test_engine_says_what_it_needs_and_nothing_of_the_machine_that_built_it(
    built: tuple[Path, dict[str, Engine]], sources: Mapping[str, Path]
) -> None:
    directory, engines = built
    for graph, engine in engines.items():
        data = (directory / engine.file).read_bytes()
        model = onnx.load_from_string(data)
        assert {item.key: item.value for item in model.metadata_props} == requirements()
        for folder in (directory, sources[graph].parent):
            assert str(folder).encode() not in data


def test_same_graphs_give_the_same_files(
    built: tuple[Path, dict[str, Engine]], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    build(sources, directory=tmp_path, prefix="cpu", groups=GROUPS)
    directory, _ = built
    for file in directory.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_graphs_without_a_group_share_no_file(sources: Mapping[str, Path], tmp_path: Path) -> None:
    engines = build(sources, directory=tmp_path, prefix="cpu")
    assert {graph: engine.weights for graph, engine in engines.items()} == {
        graph: (f"cpu.{graph}.bin",) for graph in PHASES
    }


def test_graph_with_nothing_but_small_weights_has_no_weights_file(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> decoder (float[n] x) => (float[n] y) { y = Neg(x) }'
    onnx.save(parser.parse_model(text), tmp_path / "decoder.onnx")
    out = tmp_path / "out"
    out.mkdir()
    engines = build({"decoder": tmp_path / "decoder.onnx"}, directory=out, prefix="cpu")
    assert engines == {"decoder": Engine("cpu.decoder.onnx")}
    assert [path.name for path in out.iterdir()] == ["cpu.decoder.onnx"]
    outputs = OnnxRuntimeRunner(out, {"decoder": "cpu.decoder.onnx"}).run("decoder", {"x": np.ones(3, np.float32)})
    np.testing.assert_array_equal(outputs["y"], [-1, -1, -1])


# --- its memory -----------------------------------------------------------------------------------------------------

MEASURE = """
import json, re, sys
from pathlib import Path
import numpy as np
from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner

def kilobytes():
    text = Path("/proc/self/smaps").read_text()
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)[1:]
    result = {"private": 0, "base": 0}
    for block in blocks:
        field = {key: int(value) for key, value in re.findall(r"(?m)^(\\w+): +(\\d+) kB", block)}
        result["private"] += field["Private_Dirty"]
        if block.splitlines()[0].endswith(".base.bin"):
            result["base"] += field["Rss"]
    return result

directory, graphs = Path(sys.argv[1]), sys.argv[2:]
x = np.ones((1, 512), np.float32)
runner = OnnxRuntimeRunner(directory, {graph: f"cpu.{graph}.onnx" for graph in graphs}, threads=1)
before = kilobytes()
for graph in graphs:
    runner.run(graph, {"x": x})
after = kilobytes()
print(json.dumps({"private": after["private"] - before["private"], "base": after["base"]}))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="measures with Linux's /proc/self/smaps")
def test_sessions_map_the_shared_weights_instead_of_copying_them(tmp_path: Path) -> None:
    products = "\n".join(f"x{i + 1} = MatMul(x{i}, w{i})" for i in range(64))
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        step (float[batch,512] x) => (float[batch,512] y) {{
            x0 = Identity(x)
            {products}
            y = Neg(x64)
        }}"""
    draw = np.random.default_rng(0)
    shared = {f"w{i}": draw.standard_normal((512, 512)).astype(np.float16) for i in range(64)}
    graphs = {}
    for graph in PHASES:
        graphs[graph] = tmp_path / f"{graph}.onnx"
        write_graph(graphs[graph], text, {"base.safetensors": shared})
    out = tmp_path / "out"
    out.mkdir()
    engines = build(graphs, directory=out, prefix="cpu", groups=GROUPS)
    assert {engine.weights for engine in engines.values()} == {("cpu.denoiser.base.bin",)}
    result = subprocess.run([sys.executable, "-c", MEASURE, out, *graphs], capture_output=True, text=True, check=True)
    kilobytes = json.loads(result.stdout)
    weights = sum(array.size * 4 for array in shared.values()) // 1024
    assert weights == 65536
    assert kilobytes["base"] >= weights  # mapped and in use, by each session
    assert kilobytes["private"] < weights / 4


# --- refusals -------------------------------------------------------------------------------------------------------


def test_weights_that_are_missing_are_named(sources: Mapping[str, Path], tmp_path: Path) -> None:
    lonely = tmp_path / "lonely.onnx"
    lonely.write_bytes(sources["denoiser.slow"].read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(
        TargetError, match=r"denoiser\.slow: ONNX Runtime \S+ cannot optimise lonely\.onnx: .*safetensors"
    ):
        build({"denoiser.slow": lonely}, directory=out, prefix="cpu")
    assert list(out.iterdir()) == []


def test_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_text("not a graph")
    with pytest.raises(ModelError, match=r"^decoder: \S+graph\.onnx cannot be read as an ONNX graph: "):
        build({"decoder": tmp_path / "graph.onnx"}, directory=tmp_path, prefix="cpu")
    with pytest.raises(ModelError, match=r"^decoder: \S+absent\.onnx cannot be read .*No such file"):
        build({"decoder": tmp_path / "absent.onnx"}, directory=tmp_path, prefix="cpu")


def test_directory_that_cannot_be_written_is_named(sources: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent: the engines cannot be written: No such file or directory"):
        build(sources, directory=tmp_path / "absent", prefix="cpu")


def test_build_reports_every_stage_from_nothing_to_all(sources: Mapping[str, Path], tmp_path: Path) -> None:
    calls: dict[str, list[tuple[float, float]]] = {}

    def progress(stage: str, done: float, total: float) -> None:
        calls.setdefault(stage, []).append((done, total))

    build(sources, directory=tmp_path, prefix="cpu", groups=GROUPS, progress=progress)
    assert list(calls) == ["optimise cpu.denoiser.slow", "optimise cpu.denoiser.fast", "share cpu.denoiser"]
    for steps in calls.values():
        done = [step[0] for step in steps]
        assert done == sorted(done)
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]
