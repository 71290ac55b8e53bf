"""From a recipe to a bundle: the images are those of diffusers, no work is done twice, nothing is half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from glance_trt import recipe
from glance_trt.build import Report, build
from glance_trt.bundle import Bundle
from glance_trt.cli.inspect import describe
from glance_trt.distill.loras import with_metadata
from glance_trt.errors import InputError, LoraError, ModelError, OutputError, ParityError, RecipeError, TargetError
from glance_trt.export import parity
from glance_trt.export.lora import PROVENANCE
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.verify import psnr

from .models.recipes import RECIPE


class Home:
    """A folder with a recipe, the tiny model and two LoRAs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out" / "tiny.bundle"
        self.write()

    def write(self, **changes: Any) -> None:
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE | changes))

    def build(self, **options: Any) -> Report:
        return build(str(self.folder / "tiny.yaml"), self.output, **options)

    def stages(self, **options: Any) -> list[str]:
        """Build, and say which stages did something."""
        started: list[str] = []
        self.build(progress=lambda stage, done, total: started.append(stage) if done == 0 else None, **options)
        return started


@pytest.fixture(autouse=True)
def _trace_once(traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glance_trt.export.trace.trace", traced)


@pytest.fixture(scope="module")
def loras(write_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        "slow": write_lora(folder / "slow.safetensors", seed=1),
        "fast": write_lora(folder / "fast.safetensors", seed=2, targets=("to_q", "conv1")),
        "other": write_lora(folder / "other.safetensors", seed=3, targets=("to_q", "conv1")),
    }


@pytest.fixture
def home(tiny_model: Path, loras: dict[str, Path], tmp_path: Path) -> Home:
    (tmp_path / "model").symlink_to(tiny_model)
    for phase in ("slow", "fast"):
        shutil.copy(loras[phase], tmp_path)
    return Home(tmp_path)


@pytest.fixture(scope="module")
def first(tiny_model: Path, loras: dict[str, Path], traced: Any, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose bundle is built; not to be altered."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "model").symlink_to(tiny_model)
    for phase in ("slow", "fast"):
        shutil.copy(loras[phase], folder)
    home = Home(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glance_trt.export.trace.trace", traced)
        home.build()
    return home


@pytest.fixture
def built(home: Home, first: Home) -> Home:
    """A home of the test's own, whose bundle is built."""
    shutil.copytree(first.output, home.output)
    return home


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_makes_the_images_that_diffusers_makes(first: Home) -> None:
    from glance_trt.export.reference import DiffusersReference

    reference = DiffusersReference(*recipe.load(first.folder / "tiny.yaml"))
    with Pipeline.open(first.output) as pipe:
        images = [np.asarray(image) for image in pipe.generate("a red circle", seed=7, count=2)]
    expected = reference.generate("a red circle", [7, 8])
    for image, wanted in zip(images, expected, strict=True):
        assert wanted.std() > 10  # there is something to see
        assert psnr(image, wanted) >= 50
    assert psnr(images[0], images[1]) < 20


def test_the_report_has_the_parity_of_every_graph_and_notes(
    built: Home, loras: dict[str, Path], write_lora: Any
) -> None:
    write_lora(built.folder / "slow.safetensors", seed=1, with_metadata=False)
    report = built.build(overwrite=True)
    graphs = ["text_encoder", "denoiser.slow", "denoiser.middle", "denoiser.fast", "decoder"]
    assert [item.graph for item in report.parity] == graphs
    assert all(item.error <= item.tolerance for item in report.parity)
    (note,) = report.notes
    assert note.startswith(f"{built.folder / 'slow.safetensors'} gives no alpha; its scale is taken as 1.")


def test_a_lora_that_was_trained_for_other_steps_is_noted(built: Home) -> None:
    file = built.folder / "slow.safetensors"
    for timesteps, text in (
        ([999.0, 799.0], ""),
        ([999.0, 899.0], f"{file} was not trained at timesteps 799 of phase slow. "),
    ):
        file.write_bytes(with_metadata(file.read_bytes(), {PROVENANCE: json.dumps({"timesteps": timesteps})}))
        notes = " ".join(built.build(overwrite=True).notes)
        assert notes.startswith(text), notes
        assert bool(notes) == bool(text)


def test_the_bundle_says_what_it_was_made_of(first: Home) -> None:
    manifest = Bundle.open(first.output).manifest
    assert [(lora.phase, lora.file, lora.scale, lora.alpha) for lora in manifest.provenance.loras] == [
        ("slow", "slow.safetensors", 3.0, 6.0),
        ("fast", "fast.safetensors", 2.0, 6.0),
    ]
    assert manifest.guidance.negative_prompt == "blue"
    assert [step.phase for step in manifest.schedule(None).steps] == ["slow"] * 2 + ["middle"] + ["fast"] * 3
    assert manifest.graphs["denoiser.middle"].weights == ("denoiser.base.safetensors",)
    assert manifest.graphs["denoiser.fast"].weights == ("denoiser.base.safetensors", "denoiser.fast.safetensors")
    for graph in manifest.graphs.values():
        for file in graph.files.values():
            assert str(first.folder).encode() not in (first.output / file).read_bytes()


def test_building_again_does_nothing(built: Home) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.output.iterdir()}
    assert built.stages() == ["check"]
    assert built.build().unchanged
    assert {path: path.stat().st_mtime_ns for path in built.output.iterdir()} == before
    assert os.listdir(built.output.parent) == ["tiny.bundle"]


def test_another_lora_needs_overwrite_and_redoes_only_what_depends_on_it(built: Home, loras: dict[str, Path]) -> None:
    shutil.copy(loras["other"], built.folder / "fast.safetensors")
    before = _contents(built.output)
    with pytest.raises(
        OutputError, match=r"tiny\.bundle: exists and is not what the recipe makes now; give --overwrite"
    ):
        built.build()
    assert _contents(built.output) == before
    stages = built.stages(overwrite=True)
    assert [stage for stage in stages if stage.startswith(("trace", "write"))] == ["write denoiser.fast"]
    assert not [stage for stage in stages if "decoder" in stage or "text_encoder" in stage]
    after = _contents(built.output)
    changed = {name for name in before if after[name] != before[name]}
    assert {"denoiser.fast.safetensors", "bundle.json"} <= changed
    assert all(name.startswith(("denoiser.fast", "cpu.denoiser", "bundle.json")) for name in changed)
    assert built.build().unchanged


def test_a_change_of_guidance_scale_or_steps_redoes_nothing_but_the_manifest(built: Home) -> None:
    phases = [*RECIPE["phases"][:2], RECIPE["phases"][2] | {"steps": [7, 9]}]
    built.write(phases=phases, guidance=RECIPE["guidance"] | {"scale": 5.0})
    before = _contents(built.output)
    assert set(built.stages(overwrite=True)) <= {"check", "parity"}
    after = _contents(built.output)
    assert {name for name in before if after[name] != before[name]} == {"bundle.json"}
    assert Bundle.open(built.output).manifest.guidance.scale == 5.0


def test_another_scale_for_a_lora_is_noticed(built: Home) -> None:
    phases = [*RECIPE["phases"][:2], RECIPE["phases"][2] | {"lora": {"file": "fast.safetensors", "scale": 1.0}}]
    built.write(phases=phases)
    assert "write denoiser.fast" in built.stages(overwrite=True)


def test_another_tokenizer_is_noticed(built: Home, tiny_model: Path) -> None:
    (built.folder / "model").unlink()
    shutil.copytree(tiny_model, built.folder / "model")
    file = built.folder / "model" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"version": "1.0"', '"version":  "1.0"'))
    assert built.build().unchanged  # the same tokenizer, written differently
    config = built.folder / "model" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "a</w>"}))
    with pytest.raises(OutputError, match="is not what the recipe makes now"):
        built.build()


