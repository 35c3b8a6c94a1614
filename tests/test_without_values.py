"""What a GPU would wait for, or has none of: values looked at, numbers copied there, float64.

Meta tensors have no values, and refuse to be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hbnn_plugin
from hbnn_plugin.cluster import epc, swapping
from hbnn_plugin.geometry import exponential, joint_maps, joint_passes, looking, passes
from hbnn_plugin.optimizer import recovery
from tiny_hosts import IrConv, SmoothConv, TinyNet, batch, train
from training_helpers import OPTIMIZERS, applied, each_mode


def on_meta(**options: Any) -> TinyNet:
    """A network on the meta device, which has trained for so long that nobody watches its first steps any more."""
    net = applied(SmoothConv, **options)
    train(net, OPTIMIZERS["sgd"](net.parameters()), 21)
    net.zero_grad()
    return net.to("meta")


def meta_step(net: TinyNet, optimizer: str = "sgd") -> None:
    net(batch()[0].to("meta")).sum().backward()
    OPTIMIZERS[optimizer](net.parameters()).step()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("per", ["filter", "layer"])
@pytest.mark.parametrize("rule", ["spectral", "mobius", "fixed"])
def test_a_step_looks_at_nothing(rule: str, per: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = on_meta(rule=rule, per=per)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, copies_no_number(getattr(torch, name)))
    meta_step(net, optimizer)


def copies_no_number(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensors of the CPU's numbers, on another device, are copied there, and waited for."""

    def made(data: Any, **options: Any) -> Tensor:
        assert isinstance(data, Tensor) or str(options.get("device", "cpu")) == "cpu", data
        return make(data, **options)

    return made


@pytest.mark.parametrize("rule", ["spectral", "mobius", "fixed"])
def test_an_inplace_step_looks_for_all_layers_together(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = on_meta(rule=rule, mode="inplace")
    looks: list[int] = []

    def chosen(items: Sequence[Any], flags: Iterable[Tensor]) -> list[Any]:
        looks.append(len(list(flags)))
        return list(items) if len(looks) % 4 == 2 else []  # say that all weights were edited, and nothing else

    monkeypatch.setattr(swapping, "_chosen", chosen)
    meta_step(net)
    meta_step(net)
    # left alone since the last step (there was none on this device)? edited? out of the ball? gradient cleared?
    assert looks == [0, 2, 2, 2, 2, 2, 2, 2]


@each_mode
def test_nobody_looks_while_a_cuda_graph_is_recorded(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    net = applied(SmoothConv, mode=mode).to("meta")
    net(batch()[0].to("meta")).sum().backward()
    if mode == "inplace":
        with pytest.raises(RuntimeError, match="mode='parametrize'"):
            OPTIMIZERS["sgd"](net.parameters()).step()


class NoFloat64(TorchDispatchMode):
    """As Apple's GPUs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"{func} makes float64")
        return out


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@each_mode
@pytest.mark.parametrize("rule", ["spectral", "mobius"])
def test_where_there_is_no_float64(rule: str, mode: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (passes, exponential, joint_maps, joint_passes, looking, epc):
        monkeypatch.setattr(module, "scalar_dtype", lambda device: torch.float32)
    for module in (joint_maps, recovery):
        monkeypatch.setattr(module, "may_look", lambda x: False)
    data = [batch(i) for i in range(3)]
    with NoFloat64():
        net = applied(IrConv, mode=mode, rule=rule, relative=True)
        stepping = OPTIMIZERS[optimizer](net.parameters(), foreach=False)
        for images, labels in data:
            stepping.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            stepping.step()
        hbnn_plugin.flip_ratio(net)
        hbnn_plugin.cluster_report(net)
        plain = hbnn_plugin.plain_state_dict(net.state_dict())
        hbnn_plugin.fuse(net)
    assert all(torch.allclose(plain[name], value, atol=1e-6) for name, value in net.state_dict().items())
    assert all(value.isfinite().all() for value in net.parameters())
