from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from glance_trt import distill
from glance_trt.distill import base, experts, fitting, loras, pair
from glance_trt.errors import ModelError, OutputError, RecipeError, TrainingError
from glance_trt.recipe import Lora, Phase, Recipe

MakeRecipe = Callable[..., Recipe]
ReadLog = Callable[[Path], list[dict[str, str]]]


class Recorder(nn.Module):
    """Stands for a UNet: keeps what it is given and predicts zero, so that the loss is the target's mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, sample: Tensor, timestep: Tensor, embeds: Tensor) -> SimpleNamespace:
        self.calls.append((sample, timestep, embeds))
        return SimpleNamespace(sample=torch.zeros_like(sample) + self.weight)


def a_pair() -> pair.Pair:
    generator = torch.Generator().manual_seed(1)
    return pair.Pair(torch.randn(1, 4, 8, 8, generator=generator), torch.ones(1, 3, 16), torch.zeros(1, 3, 16))


SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIM, zero terminal SNR": {
        "_class_name": "DDIMScheduler",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "clip_sample": False,
    },
    "DDIM of SD 1": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "clip_sample": False,
    },
    "Euler between timesteps": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"},
    "Euler, zero terminal SNR": {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    },
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name.startswith("DDIM")])
def test_loss_is_the_error_to_the_noise_or_velocity_of_diffusers(name: str, prediction_type: str) -> None:
    config = {**SCHEDULERS[name], "prediction_type": prediction_type}
    reference = diffusers.DDIMScheduler.from_config(config)
    reference.set_timesteps(10)
    knots = experts.knots_of(config, 10, (1, 3, 10))
    unet, data = Recorder(), a_pair()
    loss_of_step = experts.ground_truth_loss(unet, data, knots, prediction_type=prediction_type, batch_size=4)
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        replay = torch.Generator()
        replay.set_state(generator.get_state())
        loss, timesteps = loss_of_step(generator)
        torch.randint(3, (4,), generator=replay), torch.rand(4, generator=replay)
        noise = torch.randn(4, 4, 8, 8, generator=replay)
        assert set(timesteps) <= set(reference.timesteps[[0, 2, 9]].tolist())
        latents, times = data.latents.expand(4, -1, -1, -1), torch.tensor(timesteps).long()
        torch.testing.assert_close(unet.calls[-1][0], reference.add_noise(latents, noise, times), rtol=1e-6, atol=1e-6)
        target = noise if prediction_type == "epsilon" else reference.get_velocity(latents, noise, times)
        torch.testing.assert_close(loss, target.square().mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name.startswith("Euler")])
def test_noised_latents_are_the_model_input_of_diffusers_euler_scheduler(name: str) -> None:
    reference = diffusers.EulerDiscreteScheduler.from_config(SCHEDULERS[name])
    reference.set_timesteps(7)
    unet, data = Recorder(), a_pair()
    for step in range(1, 8):
        knots = experts.knots_of(SCHEDULERS[name], 7, (step,))
        loss_of_step = experts.ground_truth_loss(unet, data, knots, prediction_type="epsilon")
        _, (timestep,) = loss_of_step(torch.Generator().manual_seed(step))
        replay = torch.Generator().manual_seed(step)
        torch.randint(1, (1,), generator=replay), torch.rand(1, generator=replay)
        noise = torch.randn(1, 4, 8, 8, generator=replay)
        expected = reference.timesteps[step - 1]
        assert timestep == expected
        reference._step_index = None
        noised = reference.add_noise(data.latents, noise, expected[None])
        scaled = reference.scale_model_input(noised, expected)
        torch.testing.assert_close(unet.calls[-1][0], scaled, rtol=1e-5, atol=1e-5)


def test_a_first_step_at_zero_terminal_snr_is_pure_noise() -> None:
    knots = experts.knots_of(SCHEDULERS["DDIM, zero terminal SNR"], 10, (1,))
    assert knots.timesteps.tolist() == [999]
    assert knots.alphas_cumprod.tolist() == [0]


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_captions_are_dropped_at_the_given_rate_and_knots_drawn_uniformly(dropout: float, share: float) -> None:
    knots = experts.knots_of(SCHEDULERS["DDIM of SD 1"], 50, (1, 3, 5, 7, 9))
    unet = Recorder()
    loss_of_step = experts.ground_truth_loss(
        unet, a_pair(), knots, prediction_type="epsilon", batch_size=4000, caption_dropout=dropout
    )
    _, timesteps = loss_of_step(torch.Generator().manual_seed(0))
    assert (unet.calls[0][2] == 0).all(dim=(1, 2)).float().mean().item() == pytest.approx(share, abs=0.03)
    assert sorted(set(timesteps)) == [821, 861, 901, 941, 981]
    assert all(timesteps.count(timestep) / 4000 == pytest.approx(0.2, abs=0.03) for timestep in set(timesteps))


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
    recipe = make_recipe(phases=phases, steps=40, learning_rate=0.02, rank=4, alpha=16.0, batch_size=4)
    (file,) = distill.train(recipe, home, work=tmp_path)
    loaded = base.load_base(home / "model")
    knots = experts.knots_of(base.read_scheduler_config(home / "model"), 10, (8, 9, 10))
    data = pair.encode(loaded, Image.open(tmp_path / "pair.png"), "a red circle")
    loss_of_step = experts.ground_truth_loss(loaded.unet, data, knots, prediction_type="v_prediction", batch_size=64)
    with torch.no_grad():
        before = loss_of_step(torch.Generator().manual_seed(99)).value.item()
        loaded.unet.load_lora_adapter(file, prefix="unet")
        after = loss_of_step(torch.Generator().manual_seed(99)).value.item()
    assert after < 0.95 * before


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
        assert torch.equal(loaded, expected)
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


def test_base_weights_are_bit_identical_after_training(
    home: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    distill.train(make_recipe(learning_rate=0.1), home, work=tmp_path / "work")
    stored = load_file(home / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    after = loaded[0].state_dict()
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[key], stored[key].float()) for key in stored)


def test_an_interrupted_run_resumes_to_byte_identical_results(
    home: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(steps=5, caption_dropout=0.3)
    whole = distill.train(recipe, home, work=tmp_path / "a", out=tmp_path / "whole")
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)

    def stop(stage: str, done: float, total: float) -> None:
        if (stage, done) == ("train fast", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill.train(recipe, home, work=tmp_path / "b", out=tmp_path / "parts", progress=stop)
    image = (tmp_path / "b" / "pair.png").stat().st_mtime_ns
    calls: list[tuple[str, float, float]] = []
    parts = distill.train(
        recipe, home, work=tmp_path / "b", out=tmp_path / "parts", progress=lambda *call: calls.append(call)
    )
    assert calls == [("train fast", step, 5) for step in (0, 3, 4, 5)]
    assert (tmp_path / "b" / "pair.png").stat().st_mtime_ns == image
    assert [file.read_bytes() for file in parts] == [file.read_bytes() for file in whole]
    for phase in ("slow", "fast"):
        log = f"{phase}.loss.csv"
        assert (tmp_path / "a" / log).read_text() == (tmp_path / "b" / log).read_text()


def test_progress_reports_every_step_of_every_stage(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    calls: list[tuple[str, float, float]] = []
    distill.train(make_recipe(), home, work=tmp_path / "work", progress=lambda *call: calls.append(call))
    assert calls == [
        *(("sample", step, 10) for step in range(11)),
        *(("train slow", step, 3) for step in range(4)),
        *(("train fast", step, 3) for step in range(4)),
    ]


def test_a_checkpoint_of_another_recipe_is_refused(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    work = tmp_path / "work"
    distill.train(make_recipe(), home, work=work)
    shutil.rmtree(home / "loras")
    with pytest.raises(
        TrainingError, match=r"slow\.pt: a checkpoint of another recipe: learning_rate was 0\.0005, and is 0\.001 now"
    ):
        distill.train(make_recipe(learning_rate=0.001), home, work=work)
    with pytest.raises(TrainingError, match=r"pair\.png: sampled with another model, prompt.*delete the file"):
        distill.train(make_recipe(prompt="a blue star"), home, work=work)


def test_an_existing_lora_is_never_overwritten_unasked(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    work = tmp_path / "work"
    files = distill.train(make_recipe(), home, work=work)
    kept = files[1].read_bytes()
    with pytest.raises(OutputError, match=r"slow\.safetensors: exists, from another run: steps was 3, and is 4 now"):
        distill.train(make_recipe(steps=4), home, work=work)
    assert distill.train(make_recipe(steps=4), home, work=work, overwrite=True) == files
    assert files[1].read_bytes() != kept
    files[1].write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"fast\.safetensors: exists, and is no result of this training"):
        distill.train(make_recipe(steps=4), home, work=work)
    assert files[1].read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": None}, "^distill: missing; training needs at least a prompt"),
        ({"phases": (Phase("all", (1, 2)),)}, "^phases: none names a lora file"),
        (
            {"phases": (Phase("a", (1,), Lora("x")), Phase("b", (2,), Lora("x")))},
            r"^phases\[1\]\.lora\.file: x is another phase's too",
        ),
        ({"phases": (Phase("a", (11,), Lora("x")),)}, r"^phases\.a: step 11 is outside the teacher's 1\.\.10"),
        ({"width": 20}, "^width: 20 is not a multiple of 8"),
        ({"targets": ("to_q", "to_kk")}, r"^distill\.targets\[1\]: 'to_kk' names no linear.*did you mean 'to_k'\?"),
        ({"targets": ("attn1",)}, r"^distill\.targets\[0\]: 'attn1' names no linear"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused(
    changes: dict[str, Any], message: str, home: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        distill.train(make_recipe(**changes), home, work=tmp_path / "work")


def test_the_recipes_own_image_is_used(home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(home / "red.png")
    red, _ = distill.train(make_recipe(image="red.png"), home, work=tmp_path / "red", out=tmp_path / "r")
    assert not (tmp_path / "red" / "pair.png").exists()
    Image.new("RGB", (16, 16), "blue").save(home / "red.png")
    with pytest.raises(TrainingError, match="a checkpoint of another recipe: image was "):
        distill.train(make_recipe(image="red.png"), home, work=tmp_path / "red", out=tmp_path / "b")
    blue, _ = distill.train(make_recipe(image="red.png"), home, work=tmp_path / "blue", out=tmp_path / "b")
    assert red.read_bytes() != blue.read_bytes()


def test_a_model_of_another_family_is_refused(own_home: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the scheduler is a FlowMatchEulerDiscreteScheduler, and flow matching"):
        distill.train(make_recipe(scheduler="FlowMatchEulerDiscreteScheduler"), own_home, work=tmp_path)
    index = own_home / "model" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(ModelError, match="a FluxPipeline; phase experts are trained for a StableDiffusionPipeline"):
        distill.train(make_recipe(), own_home, work=tmp_path)
