"""Step costs: operation counts, predicted seconds, and what is learnt from observed ones."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_serve.engine.step_cost import (
    CostModel,
    DevicePrior,
    Factor,
    ModelShape,
    StepSample,
    step_index,
)
from helios_serve.types import SamplingParams, StepCursor


def video(**changes: object) -> SamplingParams:
    values: dict[str, object] = {
        "width": 640,
        "height": 384,
        "num_frames": 99,
        "fps": 24.0,
        "seed": 0,
        "steps": (2, 2, 2),
        "guidance_scale": 1.0,
        "amplify_first_chunk": True,
    }
    return SamplingParams(**(values | changes))  # type: ignore[arg-type]


def model(prior: DevicePrior | None = None) -> CostModel:
    return CostModel(ModelShape(), DevicePrior() if prior is None else prior)


def test_token_counts_of_the_published_model() -> None:
    shape = ModelShape()
    assert [shape.noisy_tokens(video(), stage) for stage in range(3)] == [540, 2160, 8640]
    assert shape.history_tokens(video()) == 2400
    assert shape.noisy_tokens(video(steps=(50,)), 0) == 8640


@pytest.mark.parametrize(
    ("noisy", "cached", "uncached"), [(540, 67.6, 69.7), (2160, 117.0, 119.1), (8640, 357.4, 359.6)]
)
def test_operations_of_a_step(noisy: int, cached: float, uncached: float) -> None:
    assert ModelShape().step_flops(noisy, 2400) / 1e12 == pytest.approx(cached, abs=0.2)
    assert ModelShape(text_kv_is_cached=False).step_flops(noisy, 2400) / 1e12 == pytest.approx(uncached, abs=0.2)


@pytest.mark.parametrize(
    ("num_ranks", "stages", "chunk"),
    [
        (1, (0.096, 0.166, 0.511), 1.546),
        (2, (0.054, 0.092, 0.273), 0.838),
        (4, (0.029, 0.049, 0.142), 0.439),
        (8, (0.016, 0.026, 0.073), 0.230),
    ],
)
def test_prior_seconds_match_the_table(num_ranks: int, stages: tuple[float, ...], chunk: float) -> None:
    found = [model().step_s(num_ranks, [(video(), StepCursor(chunk=1, stage=stage))]) for stage in range(3)]
    assert found == pytest.approx(stages, abs=0.0011)
    assert model().remaining_s(num_ranks, video(), StepCursor(chunk=1)) == pytest.approx(chunk, rel=0.01)


def test_guidance_doubles_the_work_and_amplification_the_steps() -> None:
    plain, guided = model().timing(video(), 1, 1), model().timing(video(guidance_scale=5.0), 1, 1)
    assert guided.tflop_left[0] == pytest.approx(2 * plain.tflop_left[0])
    assert model().timing(video(), 0, 1).tflop_left[0] == pytest.approx(2 * plain.tflop_left[0])
    assert len(model().timing(video(), 0, 1).steps) == 12


def test_remaining_seconds_fall_to_zero_step_by_step() -> None:
    costs, params, cursor = model(), video(), StepCursor(chunk=1)
    left = costs.remaining_s(2, params, cursor)
    while not cursor.ends_chunk(params):
        step = costs.step_s(2, [(params, cursor)])
        cursor = cursor.next(params)
        assert costs.remaining_s(2, params, cursor) == pytest.approx(left - step)
        left -= step
    assert left == pytest.approx(costs.step_s(2, [(params, cursor)]))
    assert step_index(params, cursor) == 5


def test_floor_makes_small_forwards_worth_packing() -> None:
    small = video(width=128, height=64)
    pair = [(small, StepCursor(chunk=1))] * 2
    assert model().step_s(1, pair) == pytest.approx(model().step_s(1, pair[:1]))


def test_pack_finishes_in_the_order_of_remaining_steps() -> None:
    costs = model()
    timing = costs.timing(video(), 1, 4)
    ahead, behind = costs.pack_finish_s([(timing, 4), (timing, 0)])
    alone = costs.pack_finish_s([(timing, 0)])[0]
    assert timing.remaining_s[4] < ahead < behind
    assert alone < behind < alone + timing.remaining_s[4]
    assert costs.pack_finish_s([(timing, len(timing.steps))]) == (0.0,)


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_a_wrong_prior_is_corrected_within_24_steps(wrong: float) -> None:
    truth, costs, rng = model(), model(DevicePrior().scaled(wrong)), Random(4)
    timing = costs.timing(video(), 1, 4)
    for step in [*timing.steps] * 4:
        seconds = truth.forward_s(4, (step,)) * rng.lognormvariate(0, 0.05)
        costs.observe(StepSample(num_ranks=4, steps=(step,), seconds=seconds))
    for step in timing.steps:
        assert costs.forward_s(4, (step,)) == pytest.approx(truth.forward_s(4, (step,)), rel=0.1)
    assert costs.timing(video(), 0, 4).remaining_s[0] == pytest.approx(
        truth.timing(video(), 0, 4).remaining_s[0], rel=0.1
    )


def test_unmeasured_shapes_inherit_what_the_device_showed() -> None:
    costs = model()
    timing = costs.timing(video(), 1, 4)
    before = costs.forward_s(4, (timing.steps[5],) * 3)
    for step in timing.steps:
        costs.observe(StepSample(num_ranks=4, steps=(step,), seconds=2 * model().forward_s(4, (step,))))
    assert costs.forward_s(4, (timing.steps[5],) * 3) == pytest.approx(2 * before)
    other = costs.timing(video(width=320, height=192), 1, 4).steps[0]
    assert costs.forward_s(4, (other,)) == pytest.approx(2 * model().forward_s(4, (other,)))


def test_an_unmeasured_pack_follows_its_own_members() -> None:
    costs = model()
    coarse, fine = (costs.timing(video(), 1, 4).steps[index] for index in (0, 5))
    for step, factor in ((coarse, 2.0), (fine, 1.0)):
        costs.observe(StepSample(num_ranks=4, steps=(step,), seconds=factor * model().forward_s(4, (step,))))
    assert costs.forward_s(4, (fine, fine)) == pytest.approx(model().forward_s(4, (fine, fine)))
    assert costs.forward_s(4, (coarse, coarse)) == pytest.approx(2 * model().forward_s(4, (coarse, coarse)))


def test_first_steps_after_a_load_teach_nothing() -> None:
    costs = model()
    step = costs.timing(video(), 1, 1).steps[0]
    for index in range(2):
        costs.observe(StepSample(num_ranks=1, steps=(step,), seconds=2.0, steps_since_load=index))
    assert costs.to_dict() == {}


def test_slow_steps_are_ignored_until_the_fifth_in_a_row() -> None:
    costs = model()
    step = costs.timing(video(), 1, 1).steps[0]
    usual = costs.forward_s(1, (step,))
    for _ in range(4):
        assert costs.observe(StepSample(num_ranks=1, steps=(step,), seconds=10 * usual)) == pytest.approx(0.1)
    assert costs.forward_s(1, (step,)) == pytest.approx(usual)
    assert costs.num_slow_steps == 4
    costs.observe(StepSample(num_ranks=1, steps=(step,), seconds=10 * usual))
    assert costs.forward_s(1, (step,)) == pytest.approx(10 * usual)


def test_one_slow_step_between_good_ones_starts_the_count_again() -> None:
    factor = Factor()
    for _ in range(10):
        assert not factor.add(9.0)
        assert factor.add(1.0)
    assert factor.value == pytest.approx(1.0)


def test_factors_survive_a_restart() -> None:
    costs = model()
    step = costs.timing(video(), 1, 2).steps[0]
    for _ in range(5):
        costs.observe(StepSample(num_ranks=2, steps=(step,), seconds=0.1))
    costs.observe_decode(1.0, 0.4)
    costs.observe_text(0.1)
    costs.observe_media(1.0)
    again = model()
    again.load_dict(costs.to_dict())
    assert again.to_dict() == costs.to_dict()
    assert again.forward_s(2, (step,)) == pytest.approx(0.1)
    assert (again.decode_s(), again.text_s(), again.media_s()) == pytest.approx((0.4, 0.1, 1.0))


def test_decode_counts_as_chunk_time_where_it_shares_the_device() -> None:
    alone, shared = model(), model(DevicePrior(vae_on_device=True))
    difference = shared.timing(video(), 1, 1).occupied_s - alone.timing(video(), 1, 1).occupied_s
    assert difference == pytest.approx(alone.decode_s())
    assert alone.decode_s(0.5) == pytest.approx(0.1)


def test_lead_holds_two_sigma_and_the_tail() -> None:
    costs = model()
    timing = costs.timing(video(), 1, 4)
    tail = costs.decode_s() + costs.prior.commit_s
    sigma = math.sqrt(sum((0.05 * costs.forward_s(4, (step,))) ** 2 for step in timing.steps))
    assert timing.lead_s[0] == pytest.approx(timing.remaining_s[0] + 2 * sigma + tail)
    assert timing.lead_s[6] == pytest.approx(tail)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 5.0])), min_size=1, max_size=6))
def test_a_pack_is_never_faster_than_its_longest_member_nor_slower_than_all_in_turn(
    members: list[tuple[int, float]],
) -> None:
    costs = model()
    slots = [(costs.timing(video(guidance_scale=scale), 1, 4), step) for step, scale in members]
    finish = costs.pack_finish_s(slots)
    alone = [timing.remaining_s[step] for timing, step in slots]
    assert all(f >= a - 1e-9 for f, a in zip(finish, alone, strict=True))
    assert max(finish) <= sum(alone) + 1e-9


def test_zeroed_steps_cost_nothing_and_teach_nothing() -> None:
    """Mid's first steps take zero flow: no forward is made for them."""
    cost, plain = model(), video(guidance_scale=5.0, steps=(3, 2, 2), amplify_first_chunk=False)
    zeroing = video(guidance_scale=5.0, steps=(3, 2, 2), amplify_first_chunk=False, use_zero_init=True)
    full, short = (cost.timing(params, 0, 1) for params in (plain, zeroing))
    assert [step.num_sequences for step in short.steps] == [0, 0, 2, 2, 2, 2, 2]
    assert short.steps[2:] == full.steps[2:]
    assert short.remaining_s[0] == short.remaining_s[2] == full.remaining_s[2] < full.remaining_s[0]
    cursors = [StepCursor(chunk=0, stage=0, step=step) for step in range(3)]
    assert [cost.step_s(1, [(zeroing, cursor)]) for cursor in cursors] == [0, 0, cost.step_s(1, [(plain, cursors[2])])]
    mixed = [(zeroing, cursors[0]), (plain, cursors[0])]
    assert cost.step_s(1, mixed) == cost.step_s(1, mixed[1:])
    before = cost.to_dict()
    idle = StepSample(num_ranks=1, steps=short.steps[:2], seconds=1e-6, steps_since_load=100)
    assert cost.observe(idle) == 1.0
    assert cost.to_dict() == before
    cost.observe(StepSample(num_ranks=1, steps=(short.steps[0], full.steps[0]), seconds=0.5, steps_since_load=100))
    other = model()
    other.observe(StepSample(num_ranks=1, steps=(full.steps[0],), seconds=0.5, steps_since_load=100))
    assert cost.to_dict() == other.to_dict()


def test_zeroing_ends_with_its_stage_and_needs_guidance() -> None:
    cost = model()
    few = cost.timing(video(guidance_scale=5.0, use_zero_init=True, zero_steps=9, steps=(1, 2, 2)), 1, 1)
    assert [step.num_sequences for step in few.steps] == [0, 2, 2, 2, 2]
    unguided = cost.timing(video(use_zero_init=True), 1, 1)
    assert all(step.num_sequences == 1 for step in unguided.steps)
