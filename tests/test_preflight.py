"""What a build will need is estimated from its parts, and what is free is read from the system."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from glance_trt import preflight
from glance_trt.errors import OutputError, TargetError
from glance_trt.preflight import Component, Engines, Need

PHASES = ("denoiser.slow", "denoiser.fast")
SD15 = {
    "text_encoder": Component(123_000_000, 123_000_000, 246_000_000),
    "denoiser": Component(860_000_000, 955_000_000, 1_910_000_000),
    "decoder": Component(50_000_000, 50_000_000, 100_000_000),
}
"""Stable Diffusion 1.5 in float16, with two LoRAs of its attention."""


def engines(backend: str, dtype: str) -> Engines:
    return Engines("target", backend, dict.fromkeys(["text_encoder", *PHASES, "decoder"], dtype))


def test_a_bundle_takes_its_weights_and_nothing_where_the_graphs_are_the_engines() -> None:
    assert preflight.disk(SD15, []) == 2_256_000_000
    assert preflight.disk(SD15, [engines("onnxruntime-gpu", "float16")]) == 2_256_000_000
    assert preflight.memory(SD15, [engines("onnxruntime-gpu", "float16")], compared=0).memory == 900_000_000


def test_plans_hold_the_weights_once_more_for_each_phase_in_their_dtype() -> None:
    plans = 123_000_000 + 2 * 860_000_000 + 50_000_000
    for dtype, size in (("float16", 2), ("float32", 4)):
        assert preflight.disk(SD15, [engines("tensorrt-rtx", dtype)]) == 2_256_000_000 + size * plans


def test_drafts_of_onnx_runtime_s_engines_hold_shared_weights_once_for_each_phase() -> None:
    finished = 1.4 * 4 * (123 + 955 + 50)
    drafts = 1.4 * 4 * 2 * 860  # of the denoiser; those of the other components are gone by then
    assert preflight.disk(SD15, [engines("onnxruntime", "float32")]) / 1e6 == pytest.approx(2256 + finished + drafts)
    both = [engines("onnxruntime", "float32"), engines("tensorrt", "float16")]
    assert preflight.disk(SD15, both) - preflight.disk(SD15, both[:1]) == 2 * (123 + 2 * 860 + 50) * 1_000_000


def test_memory_is_that_of_the_largest_stage_and_agrees_with_what_was_measured() -> None:
    """docs/results.md: 0.9 GB to export, 6.6 GB to optimise and 6.1 GB to compile this denoiser."""
    cpu = preflight.memory(SD15, [engines("onnxruntime", "float32")], compared=2_000_000_000)
    assert cpu.stage == "building target.denoiser.slow"
    assert cpu.memory / 1e9 == pytest.approx(6.6, rel=0.1)
    rtx = preflight.memory(SD15, [engines("tensorrt-rtx", "float16")], compared=2_000_000_000)
    assert rtx.memory / 1e9 == pytest.approx(6.1, rel=0.1)
    assert preflight.memory(SD15, [], compared=0).memory / 1e9 == pytest.approx(0.9)


def test_parity_counts_for_what_it_loads() -> None:
    half = [engines("tensorrt-rtx", "float16")]
    assert preflight.memory(SD15, half, compared=10**10) == Need("comparing denoiser.slow with PyTorch", 6_880_000_000)
    assert preflight.memory(SD15, half, compared=2_000_000_000).stage == "building target.denoiser.slow"


def test_too_small_a_disk_is_named_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> object:
        asked.append(folder)
        return type("usage", (), {"free": 1_500_000_000})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    place = tmp_path / "not" / "there" / "x.bundle"
    preflight.check_disk(place, 1_500_000_000)
    with pytest.raises(
        OutputError,
        match=r"x\.bundle: building it takes at least 2\.3 GB of disk, and 1\.5 GB are free; free some space, give "
        r"another -o or fewer targets, or go on regardless with --no-preflight$",
    ):
        preflight.check_disk(place, 2_256_000_000)
    assert set(asked) == {tmp_path}


def test_too_little_memory_is_named_with_the_stage_and_unknown_memory_suffices() -> None:
    need = Need("building cpu.denoiser.slow", 6_880_000_000)
    for free in (None, 6_880_000_000):
        preflight.check_memory(need, free)
    with pytest.raises(
        TargetError,
        match=r"^building cpu\.denoiser\.slow takes at least 6\.9 GB of memory, and 4\.0 GB are free; end .* "
        r"or go on regardless with --no-preflight$",
    ):
        preflight.check_memory(need, 4_000_000_000)


FLUX = {"text_encoder": 123_000_000, "text_encoder_2": 4_762_000_000, "transformer": 11_902_000_000, "vae": 84_000_000}
"""Values of FLUX.1 [dev]'s parts."""


