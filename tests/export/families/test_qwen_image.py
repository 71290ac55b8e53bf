"""Qwen-Image's graphs and pieces, with a tiny one: compared with diffusers' pipelines and what the paper prints."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageImg2ImgPipeline, QwenImagePipeline
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from glance_trt import recipe as recipes
from glance_trt.build import schedules
from glance_trt.bundle import Bundle
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export import large, trace
from glance_trt.export.families import Family, open_model
from glance_trt.export.families.qwen_image import DROPPED, TEMPLATE
from glance_trt.export.families.qwen_image_modules import Decoder, Encoder, Positions
from glance_trt.export.model import Model
from glance_trt.export.parity import Reference
from glance_trt.recipe import Guidance, Phase, Recipe
from glance_trt.runtime.tokenizing import Tokenizer

from ...models import parts, qwen_image
from . import fidelity

PROMPT, NEGATIVE = "a large red circle left of a small blue star", " "
TOKENS = 24  # of a prompt, with what follows it in the template
TEACHER_STEPS = 8
SIZES = [(32, 48), (56, 40)]  # the second has odd numbers of tokens
GLANCE = (Phase("slow", (1, 3, 5, 7, 9)), Phase("fast", (11, 21, 31, 41, 50)))
RELEASED_TIMESTEPS = [1000, 980, 956, 936, 912, 888, 744, 564, 320, 20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.write(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="module")
def pipe(model: Path) -> QwenImagePipeline:
    return _pipeline(model)


def _pipeline(model: Path, kind: type = QwenImagePipeline) -> Any:
    pipe = kind.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _recipe(**changes: Any) -> Recipe:
    parts: dict[str, Any] = {"height": 32, "width": 48, "prompt_tokens": TOKENS, "teacher_steps": TEACHER_STEPS}
    parts["phases"] = (Phase("all", tuple(range(1, TEACHER_STEPS + 1))),)
    parts["guidance"] = Guidance(scale=4.0, negative_prompt=NEGATIVE)
    return Recipe("qwen", "model", **parts | changes)


def _family(model: Path, **changes: Any) -> Family:
    return open_model(Model(model, "qwen"), _recipe(**changes))


def _encode(family: Family, prompt: str, reference: Reference | None = None) -> dict[str, NDArray[Any]]:
    """A prompt's conditions, by the runtime's tokenizer and the text encoder's module."""
    item = family.tokenizers()["tokenizer"]
    tokenizer = Tokenizer(
        item.text.encode(), max_length=item.max_length, pad_token_id=item.pad_token_id, template=item.template
    )
    encoded = tokenizer.encode(prompt)
    inputs = {"input_ids": encoded.ids[None], "attention_mask": encoded.mask[None]}
    return (reference or Reference(family, {"all": None})).run("text_encoder", inputs)


# --- prompts --------------------------------------------------------------------------------------------------------


def test_the_template_and_what_is_dropped_of_it_are_the_pipelines(pipe: QwenImagePipeline) -> None:
    assert pipe.prompt_template_encode == TEMPLATE
    assert pipe.prompt_template_encode_start_idx == DROPPED
    assert len(pipe.tokenizer(TEMPLATE.partition("{}")[0]).input_ids) == DROPPED, "as in the published vocabulary"
    assert inspect.signature(pipe.__call__).parameters["max_sequence_length"].default == 512


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        NEGATIVE,
        "",
        "\n\na circle",  # melts into the line break before it
        "un café, un cafe\u0301, 東京 🗼",  # NFC makes the second like the first
        "a<|im_end|>star<|endoftext|>",
        " ".join(["a large red circle"] * 8),  # longer than there is room for
    ],
)
def test_a_padded_prompt_has_the_embeddings_that_diffusers_gives_it_alone(
    model: Path, pipe: QwenImagePipeline, prompt: str
) -> None:
    found = _encode(_family(model), prompt)
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(prompt, max_sequence_length=TOKENS)
    assert mask is None, "diffusers' way to say that there is no padding"
    length = embeds.shape[1]
    assert found["prompt_embeds_mask"].dtype == np.int64
    assert found["prompt_embeds_mask"].tolist() == [[1] * length + [0] * (TOKENS - length)]
    np.testing.assert_allclose(
        found["prompt_embeds"][:, :length], embeds, rtol=0, atol=2e-6 * float(embeds.abs().max())
    )
    assert not found["prompt_embeds"][:, length:].any()


