"""Decides what the transformer is shown: which chunk of which clip, what is said of it, at which point of the sampler.

Knows clips, captions and the sampler's schedule, and makes small host tensors of them, so that other processes can
plan ahead of the one that trains; knows no latents and no model.
Shape letters: B examples, L text tokens, S things.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.data import Dataset

from helios_serve.model_executor.sampling.schedule import ChunkSchedule
from helios_serve.types import LATENT_FRAMES_PER_CHUNK
from tools.tiny_checkpoint.captions import ATTRIBUTES, VALUES, caption, meaning
from tools.tiny_checkpoint.vocabulary import Vocabulary
from tools.tiny_checkpoint.world import CHUNKS_PER_CLIP, DEFAULTS, HEIGHT, MAX_THINGS, WIDTH, Clip, Scene

_FIRST_CHUNK_SHARE, _IMAGE_SHARE = 0.45, 0.6
_AT_CHANGE_SHARE, _FADE_SHARE = 0.35, 0.5
"""How often a later chunk is the first of a changed scene, if there is one, and how often the prompt fades in there."""
_MADE_SHARE = 0.5
"""How often a later chunk follows what the transformer made, errors and all."""
_OMIT_SHARE, _SAY_LITTLE_SHARE, _SAY_MOTION_SHARE = 0.4, 0.25, 0.3
"""How often something that a caption may leave out is left out, how often everything is, and how often all looks."""
_CLEAN_SHARE, _MAX_CORRUPTION = 0.25, 0.3
"""Histories without noise, and the most noise that is blended into one of their frames. Requests add 0.111 to 0.135 to
images and videos; more teaches the transformer not to hand its own errors on."""
_ONE_STEP_SHARE = 0.6
_FRAMES_PER_LATENT = 4
_MOTION = frozenset(("direction", "speed"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A batch of examples, before any latents are looked at.

    clip, chunk: [B] int64. has_image: [B] whether the video follows an image of its first frame. is_made: [B] whether
    the history is what the transformer made. corruption: [B], the most noise in a frame of the history.
    ids, lengths: captions as canonical ids [B, 2, L] and their numbers [B, 2], of the chunk before where the prompt
    fades and of this one. share: [B], how far it has faded to this one, at least half.
    meanings: [B, A], what a caption says of each attribute of each thing (see `meaning`). angles: [B, 2 S], x and y of
    each thing's start as shares of a full turn, which the noise of the coarsest stage must tell, NaN where it tells
    nothing. attributes: [B, attributes], what the first thing is, by its place among VALUES. centres: [B, T, 2], where
    it is in each latent frame, as shares of a full turn in radians. sigma, timestep: [B].
    """

    clip: Tensor
    chunk: Tensor
    has_image: Tensor
    is_made: Tensor
    corruption: Tensor
    ids: Tensor
    lengths: Tensor
    share: Tensor
    meanings: Tensor
    angles: Tensor
    attributes: Tensor
    centres: Tensor
    sigma: Tensor
    timestep: Tensor

    def pin_memory(self) -> Plan:
        """The same in memory that a device reads without waiting; what a DataLoader calls."""
        return Plan(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})

    def first(self, count: int) -> Plan:
        """So many of the examples."""
        return Plan(**{field.name: getattr(self, field.name)[:count] for field in fields(self)})

    def to(self, device: torch.device) -> Plan:
        """The same on another device."""
        return Plan(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})


