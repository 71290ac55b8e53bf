"""Scenes of coloured shapes: what they are, how they are drawn, and what their captions say.

A scene holds one object, or two in a spatial relation, on a plain background. Every scene is drawn upright,
64 x 64 pixels, anti-aliased by drawing four times larger. The split into training and held-out captions depends on
the caption alone, so it is the same everywhere.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

SIDE = 64
"""Side of an image, pixels."""

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (245, 210, 45),
    "purple": (150, 50, 190),
    "cyan": (60, 205, 220),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
    "black": (15, 15, 15),
    "pink": (250, 185, 205),
}
SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = ("left of", "right of", "above", "below")
RADII = {"small": (7.0, 8.5), "large": (12.0, 13.5)}
"""Half the height of an object, pixels: the range from which it is drawn, per size."""


@dataclass(frozen=True)
class Style:
    """How scenes are drawn: the palettes, and whether objects have a dark edge. The captions stay the same."""

    colours: dict[str, Rgb]
    backgrounds: dict[str, Rgb]
    outlined: bool = False


STYLES = {
    "plain": Style(COLOURS, BACKGROUNDS),
    "outlined": Style(COLOURS, BACKGROUNDS, outlined=True),
    # Other colours are no choice: the autoencoder knows these alone, and makes the nearest one of any other.
    "night": Style(COLOURS, dict.fromkeys(BACKGROUNDS, BACKGROUNDS["black"])),
}
PLAIN = STYLES["plain"]

_EDGE = 1.6  # pixels that the dark edge of an outlined object is wide
_SHADE = 0.4  # of the object's colour, the edge's
_SUPERSAMPLING = 4
_GAP = 2.0  # pixels between objects, and between an object and the border


@dataclass(frozen=True)
class Thing:
    """One object: what a caption says of it."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says: one object, or two of which the first stands in `relation` to the second."""

    first: Thing
    background: str
    relation: str | None = None
    second: Thing | None = None

    @property
    def caption(self) -> str:
        objects = f"a {self.first}"
        if self.second is not None:
            objects += f" {self.relation} a {self.second}"
        return f"{objects} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """True for one caption in ten: these are never trained on."""
        return hashlib.sha256(self.caption.encode()).digest()[0] < 26


@dataclass(frozen=True)
class Placed:
    """An object with its centre and radius, in pixels (x to the right, y down)."""

    thing: Thing
    x: float
    y: float
    radius: float


THINGS = tuple(Thing(*words) for words in itertools.product(RADII, COLOURS, SHAPES))


def all_scenes() -> list[Scene]:
    """Every scene that a caption can name: 192 with one object and 36,864 with two."""
    single = [Scene(thing, background) for thing, background in itertools.product(THINGS, BACKGROUNDS)]
    double = [
        Scene(first, background, relation, second)
        for first, relation, second, background in itertools.product(THINGS, RELATIONS, THINGS, BACKGROUNDS)
    ]
    return single + double


def sample_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """A random scene of the training split, or of the held-out one; one in eight has a single object."""

    def pick(options):  # type: ignore[no-untyped-def]
        return options[rng.integers(len(options))]

    while True:
        first, background = pick(THINGS), pick(tuple(BACKGROUNDS))
        if rng.random() < 1 / 8:
            scene = Scene(first, background)
        else:
            scene = Scene(first, background, pick(RELATIONS), pick(THINGS))
        if scene.held_out == held_out:
            return scene


def held_out_scenes(count: int) -> list[Scene]:
    """`count` different held-out scenes, always the same ones."""
    rng = np.random.default_rng(20251202)
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=True)
        scenes.setdefault(scene.caption, scene)
    return list(scenes.values())


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape of half-height about `radius` around (x, y); a circle is a polygon of 64 corners."""
    if shape == "square":
        side = 0.88 * radius  # so that a square is not mistaken for the larger size by its area
        return [(x - side, y - side), (x + side, y - side), (x + side, y + side), (x - side, y + side)]
    if shape == "triangle":
        return [(x, y - radius), (x + 1.1 * radius, y + 0.9 * radius), (x - 1.1 * radius, y + 0.9 * radius)]
    corners = {"circle": 64, "star": 10}[shape]
    points = []
    for i in range(corners):
        r = radius if shape == "circle" else 1.12 * radius * (1.0 if i % 2 == 0 else 0.45)
        angle = 2 * math.pi * i / corners - math.pi / 2
        points.append((x + r * math.cos(angle), y + r * math.sin(angle)))
    return points


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Random radii and positions under which the caption of `scene` holds."""
    things = [scene.first] + ([scene.second] if scene.second is not None else [])
    radii = [rng.uniform(*RADII[thing.size]) for thing in things]
    reach = [1.12 * radius + _GAP / 2 for radius in radii]  # the widest shape spans 1.12 radii to each side
    if scene.second is None:
        x, y = (rng.uniform(reach[0], SIDE - reach[0]) for _ in range(2))
        return [Placed(scene.first, x, y, radii[0])]
    # Along the axis of the relation the objects share the side: `near` comes first, then a gap, then the other.
    first_is_near = scene.relation in ("left of", "above")
    near, far = (0, 1) if first_is_near else (1, 0)
    free = SIDE - 2 * (reach[0] + reach[1])
    before, between = np.sort(rng.uniform(0, free, 2)) if free > 0 else (free / 2, free / 2)
    along = {near: before + reach[near], far: between + 2 * reach[near] + reach[far]}
    across = [SIDE / 2 + rng.uniform(-8, 8) for _ in things]
    horizontal = scene.relation in ("left of", "right of")
    return [
        Placed(thing, *((along[i], across[i]) if horizontal else (across[i], along[i])), radii[i])
        for i, thing in enumerate(things)
    ]


def draw(background: str, objects: list[Placed], style: Style = PLAIN) -> NDArray[np.uint8]:
    """The image, [64, 64, 3] uint8."""
    n = _SUPERSAMPLING
    image = Image.new("RGB", (SIDE * n, SIDE * n), style.backgrounds[background])
    pen = ImageDraw.Draw(image)
    for item in objects:
        corners = [(x * n, y * n) for x, y in outline(item.thing.shape, item.x, item.y, item.radius)]
        colour = style.colours[item.thing.colour]
        pen.polygon(corners, fill=colour)
        if style.outlined:  # a line along the corners, as far as it lies inside
            inside, line = Image.new("1", image.size), Image.new("1", image.size)
            ImageDraw.Draw(inside).polygon(corners, fill=1)
            ImageDraw.Draw(line).line([*corners, *corners[:2]], fill=1, width=round(2 * _EDGE * n), joint="curve")
            image.paste(tuple(round(_SHADE * value) for value in colour), mask=ImageChops.logical_and(inside, line))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def render(scene: Scene, rng: np.random.Generator, style: Style = PLAIN) -> NDArray[np.uint8]:
    """An image of the scene with random radii and positions, [64, 64, 3] uint8."""
    return draw(scene.background, place(scene, rng), style)