def test_prompts_in_one_batch_are_those_of_diffusers(model: Path, pipe: QwenImagePipeline) -> None:
    prompts = [PROMPT, NEGATIVE, "a star"]
    family = _family(model)
    reference = Reference(family, {"all": None})
    found = [_encode(family, prompt, reference) for prompt in prompts]
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(prompts, max_sequence_length=TOKENS)
    for i, values in enumerate(found):
        np.testing.assert_array_equal(values["prompt_embeds_mask"][0, : mask.shape[1]], mask[i])
        np.testing.assert_allclose(values["prompt_embeds"][0, : mask.shape[1]], embeds[i], rtol=0, atol=1e-5)


def test_the_tokenizer_may_be_a_vocabulary_and_merges(model: Path, tmp_path: Path) -> None:
    """As the published model has it, without a tokenizer.json."""
    folder = shutil.copytree(model, tmp_path / "model") / "tokenizer"
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    added = {str(item.pop("id")): item for item in content["added_tokens"]}
    assert not {"<|im_start|>", "<|im_end|>"} & set(vocabulary)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    expected, found = _encode(_family(model), PROMPT), _encode(_family(folder.parent), PROMPT)
    np.testing.assert_array_equal(found["prompt_embeds"], expected["prompt_embeds"])
    assert found["prompt_embeds_mask"].sum() > 10


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_the_language_model_is_found_wherever_transformers_has_put_it(model: Path, tmp_path: Path, prefix: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {name.replace("model.", prefix, 1): value for name, value in load_file(file).items()}
    assert any(name.startswith("visual.") for name in tensors), "the vision tower, which nothing uses"
    save_file(tensors, file, {"format": "pt"})
    expected, found = _encode(_family(model), PROMPT), _encode(_family(folder), PROMPT)
    np.testing.assert_array_equal(found["prompt_embeds"], expected["prompt_embeds"])


def test_a_configuration_may_hold_that_of_the_language_model_unseparated(model: Path, tmp_path: Path) -> None:
    """As the published model's does, whose rotary embedding is written in the way of that time, too."""
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "text_encoder" / "config.json"
    content = json.loads(file.read_text())
    text = content.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "model_type": "qwen2_5_vl"}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    file.write_text(json.dumps(content | text))
    expected, found = _encode(_family(model), PROMPT), _encode(_family(folder), PROMPT)
    np.testing.assert_array_equal(found["prompt_embeds"], expected["prompt_embeds"])
    reduced = _family(folder).reduced({})[0].sources()["text_encoder"].build()
    assert reduced.encoder.config.rope_parameters["mrope_section"] == rope["mrope_section"]


# --- steps and images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [TOKENS, 70])
def test_every_step_and_the_image_are_those_of_diffusers(
    model: Path, pipe: QwenImagePipeline, size: tuple[int, int], tokens: int
) -> None:
    """diffusers evaluates the prompt and the negative one apart, without padding; we both at once, with."""
    family = _family(model, height=size[0], width=size[1], prompt_tokens=tokens)
    noise, states = torch.randn(1, 16, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(7)), []

    def keep(_pipe: Any, _i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        states.append(pipe._unpack_latents(values["latents"], *size, pipe.vae_scale_factor)[:, :, 0].numpy())
        return values

    expected = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=4.0,
        height=size[0],
        width=size[1],
        num_inference_steps=TEACHER_STEPS,
        latents=pipe._pack_latents(noise, 1, 16, *noise.shape[2:]),
        output_type="np",
        callback_on_step_end=keep,
    ).images
    reference = Reference(family, {"all": None})
    own, negative = (_encode(family, prompt, reference) for prompt in (PROMPT, NEGATIVE))
    conditions = own | {f"negative_{name}": value for name, value in negative.items()}
    latents = noise.numpy()
    for step, state in zip(schedules(family, family.recipe)["default"].steps, states, strict=True):  # type: ignore[attr-defined]
        scalars = {"timestep": step.timestep, "coefficients": step.coefficients, "guidance_scale": 4.0}
        inputs = {name: np.array(value, np.float32) for name, value in scalars.items()} | conditions
        latents = reference.run("denoiser.all", inputs | {"latents": latents})["latents_out"]
        np.testing.assert_allclose(latents, state, rtol=0, atol=1e-5 * float(np.abs(state).max()))
    image = reference.run("decoder", {"latents": latents})["images"]
    assert image.shape == (1, *size, 3)
    np.testing.assert_allclose(image, expected * 255, rtol=0, atol=0.51)
    assert image.std() > 10


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 2), (32, 33), (64, 64), (104, 58)])
def test_positions_are_those_of_diffusers(size: tuple[int, int]) -> None:
    axes = [16, 56, 56]
    cos, sin = Positions(axes)([(1, *size)], 512)
    image, text = QwenEmbedRope(theta=10000, axes_dim=axes, scale_rope=True)([(1, *size)], max_txt_seq_len=512)
    # But for the last bit: torch.polar takes its sines from another library than torch.sin.
    torch.testing.assert_close(torch.complex(cos, sin)[:, 0], torch.cat([text, image]), rtol=0, atol=1.2e-7)


