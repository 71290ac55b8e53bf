"""Checkpoints in one file: their tensors, found without reading weights, against what diffusers' own loaders make."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
)

from glance_trt.errors import ModelError
from glance_trt.export import single_file, weights
from glance_trt.export.model import Model
from glance_trt.export.weights import Computed, TensorRef

from ..conftest import TOKENIZER
from ..models import checkpoints, qwen_image, sd3
from ..models.checkpoints import DENOISER, part, prefixed
from ..models.in_process import InProcess


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Conversions run in this process, and none are known beforehand."""
    monkeypatch.setattr(single_file, "Worker", InProcess)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def assert_same(found: Mapping[str, TensorRef], expected: torch.nn.Module) -> None:
    """Every parameter of a module that diffusers has loaded is found, bit by bit, under its name or the older one."""
    state = expected.state_dict()
    for name, tensor in state.items():
        known = [other for other in (name, f"text_model.{name}", name.removeprefix("text_model.")) if other in found]
        if name == "encoder.embed_tokens.weight":  # T5's second name of the embeddings
            known = ["shared.weight"]
        assert known, name
        ref = found[known[0]]
        assert ref.shape == tuple(tensor.shape)
        assert ref.length == tensor.nbytes
        assert torch.equal(ref.read(), tensor), name
    assert len(found) >= len(state) - 1


def clip(hidden: int, *, projection: int | None = None, layers: int = 2) -> CLIPTextModel:
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(CLIPTokenizer.from_pretrained(str(TOKENIZER))),
            hidden_size=hidden,
            intermediate_size=32,
            projection_dim=projection or hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
    )


@pytest.fixture(scope="module")
def sd1(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model in one file, laid out as Stable Diffusion 1 was published, with some of what else was in those."""
    tensors = {
        **prefixed(DENOISER, checkpoints.unet(*part(tiny_model, "unet"))),
        **prefixed("first_stage_model.", checkpoints.vae(*part(tiny_model, "vae"))),
        **prefixed("cond_stage_model.transformer.", checkpoints.clip(part(tiny_model, "text_encoder")[0])),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.linspace(1, 0, 1000),
        "model_ema.decay": torch.tensor(0.9999),
    }
    file = tmp_path_factory.mktemp("sd1") / "sd.safetensors"
    save_file(tensors, file, {"format": "pt"})
    return Model(tiny_model, file.name, file)


def test_stable_diffusion_1_is_what_diffusers_reads(sd1: Model) -> None:
    pipeline = StableDiffusionPipeline.from_single_file(
        str(sd1.file), config=str(sd1.folder), safety_checker=None, torch_dtype=torch.float16, local_files_only=True
    )
    for name in ("unet", "vae", "text_encoder"):
        found = sd1.tensors(name)
        assert_same(found, getattr(pipeline, name))
        assert {ref.file for ref in found.values()} == {sd1.file}
        assert not any(isinstance(ref, Computed) for ref in found.values()), "all of it lies in the file as it is"


def test_stable_diffusion_xl_is_what_diffusers_reads(tiny_model: Path, tmp_path: Path) -> None:
    """Its second text encoder is OpenCLIP's: q, k and v are one tensor, and the projection is transposed."""
    folder, file = tmp_path / "xl", tmp_path / "xl.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=40,
            attention_head_dim=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=44,
            use_linear_projection=True,
            norm_num_groups=4,
        )
        tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
        pipeline = StableDiffusionXLPipeline(
            AutoencoderKL.from_pretrained(tiny_model / "vae"),
            clip(16),
            clip(24, projection=20),
            tokenizer,
            tokenizer,
            unet,
            EulerDiscreteScheduler(),
        )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    second = checkpoints.open_clip(part(folder, "text_encoder_2")[0])
    tensors = {
        **prefixed(DENOISER, checkpoints.unet(*part(folder, "unet"))),
        **prefixed("first_stage_model.", checkpoints.vae(*part(folder, "vae"))),
        **prefixed("conditioner.embedders.0.transformer.", checkpoints.clip(part(folder, "text_encoder")[0])),
        **prefixed("conditioner.embedders.1.model.", second),
    }
    save_file(tensors, file)
    read = StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(folder), torch_dtype=torch.float16, local_files_only=True
    )
    model = Model(folder, file.name, file)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert_same(model.tensors(name), getattr(read, name))
        assert_same(model.tensors(name), getattr(pipeline, name))
    computed = {name for name, ref in model.tensors("text_encoder_2").items() if isinstance(ref, Computed)}
    assert computed == {"text_projection.weight"}, "q, k and v are ranges of rows"


