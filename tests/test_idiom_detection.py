"""What apply sees of a host's idioms, before anything is changed, and what it takes for none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

import hbnn_plugin
from hosts import HOSTS as EXAMPLE_HOSTS
from idiom_hosts import Captured, CapturedLater
from idiom_spellings import EDITS, READS, OldStyleConv, touching
from idiom_trainers import CountingConv
from tiny_hosts import (
    HardBinaryConv,
    IrConv,
    RecuConv,
    ScaledConv,
    SimanConv,
    SimanZeroOneConv,
    SmoothConv,
    TinyNet,
    tiny_net,
    train,
)


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__.strip("_"))
def test_an_edit_is_seen_however_it_is_spelt(edit: object) -> None:
    plan = hbnn_plugin.plan(tiny_net(touching(edit)))
    assert plan.mode == "inplace"
    assert plan.reason == "conv1 edits its weight in its forward"
    assert "mode='inplace', because conv1 edits its weight in its forward" in repr(plan)


class Holder:
    """Anything of the user's own that has the weight."""

    def __init__(self, what: object) -> None:
        self.what = what


@pytest.mark.parametrize(
    "held",
    [
        lambda w: w,
        lambda w: [w],
        lambda w: (w,),
        lambda w: {"conv1": w},
        lambda w: {w: "conv1"},
        lambda w: [(w, "conv1")],
        lambda w: [[w], []],
        lambda w: {"group": [w]},
    ],
    ids=["itself", "list", "tuple", "dict", "key", "list of tuples", "list of lists", "dict of lists"],
)
@pytest.mark.parametrize("with_dict", [False, True], ids=["", "dict made"])  # CPython makes __dict__ when asked for it
def test_whoever_holds_the_weight_is_seen(held: Callable[[object], object], with_dict: bool) -> None:
    net = tiny_net(ScaledConv)
    holder = Holder(held(net.conv1.weight))
    if with_dict:
        assert list(vars(holder)) == ["what"]
    assert hbnn_plugin.plan(net).reason == "conv1 has its weight held by a Holder too"
    holder.what = None
    assert hbnn_plugin.plan(net).reason is None


def test_the_globals_of_a_notebook_are_no_holder() -> None:
    net = tiny_net(ScaledConv)
    shell = Holder({"__builtins__": {}, "parameters": list(net.parameters()), "w": net.conv1.weight})
    assert hbnn_plugin.plan(net).reason is None
    assert shell


class LearnedScale(nn.Parameter):
    """With a method that a forward calls."""

    def start(self) -> None: ...


class ScaleStartsConv(ScaledConv):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = LearnedScale(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.start()
        return super().forward(x) * self.scale


class ScaleStartsAndClipsConv(ScaleStartsConv):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-1, 1)
        return super().forward(x)


class ClipsWithMaskConv(ScaledConv):
    """Is not run on images alone."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask
        self.weight.data = self.weight.data.clamp(-1, 1)
        return super().forward(x)


class RegisteredConv(ScaledConv):
    def __init_subclass__(cls, *, key: str, **options: Any) -> None:
        super().__init_subclass__(**options)


class OwnLoading(TinyNet):
    """As super-resolution codebases load, key by key."""

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:  # type: ignore[override]
        for name, value in state_dict.items():
            self.state_dict()[name].copy_(value)


class CalibratingConv(ScaledConv):
    """Looks at what the real weight makes of its input first."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self._conv_forward(x, self.weight, None).abs().mean().detach()
        return super().forward(x) * scale


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (ScaleStartsConv, None),
        (ScaleStartsAndClipsConv, "conv1 edits its weight in its forward"),
        (
            ClipsWithMaskConv,
            "conv1 could not be run to see whether it edits its weight, and mentions .data in its methods",
        ),
        (RegisteredConv, "conv1 is of a class with an __init_subclass__, and a parametrization makes a subclass"),
        (CalibratingConv, None),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_layers_that_are_hard_to_run(conv: type[nn.Module], reason: str | None) -> None:
    net = tiny_net(conv)
    assert hbnn_plugin.plan(net).reason == reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if conv is ClipsWithMaskConv else "error")
        hbnn_plugin.apply(net)


def test_a_load_state_dict_of_the_hosts_own_takes_in_place_mode() -> None:
    torch.manual_seed(0)
    net, plain = OwnLoading(IrConv), OwnLoading(IrConv)
    assert hbnn_plugin.plan(net).reason == "OwnLoading has a load_state_dict of its own"
    hbnn_plugin.apply(net).load_state_dict(plain.state_dict())
    assert torch.equal(net.conv1.weight, plain.conv1.weight)
    assert hbnn_plugin.plan(nn.Sequential(tiny_net(IrConv), nn.Identity())).reason is None


@pytest.mark.parametrize("read", READS, ids=lambda f: f.__name__.strip("_"))
def test_reading_the_weight_is_no_edit(read: object) -> None:
    assert hbnn_plugin.plan(tiny_net(touching(read))).reason is None


def test_a_model_that_is_about_to_be_binarized_has_no_reason() -> None:
    made = hbnn_plugin.plan(tiny_net(nn.Conv2d), binarize="1/1")
    assert (made.mode, made.reason) == ("parametrize", None)


def test_initializing_the_weight_is_no_edit() -> None:
    assert hbnn_plugin.plan(tiny_net(OldStyleConv)).reason is None


TINY = (IrConv, RecuConv, SimanConv, SimanZeroOneConv, ScaledConv, SmoothConv, HardBinaryConv)
CLEAN = {cls.__name__: cls for cls in TINY} | {name: host.conv for name, host in EXAMPLE_HOSTS.items()}


@pytest.mark.parametrize("name", CLEAN)
def test_hosts_that_touch_nothing_have_no_reason(name: str) -> None:
    """Not fresh, and not amid a training with all there that holds parameters."""
    net = tiny_net(CLEAN[name])
    assert hbnn_plugin.plan(net).reason is None
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:]}])
    schedule = LambdaLR(optimizer, lambda epoch: 1.0)
    average = AveragedModel(net)
    train(net, optimizer, 1)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    schedule.step()
    average.update_parameters(net)
    made = hbnn_plugin.plan(net)
    assert (len(made), made.mode, made.reason) == (2, "parametrize", None)
    assert hbnn_plugin.plan(average.module).reason is None


def test_looking_at_a_layer_leaves_no_trace_on_it() -> None:
    net = tiny_net(CountingConv)
    before = net.conv1.code
    hbnn_plugin.apply(net)
    for conv in (net.conv1, net.conv2):
        assert not conv.code.any() and not conv.calls and not conv.largest
        assert (conv.seen, conv.step, hasattr(conv, "latest")) == ([], 0, False)
    assert net.conv1.code is before


def test_no_warning_where_an_object_holds_the_weight_and_a_true_one_where_none_does() -> None:
    host = Captured()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hbnn_plugin.apply(host.net, where=host.where)
    host = CapturedLater()
    with pytest.warns(UserWarning, match="two-valued weight. If your trainer makes it binary .* in-place mode honours"):
        hbnn_plugin.apply(host.net, where=host.where)
