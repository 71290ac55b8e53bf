"""The arms of the ablation: recipes for the demonstration model, and what each is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

HERE = Path(__file__).parent
SLOW, FAST = [1, 3, 5, 7, 9], [11, 21, 31, 41, 50]
UNIFORM = {k: [round(50 * i / k) + 1 for i in range(k)] for k in (2, 3, 4, 5, 6, 10, 20)}
EVERY = list(range(1, 51))
CFG = {"mode": "cfg", "scale": 2.5}
NONE = {"mode": "none"}
EMBEDDED = {"mode": "embedded", "scale": 2.5}

ONE = {"prompt": "a large red circle left of a small blue star on a white background"}
WORDS = {"prompt": "a large red circle left of a large blue star on a white background"}
"""All its objects are large, so that captions of small ones have no word in common with it but those of grammar."""

# More layers than the paper's, since a jump has to make up for many steps.
TRAJECTORY = {
    "method": "trajectory",
    "prompts": "captions.txt",
    "guidance": CFG,
    "rank": 32,
    "alpha": 32.0,
    "targets": [
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out",
    ],
    "samples": 1000,
    "steps": 500,
    "learning_rate": 1e-3,
    "decay": "linear",
    "batch_size": 16,
    "precision": "bfloat16",
}  # fmt: skip
GUIDANCE = {**TRAJECTORY, "method": "guidance", "steps": 1500, "rank": 16, "alpha": 16.0}

Scenes = Literal["held-out", "seen", "unseen"]


@dataclass(frozen=True)
class Arm:
    """recipe: but for the name and the model. style: which of the models is used, the demonstration model or one that
    was fine-tuned to draw otherwise. scenes: held-out ones; or those whose words are all in `WORDS`, or none."""

    recipe: dict[str, Any]
    style: str = "plain"
    scenes: Scenes = "held-out"

    @property
    def measured_alike(self) -> bool:
        """Whether its figures can stand beside those of the teacher."""
        return self.style == "plain" and self.scenes == "held-out"

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for one image."""
        twice = self.recipe["guidance"]["mode"] == "cfg"
        return sum(len(item["steps"]) * (2 if twice and "guide" not in item else 1) for item in self.recipe["phases"])


def phase(name: str, steps: list[int], lora: str = "", guide: str = "", scale: float | None = None) -> dict[str, Any]:
    """A phase of a recipe."""
    found: dict[str, Any] = {"name": name, "steps": steps}
    if lora:
        found["lora"] = {"file": lora} | ({} if scale is None else {"scale": scale})
    if guide:
        found["guide"] = guide
    return found


def arm(
    phases: list[dict[str, Any]],
    guided: dict[str, Any] = CFG,
    *,
    style: str = "plain",
    scenes: Scenes = "held-out",
    **settings: Any,
) -> Arm:
    """An arm whose recipe is distilled with these settings, or not at all."""
    made: dict[str, Any] = {"height": 64, "width": 64, "phases": phases, "guidance": guided, "engines": ["cpu"]}
    distill = {key: value for key, value in settings.items() if value is not None}
    return Arm(made | ({"distill": distill} if distill else {}), style, scenes)


def two(slow: list[int], fast: list[int], *, guided: bool = False, scale: float | None = None) -> list[dict[str, Any]]:
    """Two phases with a LoRA each, and where `guided` with a guide."""
    return [
        phase(name, steps, f"{name}.safetensors", f"{name}.guide.safetensors" if guided else "", scale)
        for name, steps in (("slow", slow), ("fast", fast))
    ]


