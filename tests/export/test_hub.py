"""Models of the Hub: a server of this machine takes its place, and each download runs in a process of its own, for the
library reads its environment when it is imported."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glance_trt.errors import ModelError
from glance_trt.export import hub as hub_
from glance_trt.export.weights import component_tensors
from glance_trt.progress import silent
from glance_trt.worker import Worker

from ..models.hub import Hub, Repository, files_of

ACME = "acme/tiny"
SMALL = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "vae/config.json",
]
WEIGHTS = [
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    """A Hub with the tiny model under acme/tiny, and beside it all that such repositories also hold."""
    files = files_of(tiny_model)
    unet = "unet/diffusion_pytorch_model"
    other = {
        "README.md": b"# tiny",
        "tiny.safetensors": b"the whole model in one file",
        "tiny.ckpt": b"pickle",
        f"{unet}.bin": b"pickle",
        f"{unet}.fp16.safetensors": b"half",
        f"{unet}.fp16.bin": b"pickle",
        f"{unet}.non_ema.safetensors": b"other",
        "text_encoder/pytorch_model.bin": b"pickle",
        "text_encoder/flax_model.msgpack": b"flax",
        "unet/flax_model.msgpack": b"flax",
        "unet/model.onnx": b"onnx",
        "vae_decoder/model.onnx": b"onnx",
        "vae_decoder/config.json": b"{}",
        "safety_checker/model.safetensors": b"large",
        "safety_checker/config.json": b"{}",
    }
    index = json.loads(files["model_index.json"]) | {"safety_checker": [None, None]}
    files["model_index.json"] = json.dumps(index).encode()
    with Hub({ACME: Repository(files | other)}) as server:
        yield server


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Callable[..., Path]:
    """`hub.fetch` in a process of its own, with a cache of the test's; options in capitals are its environment."""

    def call(*arguments: Any, progress: Any = silent, **options: Any) -> Path:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
        }
        environment |= {key: options.pop(key) for key in list(options) if key.isupper()}
        with Worker("hub", environment) as worker:
            return worker.call(hub_.fetch, *arguments, progress=progress, **options)

    return call


