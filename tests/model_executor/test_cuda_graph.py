"""Forwards by graphs, on the stand-in for a device that records: the same bits as without, from memory that is spoiled
between replays; when there is a graph, and when there is none any more."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.host_graphs import HostRecorder, cross_attend_by_places, pack_with_places
from helios_serve import kernels
from helios_serve.config import UNRECORDABLE_ATTENTION, ModelConfig
from helios_serve.kernels.attention import BACKENDS, used_bounds
from helios_serve.kernels.attention.segments import _uploaded, on_device
from helios_serve.model_executor import layers
from helios_serve.model_executor.cuda_graph import ForwardGraphs, GraphLimits
from helios_serve.model_executor.graph_inputs import GraphKey, KeptMemory, StaticInputs
from helios_serve.model_executor.history_reuse import HistoryKV
from helios_serve.model_executor.packing import PackedBatch, PackedText, TokenSequence
from helios_serve.model_executor.spread import predict
from helios_serve.model_executor.step_cache import StepCache
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.parallel.collectives import Axis
from helios_serve.parallel.mesh import SOLO
from tests.model_executor.graph_stand_in import host_recorders, poison  # noqa: F401
from tests.model_executor.small_transformer import SMALL, later, sequence, small_transformer

pytestmark = pytest.mark.usefixtures("host_recorders")
SIZES = ((21, 3, 4, 6), (37, 3, 6, 10), (9, 1, 2, 4), (21, 3, 4, 6))
"""History tokens, then T, h, w of the latents."""


@pytest.fixture(scope="module", params=[False, True], ids=["full", "skip"])
def small(request: pytest.FixtureRequest) -> HeliosTransformer:
    return small_transformer(last_block_skips_history=request.param)


def made(
    transformer: HeliosTransformer, seed: int, sizes: tuple[tuple[int, int, int, int], ...], num_text: int = 5
) -> list[TokenSequence]:
    """Sequences of those sizes, of which everything else depends on the seed."""
    sequences = []
    for place, size in enumerate(sizes):
        one = sequence(transformer, 10 * seed + place, size, 900.0 - 70 * seed - place)
        embeds = torch.randn(num_text + place, SMALL.text_dim, dtype=torch.float64)
        text = replace(transformer.project_text(embeds), repeats=1 + (seed + place) % 3)
        sequences.append(replace(one, text=text))
    return sequences


def packed(sequences: list[TokenSequence]) -> tuple[PackedBatch, PackedText]:
    return pack_with_places(sequences, SMALL.patch_size)


# What it computes


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4])
def test_replays_equal_forwards_bit_for_bit(small: HeliosTransformer, num_sequences: int) -> None:
    """Other prompts of other lengths, other histories, latents and timesteps through one graph."""
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder)
    results = []
    for seed in range(5):
        sequences = made(small, seed, SIZES[:num_sequences], num_text=5 + 2 * seed)
        results.append((graphs(*packed(sequences)), small(*packed(sequences))))
        poison(graphs)
    assert all(torch.equal(ours, right) for ours, right in results)
    assert len({right.sum().item() for _, right in results}) == 5
    assert (recorder.num_tries, recorder.num_replays, len(graphs)) == (1, 4, 1)


def test_graphs_take_turns(small: HeliosTransformer) -> None:
    """A result stays what it is when another graph runs, or the same one again."""
    graphs = ForwardGraphs(small, HostRecorder())
    shapes = (SIZES[:1], SIZES[1:2], SIZES[:2])
    results = []
    for seed in range(9):
        sequences = made(small, seed, shapes[seed % 3])
        graphs.begin_step()
        results.append((graphs(*packed(sequences)), small(*packed(sequences))))
        poison(graphs)
    assert len(graphs) == 3
    assert all(torch.equal(ours, right) for ours, right in results)


def test_kept_history_is_written_and_read(small: HeliosTransformer) -> None:
    """Chunk after chunk, one of two sequences keeps its history: its first forward writes it, two more read it."""
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder)
    for seed in range(4):
        plain, keeps = made(small, seed, SIZES[:2])
        pairs = []
        for forward in (graphs, small):
            kept, results = HistoryKV(SMALL.num_layers), []
            for step in range(3):
                graphs.begin_step()
                pack = packed([later(plain, step), replace(later(keeps, 7 + step), history_kv=kept)])
                results.append(forward(*pack))
                poison(graphs)
                if not kept.is_sealed:
                    kept.seal()
            pairs.append((results, [kept.read(layer) for layer in range(SMALL.num_layers)]))
        (ours, our_kept), (right, right_kept) = pairs
        assert all(torch.equal(one, other) for one, other in zip(ours, right, strict=True))
        for one, other in zip(our_kept, right_kept, strict=True):
            assert all(map(torch.equal, one, other))
    assert (recorder.num_tries, len(graphs)) == (2, 2)


def test_memory_for_kept_history_is_shared() -> None:
    memory, like = KeptMemory(), torch.empty(0, dtype=torch.float32)
    first = memory.stand_in(0, HistoryKV(3), (3, 5, 2, 4), like)
    again = memory.stand_in(0, HistoryKV(3), (3, 5, 2, 4), like)
    assert first._stored is not None
    assert again._stored is not None
    assert first._stored[0].data_ptr() == again._stored[0].data_ptr()
    memory.stand_in(1, HistoryKV(3), (3, 5, 2, 4), like)
    memory.stand_in(0, HistoryKV(3), (3, 6, 2, 4), like)
    assert memory.num_bytes == 2 * 4 * (2 * 3 * 5 * 2 * 4 + 3 * 6 * 2 * 4)


def test_step_caches_get_copies(small: HeliosTransformer) -> None:
    """Of what the blocks added, also where only some sequences have a cache."""
    graphs = ForwardGraphs(small, HostRecorder())
    residuals: list[Tensor] = []
    for seed in range(4):
        first, second = made(small, seed, SIZES[:2])
        pairs = []
        for forward in (graphs, small):
            cache = StepCache(0.1)
            flow = forward(*packed([first, replace(second, step_cache=cache)]))
            assert cache._computed is not None
            pairs.append((flow, cache._computed))
            residuals.append(cache._computed)
        poison(graphs)
        assert all(torch.equal(ours, right) for ours, right in zip(*pairs, strict=True))
    assert len(graphs) == 1
    assert not any(residual.isnan().any() for residual in residuals)


def test_a_graph_holds_no_prompt(small: HeliosTransformer) -> None:
    graphs = ForwardGraphs(small, HostRecorder())
    for seed in range(2):
        sequences = made(small, seed, SIZES[:1])
        graphs(*packed(sequences))
        keys = weakref.ref(sequences[0].text.keys)
        storage = weakref.ref(sequences[0].text.keys.untyped_storage())
        del sequences
    gc.collect()
    assert len(graphs) == 1
    assert keys() is None
    assert storage() is None


def test_order_in_a_pack_does_not_matter(small: HeliosTransformer) -> None:
    """Equal sequences share a graph in whatever order they come, and each gets its own flow."""
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder)
    for seed, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        sequences = made(small, seed, SIZES[:3])
        graphs.begin_step()
        flows = predict(small, [sequences[place] for place in order], SOLO, graphs)
        right = predict(small, sequences, SOLO)
        for flow, place in zip(flows, order, strict=True):
            torch.testing.assert_close(flow, right[place], rtol=1e-12, atol=1e-12)
    assert (recorder.num_tries, recorder.num_replays) == (1, 2)


# Keys


class _Launches(TorchDispatchMode):
    """All that operators are given: shapes, strides and dtypes, numbers, and whole tensors of indices. Neither values
    nor, of prompts, anything: they come by the table."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((str(func), *map(_described, tree_leaves((args, kwargs or {})))))
        return func(*args, **(kwargs or {}))


