"""One forward of the packed transformer against diffusers', and packs against their members alone."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import HeliosTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helios_serve.model_executor.history import History
from helios_serve.model_executor.packing import TextKV, TokenSequence, pack, unpack
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts, num_real_rows
from tests.parity.models import TEXT_DIM, transformer_pair

LIMIT = 1e-5


def _their_flow(
    model: HeliosTransformer3DModel, history: History, x: Tensor, timestep: Tensor, embeds: Tensor
) -> Tensor:
    long, mid, short = history.windows()
    return model(
        hidden_states=x[None],
        timestep=timestep,
        encoder_hidden_states=embeds[None],
        indices_hidden_states=torch.arange(20, 29)[None],
        indices_latents_history_short=torch.tensor([[0, 19]]),
        indices_latents_history_mid=torch.arange(17, 19)[None],
        indices_latents_history_long=torch.arange(1, 17)[None],
        latents_history_short=short[None],
        latents_history_mid=mid[None],
        latents_history_long=long[None],
        return_dict=False,
    )[0][0]


def _sequence(model: HeliosTransformer, history: History, x: Tensor, timestep: float, embeds: Tensor) -> TokenSequence:
    grid = (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    return TokenSequence(
        history=model.embed_history(history),
        x=x,
        rotary=model.current_rotary(grid),
        timestep=timestep,
        text=model.project_text(embeds),
    )


def _flows(model: HeliosTransformer, sequences: list[TokenSequence]) -> list[Tensor]:
    batch, text = pack(sequences, model.patch)
    return unpack(model(batch, text), batch, model.patch)


@pytest.mark.parametrize(("amplify_history", "scale_mode"), [(False, "per_head"), (True, "per_head"), (True, "scalar")])
@pytest.mark.parametrize("size", [(8, 16), (6, 10), (4, 6)])
@pytest.mark.parametrize("halvings", [0, 1])
@torch.inference_mode()
def test_forward_equals_diffusers(amplify_history: bool, scale_mode: str, size: tuple[int, int], halvings: int) -> None:
    theirs, ours = transformer_pair(amplify_history=amplify_history, scale_mode=scale_mode)
    generator = torch.Generator().manual_seed(size[0] + halvings)
    current = tuple(side // 2**halvings // 2 * 2 for side in size)
    x = torch.randn(16, 9, *current, generator=generator)
    history = History(
        frames=torch.randn(16, 19, *size, generator=generator), first=torch.randn(16, 1, *size, generator=generator)
    )
    embeds = torch.randn(20, TEXT_DIM, generator=generator)
    for timestep in (torch.tensor([437]), torch.tensor([991.25], dtype=torch.float64)):
        expected = _their_flow(theirs, history, x, timestep, embeds)
        (flow,) = _flows(ours, [_sequence(ours, history, x, float(timestep), embeds)])
        torch.testing.assert_close(flow, expected, rtol=LIMIT, atol=LIMIT)


@torch.inference_mode()
def test_missing_first_frame_is_zeros() -> None:
    _, ours = transformer_pair()
    frames, x, embeds = torch.randn(16, 19, 4, 6), torch.randn(16, 9, 4, 6), torch.randn(5, TEXT_DIM)
    none = _flows(ours, [_sequence(ours, History(frames=frames, first=None), x, 500.0, embeds)])
    zeros = _flows(ours, [_sequence(ours, History(frames=frames, first=torch.zeros(16, 1, 4, 6)), x, 500.0, embeds)])
    assert torch.equal(none[0], zeros[0])


member = st.tuples(
    st.sampled_from([(4, 4), (4, 6), (6, 4), (8, 8)]),  # latent size of the history
    st.integers(0, 1),  # pyramid stage, in halvings
    st.floats(0, 999),
    st.integers(1, 40),  # text tokens
    st.integers(0, 2**16),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(members=st.lists(member, min_size=2, max_size=5), amplify_history=st.booleans())
@torch.inference_mode()
def test_a_pack_equals_its_members_alone(
    members: list[tuple[tuple[int, int], int, float, int, int]], amplify_history: bool
) -> None:
    _, ours = transformer_pair(amplify_history=amplify_history)
    sequences = []
    for size, halvings, timestep, num_text, seed in members:
        generator = torch.Generator().manual_seed(seed)
        current = tuple(max(2, side // 2**halvings // 2 * 2) for side in size)
        sequences.append(
            _sequence(
                ours,
                History(frames=torch.randn(16, 19, *size, generator=generator), first=None),
                torch.randn(16, 9, *current, generator=generator),
                timestep,
                torch.randn(num_text, TEXT_DIM, generator=generator),
            )
        )
    together = _flows(ours, sequences)
    for flow, sequence in zip(together, sequences, strict=True):
        (alone,) = _flows(ours, [sequence])
        torch.testing.assert_close(flow, alone, rtol=LIMIT, atol=LIMIT)


@torch.inference_mode()
def test_history_keeps_row_0_and_each_sequence_has_its_own() -> None:
    _, ours = transformer_pair()
    history, embeds = History(frames=torch.randn(16, 19, 4, 4), first=None), torch.randn(3, TEXT_DIM)
    x = torch.randn(16, 9, 4, 4)
    batch, _ = pack([_sequence(ours, history, x, t, embeds) for t in (0.0, 5.0, 0.0)], ours.patch)
    row = batch.layout.row
    assert batch.timesteps.tolist() == [0.0, 0.0, 5.0, 0.0]
    assert row[batch.layout.history_index].unique().tolist() == [0]
    assert [part.unique().tolist() for part in row[batch.layout.current_index].split(36)] == [[1], [2], [3]]
    again, _ = pack([_sequence(ours, history, x, t, embeds) for t in (9.0, 8.0, 7.0)], ours.patch)
    assert again.layout is batch.layout


@pytest.mark.parametrize("amplify_history", [False, True])
@torch.inference_mode()
def test_the_last_block_can_leave_the_history_out(amplify_history: bool) -> None:
    """In float64, where the order of sums does not show; the history's keys and values must still be there."""
    exact = copy.deepcopy(transformer_pair(amplify_history=amplify_history)[1]).double()
    sequences = [
        _sequence(
            exact,
            History(frames=torch.randn(16, 19, *size), first=None),
            torch.randn(16, 9, *size, dtype=torch.float64),
            timestep,
            torch.randn(5, TEXT_DIM),
        )
        for size, timestep in (((4, 6), 500.0), ((8, 4), 20.0))
    ]
    whole = _flows(exact, sequences)
    exact.shortcuts = Shortcuts(last_block_skips_history=True)
    for flow, expected in zip(_flows(exact, sequences), whole, strict=True):
        torch.testing.assert_close(flow, expected, rtol=1e-12, atol=1e-12)


