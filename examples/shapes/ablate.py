"""Every method of distillation on the demonstration model, measured alike: accuracy, distance to the teacher, cost.

    python examples/shapes/ablate.py                      # all arms; hours on two cores, goes on where it stopped
    python examples/shapes/ablate.py glance trajectory    # some groups of arms, or some arms by name
    python examples/shapes/ablate.py --list
    python examples/shapes/ablate.py --times base guide   # instead, times them side by side
    python examples/shapes/ablate.py --plot FILE.png

Each arm (arms.py) is a recipe: it is distilled, built for the CPU, and generates 500 held-out captions with three
seeds. Results go to ablation.json, one arm at a time, and as a table to stdout; an arm that is there already, with the
same recipe and model, is not run again. Intervals are 95 %, over captions (the seeds of a caption are averaged first).
What an arm takes does not depend on what it learned: to be timed, one that was trained elsewhere is trained for a step.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from arms import ARMS, GROUPS, ONE, WORDS, Arm
from data import STYLES, Scene, all_scenes, held_out_scenes, render
from evaluate import images_of, marks_of, summary
from PIL import Image

from glance_trt import Pipeline
from glance_trt import recipe as recipes
from glance_trt.bench import time_stages
from glance_trt.build import build
from glance_trt.cli.bars import bars
from glance_trt.distill.experts import train

HERE = Path(__file__).parent
GRAMMAR = {"a", "of", "on", "background"}


def prepare(work: Path) -> None:
    """The captions and the image that arms train on: none of them held out."""
    work.mkdir(parents=True, exist_ok=True)
    captions = (HERE / "captions.txt").read_text().splitlines()
    for name, count in (("captions.txt", 2000), ("captions100.txt", 100), ("captions10.txt", 10)):
        (work / name).write_text("\n".join(captions[:count]) + "\n")
    scene = next(found for found in all_scenes() if found.caption == ONE["prompt"])
    Image.fromarray(render(scene, np.random.default_rng(7))).save(work / "rendered.png")


def scenes_of(arm: Arm, count: int) -> list[Scene]:
    """What an arm is measured on. "seen" and "unseen" are as many scenes, in turns where there are fewer."""
    if arm.scenes == "held-out":
        return held_out_scenes(count)
    known = set(WORDS["prompt"].split())
    wanted = {"seen": lambda words: words <= known, "unseen": lambda words: not words & (known - GRAMMAR)}[arm.scenes]
    found = [scene for scene in all_scenes() if wanted(set(scene.caption.split()) - GRAMMAR)]
    np.random.default_rng(20251202).shuffle(found)  # type: ignore[arg-type]  # of a list, as documented
    return [found[i % len(found)] for i in range(count)]


def model_of(arm: Arm, model: Path, work: Path) -> Path:
    """The arm's model folder: the demonstration model, or one that is fine-tuned now if it is not there yet."""
    if arm.style == "plain":
        return model
    script = [sys.executable, str(HERE / "train_teacher.py"), "--style", arm.style]
    subprocess.run([*script, "--model", str(model), "--work", str(work / "styles")], check=True)
    return work / "styles" / arm.style / "model"


