"""What is asked of TensorRT, and in which order; no plan is run here, for want of a GPU.

A stand-in module plays TensorRT. That the calls exist in the real ones, with these arguments, is tested against their
type stubs (tests/engines).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glance_trt import records
from glance_trt.bundle import EngineSet
from glance_trt.errors import InputError, TargetError
from glance_trt.runtime.runners.device import Spec
from glance_trt.runtime.runners.tensorrt import TensorRTEngine

RANGES = [
    {"latents": ((1, 4, 8, 8), (1, 4, 8, 8), (2, 4, 16, 16)), "timestep": ((), (), ())},
    {"latents": ((3, 4, 8, 8), (4, 4, 8, 8), (8, 4, 8, 8)), "timestep": ((), (), ())},
]
SHAPES = {"latents": (2, 4, 16, 16), "timestep": ()}


class Journal(list[tuple[Any, ...]]):
    """What the stand-in was asked. `fails`: names of methods that say no."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: set[str] = set()


def stand_in(journal: Journal, *, streamable: int = 0, capturable: bool | None = True) -> ModuleType:
    """A module like tensorrt_rtx; without `capturable`, like tensorrt, which has no runtime cache either."""

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def say(severity: int, text: str) -> None:
        journal.logger.log(severity, text)  # type: ignore[attr-defined]

    class Context:
        def __init__(self) -> None:
            if capturable is not None:
                self.is_stream_capturable = lambda stream: bool(journal.append(("ask", stream))) or capturable

        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                journal.append((name, *arguments))
                if name in journal.fails:
                    say(1, f"{name} fails\n")
                    say(2, "only a warning")
                    return False
                return True

            return call

        def infer_shapes(self) -> list[str]:
            return []

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (2, 4, 16, 16)

        def update_device_memory_size_for_shapes(self) -> int:
            return 4096

    class Cache:
        def deserialize(self, blob: bytes) -> bool:
            journal.append(("cache", blob))
            return True

        def serialize(self) -> bytes:
            return b"kernels"

    class Config:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            if name == "create_runtime_cache":
                return Cache
            return lambda *arguments: journal.append((name, *arguments))

        def __setattr__(self, name: str, value: Any) -> None:
            journal.append((name, value))

    class Engine:
        num_io_tensors, num_optimization_profiles = 3, len(RANGES)
        streamable_weights_size, weight_streaming_budget_v2 = streamable, -1

        def get_tensor_name(self, index: int) -> str:
            return ("latents", "timestep", "latents_out")[index]

        def get_tensor_mode(self, name: str) -> str:
            return "out" if name == "latents_out" else "in"

        def get_tensor_dtype(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(name="FLOAT")

        def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
            return RANGES[profile][name]

        def get_weight_streaming_automatic_budget(self) -> int:
            return 1234

        def create_runtime_config(self) -> Config:
            return Config()

        def create_execution_context(self, config: Config) -> Context:
            return Context()

    class Runtime:
        def __init__(self, logger: Any) -> None:
            journal.logger = logger  # type: ignore[attr-defined]
            journal.runtime = self  # type: ignore[attr-defined]

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            if plan == b"garbage":
                say(1, "header mismatch")
                return None
            journal.engine = Engine()  # type: ignore[attr-defined]
            return journal.engine  # type: ignore[attr-defined, no-any-return]

    module = ModuleType("stand_in")
    module.__version__ = "1.7"  # type: ignore[attr-defined]
    module.ILogger, module.Runtime = Logger, Runtime  # type: ignore[attr-defined]
    module.TensorIOMode = SimpleNamespace(INPUT="in")  # type: ignore[attr-defined]
    module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")  # type: ignore[attr-defined]
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")  # type: ignore[attr-defined]
    return module


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def start(journal: Journal, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., TensorRTEngine]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def start(
        plan: bytes = b"plan", budget: int | None = None, requires: dict[str, str] | None = None, **options: Any
    ) -> TensorRTEngine:
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, stand_in(journal, **options))
        backend: Any = "tensorrt" if options.get("capturable", True) is None else "tensorrt-rtx"
        engines = EngineSet(backend, "float16", {}, requires or {}, weight_streaming_budget=budget)
        return TensorRTEngine(engines, plan, name="denoiser.slow", device=SimpleNamespace(stream=99))

    return start


def test_ports_are_the_plan_s_own(start: Callable[..., TensorRTEngine]) -> None:
    engine = start()
    assert engine.inputs == {"latents": np.dtype("float32"), "timestep": np.dtype("float32")}
    assert engine.outputs == ("latents_out",)


