"""A model in diffusers' layout: its configurations, its tokenizers, and where its tensors lie. Read without PyTorch.

It is a folder, the id of one on the Hugging Face Hub, or a checkpoint in one file with the configurations of a folder.

``python -m glance_trt.export.model FILE CONFIG FOLDER`` makes a folder of the last.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glance_trt.errors import GlanceError, ModelError, OutputError, RecipeError
from glance_trt.export import hub, index, pickles, single_file, weights
from glance_trt.export.weights import TensorRef, component_tensors
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Recipe


@dataclass(frozen=True)
class Model:
    """A model's folder; `name` is what a bundle calls it. `file`: a checkpoint whose weights go before the folder's.
    `decoder`: a folder of its own for the part ``decoder``, which takes the place of the VAE's."""

    folder: Path
    name: str
    file: Path | None = None
    decoder: Path | None = None

    def path(self, part: str) -> Path:
        """The folder of a part, such as ``unet`` or ``tokenizer``, which need not exist."""
        return self.decoder if self.decoder and part == "decoder" else self.folder / part

    def has(self, part: str) -> bool:
        """Whether the pipeline has a part: its index may name one that was left out."""
        return part in self.classes()

    def classes(self) -> dict[str, str]:
        """The class of each part that the pipeline has. Raises `ModelError`."""
        return index.classes(self.folder)

    def index(self) -> dict[str, Any]:
        """The content of model_index.json. Raises `ModelError`."""
        return index.read(self.folder)

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part. Raises `ModelError`."""
        file = self.config_file(part)
        return index.read_json(file, f"{file.parent}: missing, with its {file.name}; copy or download it too")

    def config_file(self, part: str) -> Path:
        """The file of a part's configuration."""
        return self.path(part) / ("scheduler_config.json" if part == "scheduler" else "config.json")

    def tensors(self, part: str) -> dict[str, TensorRef]:
        """Where the tensors of a part lie, by name. Raises `ModelError`."""
        if self.file is None:
            return component_tensors(self.path(part))
        held = self._held(self.file)
        if part in held:
            return single_file.tensors(self.file, part, held, {name: self.config(name) for name in held})
        try:
            return component_tensors(self.path(part))
        except ModelError as error:
            raise ModelError(f"{self.file}: holds no {part}, and {error}") from None

    def whole_folder(self) -> Path:
        """The folder, for what reads a model through diffusers. Raises `ModelError` where weights are in one file."""
        if self.file is None:
            return self.folder
        module, target = "glance_trt.export.model", self.file.with_suffix("")
        command = shlex.join(["python", "-m", module, str(self.file), str(self.folder), str(target)])
        raise ModelError(
            f"{self.file}: a checkpoint in one file, and this needs a folder; make one, and name it in the recipe:\n  "
            f"{command}"
        )

    def save(self, target: Path) -> None:
        """Write a folder in diffusers' layout that has all weights. Raises `ModelError`, and `OutputError` where it
        exists."""
        if target.exists():
            raise OutputError(f"{target}: exists; give another folder")
        held = self._held(self.file) if self.file else {}
        draft = target.with_name(f"{target.name}.draft")
        weights_of_held = (f"{part}/*{kind}*" for part in held for kind in (".safetensors", ".bin"))
        replaced = {path for pattern in weights_of_held for path in self.folder.glob(pattern)}
        try:
            shutil.copytree(
                self.folder,
                draft,
                ignore=lambda place, names: [name for name in names if Path(place, name) in replaced],
            )
            for part in held:
                stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
                weights.write(draft / part / f"{stem}.safetensors", self.tensors(part))
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _held(self, file: Path) -> dict[str, single_file.Layout]:
        return single_file.layouts(file, self.classes())


def find(recipe: Recipe, folder: Path, progress: Progress = silent, *, whole: bool = True) -> Model:
    """The model of a recipe in `folder`; downloaded where the recipe names one on the Hub that is not in its cache.

    whole: whether its weights will be needed, not its configurations, scheduler and tokenizers alone. Raises
    `ModelError`, and `RecipeError` where the recipe's keys do not fit together.
    """
    found = _find(recipe, folder, progress, whole)
    return replace(found, decoder=folder / recipe.decoder) if recipe.decoder else found


def _find(recipe: Recipe, folder: Path, progress: Progress, whole: bool) -> Model:
    path = folder / recipe.model
    if path.is_dir():
        for key in ("revision", "config"):
            if getattr(recipe, key):
                raise RecipeError(f"{key}: belongs to {_KEYS[key]}, and the model is a folder, {path}; leave it out")
        return Model(path, path.resolve().name)
    if path.suffix in pickles.SUFFIXES:
        raise pickles.refused(path, pickles.converted(path)) if path.is_file() else ModelError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _in_one_file(recipe, folder, progress, whole)
    if path.exists():
        raise ModelError(f"{path}: not a model; expected a folder in diffusers' layout, or a .safetensors file")
    if recipe.config:
        raise RecipeError(f"config: belongs to {_KEYS['config']}, and the model is {recipe.model}; leave it out")
    if not hub.is_id(recipe.model):
        raise ModelError(f"{path}: no such folder, and no id of a model on the Hub, as in organisation/name")
    parts = None if whole else ()
    found = hub.fetch(recipe.model, recipe.revision, parts=parts, instead_of=path, progress=progress)
    return Model(found, _at_commit(recipe.model, found))


_KEYS = {"revision": "a model on the Hub", "config": "a checkpoint in one file"}


def _in_one_file(recipe: Recipe, folder: Path, progress: Progress, whole: bool) -> Model:
    """The configurations come from a folder, or from the Hub with the weights that the file does not hold."""
    file = folder / recipe.model
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    if not recipe.config:
        raise RecipeError(
            "config: missing; a checkpoint in one file needs a folder in diffusers' layout, or the id of one on the "
            "Hub, with the model's configurations, scheduler and tokenizers"
        )
    path = folder / recipe.config
    if path.is_dir():
        if recipe.revision:
            raise RecipeError(f"revision: belongs to {_KEYS['revision']}, and config is a folder, {path}; leave it out")
        return Model(path, file.name, file)
    if path.exists() or not hub.is_id(recipe.config):
        raise ModelError(f"{path}: no such folder, and no id of a model on the Hub, as in organisation/name")
    found = hub.fetch(recipe.config, recipe.revision, parts=(), instead_of=path, progress=progress)
    if whole:
        classes = index.classes(found)
        lacking = sorted(classes.keys() - single_file.layouts(file, classes))
        hub.fetch(recipe.config, found.name, parts=lacking, instead_of=path, progress=progress)
    return Model(found, f"{file.name} with {_at_commit(recipe.config, found)}", file)


def _at_commit(repository: str, snapshot: Path) -> str:
    return f"{repository}@{snapshot.name}"


if __name__ == "__main__":
    try:
        _file, _config, _folder = map(Path, sys.argv[1:])
        Model(_config, _file.name, _file).save(_folder)
    except GlanceError as error:
        sys.exit(f"error: {error}")
