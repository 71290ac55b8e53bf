"""Building again: no work is done twice, and what an interruption left is gone on with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from glance_trt.bundle import Bundle
from glance_trt.errors import OutputError, RecipeError

from ..models.recipes import RECIPE
from .conftest import BUILT, Home, contents


def test_building_again_does_nothing(built: Home) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.output.iterdir()}
    assert built.stages() == ["check"]
    assert built.build().unchanged
    assert {path: path.stat().st_mtime_ns for path in built.output.iterdir()} == before
    assert os.listdir(built.output.parent) == ["tiny.bundle"]


def test_the_places_of_files_and_the_training_do_not_matter(built: Home) -> None:
    (built.folder / "elsewhere").mkdir()
    (built.folder / "slow.safetensors").rename(built.folder / "elsewhere" / "slow.safetensors")
    phases = [RECIPE["phases"][0] | {"lora": {"file": "elsewhere/slow.safetensors"}}, *RECIPE["phases"][1:]]
    built.write(phases=phases, distill={"prompt": "a star"})
    assert built.build().unchanged


def test_an_unchanged_bundle_is_found_where_nothing_can_be_written(
    built: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("glance_trt.build.locked", refuse)
    assert built.build().unchanged


def test_another_lora_needs_overwrite_and_redoes_only_what_depends_on_it(built: Home, loras: dict[str, Path]) -> None:
    shutil.copy(loras["other"], built.folder / "fast.safetensors")
    before = contents(built.output)
    with pytest.raises(
        OutputError, match=r"tiny\.bundle: exists and is not what the recipe makes now; give --overwrite"
    ):
        built.build()
    assert contents(built.output) == before
    stages = built.stages(overwrite=True)
    assert [stage for stage in stages if stage.startswith(("trace", "write"))] == ["write denoiser.fast"]
    assert not [stage for stage in stages if "decoder" in stage or "text_encoder" in stage]
    after = contents(built.output)
    changed = {name for name in before if after[name] != before[name]}
    assert {"denoiser.fast.safetensors", "bundle.json"} <= changed
    assert all(name.startswith(("denoiser.fast", "cpu.denoiser", "bundle.json")) for name in changed)
    assert built.build().unchanged


def test_a_change_of_guidance_scale_or_steps_redoes_nothing_but_the_manifest(built: Home) -> None:
    phases = [*RECIPE["phases"][:2], RECIPE["phases"][2] | {"steps": [7, 9]}]
    built.write(phases=phases, guidance=RECIPE["guidance"] | {"scale": 5.0})
    before = contents(built.output)
    assert built.stages(overwrite=True) == ["parity", "hash"]
    after = contents(built.output)
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
    assert built.stages(overwrite=True) == ["parity", "hash"]  # the same tokenizer, written differently
    assert built.build().unchanged
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
    assert {"write", "trace", "optimise", "share", "parity", "hash"} <= kinds
    writes = [stage for build in started for stage in build if stage.startswith("write")]
    assert sorted(writes) == sorted(2 * [stage for stage in interrupted if stage.startswith("write")])
    assert started[-1] == ["parity", "hash"]  # all else was there
    assert contents(home.output).keys() == contents(first.output).keys()
    Bundle.open(home.output).verify()
    assert sorted(os.listdir(home.output.parent)) == BUILT


def test_another_lora_scale_rewrites_its_phase_alone(built: Home) -> None:
    stages = built.stages(lora_scales={"fast": 0.5}, overwrite=True)
    assert [stage for stage in stages if stage.startswith(("trace", "write"))] == ["write denoiser.fast"]
    scales = {lora.phase: lora.scale for lora in Bundle.open(built.output).manifest.provenance.loras}
    assert scales == {"slow": 3.0, "fast": 0.5}
    assert built.build(lora_scales={"fast": 0.5}).unchanged
    built.build(lora_scales={None: 0.25, "fast": 0.5}, overwrite=True)
    scales = {lora.phase: lora.scale for lora in Bundle.open(built.output).manifest.provenance.loras}
    assert scales == {"slow": 0.25, "fast": 0.5}


def test_a_lora_scale_for_a_phase_without_a_lora_is_refused(built: Home) -> None:
    with pytest.raises(RecipeError, match=r"--lora-scale: the recipe has no phase 'middle' with a LoRA .*: slow, fast"):
        built.build(lora_scales={"middle": 1.0})