def digest_of(model: Path) -> str:
    """Of a model's weights."""
    found = hashlib.sha256()
    for file in sorted(model.rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def make(name: str, arm: Arm, model: Path, work: Path, **instead: int) -> dict[str, Any]:
    """Distil and build one arm in a folder of `work`: what its training took. instead: settings of distillation."""
    folder = work / name
    content = {"name": name, "model": str(model_of(arm, model, work).resolve()), **copy.deepcopy(arm.recipe)}
    if "distill" in content:
        content["distill"] |= instead
        for key in ("prompts", "image"):
            if key in content["distill"]:
                content["distill"][key] = str((work / content["distill"][key]).resolve())
    file, text = folder / "recipe.yaml", yaml.safe_dump(content)
    if file.exists() and file.read_text() != text:
        shutil.rmtree(folder)  # of an arm that was another recipe then
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    training = {"seconds": {}, "peak_memory_mb": 0.0}
    if "distill" in content:  # in a process of its own, for its peak memory
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            training = pool.submit(distil, file, work / "samples").result()
    build(str(file), folder / "bundle", engines=["cpu"], overwrite=True)
    return training


def run(name: str, arm: Arm, model: Path, work: Path, captions: int, seeds: list[int]) -> dict[str, Any]:
    """Distil, build and measure one arm."""
    training, folder = make(name, arm, model, work), work / name
    scenes = scenes_of(arm, captions)
    images = images_of(folder / "bundle", scenes, seeds, name)
    marks = marks_of(images, scenes, STYLES[arm.style])
    np.save(folder / "images.npy", images)
    return {
        "accuracy": {key: summary(marks, key) for key in ("all", "colour", "shape", "size", "relation")},
        "evaluations": arm.evaluations,
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


def times(bundles: dict[str, Path], runs: int, batches: list[int]) -> dict[str, Any]:
    """Time arms in turns on all cores, medians of `runs` rounds: seconds for a batch, by arm and batch size.

    `whole` is from the prompt to the images, `denoising` without text encoder and decoder, `step` the engine's own
    time for one step, averaged over the steps.
    """
    found: dict[str, dict[int, dict[str, list[float]]]] = {name: {} for name in bundles}
    for i in range(runs):
        for name, bundle in bundles.items():
            with Pipeline.open(bundle, "cpu") as pipeline:
                manifest = pipeline.bundle.manifest
                for batch in batches:
                    stages = time_stages(pipeline, "a", batch, 1)  # of which a first run is not counted
                    steps = [stages.step[step.phase] for step in next(iter(manifest.schedules.values())).steps]
                    start = time.perf_counter()
                    list(pipeline.steps(f"{i} {batch}", seed=i, count=batch))
                    middle = time.perf_counter()
                    pipeline.generate(f"{i} {batch} again", seed=i, count=batch, batch_size=batch)
                    seconds = {
                        "whole": time.perf_counter() - middle,
                        "denoising": middle - start - stages.text_encoder / 1e3,
                        "step": sum(steps) / len(steps) / 1e3 - stages.overhead_us / 1e6,
                    }
                    for key, value in seconds.items():
                        found[name].setdefault(batch, {}).setdefault(key, []).append(value)
    return {
        name: {batch: {key: median(values) for key, values in kinds.items()} for batch, kinds in batches.items()}
        for name, batches in found.items()
    }


def speeds(results: dict[str, Any]) -> str:
    """How many times faster than the teacher each arm is, as Markdown; beside it, for arms of one evaluation per step,
    what n of them could be at best: 50 t(2B) / (n t(B)), of the times that the network takes for such batches."""
    lines = ["| arm | evaluations | batch | image | denoising | ceiling | of it |", "|---|---|---|---|---|---|---|"]
    timed = {name: found["times"] for name, found in results.items() if "times" in found}
    for name in timed:
        for batch, own in timed[name].items():
            teacher, single = timed["teacher-50"][batch], timed["base-10-unguided"][batch]["step"]
            ceiling = 50 * teacher["step"] / (results[name]["evaluations"] * single)
            whole, denoising = (teacher[key] / own[key] for key in ("whole", "denoising"))
            steps = sum(len(phase["steps"]) for phase in ARMS[name].recipe["phases"])
            bound = f"{ceiling:.1f} | {100 * denoising / ceiling:.0f} %" if steps == ARMS[name].evaluations else " | "
            lines.append(
                f"| {name} | {results[name]['evaluations']} | {batch} | {whole:.1f} | {denoising:.1f} | {bound} |"
            )
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """The results, as Markdown."""
    lines = [
        "| arm | evaluations | all | relation | distance | training of each part | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        (mean, half), (relation, _) = found["accuracy"]["all"], found["accuracy"]["relation"]
        away = f"{found['distance']:.1f}" if found.get("distance") is not None else ""
        seconds = [time for stage, time in found["training"]["seconds"].items() if stage != "sample"]
        trained = ", ".join(f"{each / 60:.1f}" for each in seconds) + (" min" if seconds else "")
        memory = f"{found['training']['peak_memory_mb']:.0f} MB" if seconds else ""
        lines.append(
            f"| {name} | {found['evaluations']} | {100 * mean:.1f} ± {100 * half:.1f} | {100 * relation:.1f} | {away} "
            f"| {trained} | {memory} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], file: Path) -> None:
    """Accuracy over evaluations of the network, a colour for each group; where these are equal, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="evaluations of the network", ylabel="captions that hold, %")
    shown = [name for group in GROUPS.values() for name in group if name in results and ARMS[name].measured_alike]
    for group, arms in GROUPS.items():
        names = [name for name in arms if name in shown]
        if names:
            means, halves = zip(*(results[name]["accuracy"]["all"] for name in names), strict=True)
            axes.errorbar(
                [beside(name, shown, results) for name in names],
                [100 * mean for mean in means],
                [100 * half for half in halves],
                fmt="o",
                capsize=3,
                alpha=0.8,
                label=group,
            )
    ticks = sorted({found["evaluations"] for found in results.values()})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=100)


def beside(name: str, names: list[str], results: dict[str, Any]) -> float:
    """Where an arm stands on the axis of evaluations, among those that have as many."""
    count = float(results[name]["evaluations"])
    alike = [other for other in names if results[other]["evaluations"] == count]
    return count * 1.007 ** (2 * alike.index(name) - len(alike) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="groups or arms; default: all")
    parser.add_argument("--list", action="store_true", help="list groups and arms")
    parser.add_argument("--times", action="store_true", help="instead, time arms that have results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="instead, plot accuracy over evaluations")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--work", type=Path, default=HERE / "work/ablation", help="where recipes and bundles go")
    parser.add_argument("--output", type=Path, default=HERE / "ablation.json")
    arguments = parser.parse_args()
    if arguments.list:
        for group, arms in GROUPS.items():
            print(f"{group}: {' '.join(arms)}")
        return
    work, output = arguments.work, arguments.output
    wanted = [name for asked in arguments.names or GROUPS for name in GROUPS.get(asked, {asked: None})]
    if unknown := [name for name in wanted if name not in ARMS]:
        parser.error(f"unknown: {', '.join(unknown)}; --list shows what there is")
    results = json.loads(output.read_text()) if output.exists() else {}

    def save() -> None:
        ordered = {name: results[name] for name in ARMS if name in results}
        output.write_text(json.dumps(ordered, indent=1) + "\n")

    if arguments.times:
        prepare(work / "times")
        bundles = {}
        for name in dict.fromkeys(["teacher-50", "base-10-unguided", *wanted]):
            if name in results and ARMS[name].measured_alike:
                bundles[name] = work / name / "bundle"
                if not bundles[name].exists():
                    make(name, ARMS[name], arguments.model, work / "times", steps=1, samples=1, batch_size=1)
                    bundles[name] = work / "times" / name / "bundle"
        for name, found in times(bundles, runs=15, batches=[1, 4]).items():
            results[name]["times"] = {str(batch): kinds for batch, kinds in found.items()}
        save()
        print(speeds(results))
        return
    if arguments.plot:
        plot(results, arguments.plot)
        return
    prepare(work)
    model = digest_of(arguments.model)
    for name in wanted:
        made_from = {**vars(ARMS[name]), "model": model, "captions": arguments.captions, "seeds": arguments.seeds}
        if results.get(name, {}).get("made_from") == made_from:
            continue
        results[name] = run(name, ARMS[name], arguments.model, work, arguments.captions, arguments.seeds)
        results[name]["made_from"] = made_from
        for other, found in results.items():
            if found.get("distance") is None and ARMS[other].measured_alike:
                found["distance"] = distance(work / other / "images.npy", work / "teacher-50" / "images.npy")
        save()
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    print(table({name: results[name] for name in ARMS if name in results}))


if __name__ == "__main__":
    main()
