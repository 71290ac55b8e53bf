"""Trains the demonstration model: a text-to-image latent diffusion model in the Stable Diffusion layout.

    python examples/shapes/train_teacher.py            # everything, resuming where it stopped
    python examples/shapes/train_teacher.py vae        # one stage: tokenizer, vae, text or unet
    python examples/shapes/train_teacher.py --style night     # fine-tune the denoiser to another style of drawing

The stages run in order and each writes its component into the model folder in float16, so that
``StableDiffusionPipeline.from_pretrained`` loads it; checkpoints (float32, with optimizer and random state) go to the
work folder, and a stage that is started again goes on from its last one.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import BACKGROUNDS, COLOURS, RADII, SHAPES, SIDE, STYLES, Scene, Style, all_scenes, render, sample_scene
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
MAX_TOKENS = 32
POOL = 60_000
"""Rendered training images, encoded once before the denoiser is trained."""


# --- training loop -----------------------------------------------------------------------------------------------


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[nn.Module, torch.Generator], Tensor],
    *,
    work: Path,
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.999,
) -> nn.Module:
    """Train `module` in place and return its exponential moving average.

    The learning rate warms up over 200 steps, stays, and falls linearly to zero over the last quarter, so that a run
    can be lengthened after a resume. Checkpoints every two minutes; the loss goes to ``<work>/<name>.csv``.
    """
    module.train().to(memory_format=torch.channels_last)
    average = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    path, start = work / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start = state["step"]

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"generator": generator.get_state(), "step": step}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    saved, recent = time.monotonic(), 0.0
    with open(work / f"{name}.csv", "a") as log, tqdm(total=steps, initial=start, desc=name, mininterval=10) as bar:
        for step in range(start, steps):
            scale = min(1.0, (step + 1) / 200, (steps - step) / (steps / 4))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(module, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
            recent += loss.item()
            bar.update()
            if (step + 1) % 50 == 0:
                log.write(f"{step + 1},{recent / 50:.5f}\n")
                log.flush()
                bar.set_postfix(loss=f"{recent / 50:.4f}", refresh=False)
                recent = 0.0
            if time.monotonic() - saved > 120:
                save(step + 1)
                saved = time.monotonic()
    if steps > start:
        save(steps)
    return average.eval()


# --- stages ------------------------------------------------------------------------------------------------------


def train_tokenizer(model: Path, work: Path, steps: int, style: Style) -> None:
    """CLIP's byte-pair encoding, with the merges of the captions' own words; anything else falls apart into letters."""
    from tokenizers import pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = CLIPTokenizer(model_max_length=MAX_TOKENS)
    specials = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=800,
        special_tokens=specials,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = tokenizer.backend_tokenizer
    # Each letter also as the end of a word: without it an unknown word could not be spelled at all.
    letters = sorted(alphabet) * 2
    backend.train_from_iterator([*(scene.caption for scene in all_scenes()[::7]), *letters], trainer)
    trained = json.loads(backend.to_str())["model"]
    for letter in sorted(alphabet):
        trained["vocab"].setdefault(letter + "</w>", len(trained["vocab"]))
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained["merges"]]
    result = CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=MAX_TOKENS)
    result.save_pretrained(model / "tokenizer")
    # The two files by which CLIP tokenizers were always stored, for readers that know no tokenizer.json.
    (model / "tokenizer/vocab.json").write_text(json.dumps(trained["vocab"], ensure_ascii=False))
    (model / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def _images(count: int, generator: torch.Generator, style: Style) -> Tensor:
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    images = np.stack([render(sample_scene(rng), rng, style) for _ in range(count)])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def _reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared and absolute error, five times as heavy on the objects: they cover a tenth of the image, and unweighted
    the model is content with backgrounds for a long time."""
    background = target[:, :, :1, :1]
    weight = 1 + 4 * ((target - background).abs().sum(dim=1, keepdim=True) > 0.1).float()
    difference = output.float() - target
    return (weight * (difference.square() + 0.2 * difference.abs())).mean()


