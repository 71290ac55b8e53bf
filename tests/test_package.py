"""What an installation holds and needs: folders are dependency tiers, and the runtime's tier is free of PyTorch."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "glance_trt"

TORCH_TIER = ("torch", "diffusers", "transformers", "peft", "onnx")
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "nvtx", "polygraphy")
HEAVY = {*TORCH_TIER, *BACKENDS, "accelerate", "onnx_ir", "onnxscript", "safetensors"}
BASE = {*sys.stdlib_module_names, "glance_trt", "numpy", "PIL", "tokenizers", "yaml"}
"""What the library's lean tier may import: the base installation, less what only the command line needs."""

CLI = sorted([PACKAGE / "__main__.py", *(PACKAGE / "cli").rglob("*.py")])
BUILDING = sorted(
    [PACKAGE / f"{name}.py" for name in ("bench", "build", "compiling", "doctor", "verify")]
    + [path for name in ("distill", "export", "engines") for path in (PACKAGE / name).rglob("*.py")]
)
LEAN = sorted({*PACKAGE.rglob("*.py")} - {*BUILDING, *CLI, PACKAGE / "__init__.py"})
"""Every module whose folder does not say otherwise."""

BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without this process's import path; a failure shows everything that it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def yaml_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.yaml"))


# --- what is imported, when -----------------------------------------------------------------------------------------


def test_importing_the_package_loads_neither_numpy_nor_onnxruntime() -> None:
    loaded = run(sys.executable, "-c", "import sys, glance_trt; print(*sys.modules)").stdout.split()
    assert "glance_trt" in loaded
    assert not {"numpy", *HEAVY} & set(loaded)


def test_runtime_and_command_line_import_without_the_torch_tier() -> None:
    modules = ["glance_trt", *map(module_name, LEAN), "glance_trt.cli.main"]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    run(sys.executable, "-c", BLOCK.format(blocked=TORCH_TIER) + code)


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["inspect"], ["verify"]], ids=["all", "generate", "inspect", "verify"]
)
def test_help_needs_neither_the_torch_tier_nor_an_engine_backend(command: list[str]) -> None:
    code = BLOCK.format(blocked=TORCH_TIER + BACKENDS) + "from glance_trt.cli.main import main\nmain()"
    shown = run(sys.executable, "-c", code, *command, "--help").stdout
    assert shown.startswith("Usage:")
    assert "--help" in shown


def test_the_block_of_these_tests_blocks() -> None:
    with pytest.raises(AssertionError, match="ImportError: onnx is blocked"):
        run(sys.executable, "-c", BLOCK.format(blocked=TORCH_TIER) + "import onnx.helper")


# --- arrows between folders -----------------------------------------------------------------------------------------


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[tuple[int, str]]:
    """The line and full name of everything that a file imports; optionally only what importing the file would load."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from ..a import b` names the module a and perhaps its child b: both count.
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, source
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        elif at_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", LEAN, ids=relative)
def test_lean_tier_imports_only_itself_and_the_base_installation(path: Path) -> None:
    allowed = BASE | set(BACKENDS) if path.parent.name == "runners" else BASE
    lean = (*map(module_name, LEAN), "glance_trt.__version__")
    for line, name in imports(path):
        assert name.partition(".")[0] in allowed, f"line {line}"
        assert not name.startswith("glance_trt.") or within(name, lean), f"line {line}"


@pytest.mark.parametrize("path", BUILDING, ids=relative)
def test_building_and_training_do_not_import_the_command_line(path: Path) -> None:
    for line, name in imports(path):
        assert not within(name, ("glance_trt.cli",)), f"line {line}"


@pytest.mark.parametrize("path", CLI, ids=relative)
def test_command_line_imports_heavy_things_only_inside_functions(path: Path) -> None:
    for line, name in imports(path, at_import_only=True):
        assert name.partition(".")[0] not in HEAVY, f"line {line}"
        assert not within(name, tuple(map(module_name, BUILDING))), f"line {line}"


# --- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools would take what an earlier build left beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    for folder in ("glance_trt", "export", "engines"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (built,) = folder.glob("glance_trt-*.whl")
    return built


@pytest.fixture(scope="module")
def lean_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment that holds the wheel, its extra `cpu`, and nothing else."""
    environment = tmp_path_factory.mktemp("lean")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    run(*pip, "install", "--no-compile", f"{wheel}[cpu]", "--constraint", ROOT / "constraints.txt")
    return environment / "bin"


def test_wheel_holds_every_module_and_the_shipped_files_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {relative(path) for path in PACKAGE.rglob("*.py")}
    shipped = {f"glance_trt/shipped/{name}/{path.name}" for name in ("export", "engines") for path in yaml_files(name)}
    assert len(shipped) >= 3
    assert names == modules | shipped | {"glance_trt/py.typed"}


def test_installed_wheel_finds_the_shipped_recipes_and_targets(lean_bin: Path, tmp_path: Path) -> None:
    code = (
        "from glance_trt.recipe import shipped_files\n"
        "for kind in ('recipe', 'target'):\n"
        "    for name, file in shipped_files(kind).items(): print(kind, name, file.read_text().count('name: ' + name))"
    )
    shown = run(lean_bin / "python", "-c", code, cwd=tmp_path).stdout.splitlines()
    recipes = [f"recipe {path.stem} 1" for path in yaml_files("export")]
    assert sorted(shown) == sorted(recipes + [f"target {path.stem} 1" for path in yaml_files("engines")])


@pytest.mark.parametrize("module", [*TORCH_TIER, "export", "engines", "examples", "tests", "native"])
def test_lean_installation_does_not_hold(module: str, lean_bin: Path, tmp_path: Path) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({module!r}))"
    assert run(lean_bin / "python", "-c", code, cwd=tmp_path).stdout == "None\n"


def test_lean_installation_shows_help(lean_bin: Path, tmp_path: Path) -> None:
    assert run(lean_bin / "glance-trt", "--help", cwd=tmp_path).stdout.startswith("Usage: glance-trt")


def test_lean_installation_generates_an_image(lean_bin: Path, shapes_bundle: Path, tmp_path: Path) -> None:
    prompt = "a large red circle left of a small blue star on a white background"
    command = ("generate", shapes_bundle, prompt, "--target", "cpu", "--seed", "7", "-o", tmp_path / "images")
    run(lean_bin / "glance-trt", *command, cwd=tmp_path)
    (file,) = (tmp_path / "images").glob("*.png")
    with Image.open(file) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        image.load()


@pytest.mark.skipif(sys.platform != "linux", reason="where ONNX Runtime reports on Linux")
def test_onnxruntime_leaves_no_trace_of_telemetry(tmp_path: Path) -> None:
    def traces(home: str, statement: str, **more: str) -> list[Path]:
        folder = tmp_path / home
        folder.mkdir()
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **more}
        subprocess.run([sys.executable, "-c", statement], env=environment, check=True)
        return [file for file in folder.rglob("*") if file.is_file()]

    assert traces("silent", "import glance_trt, onnxruntime") == []
    if traces("plain", "import onnxruntime"):  # the versions that have telemetry, where it is not off for a CI's sake
        assert traces("asked", "import glance_trt, onnxruntime", ORT_DISABLE_TELEMETRY="0")
