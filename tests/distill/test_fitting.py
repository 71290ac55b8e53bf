from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from glance_trt.distill import fitting
from glance_trt.distill.fitting import Loss
from glance_trt.errors import OutputError, TrainingError
from glance_trt.recipe import Distill

SETTINGS = Distill(prompt="a star", steps=9, learning_rate=0.01, weight_decay=0.1)
IDENTITY = {"lr": 0.01}


class Regression:
    """Another method of training than the experts': a linear map from noise to its double."""

    def __init__(self, bad_step: int | None = None, bad: float = float("nan")) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.module[1].requires_grad_(False)
        self.steps, self.bad_step, self.bad = 0, bad_step, bad

    def __call__(self, generator: torch.Generator) -> Iterator[Loss]:
        self.steps += 1
        noise = torch.randn(8, 4, generator=generator)
        loss = (self.module(noise) - 2 * noise).square().mean()
        yield Loss(loss * self.bad if self.steps == self.bad_step else loss, (float(self.steps),))

    def fit(self, work: Path, settings: Distill = SETTINGS, every: int = 2, **identity: float) -> nn.Module:
        fitting.fit("x", self.module, self, settings, identity=identity or IDENTITY, work=work, checkpoint_every=every)
        return self.module


def test_steps_are_those_of_clipped_adamw(tmp_path: Path) -> None:
    ours = Regression().fit(tmp_path)
    reference = Regression()
    weight, bias = reference.module[0].parameters()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (weight, bias)]
    generator = torch.Generator().manual_seed(fitting.seed_of(0, "x"))
    for step in range(1, 10):  # decoupled weight decay: arXiv 1711.05101, algorithm 2
        gradients = torch.autograd.grad(next(reference(generator)).value, [weight, bias])
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))  # type: ignore[arg-type]
        with torch.no_grad():
            for p, g, (first, second) in zip((weight, bias), gradients, moments, strict=True):
                g = g * min(1.0, 1.0 / norm.item())
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.999).add_(0.001 * g * g)
                update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                p.sub_(0.01 * (update + 0.1 * p))
    torch.testing.assert_close(ours[0].weight, weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[0].bias, bias, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours[1].weight, reference.module[1].weight)


def test_a_run_lengthened_in_two_calls_is_bit_identical_to_one(
    tmp_path: Path, read_log: Callable[[Path], list[dict[str, str]]]
) -> None:
    whole = Regression().fit(tmp_path / "a")
    Regression().fit(tmp_path / "b", Distill(prompt="a star", steps=5, learning_rate=0.01, weight_decay=0.1))
    parts = Regression().fit(tmp_path / "b")
    assert torch.equal(whole[0].weight, parts[0].weight)
    losses = [[row["loss"] for row in read_log(tmp_path / part / "x.loss.csv")] for part in "ab"]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9


@pytest.mark.parametrize(("bad", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    bad: float, shown: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=rf"^x: at step 7 \(timestep 7\) the loss is {shown}.*of step 6 is kept"):
        Regression(7, bad).fit(tmp_path)
    resumed = Regression().fit(tmp_path)
    assert torch.equal(resumed[0].weight, Regression().fit(tmp_path / "whole")[0].weight)
    with pytest.raises(TrainingError, match=r"at step 1 .* There is no checkpoint yet\. Try a smaller"):
        Regression(1, bad).fit(tmp_path / "new")


def test_each_part_of_a_loss_goes_backward_before_the_next_is_computed(tmp_path: Path) -> None:
    module = nn.Linear(2, 1, bias=False)
    nn.init.ones_(module.weight)
    seen: list[list[float]] = []

    def in_parts(generator: torch.Generator) -> Iterator[Loss]:
        for k in range(2):
            seen.append([] if module.weight.grad is None else module.weight.grad[0].tolist())
            yield Loss(module.weight[0, k] * (k + 1) / 4, (float(k),))

    fitting.fit("x", module, in_parts, replace(SETTINGS, steps=1), identity={}, work=tmp_path)
    assert seen == [[], [0.25, 0.0]]
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[0.25, 0.5]]
    assert (tmp_path / "x.loss.csv").read_text().splitlines()[1] == "1,0 1,0.75"


def test_an_infinite_gradient_of_a_finite_loss_stops_too(tmp_path: Path) -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)

    def root(generator: torch.Generator) -> Iterator[Loss]:
        yield Loss(module.weight.abs().sqrt().sum(), (0.0,))  # its slope at zero is not finite

    with pytest.raises(TrainingError, match=r"^x: at step 1 \(timestep 0\) the loss is 0 and the norm of its gradient"):
        fitting.fit("x", module, root, SETTINGS, identity={}, work=tmp_path)
    assert not (tmp_path / "x.pt").exists()


def test_a_checkpoint_is_written_every_so_many_steps(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        Regression(9).fit(tmp_path, every=4)
    assert torch.load(tmp_path / "x.pt", weights_only=True)["step"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.loss.csv", "x.pt"]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    Regression().fit(tmp_path)
    with pytest.raises(
        TrainingError, match=r"x\.pt: a checkpoint of another recipe: lr was 0\.01, and is 0\.02 now\. Delete it"
    ):
        Regression().fit(tmp_path, lr=0.02)
    with pytest.raises(TrainingError, match=r"x\.pt: a checkpoint of step 9, and the recipe asks for 3 steps\. Delete"):
        Regression().fit(tmp_path, Distill(prompt="a star", steps=3, learning_rate=0.01, weight_decay=0.1))
    other = Regression()
    other.module[1].requires_grad_(True)
    with pytest.raises(TrainingError, match=r"x\.pt: its parameters are not those that are trained now"):
        other.fit(tmp_path)
    content = (tmp_path / "x.pt").read_bytes()
    for damaged in (b"", b"garbage", content[: len(content) // 2]):
        (tmp_path / "x.pt").write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"x\.pt: not a readable checkpoint; delete it to train from the start"):
            Regression().fit(tmp_path)


def test_a_work_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written: Not a directory"):
        Regression().fit(tmp_path / "file")
