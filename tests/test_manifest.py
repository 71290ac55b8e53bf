"""The manifest as data. What is done with bad ones is in ``hostile/``."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from glance_trt import limits, manifest
from glance_trt.errors import BundleError
from glance_trt.manifest import Manifest

from .hostile import tiny

MID = {"phase": "mid", "timestep": 700, "coefficients": [1, 1, -1], "mix": [0.5, 0.5]}
DOC = Path(__file__).parent.parent / "docs" / "bundle-format.md"


@pytest.fixture
def good() -> Manifest:
    return manifest.load(json.dumps(tiny.manifest()))


def test_load_gives_what_the_text_says(good: Manifest) -> None:
    value = tiny.manifest()
    step = good.schedules["default"].steps[1]
    assert (step.phase, step.timestep, step.coefficients) == ("fast", 481.0, (1.0, 1.125, -0.25))
    assert good.image.latent_shape == (4, 8, 8)
    assert good.graphs["denoiser.slow"].inputs[1].shape == ()
    assert good.graphs["decoder"].guidance == "none"
    assert {name: entry.size for name, entry in good.files.items()} == {
        name: entry["size"] for name, entry in value["files"].items()
    }


def test_dump_writes_what_load_reads(good: Manifest) -> None:
    text = manifest.dump(good)
    assert manifest.load(text) == good
    assert manifest.load(text.encode()) == good
    assert manifest.dump(manifest.load(text)) == text
    assert text.isascii()


def test_text_may_be_of_any_language(good: Manifest) -> None:
    prompt = "模糊, größer \N{ARTIST PALETTE}"
    changed = dataclasses.replace(good, guidance=dataclasses.replace(good.guidance, negative_prompt=prompt))
    assert manifest.load(manifest.dump(changed)).guidance.negative_prompt == prompt
    plain = json.dumps(tiny.manifest() | {"guidance": {"negative_prompt": prompt}}, ensure_ascii=False)
    assert manifest.load(plain.encode()).guidance.negative_prompt == prompt


def test_dump_refuses_what_load_would_refuse(good: Manifest) -> None:
    broken = dataclasses.replace(good, guidance=dataclasses.replace(good.guidance, scale=float("nan")))
    with pytest.raises(BundleError, match=r"^bundle\.json: guidance\.scale: expected a finite number, got nan$"):
        manifest.dump(broken)
    long = dataclasses.replace(good, provenance=dataclasses.replace(good.provenance, model="x" * (1 << 20)))
    with pytest.raises(BundleError, match=r"^bundle\.json: \d+ bytes; at most 1048576 are allowed$"):
        manifest.dump(long)


@pytest.mark.parametrize("bounds", [[2.0], [1.0, 2.0, 4.0], [4.0, 9.0], [9.0, 2.0], ["2", 9.0], [2.0, 1e39]])
def test_a_range_of_scales_is_two_numbers_around_the_default(bounds: list[Any]) -> None:
    value = tiny.manifest() | {"guidance": {"scale": 3.0, "range": [2.0, 9.0]}}
    assert manifest.load(json.dumps(value)).guidance.range == (2.0, 9.0)
    value["guidance"]["range"] = bounds
    with pytest.raises(BundleError, match=r"^bundle\.json: guidance\.range"):
        manifest.load(json.dumps(value))


def test_errors_name_the_file_they_are_told() -> None:
    with pytest.raises(BundleError, match=r"^here/bundle\.json: format 3 is newer than 1"):
        manifest.load('{"format": 3}', "here/bundle.json")


def test_the_first_schedule_is_the_default(good: Manifest) -> None:
    value = tiny.manifest()
    value["schedules"] = {
        "zz": value["schedules"]["default"],
        "aa": value["schedules"]["default"] | {"initial_noise_scale": 2},
    }
    both = manifest.load(json.dumps(value))
    assert both.schedule() is both.schedules["zz"]
    assert both.schedule("aa").initial_noise_scale == 2.0
    with pytest.raises(BundleError, match=r"^schedule 'bb': this bundle has zz, aa$"):
        both.schedule("bb")


def test_engine_files_are_what_a_target_reads(good: Manifest) -> None:
    graphs = ("text_encoder", "text_encoder_2", "decoder", "encoder", "denoiser.slow", "denoiser.fast")
    files = good.engine_files("cpu")
    assert sorted(files) == sorted(["tokenizer.json", "cpu.bin", *(f"cpu.{graph}.onnx" for graph in graphs)])
    with pytest.raises(BundleError, match=r"^target 'rtx': this bundle has cpu$"):
        good.engine_files("rtx")


def test_a_bundle_may_come_without_engines() -> None:
    loaded = manifest.load(json.dumps(tiny.manifest() | {"engines": {}}))
    with pytest.raises(BundleError, match=r"^target 'cpu': this bundle has none$"):
        loaded.engine_files("cpu")


def test_three_phases_are_as_good_as_two() -> None:
    value = tiny.manifest()
    value["graphs"]["denoiser.mid"] = value["graphs"]["denoiser.fast"]
    value["engines"]["cpu"]["graphs"]["denoiser.mid"] = {"file": "cpu.denoiser.fast.onnx"}
    value["schedules"]["default"]["steps"].insert(1, MID)
    assert [step.phase for step in manifest.load(json.dumps(value)).schedule().steps] == ["slow", "mid", "fast"]


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "x" * 64, "...", "-", ".hidden"])
def test_names_of_64_plain_characters_are_valid(name: str) -> None:
    limits.check_name("name", name)


def test_largest_images_and_tensors_are_allowed(good: Manifest) -> None:
    value: dict[str, Any] = tiny.manifest()
    value["image"] = {"height": 8192, "width": 8192, "latent_channels": 4, "latent_scale": 1}
    del value["schedules"]["large"]
    value["graphs"]["decoder"]["outputs"][0]["shape"] = ["batch", 8192, 8192, 3]
    assert manifest.load(json.dumps(value)).image.latent_shape == (4, 8192, 8192)
    value["image"] |= {"sizes": [[8192, 1], [1, 8192]], "sides": [1, 8192, 1], "tile": [8192, 8191]}
    assert manifest.load(json.dumps(value)).image.takes(1, 8191)


def test_sizes_are_the_usual_one_the_listed_and_those_of_the_range(good: Manifest) -> None:
    image = good.image  # 64 x 64, 64 x 128, 256 x 256, sides from 32 to 128 in steps of 16
    for size in ((64, 64), (64, 128), (256, 256), (32, 128), (128, 112)):
        assert image.takes(*size), size
    for size in ((256, 64), (256, 128), (16, 64), (144, 64), (64, 72), (0, 0), (-64, 64)):
        assert not image.takes(*size), size
    assert image.latents_of(64, 128) == (4, 8, 16)
    plain = dataclasses.replace(image, sides=())
    assert [size for size in ((64, 64), (64, 128), (128, 64), (32, 32)) if plain.takes(*size)] == [(64, 64), (64, 128)]


def test_a_schedule_is_for_its_sizes_or_for_all(good: Manifest) -> None:
    assert good.schedules["large"].fits(256, 256)
    assert not good.schedules["large"].fits(64, 64)
    assert good.schedules["default"].fits(64, 64)
    assert good.schedules["default"].fits(112, 48)


def test_conditions_are_the_outputs_of_all_text_encoders(good: Manifest) -> None:
    assert good.text_encoders() == ["text_encoder", "text_encoder_2"]
    assert good.conditions() == ["prompt_embeds", "mask"]


def test_a_bundle_without_what_may_be_left_out_is_good() -> None:
    value = tiny.manifest()
    value["image"] = {"height": 64, "width": 64, "latent_channels": 4, "latent_scale": 8}
    del value["schedules"]["large"], value["graphs"]["encoder"], value["engines"]["cpu"]["graphs"]["encoder"]
    for step in value["schedules"]["default"]["steps"]:
        del step["mix"]
    del value["tokenizers"]["tokenizer_2"]["template"]
    loaded = manifest.load(json.dumps(value))
    assert (loaded.image.sizes, loaded.image.sides, loaded.image.tile) == ((), (), ())
    assert (loaded.tokenizers["tokenizer_2"].template, loaded.schedule().strength_rounding) == ("{}", "down")
    value = tiny.manifest()  # with an encoder that samples nothing
    del value["graphs"]["encoder"]["inputs"][1]
    assert [port.source for port in manifest.load(json.dumps(value)).graphs["encoder"].inputs] == ["image"]


def test_the_example_of_the_documentation_is_a_manifest() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    loaded = manifest.load(example.replace("SHA", "0" * 64))
    assert loaded.schedule().steps[0].phase == "slow"
    assert manifest.load(manifest.dump(loaded)) == loaded


def test_the_documentation_names_every_key_and_every_limit() -> None:
    text = DOC.read_text(encoding="utf-8")
    keys: set[str] = set()
    waiting: list[Any] = [Manifest]
    while waiting:
        kind = waiting.pop()
        for name, hint in get_type_hints(kind).items():
            keys.add(name)
            parts = [hint, *_arguments(hint)]
            waiting += [part for part in parts if dataclasses.is_dataclass(part)]
    assert {key for key in keys if f"`{key}`" not in text} == set()
    figures = [limits.MANIFEST_BYTES, limits.TENSOR_ELEMENTS, limits.TENSOR_RANK, limits.PROMPT_TOKENS]
    figures += [limits.IMAGE_SIDE, limits.SCHEDULE_STEPS]
    digits = text.replace(" ", "")
    assert {figure for figure in figures if str(figure) not in digits} == set()


def _arguments(hint: Any) -> list[Any]:
    found = list(getattr(hint, "__args__", ()))
    return found + [deeper for argument in found for deeper in _arguments(argument)]