def test_an_image_is_encoded_as_diffusers_encodes_it(model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), np.uint8)
    pipe = _pipeline(model, QwenImageImg2ImgPipeline)
    pipe.scheduler.set_timesteps(TEACHER_STEPS, mu=0.5)
    timestep, generator = pipe.scheduler.timesteps[2:3], torch.Generator().manual_seed(3)
    image = pipe.image_processor.preprocess(pixels / 255)
    with torch.no_grad():
        packed = pipe.prepare_latents(image, timestep, 1, 16, 32, 48, torch.float32, "cpu", generator)
        expected = pipe._unpack_latents(packed, 32, 48, pipe.vae_scale_factor)[:, :, 0]
        generator = torch.Generator().manual_seed(3)
        noise = [torch.randn(1, 16, 8, 12, generator=generator) for _ in range(2)]  # of the sample, of the start
        encoder = Encoder(AutoencoderKLQwenImage.from_pretrained(model / "vae", dtype=torch.float32))
        latents = encoder(torch.from_numpy(pixels), noise[0])
    sigma = float(timestep) / 1000
    torch.testing.assert_close((1 - sigma) * latents + sigma * noise[1], expected, rtol=0, atol=2e-6)
    assert [port.source for port in _family(model, from_image=True).sources()["encoder"].inputs] == ["image", "noise"]


