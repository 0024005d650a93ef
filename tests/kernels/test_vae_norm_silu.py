"""The Triton kernel of the VAE's norm against its definition, in Triton's interpreter.

The interpreter cuts floats off where a GPU rounds them to bfloat16: there results may be one unit in the last place
away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from helios_serve.kernels import reference_vae
from helios_serve.kernels.op_case import Shape
from helios_serve.kernels.vae_norm_silu import launch_norm_rows, norm_rows
from tests.kernels.vae_cases import arguments_of, assert_agrees, assert_only_read, case_of, outcome, runs_of

pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")

CASE = case_of("norm_rows")
X, GAMMA, BIAS, LEFT, SILU, OUT = range(6)


@pytest.mark.parametrize(("name", "shape", "dtype"), runs_of("norm_rows", "norm_windows"), ids=str)
def test_kernel_equals_its_reference(name: str, shape: Shape, dtype: torch.dtype) -> None:
    case = case_of(name)
    arguments, before = (arguments_of(case, shape, dtype) for _ in range(2))
    actual = outcome(case, case.launch, arguments)
    assert_agrees(case, actual, outcome(case, case.reference, before))
    assert_only_read(case, arguments, arguments_of(case, shape, dtype))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_left", [True, False])
@pytest.mark.parametrize("has_silu", [True, False])
def test_every_part_may_be_absent(has_bias: bool, has_left: bool, has_silu: bool) -> None:
    def arguments() -> list[Any]:
        made = arguments_of(CASE, (2, 67, 10, 24), torch.float64)
        made[BIAS] = made[BIAS] if has_bias else None
        made[LEFT] = made[LEFT] if has_left else None
        made[SILU] = has_silu
        return made

    actual = outcome(CASE, CASE.launch, arguments())
    assert_agrees(CASE, actual, outcome(CASE, CASE.reference, arguments()))
    expected_left = arguments()[LEFT] if has_left else torch.zeros(2, 10, 24, dtype=torch.float64)
    assert torch.equal(actual[:, :10], expected_left)


def test_definition_is_the_formula() -> None:
    x, gamma, bias, left, _, out = arguments_of(CASE, (2, 67, 10, 24), torch.float64)
    norm_rows(x, gamma, bias, left, True, out)
    biased = x + bias
    normed = biased / biased.square().mean(-1, keepdim=True).sqrt() * gamma
    torch.testing.assert_close(out[:, 10:], normed * normed.sigmoid(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_is_rounded_before_the_norm_as_a_convolution_would(dtype: torch.dtype) -> None:
    x, gamma, _, _, _, out = arguments_of(CASE, (1, 13, 0, 40), dtype)
    bias = (torch.randn(40) / 64).to(dtype)
    norm_rows(x, gamma, bias, None, True, out)
    summed = torch.empty_like(out)
    norm_rows(x + bias, gamma, None, None, True, summed)
    assert torch.equal(out, summed)


def test_rows_of_zeros_stay_zero() -> None:
    _, gamma, _, _, _, out = arguments_of(CASE, (1, 13, 0, 40), torch.float32)
    launch_norm_rows(torch.zeros(1, 13, 40), gamma, None, None, True, out)
    assert torch.equal(out, torch.zeros(1, 13, 40))


def test_channels_past_the_width_take_no_part() -> None:
    """A bias must not reach the lanes that only fill a block of channels."""
    x, gamma, bias, _, _, out = arguments_of(CASE, (1, 5, 0, 33), torch.float64)
    launch_norm_rows(x, gamma, bias, None, False, out)
    expected = F.rms_norm(x + bias, (33,), gamma, eps=0.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def _exchange_clips(arguments: list[Any]) -> None:
    arguments[LEFT] = arguments[LEFT].flip(0).contiguous()


def _forget_the_context(arguments: list[Any]) -> None:
    arguments[LEFT] = None


def _forget_the_bias(arguments: list[Any]) -> None:
    arguments[BIAS] = None


def _forget_the_activation(arguments: list[Any]) -> None:
    arguments[SILU] = False


def _turn_gamma(arguments: list[Any]) -> None:
    arguments[GAMMA] = arguments[GAMMA].roll(1)


MUTANTS = (_exchange_clips, _forget_the_context, _forget_the_bias, _forget_the_activation, _turn_gamma)


@pytest.mark.parametrize("mutate", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_comparison_notices(mutate: Callable[[list[Any]], None], dtype: torch.dtype) -> None:
    arguments, right = (arguments_of(CASE, (2, 67, 10, 24), dtype) for _ in range(2))
    mutate(arguments)
    expected = outcome(CASE, reference_vae.norm_rows, right)
    with pytest.raises(AssertionError, match="over the limit"):
        assert_agrees(CASE, outcome(CASE, CASE.launch, arguments), expected)
