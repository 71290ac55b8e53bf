"""Every method of distillation on the demonstration model, measured alike: accuracy, distance to the teacher, cost.

    python examples/shapes/ablate.py                      # all arms; hours on two cores, goes on where it stopped
    python examples/shapes/ablate.py glance trajectory    # some groups of arms, or some arms by name
    python examples/shapes/ablate.py --list

Each arm is a recipe: it is distilled, built for the CPU, and generates 500 held-out captions with three seeds. Results
go to ablation.json, one arm at a time, and as a table to stdout; an arm that is there already, with the same recipe and
model, is not run again. Intervals are 95 %, over captions (the seeds of a caption are averaged first).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from data import all_scenes, held_out_scenes, render, sample_scene
from evaluate import images_of, marks_of, summary
from PIL import Image

from glance_trt import recipe as recipes
from glance_trt.build import build
from glance_trt.cli.bars import bars
from glance_trt.distill.experts import train

HERE = Path(__file__).parent
SLOW, FAST = [1, 3, 5, 7, 9], [11, 21, 31, 41, 50]
UNIFORM = {k: [round(50 * i / k) + 1 for i in range(k)] for k in (4, 6, 10, 20)}
ONE_PROMPT = "a large red circle left of a small blue star on a white background"
CFG = {"mode": "cfg", "scale": 2.5}

Arm = dict[str, Any]

# More layers and a higher rank than the paper's, since a jump has to make up for many steps.
TRAJECTORY = {
    "method": "trajectory",
    "prompts": "captions.txt",
    "guidance": CFG,
    "rank": 64,
    "alpha": 64.0,
    "targets": [
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out",
    ],
    "samples": 2000,
    "steps": 1200,
    "learning_rate": 1e-3,
    "decay": "linear",
    "batch_size": 16,
    "precision": "bfloat16",
}  # fmt: skip
GUIDANCE = {**TRAJECTORY, "method": "guidance", "steps": 1500, "rank": 16, "alpha": 16.0}


def phase(name: str, steps: list[int], *, lora: bool = False, guide: bool = False, scale: float | None = None) -> Arm:
    """A phase of a recipe, with what is trained for it."""
    found: Arm = {"name": name, "steps": steps}
    if lora:
        found["lora"] = {"file": f"{name}.safetensors"} | ({} if scale is None else {"scale": scale})
    if guide:
        found["guide"] = f"{name}.guide.safetensors"
    return found


def arm(phases: list[Arm], guided: Arm = CFG, **settings: Any) -> Arm:
    """A recipe for the demonstration model; `settings` are those of its distillation."""
    made: Arm = {"height": 64, "width": 64, "phases": phases, "guidance": guided, "engines": ["cpu"]}
    return made | ({"distill": settings} if settings else {})


def two(slow: list[int], fast: list[int], **options: Any) -> list[Arm]:
    """Two phases with a LoRA each."""
    return [phase("slow", slow, lora=True, **options), phase("fast", fast, lora=True, **options)]


def searched(count: int) -> list[Arm]:
    """Two phases on the knots that `glance-trt schedule --search` found, read from the recipe it wrote."""
    found = yaml.safe_load((HERE / f"recipes/searched{count}.yaml").read_text())["phases"]
    return two(found[0]["steps"], found[1]["steps"])


def groups() -> dict[str, dict[str, Arm]]:
    """All arms, by group."""
    one = {"prompt": ONE_PROMPT}
    embedded = {"mode": "embedded", "scale": 2.5}
    none = {"mode": "none"}
    every = list(range(1, 51))
    return {
        "base": {
            "teacher-50": arm([phase("whole", every)]),
            "base-10-paper": arm([phase("whole", SLOW + FAST)]),
            "base-10-uniform": arm([phase("whole", UNIFORM[10])]),
            "base-10-unguided": arm([phase("whole", UNIFORM[10])], none),
            "base-6-unguided": arm([phase("whole", UNIFORM[6])], none),
            "base-4-unguided": arm([phase("whole", UNIFORM[4])], none),
            "base-20-uniform": arm([phase("whole", UNIFORM[20])]),
            "base-20-unguided": arm([phase("whole", UNIFORM[20])], none),
        },
        "glance": {
            "glance-s5f5": arm(two(SLOW, FAST), **one),
            "glance-s3f5": arm(two([1, 5, 9], FAST), **one),
            "glance-s5f10": arm(two(SLOW, [11, 15, 20, 24, 28, 33, 37, 41, 46, 50]), **one),
            "glance-slow-base": arm([phase("slow", SLOW, lora=True), phase("fast", FAST)], **one),
            "glance-base-fast": arm([phase("slow", SLOW), phase("fast", FAST, lora=True)], **one),
            "glance-one-lora": arm([phase("whole", SLOW + FAST, lora=True)], **one, steps=120),
            "glance-one-lora-uniform": arm([phase("whole", UNIFORM[10], lora=True)], **one, steps=120),
            "glance-10-samples": arm(two(SLOW, FAST), prompts="captions10.txt"),
            "glance-100-samples": arm(two(SLOW, FAST), prompts="captions100.txt"),
            "glance-rendered": arm(two(SLOW, FAST), **one, image="rendered.png"),
            "glance-scale-1": arm(two(SLOW, FAST, scale=1.0), **one),
        },
        "guidance": {
            "guidance-lora": arm([phase("whole", UNIFORM[20], lora=True)], none, **GUIDANCE),
            "guidance-lora-scale": arm([phase("whole", UNIFORM[20], lora=True, guide=True)], embedded, **GUIDANCE),
        },
        "guide": {
            f"guide-{size}": arm([phase("whole", UNIFORM[20], guide=True)], embedded, **GUIDANCE, guide=size)
            for size in ("tiny", "full")
        },
        "trajectory": {
            "trajectory-10-paper": arm(two(SLOW, FAST), none, **TRAJECTORY),
            "trajectory-10": arm(searched(10), none, **TRAJECTORY),
            "trajectory-6": arm(searched(6), none, **TRAJECTORY),
            "trajectory-4": arm(searched(4), none, **TRAJECTORY),
            "trajectory-10-off-policy": arm(searched(10), none, **TRAJECTORY, on_policy=False),
            "trajectory-10-scale": arm(
                [{**item, "guide": f"{item['name']}.guide.safetensors"} for item in searched(10)],
                embedded,
                **{**TRAJECTORY, "guidance": None},
            ),
        },
    }


def prepare(work: Path) -> None:
    """The captions and the image that arms train on: none of them held out."""
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    captions = [sample_scene(rng).caption for _ in range(2000)]
    for name, count in (("captions.txt", 2000), ("captions100.txt", 100), ("captions10.txt", 10)):
        (work / name).write_text("\n".join(captions[:count]) + "\n")
    scene = next(found for found in all_scenes() if found.caption == ONE_PROMPT)
    Image.fromarray(render(scene, rng)).save(work / "rendered.png")


def digest_of(model: Path) -> str:
    """Of a model's weights."""
    found = hashlib.sha256()
    for file in sorted(model.rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def evaluations(content: Arm) -> int:
    """Evaluations of the network for one image."""
    twice = content["guidance"]["mode"] == "cfg"
    return sum(len(item["steps"]) * (2 if twice and "guide" not in item else 1) for item in content["phases"])


def run(name: str, content: Arm, model: Path, work: Path, captions: int, seeds: list[int]) -> dict[str, Any]:
    """Distil, build and measure one arm."""
    folder = work / name
    content = {"name": name, "model": str(model.resolve()), **copy.deepcopy(content)}
    settings = content.get("distill", {})
    for key in ("prompts", "image"):
        if key in settings:
            settings[key] = f"../{settings[key]}"
    content["distill"] = {key: value for key, value in settings.items() if value is not None} or None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    training = {"seconds": {}, "peak_memory_mb": 0.0}
    if content["distill"]:  # in a process of its own, for its peak memory
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            training = pool.submit(distil, file, work / "samples").result()
    build(str(file), folder / "bundle", engines=["cpu"], overwrite=True)
    scenes = held_out_scenes(captions)
    images = images_of(folder / "bundle", scenes, seeds, name)
    marks = marks_of(images, scenes)
    figures = {key: summary(marks, key) for key in ("all", "colour", "shape", "size", "relation")}
    shutil.rmtree(folder / "bundle")
    np.save(folder / "images.npy", images)
    return {
        "accuracy": figures,
        "evaluations": evaluations(content),
        "training": training,
    }


def distil(recipe: Path, samples: Path) -> dict[str, Any]:
    """Train what a recipe names: the seconds of each stage, and this process's peak memory, MB."""
    reports: dict[str, list[tuple[float, float, float]]] = {}
    plan, folder = recipes.load(recipe)
    with bars() as shown:

        def progress(stage: str, done: float, total: float) -> None:
            shown(stage, done, total)
            reports.setdefault(stage, []).append((time.perf_counter(), done, total))

        train(plan, folder, work=folder / "work", samples=samples, progress=progress)
    return {
        "seconds": {stage: duration(found) for stage, found in reports.items()},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def duration(reports: list[tuple[float, float, float]]) -> float:
    """Seconds of a whole stage from its reports (time, done, total), also where an interrupted one went on: the first
    report is of nothing done, the second of the first step or of all those that were there."""
    (start, first, _), (end, last, total) = reports[1], reports[-1]
    return (end - start) * total / (last - first) if last > first else 0.0


def distance(images: Path, teachers: Path) -> float | None:
    """The root of the mean square difference to the teacher's own images for the same noise, pixel values of 0..255."""
    if not (images.exists() and teachers.exists()):
        return None
    difference = np.load(images).astype(np.float32) - np.load(teachers)
    return float(np.sqrt((difference**2).mean(axis=(2, 3, 4))).mean())


def table(results: dict[str, Any]) -> str:
    """The results, as Markdown."""
    lines = ["| arm | evaluations | all | relation | distance | training |", "|---|---|---|---|---|---|"]
    for name, found in results.items():
        (mean, half), (relation, _) = found["accuracy"]["all"], found["accuracy"]["relation"]
        away = f"{found['distance']:.1f}" if found.get("distance") is not None else ""
        training = sum(time for stage, time in found["training"]["seconds"].items() if stage != "sample")
        lines.append(
            f"| {name} | {found['evaluations']} | {100 * mean:.1f} ± {100 * half:.1f} | {100 * relation:.1f} | {away} "
            f"| {training / 60:.0f} min |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="groups or arms; default: all")
    parser.add_argument("--list", action="store_true", help="list groups and arms")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument(
        "--work", type=Path, default=HERE / "work/ablation", help="where recipes and results of training go"
    )
    parser.add_argument("--output", type=Path, default=HERE / "ablation.json")
    arguments = parser.parse_args()
    everything = groups()
    if arguments.list:
        for group, arms in everything.items():
            print(f"{group}: {' '.join(arms)}")
        return
    prepare(arguments.work)
    known = {name: item for arms in everything.values() for name, item in arms.items()}
    wanted = [name for asked in arguments.names or everything for name in everything.get(asked, {asked: None})]
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; --list shows what there is")
    model = digest_of(arguments.model)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in wanted:
        made_from = {"recipe": known[name], "model": model, "captions": arguments.captions, "seeds": arguments.seeds}
        if results.get(name, {}).get("made_from") == json.loads(json.dumps(made_from)):
            continue
        found = run(name, known[name], arguments.model, arguments.work, arguments.captions, arguments.seeds)
        results[name] = found | {"made_from": made_from}
        for other in results:
            pair = (arguments.work / arm / "images.npy" for arm in (other, "teacher-50"))
            if results[other].get("distance") is None:
                results[other]["distance"] = distance(*pair)
        ordered = {name: results[name] for name in known if name in results}
        arguments.output.write_text(json.dumps(ordered, indent=1) + "\n")
        print(table({name: found}).splitlines()[-1], flush=True)
    print(table({name: results[name] for name in known if name in results}))


if __name__ == "__main__":
    main()
