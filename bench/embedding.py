"""What does a process take from its start to one image on the disk: by the native library, by the Python package
inside of a C++ process, and by the command glance-trt?

Builds the native library into build/native, and the examples against it, which takes what docs/embedding.md names. Then
runs the three in turns, so that whatever else the machine does meets them alike; a first round is not counted.

    make demo
    python bench/embedding.py
    python bench/embedding.py my-model.bundle --runs 9

Seconds are wall clock; memory is the largest resident size of the process (wait4), mapped weights included. Both are
medians; the ratio is the median of those within each round.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from glance_trt.duel import run_process

REPOSITORY = Path(__file__).parents[1]
PROMPT = "a large red circle on a white background"


def build(folder: Path, library: Path) -> tuple[Path, Path]:
    """Build the examples below `folder` against the library, whose build is in `library`; returns the two programs."""
    projects = {
        library: (REPOSITORY / "native",),
        folder / "native": (REPOSITORY / "examples/native", f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}"),
        folder / "python": (REPOSITORY / "examples/embed_python", f"-DPython_EXECUTABLE={sys.executable}"),
    }
    for place, (source, *options) in projects.items():
        commands = [["-S", str(source), "-B", str(place), *options], ["--build", str(place)]]
        if place == library:
            commands.append(["--install", str(place), "--prefix", str(folder / "prefix")])
        for command in commands:
            subprocess.run(["cmake", *command], check=True, stdout=sys.stderr)
    return folder / "native/generate", folder / "python/embed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="out/shapes.bundle", help="by default out/shapes.bundle")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build/native", help="of the library")
    options = parser.parse_args()

    package = importlib.util.find_spec("onnxruntime")
    assert package is not None
    assert package.origin is not None
    (onnxruntime,) = (Path(package.origin).parent / "capi").glob("libonnxruntime.so.*")
    os.environ["GLANCE_ONNXRUNTIME"] = str(onnxruntime)
    with tempfile.TemporaryDirectory(prefix="glance-bench-") as folder:
        native, embedded = build(Path(folder), options.build.resolve())
        asked = [options.bundle, PROMPT, "7"]
        command = str(Path(sys.executable).parent / "glance-trt")
        sides = {
            "native library": [str(native), *asked, f"{folder}/native.png"],
            "embedded Python": [str(embedded), *asked, f"{folder}/embedded.png"],
            "glance-trt generate": [
                *(command, "generate", *asked[:2], "--seed", "7", "--target", "cpu"),
                *("--overwrite", "-o", f"{folder}/command.png"),
            ],
        }
        threads = len(os.sched_getaffinity(0))
        rounds = [[run_process(side, threads) for side in sides.values()] for _ in range(options.runs + 1)][1:]
    print(f"{'':<20}{'seconds':>9}{'ratio':>7}{'MB':>8}{'ratio':>7}")
    for side, name in enumerate(sides):
        seconds, memory = ([(one[side][i], one[0][i]) for one in rounds] for i in (0, 1))
        print(
            f"{name:<20}{median(a for a, _ in seconds):>9.2f}{median(a / b for a, b in seconds):>7.2f}"
            f"{median(a for a, _ in memory):>8.0f}{median(a / b for a, b in memory):>7.2f}"
        )


if __name__ == "__main__":
    main()
