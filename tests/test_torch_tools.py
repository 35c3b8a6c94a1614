"""torch's own tools on an applied model, in both modes: functional_call, vmap, export, half precision, copies."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import hbnn_plugin
from hbnn_plugin.export import save_packed
from tiny_hosts import (
    BINARY_LAYERS,
    IrConv,
    ScaledConv,
    SmoothConv,
    TinyNet,
    batch,
    clusters,
    latents,
    points,
    same_state,
    state,
    tiny_net,
    train,
)
from torch_version import TORCH
from training_helpers import applied, each_mode, output, saved, steps


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: net.get_submodule(name).weight.detach().clone() for name in BINARY_LAYERS}


@each_mode
@pytest.mark.parametrize("training", [False, True])
def test_traces(training: bool, mode: str) -> None:
    """torch.jit.trace, which TensorBoard's add_graph uses; it traces twice and compares."""
    net = applied(mode=mode).train(training)
    x, _ = batch(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), net(x))


@each_mode
def test_apply_keeps_a_model_in_evaluation_mode(mode: str) -> None:
    net = hbnn_plugin.apply(tiny_net(IrConv).eval(), mode=mode)
    assert not any(epc.training for epc in clusters(net).values())


@each_mode
def test_the_default_device_does_not_matter(mode: str, tmp_path: Path) -> None:
    """The meta device stands for any that is not the CPU."""

    def prepared(device: str) -> tuple[TinyNet, dict[str, float]]:
        net, plain = tiny_net(IrConv), tiny_net(IrConv, seed=1).state_dict()
        with torch.device(device):
            hbnn_plugin.apply(net, mode=mode)
            net.load_state_dict(plain)
            hbnn_plugin.complexity(net, (3, 6, 6))
            hbnn_plugin.cluster_report(net)
            save_packed(net, tmp_path / f"{device}.safetensors")
        train(net, SGD(net.parameters(), lr=0.1), 2)
        with torch.device(device):
            flips = hbnn_plugin.flip_ratio(net)
            return hbnn_plugin.fuse(net), flips

    (net, flips), (reference, expected) = prepared("meta"), prepared("cpu")
    assert same_state(state(net), state(reference))
    assert flips == expected
    assert (tmp_path / "meta.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()


# -- torch.func --------------------------------------------------------------------------------------------------------


@each_mode
def test_functional_call_and_vmap_over_an_ensemble_of_parameters(mode: str) -> None:
    """Latents under a parametrization, the weights themselves in place."""
    net = applied(SmoothConv, mode=mode)
    train(net, SGD(net.parameters(), lr=0.5), 2)
    net.eval()
    x, _ = batch()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())
    assert torch.equal(torch.func.functional_call(net, {**parameters, **buffers}, (x,)), net(x))
    shifted = {name: torch.stack([p, 1.1 * p, p + 0.01]) for name, p in parameters.items()}

    def forward(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, {**parameters, **buffers}, (x,))

    ensemble = torch.func.vmap(forward)(shifted)
    for i in range(3):
        assert torch.allclose(ensemble[i], forward({n: p[i] for n, p in shifted.items()}), atol=1e-5)
    for name, epc in clusters(net).items():  # what the second of them convolved with
        original = f"{name}.parametrizations.weight.original" if mode == "parametrize" else f"{name}.weight"
        second = shifted[original][1]
        expected = epc.weight_of(second) if mode == "parametrize" else second
        with torch.no_grad():
            epc.parameter.copy_(second)
        assert torch.equal(weights(net)[name], expected)


@each_mode
def test_per_sample_gradients(mode: str) -> None:
    net = applied(SmoothConv, mode=mode).eval()
    x, y = batch(n=4)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    F.cross_entropy(net(x), y).backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(each[name].mean(0), parameter.grad, rtol=1e-3, atol=1e-6), name


# -- activation checkpointing ------------------------------------------------------------------------------------------


class Checkpointed(TinyNet):
    """Works its binary layers out again in the backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        x = self.bn1(checkpoint(self.conv1, x, use_reentrant=self.reentrant)).tanh()
        x = self.bn2(checkpoint(self.conv2, x, use_reentrant=self.reentrant)).tanh()
        return self.fc(x.mean((2, 3)))


@each_mode
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("conv", [IrConv, ScaledConv])  # the latter reads its weight twice
def test_activation_checkpointing_changes_nothing(conv: Any, reentrant: bool, mode: str) -> None:
    nets = []
    for cls in (TinyNet, Checkpointed):
        torch.manual_seed(0)
        net = cls(conv)
        net.reentrant = reentrant
        hbnn_plugin.apply(net, mode=mode)
        train(net, SGD(net.parameters(), lr=0.3, momentum=0.9), 3)
        nets.append(net)
    assert same_state(*map(state, nets))
    assert steps(nets[1]) == [3, 3]


# -- export ------------------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("finish", [hbnn_plugin.fuse, lambda net: net], ids=["fused", "applied"])
@pytest.mark.parametrize("conv", [IrConv, ScaledConv])
def test_trained_models_export(conv: Any, finish: Callable[[nn.Module], nn.Module], mode: str) -> None:
    net = applied(conv, mode=mode)
    train(net, SGD(net.parameters(), lr=0.5), 2)
    expected = output(net)
    strict = TORCH >= (2, 5) or finish is hbnn_plugin.fuse  # torch 2.4 fails on any model with a forward hook
    exported = torch.export.export(finish(net), (batch(9)[0],), strict=strict)
    assert torch.allclose(exported.module()(batch(9)[0]), expected, atol=1e-5)
    assert bool(list(exported.buffers())) and len(list(exported.parameters())) == len(list(tiny_net(conv).parameters()))


# -- dtypes and layouts ------------------------------------------------------------------------------------------------


@each_mode
def test_channels_last_changes_nothing(mode: str) -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = applied(ScaledConv, mode=mode).to(memory_format=memory_format)
        train(net, SGD(net.parameters(), lr=0.05), 2)
        found.append({**points(net), **{f"{k}.v": v for k, v in latents(net).items()}})
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, atol=1e-6)
    assert found[0]["conv1"].any()


# -- copies and files --------------------------------------------------------------------------------------------------


def test_a_whole_model_under_a_parametrization_is_refused_by_pickle_with_the_mend() -> None:
    """In-place it works: :mod:`test_inplace`."""
    net = applied()
    with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
        pickle.dumps(net)
    assert steps(net) == [0, 0]
    applied(seed=1).load_state_dict(saved(net.state_dict()))
    pickle.dumps(hbnn_plugin.fuse(net))
