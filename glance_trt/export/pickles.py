"""Pickle files are refused, with the command that converts them: reading one can run any code that is in it."""

from __future__ import annotations

import shlex
from pathlib import Path

from glance_trt.errors import ModelError

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

# Some checkpoints hold their tensors under "state_dict", among other things. A pickle that PyTorch's restricted reader
# refuses is better not converted at all.
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    'found = torch.load(sys.argv[1], map_location="cpu", weights_only=True); found = found.get("state_dict", found); '
    "save_file({k: v.contiguous() for k, v in found.items() if isinstance(v, torch.Tensor)}, sys.argv[2])"
)
_SAVE_AGAIN = (
    "import sys; from diffusers import DiffusionPipeline; "
    "DiffusionPipeline.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], safe_serialization=True)"
)


def refused(what: object, command: str) -> ModelError:
    """The error for pickled weights; `command` makes safetensors of them."""
    return ModelError(
        f"{what}: weights in a pickle, which can run code when it is read, so it is not read. If you trust those who "
        f"made it, convert it:\n  {command}"
    )


def converted(file: Path) -> str:
    """The command that makes a .safetensors file of a checkpoint, beside it."""
    return _python(_CONVERT, str(file), str(file.with_suffix(".safetensors")))


def saved_again(source: str, target: str) -> str:
    """The command that saves a pipeline again, a folder or an id on the Hub, into the folder `target`."""
    return _python(_SAVE_AGAIN, source, target)


def _python(code: str, *arguments: str) -> str:
    return shlex.join(["python", "-c", code, *arguments])