def test_comparing_takes_one_part_in_float32_and_images_all_of_them() -> None:
    graphs, images = preflight.comparing(FLUX, images=0), preflight.comparing(FLUX, images=1)
    assert (graphs.stage, graphs.memory) == ("comparing transformer with PyTorch", 4 * 11_902_000_000)
    assert images.memory == 4 * (123 + 4762 + 11_902 + 84) * 1_000_000
    with pytest.raises(
        TargetError, match=r"^comparing images with diffusers takes at least 67\.5 GB .*, with --images 0$"
    ):
        preflight.check_memory(images, 64_000_000_000)


def test_timing_holds_the_model_twice_and_a_denoiser_for_each_lora() -> None:
    assert preflight.timing(FLUX, "transformer", 2).memory == 4 * (2 * 16_871_000_000 + 2 * 11_902_000_000)


# --- what is free ---------------------------------------------------------------------------------------------------


def system(root: Path, meminfo: str = "", groups: str = "", **files: str) -> int | None:
    """`free_memory` of a system whose control groups have these files; ``a__memory_max`` is ``a/memory.max``."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(meminfo)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "cgroup" / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return preflight.free_memory(root / "proc", root / "cgroup")


MEMINFO = (
    "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable: 5000 kB\nSwapTotal: 9 kB\nSwapFree: 7 kB\nHugePages_Free: 3\n"
)


def test_the_machine_has_what_is_available_and_swap(tmp_path: Path) -> None:
    assert system(tmp_path, MEMINFO) == 5007 * 1024


def test_nothing_is_known_of_a_system_without_proc(tmp_path: Path) -> None:
    assert preflight.free_memory(tmp_path / "proc", tmp_path / "cgroup") is None


@pytest.mark.parametrize(
    ("limit", "free"), [("3000000\n", 3_000_000 - 1_000_000 + 300_000), ("max\n", 5007 * 1024), ("900000", 200_000)]
)
def test_a_control_group_limits_it_and_its_page_cache_is_free(tmp_path: Path, limit: str, free: int) -> None:
    stat = "anon 700000\ninactive_file 200000\nactive_file 100000\n"
    files = {"build__memory_max": limit, "build__memory_current": "1000000", "build__memory_stat": stat}
    assert system(tmp_path, MEMINFO, "0::/build\n", **files) == free


def test_a_control_group_above_counts_as_well(tmp_path: Path) -> None:
    files = {
        "a__memory_max": "2000",
        "a__memory_current": "500",
        "a__b__memory_max": "max",
        "a__b__memory_current": "5",
    }
    assert system(tmp_path, MEMINFO, "0::/a/b\n", **files) == 1500


def test_version_1_of_control_groups_is_understood_from_inside_a_container(tmp_path: Path) -> None:
    """There the root is the container's own group, and the path one of the host."""
    files = {"memory__memory_limit_in_bytes": "4000", "memory__memory_usage_in_bytes": "3000"}
    files["memory__memory_stat"] = "active_file 1\ntotal_active_file 400\ntotal_inactive_file 300\n"
    groups = "9:name=systemd:/\n4:cpu,memory:/docker/1234\n1:cpu:/x\n0::/\n"
    assert system(tmp_path, MEMINFO, groups, **files) == 4000 - 3000 + 700


def test_this_machine_has_memory() -> None:
    free = preflight.free_memory()
    assert free is None or 1e6 < free < 1e15
