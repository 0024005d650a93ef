"""Bytes of decoded frames: the Triton kernels against the definitions bit by bit, and these against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helios_serve.kernels.op_case import Shape
from helios_serve.kernels.yuv import launch_rgb_to_yuv420, launch_to_uint8, rgb_to_yuv420, to_uint8
from tests.kernels.vae_cases import arguments_of, assert_agrees, case_of, outcome, runs_of

pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")

LAUNCHES = {"to_uint8": (launch_to_uint8, to_uint8), "rgb_to_yuv420": (launch_rgb_to_yuv420, rgb_to_yuv420)}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that nobody writes is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **like: empty(*shape, **like).fill_(77))


RUNS = [run for run in runs_of("to_uint8", "rgb_to_yuv420") if run[2] != torch.float64]


@pytest.mark.parametrize(("name", "shape", "dtype"), RUNS, ids=str)
def test_kernel_equals_its_reference(name: str, shape: Shape, dtype: torch.dtype) -> None:
    case = case_of(name)
    arguments = arguments_of(case, shape, dtype)
    assert_agrees(case, outcome(case, case.launch, arguments), outcome(case, case.reference, arguments))


def _every_level() -> Tensor:
    """Codes, halves between codes and their neighbours in float32: where rounding decides."""
    halves = (torch.arange(0, 511) / 255 - 1).float()
    below, above = (torch.nextafter(halves, torch.full_like(halves, limit)) for limit in (-9.0, 9.0))
    return torch.cat((halves, below, above, torch.tensor([-1.5, 1.5, 0.0])))


@pytest.mark.parametrize("name", LAUNCHES)
def test_rounding_is_the_references_at_every_level(name: str) -> None:
    launch, plain = LAUNCHES[name]
    levels = _every_level()
    shuffled = torch.stack([levels[torch.randperm(len(levels))] for _ in range(3)])
    frames = shuffled.view(1, 3, 2, -1)[..., : len(levels) // 4 * 2]
    assert torch.equal(launch(frames), plain(frames))


@pytest.mark.parametrize("name", LAUNCHES)
def test_any_layout_does(name: str) -> None:
    launch, _ = LAUNCHES[name]
    frames = torch.rand(3, 3, 6, 10) * 2 - 1
    expected = launch(frames)
    assert torch.equal(launch(frames.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(launch(torch.cat((frames, frames), dim=3)[..., :10]), expected)


def test_bytes_are_those_that_pil_shows() -> None:
    frames = torch.rand(1, 3, 6, 10) * 2 - 1
    shown = (frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    image = Image.fromarray((shown[0] * 255).round().astype("uint8"))
    assert np.array_equal(launch_to_uint8(frames)[0].numpy(), np.asarray(image))


def test_yuv_is_one_code_from_float64_at_most() -> None:
    frames = torch.rand(2, 3, 16, 34) * 2.4 - 1.2
    red, green, blue = (frames.double() * 0.5 + 0.5).clamp(0, 1).unbind(1)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    planes = launch_rgb_to_yuv420(frames).double()
    assert (planes[:, :16] - (16 + 219 * luma)).abs().max() <= 0.5 + 1e-3
    chroma = planes[:, 16:].flatten(1).view(2, 2, 8, 17)
    for plane, (colour, span) in enumerate(((blue, 1.8556), (red, 1.5748))):
        exact = ((colour - luma) / span).view(2, 8, 2, 17, 2).mean((2, 4))
        assert (chroma[:, plane] - (128 + 224 * exact)).abs().max() <= 0.5 + 1e-3


def test_comparison_notices_exchanged_chroma() -> None:
    case = case_of("rgb_to_yuv420")
    (frames,) = arguments_of(case, (2, 6, 258), torch.float32)
    with pytest.raises(AssertionError, match="other bits"):
        assert_agrees(case, launch_rgb_to_yuv420(frames.flip(1)), rgb_to_yuv420(frames))


@pytest.mark.parametrize("name", LAUNCHES)
def test_shapes_without_memory_are_those_of_the_result(name: str) -> None:
    _, plain = LAUNCHES[name]
    frames = torch.rand(2, 3, 6, 10)
    assert plain(frames.to("meta")).shape == plain(frames).shape