def _new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    # Residual branches start at zero: colours pass through the skips before any normalisation can wash them out.
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            nn.init.zeros_(parameter)
    return vae


def train_vae(model: Path, work: Path, steps: int, style: Style) -> None:
    """Encoder and decoder together; the scaling factor makes the latents' standard deviation 1."""

    def loss_of(vae: nn.Module, generator: torch.Generator) -> Tensor:
        images = _images(16, generator, style)
        posterior = vae.encode(images).latent_dist
        sample = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        loss = _reconstruction_loss(vae.decode(sample).sample, images)
        return loss + 1e-6 * posterior.kl().mean()

    torch.manual_seed(1)
    vae = fit("vae", _new_vae(), loss_of, work=work, steps=steps, learning_rate=1e-3, ema_decay=0.995)
    with torch.no_grad():
        latents = vae.encode(_images(256, torch.Generator().manual_seed(1), style)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.to(torch.float16).save_pretrained(model / "vae")
    (work / "pool.pt").unlink(missing_ok=True)


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


_SLOTS = ("only", "left", "right", "top", "bottom")


def _layout(scene: Scene) -> list[int]:
    """The scene as class indices: size, colour and shape of the object in each slot (0: none), then the background."""
    slots = {"only": scene.first}
    if scene.second is not None:
        ends = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom")}
        slots = dict(zip(ends.get(str(scene.relation), ("bottom", "top")), (scene.first, scene.second), strict=True))
    classes = []
    for slot in _SLOTS:
        thing = slots.get(slot)
        words = ((RADII, "size"), (COLOURS, "colour"), (SHAPES, "shape"))
        classes += [1 + list(names).index(getattr(thing, field)) if thing else 0 for names, field in words]
    return [*classes, list(BACKGROUNDS).index(scene.background)]


def train_text(model: Path, work: Path, steps: int, style: Style) -> None:
    """The text encoder, by reading the layout off its last embeddings: one slot each, then the background.

    A causal encoder cannot say at the first object's words where that object will stand; the padding behind the
    caption sees all of it. One embedding per place is what cross-attention reads most easily: a location looks up the
    place that it belongs to.
    """
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    scenes = [scene for scene in all_scenes() if not scene.held_out]
    tokens = _tokens(tokenizer, [scene.caption for scene in scenes])
    targets = torch.tensor([_layout(scene) for scene in scenes])
    sizes = [1 + len(RADII), 1 + len(COLOURS), 1 + len(SHAPES)]

    def loss_of(reader: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scenes), (128,), generator=generator)
        hidden = reader["encoder"](tokens[index]).last_hidden_state[:, -len(_SLOTS) - 1 :]
        slots = reader["slot"](hidden[:, :-1]).float().split(sizes, dim=2)  # three of [128, 5, classes]
        logits = [part[:, slot] for slot in range(len(_SLOTS)) for part in slots]
        logits.append(reader["background"](hidden[:, -1]).float())
        return sum(F.cross_entropy(part, targets[index, i]) for i, part in enumerate(logits))

    module = nn.ModuleDict(
        {
            "encoder": CLIPTextModel(config),
            "slot": nn.Linear(128, sum(sizes)),
            "background": nn.Linear(128, len(BACKGROUNDS)),
        }
    )
    trained = fit("text", module, loss_of, work=work, steps=steps, learning_rate=1e-3, ema_decay=0.99)
    trained["encoder"].to(torch.float16).save_pretrained(model / "text_encoder")


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect on trailing timesteps; StableDiffusionPipeline insists on it
    )


