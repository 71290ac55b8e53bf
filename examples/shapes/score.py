"""Reads an image of shapes back and says whether a caption holds.

The reader uses no model: the background is the palette colour nearest to the median of the border, objects are the
connected regions that differ from it, their colour is the palette colour nearest to their core, and shape and size come
from the outline of `data.py` that overlaps the region best. It is only worth its own error rate; `python score.py`
measures that on rendered images.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from data import PLAIN, RADII, SHAPES, STYLES, Placed, Rgb, Scene, Style, Thing, held_out_scenes, outline, render
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

ATTRIBUTES = ("count", "background", "colour", "shape", "size", "relation")

_SIZE_BORDER = (RADII["small"][1] + RADII["large"][0]) / 2
_CONTRAST = 45  # between an object and the ground
_MIN_PIXELS = 30  # smaller specks are noise, not objects: the smallest star has 63 pixels
_EDGE_PIXELS = 2  # what a dark edge takes of an object, rounded up
_MIN_OVERLAP = 0.8  # intersection over union below which a region is no shape at all


@dataclass(frozen=True)
class Reading:
    """What an image shows: the background, and the objects with their places. An unreadable shape is ``"?"``."""

    background: str
    objects: tuple[Placed, ...]


def _nearest(colour: NDArray[np.float64], palette: dict[str, Rgb]) -> str:
    return min(palette, key=lambda name: float(np.sum((colour - np.asarray(palette[name], float)) ** 2)))


def _mask(shape: str, x: float, y: float, radius: float, side: int) -> NDArray[np.float64]:
    n = 4
    image = Image.new("L", (side * n, side * n))
    ImageDraw.Draw(image).polygon([(px * n, py * n) for px, py in outline(shape, x, y, radius)], fill=255)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), float) / 255


def _unit_geometry() -> dict[str, tuple[float, float, float]]:
    """Per shape: area, and the centroid's offset below the centre, at radius 1."""
    geometry = {}
    for shape in SHAPES:
        mask = _mask(shape, 32, 32, 20, 64)
        rows, columns = np.mgrid[0:64, 0:64] + 0.5
        area = mask.sum()
        geometry[shape] = (
            area / 400,
            ((mask * columns).sum() / area - 32) / 20,
            ((mask * rows).sum() / area - 32) / 20,
        )
    return geometry


_GEOMETRY = _unit_geometry()


def _read_object(coverage: NDArray[np.float64], colour: str) -> Placed:
    """Fit each shape by area and centroid, keep the one that overlaps best. `coverage` [64, 64] in 0..1."""
    rows, columns = np.mgrid[0 : coverage.shape[0], 0 : coverage.shape[1]] + 0.5
    area = coverage.sum()
    x, y = (coverage * columns).sum() / area, (coverage * rows).sum() / area
    best, best_overlap = Placed(Thing("?", colour, "?"), x, y, float(np.sqrt(area / np.pi))), _MIN_OVERLAP
    for shape, (unit_area, dx, dy) in _GEOMETRY.items():
        radius = float(np.sqrt(area / unit_area))
        cx, cy = x - dx * radius, y - dy * radius
        mask = _mask(shape, cx, cy, radius, coverage.shape[0])
        overlap = np.minimum(mask, coverage).sum() / np.maximum(mask, coverage).sum()
        if overlap > best_overlap:
            size = "small" if radius < _SIZE_BORDER else "large"
            best, best_overlap = Placed(Thing(size, colour, shape), cx, cy, radius), overlap
    return best


def read(image: NDArray[np.uint8], style: Style = PLAIN) -> Reading:
    """Read an image [64, 64, 3] uint8 that is drawn in this style."""
    pixels = image.astype(float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = _nearest(ground, style.backgrounds)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    labels, count = ndimage.label(distance > _CONTRAST)
    objects = []
    for index in range(1, count + 1):
        region = labels == index
        if region.sum() < _MIN_PIXELS:
            continue
        near = ndimage.binary_dilation(region, iterations=2)
        if style.outlined:  # the edge is as dark on every ground, so that it tells the extent but not the colour
            core = ndimage.binary_erosion(region, iterations=_EDGE_PIXELS)
            colour = np.median(pixels[core if core.any() else region], axis=0)
            share = ndimage.binary_fill_holes(region).astype(float)
        else:
            core = region & (distance >= np.quantile(distance[region], 0.6))
            colour = np.median(pixels[core], axis=0)
            axis = colour - ground
            share = np.clip(((pixels - ground) @ axis) / (axis @ axis), 0, 1)
        objects.append(_read_object(share * near, _nearest(colour, style.colours)))
    return Reading(background, tuple(objects))


def _holds(relation: str, first: Placed, second: Placed) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along > 0 and along > 0.8 * abs(across)


def score(image: NDArray[np.uint8], scene: Scene, style: Style = PLAIN) -> dict[str, bool]:
    """Which attributes of the caption hold in the image [64, 64, 3] uint8; ``all`` is their conjunction.

    With the right number of objects, the assignment of objects to the caption that satisfies most attributes counts.
    With a wrong number, everything but the background is wrong. Scenes with one object have no ``relation``.
    """
    reading = read(image, style)
    wanted = [scene.first] + ([scene.second] if scene.second else [])
    best = dict.fromkeys(ATTRIBUTES[2:5], False) | ({"relation": False} if scene.second else {})
    if len(reading.objects) == len(wanted):
        orders = [reading.objects] + ([reading.objects[::-1]] if scene.second else [])
        for found in orders:
            marks = {
                name: all(getattr(f.thing, name) == getattr(w, name) for f, w in zip(found, wanted, strict=True))
                for name in ATTRIBUTES[2:5]
            }
            if scene.second:
                marks["relation"] = _holds(str(scene.relation), found[0], found[1])
            best = max(best, marks, key=lambda m: sum(m.values()))
    ground = style.backgrounds[reading.background] == style.backgrounds[scene.background]  # at night all are one
    marks = {"count": len(reading.objects) == len(wanted), "background": ground, **best}
    return marks | {"all": all(marks.values())}


def accuracy(scores: list[dict[str, bool]]) -> dict[str, float]:
    """Share of images per attribute, over those whose caption has it, in 0..1."""
    return {name: float(np.mean([marks[name] for marks in scores if name in marks])) for name in (*ATTRIBUTES, "all")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the reader's own error rate on rendered images.")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--style", choices=STYLES, default="plain")
    arguments = parser.parse_args()
    rng, style = np.random.default_rng(arguments.seed), STYLES[arguments.style]
    scenes = held_out_scenes(500)
    scores = []
    for i in range(arguments.images):
        scene = scenes[i % len(scenes)]
        scores.append(score(render(scene, rng, style), scene, style))
    for name, share in accuracy(scores).items():
        print(f"{name:<10} {share:8.2%}")


if __name__ == "__main__":
    main()
