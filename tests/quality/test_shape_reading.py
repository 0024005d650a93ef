"""The loss that asks which shape a decoded picture shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tools.tiny_checkpoint.captions import VALUES
from tools.tiny_checkpoint.render import render_chunks
from tools.tiny_checkpoint.shape_reading import shape_loss
from tools.tiny_checkpoint.world import SHAPES, Clip, Scene, Thing, draw_clip

NUM_FRAMES = 5


def clip_of(shape: str, size: str = "large", *, at: tuple[float, float] = (64.0, 32.0)) -> Clip:
    thing = Thing(colour="orange", shape=shape, size=size, direction="left", speed="fast")
    return replace(draw_clip(0, 0), scenes=(Scene(things=(thing,), background="blue"),) * 4, starts=(at,))


def loss_of(frames: Tensor, clip: Clip, *, corner: tuple[int, int] = (0, 0), is_seen: Tensor | None = None) -> Tensor:
    """Of frames that mean the clip's first chunk, cut out at `corner`."""
    scene = clip.scenes[0]
    attributes = torch.tensor([[names.index(scene.attributes[name]) for name, names in VALUES.items()]])
    x, y = clip.starts[0]
    vx, vy = scene.things[0].velocity
    centres = torch.tensor([[(x + vx * frame, y + vy * frame) for frame in range(NUM_FRAMES)]])
    seen = torch.ones_like(frames[:, :1], dtype=torch.bool) if is_seen is None else is_seen
    return shape_loss(frames, seen, attributes, centres, torch.tensor([corner]))


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("meant", SHAPES)
def test_only_the_shape_that_is_meant_costs_little(meant: str, size: str) -> None:
    clip = clip_of(meant, size)
    losses = {shown: float(loss_of(render_chunks([clip_of(shown, size)], 0, NUM_FRAMES), clip)) for shown in SHAPES}
    assert losses[meant] < 0.25
    assert all(loss > 0.5 for shown, loss in losses.items() if shown != meant)


def test_a_shape_is_read_over_the_border_and_in_a_window() -> None:
    over = clip_of("square", at=(3.0, 60.0))
    assert loss_of(render_chunks([over], 0, NUM_FRAMES), over) < 0.25
    clip = clip_of("square")
    window = render_chunks([clip], 0, NUM_FRAMES)[..., 8:56, 40:88]
    assert loss_of(window, clip, corner=(40, 8)) < 0.25
    assert loss_of(window, clip, corner=(48, 8)) > 0.25  # eight pixels beside the place


def test_what_is_not_seen_does_not_count() -> None:
    clip = clip_of("square")
    frames = render_chunks([clip], 0, NUM_FRAMES)
    spoilt = frames.clone()
    spoilt[..., :8] = frames[0, :, 0, 32, 64].view(1, 3, 1, 1, 1)  # a bar of the thing's colour
    is_seen = torch.ones_like(frames[:, :1], dtype=torch.bool)
    is_seen[..., :8] = False
    torch.testing.assert_close(loss_of(spoilt, clip, is_seen=is_seen), loss_of(frames, clip, is_seen=is_seen))
    assert loss_of(spoilt, clip) > loss_of(frames, clip)


def test_a_circle_that_should_be_a_square_learns_its_corners() -> None:
    square = clip_of("square")
    frames = render_chunks([clip_of("circle")], 0, NUM_FRAMES).requires_grad_()
    loss_of(frames, square).backward()
    assert frames.grad is not None
    first = frames.grad[0, :, 0]
    towards = first.new_tensor((250, 140, 20)) - first.new_tensor((40, 80, 220))  # from the background to the thing
    pull = -(first * towards[:, None, None]).sum(0)  # (H, W): positive where the thing should be
    corner, middle, outside = pull[32 - 15, 64 - 15], pull[32, 64], pull[32, 100]
    assert corner > 10 * abs(middle)
    assert corner > 10 * abs(outside)
