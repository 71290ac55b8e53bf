"""Models of the Hugging Face Hub: found in its cache, or downloaded into it, and of a model only what is read of it.

The cache, its place (HF_HOME), the token (HF_TOKEN) and HF_HUB_OFFLINE are those of the library `huggingface_hub`,
which also takes a transfer up again where the connection broke off.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from glance_trt.errors import ModelError
from glance_trt.export import index, pickles, weights
from glance_trt.progress import Progress, silent

WEIGHTS = re.compile(r"unet|transformer|vae|text_encoder(_\d)?")
"""The parts of pipelines whose weights a build reads."""
_TEXT = (".json", ".txt", ".model", ".jinja")  # configurations, indices of shards, tokenizers

_known: dict[tuple[str, str | None, Collection[str] | None], Path] = {}


def is_id(text: str) -> bool:
    """Whether a text has the form of a model's id: ``organisation/name``."""
    word = r"[A-Za-z0-9][\w.-]*"
    return bool(re.fullmatch(f"{word}/{word}", text)) and not text.endswith((".safetensors", *pickles.SUFFIXES))


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    parts: Collection[str] | None = None,
    instead_of: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """The folder of a model in the Hub's cache, which is named after the commit; what it lacks is downloaded.

    revision: a branch, a tag or a commit; by default the newest commit of the main branch, or offline the one that was
    that when it was last looked up. parts: those whose weights are needed, by default all that make images.
    instead_of: a folder that is not there, for errors. Progress counts bytes. Asked a second time, a process looks
    nothing up. Raises `ModelError`.
    """
    asked = (repository, revision, parts if parts is None else tuple(parts))
    if asked not in _known:
        with _explained(repository, revision, instead_of):
            _known[asked] = _fetch(repository, revision, parts, progress)
    return _known[asked]


def _fetch(repository: str, revision: str | None, parts: Collection[str] | None, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    silently = _bar(lambda size: None)
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[index.NAME], tqdm_class=silently))
    if not (folder / index.NAME).is_file():
        raise ModelError(f"{repository}: not a pipeline in diffusers' layout, it has no {index.NAME}")
    sizes = _listing(repository, folder)
    present = [part for part in index.classes(folder) if any(name.startswith(f"{part}/") for name in sizes)]
    texts = [
        name
        for name in sizes
        if name.partition("/")[0] in present
        and name.count("/") == 1
        and name.endswith(_TEXT)
        and not name.endswith(".bin.index.json")
    ]
    _download(repository, folder, texts, sizes, progress)
    wanted = [part for part in present if WEIGHTS.fullmatch(part) and (parts is None or part in parts)]
    files = [name for part in wanted for name in _weights(repository, folder, part, sizes)]
    _download(repository, folder, files, sizes, progress)
    return folder


def _listing(repository: str, folder: Path) -> Mapping[str, int]:
    """The files of a commit and their sizes: all, or those in the cache where it does not know of others."""
    from huggingface_hub import errors, get_cached_repo_tree, is_offline_mode

    if not is_offline_mode():  # then others than the preferred weights may be there
        with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
            return {file.path: file.size for file in get_cached_repo_tree(repository, revision=folder.name)}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _weights(repository: str, folder: Path, part: str, listed: Collection[str]) -> list[str]:
    """The names of the files of a part's weights."""
    names = {name.partition("/")[2] for name in listed if name.startswith(f"{part}/")}
    chosen = weights.preferred(names)
    if chosen is None:
        pickled = next((name for name in sorted(names) if name.endswith(".bin")), None)
        if pickled:
            command = pickles.saved_again(repository, repository.partition("/")[2])
            raise pickles.refused(f"{repository}/{part}/{pickled}", f"{command}\nand name the folder in the recipe")
        raise _incomplete(repository, f"weights of {part}")
    if not chosen.endswith(".json"):
        return [f"{part}/{chosen}"]
    return [f"{part}/{file}" for file in sorted(set(weights.shards(folder / part / chosen).values()))]


def _download(
    repository: str, folder: Path, files: Collection[str], sizes: Mapping[str, int], progress: Progress
) -> None:
    """One file after the other, so that Ctrl-C ends it: the library's own loop waits for all files that have begun."""
    from huggingface_hub import hf_hub_download, is_offline_mode

    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return
    if is_offline_mode() or (unknown := [name for name in missing if name not in sizes]):
        raise _incomplete(repository, missing[0] if is_offline_mode() else unknown[0])
    stage, total, done, finished = f"download {repository}", sum(sizes[name] for name in missing), 0, 0
    if total > (free := shutil.disk_usage(folder).free):

        def lacking(name: str) -> bool:  # not there for another commit either; asking takes a request for each file
            return hf_hub_download(repository, name, revision=folder.name, dry_run=True).will_download

        if (needed := sum(sizes[name] for name in missing if lacking(name))) > free:
            raise _full(repository, f"it takes {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free")

    def report(size: float) -> None:
        nonlocal done
        if size:
            done += int(size)
            progress(stage, min(done, total), total)

    progress(stage, 0, total)
    for name in missing:
        hf_hub_download(repository, name, revision=folder.name, tqdm_class=_bar(report))
        finished += sizes[name]
        report(finished - done)  # what was there already, for another commit


def _bar(report: Callable[[float], None]) -> Any:
    """A class to give the library for its progress bars, which draws none. `report` is called with numbers of bytes."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(disable=True)
            report(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            report(n or 0)

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes that came over the network in parts, which are counted again when a file is put together."""

    return Bar


def _incomplete(repository: str, what: str) -> ModelError:
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return ModelError(
            f"{repository}: not all in the Hub's cache ({constants.HF_HUB_CACHE}), which lacks {what}, and "
            "HF_HUB_OFFLINE is set; run this once without it, with a connection"
        )
    return ModelError(f"{repository}: has no {what}, as a model in diffusers' layout should")


def _full(repository: str, how: str) -> ModelError:
    from huggingface_hub import constants

    return ModelError(
        f"{repository}: does not fit on the disk of the Hub's cache, {constants.HF_HUB_CACHE} ({how}); free some "
        "space, or set HF_HOME to a folder on a larger disk"
    )


@contextlib.contextmanager
def _explained(repository: str, revision: str | None, instead_of: Path | None) -> Iterator[None]:
    """Turns the library's errors into `ModelError`."""
    from huggingface_hub import constants, errors, is_offline_mode

    nor = f"; there is no folder {instead_of} either" if instead_of else ""
    log_in = "log in with 'hf auth login', or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{repository}: not open to you yet; accept its conditions at {constants.ENDPOINT}/{repository}, and "
            f"{log_in}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{repository}: no such model on the Hub, or a private one, for which you must {log_in}{nor}"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repository}: has no branch, tag or commit {revision!r}") from None
    except errors.LocalEntryNotFoundError as error:
        if is_offline_mode():
            raise ModelError(
                f"{repository}{f' at {revision}' if revision else ''}: not in the Hub's cache "
                f"({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; run this once without it, with a "
                f"connection{nor}"
            ) from None
        raise ModelError(
            f"{repository}: the Hub cannot be reached ({_reason(error)}), and the model is not in its cache "
            f"({constants.HF_HUB_CACHE}){nor}"
        ) from None
    # A transfer that broke off too often ends with the error of httpx, or of httpx2 from version 2 of the library on.
    except (OSError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(repository, "whole files stay") from None
        raise ModelError(
            f"{repository}: the download failed ({_reason(error)}); run this again: whole files stay"
        ) from None


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)
