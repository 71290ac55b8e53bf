"""What work will need of disk and memory, before it begins: hours of it should not end in a full disk.

The estimates are what is needed at least. Where their factors come from stands beside them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from glance_trt.errors import OutputError, TargetError

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_ANYWAY = "or go on regardless with --no-preflight"

# ONNX Runtime's optimised weights, relative to float32: what a kernel wants packed is stored plain and packed. Linear
# layers are, convolutions are not: 1.4 for the demonstration model's denoiser, 1.8 for that of Stable Diffusion 1.5.
_PACKED = 1.4
# While it optimises, ONNX Runtime holds a graph's weights in float32 both as they are and packed: 6.6 GB for 3.4.
_OPTIMISING = 2
# TensorRT-RTX 1.7 compiled 860 million parameters in float16, 1.7 GB, within 6.1 GB.
_COMPILING = 3.5
# The reference's weights in float32 are there twice while they are loaded.
_COMPARING = 2
# Tracing a model of that size and writing its weights, PyTorch included: 0.9 GB.
_EXPORTING = 900_000_000


@dataclass(frozen=True)
class Component:
    """The weights of a model's component: how many values each of its graphs has, how many its weights files hold for
    all of its graphs together, and their bytes."""

    values: int
    stored: int
    size: int


@dataclass(frozen=True)
class Engines:
    """What a target is going to make: `dtypes` are what each graph computes in, by the graph's name."""

    target: str
    backend: str
    dtypes: Mapping[str, str]


@dataclass(frozen=True)
class Need:
    """A stage, and the memory that it needs, bytes. instead: what can be done where there is less of it."""

    stage: str
    memory: int
    instead: str = f"build on a larger machine, {_ANYWAY}"


def disk(components: Mapping[str, Component], targets: Iterable[Engines]) -> int:
    """Bytes that a bundle takes while it is built, the most at a time.

    ONNX Runtime's engines for a CPU are drafts first, of each graph by itself, from which what graphs share is then
    stored once. Its engines for a GPU are the portable graphs.
    """
    finished, drafts = sum(component.size for component in components.values()), 0.0
    for target in targets:
        kinds = [_kind(graph) for graph in target.dtypes]
        if target.backend == "onnxruntime":
            finished += round(4 * _PACKED * sum(components[kind].stored for kind in set(kinds)))
            drafts = max(drafts, *(4 * _PACKED * components[kind].values * kinds.count(kind) for kind in kinds))
        elif target.backend != "onnxruntime-gpu":
            finished += sum(_BYTES[dtype] * components[_kind(graph)].values for graph, dtype in target.dtypes.items())
    return finished + round(drafts)


def memory(components: Mapping[str, Component], targets: Iterable[Engines], compared: int) -> Need:
    """The stage that needs the most memory. compared: the largest graph, bytes in float32, that parity loads."""
    needs = [Need("exporting the graphs", _EXPORTING)]
    for target in targets:
        for graph, dtype in target.dtypes.items():
            values = components[_kind(graph)].values
            if target.backend != "onnxruntime-gpu":
                factor = 4 * _OPTIMISING if target.backend == "onnxruntime" else _BYTES[dtype] * _COMPILING
                needs.append(Need(f"building {target.target}.{graph}", round(factor * values)))
            if 4 * values <= compared:
                needs.append(Need(f"comparing {graph} with PyTorch", 4 * _COMPARING * values))
    return max(needs, key=lambda need: need.memory)


def comparing(parts: Mapping[str, int], images: int) -> Need:
    """The stage of a comparison with PyTorch that needs the most. parts: the values of each of the model's, by name.
    images: how many whole ones diffusers makes, for which it holds the model."""
    if images:
        instead = "compare on a larger machine, or the graphs alone, with --images 0"
        return Need("comparing images with diffusers", 4 * sum(parts.values()), instead)
    largest = max(parts, key=lambda part: parts[part])
    return Need(f"comparing {largest} with PyTorch", 4 * parts[largest], "compare on a larger machine")


def timing(parts: Mapping[str, int], denoiser: str, phases: int) -> Need:
    """What diffusers needs as the peer of a bench, which holds the model twice: once to switch its LoRAs, and once with
    a denoiser more for each of so many phases with one. parts: as in `comparing`."""
    values = 2 * sum(parts.values()) + phases * parts[denoiser]
    return Need("timing diffusers", 4 * values, "compare on a larger machine, or time the bundle without --against")


def _kind(graph: str) -> str:
    """The component of a graph such as ``denoiser.slow``."""
    return graph.partition(".")[0]


def check_disk(place: Path, needed: int) -> None:
    """Raise `OutputError` where more bytes are needed at `place` than its disk has free."""
    folder = next(parent for parent in place.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{place}: building it takes at least {_shown(needed)} of disk, and {_shown(free)} are free; free some "
            f"space, give another -o or fewer targets, {_ANYWAY}"
        )


def check_memory(need: Need, free: int | None) -> None:
    """Raise `TargetError` where a stage needs more memory than is free, bytes; nothing where that is not known."""
    if free is not None and need.memory > free:
        raise TargetError(
            f"{need.stage} takes at least {_shown(need.memory)} of memory, and {_shown(free)} are free; end other "
            f"programs, add swap, {need.instead}"
        )


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can still have: of the machine, swap included, and of every control group that limits it.

    None where neither is known. The page cache counts as free.
    """
    return min([*_of_machine(proc), *_of_groups(proc, cgroups)], default=None)


def _of_machine(proc: Path) -> Iterator[int]:
    fields = _fields(proc / "meminfo")
    if "MemAvailable:" in fields:
        yield 1024 * (fields["MemAvailable:"] + fields.get("SwapFree:", 0))


def _of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of the process's groups and all above them, in both versions of control groups."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, usage = (
            (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else (cgroups, "memory.max", "memory.current")
        )
        # In a container the path may be one of the host, which is not there: then the root is the container's own.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (most := _number(folder / limit)) is not None and (used := _number(folder / usage)) is not None:
                stat = _fields(folder / "memory.stat")  # in version 1, a group's own has children under other names
                cache = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))
                yield max(0, most - used + cache)
            if folder == root:
                break


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number on each line; nothing where there is none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