def present(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_only_what_a_build_reads_is_downloaded_and_only_once(
    hub: Hub, fetch: Callable[..., Path], tiny_model: Path
) -> None:
    reports: list[tuple[str, float, float]] = []
    folder = fetch(ACME, progress=lambda *report: reports.append(report))
    assert folder.name == hub.repositories[ACME].commit
    assert hub.downloaded() == present(folder) == sorted(SMALL + WEIGHTS)
    for part in ("unet", "vae", "text_encoder"):
        found, expected = component_tensors(folder / part), component_tensors(tiny_model / part)
        assert {name: ref.read().tolist() for name, ref in found.items()} == {
            name: ref.read().tolist() for name, ref in expected.items()
        }
    # Progress: first the small files, then the weights; each from nothing to all bytes.
    stages = {name for name, _, _ in reports}
    assert stages == {f"download {ACME}"}
    starts = [i for i, (_, done, _) in enumerate(reports) if done == 0]
    sizes = [sum((tiny_model / name).stat().st_size for name in names) for names in (SMALL[1:], WEIGHTS)]
    for start, end, size in zip(starts, [*starts[1:], len(reports)], sizes, strict=True):
        done = [report[1] for report in reports[start:end]]
        assert done == sorted(done)
        assert {report[2] for report in reports[start:end]} == {done[-1]} == {size}
    before = len(hub.requests)
    assert fetch(ACME) == folder
    assert [path for _, path, _ in hub.requests[before:]] == [f"/api/models/{ACME}/revision/main"]
    assert fetch(ACME, folder.name) == folder
    assert len(hub.requests) == before + 1, "a commit needs no look-up"


def test_a_process_looks_up_only_once(hub: Hub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    with Worker("hub", environment) as worker:
        folder = worker.call(hub_.fetch, ACME)
        before = len(hub.requests)
        assert worker.call(hub_.fetch, ACME) == folder
    assert len(hub.requests) == before


def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(hub: Hub, fetch: Callable[..., Path]) -> None:
    """The library keeps what came in blocks of ten megabytes."""
    files, name, block = hub.repositories[ACME].files, "unet/diffusion_pytorch_model.safetensors", 10 << 20
    files[name] = random.Random(0).randbytes(25_000_000)
    hub.breaks[name] = [12_000_000, 24_000_000]
    reports: list[tuple[str, float, float]] = []
    folder = fetch(ACME, parts=("unet",), progress=lambda *report: reports.append(report))
    ranges = [part for method, path, part in hub.requests if method == "GET" and path.endswith(name)]
    assert ranges == ["", f"bytes={block}-", f"bytes={2 * block}-"]
    assert (folder / name).read_bytes() == files[name]
    assert reports[-1][1:] == (25_000_000, 25_000_000)


def test_what_is_whole_stays_when_a_download_fails(hub: Hub, fetch: Callable[..., Path]) -> None:
    hub.lost = {WEIGHTS[2]}
    with pytest.raises(
        ModelError, match=rf"^{ACME}: the download failed \(.*404.*\); run this again: whole files stay$"
    ):
        fetch(ACME)
    hub.lost.clear()
    hub.requests.clear()
    assert present(fetch(ACME)) == sorted(SMALL + WEIGHTS)
    assert hub.downloaded() == [WEIGHTS[2]]


def test_weights_that_are_not_there_are_noticed_before_others_are_downloaded(
    hub: Hub, fetch: Callable[..., Path]
) -> None:
    del hub.repositories[ACME].files[WEIGHTS[2]]
    with pytest.raises(ModelError, match=rf"^{ACME}: has no weights of vae, as a model in diffusers' layout should$"):
        fetch(ACME)
    assert hub.downloaded() == SMALL


def test_the_float16_variant_is_taken_where_there_is_no_other(hub: Hub, fetch: Callable[..., Path]) -> None:
    files = hub.repositories[ACME].files
    files["unet/diffusion_pytorch_model.fp16.safetensors"] = files.pop("unet/diffusion_pytorch_model.safetensors")
    fetch(ACME)
    assert [name for name in hub.downloaded() if "unet" in name] == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_of_shards_those_are_downloaded_that_their_index_names(hub: Hub, fetch: Callable[..., Path]) -> None:
    files = hub.repositories[ACME].files
    stem = "unet/diffusion_pytorch_model"
    whole = files.pop(f"{stem}.safetensors")
    files[f"{stem}-00001-of-00001.safetensors"] = whole
    files[f"{stem}-00001-of-00002.safetensors"] = b"of another time"
    files[f"{stem}.fp16-00001-of-00002.safetensors"] = b"half"
    files[f"{stem}.safetensors.index.fp16.json"] = b'{"weight_map": {}}'
    files[f"{stem}.bin.index.json"] = b'{"weight_map": {}}'
    names = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    listed = {name: "diffusion_pytorch_model-00001-of-00001.safetensors" for name in names if name != "__metadata__"}
    files[f"{stem}.safetensors.index.json"] = json.dumps({"weight_map": listed}).encode()
    folder = fetch(ACME)
    assert len(component_tensors(folder / "unet")) == len(listed)
    assert [name for name in hub.downloaded() if "unet" in name and "json" not in name] == [
        f"{stem}-00001-of-00001.safetensors"
    ]
    del files[f"{stem}-00001-of-00001.safetensors"]
    with pytest.raises(ModelError, match=rf"{ACME}: has no unet/diffusion_pytorch_model-00001-of-00001\.safetensors"):
        fetch(ACME)


def test_only_some_parts_weights_are_downloaded(hub: Hub, fetch: Callable[..., Path]) -> None:
    folder = fetch(ACME, parts=())
    assert present(folder) == SMALL
    assert fetch(ACME, folder.name, parts=("vae",)) == folder
    assert present(folder) == sorted([*SMALL, WEIGHTS[2]])


def test_branches_and_private_models(hub: Hub, fetch: Callable[..., Path]) -> None:
    hub.repositories[ACME].branches = ("main", "v1")
    assert fetch(ACME, "v1").name == hub.repositories[ACME].commit
    with pytest.raises(ModelError, match=rf"{ACME}: has no branch, tag or commit 'v2'$"):
        fetch(ACME, "v2")
    hub.repositories["acme/secret"] = Repository(hub.repositories[ACME].files, token="hf_open")
    assert fetch("acme/secret", HF_TOKEN="hf_open").name == hub.repositories["acme/secret"].commit


@pytest.mark.parametrize("repository", ["acme/none", "acme/secret"])
def test_a_model_that_is_not_there_and_a_private_one_look_alike(
    repository: str, hub: Hub, fetch: Callable[..., Path]
) -> None:
    hub.repositories["acme/secret"] = Repository({}, token="hf_open")
    with pytest.raises(
        ModelError,
        match=rf"^{repository}: no such model on the Hub, or a private one, for which you must log in with "
        r"'hf auth login', or set HF_TOKEN; there is no folder /recipes/acme either$",
    ):
        fetch(repository, instead_of=Path("/recipes/acme"))


def test_a_gated_model_says_how_it_is_opened(hub: Hub, fetch: Callable[..., Path]) -> None:
    hub.repositories[ACME].gated = True
    with pytest.raises(
        ModelError,
        match=rf"^{ACME}: not open to you yet; accept its conditions at {hub.url}/{ACME}, and log in with "
        "'hf auth login', or set HF_TOKEN$",
    ):
        fetch(ACME)


def test_a_repository_that_is_no_pipeline_is_refused(hub: Hub, fetch: Callable[..., Path]) -> None:
    hub.repositories[ACME] = Repository({"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(
        ModelError, match=rf"^{ACME}: not a pipeline in diffusers' layout, it has no model_index\.json$"
    ):
        fetch(ACME)


def test_pickles_are_refused_before_anything_large_is_downloaded(hub: Hub, fetch: Callable[..., Path]) -> None:
    files = hub.repositories[ACME].files
    for name in [name for name in files if name.startswith("unet/") and name.endswith(".safetensors")]:
        del files[name]
    with pytest.raises(
        ModelError,
        match=rf"^{ACME}/unet/diffusion_pytorch_model\.bin: weights in a pickle, which can run code when it is read.*\n"
        rf"  python -c '.*from_pretrained.*safe_serialization=True\)' {ACME} tiny\n",
    ):
        fetch(ACME)
    assert hub.downloaded() == SMALL


def test_offline_a_full_cache_is_enough(hub: Hub, fetch: Callable[..., Path]) -> None:
    folder = fetch(ACME)
    before = len(hub.requests)
    assert fetch(ACME, HF_HUB_OFFLINE="1") == folder
    assert fetch(ACME, folder.name, HF_HUB_OFFLINE="1") == folder
    assert len(hub.requests) == before
    hub.close()  # and so is it where the Hub cannot be reached
    assert fetch(ACME) == folder


def test_offline_a_cache_of_another_program_is_taken_as_it_is(
    tiny_model: Path, tmp_path: Path, fetch: Callable[..., Path]
) -> None:
    """Without the list of files that today's library keeps, and with the float16 variant alone."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "home" / "hub" / "models--acme--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    folder = place / "snapshots" / commit
    shutil.copytree(tiny_model, folder)
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert fetch(ACME, HF_HUB_OFFLINE="1") == folder
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        ModelError,
        match=rf"^{ACME}: not all in the Hub's cache \({tmp_path}/home/hub\), which lacks weights of vae, and "
        "HF_HUB_OFFLINE is set; run this once without it, with a connection$",
    ):
        fetch(ACME, HF_HUB_OFFLINE="1")


def test_offline_a_missing_shard_is_named(hub: Hub, fetch: Callable[..., Path], tmp_path: Path) -> None:
    files = hub.repositories[ACME].files
    files["unet/diffusion_pytorch_model.safetensors.index.json"] = b'{"weight_map": {"a": "a.safetensors"}}'
    files["unet/a.safetensors"] = files.pop("unet/diffusion_pytorch_model.safetensors")
    folder = fetch(ACME)
    (folder / "unet" / "a.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cache .*, which lacks unet/a\.safetensors, and HF_HUB_OFFLINE is set"):
        fetch(ACME, HF_HUB_OFFLINE="1")


def test_offline_without_a_cache(fetch: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match=rf"^{ACME} at v1: not in the Hub's cache \({tmp_path}/home/hub\), and HF_HUB_OFFLINE is set; run this "
        r"once without it, with a connection; there is no folder /recipes/acme either$",
    ):
        fetch(ACME, "v1", instead_of=Path("/recipes/acme"), HF_HUB_OFFLINE="1")


def test_a_hub_that_cannot_be_reached(hub: Hub, fetch: Callable[..., Path], tmp_path: Path) -> None:
    hub.close()
    with pytest.raises(
        ModelError,
        match=rf"^{ACME}: the Hub cannot be reached \(.*refused\), and the model is not in its cache "
        rf"\({tmp_path}/home/hub\)$",
    ):
        fetch(ACME)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_, "_fetch", full)
    with pytest.raises(ModelError, match=rf"^{ACME}: does not fit .*\(whole files stay\).* set HF_HOME to a folder on"):
        hub_.fetch(ACME)


def test_what_cannot_fit_is_not_begun(hub: Hub, fetch: Callable[..., Path], tmp_path: Path) -> None:
    hub.sizes = {WEIGHTS[1]: 10**17}
    with pytest.raises(
        ModelError,
        match=rf"^{ACME}: does not fit on the disk of the Hub's cache, {tmp_path}/home/hub \(it takes 100000000\.0 GB "
        r"more, and \d+\.\d GB are free\); free some space, or set HF_HOME to a folder on a larger disk$",
    ):
        fetch(ACME)
    assert hub.downloaded() == SMALL


def test_what_the_cache_has_for_another_commit_takes_no_space(hub: Hub, fetch: Callable[..., Path]) -> None:
    before = fetch(ACME)
    hub.repositories[ACME].files["README.md"] = b"# tiny, and new"
    hub.sizes = {WEIGHTS[1]: 10**17}
    folder = fetch(ACME)
    assert folder != before
    assert present(folder) == sorted(SMALL + WEIGHTS)


@pytest.mark.parametrize("text", ["acme/tiny", "stabilityai/stable-diffusion-2-1-base", "a/b_c.d"])
def test_ids_have_an_organisation_and_a_name(text: str) -> None:
    assert hub_.is_id(text)


@pytest.mark.parametrize(
    "text", ["tiny", "./tiny", "../a/b", "a/b/c", "/a/b", "a/", "a/b.safetensors", "a/b.ckpt", "a b/c"]
)
def test_paths_are_no_ids(text: str) -> None:
    assert not hub_.is_id(text)


def test_the_library_is_imported_where_it_is_needed() -> None:
    with Worker("hub") as worker:
        loaded = worker.call(eval, "__import__('glance_trt.export.model') and list(__import__('sys').modules)")
    assert "glance_trt.export.hub" in loaded
    assert not {"huggingface_hub", "torch"}.intersection(loaded)
