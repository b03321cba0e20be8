"""Every implementation of AdamW against the update written out."""

import dataclasses

import pytest
import torch

from megatron_haplovl.config.schema import OptimizerConfig
from megatron_haplovl.engine.optimizer import adamw_implementation, build_optimizer

CONFIG = OptimizerConfig(lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8)
CPU = torch.device("cpu")


def written_out(weight, grads, decay):
    """AdamW as published (Loshchilov and Hutter, 2019, Algorithm 2), in fp64."""
    weight, m, v = weight.double(), 0.0, 0.0
    for step, grad in enumerate(grads, start=1):
        grad = grad.double()
        m = CONFIG.adam_beta1 * m + (1 - CONFIG.adam_beta1) * grad
        v = CONFIG.adam_beta2 * v + (1 - CONFIG.adam_beta2) * grad**2
        m_hat, v_hat = m / (1 - CONFIG.adam_beta1**step), v / (1 - CONFIG.adam_beta2**step)
        weight = weight - CONFIG.lr * (m_hat / (v_hat.sqrt() + CONFIG.adam_eps) + decay * weight)
    return weight


@pytest.mark.parametrize("implementation", ["auto", "torch", pytest.param("deepspeed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_update(implementation, decay):
    generator = torch.Generator().manual_seed(0)
    weight, *grads = (torch.randn(40, 3, generator=generator) for _ in range(4))
    parameter = torch.nn.Parameter(weight.clone())
    config = dataclasses.replace(CONFIG, adamw_implementation=implementation)
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": decay}], config, CPU)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    # Measured worst case 1.9e-7.
    torch.testing.assert_close(parameter.detach().double(), written_out(weight, grads, decay), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "device", "offloaded", "expected"),
    [
        ("auto", "cuda", False, "torch"),
        ("auto", "cuda", True, "cpu_adam"),
        ("auto", "cpu", True, "cpu_adam"),
        ("torch", "cuda", True, "torch"),
        ("deepspeed", "cuda", False, "fused_adam"),
        ("deepspeed", "cuda", True, "cpu_adam"),
        ("deepspeed", "cpu", False, "cpu_adam"),
        ("apex", "cuda", False, "apex"),
    ],
)
def test_an_offloaded_optimizer_steps_on_the_host(asked, device, offloaded, expected):
    config = dataclasses.replace(CONFIG, adamw_implementation=asked)
    assert adamw_implementation(config, torch.device(device), offloaded=offloaded) == expected


def test_apex_is_refused_where_it_cannot_run():
    config = dataclasses.replace(CONFIG, adamw_implementation="apex")
    with pytest.raises(ValueError, match="--adamw-implementation apex"):
        build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))], "weight_decay": 0.0}], config, CPU)
