"""A Stable Diffusion model small enough to train in a test: random weights, the shipped example's tokenizer."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from glance_trt.recipe import Distill, Guidance, Lora, Phase, Recipe

TOKENIZER = Path(__file__).parents[2] / "examples" / "shapes" / "model" / "tokenizer"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in float16; 16 x 16 pixels are 8 x 8 latents."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            mid_block_type=None,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.7,
        )
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        beta_schedule="scaled_linear",
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def home(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder for a recipe, with the model in ``model``."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model)
    return folder


@pytest.fixture
def own_home(tiny_model: Path, tmp_path: Path) -> Path:
    """The same with a model of its own, to be altered."""
    shutil.copytree(tiny_model, tmp_path / "home" / "model")
    return tmp_path / "home"


@pytest.fixture
def read_log() -> Callable[[Path], list[dict[str, str]]]:
    """Reads a log of losses: its rows, by the names of its columns."""

    def read(file: Path) -> list[dict[str, str]]:
        return list(csv.DictReader(file.read_text().splitlines()))

    return read


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Makes a recipe of two experts around the untrained base; keyword arguments go to its `Distill` or `Recipe`."""

    def make(**changes: object) -> Recipe:
        distill: dict[str, object] = {"prompt": "a red circle", "rank": 2, "alpha": 6.0, "steps": 3}
        recipe: dict[str, object] = {
            "phases": (
                Phase("slow", (1, 3), Lora("loras/slow.safetensors")),
                Phase("middle", (5,)),
                Phase("fast", (6, 8, 10), Lora("loras/fast.safetensors")),
            ),
            "height": 16,
            "width": 16,
            "teacher_steps": 10,
            "guidance": Guidance(scale=3.0),
        }
        for key, value in changes.items():
            (recipe if key in Recipe.__dataclass_fields__ else distill)[key] = value
        return Recipe("tiny", "model", **{"distill": Distill(**distill), **recipe})  # type: ignore[arg-type]

    return make
