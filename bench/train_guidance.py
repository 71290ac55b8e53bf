"""What does it save to distil guidance with one network, its adapter on for the student and off for the teacher?

Trains the guidance LoRA of arXiv 2312.06899 (rank 4, batch 1, 512 x 512 pixels) for some steps on a UNet of Stable
Diffusion 1.5's size, with random weights: once as `glance-trt distill` does it, and once with a second copy of the UNet
as the teacher. Each runs in a process of its own, in turns.

    python bench/train_guidance.py
    python bench/train_guidance.py --channels 32,64,128,128     # a trial of the script, in half a minute

Seconds are medians of the steps but for the first of each process; memory is the process's largest resident size.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from build_sd15 import CHANNELS, unet_of

from glance_trt.duel import run_process


def train(networks: int, channels: tuple[int, ...], steps: int, precision: str, work: Path) -> list[float]:
    """The seconds of each step."""
    import torch

    from glance_trt.distill import fitting
    from glance_trt.distill.data import Examples
    from glance_trt.distill.ground_truth import knots_of
    from glance_trt.distill.guidance import guidance_loss
    from glance_trt.distill.student import Parts, Student
    from glance_trt.distill.teacher import Teacher
    from glance_trt.recipe import Distill, Guidance

    unet = unet_of(channels).requires_grad_(False).eval()
    settings = Distill(
        method="guidance",
        prompt="-",
        rank=4,
        alpha=4.0,
        learning_rate=1e-4,
        steps=steps,
        precision=precision,  # type: ignore[arg-type]
    )
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    teachers = unet if networks == 1 else copy.deepcopy(unet)
    teacher = Teacher(teachers, scheduler, 50, Guidance(scale=7.5), torch.zeros(1, 77, 768), precision)
    examples = Examples(
        torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768), torch.zeros(1).long(), torch.zeros(1, 77, 768)
    )
    knots = knots_of(scheduler, 1000, tuple(range(1, 1001)))
    student = Student(unet, Parts(work / "lora.safetensors", None), settings, 0)
    moments: list[float] = []
    fitting.fit(
        "whole", student, guidance_loss(student, teacher, examples, knots, settings=settings), settings,
        identity={}, work=work, progress=lambda *_: moments.append(time.perf_counter()),
    )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(moments)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="of each process")
    parser.add_argument("--runs", type=int, default=2, help="processes of each kind")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--channels", default=",".join(map(str, CHANNELS)), help="of the UNet's four blocks")
    parser.add_argument("--networks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.networks:
        channels = tuple(map(int, options.channels.split(",")))
        seconds = train(options.networks, channels, options.steps, options.precision, options.figures.parent)
        options.figures.write_text(json.dumps(seconds))
        return
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(options.runs):
        for networks in found:
            with tempfile.TemporaryDirectory(prefix="glance-bench-") as folder:
                figures = Path(folder, "figures.json")
                own = ["--networks", str(networks), "--figures", str(figures)]
                _, peak = run_process([sys.executable, __file__, *sys.argv[1:], *own], len(os.sched_getaffinity(0)))
                found[networks].append((peak, median(json.loads(figures.read_text())[1:])))
    print(f"{'networks':>8}{'memory':>12}{'step':>10}")
    for networks, runs in found.items():
        print(f"{networks:>8}{median(run[0] for run in runs):>9.0f} MB{median(run[1] for run in runs):>8.1f} s")


if __name__ == "__main__":
    main()
