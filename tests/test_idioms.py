"""What old binary codebases do, one row each: the mode that apply picks, and what becomes of the training in both.

Where the map is the identity, "same" means the bare host's own trajectory, to rounding in float64.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import hbnn_plugin
from hbnn_plugin.host.bits import is_two_valued
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
from idiom_trainers import (
    AuxiliaryCopies,
    CollectedWeights,
    GradientInForward,
    GradientInMethod,
    RealBeside,
)
from tiny_hosts import (
    BINARY_LAYERS,
    ScaledConv,
    clusters,
    latents,
    points,
    tiny_net,
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


def test_apply_leaves_no_trace_on_a_weight_that_a_forward_marks() -> None:
    """BinaryNet's forward keeps the weight that it finds first: a checkpoint loaded after apply has to be first."""
    bare, loaded = OrgKept(), tiny_net(OrgKept.conv, seed=5, dtype=torch.float64).state_dict()
    bare.net.load_state_dict(loaded)
    host = applied(OrgKept, **IDENTITY)
    assert vars(host.net.conv1.weight) == {}
    host.net.load_state_dict(loaded)
    assert follows(host, host.train(), bare, bare.train())
