"""Scores a checkpoint on prompts that no clip for training showed: `python -m tools.tiny_checkpoint.evaluate DIR`.

Knows the engine's own generation, the scorer and which tasks there are; knows nothing of training. The same suite
shows what an approximation does to prompts being followed.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from helios_serve.offline import Helios
from helios_serve.types import FRAMES_PER_CHUNK
from tools.tiny_checkpoint.captions import full_caption
from tools.tiny_checkpoint.render import render_chunks
from tools.tiny_checkpoint.scorer import Frames, mean_colours, read_frames
from tools.tiny_checkpoint.world import CHUNKS_PER_CLIP, COLOURS, HEIGHT, WIDTH, Clip, Scene, draw_scene

NUM_FRAMES = 2 * FRAMES_PER_CHUNK
CHANGE_CHUNK, TRANSITION_CHUNKS, CHANGED_CHUNKS = 1, 2, 4
"""When the prompt changes, how long the cross-fade takes, and how many chunks a video with a change has."""
LONG_CHUNKS = 20
SHEET_FRAMES = 8
_GRAY_LEVELS = 255.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One video of a task: what is asked for and which attributes are looked at. steps: None are the checkpoint's."""

    scene: Scene
    seed: int
    checked: tuple[str, ...]
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A video of a case and which of its checks held; other figures by name in `measured`."""

    case: Case
    frames: Frames
    held: dict[str, bool]
    measured: dict[str, float]


def held_back_cases(count: int, checked: tuple[str, ...], *, seed: int = 0) -> Iterator[Case]:
    """Cases of scenes that are kept from training."""
    for index in range(count):
        scene = draw_scene(random.Random(f"held back {seed} {index}"), held_back=True)
        yield Case(scene=scene, seed=1000 * seed + index, checked=checked)


def text_to_video(helios: Helios, case: Case) -> Outcome:
    """66 frames of a prompt."""
    frames = _generate(helios, case, prompt=full_caption(case.scene), num_frames=NUM_FRAMES)
    return _outcome(case, frames, frames)


def image_to_video(helios: Helios, case: Case) -> Outcome:
    """66 frames after an image of the scene; the prompt names neither colour nor shape."""
    thing = case.scene.things[0]
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        Image.fromarray(true_frames(case.scene, case.seed)[0]).save(image)
        prompt = f"a shape moving {thing.direction} {thing.speed}"
        frames = _generate(helios, case, prompt=prompt, image=str(image), num_frames=NUM_FRAMES)
    return _outcome(case, frames, frames)


def video_to_video(helios: Helios, case: Case) -> Outcome:
    """66 frames after 66 frames of the scene; the prompt does not say where to."""
    thing = case.scene.things[0]
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.npy"
        np.save(video, true_frames(case.scene, case.seed))
        prompt = f"a {thing.colour} {thing.shape} moving"
        frames = _generate(helios, case, prompt=prompt, video=str(video), num_frames=NUM_FRAMES)
    return _outcome(case, frames, frames)


def prompt_change(helios: Helios, case: Case) -> Outcome:
    """Four chunks, of which the later ones are asked for in another colour; looks at those behind the cross-fade."""
    thing = case.scene.things[0]
    rng = random.Random(case.seed)
    colour = rng.choice([name for name in COLOURS if name not in (thing.colour, case.scene.background)])
    changed = replace(case.scene, things=(replace(thing, colour=colour),))
    prompts = [
        {"prompt": full_caption(case.scene)},
        {"prompt": full_caption(changed), "chunk": CHANGE_CHUNK, "transition_chunks": TRANSITION_CHUNKS},
    ]
    frames = _generate(helios, case, prompts=prompts, num_frames=CHANGED_CHUNKS * FRAMES_PER_CHUNK)
    faded = (CHANGE_CHUNK + TRANSITION_CHUNKS - 1) * FRAMES_PER_CHUNK
    return _outcome(replace(case, scene=changed), frames, frames[faded : faded + FRAMES_PER_CHUNK])


def long_video(helios: Helios, case: Case) -> Outcome:
    """20 chunks; how far colours and brightness of the last one are from those of the first, as shares of their range,
    and how much the frames of the last one move."""
    frames = _generate(helios, case, prompt=full_caption(case.scene), num_frames=LONG_CHUNKS * FRAMES_PER_CHUNK)
    first, last = frames[:FRAMES_PER_CHUNK], frames[-FRAMES_PER_CHUNK:]
    colours = [np.abs(new - old).max() for old, new in zip(mean_colours(first), mean_colours(last), strict=True)]
    measured = {
        "colour_drift": float(max(colours)) / _GRAY_LEVELS,
        "brightness_drift": abs(float(last.mean()) - float(first.mean())) / _GRAY_LEVELS,
        "speed_at_end": read_frames(last).speed,
    }
    return replace(_outcome(case, frames, last), measured=measured)


TASKS: dict[str, tuple[Callable[[Helios, Case], Outcome], tuple[str, ...]]] = {
    "text": (text_to_video, ("colour", "shape", "direction")),
    "image": (image_to_video, ("colour", "shape")),
    "video": (video_to_video, ("direction",)),
    "change": (prompt_change, ("colour",)),
    "long": (long_video, ("colour", "shape", "direction")),
}
"""Each task with the attributes that it is scored by."""


def evaluate(helios: Helios, task: str, count: int, steps: tuple[int, ...] | None = None) -> list[Outcome]:
    """The outcomes of a task on held-back scenes, with so many steps a stage or the checkpoint's own."""
    run, checked = TASKS[task]
    return [run(helios, replace(case, steps=steps)) for case in held_back_cases(count, checked)]