def test_a_damaged_bundle_is_not_called_up_to_date(built: Home) -> None:
    file = built.output / "decoder.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OutputError, match="is not what the recipe makes now; give --overwrite"):
        built.build()
    assert "write decoder" in built.stages(overwrite=True)
    assert file.read_bytes() == content
    Bundle.open(built.output).verify()


def test_an_interrupted_build_goes_on_where_it_stopped(home: Home, first: Home) -> None:
    """Ctrl-C in each stage in turn, always at its first report; each build gets one stage further."""
    interrupted: list[str] = []

    def interrupt(stage: str, done: float, total: float) -> None:
        if stage not in interrupted:
            interrupted.append(stage)
            raise KeyboardInterrupt

    started: list[list[str]] = []
    while True:
        started.append([])

        def watch(stage: str, done: float, total: float) -> None:
            if done == 0:
                started[-1].append(stage)
            interrupt(stage, done, total)

        try:
            home.build(progress=watch)
            break
        except KeyboardInterrupt:
            assert not home.output.exists()
    kinds = {stage.split()[0] for stage in interrupted}
    assert {"write", "trace", "optimise", "parity"} <= kinds
    writes = [stage for build in started for stage in build if stage.startswith("write")]
    assert sorted(writes) == sorted(2 * [stage for stage in interrupted if stage.startswith("write")])
    assert started[-1] == ["parity"]  # all else was there
    assert _contents(home.output).keys() == _contents(first.output).keys()
    Bundle.open(home.output).verify()
    assert os.listdir(home.output.parent) == ["tiny.bundle"]


