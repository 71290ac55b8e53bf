"""Where a recipe's model comes from: a folder, the Hub, or one file; and what is refused, in which words."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from glance_trt.build import build
from glance_trt.cli.schedule import written
from glance_trt.errors import ModelError, OutputError, RecipeError
from glance_trt.export import hub as hub_
from glance_trt.export import single_file
from glance_trt.export.model import Model, find
from glance_trt.export.weights import component_tensors
from glance_trt.recipe import Recipe

from ..models import checkpoints
from ..models.checkpoints import DENOISER, part, prefixed
from ..models.hub import Hub, Repository, files_of
from ..models.in_process import InProcess

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(single_file, "Worker", InProcess)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def home(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe's folder with the tiny model, and its denoiser alone in one file."""
    shutil.copytree(tiny_model, tmp_path / "model")
    save_file(prefixed(DENOISER, checkpoints.unet(*part(tiny_model, "unet"))), tmp_path / "unet.safetensors")
    return tmp_path


@pytest.fixture
def fetched(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the Hub is asked for; it has one model, whatever the name."""
    asked: list[Any] = []
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(tiny_model, snapshot)

    def fetch(repository: str, revision: str | None = None, *, parts: Any = None, **_: Any) -> Path:
        asked.append((repository, revision, parts))
        return snapshot

    monkeypatch.setattr(hub_, "fetch", fetch)
    return asked


def test_a_folder_comes_before_a_model_of_the_hub(
    home: Path, make_recipe: Callable[..., Recipe], fetched: list[Any]
) -> None:
    (home / "acme").mkdir()
    (home / "model").rename(home / "acme" / "tiny")
    assert find(make_recipe(model="acme/tiny"), home) == Model(home / "acme" / "tiny", "tiny")
    assert not fetched


def test_a_recipe_may_have_a_decoder_of_its_own(home: Path, make_recipe: Callable[..., Recipe]) -> None:
    found = find(make_recipe(model="unet.safetensors", config="model", decoder="tiny-decoder"), home)
    assert found.path("decoder") == home / "tiny-decoder"
    assert found.path("vae") == home / "model" / "vae"


def test_a_model_of_the_hub_is_named_with_its_commit(
    home: Path, make_recipe: Callable[..., Recipe], fetched: list[Any]
) -> None:
    found = find(make_recipe(model="acme/tiny", revision="v1"), home)
    assert found == Model(home / "snapshots" / COMMIT, f"acme/tiny@{COMMIT}")
    find(make_recipe(model="acme/tiny"), home, whole=False)
    assert fetched == [("acme/tiny", "v1", None), ("acme/tiny", None, ())]


def test_beside_one_file_the_folder_gives_what_it_lacks(home: Path, make_recipe: Callable[..., Recipe]) -> None:
    found = find(make_recipe(model="unet.safetensors", config="model"), home)
    assert found == Model(home / "model", "unet.safetensors", home / "unet.safetensors")
    assert {ref.file for ref in found.tensors("unet").values()} == {home / "unet.safetensors"}
    assert found.tensors("vae") == component_tensors(home / "model" / "vae")
    shutil.rmtree(home / "model" / "text_encoder")
    with pytest.raises(ModelError, match=r"unet\.safetensors: holds no text_encoder, and .*text_encoder: no weights"):
        found.tensors("text_encoder")


def test_beside_one_file_the_hub_gives_what_it_lacks(
    home: Path, make_recipe: Callable[..., Recipe], fetched: list[Any]
) -> None:
    recipe = make_recipe(model="unet.safetensors", config="acme/tiny", revision="v1")
    found = find(recipe, home)
    assert found.name == f"unet.safetensors with acme/tiny@{COMMIT}"
    assert (found.folder, found.file) == (home / "snapshots" / COMMIT, home / "unet.safetensors")
    assert fetched == [
        ("acme/tiny", "v1", ()),
        ("acme/tiny", COMMIT, ["scheduler", "text_encoder", "tokenizer", "vae"]),
    ]
    find(recipe, home, whole=False)
    assert fetched[2:] == [("acme/tiny", "v1", ())]


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            {"model": "no"},
            ModelError,
            r"/no: no such folder, and no id of a model on the Hub, as in organisation/name$",
        ),
        ({"model": "./a/b"}, ModelError, r"/a/b: no such folder, and no id"),
        ({"model": "no.safetensors"}, ModelError, r"/no\.safetensors: no such file$"),
        ({"model": "a/no.safetensors"}, ModelError, r"/no\.safetensors: no such file$"),
        (
            {"model": "unet.onnx"},
            ModelError,
            r"/unet\.onnx: not a model; expected a folder .*, or a \.safetensors file",
        ),
        ({"model": "unet.safetensors"}, RecipeError, r"^config: missing; a checkpoint in one file needs a folder"),
        ({"model": "unet.safetensors", "config": "no"}, ModelError, r"/no: no such folder, and no id"),
        (
            {"model": "unet.safetensors", "config": "model", "revision": "v1"},
            RecipeError,
            r"^revision: belongs to a model on the Hub, and config is a folder, .*/model; leave it out$",
        ),
        (
            {"model": "model", "revision": "v1"},
            RecipeError,
            r"^revision: belongs to a model on the Hub, and the model is a folder, .*/model; leave it out$",
        ),
        (
            {"model": "model", "config": "model"},
            RecipeError,
            r"^config: belongs to a checkpoint in one file, and the model is a folder, .*/model; leave it out$",
        ),
        (
            {"model": "acme/tiny", "config": "model"},
            RecipeError,
            r"^config: belongs to a checkpoint in one file, and the model is acme/tiny; leave it out$",
        ),
    ],
)
def test_what_cannot_be_a_model_is_refused(
    keys: dict[str, str], error: type[Exception], message: str, home: Path, make_recipe: Callable[..., Recipe]
) -> None:
    (home / "unet.onnx").write_bytes(b"onnx")
    with pytest.raises(error, match=message):
        find(make_recipe(**keys), home)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_the_command_that_a_refused_pickle_names_converts_it(
    suffix: str, home: Path, make_recipe: Callable[..., Recipe]
) -> None:
    tensors = load_file(home / "unet.safetensors")
    pickled = home / f"it's a checkpoint{suffix}"
    with pytest.raises(ModelError, match=r"it's a checkpoint\.\w+: no such file$"):
        find(make_recipe(model=pickled.name, config="model"), home)
    torch.save({"state_dict": tensors, "epoch": 3}, pickled)
    with pytest.raises(ModelError, match=r"weights in a pickle, which can run code when it is read") as error:
        find(make_recipe(model=pickled.name, config="model"), home)
    run(str(error.value).partition("convert it:\n  ")[2])
    converted = pickled.with_suffix(".safetensors")
    assert load_file(converted).keys() == tensors.keys()
    found = find(make_recipe(model=converted.name, config="model"), home).tensors("unet")
    expected = component_tensors(home / "model" / "unet")
    assert {name: ref.read().tolist() for name, ref in found.items()} == {
        name: ref.read().tolist() for name, ref in expected.items()
    }


def test_the_command_that_a_folder_of_pickles_names_saves_it_again(
    home: Path, make_recipe: Callable[..., Recipe]
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(home / "model", dtype=torch.float32)
    pipeline.save_pretrained(home / "pickled", safe_serialization=False)
    if not any((home / "pickled" / "text_encoder").glob("*.bin")):  # transformers 5 writes no pickles any more
        torch.save(pipeline.text_encoder.state_dict(), home / "pickled" / "text_encoder" / "pytorch_model.bin")
        (home / "pickled" / "text_encoder" / "model.safetensors").unlink()
    found = find(make_recipe(model="pickled"), home)
    for name in ("unet", "text_encoder"):
        with pytest.raises(ModelError, match=rf"pickled/{name}/\w+\.bin: weights in a pickle") as error:
            found.tensors(name)
    run(str(error.value).partition("convert it:\n  ")[2])
    found = find(make_recipe(model="pickled-safe"), home)
    assert torch.equal(found.tensors("unet")["conv_in.weight"].read(), pipeline.unet.conv_in.weight)


def run(command: str) -> None:
    """Run a Python command that an error names, as a shell would."""
    python, *arguments = shlex.split(command)
    assert python == "python"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)


def test_what_needs_a_folder_names_the_command_that_makes_one(home: Path, make_recipe: Callable[..., Recipe]) -> None:
    assert find(make_recipe(model="model"), home).whole_folder() == home / "model"
    found = find(make_recipe(model="unet.safetensors", config="model"), home)
    with pytest.raises(ModelError, match=r"a checkpoint in one file, and this needs a folder; make one") as error:
        found.whole_folder()
    run(str(error.value).partition("in the recipe:\n  ")[2])
    made = StableDiffusionPipeline.from_pretrained(home / "unet", dtype=torch.float16)
    expected = StableDiffusionPipeline.from_pretrained(home / "model", dtype=torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        state = getattr(expected, name).state_dict()
        for key, value in getattr(made, name).state_dict().items():
            assert torch.equal(value, state[key])
    with pytest.raises(OutputError, match=r"/unet: exists; give another folder"):
        found.save(home / "unet")


def test_a_build_of_one_file_makes_the_weights_of_a_folder(
    home: Path, traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glance_trt.export.trace.trace", traced)
    for module in ("build", "compiling"):
        monkeypatch.setattr(f"glance_trt.{module}.Worker", InProcess)
    recipe: dict[str, Any] = {"name": "tiny", "height": 16, "width": 16, "phases": [{"name": "all", "steps": [1, 50]}]}
    bundles = []
    for name, keys in {"folder": {"model": "model"}, "one": {"model": "unet.safetensors", "config": "model"}}.items():
        (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe | keys))
        bundles.append(build(str(home / f"{name}.yaml"), home / f"{name}.bundle").bundle)
    of_folder, of_file = (bundle.manifest for bundle in bundles)
    assert (of_folder.provenance.model, of_file.provenance.model) == ("model", "unet.safetensors")
    for name in ("denoiser.base.safetensors", "text_encoder.safetensors", "decoder.safetensors"):
        assert of_file.files[name].sha256 == of_folder.files[name].sha256
    again = build(str(home / "one.yaml"), home / "one.bundle")
    assert again.unchanged


def test_parts_are_those_that_the_index_names(home: Path) -> None:
    file = home / "model" / "model_index.json"
    index = json.loads(file.read_text()) | {"image_encoder": [None, None], "requires_safety_checker": False}
    file.write_text(json.dumps(index))
    model = Model(home / "model", "model")
    assert model.has("unet")
    assert not model.has("image_encoder")
    assert not model.has("requires_safety_checker")
    assert not model.has("_class_name")
    file.write_text(json.dumps(index | {"unet": ["diffusers"]}))
    with pytest.raises(
        ModelError, match=r"model_index\.json: unet: expected a library and a class, got \['diffusers'\]"
    ):
        model.has("unet")
    file.write_text("[]")
    with pytest.raises(ModelError, match=r"model_index\.json: expected a JSON object"):
        model.index()
    file.write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json: not readable"):
        model.index()
    file.unlink()
    with pytest.raises(ModelError, match=r"model: not a diffusers pipeline folder, it has no model_index\.json"):
        model.index()
    (home / "model" / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"model/vae: missing, with its config\.json"):
        model.config("vae")


def test_a_searched_recipe_keeps_the_id_of_its_model(home: Path, make_recipe: Callable[..., Recipe]) -> None:
    from glance_trt.distill.search import Knots

    knots, place = Knots((1, 50), 0.0, 1), home / "out" / "found.yaml"
    content = yaml.safe_load(written(make_recipe(model="acme/tiny", revision="v1"), home, knots, place))
    assert (content["model"], content["revision"]) == ("acme/tiny", "v1")
    recipe = make_recipe(model="unet.safetensors", config="model")
    content = yaml.safe_load(written(recipe, home, knots, place))
    assert (content["model"], content["config"]) == ("../unet.safetensors", "../model")
    content = yaml.safe_load(written(make_recipe(model="unet.safetensors", config="acme/tiny"), home, knots, place))
    assert content["config"] == "acme/tiny"


def test_a_schedule_needs_no_weights_of_the_hub(tiny_model: Path, tmp_path: Path) -> None:
    """The whole way, from the command to the Hub's server; then again without it."""
    recipe = {"name": "tiny", "model": "acme/tiny", "height": 16, "width": 16}
    recipe["phases"] = [{"name": "all", "steps": [1, 50]}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", "from glance_trt.cli.main import main; main()", "schedule", "tiny.yaml"]
    with Hub({"acme/tiny": Repository(files_of(tiny_model))}) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        online = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert online.returncode == 0, online.stderr
        assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]
        assert "unet/config.json" in hub.downloaded()
    environment["HF_HUB_OFFLINE"] = "1"
    offline = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (offline.returncode, offline.stdout) == (0, online.stdout)
    shutil.rmtree(tmp_path / "home")
    missing = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert missing.returncode == ModelError.exit_code
    assert missing.stderr.startswith("error: acme/tiny: not in the Hub's cache")
    assert missing.stdout == ""
