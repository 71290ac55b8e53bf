"""Every use of TensorRT's API is checked by mypy: against the published stubs of TensorRT 10.13, and against stubs that
are generated from the TensorRT-RTX that is installed. No test here can run TensorRT, and both move on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(sys.prefix, "stubs")
"""Where the Makefile installs tensorrt-stubs: apart, for beside other packages it would pass for TensorRT."""
FILES = ["glance_trt/engines/compiler.py", "glance_trt/engines/precision.py", "glance_trt/runtime/runners/tensorrt.py"]
CALL = "builder.build_serialized_network(network, config)"

CONFIG = """
[mypy]
strict = True
warn_unused_ignores = False
follow_imports = silent
ignore_missing_imports = True

[mypy-tensorrt.*,tensorrt_bindings.*,tensorrt_rtx.*,tensorrt_rtx_bindings.*]
ignore_errors = True
"""

# Both sets of stubs come from pybind11-stubgen, which takes over parameters that are no Python, and cannot see before
# Python 3.12 that a class is a buffer, nor that one with numbered items can be iterated over.
MENDS = (
    (r"\bin: (?=[\w.]+\[)", "in_: "),
    (r"(channel_axis: [\w.]+)(?=\))", r"\1 = ..."),
    (r"(?m)^class IHostMemory:$", r"\g<0>\n    def __buffer__(self, flags: int, /) -> memoryview: ..."),
    (r"(?m)^class Dims:$", r"\g<0>\n    def __iter__(self) -> typing.Iterator[int]: ..."),
)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stubs for each module, all mended, and ``swapped``, in which tensorrt is TensorRT-RTX."""
    folder = tmp_path_factory.mktemp("stubs")
    bindings = "tensorrt_rtx_bindings"
    pytest.importorskip(bindings, reason="pip install glance-trt[rtx]")
    source = PUBLISHED / "tensorrt_bindings" / "tensorrt.pyi"
    assert source.is_file(), (
        f"no type stubs of TensorRT; {sys.executable} -m pip install --no-deps --target {PUBLISHED} tensorrt-stubs "
        "-c constraints.txt"
    )
    put(folder / "tensorrt" / "tensorrt_bindings" / "tensorrt.pyi", source.read_text())
    put(folder / "tensorrt" / "tensorrt" / "__init__.pyi", reexport("tensorrt_bindings.tensorrt"))
    generate = [sys.executable, "-m", "pybind11_stubgen", f"{bindings}.tensorrt_rtx", "--ignore-all-errors"]
    subprocess.run([*generate, "-o", str(folder)], check=True, capture_output=True, cwd=folder)
    put(folder / "rtx" / bindings / "tensorrt_rtx.pyi", (folder / bindings / "tensorrt_rtx.pyi").read_text())
    put(folder / "rtx" / "tensorrt_rtx" / "__init__.pyi", reexport(f"{bindings}.tensorrt_rtx"))
    put(folder / "swapped" / "tensorrt" / "__init__.pyi", reexport(f"{bindings}.tensorrt_rtx"))
    return folder


def reexport(module: str) -> str:
    return f"from {module} import *\n__version__: str\n"


def put(path: Path, text: str) -> None:
    for pattern, replacement in MENDS:
        text = re.sub(pattern, replacement, text)
    path.parent.mkdir(parents=True)
    path.write_text(text)


@pytest.fixture(scope="module", params=["tensorrt", "swapped"], ids=["TensorRT", "TensorRT-RTX"])
def reported(
    request: pytest.FixtureRequest, stubs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """What mypy says, by file: of the files, and of one with a misspelt call, ``misspelt.py``."""
    folder = tmp_path_factory.mktemp("checked")
    text = (ROOT / FILES[0]).read_text()
    assert CALL in text
    (folder / "misspelt.py").write_text(text.replace(CALL, CALL.replace("serialized", "serialised")))
    (folder / "mypy.ini").write_text(CONFIG)
    options = ["--config-file", str(folder / "mypy.ini"), "--cache-dir", str(stubs / "cache"), "--no-error-summary"]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *FILES, str(folder / "misspelt.py")],
        env={**os.environ, "MYPYPATH": os.pathsep.join([str(stubs / request.param), str(stubs / "rtx")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not found.stderr
    messages: dict[str, list[str]] = {}
    for line in found.stdout.splitlines():
        messages.setdefault(Path(line.partition(":")[0]).name, []).append(line)
    return messages


def test_what_is_called_exists_and_takes_these_arguments(reported: dict[str, list[str]]) -> None:
    assert {file: lines for file, lines in reported.items() if file != "misspelt.py"} == {}


def test_a_misspelt_call_is_found(reported: dict[str, list[str]]) -> None:
    (line,) = (line for line in reported["misspelt.py"] if "error:" in line)
    assert '"Builder" has no attribute "build_serialised_network"' in line


def test_every_file_that_types_tensorrt_is_checked() -> None:
    typed = [file for file in (ROOT / "glance_trt").rglob("*.py") if "import tensorrt" in file.read_text()]
    here = {file.relative_to(ROOT).as_posix() for file in typed if "TYPE_CHECKING" in file.read_text()}
    assert here == set(FILES)
