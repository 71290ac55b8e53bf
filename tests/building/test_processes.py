"""Builds in real processes, with real workers: interrupted, killed, side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glance_trt.bundle import Bundle
from glance_trt.engines import backends, targets
from glance_trt.worker import Worker

from .conftest import BUILT, Home

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent another way on Windows")

BUILD = """
import json, os, signal, sys
from pathlib import Path
from glance_trt import build, compiling, worker

output, kill_at = Path(sys.argv[1]), sys.argv[2]
children, stages = [], []

class Watched(worker.Worker):
    def __init__(self, what):
        super().__init__(what)
        children.append(self._child.pid)

def progress(stage, done, total):
    if done == 0:
        stages.append(stage)
    if stage == kill_at:
        print(json.dumps({"children": children}), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

build.Worker = compiling.Worker = Watched
report = build.build("tiny.yaml", output, progress=progress)
print(json.dumps({"stages": stages, "unchanged": report.unchanged, "loaded": list(sys.modules)}))
"""
"""Builds, and prints what it did; dies at the first report of the stage that is its second argument."""

HEAVY = {"torch", "diffusers", "transformers", "onnxscript"}


def start(home: Home, kill_at: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(home.output), kill_at], cwd=home.folder, stdout=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen[str]) -> Any:
    stdout, _ = process.communicate(timeout=600)
    return json.loads(stdout)


def advance(home: Home, until: str) -> None:
    """Build, without other processes, until the first report of a stage."""

    def interrupt(stage: str, done: float, total: float) -> None:
        if stage == until:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        home.build(progress=interrupt)


def is_gone(process: int, within: float = 10) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


PHASES = ("slow", "middle", "fast")
MADE_BY = {
    "write text_encoder": "text_encoder.safetensors",
    "trace text_encoder float32": "text_encoder.float32.onnx",
    **{f"write denoiser.{part}": f"denoiser.{part}.safetensors" for part in ("base", "slow", "fast")},
    "trace denoiser.slow float32": "denoiser.slow.float32.onnx",
    "write decoder": "decoder.safetensors",
    "trace decoder float32": "decoder.float32.onnx",
    "optimise cpu.text_encoder": "cpu.text_encoder.onnx",
    "share cpu.text_encoder": "cpu.text_encoder.onnx",
    **{f"optimise cpu.denoiser.{phase}": f"cpu.denoiser.{phase}.onnx" for phase in PHASES},
    "share cpu.denoiser": "cpu.denoiser.slow.onnx",
    "optimise cpu.decoder": "cpu.decoder.onnx",
    "share cpu.decoder": "cpu.decoder.onnx",
    "parity": "",
    "hash": "",
}
"""A build's stages in order, each with a file that is there when it is finished."""


@pytest.mark.parametrize(
    ("stage", "begun"),
    [
        ("write denoiser.base", "write denoiser.base"),
        ("trace denoiser.slow float32", "trace denoiser.slow float32"),
        ("share cpu.denoiser", "optimise cpu.denoiser.slow"),
        ("parity", "parity"),
        ("hash", "parity"),
    ],
)
def test_a_killed_build_leaves_no_half_artefact_and_goes_on_with_what_is_unfinished(
    home: Home, stage: str, begun: str
) -> None:
    """begun: what the killed build began with, so that it need not do all the work before."""
    advance(home, begun)
    process = start(home, kill_at=stage)
    children = result(process)["children"]
    assert process.returncode == -signal.SIGKILL
    assert children
    assert all(map(is_gone, children))
    assert not home.output.exists()
    workplace = home.output.parent / ".tiny.bundle.building"
    record = json.loads((workplace / "finished.json").read_text())
    finished = {name for names in record.values() for name in names}
    assert finished == set(os.listdir(workplace / "bundle"))
    order = list(MADE_BY)
    assert finished.issuperset(MADE_BY[done] for done in order[: order.index(begun)])
    assert home.stages() == [again for again in order if MADE_BY[again] not in finished]
    assert sorted(os.listdir(home.output.parent)) == BUILT
    Bundle.open(home.output).verify()


def test_of_two_builds_at_once_one_works_and_the_other_waits_for_it(home: Home) -> None:
    advance(home, "parity")  # nothing slow is left but to import PyTorch, twice
    results = [result(process) for process in [start(home), start(home)]]
    worker, waiter = sorted(results, key=lambda found: found["unchanged"])
    assert (worker["stages"], worker["unchanged"]) == (["parity", "hash"], False)
    assert (waiter["stages"], waiter["unchanged"]) == (["wait for another build of tiny.bundle", "check"], True)
    assert not HEAVY.intersection(worker["loaded"]), "a build leaves all that is heavy to its workers"
    assert sorted(os.listdir(home.output.parent)) == BUILT
    Bundle.open(home.output).verify()


def test_building_an_unchanged_recipe_again_imports_nothing_heavy(built: Home) -> None:
    found = result(start(built))
    assert (found["stages"], found["unchanged"]) == (["check"], True)
    assert not (HEAVY | {"onnx"}).intersection(found["loaded"])


def test_the_process_that_optimises_for_onnx_runtime_imports_no_torch(first: Home, tmp_path: Path) -> None:
    graphs = {"decoder": first.output / "decoder.float32.onnx"}
    with Worker("cpu.decoder") as worker:
        options: dict[str, Any] = {"group": "decoder", "directory": tmp_path}
        worker.call(backends.build, targets.load("cpu"), graphs, {"decoder": {}}, **options)
        loaded = worker.call(eval, "list(__import__('sys').modules)")
    assert "onnxruntime" in loaded
    assert not HEAVY.intersection(loaded)


def test_ctrl_c_ends_the_command_with_130_and_the_next_build_completes(home: Home) -> None:
    command = [sys.executable, "-c", "from glance_trt.cli.main import main; main()", "build", "tiny.yaml"]
    process = subprocess.Popen(
        [*command, "-o", str(home.output)],
        cwd=home.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets its background jobs ignore Ctrl-C, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    record = home.output.parent / ".tiny.bundle.building" / "finished.json"
    deadline = time.monotonic() + 300
    while not record.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # in the middle of the first export
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert os.listdir(home.output.parent) == [".tiny.bundle.building"]
    done = set(json.loads(record.read_text()))
    assert done
    home.build()
    Bundle.open(home.output).verify()
    assert done <= {entry.key for entry in Bundle.open(home.output).manifest.files.values()}