def searched(count: int) -> tuple[list[int], list[int]]:
    """The knots that `glance-trt schedule --search` found, from the recipe that it wrote, half of them to a phase: an
    expert makes all jumps of its phase in each step of its training, so that two equal ones train longest in an hour.
    """
    slow, fast = yaml.safe_load((HERE / f"recipes/searched{count}.yaml").read_text())["phases"]
    knots = [*slow["steps"], *fast["steps"]]
    return knots[: count // 2], knots[count // 2 :]


def whole(steps: list[int], lora: str = "", guide: str = "") -> list[dict[str, Any]]:
    """A single phase."""
    return [phase("whole", steps, lora, guide)]


def base() -> dict[str, Arm]:
    """No training."""
    unguided = {f"base-{k}-unguided": arm(whole(UNIFORM[k]), NONE) for k in (4, 6, 10, 20)}
    return {
        "teacher-50": arm(whole(EVERY)),
        **{f"base-{k}": arm(whole(UNIFORM[k])) for k in (20, 10, 5, 3, 2)},
        "base-10-paper": arm(whole(SLOW + FAST)),
        "base-10-searched": arm(whole([*searched(10)[0], *searched(10)[1]])),
        **unguided,
    }


def glance() -> dict[str, Arm]:
    """arXiv 2512.02899 and its ablation."""
    experts = two(SLOW, FAST)
    released = arm(experts, **ONE)
    return {
        "glance": arm(experts, **ONE),
        "glance-s3f5": arm(two([1, 5, 9], FAST), **ONE),
        "glance-s5f10": arm(two(SLOW, [11, 15, 20, 24, 28, 33, 37, 41, 46, 50]), **ONE),
        "glance-slow-base": arm([experts[0], phase("fast", FAST)], **ONE),
        "glance-base-fast": arm([phase("slow", SLOW), experts[1]], **ONE),
        "glance-one-lora": arm(whole(SLOW + FAST, "whole.safetensors"), **ONE, steps=120),
        "glance-one-lora-uniform": arm(whole(UNIFORM[10], "whole.safetensors"), **ONE, steps=120),
        "glance-10-samples": arm(experts, prompts="captions10.txt"),
        "glance-100-samples": arm(experts, prompts="captions100.txt"),
        "glance-rendered": arm(experts, **ONE, image="rendered.png"),
        "glance-scale-1": arm(two(SLOW, FAST, scale=1.0), **ONE),
        "glance-released": Arm({**released.recipe, "sampler": "released"}),
    }


def words() -> dict[str, Arm]:
    """Does one sample teach anything about captions without its words?"""
    trained = [
        phase(name, steps, f"../words-glance-seen/{name}.safetensors")
        for name, steps in (("slow", SLOW), ("fast", FAST))
    ]
    return {
        "words-base-seen": arm(whole(SLOW + FAST), scenes="seen"),
        "words-base-unseen": arm(whole(SLOW + FAST), scenes="unseen"),
        "words-glance-seen": arm(two(SLOW, FAST), scenes="seen", **WORDS),
        "words-glance-unseen": arm(trained, scenes="unseen"),
    }


def guidance() -> dict[str, Arm]:
    """arXiv 2312.06899, and the same for any scale."""
    return {
        "guidance-lora": arm(whole(UNIFORM[20], "whole.safetensors"), NONE, **GUIDANCE),
        "guidance-lora-scale": arm(
            whole(UNIFORM[20], "whole.safetensors", "whole.guide.safetensors"), EMBEDDED, **GUIDANCE
        ),
    }


def guide() -> dict[str, Arm]:
    """arXiv 2406.01954."""
    return {
        f"guide-{size}": arm(whole(UNIFORM[20], guide="whole.guide.safetensors"), EMBEDDED, **GUIDANCE, guide=size)
        for size in ("tiny", "full")
    }


def transfer() -> dict[str, Arm]:
    """Those guides on fine-tuned models that they were not trained with."""
    found = {}
    for style in ("outlined", "night"):
        found[f"{style}-cfg"] = arm(whole(UNIFORM[20]), style=style)
        found[f"{style}-unguided"] = arm(whole(UNIFORM[20]), NONE, style=style)
        for size in ("tiny", "full"):
            file = f"../guide-{size}/whole.guide.safetensors"
            found[f"{style}-guide-{size}"] = arm(whole(UNIFORM[20], guide=file), EMBEDDED, style=style)
    return found


def trajectory() -> dict[str, Arm]:
    """Experts that land where the guided teacher does."""
    return {
        "trajectory-10": arm(two(*searched(10)), NONE, **TRAJECTORY | {"steps": 1200}),
        "trajectory-6": arm(two(*searched(6)), NONE, **TRAJECTORY | {"steps": 1200}),
        "trajectory-4": arm(two(*searched(4)), NONE, **TRAJECTORY | {"steps": 1500}),
        "trajectory-10-scale": arm(two(*searched(10), guided=True), EMBEDDED, **TRAJECTORY | {"guidance": None}),
    }


GROUPS = {made.__name__: made() for made in (base, glance, words, guidance, guide, transfer, trajectory)}
"""Arms by group; some need the results of groups before them."""

ARMS = {name: found for group in GROUPS.values() for name, found in group.items()}