NUM_PADDED = 512


def _prompt(num_real: int) -> Tensor:
    embeds = torch.zeros(NUM_PADDED, TEXT_DIM, dtype=torch.float64)
    embeds[:num_real] = torch.randn(num_real, TEXT_DIM, generator=torch.Generator().manual_seed(num_real))
    return embeds


def _sequence_of(model: HeliosTransformer, embeds: Tensor, size: tuple[int, int] = (4, 6)) -> TokenSequence:
    generator = torch.Generator().manual_seed(size[0])
    history = History(frames=torch.randn(16, 19, *size, generator=generator), first=None)
    x = torch.randn(16, 9, *size, dtype=torch.float64, generator=generator)
    return _sequence(model, history, x, 500.0, embeds)


def _collapsing() -> tuple[HeliosTransformer, HeliosTransformer]:
    """Two models of float64 weights; the second one collapses pad tokens."""
    exact = copy.deepcopy(transformer_pair()[1]).double()
    shortened = copy.copy(exact)
    shortened.shortcuts = Shortcuts(collapses_pad_tokens=True)
    return exact, shortened


@pytest.mark.parametrize("num_real", [1, 37, 120, 226, 511, 512])
@torch.inference_mode()
def test_pads_can_be_one_key(num_real: int) -> None:
    """In float64, where the order of sums does not show; with the logit of any other number of pads it shows."""
    exact, shortened = _collapsing()
    (expected,) = _flows(exact, [_sequence_of(exact, _prompt(num_real))])
    sequence = _sequence_of(shortened, _prompt(num_real))
    text = sequence.text
    num_pads = NUM_PADDED - num_real
    assert (text.num_tokens, text.repeats) == ((num_real + 1, num_pads) if num_pads else (NUM_PADDED, 1))
    (flow,) = _flows(shortened, [sequence])
    torch.testing.assert_close(flow, expected, rtol=1e-12, atol=1e-12)
    mutants = [dataclasses.replace(text, repeats=text.repeats + 1)]
    if num_pads > 1:
        mutants += [dataclasses.replace(text, repeats=repeats) for repeats in (num_pads - 1, 1)]
        mutants += [TextKV(keys=text.keys[:, :-1].contiguous(), values=text.values[:, :-1].contiguous())]
    for mutant in mutants:
        (wrong,) = _flows(shortened, [dataclasses.replace(sequence, text=mutant)])
        assert (wrong - expected).abs().max() > 1e-9


@torch.inference_mode()
def test_each_sequence_of_a_pack_collapses_its_own_pads() -> None:
    exact, shortened = _collapsing()
    members = ((120, (4, 6)), (512, (8, 4)), (1, (4, 4)), (511, (6, 4)))
    expected = _flows(exact, [_sequence_of(exact, _prompt(n), size) for n, size in members])
    flows = _flows(shortened, [_sequence_of(shortened, _prompt(n), size) for n, size in members])
    for flow, right in zip(flows, expected, strict=True):
        torch.testing.assert_close(flow, right, rtol=1e-12, atol=1e-12)


def test_only_rows_of_zeros_at_the_end_are_pads() -> None:
    embeds = _prompt(40)
    embeds[10:20] = 0
    assert num_real_rows(embeds) == 40
    embeds[-1, -1] = 1e-30
    assert num_real_rows(embeds) == NUM_PADDED
    embeds[-1, -1] = -0.0
    assert num_real_rows(embeds) == 40
    embeds[100, 3] = torch.nan
    assert num_real_rows(embeds) == 101
    assert num_real_rows(torch.zeros(5, 3)) == 0


@torch.inference_mode()
def test_a_prompt_of_zeros_is_one_key() -> None:
    exact, shortened = _collapsing()
    (expected,) = _flows(exact, [_sequence_of(exact, _prompt(0))])
    sequence = _sequence_of(shortened, _prompt(0))
    assert (sequence.text.num_tokens, sequence.text.repeats) == (1, NUM_PADDED)
    (flow,) = _flows(shortened, [sequence])
    torch.testing.assert_close(flow, expected, rtol=1e-12, atol=1e-12)
