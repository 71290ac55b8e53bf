"""Draws the README's picture: what `evaluate.py` measures, with the same prompts and seeds in each row.

    python examples/shapes/compare.py            # writes docs/shapes.png

Captions stand above; an image whose caption does not hold, as `score.py` reads it, has a red frame.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
from data import held_out_scenes
from evaluate import ARMS, bundle_of
from PIL import Image, ImageDraw, ImageFont
from score import score

from glance_trt import Pipeline

HERE = Path(__file__).parent
_ZOOM, _MARGIN, _TEXT, _FRAME = 2, 10, 20, 4  # pixels; images are shown at twice their size
_CAPTION, _WIDTH = 66, 22  # pixels, and letters in a line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Path("out/evaluate"), help="where the bundles are built")
    parser.add_argument("--output", type=Path, default=HERE.parent.parent / "docs/shapes.png")
    arguments = parser.parse_args()
    arguments.bundles.mkdir(parents=True, exist_ok=True)
    scenes = held_out_scenes(7)  # the first seven: not chosen
    rows = {}
    for label, recipe in ARMS.items():
        with Pipeline.open(bundle_of(recipe, arguments.bundles), "cpu") as pipeline:
            rows[label] = [pipeline.generate(scene.caption, seed=i)[0] for i, scene in enumerate(scenes)]
    side = _ZOOM * next(iter(rows.values()))[0].width
    height = _MARGIN + _CAPTION + (side + _TEXT + _MARGIN) * len(rows)
    picture = Image.new("RGB", ((side + _MARGIN) * len(scenes) + _MARGIN, height), "white")
    pen, font, small = ImageDraw.Draw(picture), ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    for j, scene in enumerate(scenes):
        text = "\n".join(textwrap.wrap(scene.caption, _WIDTH))
        pen.multiline_text((_MARGIN + j * (side + _MARGIN), _MARGIN), text, fill="black", font=small, spacing=2)
    for i, (label, images) in enumerate(rows.items()):
        top = _MARGIN + _CAPTION + i * (side + _TEXT + _MARGIN)
        pen.text((_MARGIN, top), label, fill="black", font=font)
        for j, (scene, image) in enumerate(zip(scenes, images, strict=True)):
            left, upper = _MARGIN + j * (side + _MARGIN), top + _TEXT
            if not score(np.asarray(image), scene)["all"]:
                corners = (left - _FRAME, upper - _FRAME, left + side + _FRAME - 1, upper + side + _FRAME - 1)
                pen.rectangle(corners, fill="red")
            picture.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, upper))
    picture.save(arguments.output)


if __name__ == "__main__":
    main()
