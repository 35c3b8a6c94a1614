"""What old binary codebases do, one row each: the mode that apply picks, and what becomes of the training in both.

Where the map is the identity, "same" means the bare host's own trajectory, to rounding in float64.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

import hbnn_plugin
from hbnn_plugin.host.bits import is_two_valued
from hosts import HOSTS as EXAMPLE_HOSTS
from idiom_hosts import (
    AddedLater,
    BuiltBefore,
    ByClassName,
    ByDimensions,
    ByEndOfName,
    ByExactType,
    ByName,
    ByTableOfTypes,
    Captured,
    CapturedLater,
    CentredInForward,
    ClampedByTrainer,
    ClippedInForward,
    Contained,
    DerivedFromConvNd,
    FlatWeights,
    Host,
    OrgKept,
    ReadThrice,
    RebuiltEachEpoch,
)
from idiom_spellings import EDITS, READS, OldStyleConv, touching
from idiom_trainers import (
    AuxiliaryCopies,
    CollectedWeights,
    CountingConv,
    GradientInForward,
    GradientInMethod,
    RealBeside,
)
from tiny_hosts import (
    BINARY_LAYERS,
    HardBinaryConv,
    IrConv,
    RecuConv,
    ScaledConv,
    SimanConv,
    SimanZeroOneConv,
    SmoothConv,
    TinyNet,
    clusters,
    latents,
    points,
    tiny_net,
    train,
)
from training_helpers import each_mode

SAME, LOST = "same", "lost"

ROWS = [  # host, the mode that is picked, what becomes of it under parametrize, and in place
    (ClippedInForward, "inplace", LOST, SAME),
    (CentredInForward, "inplace", LOST, SAME),
    (OrgKept, "inplace", AttributeError, SAME),
    (Captured, "inplace", SAME, SAME),  # the Parameter that it holds is the latent; see below
    (CapturedLater, "inplace", AttributeError, SAME),
    (AuxiliaryCopies, "inplace", SAME, SAME),  # likewise
    (RealBeside, "inplace", TypeError, SAME),
    (GradientInForward, "inplace", LOST, SAME),
    (GradientInMethod, "inplace", AttributeError, SAME),
    (ClampedByTrainer, "parametrize", LOST, SAME),
    (CollectedWeights, "parametrize", ValueError, SAME),
    (FlatWeights, "parametrize", SAME, SAME),
    (DerivedFromConvNd, "parametrize", SAME, SAME),
    (Contained, "parametrize", SAME, SAME),
    (ReadThrice, "parametrize", SAME, SAME),
    (ByExactType, "parametrize", LOST, SAME),
    (ByClassName, "parametrize", LOST, SAME),
    (ByTableOfTypes, "parametrize", KeyError, SAME),
    (ByName, "parametrize", SAME, SAME),
    (ByEndOfName, "parametrize", LOST, SAME),
    (ByDimensions, "parametrize", SAME, SAME),
    (BuiltBefore, "parametrize", SAME, SAME),
    (AddedLater, "parametrize", SAME, SAME),
    (RebuiltEachEpoch, "parametrize", SAME, SAME),
]
IN_BOTH_MODES = [(host, "parametrize", outcome) for host, _, outcome, _ in ROWS] + [
    (host, "inplace", outcome) for host, _, _, outcome in ROWS
]

IDENTITY = {"radius": 1e-12, "rule": "fixed"}

lost_edits_may_warn = pytest.mark.filterwarnings("ignore:.*has written into its weight")


def applied(host_class: type[Host], mode: str | None = None, **options: object) -> Host:
    host = host_class()
    with warnings.catch_warnings():
        if issubclass(host_class, Captured):  # its weights are binary only between binarization() and restore()
            warnings.filterwarnings("ignore", ".*two-valued")
        hbnn_plugin.apply(host.net, where=host.where, mode=mode, **options)
    return host


@contextlib.contextmanager
def reading_grad_of_a_computed_weight() -> Iterator[None]:
    """What torch says to who asks a tensor that is no leaf for its .grad, before it answers None."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not a leaf Tensor")
        yield


