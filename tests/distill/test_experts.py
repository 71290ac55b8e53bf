"""Training of a whole recipe: what goes into which file, and what is gone on from."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from glance_trt import distill
from glance_trt.distill import base, data, experts, fitting, loras
from glance_trt.distill.ground_truth import ground_truth_loss, knots_of
from glance_trt.distill.student import Parts, Student
from glance_trt.distill.trajectory import Trajectories
from glance_trt.errors import TrainingError
from glance_trt.export import guide
from glance_trt.recipe import Distill, Guidance, Lora, Phase, Recipe

from .conftest import EMBEDDED, FAST, ON_TRAJECTORIES, TINY, by_diffusers

MakeRecipe = Callable[..., Recipe]
ReadLog = Callable[[Path], list[dict[str, str]]]


@pytest.fixture
def _small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model has no room for a guide of 1 %."""
    monkeypatch.setattr(guide, "_TINY", 0.3)


def test_each_expert_sees_only_its_own_timesteps(
    home: Path, make_recipe: MakeRecipe, tmp_path: Path, read_log: ReadLog
) -> None:
    work = tmp_path / "work"
    distill.train(make_recipe(steps=3, batch_size=6), home, work=work)
    scheduler = diffusers.DDIMScheduler.from_pretrained(home / "model", subfolder="scheduler")
    scheduler.set_timesteps(10)
    for phase, steps in {"slow": (1, 3), "fast": (6, 8, 10)}.items():
        rows = read_log(work / f"{phase}.loss.csv")
        assert [row["step"] for row in rows] == ["1", "2", "3"]
        drawn = {float(timestep) for row in rows for timestep in row["timestep"].split()}
        assert drawn == {scheduler.timesteps[step - 1].item() for step in steps}
        assert all(0 < float(row["loss"]) < 10 for row in rows)
    assert not (work / "middle.pt").exists()


