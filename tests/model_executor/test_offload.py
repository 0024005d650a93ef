"""Layers in host memory give the results that they give at home."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helios_serve.model_executor.offload import NUM_BUFFERS, LayerOffload, offload_sequence

CPU = torch.device("cpu")


def _layers(num_layers: int = 5) -> list[nn.Linear]:
    """Of two widths, so that the buffers are larger than some layers, and of mixed dtypes."""
    layers = [nn.Linear(7, 7, bias=index % 2 == 0) for index in range(num_layers)]
    layers[1].weight.data = layers[1].weight.data.double()
    return [layer.requires_grad_(False) for layer in layers]


def _run(layers: list[nn.Linear], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x.to(layer.weight.dtype)).float()
    return x


@torch.inference_mode()
def test_each_layer_is_in_a_buffer_while_it_runs() -> None:
    layers, x = _layers(), torch.randn(3, 7)
    expected = _run(layers, x)
    offload = LayerOffload(layers, CPU)
    assert offload.device_bytes < offload.host_bytes
    homes = [layer.weight.data_ptr() for layer in layers]
    for _ in range(2):
        seen, y = [], x
        for layer in offload.each():
            seen.append(layer.weight.data_ptr())
            y = layer(y.to(layer.weight.dtype)).float()
        assert torch.equal(y, expected)
        assert len({*seen}) == NUM_BUFFERS
        assert not {*seen} & {*homes}
        assert [layer.weight.data_ptr() for layer in layers] == homes


@torch.inference_mode()
def test_a_pass_that_is_given_up_leaves_all_layers_at_home() -> None:
    layers, x = _layers(), torch.randn(3, 7)
    expected = _run(layers, x)
    offload = LayerOffload(layers, CPU)
    homes = [layer.weight.data_ptr() for layer in layers]
    one_pass = offload.each()
    next(one_pass)
    next(one_pass)
    one_pass.close()
    assert [layer.weight.data_ptr() for layer in layers] == homes
    assert torch.equal(_run(layers, x), expected)


@torch.inference_mode()
def test_a_stack_that_calls_its_layers_itself() -> None:
    layers, x = _layers(), torch.randn(3, 7)
    stack = _Stack(layers)
    expected = stack(x)
    homes = {layer.weight.data_ptr() for layer in layers}
    offload_sequence(layers, CPU)
    during: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda one, *_: during.append(one.weight.data_ptr()))
    assert torch.equal(stack(x), expected)
    assert len({*during[:-1]}) == NUM_BUFFERS
    assert not {*during[:-1]} & homes
    with pytest.raises(RuntimeError, match="mat1"):
        stack(torch.randn(3, 6))
    assert torch.equal(stack(x), expected)


class _Stack(nn.Module):
    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).float()  # type: ignore[arg-type]
        return x
