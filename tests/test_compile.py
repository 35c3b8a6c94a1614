"""torch.compile of an applied model and of its training step, in both modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import hbnn_plugin
from inplace_nets import agree, mapped
from tiny_hosts import ScaledConv, SmoothConv, batch, points, state, tiny_net, train
from training_helpers import F64, applied, each_mode, steps


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_mode
@pytest.mark.parametrize("options", [{}, {"space": "sphere", "per": "layer", "relative": True}], ids=["ball", "sphere"])
def test_a_compiled_model_trains_as_the_eager_one_in_one_graph(options: dict[str, Any], mode: str) -> None:
    results = []
    for compiled in (False, True):
        net = applied(ScaledConv, mode=mode, **options)
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
        for seed in range(2):
            optimizer.zero_grad()
            x, y = batch(seed)
            F.cross_entropy(run(x), y).backward()
            optimizer.step()
        results.append({k: v for k, v in state(net).items() if v.is_floating_point()})
        assert steps(net) == [2, 2]
    for key, value in results[0].items():
        assert torch.allclose(value, results[1][key], rtol=1e-4, atol=1e-5), key


@each_mode
def test_a_model_that_was_compiled_and_run_can_be_applied_to(mode: str) -> None:
    net, reference = tiny_net(ScaledConv).eval(), applied(ScaledConv, rule="mobius", mode=mode).eval()
    run = torch.compile(net, backend="eager")
    run(batch()[0])
    hbnn_plugin.apply(run, rule="mobius", mode=mode)
    assert not run._forward_pre_hooks  # outside of the compiled code maps would be worked out in vain
    for one in (run, reference):
        train(one, SGD(one.parameters(), lr=0.1), 2)
    assert steps(net) == [2, 2]
    for key, value in state(reference).items():
        torch.testing.assert_close(state(net)[key], value, rtol=1e-4, atol=1e-6)


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SmoothConv(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


@each_mode
@pytest.mark.filterwarnings("ignore:.*two-valued", "ignore:Profiler function", "ignore:The .grad attribute of a Tensor")
def test_a_compiled_step_trains_as_the_eager_one(mode: str) -> None:
    """Forward, backward and the optimizer's step in one compiled function; the points' part breaks its graph."""
    nets = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = hbnn_plugin.apply(Single().double(), mode=mode, radius=0.5)
        optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)

        def step(x: Tensor, y: Tensor, net: nn.Module = net, optimizer: Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(step, backend="eager") if compiled else step
        for seed in range(3):
            assert run(*batch(seed, F64)).isfinite()
        assert steps(net) == [3]
        assert all(p.any() for p in points(net).values())
        nets.append(net)
    assert agree(nets[1], nets[0])
    if mode == "inplace":
        assert mapped(nets[1])