def test_what_is_too_large_to_be_loaded_is_compared_in_small_and_by_samples(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glance_trt.export.large.oversized", lambda tensors: {"denoiser": "F16"})
    loaded: list[str] = []
    run = parity.Reference.run

    def watched(self: Any, graph: str, inputs: Any) -> Any:
        loaded.append(graph if self._model == home.folder / "model" else f"reduced {graph}")
        return run(self, graph, inputs)

    monkeypatch.setattr(parity.Reference, "run", watched)
    found = home.build()
    compared = [item.graph for item in found.parity]
    samples = ["denoiser.slow.safetensors", "denoiser.fast.safetensors"]
    assert compared == ["text_encoder", "decoder", "denoiser", *samples]
    assert set(loaded) == {"text_encoder", "decoder", "reduced denoiser"}


def test_a_failed_comparison_writes_no_bundle(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glance_trt.export.parity.TOLERANCES", {"float32": 0.0})
    with pytest.raises(ParityError, match="text_encoder: differs from PyTorch by"):
        home.build()
    assert not home.output.exists()


@pytest.mark.parametrize("where", ["weights", "record", "swap", "manifest"])
def test_a_full_disk_is_an_output_error_and_leaves_what_was_there(
    built: Home, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    shutil.copy(loras["other"], built.folder / "fast.safetensors")
    before = _contents(built.output)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    replace, write_text = os.replace, Path.write_text

    def full_replace(source: Any, target: Any) -> None:
        names = Path(source).name, Path(target).name
        if (where, *names) in (("record", "finished.json.draft", "finished.json"), ("swap", "bundle", "tiny.bundle")):
            raise full
        replace(source, target)

    def full_write(self: Path, *args: Any, **options: Any) -> int:
        if where == "manifest" and self.name == "bundle.json":
            raise full
        return write_text(self, *args, **options)

    def full_fuse(*args: Any) -> Any:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_replace)
        patch.setattr(Path, "write_text", full_write)
        if where == "weights":
            patch.setattr("glance_trt.export.weights._blocks", full_fuse)
        with pytest.raises(OutputError, match=r"tiny\.bundle: disk full \(\d+ MB free\)"):
            built.build(overwrite=True)
    assert _contents(built.output) == before
    built.build(overwrite=True)
    Bundle.open(built.output).verify()


def test_a_folder_that_is_no_bundle_is_never_touched(home: Home) -> None:
    home.output.mkdir(parents=True)
    (home.output / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"tiny\.bundle: exists and is no bundle; give another -o"):
            home.build(overwrite=overwrite)
    assert _contents(home.output) == {"thesis.txt": b"years of work"}
    assert os.listdir(home.output.parent) == ["tiny.bundle"]


def test_a_bundle_with_files_of_the_users_is_never_touched(built: Home) -> None:
    (built.output / "thesis.txt").write_text("years of work")
    before = _contents(built.output)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"tiny\.bundle: holds files that are not the bundle's \(thesis\.txt\)"):
            built.build(overwrite=overwrite)
    assert _contents(built.output) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which none can be made")
def test_an_output_that_cannot_be_made_is_an_output_error(home: Home) -> None:
    home.output = Path("/proc/x/tiny.bundle")
    with pytest.raises(OutputError, match=r"^/proc/x: folder cannot be made; give another -o$"):
        home.build()


def test_an_output_below_a_file_is_an_output_error(home: Home) -> None:
    (home.folder / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"out.*; give another -o"):
        home.build()


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"name": "slow", "steps": []}], r"phases\.slow: has no steps"),
        ([{"name": "slow", "steps": [1, 1]}], r"phases\.slow: step 1 is taken twice"),
        ([{"name": "slow", "steps": [1]}, {"name": "fast", "steps": [1]}], r"phases\.fast: step 1 is taken twice"),
        ([{"name": "slow", "steps": [11]}], r"phases\.slow: step 11 is outside the teacher's 1\.\.10"),
        ([{"name": "slow", "steps": [0]}], r"phases\.slow: step 0 is outside"),
        ([], "a recipe needs at least one phase"),
        ([{"name": "base", "steps": [1]}], r"phases\[0\]\.name: 'base' would name a file that the bundle has already"),
        ([{"name": "a", "steps": [1]}, {"name": "A", "steps": [2]}], r"phases\[1\]\.name: 'A' would name a file"),
    ],
)
def test_phases_that_make_no_schedule_are_refused(home: Home, phases: list[Any], message: str) -> None:
    home.write(phases=phases)
    with pytest.raises(RecipeError, match=rf"tiny\.yaml: (phases: )?{message}"):
        home.build()
    assert not home.output.parent.exists()


