"""The student: the base with parts that can be switched off, kept, and taken off without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from glance_trt.distill import fitting, loras
from glance_trt.distill.fitting import Loss
from glance_trt.distill.student import Parts, Student
from glance_trt.recipe import Distill

MakeStudent = Callable[..., Student]

KINDS = {
    "lora": (True, None),
    "lora and embedding": (True, "embedding"),
    "full guide": (False, "full"),
    "lora and full guide": (True, "full"),
}


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sample, embeds = torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 5, 16, generator=generator)
    return sample, torch.tensor([900.0, 20.0])[:batch], embeds, torch.tensor([2.0, 7.5])[:batch]


def settings(guide: str | None = None, **changes: object) -> Distill:
    given = {
        "prompt": "a star",
        "rank": 2,
        "alpha": 6.0,
        "steps": 3,
        "learning_rate": 0.02,
        "guide": guide or "embedding",
    }
    return Distill(**{**given, **changes})  # type: ignore[arg-type]


def parts_of(kind: str, folder: Path) -> Parts:
    has_lora, guide = KINDS[kind]
    return Parts(folder / "x.safetensors" if has_lora else None, folder / "x.guide.safetensors" if guide else None)


@pytest.fixture
def make_student(unet: UNet2DConditionModel, tmp_path: Path) -> MakeStudent:
    """Makes a student of one of the `KINDS`; all are of the same UNet, so one at a time."""

    def make(kind: str, seed: int = 0, **changes: object) -> Student:
        return Student(unet, parts_of(kind, tmp_path), settings(KINDS[kind][1], **changes), seed)

    return make


def train(student: Student, work: Path) -> None:
    """A few steps towards zero."""

    def loss_of_step(generator: torch.Generator) -> Iterator[Loss]:
        with student.off():  # as a teacher's step does
            student.unet(*inputs()[:3])
        yield Loss(student(*inputs()).square().mean(), (0.0,))

    fitting.fit("x", student, loss_of_step, settings(), identity={}, work=work)


def test_without_parts_it_is_the_unet(unet: UNet2DConditionModel) -> None:
    sample, timestep, embeds, scale = inputs()
    student = Student(unet, Parts(None, None), settings(), 0)
    assert torch.equal(student(sample, timestep, embeds, scale), unet(sample, timestep, embeds).sample)
    assert not any(value.requires_grad for value in student.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_and_off_is_the_base_bit_for_bit_after_training(
    kind: str, unet: UNet2DConditionModel, make_student: MakeStudent, tmp_path: Path
) -> None:
    with torch.no_grad():
        expected = unet(*inputs()[:3]).sample
        student = make_student(kind)
        assert torch.equal(student(*inputs()), expected)
    train(student, tmp_path)
    with torch.no_grad():
        assert (student(*inputs()) - expected).abs().max() > 1e-3
        with student.off():
            assert torch.equal(student.unet(*inputs()[:3]).sample, expected)
        assert (student(*inputs()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_gives_the_same_outputs_when_loaded(kind: str, make_student: MakeStudent, tmp_path: Path) -> None:
    student, parts = make_student(kind), parts_of(kind, tmp_path)
    train(student, tmp_path / "work")
    with torch.no_grad():
        expected = student(*inputs())
    student.save(parts, {"phase": "x"})
    student.remove()
    again = make_student(kind, seed=1)
    again.load(parts)
    with torch.no_grad():
        assert torch.equal(again(*inputs()), expected)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {file.name for file in parts}
    for file in parts:
        assert loras.read_provenance(file) == {"phase": "x"}
        content = file.read_bytes()
        again.save(parts, {"phase": "x"})
        assert file.read_bytes() == content


@pytest.mark.parametrize("kind", KINDS)
def test_removing_leaves_the_unet_as_it_was(
    kind: str, unet: UNet2DConditionModel, make_student: MakeStudent, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    student = make_student(kind)
    train(student, tmp_path)
    student.remove()
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert not any(value.requires_grad for value in unet.parameters())


@pytest.mark.parametrize("kind", ["lora", "full guide"])
def test_a_seed_decides_the_start_and_the_callers_random_numbers_go_on(kind: str, make_student: MakeStudent) -> None:
    state = torch.random.get_rng_state()
    found = []
    for seed in (4, 4, 5):
        student = make_student(kind, seed=seed)
        trained = [value.detach().flatten() for value in student.parameters() if value.requires_grad]
        found.append(torch.cat(trained))
        student.remove()
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_computes_near_float32_and_trains_float32(
    kind: str, make_student: MakeStudent, tmp_path: Path
) -> None:
    student = make_student(kind)
    train(student, tmp_path / "work")
    with torch.no_grad():
        exact = student(*inputs())
    student._precision = "bfloat16"
    rounded = student(*inputs())
    rounded.square().mean().backward()
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    trained = [value for value in student.parameters() if value.requires_grad]
    assert {value.dtype for value in trained} | {value.grad.dtype for value in trained} == {torch.float32}


def test_a_guide_file_is_in_float32_and_says_what_it_is(make_student: MakeStudent, tmp_path: Path) -> None:
    student = make_student("full guide")
    student.save(parts_of("full guide", tmp_path), {"phase": "x"})
    with safe_open(tmp_path / "x.guide.safetensors", "pt") as opened:
        assert opened.metadata().keys() == {"format", "glance_trt_guide", "glance_trt"}
        assert student.guide is not None
        state = student.guide.state_dict()
        assert set(opened.keys()) == set(state)
        for name, value in state.items():
            assert torch.equal(opened.get_tensor(name), value)