def _batches(vae: AutoencoderKL, count: int, seed: int, style: Style) -> Iterator[tuple[Tensor, list[str]]]:
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(count // 100), desc="pool", mininterval=10):
        scenes = [sample_scene(rng) for _ in range(100)]
        images = torch.from_numpy(np.stack([render(scene, rng, style) for scene in scenes]))
        images = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latent_dist.mean.float()
        yield (latents * vae.config.scaling_factor).half(), [scene.caption for scene in scenes]


def _pool(model: Path, work: Path, tokenizer: CLIPTokenizer, style: Style) -> tuple[Tensor, Tensor]:
    """Latents [POOL, 8, 16, 16] float16 and tokens [POOL, 32] of rendered training scenes."""
    path = work / "pool.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).to(
            memory_format=torch.channels_last
        )
        parts = [(latents, _tokens(tokenizer, captions)) for latents, captions in _batches(vae, POOL, 3, style)]
        torch.save([torch.cat(column) for column in zip(*parts, strict=True)], path)
    latents, tokens = torch.load(path, weights_only=True)
    return latents, tokens


def _new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, despite its name
    )


def train_unet(model: Path, work: Path, steps: int, style: Style) -> None:
    """The denoiser, v-prediction with a terminal SNR of zero; one caption in ten is left empty, for guidance.

    Without a checkpoint, a denoiser that is in the model folder already is trained further, with a new optimizer.
    """
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    latents, tokens = _pool(model, work, tokenizer, style)
    empty = _tokens(tokenizer, [""])
    scheduler = _scheduler()
    torch.manual_seed(4)
    unet = _new_unet()
    if (model / "unet").exists():  # the weights only: the loaded model's config would say where it was loaded from
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(model / "unet").state_dict())
    # Frozen: trained along with the denoiser, it forgot which object stands where within a few thousand steps.
    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32).requires_grad_(False)

    def loss_of(unet: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (48,), generator=generator)
        clean = latents[index].float().contiguous(memory_format=torch.channels_last)
        words = torch.where(torch.rand(48, 1, generator=generator) < 0.1, empty, tokens[index])
        noise = torch.randn(clean.shape, generator=generator)
        # Half of them drawn towards the noisy end, where it is decided what goes where: with uniform timesteps alone
        # the denoiser did not learn the order of two objects in 2,400 steps, with these in some hundred.
        power = torch.where(torch.rand(48, generator=generator) < 0.5, 1.0, 3.0)
        timesteps = 999 - (1000 * torch.rand(48, generator=generator) ** power).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = unet(noisy, timesteps, text_encoder(words).last_hidden_state, return_dict=False)[0]
        return F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, timesteps))

    trained = fit("unet", unet, loss_of, work=work, steps=steps, learning_rate=1e-3)
    trained.to(torch.float16).save_pretrained(model / "unet")
    _save_pipeline(model)


def _save_pipeline(model: Path) -> None:
    """Write model_index.json and the scheduler's config beside the components."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float16),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler.save_pretrained(model / "scheduler")
    pipeline.save_config(model)


STAGES = {
    "tokenizer": (train_tokenizer, 1),
    "vae": (train_vae, 1300),
    "text": (train_text, 2500),
    "unet": (train_unet, 10_000),
}
"""Per stage: its function and its number of optimizer steps."""

FINE_TUNING = 600
"""Optimizer steps of the denoiser with another style."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; default: all, in order; with --style: unet")
    parser.add_argument("--style", choices=STYLES, help="fine-tune a copy of the model on images in this style")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="where the finished components go")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where checkpoints, pool and loss logs go")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the stage's own number")
    arguments = parser.parse_args()
    if unknown := [stage for stage in arguments.stages if stage not in STAGES]:
        parser.error(f"unknown stages: {', '.join(unknown)}")
    model, work, stages = arguments.model, arguments.work, arguments.stages or [*STAGES]
    if arguments.style:
        model, work, stages = work / arguments.style / "model", work / arguments.style, ["unet"]
        if not model.exists():
            shutil.copytree(arguments.model, model)
    work.mkdir(parents=True, exist_ok=True)
    model.mkdir(parents=True, exist_ok=True)
    for name in stages:
        train, steps = STAGES[name]
        steps = FINE_TUNING if arguments.style else steps
        train(model, work, arguments.steps or steps, STYLES[arguments.style or "plain"])


if __name__ == "__main__":
    main()