def test_stable_diffusion_2_has_the_text_encoder_of_openclip(tiny_model: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "sd2", tmp_path / "sd2.safetensors"
    shutil.copytree(tiny_model, folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = clip(16).half()
    encoder.save_pretrained(folder / "text_encoder")
    tensors = {
        **prefixed(DENOISER, checkpoints.unet(*part(folder, "unet"))),
        **prefixed("cond_stage_model.model.", checkpoints.open_clip(part(folder, "text_encoder")[0])),
    }
    save_file(tensors, file)
    assert_same(Model(folder, file.name, file).tensors("text_encoder"), encoder)


def test_stable_diffusion_3_is_what_diffusers_reads(tmp_path: Path) -> None:
    """Its last modulation has scale and shift the other way round, and its first text encoder has no projection."""
    folder, file = sd3.make(tmp_path / "sd3"), tmp_path / "sd3.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip(16, projection=16).save_pretrained(folder / "text_encoder")
    first = checkpoints.clip(part(folder, "text_encoder")[0])
    del first["text_projection.weight"]
    tensors = {
        **prefixed(DENOISER, checkpoints.sd3(part(folder, "transformer")[0])),
        **prefixed("first_stage_model.", checkpoints.vae(*part(folder, "vae"))),
        **prefixed("text_encoders.clip_l.transformer.", first),
        **prefixed("text_encoders.clip_g.transformer.", part(folder, "text_encoder_2")[0]),
        **prefixed("text_encoders.t5xxl.transformer.", part(folder, "text_encoder_3")[0]),
    }
    save_file(tensors, file)
    read = StableDiffusion3Pipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    model = Model(folder, file.name, file)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert_same(model.tensors(name), getattr(read, name))
    # diffusers 0.42.1 with transformers 5 leaves T5's embeddings empty when it reads them from one file.
    assert_same(model.tensors("text_encoder_3"), T5EncoderModel.from_pretrained(folder / "text_encoder_3"))
    computed = {name for name, ref in model.tensors("transformer").items() if isinstance(ref, Computed)}
    swapped = ("norm_out.linear", "transformer_blocks.2.norm1_context.linear")
    assert computed == {f"{layer}.{kind}" for layer in swapped for kind in ("weight", "bias")}


FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
}
"""FLUX's own width, 3072, on which diffusers' converter insists, and one block of each kind: 510 million parameters."""


@pytest.fixture(scope="module")
def flux(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A transformer of FLUX in one sparse file of a gigabyte, mostly of zeros; the other parts are in the folder."""
    folder = tmp_path_factory.mktemp("flux")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**FLUX)
    (folder / "transformer").mkdir()
    transformer.save_config(folder / "transformer")
    shutil.copytree(tiny_model / "vae", folder / "vae")
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    # The shapes that the authors' layout has, from the published names of diffusers' shapes.
    shapes = {name: tuple(value.shape) for name, value in checkpoints.flux(transformer.state_dict()).items()}
    file = folder / "flux.safetensors"
    write_sparse(file, shapes)
    return Model(folder, "flux", file)


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A file of zeros in bfloat16, with a few other values at the beginning of every 512 rows."""
    header, position, rng = {}, 0, random.Random(0)
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(out.tell() + position)
        for entry in header.values():
            start, end = entry["data_offsets"]
            for row in range(0, entry["shape"][0], 512):
                out.seek(8 + len(text) + start + (end - start) // entry["shape"][0] * row)
                out.write(struct.pack("<e", rng.uniform(1, 2)))


def test_flux_is_what_diffusers_reads(flux: Model) -> None:
    assert flux.file
    assert flux.file.stat().st_size > 1e9
    assert flux.file.stat().st_blocks * 512 < 5e7
    read = FluxTransformer2DModel.from_single_file(
        str(flux.file), config=str(flux.folder), subfolder="transformer", torch_dtype=torch.bfloat16
    )
    found = flux.tensors("transformer")
    assert_same(found, read)
    computed = {name for name, ref in found.items() if isinstance(ref, Computed)}
    assert computed == {"norm_out.linear.weight", "norm_out.linear.bias"}
    assert any(value.any() for value in (found["norm_out.linear.bias"].read(), found["proj_out.bias"].read()))


def test_a_gigabyte_is_converted_and_copied_with_little_memory(flux: Model) -> None:
    """Of memory that is no page of the file, the process may take 200 MB more than without a model."""
    code = f"""
import resource
from pathlib import Path
import torch, diffusers.loaders.single_file_utils, glance_trt.export.quiet
from glance_trt.export import single_file, weights
from glance_trt.export.model import Model
from tests.models.in_process import InProcess

single_file.Worker = InProcess
status = dict(line.split(":") for line in open("/proc/self/status"))
limit = 1024 * int(status["VmData"].split()[0]) + 200_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
found = Model(Path({str(flux.folder)!r}), "flux", Path({str(flux.file)!r})).tensors("transformer")
print(sum(len(block) for ref in found.values() for block in weights._blocks(ref)))
try:
    torch.ones(500_000_000, dtype=torch.uint8)
except RuntimeError:
    print("limited")
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    copied, limited = found.stdout.split()
    assert int(copied) == sum(ref.length for ref in flux.tensors("transformer").values()) > 1e9
    assert limited == "limited"


def test_parts_that_the_file_does_not_hold_are_the_folders(flux: Model) -> None:
    assert flux.tensors("vae") == weights.component_tensors(flux.folder / "vae")
    with pytest.raises(ModelError, match=r"flux\.safetensors: holds no text_encoder, and .*text_encoder: no weights"):
        flux.tensors("text_encoder")


@pytest.mark.parametrize("prefix", ["", DENOISER])
def test_qwen_image_has_diffusers_names_already(prefix: str, tmp_path: Path) -> None:
    folder, file = qwen_image.write(tmp_path / "qwen"), tmp_path / "qwen.safetensors"
    expected, _ = part(folder, "transformer")
    save_file(prefixed(prefix, expected), file)
    found = Model(folder, file.name, file).tensors("transformer")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), value) for name, value in expected.items())


@pytest.mark.parametrize("prefix", ["", DENOISER])
def test_a_denoiser_alone_may_lack_the_prefix(prefix: str, tiny_model: Path, tmp_path: Path) -> None:
    expected, config = part(tiny_model, "unet")
    save_file(prefixed(prefix, checkpoints.unet(expected, config)), tmp_path / "unet.safetensors")
    found = Model(tiny_model, "unet", tmp_path / "unet.safetensors").tensors("unet")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), value) for name, value in expected.items())


def test_diffusers_is_asked_once_for_a_layout(sd1: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Watched(InProcess):
        def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            asked.append(sorted(arguments[1]))
            return super().call(function, *arguments, **named)

    monkeypatch.setattr(single_file, "Worker", Watched)
    first = {name: sd1.tensors(name) for name in ("unet", "vae", "text_encoder")}
    assert asked == [["unet", "vae"]]
    assert {name: sd1.tensors(name) for name in first} == first
    # Another fine-tune of the same layout has other values at the same places.
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(str(sd1.file)).items()}, other)
    found = Model(sd1.folder, "other", other).tensors("unet")
    assert len(asked) == 1
    assert {name: (ref.file, ref.read().tolist()) for name, ref in found.items()} == {
        name: (other, (ref.read() + 1).tolist()) for name, ref in first["unet"].items()
    }
    # A damaged record is made again, and one that leads out of the file too.
    for damage in (b"{", b'{"conv_in.weight": "[[[\\"time_embed.0.weight\\", 0, 10000]], 2, false]"}'):
        for record in (tmp_path / "cache" / "glance-trt" / "converted").iterdir():
            record.write_bytes(damage)
        assert sd1.tensors("unet") == first["unet"]
    assert len(asked) == 3


def test_a_cache_folder_that_cannot_be_written_only_costs_time(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert sd1.tensors("unet").keys() == weights.component_tensors(sd1.folder / "unet").keys()


def test_the_process_that_asks_imports_no_torch(sd1: Model, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from glance_trt.export.model import Model
print(len(Model(Path({str(sd1.folder)!r}), "sd", Path({str(sd1.file)!r})).tensors("unet")))
print(*sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, loaded = found.stdout.splitlines()
    assert int(count) == len(weights.component_tensors(sd1.folder / "unet"))
    assert not {"torch", "diffusers", "transformers"}.intersection(loaded.split())


def save(tmp_path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_a_file_without_the_denoiser_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    file = save(tmp_path, {"lora_unet_down_blocks_0.alpha": torch.ones(1)})
    with pytest.raises(
        ModelError,
        match=r"x\.safetensors: holds no UNet2DConditionModel, neither under its authors' names nor under diffusers' "
        r"\(its first tensor is lora_unet_down_blocks_0\.alpha\)",
    ):
        Model(tiny_model, "x", file).tensors("unet")


def test_a_checkpoint_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    folder = sd3.make(tmp_path / "sd3", t5=False)
    tensors = checkpoints.sd3(part(folder, "transformer")[0])
    del tensors["joint_blocks.1.x_block.attn.qkv.bias"]
    file = save(tmp_path, prefixed(DENOISER, tensors))
    with pytest.raises(
        ModelError,
        match=r"x\.safetensors: diffusers cannot convert its transformer: it lacks "
        r"'joint_blocks\.1\.x_block\.attn\.qkv\.bias'",
    ):
        Model(folder, "x", file).tensors("transformer")


def test_an_unsupported_dtype_is_named(tiny_model: Path, tmp_path: Path) -> None:
    file = save(tmp_path, {f"{DENOISER}input_blocks.0.0.weight": torch.ones(8, 4, 3, 3).to(torch.float8_e4m3fn)})
    with pytest.raises(ModelError, match=r"x\.safetensors: .*has dtype F8_E4M3; supported: F64, F32, F16, BF16"):
        Model(tiny_model, "x", file).tensors("unet")


@pytest.mark.parametrize(
    ("converted", "message"),
    [
        (lambda tensors: {"a": tensors["a"] * 0.5}, "it computes with weights"),
        (lambda tensors: {"a": tensors["a"][:, 0]}, "is no range of rows"),
        (lambda tensors: {"a": torch.cat([tensors["a"], tensors["b"]])}, "joins tensors of different shapes"),
        (lambda tensors: {"a": tensors["a"].expand(4, 4, 1)}, r"it makes a tensor of the shape \[4, 4, 1\]"),
    ],
)
def test_a_converter_that_does_more_than_moving_rows_is_refused(
    converted: Callable[..., Any], message: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a later version of diffusers cannot make wrong weights."""
    monkeypatch.setattr(single_file, "_run", lambda layout, tensors, config: converted(tensors))
    names = {"a": torch.ones(4, 3), "b": torch.ones(2, 5), "input_blocks.0.0.weight": torch.ones(1)}
    file = save(tmp_path, names)
    with pytest.raises(ModelError, match=rf"x\.safetensors: diffusers .* its unet.*: {message}"):
        Model(tiny_model, "x", file).tensors("unet")


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t,
        lambda t: t[2:5],
        lambda t: torch.cat([t[3:], t[:3]]),
        lambda t: torch.cat([t[:2], t[2:4], t[5:]]),
        lambda t: t.T,
        lambda t: torch.cat([t[4:], t[:1]]).T.contiguous(),
    ],
)
def test_whatever_is_moved_is_read_from_where_it_was(arrange: Callable[..., Any], tmp_path: Path) -> None:
    before, tensor = torch.randn(3), torch.randn(6, 4)
    file = save(tmp_path, {"before": before, "tensor": tensor, "scalar": torch.tensor(2.0)})
    stored, _ = weights.read_header(file)
    shapes = {name: ref.shape for name, ref in stored.items()}
    numbered = dict(single_file._numbered(shapes))
    ref = single_file._origin(arrange(numbered["tensor"]), shapes).ref(stored)
    assert torch.equal(ref.read(), arrange(tensor))
    assert ref.shape == arrange(tensor).shape
    assert b"".join(bytes(block) for block in weights._blocks(ref)) == arrange(tensor).contiguous().numpy().tobytes()
    scalar = single_file._origin(numbered["scalar"], shapes).ref(stored)
    assert (scalar.shape, scalar.read()) == ((), 2.0)
