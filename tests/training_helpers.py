"""Tiny hosts with clusters on them, trained, stepped, saved and compared."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import hbnn_plugin
from hbnn_plugin.cluster.epc import find
from tiny_hosts import (
    HOSTS,
    IrConv,
    SmoothConv,
    TinyNet,
    batch,
    clusters,
    loss_of,
    points,
    same_state,
    state,
    tiny_net,
    train,
)

F64 = torch.float64

OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": partial(Adam, lr=0.01, weight_decay=1e-3),
    "adamw": partial(AdamW, lr=0.01),
}

GEOMETRIES = [
    {"space": space, "per": per, "relative": relative}
    for space, per, relative in itertools.product(("ball", "sphere"), ("filter", "layer"), (False, True))
]
each_geometry = pytest.mark.parametrize("options", GEOMETRIES, ids=lambda o: "-".join(map(str, o.values())))
each_host = pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.__name__)

MODES = ("parametrize", "inplace")
each_mode = pytest.mark.parametrize("mode", MODES)
each_pair = pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(MODES, MODES)))

BATCHES = 4
"""Of one pass over what `loader` gives."""


def applied(conv: Any = IrConv, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> TinyNet:
    """A tiny network with clusters on it."""
    with warnings.catch_warnings():
        if conv is SmoothConv:  # real-valued on purpose
            warnings.filterwarnings("ignore", ".*two-valued")
        return hbnn_plugin.apply(tiny_net(conv, seed, dtype), **options)


def trained(host: Any = IrConv, seed: int = 0, **options: Any) -> TinyNet:
    net = applied(host, seed, **options)
    train(net, SGD(net.parameters(), lr=1.0, momentum=0.9), 2)
    return net.eval()


def loader(dtype: torch.dtype = F64) -> DataLoader[tuple[Tensor, ...]]:
    """The same few batches in each pass, for trainers that take a loader."""
    size = 6
    batches = [batch(seed, dtype, size) for seed in range(BATCHES)]
    x, y = (torch.cat(part) for part in zip(*batches))
    return DataLoader(TensorDataset(x, y), batch_size=size)


def saved(obj: Any) -> Any:
    """Through a file, without pickle's powers."""
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(batch(9)[0].to(next(net.parameters()).dtype))


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.command = f"open({str(folder / 'sprung')!r}, 'w').close()"

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.command,)


def refused(model: nn.Module, checkpoint: dict[str, Any], *fragments: str, strict: bool = True) -> str:
    """The message, which has every fragment; nothing has been loaded."""
    before = state(model)
    with pytest.raises(ValueError, match=r"does not fit the clusters of .*, and none of it was loaded there") as caught:
        model.load_state_dict(checkpoint, strict=strict)
    for fragment in fragments:
        caught.match(fragment)
    assert same_state(state(model), before)
    return str(caught.value)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def moved(net: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, p in points(net).items() if not torch.equal(p, before[name])]


def steps(net: nn.Module) -> list[int]:
    return [int(epc.steps) for epc in clusters(net).values()]


def points_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.split(".")[0]: value for key, value in state_dict.items() if key.endswith(".point")}


def closure_of(net: nn.Module, optimizer: Optimizer, seed: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, seed)
        loss.backward()
        return loss

    return closure


def rows(tensor: Tensor, per: str) -> Tensor:
    return tensor.reshape(1, -1) if per == "layer" else tensor.flatten(1)


def oracle(net: TinyNet, seed: int, lr: float, radius: float, per: str, order: str) -> tuple[dict[str, Tensor], ...]:
    """Points and latents after one SGD step, from autograd through geoopt's ball around the plain host."""
    plain = tiny_net(SmoothConv, 0, F64).train(net.training)
    plain.load_state_dict(hbnn_plugin.plain_state_dict(net.state_dict()))
    loss_of(plain, seed).backward()
    ball = geoopt.PoincareBall(c=torch.tensor(radius, dtype=F64))
    new_points, new_latents = {}, {}
    for name, epc in clusters(net).items():
        upstream = plain.get_submodule(name).weight.grad
        p = rows(epc.point.clone(), per).requires_grad_()
        v = rows(epc.parameter.detach().clone(), per).requires_grad_()
        g_p, g_v = torch.autograd.grad(ball.expmap(p, v, project=False), (p, v), rows(upstream, per))
        p_new = ball.mobius_add(p, ball.mobius_scalar_mul(torch.tensor(-lr, dtype=F64), g_p), project=False).detach()
        if order == "alternating":
            g_v = torch.autograd.grad(ball.expmap(p_new, v, project=False), v, rows(upstream, per))[0]
        new_points[name] = p_new.reshape(epc.point.shape)
        new_latents[name] = (v.detach() - lr * g_v).reshape(epc.point.shape)
    return new_points, new_latents


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: torch.Tensor | float = 0.01) -> None:
    """A step with this gradient in every latent."""
    for epc in (epc for module in model.modules() for epc in find(module).values()):
        epc.parameter.grad = torch.zeros_like(epc.parameter) + gradient
    optimizer.step()
