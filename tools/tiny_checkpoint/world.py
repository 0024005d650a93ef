"""What the clips show: one or two coloured shapes that move over a coloured background and come back on the other side.

Knows scenes, clips and how they are drawn from a seed; knows no pixels, words or tensors.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from helios_serve.types import FRAMES_PER_CHUNK

WIDTH, HEIGHT = 128, 64
"""Of a clip, in pixels."""

CHUNKS_PER_CLIP = 4
MAX_THINGS = 2

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (16, 16, 16),
    "white": (240, 240, 240),
    "red": (215, 35, 35),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 225, 50),
    "orange": (250, 140, 20),
    "purple": (140, 50, 185),
}
"""RGB, 0 to 255."""
SHAPES = ("circle", "square", "triangle")
SIZES = {"large": 36, "small": 24}
"""Diameters in pixels. A smaller shape could hide in one cell of the coarsest stage, 32 pixels wide, and its place
would be lost between two stages."""
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.5, "fast": 1.25}
"""Pixels per frame."""

DEFAULTS = {"size": "large", "direction": "right", "speed": "slowly", "background": "black"}
"""What a caption means by what it does not say."""

_DEFAULT_SHARE = 0.25
"""How often an attribute that a caption may leave out takes its default on purpose."""
_CHANGE_SHARE = 0.7
_HELD_BACK_MODULUS = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A moving shape."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame along x and y."""
        x, y = DIRECTIONS[self.direction]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one prompt describes. The first thing is the one that is scored; the second is drawn behind it."""

    things: tuple[Thing, ...]
    background: str

    @property
    def attributes(self) -> dict[str, str]:
        """What can be said of it, by name; of a second thing everything always is."""
        thing = self.things[0]
        return {
            "colour": thing.colour,
            "shape": thing.shape,
            "size": thing.size,
            "direction": thing.direction,
            "speed": thing.speed,
            "background": self.background,
        }

    @property
    def is_held_back(self) -> bool:
        """Whether no clip for training shows this combination of the first thing's looks, direction and background."""
        thing, names = self.things[0], tuple(COLOURS)
        code = names.index(thing.colour) + 3 * SHAPES.index(thing.shape)
        code += 5 * tuple(DIRECTIONS).index(thing.direction) + 7 * names.index(self.background)
        return code % _HELD_BACK_MODULUS == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A scene for each chunk, and where each thing's centre is in frame 0, in pixels."""

    scenes: tuple[Scene, ...]
    starts: tuple[tuple[float, float], ...]

    @property
    def change(self) -> int | None:
        """The first chunk of another scene than the chunk before."""
        pairs = enumerate(pairwise(self.scenes), start=1)
        return next((chunk for chunk, (old, new) in pairs if old != new), None)

    def path(self, chunk: int, times: Iterable[float]) -> list[tuple[float, float]]:
        """Where the first thing is so many frames after the first one of a chunk, not wrapped around."""
        (x, y), (vx, vy) = self.centres(chunk)[0], self.scenes[chunk].things[0].velocity
        return [(x + vx * time, y + vy * time) for time in times]

    def centres(self, chunk: int) -> tuple[tuple[float, float], ...]:
        """Where the things are in the first frame of a chunk, not wrapped around."""
        moved = []
        for index, (x, y) in enumerate(self.starts):
            velocities = [scene.things[index].velocity for scene in self.scenes[:chunk]]
            moved.append(
                (
                    x + FRAMES_PER_CHUNK * sum(vx for vx, _ in velocities),
                    y + FRAMES_PER_CHUNK * sum(vy for _, vy in velocities),
                )
            )
        return tuple(moved)


def draw_scene(rng: random.Random, *, two_share: float = 0.0, held_back: bool = False) -> Scene:
    """A random scene whose things and background differ in colour.

    Args:
        two_share: how often it has two things.
        held_back: whether it is one of those that are kept from training.
    """
    while True:
        count = 2 if rng.random() < two_share else 1
        background = _or_default(rng, "background", COLOURS)
        colours = rng.sample([name for name in COLOURS if name != background], count)
        scene = Scene(things=tuple(_draw_thing(rng, colour) for colour in colours), background=background)
        if scene.is_held_back == held_back:
            return scene


def draw_clip(seed: int, index: int, *, two_share: float = 0.0) -> Clip:
    """The clip of that number among those of a seed; in some, the scene changes between two chunks."""
    rng = random.Random(f"{seed} {index}")
    scene = draw_scene(rng, two_share=two_share)
    starts = tuple((rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)) for _ in scene.things)
    scenes = [scene] * CHUNKS_PER_CLIP
    if rng.random() < _CHANGE_SHARE:
        at = rng.randrange(1, CHUNKS_PER_CLIP)
        scenes[at:] = [_changed(scene, rng)] * (CHUNKS_PER_CLIP - at)
    return Clip(scenes=tuple(scenes), starts=starts)


def _draw_thing(rng: random.Random, colour: str) -> Thing:
    return Thing(
        colour=colour,
        shape=rng.choice(SHAPES),
        size=_or_default(rng, "size", SIZES),
        direction=_or_default(rng, "direction", DIRECTIONS),
        speed=_or_default(rng, "speed", SPEEDS),
    )


def _or_default(rng: random.Random, attribute: str, values: Iterable[str]) -> str:
    return DEFAULTS[attribute] if rng.random() < _DEFAULT_SHARE else rng.choice(tuple(values))


def _changed(scene: Scene, rng: random.Random) -> Scene:
    """The scene with another colour, direction, shape or background."""
    first, *others = scene.things
    taken = {thing.colour for thing in scene.things} | {scene.background}
    free = [name for name in COLOURS if name not in taken]
    while True:
        what = rng.choices(("colour", "direction", "shape", "background"), (6, 2, 1, 2))[0]
        if what == "background":
            changed = replace(scene, background=rng.choice(free))
        else:
            options = {"colour": tuple(free), "direction": tuple(DIRECTIONS), "shape": SHAPES}[what]
            thing = replace(first, **{what: rng.choice(options)})
            changed = replace(scene, things=(thing, *others))
        if changed != scene and not changed.is_held_back:
            return changed
