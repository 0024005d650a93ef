"""The benchmark's model, gates and sections at a tiny size: what is wrong turns a gate red, and numbers mean what they
say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import chunks, device_trace, diffusers_models, gates, model, random_model, rivals, yardsticks
from benchmarks.device_trace import DeviceTrace, Kernel
from benchmarks.plan import TINY, Bench, Check, Measurement
from benchmarks.timing import HostClock
from helios_serve import kernels
from helios_serve.kernels import cases
from helios_serve.model_executor import layers, vae_fused
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.quantize import Fp8Linear
from helios_serve.model_executor.transformer import Shortcuts
from helios_serve.model_executor.vae import PARITY


@pytest.fixture
def bench() -> Iterator[Bench]:
    with torch.no_grad():
        yield Bench(device=torch.device("cpu"), clock=HostClock(), sizes=TINY, deadline=time.monotonic() + 600)


def _red(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.is_green]


@pytest.mark.parametrize("gate", gates.GATES, ids=lambda gate: gate.name)
def test_gates_are_green(bench: Bench, gate: Any) -> None:
    checks = gate.run(bench)
    assert checks
    assert _red(checks) == []


def _scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """What a kernel with a wrong constant would give."""

    def wrong(*arguments: Any) -> Any:
        result = function(*arguments)
        return result * factor if isinstance(result, Tensor) else (result[0] * factor, *result[1:])

    return wrong


def test_wrong_kernel_is_red(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [
        replace(case, operator=_scaled(case.operator, 1.01)) if case.name in ("rms_norm", "norm_rope") else case
        for case in cases.CASES
    ]
    monkeypatch.setattr(cases, "CASES", tuple(broken))
    assert {name.split("/")[1] for name in _red(gates.check_kernels(bench))} == {"rms_norm", "norm_rope"}


def test_kernel_that_writes_too_little_is_red(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(x: Tensor, gamma: Tensor, bias: Any, left: Any, has_silu: bool, out: Tensor) -> None:
        right(x, gamma, bias, left, has_silu, out)
        out[:, -1] = torch.nan

    right = next(case.operator for case in cases.CASES if case.name == "norm_rows")
    broken = [replace(case, operator=lazy) if case.name == "norm_rows" else case for case in cases.CASES]
    monkeypatch.setattr(cases, "CASES", tuple(broken))
    assert {name.split("/")[1] for name in _red(gates.check_kernels(bench))} == {"norm_rows"}


def test_one_wrong_byte_is_red(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(frames: Tensor) -> Tensor:
        bytes_: Tensor = kernels.rgb_to_yuv420(frames).clone()
        bytes_[0, 0, 0] ^= 16
        return bytes_

    case = next(case for case in cases.CASES if case.name == "rgb_to_yuv420")
    monkeypatch.setattr(cases, "CASES", (replace(case, operator=wrong),))
    red = _red(gates.check_kernels(bench))
    assert any("rgb_to_yuv420" in name for name in red)
    assert not any("cross_attend" in name for name in red)


def test_wrong_attention_is_red(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "attend", _scaled(kernels.attend, 1.02))
    assert _red(gates.check_attention(bench))


@pytest.mark.parametrize("part", ["layer_norm_modulate", "gated_residual_norm", "attend"])
def test_wrong_operator_in_a_block_is_red(bench: Bench, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """The exact result is computed with plain operators, so that the error does not hide in both."""
    monkeypatch.setattr(kernels, part, _scaled(vars(kernels)[part], 1.05))
    assert _red(gates.check_blocks(bench)) == ["blocks"]
    assert "forward/stage0" in _red(gates.check_forward(bench))


def test_wrong_cross_attention_is_red(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = _scaled(vars(layers)["cross_attend"], 1.3)
    monkeypatch.setattr(layers, "cross_attend", wrong)
    assert _red(gates.check_blocks(bench)) == ["blocks"]


def test_wrong_decode_is_red(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_fused, "convolve", _scaled(vars(vae_fused)["convolve"], 1.02))
    assert _red(gates.check_decode(bench)) == ["decode/bf16"]


def test_no_number_is_as_red_as_a_wrong_one() -> None:
    assert not Check(name="x", error=math.nan, bound=1.0).is_green
    assert math.isnan(yardsticks.flatness(torch.zeros(9)))
    assert math.isnan(yardsticks.flatness(torch.tensor([1.0, math.inf])))
    assert math.isnan(yardsticks.distance(torch.tensor([math.nan, 1.0]), torch.ones(2)))


def test_weights_are_those_of_the_14b_model() -> None:
    made = random_model.empty_transformer(TransformerConfig(), torch.bfloat16, Shortcuts())
    count = sum(parameter.numel() for parameter in made.parameters())
    assert 14.2e9 < count < 14.4e9
    wide = [name for name, parameter in made.named_parameters() if parameter.dtype == torch.float32]
    assert wide
    assert all(made.keeps_float32(name) for name in wide)


def test_equal_seeds_give_equal_weights() -> None:
    first, second = (
        random_model.random_transformer(TINY.transformer, torch.float32, torch.device("cpu")) for _ in range(2)
    )
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.std() > 0 or one.numel() == 1, name


def test_played_chunks_are_the_runners(bench: Bench) -> None:
    """Two chunks of two streams in packs: the same latents as each stream alone, and growing histories."""
    player = chunks.Player(bench)
    streams = [chunks.Stream(bench, name, (1, 1, 1)) for name in ("a", "b")]
    played = player.play(streams, 2, float("inf"))
    alone = chunks.Stream(bench, "b", (1, 1, 1))
    player.play([alone], 2, float("inf"))
    together, single = (stream.next() for stream in (streams[1], alone))
    assert together.chunk == single.chunk == 2
    torch.testing.assert_close(together.history.frames, single.history.frames, rtol=1e-4, atol=1e-4)
    assert together.generator_state == single.generator_state
    assert played.fps == pytest.approx(4 * 33 / (played.ended_s[-1] - played.started_s[0]))
    assert played.latencies_ms.count == 2


def test_play_stops_at_its_deadline(bench: Bench) -> None:
    played = chunks.Player(bench).play([chunks.Stream(bench, "a", (1, 1, 1))], 99, time.perf_counter())
    assert len(played.started_s) == 1


def _values(measurements: list[Measurement]) -> dict[str, float]:
    return {one.name: one.value for one in measurements}


def test_forwards_are_measured_at_each_stage(bench: Bench) -> None:
    values = _values(model.measure_forwards(bench))
    assert [*values] == [f"dit/forward_ms/stage{stage}" for stage in range(3)]
    assert all(value > 0 for value in values.values())


def test_quantised_weights_come_and_go(bench: Bench) -> None:
    transformer = random_model.transformer_of(bench)
    before = [*transformer.state_dict().items()]
    with model.quantised(transformer, 1):
        assert sum(isinstance(layer, Fp8Linear) for layer in transformer.modules()) == 6
        assert transformer.config.fp8_edge_blocks == 1
    assert transformer.config == TINY.transformer
    after = transformer.state_dict()
    assert [name for name, _ in before] == [*after]
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before)


def test_rival_computes_the_same_with_our_memory(bench: Bench) -> None:
    pytest.importorskip("diffusers")
    ours, theirs = random_model.transformer_of(bench), rivals._theirs(bench)
    assert rivals._disagreement(bench, theirs) < 1e-5
    fused = ours.get_parameter("blocks.0.attn1.to_qkv.weight")
    key = theirs.get_parameter("blocks.0.attn1.to_k.weight")
    assert key.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    latents = rivals._latents(bench)[0]
    with torch.inference_mode():
        their_pixels = diffusers_models.vae_of(bench, "fp32").decode(latents)[0]
        our_pixels = random_model.vae_of(bench, PARITY).decode(latents)
    torch.testing.assert_close(their_pixels, our_pixels, rtol=1e-4, atol=1e-4)


def test_rival_that_differs_gets_no_number(bench: Bench) -> None:
    pytest.importorskip("diffusers")
    theirs = rivals._theirs(bench)
    with torch.no_grad():
        theirs.proj_out.weight = torch.nn.Parameter(theirs.proj_out.weight * 1.5, requires_grad=False)
    with pytest.raises(ArithmeticError, match="differ"):
        rivals.measure_eager(bench)


def test_trace_adds_up_what_overlaps_once() -> None:
    seen = DeviceTrace(
        kernels=(
            Kernel(name="nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", start_us=0, end_us=100),
            Kernel(name="Memcpy DtoH (Device -> Pinned)", start_us=50, end_us=80),
            Kernel(name="_gated_residual_norm_kernel", start_us=150, end_us=200),
        )
    )
    assert seen.busy_ms == pytest.approx(0.15)
    assert seen.span_ms == pytest.approx(0.2)
    assert seen.ms_by_kind() == {"gemm": 0.1, "fused": 0.05, "copy": 0.03}
    assert seen.launches_by_kind() == {"gemm": 1, "copy": 1, "fused": 1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "conv"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "elementwise"),
        ("_layer_norm_modulate_kernel", "fused"),
        ("_rgb_to_yuv420_kernel", "fused"),
    ],
)
def test_kernels_are_told_apart(name: str, kind: str) -> None:
    assert Kernel(name=name, start_us=0, end_us=1).kind == kind


def test_devices_without_a_profiler_run_all_the_same() -> None:
    ran: list[int] = []
    assert device_trace.trace(torch.device("cpu"), lambda: ran.append(1)).busy_ms == 0
    assert device_trace.waits_by_place(torch.device("cpu"), lambda: ran.append(1)) == {}
    assert len(ran) == 2
