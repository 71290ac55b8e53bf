"""The examples for programs that embed: a server over the native library, and the Python package in a C++ process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from glance_trt.runtime.pipeline import Pipeline

from .abi import Library
from .making import make

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "a large red circle on a white background"
PATIENCE = 120  # seconds, on a machine that has much else to do


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    words = [str(item) for item in command]
    return subprocess.run(words, env=os.environ | more, capture_output=True, text=True, check=False)


def pixels_of(png: bytes | Path) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server, built against an installed library."""
    folder = tmp_path_factory.mktemp("native")
    installed = run("cmake", "--install", build, "--prefix", folder / "prefix")
    assert installed.returncode == 0, installed.stderr
    said = make(EXAMPLES / "native", folder / "build", f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}")
    if left_out := re.search("The server is left out: .*", said):
        pytest.skip(left_out[0])
    return folder / "build/server"


@pytest.fixture(scope="module")
def slow_bundle(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration bundle, with a schedule of 200 steps: an image takes seconds."""
    folder = tmp_path_factory.mktemp("slow") / "slow.bundle"
    shutil.copytree(shapes_bundle, folder, copy_function=os.link)
    manifest = json.loads((folder / "bundle.json").read_text())
    (schedule,) = manifest["schedules"].values()
    schedule["steps"] *= 20
    (folder / "bundle.json").unlink()  # the link, not the file
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


class Server:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log
        self.port = int(self.said(r"http://127\.0\.0\.1:(\d+)\n")[1])

    def said(self, pattern: str) -> re.Match[str]:
        """What it has written, as soon as it matches."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self._log.read_text())):
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.01)
        return found

    def begin(self, request: Any) -> http.client.HTTPResponse:
        """Ask for an image; returns with the status, when the making of the image has begun or will not."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("POST", "/generate", request if isinstance(request, str) else json.dumps(request))
        return connection.getresponse()

    def ask(self, request: Any) -> tuple[int, bytes]:
        """The status and the content."""
        with self.begin(request) as response:
            return response.status, response.read()


Serve = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def serve(program: Path, onnxruntime_library: Path, tmp_path: Path) -> Serve:
    @contextlib.contextmanager
    def started(bundle: Path, *options: str) -> Iterator[Server]:
        command = [str(item) for item in (program, bundle, "--port", "0", *options)]
        places = {"GLANCE_ONNXRUNTIME": str(onnxruntime_library), "XDG_CACHE_HOME": str(tmp_path)}
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(command, stderr=log, env=os.environ | places)
        try:
            yield Server(process, tmp_path / "log")
        finally:
            process.kill()
            process.wait()

    return started


def test_an_image_of_the_server_is_that_of_the_library_and_of_python(
    serve: Serve, native: Library, shapes_bundle: Path
) -> None:
    with serve(shapes_bundle) as server:
        status, png = server.ask({"prompt": PROMPT, "seed": 7})
    assert status == 200
    with native.open(shapes_bundle) as bundle:
        np.testing.assert_array_equal(pixels_of(png), bundle.generate(prompt=PROMPT, seed=7)[0])
    with Pipeline.open(shapes_bundle, "cpu") as pipeline:
        (image,) = pipeline.generate(PROMPT, seed=7)
    np.testing.assert_allclose(pixels_of(png).astype(int), np.asarray(image), atol=1)


def test_everything_in_a_request_counts(serve: Serve, native: Library, tiny_bundle: Path) -> None:
    wishes = {
        "prompt": "a red star",
        "negative_prompt": "a star",
        "guidance_scale": 2.5,
        "seed": 2**64 - 1,
        "size": [4, 6],
    }
    with serve(tiny_bundle) as server, native.open(tiny_bundle) as bundle:
        _, png = server.ask(wishes)
        np.testing.assert_array_equal(pixels_of(png), bundle.generate(**wishes)[0])
        for name in wishes.keys() - {"prompt", "size"}:
            assert server.ask({key: value for key, value in wishes.items() if key != name}) != (200, png)


def test_bad_input_is_refused_with_what_is_wrong(serve: Serve, tiny_bundle: Path) -> None:
    taken = "is not taken; a request is an object with prompt"
    bad = {
        '{"prompt": " "}': "prompt: empty; say what the image should show\n",
        "{}": "prompt: there is none; say what the image should show\n",
        '{"prompt": 3}': f"prompt: 3 {taken}",
        '{"prompt": "a star\\u0000"}': f'prompt: "a star\\u0000" {taken}',
        '{"prompt": "a star", "seed": -1}': f"seed: -1 {taken}",
        '{"prompt": "a star", "seed": 1.5}': f"seed: 1.5 {taken}",
        '{"prompt": "a star", "count": 2}': f"count: 2 {taken}",
        '{"prompt": "a star", "size": [4]}': f"size: [4] {taken}",
        '{"prompt": "a star", "size": [4, 4294967300]}': f"size: [4,4294967300] {taken}",
        '{"prompt": "a star", "size": [40, 60]}': "size: 40 x 60 (height x width); this bundle makes 4 x 6.",
        "3": f"3 {taken}",
        '{"prompt": ': "[json.exception.parse_error.101] parse error at line 1",
    }
    with serve(tiny_bundle) as server:
        for request, text in bad.items():
            status, content = server.ask(request)
            assert (status, content.decode()[: len(text)]) == (400, text)
        assert server.ask({"prompt": "a star"})[0] == 200


@pytest.mark.parametrize("threads", ["1", "2"])
def test_clients_at_once_are_all_served(serve: Serve, native: Library, shapes_bundle: Path, threads: str) -> None:
    prompts = [PROMPT, "a small blue star on a black background", "a large green square on a pink background"]
    with serve(shapes_bundle, "--threads", threads) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: server.ask({"prompt": prompt}), prompts))
    with native.open(shapes_bundle) as bundle:
        for prompt, (status, png) in zip(prompts, answers, strict=True):
            assert status == 200
            np.testing.assert_array_equal(pixels_of(png), bundle.generate(prompt=prompt)[0])


def test_beyond_a_full_queue_clients_are_told_to_come_back(serve: Serve, slow_bundle: Path) -> None:
    with serve(slow_bundle, "--queue", "0") as server, server.begin({"prompt": PROMPT}) as first:
        assert first.status == 200
        with server.begin({"prompt": PROMPT}) as second:
            assert (second.status, second.headers["Retry-After"]) == (503, "1")
            assert second.read() == b"busy; try again later\n"
        health = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        health.request("GET", "/health")
        assert health.getresponse().status == 200


def test_the_image_of_a_client_that_goes_away_is_given_up(serve: Serve, slow_bundle: Path) -> None:
    with serve(slow_bundle) as server:
        with server.begin({"prompt": PROMPT}) as first:
            assert first.status == 200
        server.said("a client has gone; its image is given up")
        with server.begin({"prompt": PROMPT}) as second:
            assert second.status == 200


def test_images_that_are_being_made_are_finished_before_the_server_ends(serve: Serve, slow_bundle: Path) -> None:
    with serve(slow_bundle) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        with server.begin({"prompt": PROMPT}) as running:
            assert running.status == 200
            waiting = pool.submit(server.ask, {"prompt": PROMPT})
            server.process.send_signal(signal.SIGTERM)
            assert waiting.result() == (503, b"busy; try again later\n")
            assert pixels_of(running.read()).shape == (64, 64, 3)
        assert server.process.wait(PATIENCE) == 0


def test_what_a_server_is_started_with_is_checked(program: Path, tmp_path: Path) -> None:
    for options in ((), ("--threads", "1"), ("x", "--threads", "0"), ("x", "--port", "1x"), ("x", "--queue")):
        result = run(program, *options)
        assert (result.returncode, result.stderr.splitlines()[0]) == (
            2,
            "usage: server BUNDLE [--port N] [--threads N] [--queue N]",
        )
    result = run(program, tmp_path / "no")
    assert (result.returncode, result.stderr[:7]) == (1, "error: ")


def test_a_port_that_is_taken_is_refused(program: Path, tiny_bundle: Path, onnxruntime_library: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = run(program, tiny_bundle, "--port", port, GLANCE_ONNXRUNTIME=str(onnxruntime_library))
    assert (result.returncode, result.stderr) == (1, f"error: port {port}: cannot be listened on\n")


# --- Python in a C++ process ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with this Python inside."""
    folder = tmp_path_factory.mktemp("embed")
    make(EXAMPLES / "embed_python", folder, f"-DPython_EXECUTABLE={sys.executable}")
    return folder / "embed"


def test_an_image_of_the_embedded_python_is_that_of_python(embed: Path, shapes_bundle: Path, tmp_path: Path) -> None:
    result = run(embed, shapes_bundle, PROMPT, "7", tmp_path / "image.png")
    assert (result.returncode, result.stderr) == (0, "")
    with Pipeline.open(shapes_bundle, "cpu") as pipeline:
        (image,) = pipeline.generate(PROMPT, seed=7)
    np.testing.assert_array_equal(pixels_of(tmp_path / "image.png"), np.asarray(image))


def test_an_error_of_the_embedded_python_is_one_of_the_program(embed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    result = run(embed, tiny_bundle, "", "7", tmp_path / "image.png")
    assert (result.returncode, result.stderr) == (1, "error: prompt: empty; say what the image should show\n")
