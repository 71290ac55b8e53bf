"""What a build starts from: a recipe, its model's tensors and its LoRAs, read without PyTorch, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from glance_trt import __version__, hashing, strict
from glance_trt.export import fuse, lora, phases
from glance_trt.export.families import Family, from_recipe
from glance_trt.export.lora import Lora, Pair, Rows
from glance_trt.export.weights import Fused, TensorRef
from glance_trt.preflight import Component
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Recipe
from glance_trt.schema import Schedule
from glance_trt.staging import key_of

_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors")


@dataclass(frozen=True)
class Inputs:
    """`folder` is the recipe's. `tensors` are the model's, by component; `loras` the phases', `encoders` what they
    change in the text encoders. `tools`: versions of what traces, which graphs depend on."""

    recipe: Recipe
    folder: Path
    family: Family
    tensors: dict[str, dict[str, TensorRef]]
    loras: dict[str, Lora | None]
    encoders: dict[str, dict[str, Pair]]
    tools: dict[str, str]

    def graphs(self, kind: str) -> list[str]:
        """The names of the graphs that a component makes."""
        return [f"{kind}.{phase.name}" for phase in self.recipe.phases] if kind == "denoiser" else [kind]

    def changes(self) -> dict[str, Mapping[str, Pair]]:
        """What LoRAs change, by graph and weight; graphs that none changes are left out."""
        phases = {f"denoiser.{phase}": item.pairs for phase, item in self.loras.items() if item and item.pairs}
        return {**phases, **self.encoders}

    def components(self) -> dict[str, Component]:
        """How large the model's components are, less guides, and with the tensors that no graph uses."""
        sizes = {}
        for kind, tensors in self.tensors.items():
            stored = list(tensors.values())
            if kind == "denoiser":
                files = fuse.plan(tensors, self.loras).values()
                stored = [item.base if isinstance(item, Fused) else item for file in files for item in file.values()]
            values = sum(ref.size for ref in tensors.values())
            sizes[kind] = Component(values, sum(ref.size for ref in stored), sum(ref.length for ref in stored))
        return sizes

    def parts(self) -> dict[str, int]:
        """How many values each part of the model has; an image's encoder and its decoder may be one part."""
        components = self.family.components
        return {components[kind]: sum(ref.size for ref in tensors.values()) for kind, tensors in self.tensors.items()}

    def source_key(self, kind: str) -> str:
        """The key of a component's weights, with what LoRAs change in a text encoder."""
        files = sorted({ref.file for ref in self.tensors[kind].values()})
        pairs = self.encoders.get(kind, {})
        changed = {name: [pair.scale, _digest(pair.down), _digest(pair.up)] for name, pair in pairs.items()}
        with ThreadPoolExecutor() as pool:  # a thread per shard
            return key_of(list(pool.map(hashing.sha256_of_file, files)), changed)

    def phase_key(self, phase: str) -> str:
        """The key of what a phase changes in the denoiser's weights, and adds to them."""
        lora = self.loras[phase]
        guide = next(item.guide for item in self.recipe.phases if item.name == phase)
        files = [*([lora.file] if lora else []), *([self.folder / guide] if guide else [])]
        scales = {name: pair.scale for name, pair in lora.pairs.items()} if lora else {}
        # A guide that is missing is refused where it is read.
        return key_of([hashing.sha256_of_file(file) for file in files if file.is_file()], scales)

    def key(self) -> dict[str, Any]:
        """What the whole bundle depends on: contents of files, and what the recipe says but for their places.

        Raises `BundleError` for a file that cannot be read.
        """
        files = [(path.name, hashing.sha256_of_file(path)) for path in self.family.files()]
        return {
            "recipe": strict.write(_without_places(self.recipe)),
            "model": [self.family.model.name, files],
            "weights": {kind: self.source_key(kind) for kind in self.tensors},
            "phases": [self.phase_key(phase.name) for phase in self.recipe.phases],
            "tools": self.tools,
        }

    def notes(self, schedule: Schedule) -> tuple[str, ...]:
        """What a user should know of the LoRAs: whose scale was guessed, and which was trained for other steps."""
        notes = []
        for phase in self.recipe.phases:
            item = self.loras[phase.name]
            if not item or not phase.lora:
                continue
            pairs = [pair for part in (item.pairs, *item.encoders.values()) for pair in part.values()]
            if phase.lora.scale is None and any(pair.alpha is None for pair in pairs):
                notes.append(
                    f"{item.file} gives no alpha; its scale is taken as {item.scale:g}. If it was trained at alpha / "
                    "rank, set 'scale' beside the file in the recipe"
                )
            runs = {step.timestep for step in schedule.steps if step.phase == phase.name}
            if strange := sorted(runs - set(item.timesteps or runs), reverse=True):
                notes.append(
                    f"{item.file} was not trained at timesteps {', '.join(f'{timestep:g}' for timestep in strange)} of "
                    f"phase {phase.name}. Train it for this recipe: glance-trt distill"
                )
        return tuple(notes)


def read(recipe: Recipe, folder: Path, progress: Progress = silent) -> Inputs:
    """Read the model and the LoRAs of a recipe in `folder`; progress is that of a download.

    Raises `ModelError`, `LoraError` and `RecipeError`, and `ModuleNotFoundError` for a tool that is not installed.
    """
    tools = {name: metadata.version(name) for name in _TOOLS} | {"glance-trt": __version__}
    for phase in recipe.phases:  # before a model of many gigabytes is downloaded
        if phase.lora:
            lora.check_exists(folder / phase.lora.file)
    family = from_recipe(recipe, folder, progress)
    tensors = {kind: family.model.tensors(part) for kind, part in family.components.items()}
    loras = phases.loras(recipe, folder, tensors)
    return Inputs(recipe, folder, family, tensors, loras, phases.encoders(loras), tools)


def _digest(factor: TensorRef | Rows) -> str:
    return hashing.sha256_of_bytes(factor.read_bytes())


def _without_places(recipe: Recipe) -> Recipe:
    """The recipe less what makes no difference to the graphs, with files by their names alone."""
    named = tuple(
        replace(
            phase,
            lora=phase.lora and replace(phase.lora, file=Path(phase.lora.file).name),
            guide=phase.guide and Path(phase.guide).name,
        )
        for phase in recipe.phases
    )
    decoder = recipe.decoder and Path(recipe.decoder).name
    nowhere = replace(recipe, model="", revision=None, config=None, decoder=decoder)
    return replace(nowhere, phases=named, engines=("",), examples=(), distill=None)
