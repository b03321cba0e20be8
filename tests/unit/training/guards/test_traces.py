"""Which layer's output, which weight and which gradient is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron_haplovl.training.guards.gradients import traced_gradients
from megatron_haplovl.training.guards.layers import first_weight_not_finite, traced_outputs


class Heads(nn.Module):
    """Returns what heads return: numbers by name, some of which are no losses."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"loss": x.sum(), "count": torch.ones((), dtype=torch.int64), "name": "x"}


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Heads())


@pytest.mark.parametrize("spoiled", ["0", "1.0", "1.1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_layer_is_found_and_not_the_one_around_it(spoiled: str, value: float) -> None:
    net = model()
    dict(net.named_modules())[spoiled].register_forward_hook(lambda _m, _i, output: output + value)
    with traced_outputs(net) as trace, torch.no_grad():
        net(torch.ones(2, 4))
    first = trace.first()
    assert first is not None and first[1] == spoiled
    hooks = sum(len(module._forward_hooks) for module in net.modules())
    assert hooks == 1, "none is left behind"


def test_a_head_that_returns_several_numbers() -> None:
    net = model()
    net[2].register_forward_hook(lambda _m, _i, output: {**output, "loss": output["loss"] * float("nan")})
    with traced_outputs(net) as trace:
        net(torch.ones(2, 4))
    assert trace.first() == (len(trace.flags) - 1, "2")
    with traced_outputs(model()) as trace:
        model()(torch.ones(2, 4))
    assert trace.first() is None


def test_a_weight_is_named() -> None:
    net = model()
    assert first_weight_not_finite(net) is None
    with torch.no_grad():
        net[1][1].bias[3] = float("inf")
    assert first_weight_not_finite(net) == "1.1.bias"


def test_a_gradient_is_named_with_its_micro_batch_and_before_it_reaches_the_parameter() -> None:
    net = model()
    net[0].bias.requires_grad_(False)
    calls: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return gradient * float("nan") if len(calls) == 2 else None

    net[1][0].weight.register_hook(spoil)
    arrived: list[bool] = []
    net[1][0].weight.register_post_accumulate_grad_hook(lambda parameter: arrived.append(True))
    with traced_gradients(net) as trace:
        for _ in range(3):
            net(torch.ones(2, 4))["loss"].backward()
    assert trace.first() == (1, "1.0.weight")
    assert "0.bias" not in trace.flags
    assert {len(flags) for flags in trace.flags.values()} == {3} and len(arrived) == 3


def test_of_several_gradients_the_one_that_backward_meets_first() -> None:
    net = model()
    net[1][0].register_full_backward_hook(lambda _m, inputs, _o: tuple(g * float("nan") for g in inputs))
    with traced_gradients(net) as trace:
        net(torch.ones(2, 4))["loss"].backward()
    # What lies before the spoiled layer is spoiled, too.
    assert trace.first() == (0, "0.bias")
