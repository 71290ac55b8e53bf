"""Prompt accuracy of the demonstration model: teacher, trajectory experts, Glance, and the base on Glance's steps.

    python examples/shapes/evaluate.py            # 500 held-out captions, three seeds; a quarter of an hour, two cores

Images come from the same engines as in deployment, and `score.py` reads them. Prints a Markdown table and writes the
figures to figures.json; intervals are 95 %, over captions (the seeds of a caption are averaged first).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from data import PLAIN, Scene, Style, held_out_scenes
from numpy.typing import NDArray
from score import ATTRIBUTES, score
from tqdm import tqdm

from glance_trt import Pipeline
from glance_trt.build import build

HERE = Path(__file__).parent
ARMS = {
    "teacher, 100 evaluations": HERE / "recipes/teacher.yaml",
    "trajectory experts, 10 evaluations": HERE.parent.parent / "export/shapes.yaml",
    "Glance, 20 evaluations": HERE / "recipes/glance.yaml",
    "base on Glance's steps, 20 evaluations": HERE / "recipes/base10.yaml",
}


def bundle_of(recipe: Path, folder: Path) -> Path:
    """The CPU bundle of a recipe, built if it is not there as the recipe makes it."""
    bundle = folder / f"{recipe.stem}.bundle"
    build(str(recipe), bundle, engines=["cpu"], overwrite=True)
    return bundle


def images_of(bundle: Path, scenes: list[Scene], seeds: list[int], label: str) -> NDArray[np.uint8]:
    """[scenes, seeds, 64, 64, 3]. Each core generates images of its own: for a model this small, that is faster than
    two that share the work of one image."""
    cores = len(os.sched_getaffinity(0))
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline, ThreadPoolExecutor(cores) as pool:

        def images(i: int) -> list[NDArray[np.uint8]]:
            # Another noise for each caption: 500 captions on one noise would be 500 views of one accident.
            return [np.asarray(pipeline.generate(scenes[i].caption, seed=1000 * seed + i)[0]) for seed in seeds]

        bar = tqdm(total=len(scenes), desc=label, disable=not sys.stderr.isatty())
        found = []
        for row in pool.map(images, range(len(scenes))):
            found.append(row)
            bar.update()
    return np.array(found)


def marks_of(images: NDArray[np.uint8], scenes: list[Scene], style: Style = PLAIN) -> list[list[dict[str, bool]]]:
    """The scorer's marks, per scene and seed."""
    return [[score(image, scene, style) for image in row] for row, scene in zip(images, scenes, strict=True)]


def summary(marks: list[list[dict[str, bool]]], name: str) -> tuple[float, float]:
    """Mean of an attribute and half of its 95 % interval, both in 0..1."""
    means = np.array([np.mean([m[name] for m in row]) for row in marks if name in row[0]])
    return float(means.mean()), float(1.96 * means.std(ddof=1) / np.sqrt(len(means)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bundles", type=Path, default=Path("out/evaluate"), help="where the bundles are built")
    parser.add_argument("--output", type=Path, default=HERE / "figures.json")
    arguments = parser.parse_args()
    arguments.bundles.mkdir(parents=True, exist_ok=True)
    scenes = held_out_scenes(arguments.captions)
    names = ("all", *ATTRIBUTES)
    figures = {}
    print("| model | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for label, recipe in ARMS.items():
        start = time.perf_counter()
        images = images_of(bundle_of(recipe, arguments.bundles), scenes, arguments.seeds, label)
        marks = marks_of(images, scenes)
        results = {name: summary(marks, name) for name in names}
        cells = " | ".join(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in results.values())
        print(f"| {label} | {cells} |", flush=True)
        figures[label] = {name: {"mean": mean, "half_interval": half} for name, (mean, half) in results.items()}
        figures[label]["seconds"] = {"total": time.perf_counter() - start}
    settings = {"captions": arguments.captions, "seeds": arguments.seeds}
    arguments.output.write_text(json.dumps(settings | {"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
