"""The Triton kernels that follow the VAE's convolutions against PyTorch, bit by bit, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from helios_serve.kernels import reference_vae
from helios_serve.kernels.op_case import Shape
from helios_serve.kernels.vae_epilogue import add_bias, convolve, launch_add_bias, launch_place_with_bias
from tests.kernels.vae_cases import arguments_of, assert_agrees, assert_only_read, case_of, outcome, runs_of

pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")


@pytest.mark.parametrize(("name", "shape", "dtype"), runs_of("add_bias", "place_with_bias"), ids=str)
def test_kernel_equals_its_reference(name: str, shape: Shape, dtype: torch.dtype) -> None:
    case = case_of(name)
    arguments, before = (arguments_of(case, shape, dtype) for _ in range(2))
    assert_agrees(case, outcome(case, case.launch, arguments), outcome(case, case.reference, before))
    assert_only_read(case, arguments, arguments_of(case, shape, dtype))


def test_bias_alone() -> None:
    x, bias, _ = arguments_of(case_of("add_bias"), (67, 24), torch.float32)
    expected = x + bias
    launch_add_bias(x, bias, None)
    assert torch.equal(x, expected)


def test_place_leaves_the_other_pixels_alone() -> None:
    case = case_of("place_with_bias")
    x, bias, _ = arguments_of(case, (2, 3, 7, 24), torch.float32)
    out = torch.full((2, 6, 14, 24), torch.nan)
    launch_place_with_bias(x, bias, out[:, ::2, 1::2])
    is_written = torch.zeros(6, 14, dtype=torch.bool)
    is_written[::2, 1::2] = True
    assert out[:, is_written].isfinite().all()
    assert out[:, ~is_written].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_round_as_a_convolution_and_an_addition_do(dtype: torch.dtype) -> None:
    """The residual meets a biased value that was rounded already."""
    x, bias, residual = torch.randn(67, 24).to(dtype), torch.randn(24).to(dtype), torch.randn(67, 24).to(dtype)
    expected = (x.double() + bias.double()).to(dtype)
    expected = (expected.double() + residual.double()).to(dtype)
    once = (x.double() + bias.double() + residual.double()).to(dtype)
    assert not torch.equal(expected, once), "the inputs do not tell one rounding from two"
    actual = x.clone()
    add_bias(actual, bias, residual)
    assert torch.equal(actual, expected)
    if dtype == torch.float32:  # the interpreter cuts off what a GPU rounds to bfloat16
        launch_add_bias(x, bias, residual)
        assert torch.equal(x, expected)


def test_comparison_notices_a_residual_of_other_rows() -> None:
    case = case_of("add_bias")
    arguments, right = (arguments_of(case, (67, 24), torch.bfloat16) for _ in range(2))
    arguments[2] = arguments[2].roll(1, 0)
    with pytest.raises(AssertionError, match="other bits"):
        assert_agrees(case, outcome(case, case.launch, arguments), outcome(case, case.reference, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_convolution_keeps_the_channels_last(dtype: torch.dtype) -> None:
    clip = torch.randn(1, 6, 5, 4, 7, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(4, 6, 3, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    out = convolve(clip, weight, (0, 1, 1))
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    expected = F.conv3d(clip.double(), weight.double(), padding=(0, 1, 1))
    limit = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=limit)
    picture, taps = clip[:, :, 0].contiguous(memory_format=torch.channels_last), weight[:, :, 0]
    flat = convolve(picture, taps.contiguous(memory_format=torch.channels_last), (1, 1))
    assert flat.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(flat.double(), F.conv2d(picture.double(), taps.double(), padding=1), rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(1, 6, 5, 4, 7), (3, 6, 4, 7)], ids=str)
def test_shapes_without_memory_are_those_of_the_result(shape: Shape) -> None:
    layout = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    x, weight = torch.randn(shape), torch.randn(4, 6, *(2,) * (len(shape) - 2))
    padding = (0, 1, 1)[-(len(shape) - 2) :]
    made = reference_vae.convolve(x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), padding)
    meta = convolve(x.to("meta"), weight.to("meta"), padding)
    assert (meta.shape, meta.stride(), meta.dtype) == (made.shape, made.stride(), made.dtype)
