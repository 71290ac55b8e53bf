"""The training loop: AdamW over a module's trainable parameters, with checkpoints and a log of the loss.

It knows nothing of what is trained. A method of distillation is a function that draws what one step needs from a
generator and returns the loss; everything else here serves them all.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from glance_trt.distill import checkpoint, files
from glance_trt.distill.checkpoint import Checkpoint
from glance_trt.errors import OutputError, TrainingError
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Distill

BETAS = (0.9, 0.999)
EPSILON = 1e-8
CLIP_NORM = 1.0
CHECKPOINT_SECONDS = 60.0
_HEADER = "step,timestep,loss\n"


class Loss(NamedTuple):
    """A scalar to be minimised, or a part of it, and the timesteps [batch] it was taken at."""

    value: Tensor
    timesteps: tuple[float, ...]


LossFunction = Callable[[torch.Generator], Iterable[Loss]]
"""Yields the parts whose sum is a step's loss. Each goes backward before the next is computed, to save memory.

It draws all its random numbers from the CPU generator that it is given, so that a run can be resumed.
"""


def seed_of(seed: int, name: str) -> int:
    """A seed for the run `name`: runs of one recipe draw different noise, whichever of them are trained."""
    return zlib.crc32(f"{seed}/{name}".encode())


def fit(
    name: str,
    module: nn.Module,
    loss_of_step: LossFunction,
    settings: Distill,
    *,
    identity: Mapping[str, Any],
    work: Path,
    checkpoint_every: int = 20,
    progress: Progress = silent,
) -> None:
    """Train the parameters of `module` that require gradients, in place, for `settings.steps` steps in all.

    AdamW, its learning rate constant or falling linearly to zero, and gradients clipped to norm 1; otherwise the
    settings of Glance (arXiv 2512.02899). A checkpoint goes to ``<work>/<name>.pt`` every `checkpoint_every` steps,
    every minute, and at the end; one that is there already is resumed from, and the result then is bit for bit that of
    an uninterrupted run (on a CPU, with the same number of threads). `identity` says what the run is; a run can be
    lengthened, so the number of steps is no part of it (but where the learning rate falls by it). Steps count from 1 in
    ``<work>/<name>.loss.csv``, with the timesteps of a batch separated by spaces.

    Raises `TrainingError` for a checkpoint of another identity, one past the last step, or a loss or gradient that is
    no finite number; `OutputError` if `work` cannot be written.
    """
    parameters = {key: value for key, value in module.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=settings.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=settings.weight_decay,
    )
    generator = torch.Generator().manual_seed(seed_of(settings.seed, name))
    path = work / f"{name}.pt"
    start = 0
    if saved := checkpoint.load(path, identity):
        _restore(saved, path, settings.steps, parameters, optimizer, generator)
        start = saved.step
    kept, kept_at = start, time.monotonic()
    stage = f"train {name}"
    progress(stage, 0, settings.steps)
    if start:
        progress(stage, start, settings.steps)
    with _open_log(work / f"{name}.loss.csv", start) as log:
        for step in range(start + 1, settings.steps + 1):
            optimizer.zero_grad()
            loss, timesteps = 0.0, list[float]()
            for part in loss_of_step(generator):
                part.value.backward()
                loss += part.value.item()
                timesteps += part.timesteps
            norm = nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"{name}: at step {step} (timestep {_joined(timesteps)}) the loss is {loss:g} and the norm "
                    f"of its gradient {norm:g}. "
                    + (f"The checkpoint of step {kept} is kept: {path}. " if kept else "There is no checkpoint yet. ")
                    + "Try a smaller distill.learning_rate or distill.alpha, or check the base model's own output"
                )
            if settings.decay == "linear":
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * (1 - (step - 1) / settings.steps)
            optimizer.step()
            log.write(f"{step},{_joined(timesteps)},{loss!r}\n")
            if step == settings.steps or step % checkpoint_every == 0 or _passed(kept_at) >= CHECKPOINT_SECONDS:
                log.flush()  # a resumed run takes the rows up to its checkpoint for granted
                now = Checkpoint(
                    step,
                    {key: value.detach() for key, value in parameters.items()},
                    optimizer.state_dict(),
                    generator.get_state(),
                )
                checkpoint.save(path, now, identity)
                kept, kept_at = step, time.monotonic()
            progress(stage, step, settings.steps)


def _restore(
    saved: Checkpoint,
    path: Path,
    steps: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    if saved.step > steps:
        raise TrainingError(
            f"{path}: a checkpoint of step {saved.step}, and the recipe asks for {steps} steps. Delete it to train "
            f"from the start, or set distill.steps to {saved.step} or more"
        )
    shapes = {key: value.shape for key, value in parameters.items()}
    if {key: value.shape for key, value in saved.parameters.items()} != shapes:
        raise TrainingError(
            f"{path}: its parameters are not those that are trained now, as another version of peft or diffusers names "
            "them; delete it to train from the start"
        )
    with torch.no_grad():
        for key, value in saved.parameters.items():
            parameters[key].copy_(value)
    optimizer.load_state_dict(saved.optimizer)
    generator.set_state(saved.generator)


def _open_log(path: Path, start: int) -> TextIO:
    """The log, cut to its first `start` steps: an interrupted run may have gone on after its last checkpoint."""
    try:
        lines = path.read_text().splitlines(keepends=True) if start and path.exists() else []
        kept = "".join([_HEADER, *lines[1 : start + 1]])
        files.write(path, lambda file: file.write(kept.encode()))
        return open(path, "a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _joined(timesteps: Iterable[float]) -> str:
    return " ".join(f"{timestep:g}" for timestep in timesteps)


def _passed(since: float) -> float:
    return time.monotonic() - since