def test_the_decoder_makes_the_pixels_of_diffusers(model: Path) -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(model / "vae", dtype=torch.float32).eval()
    latents = torch.randn(2, 16, 9, 6, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        image = vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
        found = Decoder(vae)(latents)
    assert found.dtype == torch.uint8
    torch.testing.assert_close(found.float(), (image.permute(0, 2, 3, 1) + 1) * 127.5, rtol=0, atol=0.51)


def test_convolutions_are_of_single_frames(model: Path) -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(model / "vae").eval()
    decoder = Decoder(vae)
    assert not [module for module in decoder.modules() if isinstance(module, torch.nn.Conv3d)]


# --- schedules ------------------------------------------------------------------------------------------------------


def test_the_schedule_at_1024_by_1024_is_the_papers(model: Path) -> None:
    """arXiv 2512.02899: the steps 1, 3, 5, 7, 9 and 11, 21, 31, 41, 50 of Qwen-Image's 50, consistently joined."""
    family = _family(model, height=512, width=512, phases=GLANCE, teacher_steps=50)
    assert family.image_tokens(512, 512) == 4096, "a quarter of the published model's pixels make a latent"
    steps = schedules(family, family.recipe)["default"].steps  # type: ignore[attr-defined]
    printed = [1000, 979.1915, 957.5157, 934.9171, 911.3354, 886.7053, 745.0728, 562.9505, 320.0802, 20]
    assert [round(step.timestep, 4) for step in steps] == printed
    moved = [-0.0208, -0.0217, -0.0226, -0.0236, -0.0246, -0.1416, -0.1821, -0.2429, -0.3001, -0.0200]
    assert [round(step.coefficients[2], 4) for step in steps] == moved
    assert sum(step.coefficients[2] for step in steps) == pytest.approx(-1, abs=1e-6)
    assert {step.coefficients[:2] for step in steps} == {(1.0, 1.0)}


def test_the_released_sampler_is_that_of_the_released_code(model: Path) -> None:
    """It integrates from 1 to 0.946 only, and starts again from 1; its timesteps are rounded to bfloat16."""
    family = _family(model, height=512, width=512, phases=GLANCE, teacher_steps=50, sampler="released")
    steps = schedules(family, family.recipe)["default"].steps  # type: ignore[attr-defined]
    assert [step.timestep for step in steps] == RELEASED_TIMESTEPS
    moved = [step.coefficients[2] for step in steps]
    assert round(1 + sum(moved[:5]), 3) == 0.946
    assert sum(moved[5:]) == pytest.approx(-1, abs=1e-6)
    assert round(sum(moved), 3) == -1.054


@pytest.mark.parametrize("size", SIZES)
def test_each_size_has_the_pipelines_own_schedule(model: Path, pipe: QwenImagePipeline, size: tuple[int, int]) -> None:
    family = _family(model, sizes=((56, 40),))
    name = "default" if size == SIZES[0] else "56x40"
    found = schedules(family, family.recipe)[name]  # type: ignore[attr-defined]
    pipe(PROMPT, height=size[0], width=size[1], num_inference_steps=TEACHER_STEPS, output_type="latent")
    assert found.sizes == (size,)
    assert [step.timestep for step in found.steps] == pipe.scheduler.timesteps.tolist()
    assert [np.float32(step.coefficients[2]) for step in found.steps] == pipe.scheduler.sigmas.diff().tolist()


# --- graphs ---------------------------------------------------------------------------------------------------------

TARGETS = (  # those of the paper
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
    "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
)  # fmt: skip
RECIPE: dict[str, Any] = {
    "height": 32,
    "width": 48,
    "sizes": [[56, 40]],
    "prompt_tokens": 40,
    "targets": TARGETS,
    "guidance": {"mode": "cfg", "scale": 4.0, "negative_prompt": NEGATIVE},
}


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> fidelity.Made:
    return fidelity.make(model, tmp_path_factory.mktemp("qwen") / "made", **RECIPE, from_image=True)


def test_every_graph_is_pytorchs_at_every_size(made: fidelity.Made) -> None:
    graphs = Bundle.open(made.bundle).manifest.graphs
    assert set(graphs) == {"text_encoder", "denoiser.slow", "denoiser.fast", "decoder", "encoder"}
    fidelity.check_graphs(made)


def test_images_are_those_of_diffusers_with_a_lora_for_each_phase(made: fidelity.Made) -> None:
    fidelity.check_images(made)


def test_tensorrt_rtx_takes_every_graph_where_the_transformers_compute_in_bfloat16(model: Path, tmp_path: Path) -> None:
    made = fidelity.make(model, tmp_path / "made", **RECIPE, rtx=True)
    fidelity.check_rtx(made)
    engines = Bundle.open(made.bundle).manifest.engines["rtx89"].graphs
    assert {name: item.dtype for name, item in engines.items()} == {
        "text_encoder": "bfloat16",
        "denoiser.slow": "bfloat16",
        "denoiser.fast": "bfloat16",
        "decoder": None,
    }


def test_no_graph_holds_numbers_that_tensorrt_lacks_nor_tables(model: Path, made: fidelity.Made) -> None:
    """Complex and float64 numbers; the 4,096 positions of diffusers, or what every token may see of every other."""
    encoder = _family(model, prompt_tokens=512).sources()["text_encoder"]
    graphs = [ir.load(path) for path in sorted(made.bundle.glob("*.float32.onnx"))] + [trace.trace(encoder, "bfloat16")]
    assert len(graphs) == 6
    for graph in (model.graph for model in graphs):
        values = [value for node in graph.all_nodes() for value in node.outputs] + list(graph.initializers.values())
        cast = [node.attributes["to"].as_int() for node in graph.all_nodes() if node.op_type == "Cast"]
        found = {value.dtype for value in values if value.dtype} | {ir.DataType(item) for item in cast}
        assert found <= {ir.DataType[name] for name in ("FLOAT", "BFLOAT16", "INT64", "INT32", "BOOL", "UINT8")}
        attributes = [
            a.as_tensor() for node in graph.all_nodes() for a in node.attributes.values() if a.name == "value"
        ]
        constants = [value.const_value for value in graph.initializers.values()] + attributes
        sizes = [tensor.nbytes for tensor in constants if not isinstance(tensor, ir.ExternalTensor)]
        assert max(sizes) <= 8 * (DROPPED + 512), "at most a number for each token"
        assert "IsNaN" not in {node.op_type for node in graph.all_nodes()}, "attention as engines know it"


def test_a_reduced_model_has_the_blocks_of_the_large_one_and_passes_parity(model: Path) -> None:
    family = _family(model, from_image=True)
    small, guides = family.reduced({})
    for kind in family.sources():
        reduced, whole = (item.sources()[kind].build() for item in (small, family))
        assert {type(module) for module in reduced.modules()} == {type(module) for module in whole.modules()}
    stored = dict.fromkeys(("text_encoder", "denoiser"), "BF16")
    results = large.check_reduced(small, guides, stored, dict.fromkeys(stored, "float32"))
    assert [item.graph for item in results] == list(stored)


# --- what a build asks ----------------------------------------------------------------------------------------------


def test_both_transformers_compute_in_bfloat16_instead_of_float16(model: Path) -> None:
    family = _family(model, from_image=True)
    found = {kind: family.dtype(kind, "float16") for kind in family.components}
    apart = dict.fromkeys(("decoder", "encoder"), "float16")
    assert found == {"text_encoder": "bfloat16", "denoiser": "bfloat16", **apart}
    assert {family.dtype(kind, "float32") for kind in family.components} == {"float32"}


def test_the_files_that_decide_what_is_built_are_named(model: Path) -> None:
    found = {str(path.relative_to(model)) for path in _family(model).files()}
    tokenizer = {f"tokenizer/{path.name}" for path in (model / "tokenizer").iterdir()}
    configs = {f"{part}/config.json" for part in ("text_encoder", "transformer", "vae")}
    assert found == {"model_index.json", "scheduler/scheduler_config.json", *configs, *tokenizer}


def test_an_adapter_is_known_and_sent_to_another_process_without_pytorch(model: Path) -> None:
    code = f"""
import pickle, sys
from pathlib import Path
from glance_trt.export.families import open_model
from glance_trt.export.model import Model
from glance_trt.recipe import Phase, Recipe
family = open_model(Model(Path({str(model)!r}), "qwen"), Recipe("qwen", "model", (Phase("all", (1,)),), 32, 32))
print([port.shape for port in pickle.loads(pickle.dumps(family)).sources()["text_encoder"].inputs])
print({{"torch", "diffusers", "transformers"}} & set(sys.modules))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[('batch', 546), ('batch', 546)]\nset()\n"


def test_the_image_is_described_by_the_models_own_factors(model: Path, pipe: QwenImagePipeline) -> None:
    image = _family(model).image()
    assert (image.latent_scale, image.latent_channels) == (pipe.vae_scale_factor, pipe.vae.config.z_dim) == (4, 16)
    with pytest.raises(RecipeError, match=r"height: 58 is not a multiple of 8, as this model needs; try 56$"):
        _family(model, height=58).image()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "QwenImageEditPipeline is not supported"),
        ("model_index.json", {"_class_name": "QwenImageLayeredPipeline"}, "QwenImageLayeredPipeline is not supported"),
        (
            "model_index.json",
            {"controlnet": ["diffusers", "QwenImageControlNetModel"]},
            "controlnet is no part of qwen-image, which has scheduler, text_encoder, tokenizer, transformer, vae$",
        ),
        ("model_index.json", {"text_encoder": [None, None]}, "model_index.json has no text_encoder$"),
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderKL"]},
            "the vae is a AutoencoderKL; expected a AutoencoderKLQwenImage$",
        ),
        ("transformer/config.json", {"zero_cond_t": True}, "transformer: zero_cond_t is on, as in models that edit"),
        ("transformer/config.json", {"use_additional_t_cond": True}, "transformer: use_additional_t_cond is on"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "transformer: use_layer3d_rope is on"),
        ("transformer/config.json", {"guidance_embeds": True}, "transformer: guidance_embeds is on"),
        (
            "transformer/config.json",
            {"in_channels": 128},
            "takes 128 channels and the VAE images of 3; expected 64, four times the VAE's z_dim, and 3$",
        ),
        ("vae/config.json", {"input_channels": 4}, "the VAE images of 4; expected 64"),
        ("text_encoder/config.json", {"text_config": {"use_sliding_window": True}}, "use_sliding_window is on"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler, and this model was"),
    ],
)
def test_models_that_are_not_qwen_image_are_refused(
    model: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        _family(parts.altered(model, tmp_path, file, **changes)).scheduler_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 1025}, "prompt_tokens: 1025; this model takes at most 1024$"),
        ({"guidance": Guidance(rescale=0.7)}, "guidance.rescale: Qwen-Image rescales the guided prediction by itself"),
        ({"guidance": Guidance("embedded")}, "this model takes no guidance scale itself"),
        ({"phases": (Phase("all", (1,), guide="guide.safetensors"),)}, "guides are for UNets"),
        ({"decoder": "tiny"}, "decoder: QwenImagePipeline takes no AutoencoderTiny; leave it out$"),
        ({"sides": (32, 64)}, "sides: this model's schedule depends on the image's size; list the sizes under 'sizes'"),
    ],
)
def test_recipes_that_ask_for_what_the_model_has_not_are_refused(
    model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        _family(model, **changes).image()


def test_the_shipped_recipe_is_the_papers(model: Path) -> None:
    """arXiv 2512.02899 and its released code, for Qwen-Image."""
    plan, _ = recipes.load("qwen-image")
    assert (plan.height, plan.width, plan.teacher_steps, plan.sampler) == (1024, 1024, 50, "consistent")
    assert [phase.steps for phase in plan.phases] == [phase.steps for phase in GLANCE]
    assert plan.guidance == Guidance("cfg", 5.0, negative_prompt=" ")
    assert open_model(Model(model, "qwen"), plan).name == "qwen-image"