def follows(host: Host, losses: list[float], bare: Host, bare_losses: list[float]) -> bool:
    """Whether both trainings, of which the first is fused here, were the same."""
    ours, theirs = hbnn_plugin.fuse(host.net).state_dict(), bare.net.state_dict()
    return losses == pytest.approx(bare_losses, rel=1e-8) and all(
        torch.allclose(ours[key], theirs[key], rtol=1e-8, atol=1e-10) for key in theirs
    )


@pytest.mark.parametrize(("host_class", "picked"), [row[:2] for row in ROWS])
def test_the_mode_that_is_picked(host_class: type[Host], picked: str) -> None:
    host = host_class()
    assert hbnn_plugin.plan(host.net, where=host.where).mode == picked
    host.train(1)
    assert hbnn_plugin.plan(host.net, where=host.where).mode == picked


@lost_edits_may_warn
@pytest.mark.parametrize(("host_class", "mode", "outcome"), IN_BOTH_MODES)
def test_what_becomes_of_the_training(host_class: type[Host], mode: str, outcome: str | type[Exception]) -> None:
    bare = host_class()
    bare_losses = bare.train()
    host = applied(host_class, mode, **IDENTITY)
    with reading_grad_of_a_computed_weight():
        if isinstance(outcome, type):
            with pytest.raises(outcome):
                host.train()
            return
        losses = host.train()
    keys, classes = list(bare.net.state_dict()), [type(m) for m in bare.net.modules()]
    assert follows(host, losses, bare, bare_losses) == (outcome is SAME)
    assert list(host.net.state_dict()) == keys and [type(m) for m in host.net.modules()] == classes


@lost_edits_may_warn
@pytest.mark.parametrize(
    ("host_class", "mode"), [(host, mode) for host, mode, outcome in IN_BOTH_MODES if isinstance(outcome, str)]
)
def test_points_move_by_the_default_setting(host_class: type[Host], mode: str) -> None:
    host = applied(host_class, mode)
    start = points(host.net)
    with reading_grad_of_a_computed_weight():
        assert torch.tensor(host.train()).isfinite().all()
    assert len(start) == 2
    for name, epc in clusters(host.net).items():
        assert epc.point.isfinite().all() and not torch.equal(epc.point, start[name])
        assert latents(host.net)[name].isfinite().all()
        assert epc.parameter.grad is not None and epc.parameter.grad.isfinite().all() and epc.parameter.grad.any()


@lost_edits_may_warn
@pytest.mark.parametrize("host_class", [ClippedInForward, CentredInForward, ClampedByTrainer])
def test_under_parametrize_the_training_is_that_of_a_host_without_the_edit(host_class: type[Host]) -> None:
    plain = Host()
    plain_losses = plain.train()
    host = applied(host_class, "parametrize", **IDENTITY)
    assert follows(host, host.train(), plain, plain_losses)


def test_under_parametrize_a_write_into_the_weight_after_a_step_is_lost_with_a_warning() -> None:
    host = applied(ClampedByTrainer, "parametrize")
    with pytest.warns(UserWarning, match="has written into its weight .* mode='inplace'"):
        host.train(2)


@each_mode
@pytest.mark.parametrize("host_class", [Captured, AuxiliaryCopies])
def test_what_a_trainer_makes_binary_is_so_in_the_forward_in_place_only(host_class: type[Captured], mode: str) -> None:
    host = applied(host_class, mode)
    host.train(2)
    host.binarize()
    weights = [host.net.get_submodule(name).conv.weight.detach() for name in BINARY_LAYERS]
    assert [is_two_valued(w) for w in weights] == [mode == "inplace"] * 2


def test_a_layer_in_a_plain_list_cannot_be_found() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [ScaledConv(3, 4, 3)]

    with pytest.raises(ValueError, match="found no binary convolution"):
        hbnn_plugin.apply(Hidden())


# -- detection ---------------------------------------------------------------------------------------------------------


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


def test_apply_leaves_no_trace_on_a_weight_that_a_forward_marks() -> None:
    """BinaryNet's forward keeps the weight that it finds first: a checkpoint loaded after apply has to be first."""
    bare, loaded = OrgKept(), tiny_net(OrgKept.conv, seed=5, dtype=torch.float64).state_dict()
    bare.net.load_state_dict(loaded)
    host = applied(OrgKept, **IDENTITY)
    assert vars(host.net.conv1.weight) == {}
    host.net.load_state_dict(loaded)
    assert follows(host, host.train(), bare, bare.train())