def test_a_target_that_cannot_be_built_says_which_can(home: Home) -> None:
    half = home.folder / "half.yaml"
    half.write_text("name: half\nbackend: onnxruntime\ndtype: float16\n")
    with pytest.raises(
        TargetError, match=r"target half: ONNX Runtime engines compute in float32.* Buildable here: .*cpu"
    ):
        home.build(engines=[str(half)])
    with pytest.raises(RecipeError, match=r"no: no such file, and no shipped target of that name \(cpu, rtx\)"):
        home.build(engines=["no"])
    half.write_text("name: cpu\nbackend: onnxruntime\n")
    with pytest.raises(RecipeError, match=r"half\.yaml: a second target of the name 'cpu'"):
        home.build(engines=["cpu", "cpu", str(half)])
    assert not home.output.parent.exists()


def test_what_the_recipe_names_must_be_there(home: Home, tiny_model: Path) -> None:
    (home.folder / "slow.safetensors").unlink()
    with pytest.raises(LoraError, match=r"slow\.safetensors: no such LoRA file"):
        home.build()
    home.write(phases=RECIPE["phases"][1:2])
    (home.folder / "model").unlink()
    shutil.copytree(tiny_model, home.folder / "model")
    unet = home.folder / "model" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"unet: only pickle \(\.bin\) weights"):
        home.build()
    shutil.copy(tiny_model / "vae" / "diffusion_pytorch_model.safetensors", unet)
    with pytest.raises(ModelError, match=r"unet: its weights lack .* and \d+ more"):
        home.build()
    assert not home.output.exists()


GUIDED: dict[str, Any] = {  # two evaluations in the slow phase, one in the others
    "phases": [
        {"name": "slow", "steps": [1, 3]},
        {"name": "middle", "steps": [5], "guide": "middle.guide"},
        {"name": "fast", "steps": [6, 8, 10], "lora": {"file": "fast.safetensors"}, "guide": "fast.guide"},
    ]
}


@pytest.fixture
def guided(home: Home, write_guide: Callable[..., Path]) -> Home:
    """A home with two guides beside its LoRAs."""
    write_guide(home.folder / "middle.guide", "tiny", seed=1)
    write_guide(home.folder / "fast.guide", "embedding", seed=2)
    home.write(**GUIDED)
    return home


def _image(pipe: Pipeline, scale: float | None = None, **options: Any) -> Any:
    return np.asarray(pipe.generate("a red circle", seed=7, guidance_scale=scale, **options)[0])


def test_guides_are_built_into_their_phases_and_leave_the_base_alone(
    guided: Home, tiny_model: Path, write_guide: Callable[..., Path]
) -> None:
    report = guided.build()
    graphs = ["text_encoder", "denoiser.slow", "denoiser.middle", "denoiser.fast", "decoder"]
    assert [item.graph for item in report.parity] == graphs
    assert all(item.error <= item.tolerance for item in report.parity)
    manifest = report.bundle.manifest
    modes = {name: graph.guidance for name, graph in manifest.graphs.items() if name.startswith("denoiser")}
    assert modes == {"denoiser.slow": "cfg", "denoiser.middle": "embedded", "denoiser.fast": "embedded"}
    assert [(item.phase, item.file, item.kind) for item in manifest.provenance.guides] == [
        ("middle", "middle.guide", "tiny"),
        ("fast", "fast.guide", "embedding"),
    ]
    lines = describe(manifest)
    assert "  middle       middle.guide, guide (tiny)" in lines
    assert "  fast         fast.guide, guide (embedding)" in lines
    assert "  guidance     cfg, embedded, scale 3 by default" in lines

    base = load_file(guided.output / "denoiser.base.safetensors")
    model = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert base.keys() == model.keys()
    assert all(np.array_equal(base[name], model[name]) for name in model)
    added = load_file(guided.output / "denoiser.middle.safetensors")
    assert added.keys() == {f"guide.{name}" for name in load_file(guided.folder / "middle.guide")}

    with Pipeline.open(report.bundle) as pipe:
        usual = _image(pipe)
        assert np.array_equal(_image(pipe, 3.0), usual)
        assert psnr(_image(pipe, 6.0), usual) < 40
        assert psnr(_image(pipe, negative_prompt="a star"), usual) < 60  # of the slow phase

    before = _contents(guided.output)
    assert guided.build().unchanged
    write_guide(guided.folder / "middle.guide", "tiny", seed=3)
    with pytest.raises(OutputError, match="is not what the recipe makes now; give --overwrite"):
        guided.build()
    stages = guided.stages(overwrite=True)
    assert [stage for stage in stages if stage.startswith(("trace", "write"))] == ["write denoiser.middle"]
    after = _contents(guided.output)
    changed = {name for name in before if after[name] != before[name]}
    assert {"denoiser.middle.safetensors", "bundle.json"} <= changed
    assert all(name.startswith(("denoiser.middle", "cpu.denoiser", "bundle.json")) for name in changed)