class Planner(Dataset[tuple[Plan, ...]]):
    """The plans of every step, one per stage; equal seeds give equal plans.

    Args:
        schedules: the sampler's, for 1 step per stage, 2 and so on.
        batch: examples of each stage.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        vocabulary: Vocabulary,
        schedules: Sequence[ChunkSchedule],
        batch: Sequence[int],
        seed: str,
    ) -> None:
        self._clips = clips
        self._vocabulary = vocabulary
        self._schedules = schedules
        self._batch = batch
        self._seed = seed

    def __getitem__(self, step: int) -> tuple[Plan, ...]:
        rng = random.Random(f"{self._seed} {step}")
        return tuple(self._plan(stage, count, rng) for stage, count in enumerate(self._batch))

    def _plan(self, stage: int, count: int, rng: random.Random) -> Plan:
        kinds = [_draw_kind(rng, self._clips) for _ in range(count)]
        clips = [self._clips[kind.clip] for kind in kinds]
        highest = [0.0 if rng.random() < _CLEAN_SHARE else rng.uniform(0, _MAX_CORRUPTION) for _ in kinds]
        said = [
            _say(clip.scenes[kind.chunk], _draw_omitted(clip, kind, rng), rng)
            for clip, kind in zip(clips, kinds, strict=True)
        ]
        fades = [kind.is_change and rng.random() < _FADE_SHARE for kind in kinds]
        before = [
            caption(clip.scenes[kind.chunk - 1], rng) if fading else new
            for clip, kind, fading, (new, _) in zip(clips, kinds, fades, said, strict=True)
        ]
        captions = [one for pair in zip(before, (new for new, _ in said), strict=True) for one in pair]
        ids, lengths = self._vocabulary.tokens(captions)
        sigma, timestep = torch.tensor([self._point(stage, rng) for _ in kinds]).unbind(1)
        return Plan(
            clip=torch.tensor([kind.clip for kind in kinds]),
            chunk=torch.tensor([kind.chunk for kind in kinds]),
            has_image=torch.tensor([kind.has_image for kind in kinds]),
            is_made=torch.tensor([rng.random() < _MADE_SHARE for _ in kinds]),
            corruption=torch.tensor(highest),
            ids=ids.unflatten(0, (-1, 2)),
            lengths=lengths.unflatten(0, (-1, 2)),
            share=torch.tensor([rng.uniform(0.5, 1) if fading else 1.0 for fading in fades]),
            meanings=torch.tensor([meanings for _, meanings in said]),
            angles=torch.tensor([_angles(clip, kind) for clip, kind in zip(clips, kinds, strict=True)]),
            attributes=torch.tensor([_attributes(clip, kind) for clip, kind in zip(clips, kinds, strict=True)]),
            centres=torch.tensor([_centres(clip, kind) for clip, kind in zip(clips, kinds, strict=True)]),
            sigma=sigma.contiguous(),
            timestep=timestep.contiguous(),
        )

    def _point(self, stage: int, rng: random.Random) -> tuple[float, float]:
        """Sigma and timestep at which the sampler may call the transformer."""
        index = 0 if rng.random() < _ONE_STEP_SHARE else rng.randrange(1, len(self._schedules))
        schedule = self._schedules[index].stages[stage]
        step = rng.randrange(schedule.num_steps)
        return schedule.sigmas[step], schedule.model_timesteps[step]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    clip: int
    chunk: int
    has_image: bool
    is_change: bool

    @property
    def is_fresh(self) -> bool:
        """Whether nothing but noise decides where the things start."""
        return self.chunk == 0 and not self.has_image


def _draw_kind(rng: random.Random, clips: Sequence[Clip]) -> _Kind:
    clip, is_first = rng.randrange(len(clips)), rng.random() < _FIRST_CHUNK_SHARE
    has_image = rng.random() < _IMAGE_SHARE
    change = clips[clip].change
    if is_first:
        return _Kind(clip=clip, chunk=0, has_image=has_image, is_change=False)
    is_uniform = change is None or rng.random() >= _AT_CHANGE_SHARE
    chunk = rng.randrange(1, CHUNKS_PER_CLIP) if is_uniform else change
    return _Kind(clip=clip, chunk=chunk, has_image=has_image, is_change=chunk == change)


def _angles(clip: Clip, kind: _Kind) -> list[float]:
    starts = clip.starts if kind.is_fresh else ()
    turns = [place / length for x, y in starts for place, length in ((x, WIDTH), (y, HEIGHT))]
    return [2 * math.pi * turn for turn in turns] + [math.nan] * (2 * MAX_THINGS - len(turns))


def _attributes(clip: Clip, kind: _Kind) -> list[int]:
    scene = clip.scenes[kind.chunk]
    return [names.index(scene.attributes[name]) for name, names in VALUES.items()]


def _centres(clip: Clip, kind: _Kind) -> list[tuple[float, float]]:
    """A latent frame stands for the four frames up to four times its number, the first one for frame 0."""
    times = [max(0.0, _FRAMES_PER_LATENT * index - 1.5) for index in range(LATENT_FRAMES_PER_CHUNK)]
    return [(2 * math.pi * x / WIDTH, 2 * math.pi * y / HEIGHT) for x, y in clip.path(kind.chunk, times)]


def _say(scene: Scene, omitted: frozenset[str], rng: random.Random) -> tuple[str, list[int]]:
    return caption(scene, rng, omitted), meaning(scene, omitted)


def _draw_omitted(clip: Clip, kind: _Kind, rng: random.Random) -> frozenset[str]:
    """What a caption leaves out: now and then what the history shows, and what is meant anyway."""
    scene = clip.scenes[kind.chunk]
    known = ATTRIBUTES - _MOTION if kind.has_image else frozenset[str]()
    if kind.chunk > 0:
        known = ATTRIBUTES - _differences(clip.scenes[kind.chunk - 1], scene)
    optional = known | {name for name, value in DEFAULTS.items() if scene.attributes[name] == value}
    drawn = rng.random()
    if drawn < _SAY_LITTLE_SHARE:
        return optional
    if drawn < _SAY_LITTLE_SHARE + _SAY_MOTION_SHARE:
        return optional - _MOTION
    return frozenset(name for name in sorted(optional) if rng.random() < _OMIT_SHARE)


def _differences(old: Scene, new: Scene) -> frozenset[str]:
    """The attributes in which they differ."""
    was, now = old.attributes, new.attributes
    return frozenset(name for name in ATTRIBUTES if was[name] != now[name])