def _described(value: Any) -> Any:
    if isinstance(value, str) and value == "auto":
        return "cpu"  # it takes that here
    if not isinstance(value, Tensor):
        return value
    is_index = value.dtype in (torch.int32, torch.int64)
    return (value.dtype, value.shape, value.stride(), value.tolist() if is_index else None)


def _launches(transformer: HeliosTransformer, batch: PackedBatch, text: PackedText) -> list[Any]:
    """What would be recorded."""
    inputs = StaticInputs.like(transformer, batch, text, KeptMemory())
    inputs.load(batch, text)
    with pytest.MonkeyPatch.context() as patch, _Launches() as launches:
        patch.setattr(layers, "cross_attend", lambda q, text, _: q * text.scale + len(text.keys))
        transformer(inputs.batch, inputs.text)
    seen: list[Any] = launches.seen
    return seen


_SEQUENCES = st.tuples(
    st.sampled_from([(6, 1, 2, 6), (3, 1, 4, 6), (3, 2, 2, 6), (6, 1, 6, 2)]),  # history tokens, T, h, w
    st.sampled_from(["plain", "plain", "writes", "reads", "reads more"]),
    st.booleans(),  # with a step cache
)
_PACKS = st.tuples(
    st.lists(_SEQUENCES, min_size=1, max_size=3),
    st.booleans(),  # the last block skips the history
    st.sampled_from(["auto", "math", "cpu"]),
)


