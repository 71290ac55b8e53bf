"""What cannot be built is an error, nothing is half-written, and what was there stays."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from glance_trt.bundle import Bundle
from glance_trt.errors import LoraError, ModelError, OutputError, ParityError, RecipeError, TargetError

from ..models.recipes import RECIPE
from .conftest import Home, contents


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
    before = contents(built.output)
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
    assert contents(built.output) == before
    built.build(overwrite=True)
    Bundle.open(built.output).verify()


def test_a_folder_that_is_no_bundle_is_never_touched(home: Home) -> None:
    home.output.mkdir(parents=True)
    (home.output / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"tiny\.bundle: exists and is no bundle; give another -o"):
            home.build(overwrite=overwrite)
    assert contents(home.output) == {"thesis.txt": b"years of work"}
    assert os.listdir(home.output.parent) == ["tiny.bundle"]


def test_a_bundle_with_files_of_the_users_is_never_touched(built: Home) -> None:
    (built.output / "thesis.txt").write_text("years of work")
    before = contents(built.output)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"tiny\.bundle: holds files that are not the bundle's \(thesis\.txt\)"):
            built.build(overwrite=overwrite)
    assert contents(built.output) == before


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
    home.write(engines=["half.yaml"])  # relative to the recipe, as all that it names
    with pytest.raises(TargetError, match=r"target half: ONNX Runtime engines compute in float32"):
        home.build()
    with pytest.raises(RecipeError, match=r"no: no such file, and no shipped target of that name \(cpu, .*rtx"):
        home.build(engines=["no"])
    half.write_text("name: cpu\nbackend: onnxruntime\n")
    with pytest.raises(RecipeError, match=r"half\.yaml: a second target of the name 'cpu'"):
        home.build(engines=["cpu", "cpu", str(half)])
    assert not home.output.parent.exists()


def test_a_target_that_cannot_be_built_is_named_once(home: Home) -> None:
    hopper = home.folder / "hopper.yaml"
    hopper.write_text('name: hopper\nbackend: tensorrt-rtx\ndtype: float16\ncompute_capabilities: ["9.0"]\n')
    reason = r"compute_capabilities: TensorRT-RTX [\d.]+ cannot compile for 9\.0; it can for [\d., ]+"
    with pytest.raises(TargetError, match=rf"^target hopper: {reason}\. Buildable here: .*rtx"):
        home.build(engines=[str(hopper)])


def test_what_the_recipe_names_must_be_there(home: Home, tiny_model: Path) -> None:
    (home.folder / "slow.safetensors").unlink()
    with pytest.raises(LoraError, match=r"slow\.safetensors: no such LoRA file"):
        home.build()
    home.write(model="acme/large")  # nor is a model downloaded for it
    with pytest.raises(LoraError, match=r"slow\.safetensors: no such LoRA file"):
        home.build()
    home.write(phases=RECIPE["phases"][1:2])
    (home.folder / "model").unlink()
    shutil.copytree(tiny_model, home.folder / "model")
    unet = home.folder / "model" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.bin: weights in a pickle, which can run code"):
        home.build()
    shutil.copy(tiny_model / "vae" / "diffusion_pytorch_model.safetensors", unet)
    with pytest.raises(ModelError, match=r"unet: its weights lack .* and \d+ more"):
        home.build()
    assert not home.output.exists()


def test_what_disk_or_memory_cannot_hold_is_refused_before_the_work_unless_told_otherwise(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(home.folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OutputError, match=r"tiny\.bundle: building it takes at least 0\.0 GB of disk, and 0\.0 GB"):
            home.build()
    with monkeypatch.context() as patch:
        patch.setattr("glance_trt.preflight.free_memory", lambda: 300_000_000)
        with pytest.raises(TargetError, match=r"exporting the graphs takes at least 0\.9 GB of memory, and 0\.3"):
            home.build()
        assert os.listdir(home.output.parent) == []
        home.build(check_resources=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    home.write(guidance=RECIPE["guidance"] | {"scale": 5.0})
    home.build(overwrite=True)  # what is there already needs no space