def test_a_bundle_takes_only_scales_that_all_its_guides_were_trained_for(
    guided: Home, write_guide: Callable[..., Path]
) -> None:
    write_guide(guided.folder / "middle.guide", "tiny", scales=(2.0, 9.0))
    write_guide(guided.folder / "fast.guide", "embedding", scales=(1.0, 4.0))
    bundle = guided.build().bundle
    assert bundle.manifest.guidance.range == (2.0, 4.0)
    assert "  guidance     cfg, embedded, scale 3 by default, from 2 to 4" in describe(bundle.manifest)
    with Pipeline.open(bundle) as pipeline:
        _image(pipeline, 4.0)
        with pytest.raises(
            InputError, match=r"^guidance scale: 4\.5 is outside 2 to 4, which the guide in this bundle"
        ):
            _image(pipeline, 4.5)
    guided.write(**GUIDED, guidance={"mode": "cfg", "scale": 5.0})
    with pytest.raises(
        RecipeError, match=r"tiny\.yaml: guidance\.scale: 5 is outside 1 to 4, which the guide of phase fast was"
    ):
        guided.build(overwrite=True)


def test_an_embedded_scale_gives_the_images_of_diffusers_own_embedding(guided: Home) -> None:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    phase = {"name": "all", "steps": list(range(1, 11)), "lora": {"file": "slow.safetensors"}, "guide": "fast.guide"}
    guided.write(phases=[phase], guidance={"mode": "embedded", "scale": 4.0})
    guided.build()
    reference = StableDiffusionPipeline.from_pretrained(guided.folder / "model", dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    state = reference.unet.state_dict()
    reference.unet = UNet2DConditionModel.from_config({**reference.unet.config, "time_cond_proj_dim": 256}).eval()
    embedding = torch.from_numpy(load_file(guided.folder / "fast.guide")["cond_proj.weight"])
    reference.unet.load_state_dict({**state, "time_embedding.cond_proj.weight": embedding})
    reference.load_lora_weights(guided.folder / "slow.safetensors")
    with Pipeline.open(guided.output) as pipe:
        for scale in (4.0, 7.5):
            (expected,) = reference(
                "a red circle",
                height=16,
                width=16,
                num_inference_steps=10,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(7),
                output_type="np",
            ).images
            assert expected.std() > 0.04  # there is something to see
            assert psnr(_image(pipe, scale), (expected * 255).round().astype(np.uint8)) >= 50
        assert np.array_equal(_image(pipe, 4.0), _image(pipe))
        assert psnr(_image(pipe, 4.0), _image(pipe, 7.5)) < 40
        with pytest.raises(InputError, match="negative prompt: this bundle takes none"):
            _image(pipe, negative_prompt="blue")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent another way on Windows")
def test_ctrl_c_ends_the_command_with_130_and_the_next_build_completes(home: Home) -> None:
    command = [sys.executable, "-c", "from glance_trt.cli.main import main; main()", "build", "tiny.yaml"]
    process = subprocess.Popen(
        [*command, "-o", str(home.output)],
        cwd=home.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets its background jobs ignore Ctrl-C, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    record = home.output.parent / ".tiny.bundle.building" / "finished.json"
    deadline = time.monotonic() + 300
    while not record.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # in the middle of the first export
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert os.listdir(home.output.parent) == [".tiny.bundle.building"]
    done = set(yaml.safe_load(record.read_text()))
    assert done
    home.build()
    Bundle.open(home.output).verify()
    assert done <= {entry.key for entry in Bundle.open(home.output).manifest.files.values()}
