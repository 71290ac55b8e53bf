"""What does a process take from its start to one image on the disk: by the native library, by the Python package, alone
and inside of a C++ process, by the command glance-trt, and by diffusers?

Builds the native library into build/native, and the examples against it, which takes what docs/embedding.md names. Then
runs them in turns, so that whatever else the machine does meets them alike; a first round is not counted.

    make demo
    python bench/embedding.py
    python bench/embedding.py --bundle my-model.bundle --recipe my-model.yaml --prompt "a watercolor fox" --runs 9

Seconds are wall clock: until the first step is done, which is the start-up, and until the process ends.
Memory is the largest resident size of the process (wait4), mapped weights included, and, in a run of its own, the
largest that is the process's own (RssAnon, looked at every millisecond): what is mapped from files is the page cache's,
and each process that has the same bundle open shares it. All are medians; the ratios are to the native library, and
each is the median of those within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from glance_trt.duel import environment, run_process

REPOSITORY = Path(__file__).parents[1]
SEED = "7"
STEP = b"\r1 of "
SAYS_STEPS = ("native library", "Python package")
SCRIPT = """
import sys
from glance_trt import Pipeline

_, bundle, prompt, seed, file = sys.argv
with Pipeline.open(bundle) as pipeline:
    steps = pipeline.settings().steps

    def say(result):
        print(f"\\r{result.index} of {steps} steps", end="", file=sys.stderr, flush=True)

    (image,) = pipeline.generate(prompt, seed=int(seed), on_step=say)
    image.save(file)
"""


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


def first_step(command: list[str], threads: int) -> float:
    """Seconds from a process's start until it has written to its standard error that a step is done."""
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(threads), bufsize=0) as child:
        assert child.stderr is not None
        written = b""
        while STEP not in written:
            more = child.stderr.read(4096)
            if not more:
                sys.exit(f"{command[0]} ended without a step: {written.decode(errors='replace')}")
            written += more
        seconds = time.perf_counter() - start
        child.stderr.read()  # so that it is not held up
    return seconds


def own_memory(command: list[str]) -> float:
    """MB that are the process's own, at most."""
    most = 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None:
            with contextlib.suppress(OSError):
                found = re.search(r"^RssAnon:\s*(\d+) kB", Path(f"/proc/{child.pid}/status").read_text(), re.MULTILINE)
                most = max(most, int(found[1]) * 1024 / 1e6 if found else 0)
            time.sleep(0.001)
    if child.returncode:
        sys.exit(f"{command[0]} ended with code {child.returncode}")
    return most


def sides(bundle: str, recipe: str, prompt: str, native: Path, embedded: Path, folder: str) -> dict[str, list[str]]:
    """The command of each."""
    here = Path(sys.executable).parent
    return {
        "native library": [str(native), bundle, prompt, SEED, f"{folder}/native.png"],
        "Python package": [sys.executable, "-c", SCRIPT, bundle, prompt, SEED, f"{folder}/package.png"],
        "embedded Python": [str(embedded), bundle, prompt, SEED, f"{folder}/embedded.png"],
        "glance-trt generate": [
            *(str(here / "glance-trt"), "generate", bundle, prompt, "--seed", SEED, "--target", "cpu"),
            *("--overwrite", "-o", f"{folder}/command.png"),
        ],
        "diffusers": [
            *(sys.executable, "-m", "glance_trt.export.reference"),
            *(recipe, prompt, SEED, f"{folder}/diffusers.png"),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="out/shapes.bundle", help="with engines for the CPU")
    parser.add_argument("--recipe", default="export/shapes.yaml", help="that the bundle was built from")
    parser.add_argument("--prompt", default="a large red circle on a white background")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build/native", help="of the library")
    options = parser.parse_args()

    package = importlib.util.find_spec("onnxruntime")
    assert package is not None
    assert package.origin is not None
    (onnxruntime,) = (Path(package.origin).parent / "capi").glob("libonnxruntime.so.*")
    os.environ["GLANCE_ONNXRUNTIME"] = str(onnxruntime)
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="glance-bench-") as folder:
        programs = build(Path(folder), options.build.resolve())
        commands = sides(options.bundle, options.recipe, options.prompt, *programs, folder)
        rounds = []
        for _ in range(options.runs + 1):
            measured = {}
            for name, command in commands.items():
                first = first_step(command, threads) if name in SAYS_STEPS else math.nan
                measured[name] = (first, *run_process(command, threads), own_memory(command))
            rounds.append(measured)
    columns = ("first step, s", "image, s", "peak, MB", "own, MB")
    print("".join([f"{'':<20}", *(f"{column:>15}{'ratio':>7}" for column in columns)]))
    for name in commands:
        row = [f"{name:<20}"]
        for column in range(len(columns)):
            pairs = [(one[name][column], one["native library"][column]) for one in rounds[1:]]
            value, ratio = median(a for a, _ in pairs), median(a / b for a, b in pairs)
            row.append(f"{'':>22}" if math.isnan(value) else f"{value:>15.{2 if column < 2 else 0}f}{ratio:>7.2f}")
        print("".join(row).rstrip())


if __name__ == "__main__":
    main()
