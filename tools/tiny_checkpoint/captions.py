"""Words for scenes: captions, and the vocabulary with what each word means to the text encoder.

Knows English and scenes; knows no token ids, models or pixels.
"""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import replace

from tools.tiny_checkpoint.world import COLOURS, DIRECTIONS, MAX_THINGS, SHAPES, SIZES, SPEEDS, Scene, Thing

VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "background": tuple(COLOURS),
}
ATTRIBUTES = frozenset(VALUES)

SYNONYMS: dict[str, tuple[str, ...]] = {
    "a": ("an", "the", "one"),
    "circle": ("ball", "disc", "disk", "dot", "circles", "balls", "sphere"),
    "square": ("box", "block", "squares", "cube"),
    "triangle": ("triangles", "pyramid"),
    "shape": ("it", "object", "thing", "shapes"),
    "large": ("big", "huge"),
    "small": ("little", "tiny"),
    "moving": (
        "moves",
        "move",
        "drifting",
        "drifts",
        "sliding",
        "slides",
        "going",
        "goes",
        "flies",
        "flying",
        "travels",
    ),
    "up": ("upwards", "upward", "rising", "rises"),
    "down": ("downwards", "downward", "falling", "falls"),
    "left": ("leftwards", "leftward"),
    "right": ("rightwards", "rightward"),
    "slowly": ("slow", "gently"),
    "fast": ("quickly", "rapidly", "quick"),
    "on": ("over", "across", "against", "in"),
    "background": ("backdrop", "ground"),
    "purple": ("violet",),
}
"""Words that are given the embedding of another."""

PLAIN_WORDS = (*COLOURS, *SHAPES, *SIZES, "a", "shape", "moving", "up", "down", "left", "right", "slowly", "fast")
PLAIN_WORDS += ("on", "background", "to", "and", "with", "keeps")
PUNCTUATION = (".", ",")
FILLER = "colourless"
"""Written into captions as a word that means nothing, and in no vocabulary, so that unknown words do no harm."""


def caption(scene: Scene, rng: random.Random, omitted: Set[str] = frozenset()) -> str:
    """A sentence for a scene.

    Args:
        rng: draws the wording.
        omitted: out of ATTRIBUTES, what is not said; of a second thing everything is.
    """
    phrases = [_phrase(scene.things[0], rng, omitted)]
    phrases += [_phrase(thing, rng, frozenset()) for thing in scene.things[1:]]
    words = " and ".join(phrases).split()
    if "background" not in omitted:
        words += rng.choice(
            (f"on a {scene.background} background", f"on {scene.background}", f", {scene.background} background")
        ).split()
    if rng.random() < 0.15:
        words.insert(rng.randrange(len(words) + 1), FILLER)
    ending = "." if rng.random() < 0.3 else ""
    return " ".join(words).replace(" ,", ",") + ending


def meaning(scene: Scene, omitted: Set[str]) -> list[int]:
    """What `caption` says: for each attribute in the order of VALUES, of the first thing and of the second, which value
    it names, counted from 1; 0 for what is not said and for a thing that is not there."""
    codes = []
    for index in range(MAX_THINGS):
        left_out = omitted if index == 0 else {"background"}
        is_there = index < len(scene.things)
        values = replace(scene, things=scene.things[index : index + 1]).attributes if is_there else {}
        codes += [
            1 + names.index(values[name]) if is_there and name not in left_out else 0 for name, names in VALUES.items()
        ]
    return codes


def full_caption(scene: Scene) -> str:
    """The plainest caption that says everything: what prompts for tests are."""
    phrases = [
        f"a {thing.size} {thing.colour} {thing.shape} moving {thing.direction} {thing.speed}" for thing in scene.things
    ]
    return f"{' and '.join(phrases)} on a {scene.background} background"


def _phrase(thing: Thing, rng: random.Random, omitted: Set[str]) -> str:
    words = ["a"] if rng.random() < 0.85 else []
    words += [value for name, value in (("size", thing.size), ("colour", thing.colour)) if name not in omitted]
    words.append("shape" if "shape" in omitted else thing.shape)
    motion = [] if "direction" in omitted else rng.choice(([thing.direction], ["to", "a", thing.direction]))
    if "speed" not in omitted:
        motion.insert(rng.choice((0, len(motion))), thing.speed)
    if motion or rng.random() < 0.5:
        words += ["moving", *motion]
    return " ".join(words)
