"""What glance.h promises of the whole library: its symbols, callbacks, threads, lifetimes, silence, installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glance_trt
from glance_trt import hashing, records

from ..models import tiny
from .abi import Bundle, Library, NativeError
from .prompts import tokens

REPOSITORY = Path(__file__).parents[2]
PROMPT = "a large red circle"


@pytest.fixture
def bundle(native: Library, tiny_bundle: Path) -> Iterator[Bundle]:
    with native.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(tiny_bundle: Path) -> dict[str, Any]:
    return {"tokens": tokens(tiny_bundle, PROMPT), "negative_tokens": tokens(tiny_bundle, "")}


# --- the library ------------------------------------------------------------------------------------------------------


def test_its_symbols_are_the_functions_of_the_header(build: Path) -> None:
    header = (REPOSITORY / "native/include/glance.h").read_text()
    functions = set(re.findall(r"^GLANCE_API\s[^;]*?\b(glance_\w+)\(", header, re.MULTILINE))
    assert len(functions) == header.count("\nGLANCE_API ")
    command = ["nm", "-D", "--defined-only", build / "libglance.so.1"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    symbols = {line.split()[-1] for line in listed if line}
    assert symbols - {"GLANCE_1"} == {f"{name}@@GLANCE_1" for name in functions}


def test_its_version_is_that_of_the_package(native: Library) -> None:
    assert native.call("glance_version").decode() == glance_trt.__version__


def test_its_own_tests_pass(build: Path) -> None:
    result = subprocess.run(["ctest", "--output-on-failure"], cwd=build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_it_is_installed_for_cmake_and_for_pkg_config(
    build: Path, onnxruntime_library: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    if shutil.which("pkg-config") is None or not Path("/usr/include/png.h").exists():
        pytest.skip("the example needs pkg-config and libpng")

    def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(item) for item in command], env=os.environ | more, capture_output=True, text=True, check=False
        )

    prefix, example = tmp_path / "prefix", REPOSITORY / "examples/native"
    assert run("cmake", "--install", build, "--prefix", prefix).returncode == 0
    configured = run("cmake", "-S", example, "-B", tmp_path / "example", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", tmp_path / "example")
    assert built.returncode == 0, built.stdout + built.stderr

    (libraries,) = {file.parent for file in prefix.rglob("libglance.so")}
    (packages,) = {file.parent for file in prefix.rglob("glance.pc")}
    flags = run("pkg-config", "--cflags", "--libs", "glance", "libpng", PKG_CONFIG_PATH=str(packages)).stdout.split()
    linked = run("c++", "-std=c++17", example / "generate.cpp", "-o", tmp_path / "generate", *flags)
    assert linked.returncode == 0, linked.stderr

    for program in (tmp_path / "example/generate", tmp_path / "generate"):
        made = run(
            *(program, tiny_bundle, "", "7", tmp_path / "image.png"),
            LD_LIBRARY_PATH=str(libraries),
            GLANCE_ONNXRUNTIME=str(onnxruntime_library),
        )
        assert (made.returncode, made.stderr) == (1, "error: prompt: empty; say what the image should show\n")


# --- bundles ----------------------------------------------------------------------------------------------------------


def test_a_bundle_says_what_it_is(bundle: Bundle, tiny_bundle: Path) -> None:
    manifest = (tiny_bundle / "bundle.json").read_bytes()
    assert bundle.text("target") == "cpu"
    assert bundle.text("manifest") == manifest.decode()
    assert bundle.text("sha256") == hashing.sha256_of_bytes(manifest)


def test_it_hashes_every_file_that_is_used_and_tells_of_them(
    native: Library, tiny_bundle: Path, tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    native.open(tiny_bundle, progress=lambda *call: calls.append(call)).free()
    entries = json.loads((tiny_bundle / "bundle.json").read_text())["files"]
    total = sum(entry["size"] for entry in entries.values())
    assert calls[0] == ("check", 0, total)
    assert calls[-1] == ("check", total, total)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    for name in entries:
        copy = Path(shutil.copytree(tiny_bundle, tmp_path / name))
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(NativeError, match=rf"^{re.escape(str(copy / name))}: altered \(its SHA-256"):
            native.open(copy)


def test_a_file_that_changes_while_a_bundle_is_opened_is_noticed(
    native: Library, tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy.bundle"))

    def touch(_stage: str, done: int, total: int) -> None:
        if done == total:
            os.utime(copy / "decoder.onnx", (1, 1))

    with pytest.raises(NativeError, match=r"decoder.onnx: changed while the bundle was opened; open it again when"):
        native.open(copy, progress=touch)


def test_a_callback_ends_the_opening_of_a_bundle(native: Library, tiny_bundle: Path) -> None:
    with pytest.raises(NativeError, match=r"^cancelled while the bundle was checked$") as caught:
        native.open(tiny_bundle, progress=lambda _stage, done, _total: int(done > 0))
    assert caught.value.kind == "cancelled"


def test_large_files_are_hashed_once_and_the_record_is_python_s(
    native: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"large.bin": bytes(hashing.ALWAYS_BELOW)}
    folder = tiny.make_bundle(tmp_path / "large.bundle", extra=large)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["engines"]["cpu"]["graphs"]["decoder"]["weights"] = ["large.bin"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    os.utime(folder / "large.bin", (1, 1))
    time.sleep(2.1)  # a file this young is not recorded: it might change again within one tick of the clock
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = str(tmp_path / "cache" / "glance-trt")
    native.open(folder, cache=cache).free()
    (sha256,) = records.load("hashed.json").values()
    assert sha256 == manifest["files"]["large.bin"]["sha256"]
    records.write("hashed.json", json.dumps(dict.fromkeys(records.load("hashed.json"), "0" * 64)).encode())
    with pytest.raises(NativeError, match=r"large.bin: altered"):
        native.open(folder, cache=cache)  # it believes the record
    native.open(folder, cache="").free()


def test_objects_may_be_freed_in_any_order(native: Library, tiny_bundle: Path, ids: dict[str, Any]) -> None:
    opened = native.open(tiny_bundle, threads=1)
    first, second = opened.session(**ids), opened.session(**ids)
    opened.free()
    image = first.run()[0]
    first.free()
    np.testing.assert_array_equal(second.run()[0], image)
    second.free()


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_a_session_runs_again_with_other_wishes(bundle: Bundle, ids: dict[str, Any]) -> None:
    with bundle.session(seed=1, **ids) as session:
        first = session.run()[0]
        session.set("seed", 2)
        assert (session.run()[0] != first).any()
        session.set("seed", 1)
        np.testing.assert_array_equal(session.run()[0], first)


def test_progress_is_told_of_the_steps_of_all_images(bundle: Bundle, ids: dict[str, Any]) -> None:
    calls: list[tuple[str, int, int]] = []
    bundle.generate(count=5, batch_size=2, progress=lambda *call: calls.append(call), **ids)
    steps = len(tiny.SCHEDULES["default"].steps)
    done = [call[1] for call in calls]
    assert {(stage, total) for stage, _, total in calls} == {("generate", 5 * steps)}
    assert sorted(set(done)) == [
        0,
        *range(2, 2 * steps + 1, 2),
        *range(2 * steps + 2, 4 * steps + 1, 2),
        *range(17, 21),
    ]
    assert done == sorted(done)


def test_a_callback_ends_a_run_at_the_next_step(bundle: Bundle, ids: dict[str, Any]) -> None:
    for last in range(4):
        seen: list[int] = []

        def stop(_stage: str, done: int, _total: int, seen: list[int] = seen, last: int = last) -> int:
            seen.append(done)
            return int(done >= last)

        with bundle.session(progress=stop, **ids) as session:
            with pytest.raises(NativeError, match=rf"^cancelled after {last} of 4 steps$") as caught:
                session.run()
            assert caught.value.kind == "cancelled"
            assert seen[-1] == last
            session.set("progress", lambda *_: 0)
            assert len(session.run()) == 1


def test_another_thread_ends_a_run(bundle: Bundle, ids: dict[str, Any]) -> None:
    begun = threading.Event()

    def report(_stage: str, done: int, _total: int) -> None:
        if done:
            begun.set()

    with bundle.session(count=2**31 - 1, batch_size=1, progress=report, **ids) as session:
        other = threading.Thread(target=lambda: (begun.wait(), session.cancel()))
        other.start()
        with pytest.raises(NativeError, match=r"^cancelled after \d+ of 8589934588 steps$"):
            session.run()
        other.join()


def test_eight_threads_share_a_bundle(bundle: Bundle, ids: dict[str, Any], tiny_bundle: Path) -> None:
    prompts = [ids["tokens"], tokens(tiny_bundle, "a blue star"), tokens(tiny_bundle, "a green square")]
    given = {"negative_tokens": ids["negative_tokens"]}
    expected = {
        (prompt, seed): bundle.generate(tokens=prompts[prompt], seed=seed, **given)[0].tobytes()
        for prompt in range(len(prompts))
        for seed in range(20)
    }
    faults: list[object] = []
    made = [0] * 8
    end = time.monotonic() + 3

    def work(number: int) -> None:
        choose = np.random.default_rng(number)
        try:
            while time.monotonic() < end:
                prompt, seed, count = (int(choose.integers(most)) for most in (len(prompts), 16, 4))
                images = bundle.generate(tokens=prompts[prompt], seed=seed, count=count + 1, batch_size=2, **given)
                for i, image in enumerate(images):
                    assert image.tobytes() == expected[prompt, seed + i]
                made[number] += len(images)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert min(made) > 0


# --- what it does to the process --------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from tests.native.abi import Library, NativeError
native = Library(Path(sys.argv[1]), Path(sys.argv[2]))
for options in {}, {"target": "no"}, {"onnxruntime": "/no.so"}:
    try:
        with native.open(Path(sys.argv[3]), **options) as bundle:
            bundle.generate(tokens={"tokenizer": [100000]}, negative_tokens={"tokenizer": [1]})
    except NativeError:
        pass
"""


def test_it_prints_nothing_and_leaves_no_trace_of_onnxruntime_s_telemetry(
    build: Path, onnxruntime_library: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", CHILD, build / "libglance.so.1", onnxruntime_library, tiny_bundle]
    result = subprocess.run(
        [str(item) for item in command],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_log_callback_hears_what_onnxruntime_has_to_say(
    native: Library, tiny_bundle: Path, ids: dict[str, Any]
) -> None:
    said: list[tuple[int, str]] = []
    opened = native.open(tiny_bundle, log=lambda level, text: said.append((level, text)))
    with opened, pytest.raises(NativeError):
        opened.generate(tokens={"tokenizer": [100_000]}, negative_tokens=ids["negative_tokens"])
    assert any(level == 3 and text.startswith("ONNX Runtime: ") for level, text in said)