@st.composite
def _pairs_of_packs(draw: st.DrawFn) -> tuple[Any, Any]:
    """Two that have hardly anything to do with each other, or differ in one thing at most."""
    (sequences, is_skipping, attention), other = draw(_PACKS), draw(_PACKS)
    first = (sequences, is_skipping, attention)
    what = draw(st.sampled_from(["all", "shortcut", "attention", "size", "kept", "kept", "cache"]))
    if what == "all":
        return first, other
    if what in ("shortcut", "attention"):
        return first, (sequences, other[1], attention) if what == "shortcut" else (sequences, is_skipping, other[2])
    place, given = draw(st.integers(0, len(sequences) - 1)), draw(_SEQUENCES)
    changed = tuple(
        new if what == name else old
        for name, old, new in zip(("size", "kept", "cache"), sequences[place], given, strict=True)
    )
    return first, ([*sequences[:place], changed, *sequences[place + 1 :]], is_skipping, attention)


def _drawn(transformer: HeliosTransformer, sequences: list[Any], seed: int) -> tuple[PackedBatch, PackedText]:
    pack = []
    for place, (size, kept, has_cache) in enumerate(sequences):
        (one,) = made(transformer, seed + place, (size,), num_text=3 + seed)
        if kept != "plain":
            history_kv = HistoryKV(SMALL.num_layers)
            one = replace(one, history_kv=history_kv)
            if kept != "writes":
                num_rows = size[0] + (kept == "reads more")
                rows = torch.randn(num_rows, SMALL.num_attention_heads, SMALL.attention_head_dim, dtype=torch.float64)
                for layer in range(SMALL.num_layers):
                    history_kv.write(layer, rows, rows)
                history_kv.bound = (0, num_rows)
                history_kv.seal()
        pack.append(replace(one, step_cache=StepCache(0.1)) if has_cache else one)
    return packed(pack)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packs=_pairs_of_packs())
def test_keys_are_equal_exactly_if_the_same_is_launched(packs: tuple[Any, Any]) -> None:
    """Whatever the prompts, the latents and the timesteps."""
    transformer = small_transformer(last_block_skips_history=False)
    found = []
    for seed, (sequences, is_skipping, attention) in enumerate((*packs, packs[0])):
        transformer.shortcuts = Shortcuts(last_block_skips_history=is_skipping)
        transformer.attention = attention
        batch, text = _drawn(transformer, sequences, 3 * seed)
        found.append((GraphKey.of(transformer, batch, text), _launches(transformer, batch, text)))
    (key, launches), (other_key, other_launches), again = found
    assert (key, launches) == again
    assert (key == other_key) == (launches == other_launches)


def test_precision_is_part_of_the_key(small: HeliosTransformer) -> None:
    batch, text = packed(made(small, 1, SIZES[:1]))
    keys = {GraphKey.of(small, batch, text)}
    for change in ({"fp8_edge_blocks": 1}, {"eps": 1e-5}, {"num_layers": 2}):
        config = small.config
        small.config = replace(config, **change)
        keys.add(GraphKey.of(small, batch, text))
        small.config = config
    keys.add(GraphKey.of(small, replace(batch, patches=batch.patches.float()), text))
    keys.add(GraphKey.of(small, batch, replace(text, scale=0.5)))
    assert len(keys) == 6


def test_name_of_a_key_says_what_runs(small: HeliosTransformer) -> None:
    key = GraphKey.of(small, *packed(made(small, 1, SIZES[:2])))
    assert str(key) == "21+18, 37+45 history+current tokens, float64, attention cpu"
    assert key.num_tokens == 121


# When there is a graph, and when not


def test_a_backend_that_plans_is_not_recorded(small: HeliosTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name, backend in BACKENDS.items() if not backend.is_recordable} == {*UNRECORDABLE_ATTENTION}
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], is_recordable=False))
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder)
    for seed in range(3):
        graphs(*packed(made(small, seed, SIZES[:1])))
    assert recorder.num_tries == 0


def test_exchanges_with_a_state_of_their_own_are_not_recorded(small: HeliosTransformer) -> None:
    class Counting(Axis):
        """As one that writes into slots of memory in turn."""

    batch, text = packed(made(small, 1, SIZES[:1]))
    mesh = replace(SOLO, ulysses=Counting())
    other = replace(batch, self_attention=replace(batch.self_attention, mesh=mesh))
    assert GraphKey.of(small, batch, text).is_recordable
    assert not GraphKey.of(small, other, text).is_recordable