def shares(outcomes: list[Outcome]) -> dict[str, float]:
    """How often each check held, and the means of what was measured, rounded."""
    held = {name: float(np.mean([o.held[name] for o in outcomes])) for name in outcomes[0].held}
    measured = {name: float(np.mean([o.measured[name] for o in outcomes])) for name in outcomes[0].measured}
    return {name: round(value, 4) for name, value in (held | measured).items()}


def contact_sheet(outcomes: list[Outcome]) -> Image.Image:
    """One row of frames per video, evenly spaced in time."""
    rows = []
    for outcome in outcomes:
        picks = np.linspace(0, len(outcome.frames) - 1, SHEET_FRAMES).round().astype(int)
        rows.append(
            np.concatenate([np.pad(frame, ((1, 1), (1, 1), (0, 0))) for frame in outcome.frames[picks]], axis=1)
        )
    return Image.fromarray(np.concatenate(rows))


def true_frames(scene: Scene, seed: int) -> Frames:
    """66 drawn frames of a scene, from a place that the seed draws."""
    rng = random.Random(seed)
    starts = tuple((rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)) for _ in scene.things)
    clip = Clip(scenes=(scene,) * CHUNKS_PER_CLIP, starts=starts)
    chunks = [render_chunks([clip], chunk)[0].permute(1, 2, 3, 0) for chunk in range(NUM_FRAMES // FRAMES_PER_CHUNK)]
    return np.concatenate([((chunk.numpy() + 1) * 127.5).round().astype(np.uint8) for chunk in chunks])


def main() -> None:
    """The command: prints the scores as JSON and writes contact sheets."""
    parser = argparse.ArgumentParser(description="Scores a checkpoint on held-back prompts.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--count", type=int, default=100, help="videos of each task but the long one")
    parser.add_argument("--long-count", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, help="where contact sheets and scores.json are written")
    told = parser.parse_args()
    helios = Helios(told.checkpoint, device=told.device, dtype="float32")
    scores = {}
    for task in told.tasks:
        began = time.perf_counter()
        outcomes = evaluate(helios, task, told.long_count if task == "long" else told.count)
        num_chunks = sum(len(outcome.frames) for outcome in outcomes) / FRAMES_PER_CHUNK
        scores[task] = shares(outcomes) | {"seconds_per_chunk": round((time.perf_counter() - began) / num_chunks, 3)}
        print(json.dumps({task: scores[task]}), flush=True)
        if told.out is not None:
            told.out.mkdir(parents=True, exist_ok=True)
            contact_sheet(outcomes[:12]).save(told.out / f"{task}.png")
            (told.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def _generate(helios: Helios, case: Case, **fields: object) -> Frames:
    steps = {} if case.steps is None else {"steps": list(case.steps)}
    chunks = helios.run(helios.parse({"seed": case.seed, **steps, **fields}).request)
    return np.concatenate([chunk.frames for chunk in chunks])


def _outcome(case: Case, frames: Frames, looked_at: Frames) -> Outcome:
    reading = read_frames(looked_at)
    seen = {"colour": reading.colour, "shape": reading.shape, "direction": reading.direction}
    held = {name: seen[name] == case.scene.attributes[name] for name in case.checked}
    return Outcome(case=case, frames=frames, held=held, measured={})


if __name__ == "__main__":
    main()