def test_an_expert_beats_the_base_on_fresh_noise(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    phases = (Phase("one", (8, 9, 10), Lora("one.safetensors")),)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    image.save(home / "x.png")
    recipe = make_recipe(phases=phases, image="x.png", steps=40, learning_rate=0.02, rank=4, alpha=16.0, batch_size=4)
    (file,) = distill.train(recipe, home, work=tmp_path)
    loaded = base.load_base(home / "model")
    config = json.loads((home / "model" / "scheduler" / "scheduler_config.json").read_text())
    knots = knots_of(config, 10, (8, 9, 10))
    embeds, empty = (data.encode_captions(loaded, captions) for captions in (("a red circle",), ("",)))
    latents = data.encode_images(loaded, (image,))
    student = Student(loaded.unet, Parts(None, None), Distill(prompt="a star"), 0)
    loss_of_step = ground_truth_loss(
        student,
        data.Examples(latents, embeds, torch.tensor([0]), empty),
        knots,
        prediction_type="v_prediction",
        settings=Distill(prompt="a star", batch_size=64),
    )
    with torch.no_grad():
        (before,) = loss_of_step(torch.Generator().manual_seed(99))
        loaded.unet.load_lora_adapter(file, prefix="unet")
        (after,) = loss_of_step(torch.Generator().manual_seed(99))
    assert after.value < 0.95 * before.value


@pytest.mark.parametrize("guidance", [Guidance(scale=3.0, rescale=0.7, negative_prompt="blue"), Guidance(mode="none")])
def test_without_an_image_the_base_model_samples_it_as_diffusers_does(
    guidance: Guidance, home: Path, make_recipe: MakeRecipe, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    recipe = make_recipe(guidance=guidance, seed=5, steps=1, samples=2)
    distill.train(recipe, home, work=tmp_path)
    expected = by_diffusers(pipeline, "a red circle", guidance, (5, 6), output_type="np")
    found = np.array(Image.open(tmp_path / "samples.png"))
    assert np.abs(found - np.concatenate(list(expected), axis=1) * 255).max() <= 0.6


def test_saved_lora_gives_the_trained_output_in_a_fresh_diffusers_pipeline(
    home: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 8, 8, generator=generator), 500, torch.randn(1, 5, 16, generator=generator)
    trained: list[Tensor] = []
    remove = loras.remove

    def observe(unet: UNet2DConditionModel) -> None:
        with torch.no_grad():
            trained.append(unet(*inputs).sample)
        remove(unet)

    monkeypatch.setattr(loras, "remove", observe)
    files = distill.train(make_recipe(learning_rate=0.02), home, work=tmp_path / "work")
    assert files == [home / "loras" / "slow.safetensors", home / "loras" / "fast.safetensors"]
    for file, expected in zip(files, trained, strict=True):
        pipeline = StableDiffusionPipeline.from_pretrained(home / "model", dtype=torch.float32)
        with torch.no_grad():
            plain = pipeline.unet(*inputs).sample
        pipeline.load_lora_weights(file)
        scales = {m.scaling["default_0"] for m in pipeline.unet.modules() if getattr(m, "scaling", None)}
        assert scales == {3.0}  # alpha 6 / rank 2
        with torch.no_grad():
            loaded = pipeline.unet(*inputs).sample
        torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-6)
        assert (loaded - plain).abs().max() > 1e-3


def test_saved_file_has_the_layout_of_diffusers_and_says_how_it_was_made(
    home: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    file, _ = distill.train(make_recipe(), home, work=tmp_path / "work")
    tensors = load_file(file)
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    assert {key.split(".attn")[1].split(".", 1)[1].rsplit(".lora", 1)[0] for key in tensors} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (2, 6.0)
    provenance = json.loads(metadata["glance_trt"])
    assert provenance == loras.read_provenance(file)
    assert provenance["prompt"] == "a red circle"
    assert provenance["timesteps"] == [999.0, 799.0]
    assert provenance["method"] == "ground truth (arXiv 2512.02899)"
    assert str(tmp_path) not in json.dumps(metadata)


def test_a_run_is_byte_identical_when_repeated_and_leaves_the_model_untouched(
    home: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(steps=3)
    before = {path: path.read_bytes() for path in (home / "model").rglob("*") if path.is_file()}
    first = distill.train(recipe, home, work=tmp_path / "a", out=tmp_path / "first")
    second = distill.train(recipe, home, work=tmp_path / "b", out=tmp_path / "second")
    assert [file.name for file in first] == ["slow.safetensors", "fast.safetensors"]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert first[0].read_bytes() != first[1].read_bytes()
    assert {path: path.read_bytes() for path in (home / "model").rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("_small_enough")
@pytest.mark.parametrize("changes", [{}, EMBEDDED, TINY], ids=["ground truth", "trajectory, embedding", "tiny guide"])
def test_base_weights_are_bit_identical_after_training(
    changes: dict[str, Any], home: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[UNet2DConditionModel] = []
    gone: list[weakref.ref[Any]] = []
    load_base, fit = experts.load_base, fitting.fit

    def load(folder: Path) -> base.Base:
        found = load_base(folder)
        loaded.append(found.unet)
        gone.extend(weakref.ref(module) for module in (found.text_encoder, found.vae))
        return found

    def fit_without_encoders(*args: Any, **options: Any) -> None:
        assert [reference() for reference in gone] == [None, None]
        fit(*args, **options)

    monkeypatch.setattr(experts, "load_base", load)
    monkeypatch.setattr(fitting, "fit", fit_without_encoders)
    files = distill.train(make_recipe(learning_rate=0.1, **changes), home, work=tmp_path / "work")
    stored = load_file(home / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    after = loaded[0].state_dict()
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[key], stored[key].float()) for key in stored)
    for file in files:
        if file.suffix == ".guide":
            tensors = load_file(file)
            assert all(tensor.abs().max() > 0 for tensor in tensors.values())  # nothing is left as it began
            assert ("cond_proj.weight" in tensors) == (changes is EMBEDDED)


@pytest.mark.usefixtures("_small_enough")
@pytest.mark.parametrize(
    "changes",
    [{"caption_dropout": 0.3}, EMBEDDED, TINY, {**ON_TRAJECTORIES, "on_policy": False}],
    ids=["ground truth", "trajectory, embedding", "tiny guide", "trajectory off policy"],
)
def test_an_interrupted_run_resumes_to_byte_identical_results(
    changes: dict[str, Any], home: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(steps=5, learning_rate=0.01, **changes)
    whole = distill.train(recipe, home, work=tmp_path / "a", out=tmp_path / "whole")
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)

    def stop(stage: str, done: float, total: float) -> None:
        if (stage, done) == ("train fast", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill.train(recipe, home, work=tmp_path / "b", out=tmp_path / "parts", progress=stop)
    (sampled,) = (tmp_path / "b").glob("samples/*.safetensors")
    written = sampled.stat().st_mtime_ns
    calls: list[tuple[str, float, float]] = []
    parts = distill.train(
        recipe, home, work=tmp_path / "b", out=tmp_path / "parts", progress=lambda *call: calls.append(call)
    )
    count = changes.get("samples", 1)
    assert calls == [("sample", 0, count), ("sample", count, count)] + [
        ("train fast", step, 5) for step in (0, 3, 4, 5)
    ]
    assert sampled.stat().st_mtime_ns == written
    assert len(parts) == (4 if changes is EMBEDDED else 2)
    assert [file.name for file in parts] == [file.name for file in whole]
    assert [file.read_bytes() for file in parts] == [file.read_bytes() for file in whole]
    for phase in ("slow", "fast"):
        log = f"{phase}.loss.csv"
        assert (tmp_path / "a" / log).read_text() == (tmp_path / "b" / log).read_text()


def test_progress_reports_every_step_of_every_stage(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    calls: list[tuple[str, float, float]] = []

    def train() -> None:
        distill.train(make_recipe(), home, work=tmp_path / "work", progress=lambda *call: calls.append(call))

    train()
    assert calls == [
        *(("sample", step, 1) for step in range(2)),
        *(("train slow", step, 3) for step in range(4)),
        *(("train fast", step, 3) for step in range(4)),
    ]
    calls.clear()
    shutil.rmtree(tmp_path / "work", ignore_errors=True)  # not even the samples are needed again
    train()
    assert calls == []


class Watched:
    """A training whose loss functions are watched: what each phase was given, and its trained student's files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: dict[str, Trajectories] = {}
        make = experts.trajectory_loss

        def observe(student: Any, given: Trajectories, jumps: Any, **options: Any) -> Any:
            self.entries[jumps[0].phase] = given
            return make(student, given, jumps, **options)

        monkeypatch.setattr(experts, "trajectory_loss", observe)


def noise(*seeds: int) -> Tensor:
    return torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def jumped(latents: Tensor, velocity: Tensor, alpha: float, target: float) -> Tensor:
    """DDIM from one noise level to another (arXiv 2010.02502, eq. 12), for a velocity (arXiv 2202.00512)."""
    signal, spread = alpha**0.5, (1 - alpha) ** 0.5
    image, noise = signal * latents - spread * velocity, spread * latents + signal * velocity
    return target**0.5 * image + (1 - target) ** 0.5 * noise


@torch.no_grad()
def after_two_jumps(
    pipeline: StableDiffusionPipeline, latents: Tensor, velocity: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """From the teacher's step 1 over 3 to 5, of ten."""
    timesteps = (999, 799, 599)
    alphas = [pipeline.scheduler.alphas_cumprod[timestep].item() for timestep in timesteps]
    for k in range(2):
        latents = jumped(latents, velocity(latents, timesteps[k]), alphas[k], alphas[k + 1])
    return latents


def test_the_fast_phase_starts_where_the_trained_slow_expert_leads(
    home: Path,
    make_recipe: MakeRecipe,
    pipeline: StableDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(monkeypatch)
    recipe = make_recipe(**ON_TRAJECTORIES, learning_rate=0.05, seed=3)
    slow, _ = distill.train(recipe, home, work=tmp_path)
    given = watched.entries["fast"]
    pipeline.load_lora_weights(slow)
    embeds, _ = pipeline.encode_prompt("a red circle", "cpu", 2, False)
    torch.testing.assert_close(watched.entries["slow"].entry, noise(3, 4))
    latents = after_two_jumps(
        pipeline, noise(3, 4), lambda latents, timestep: pipeline.unet(latents, timestep, embeds).sample
    )
    torch.testing.assert_close(given.entry, latents, rtol=1e-3, atol=1e-4)
    assert (given.entry - given.states[:, 0]).abs().max() > 1e-2  # and not where the teacher is


def test_behind_a_guided_base_the_fast_phase_starts_where_two_evaluations_lead(
    home: Path,
    make_recipe: MakeRecipe,
    pipeline: StableDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(monkeypatch)
    phases = (Phase("slow", (1, 3)), Phase("fast", (5, 8), FAST, "fast.guide"))
    guidance = Guidance(scale=3.0, negative_prompt="blue")
    recipe = make_recipe(**{**ON_TRAJECTORIES, "phases": phases, "guidance": guidance}, scales=(2.0, 5.0))
    distill.train(recipe, home, work=tmp_path)
    given = watched.entries["fast"]
    assert ((given.scales >= 2) & (given.scales <= 5)).all()
    embeds, negative = pipeline.encode_prompt("a red circle", "cpu", 2, True, negative_prompt="blue")

    def guided(latents: Tensor, timestep: int) -> Tensor:
        with_, without = (pipeline.unet(latents, timestep, told).sample for told in (embeds, negative))
        return without + given.scales.view(-1, 1, 1, 1) * (with_ - without)

    latents = after_two_jumps(pipeline, noise(0, 1), guided)
    torch.testing.assert_close(given.entry, latents, rtol=1e-3, atol=1e-4)


def test_a_schedule_that_skips_the_first_step_is_trained_from_noise(
    home: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    recipe = make_recipe(**{**ON_TRAJECTORIES, "phases": (Phase("fast", (2, 8), FAST),)})
    distill.train(recipe, home, work=tmp_path)
    given = watched.entries["fast"]
    torch.testing.assert_close(given.entry, noise(0, 1))
    assert not torch.allclose(given.states[:, 0], noise(0, 1))


def test_a_missing_fast_expert_is_trained_again_behind_the_finished_slow_one(
    home: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(**EMBEDDED, learning_rate=0.05)
    files = distill.train(recipe, home, work=tmp_path / "a")
    before = [file.read_bytes() for file in files]
    for file in files[2:]:
        file.unlink()
    calls: list[str] = []
    distill.train(recipe, home, work=tmp_path / "b", progress=lambda stage, *_: calls.append(stage))
    assert [file.read_bytes() for file in files] == before
    assert set(calls) == {"sample", "train fast"}


@pytest.mark.usefixtures("_small_enough")
def test_guides_of_both_kinds_are_read_back_for_this_model(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.load_config(home / "model" / "unet")
    files = distill.train(make_recipe(**EMBEDDED), home, work=tmp_path / "a", out=tmp_path / "a")
    names = ["slow.safetensors", "slow.guide.safetensors", "fast.safetensors", "fast.guide.safetensors"]
    assert [file.name for file in files] == names
    assert guide.read(files[1], unet).config.kind == "embedding"
    provenance = loras.read_provenance(files[1])
    assert provenance is not None
    assert provenance == loras.read_provenance(files[0])
    assert provenance["method"] == "trajectories of the guided teacher"
    assert provenance["guidance"]["mode"] == "cfg"
    files = distill.train(make_recipe(**TINY), home, work=tmp_path / "b", out=tmp_path / "b")
    assert [file.name for file in files] == ["slow.guide.safetensors", "fast.guide.safetensors"]
    config = guide.read(files[0], unet).config
    assert (config.kind, config.scales) == ("tiny", (2.0, 9.0))


def test_prompts_are_sampled_in_turns_and_each_image_keeps_its_caption(
    home: Path,
    make_recipe: MakeRecipe,
    pipeline: StableDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(monkeypatch)
    (home / "prompts.txt").write_text("a red circle\na blue star\n")
    recipe = make_recipe(**{**ON_TRAJECTORIES, "samples": 3, "prompt": None, "prompts": "prompts.txt"}, steps=1)
    distill.train(recipe, home, work=tmp_path)
    given = watched.entries["slow"]
    for row, prompt in enumerate(("a red circle", "a blue star", "a red circle")):
        embeds, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        torch.testing.assert_close(given.embeds[given.caption[row]][None], embeds)
        expected = pipeline(
            prompt,
            height=16,
            width=16,
            num_inference_steps=10,
            guidance_scale=1,
            generator=torch.Generator().manual_seed(row),
            output_type="latent",
        ).images
        torch.testing.assert_close(watched.entries["fast"].states[row : row + 1, -1], expected, rtol=1e-4, atol=1e-4)


def test_the_recipes_own_image_is_used(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(home / "red.png")
    red, _ = distill.train(make_recipe(image="red.png"), home, work=tmp_path / "red", out=tmp_path / "r")
    assert not (tmp_path / "red" / "samples.png").exists()
    Image.new("RGB", (16, 16), "blue").save(home / "red.png")
    with pytest.raises(TrainingError, match="a checkpoint of another recipe: the captions or images were others"):
        distill.train(make_recipe(image="red.png"), home, work=tmp_path / "red", out=tmp_path / "b")
    blue, _ = distill.train(make_recipe(image="red.png"), home, work=tmp_path / "blue", out=tmp_path / "b")
    assert red.read_bytes() != blue.read_bytes()