def test_what_cannot_be_recorded_runs_as_usual(small: HeliosTransformer, caplog: pytest.LogCaptureFixture) -> None:
    recorder = HostRecorder(failure=RuntimeError("operation not permitted when stream is capturing"))
    graphs = ForwardGraphs(small, recorder)
    for seed in range(4):
        pack = packed(made(small, seed, SIZES[:1]))
        graphs.begin_step()
        assert torch.equal(graphs(*pack), small(*pack))
    assert recorder.num_tries == 1
    (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert line == (
        "no CUDA graph for 21+18 history+current tokens, float64, attention cpu: "
        "operation not permitted when stream is capturing"
    )


def test_a_first_forward_that_failed_does_not_count(small: HeliosTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder)
    pack = packed(made(small, 1, SIZES[:1]))
    with monkeypatch.context() as patch:
        patch.setattr(small.proj_out, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            graphs(*pack)
    graphs(*pack)
    assert recorder.num_tries == 0
    graphs(*pack)
    assert recorder.num_tries == 1


def test_one_is_recorded_in_a_step(small: HeliosTransformer) -> None:
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder)
    tries = []
    for _ in range(3):
        graphs.begin_step()
        for sizes in (SIZES[:1], SIZES[1:2], SIZES[2:3]):
            graphs(*packed(made(small, 1, sizes)))
        tries.append(recorder.num_tries)
    assert tries == [0, 1, 2]


def test_the_one_used_longest_ago_goes_first(small: HeliosTransformer) -> None:
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder, GraphLimits(num_graphs=2))
    packs = [packed(made(small, 1, sizes)) for sizes in (SIZES[:1], SIZES[1:2], SIZES[2:3])]
    for place in (0, 0, 1, 1, 0, 2, 2):
        graphs.begin_step()
        graphs(*packs[place])
    assert len(graphs) == 2
    assert [recording.is_released for recording in recorder.recordings] == [False, True, False]
    graphs.begin_step()
    graphs(*packs[1])  # it is known, and recorded at once
    assert [recording.is_released for recording in recorder.recordings] == [True, True, False, False]


def test_graphs_that_take_too_much_are_given_up(small: HeliosTransformer, caplog: pytest.LogCaptureFixture) -> None:
    recorder = HostRecorder(bytes_each=1 << 20)
    graphs = ForwardGraphs(small, recorder, GraphLimits(num_bytes=5 << 19))
    packs = [packed(made(small, 1, sizes)) for sizes in (SIZES[2:3], SIZES[:1], SIZES[1:2])]  # 11, 39 and 82 tokens
    for _ in range(4):
        for pack in packs:
            graphs.begin_step()
            assert torch.equal(graphs(*pack), small(*pack))
    assert "released 3 CUDA graphs for want of memory; forwards of more than 81 tokens have none" in caplog.text
    assert recorder.num_tries == 5
    assert len(graphs) == 2
    assert 2 << 20 < graphs.num_bytes < 5 << 19


def test_released_graphs_come_back_smaller(small: HeliosTransformer) -> None:
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder)
    packs = [packed(made(small, 1, sizes)) for sizes in (SIZES[2:3], SIZES[:1])]
    for limit in (2, 1, 0):
        for _ in range(3):
            for pack in packs:
                graphs.begin_step()
                graphs(*pack)
        assert len(graphs) == limit
        graphs.release()
        assert len(graphs) == 0
        assert all(recording.is_released for recording in recorder.recordings)


def test_keys_that_are_remembered_are_limited(small: HeliosTransformer) -> None:
    recorder = HostRecorder()
    graphs = ForwardGraphs(small, recorder, GraphLimits(num_known=1))
    for sizes in (SIZES[:1], SIZES[1:2], SIZES[:1], SIZES[1:2]):
        graphs.begin_step()
        graphs(*packed(made(small, 1, sizes)))
    assert recorder.num_tries == 0


def test_bounds_that_are_used_are_held() -> None:
    with used_bounds() as used:
        given = on_device((0, 3, 4), torch.device("cpu"))
        on_device((0, 3, 4), torch.device("cpu"))
    assert [one is given for one in used] == [True, True]
    _uploaded.cache_clear()
    assert on_device((0, 3, 4), torch.device("cpu")) is not given
    assert len(used) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cpu"}, "cuda_graphs: needs device cuda, not cpu"),
        ({"offload": "all"}, "cuda_graphs: not with offload all"),
        ({"attention": "flashinfer"}, "cuda_graphs: not with attention flashinfer"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"model": "m", "device": "cuda", "cuda_graphs": True, **settings})


def test_stand_in_reads_prompts_by_their_addresses(small: HeliosTransformer) -> None:
    """Otherwise nothing above means anything."""
    _, text = packed(made(small, 1, SIZES[:2]))
    q = torch.randn(text.cu_q[-1], SMALL.num_attention_heads, SMALL.attention_head_dim, dtype=torch.float64)
    right = kernels.cross_attend(q, replace(text, places=None), 1)
    assert torch.equal(cross_attend_by_places(q, replace(text, keys=(), values=()), 1), right)
