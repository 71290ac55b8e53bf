"""Draws the README's picture: teacher at 50 steps, Glance at 10, and the base at the same 10; same prompts and seeds.

python examples/shapes/compare.py            # writes docs/shapes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data import held_out_scenes
from evaluate import ARMS, bundle_of
from PIL import Image, ImageDraw, ImageFont

from glance_trt import Pipeline

HERE = Path(__file__).parent
_ZOOM, _MARGIN, _TEXT = 2, 8, 20  # pixels; images are shown at twice their size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Path("out/evaluate"), help="where the bundles are built")
    parser.add_argument("--output", type=Path, default=HERE.parent.parent / "docs/shapes.png")
    arguments = parser.parse_args()
    arguments.bundles.mkdir(parents=True, exist_ok=True)
    captions = [scene.caption for scene in held_out_scenes(7)]  # the first seven: not chosen
    rows = {}
    for label, recipe in ARMS.items():
        with Pipeline.open(bundle_of(recipe, arguments.bundles), "cpu") as pipeline:
            rows[label] = [pipeline.generate(caption, seed=i)[0] for i, caption in enumerate(captions)]
    side = _ZOOM * next(iter(rows.values()))[0].width
    height = (side + _TEXT + _MARGIN) * len(rows) + _MARGIN
    picture = Image.new("RGB", ((side + _MARGIN) * len(captions) + _MARGIN, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    for i, (label, images) in enumerate(rows.items()):
        top = _MARGIN + i * (side + _TEXT + _MARGIN)
        pen.text((_MARGIN, top), label, fill="black", font=font)
        for j, image in enumerate(images):
            picture.paste(
                image.resize((side, side), Image.Resampling.NEAREST), (_MARGIN + j * (side + _MARGIN), top + _TEXT)
            )
    picture.save(arguments.output)
    for caption in captions:
        print(caption)


if __name__ == "__main__":
    main()