def test_a_context_gets_profile_and_shapes_and_has_no_memory_of_its_own(
    start: Callable[..., TensorRTEngine], journal: Journal
) -> None:
    binding = start().bind(SHAPES)
    assert ("set_execution_context_allocation_strategy", "user") in journal
    assert journal[-3:] == [
        ("set_optimization_profile_async", 0, 99),
        ("set_input_shape", "latents", (2, 4, 16, 16)),
        ("set_input_shape", "timestep", ()),
    ]
    assert binding.outputs == {"latents_out": Spec((2, 4, 16, 16), np.dtype("float32"))}
    assert binding.scratch == 4096


def test_the_first_profile_that_takes_the_shapes_is_chosen(
    start: Callable[..., TensorRTEngine], journal: Journal
) -> None:
    start().bind({"latents": (5, 4, 8, 8), "timestep": ()})
    assert ("set_optimization_profile_async", 1, 99) in journal


def test_shapes_that_no_profile_takes_are_refused_with_those_they_take(start: Callable[..., TensorRTEngine]) -> None:
    takes = r"this engine takes \(1\.\.2,4,8\.\.16,8\.\.16\) or \(3\.\.8,4,8,8\)\."
    with pytest.raises(InputError, match=rf"^denoiser\.slow: got latents \(2,4,96,96\); {takes}"):
        start().bind({"latents": (2, 4, 96, 96), "timestep": ()})
    with pytest.raises(InputError, match=r"got latents \(4,8,8\);"):
        start().bind({"latents": (4, 8, 8), "timestep": ()})


def test_shapes_that_only_different_profiles_take_are_refused(
    start: Callable[..., TensorRTEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RANGES[1], "timestep", ((1,), (1,), (1,)))
    with pytest.raises(InputError, match="none of its optimization profiles takes these shapes together"):
        start().bind({"latents": (2, 4, 8, 8), "timestep": (1,)})


def test_a_run_sets_every_address_and_the_shared_memory(start: Callable[..., TensorRTEngine], journal: Journal) -> None:
    binding = start().bind(SHAPES)
    journal.clear()
    binding.enqueue({"latents": 1, "timestep": 2, "latents_out": 3}, 512)
    assert journal == [
        ("set_tensor_address", "latents", 1),
        ("set_tensor_address", "timestep", 2),
        ("set_tensor_address", "latents_out", 3),
        ("set_device_memory", 512, 4096),
        ("execute_async_v3", 99),
    ]


def test_what_tensorrt_says_is_in_the_error(start: Callable[..., TensorRTEngine], journal: Journal) -> None:
    with pytest.raises(TargetError, match=r"^denoiser\.slow: TensorRT-RTX 1\.7 cannot open its plan: header mismatch$"):
        start(b"garbage")
    binding = start().bind(SHAPES)
    journal.fails = {"execute_async_v3"}
    with pytest.raises(TargetError, match=r"^denoiser\.slow: could not run: execute_async_v3 fails$"):
        binding.enqueue({}, 0)
    journal.fails = {"set_optimization_profile_async"}
    with pytest.raises(TargetError, match=r"profile 0 cannot be set: set_optimization_profile_async fails$"):
        start().bind(SHAPES)


@pytest.mark.parametrize(("says", "expected"), [(True, True), (False, False), (None, True)])
def test_rtx_is_asked_whether_its_stream_can_be_captured(
    start: Callable[..., TensorRTEngine], journal: Journal, says: bool | None, expected: bool
) -> None:
    assert start(capturable=says).bind(SHAPES).capturable() is expected
    assert (("ask", 99) in journal) is (says is not None)


def test_kernels_compiled_here_are_kept_for_the_next_process(
    start: Callable[..., TensorRTEngine], journal: Journal
) -> None:
    start(b"one plan").close()
    assert not [entry for entry in journal if entry[0] == "cache"]
    (file,) = (records.folder() / "runtime-cache").iterdir()
    assert (file.read_bytes(), file.stat().st_mode & 0o77) == (b"kernels", 0)
    start(b"one plan")
    assert ("cache", b"kernels") in journal
    start(b"another plan")
    assert len([entry for entry in journal if entry[0] == "cache"]) == 1
    start(capturable=None).close()
    assert len(list((records.folder() / "runtime-cache").iterdir())) == 1, "TensorRT has none"


@pytest.mark.parametrize(
    ("streamable", "budget", "expected"), [(0, None, -1), (9000, None, 1234), (9000, 500, 500 << 20)]
)
def test_streamed_weights_get_a_budget(
    start: Callable[..., TensorRTEngine], journal: Journal, streamable: int, budget: int | None, expected: int
) -> None:
    start(budget=budget, streamable=streamable)
    assert journal.engine.weight_streaming_budget_v2 == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize(("version", "allowed"), [("10.13+", True), ("10.13.0.35", False)])
def test_only_a_version_compatible_plan_may_bring_code_of_the_host_s(
    start: Callable[..., TensorRTEngine], journal: Journal, version: str, allowed: bool
) -> None:
    start(requires={"tensorrt": version})
    assert journal.runtime.engine_host_code_allowed is allowed  # type: ignore[attr-defined]
