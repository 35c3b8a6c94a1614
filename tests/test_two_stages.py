"""Two-stage training and distillation: weights come from another model, and a teacher stays what it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import hbnn_plugin
from hbnn_plugin import by_name
from inplace_nets import agree, smooth
from tiny_hosts import (
    BINARY_LAYERS,
    IrConv,
    RecuConv,
    SmoothConv,
    batch,
    clusters,
    points,
    same_state,
    state,
    tiny_net,
    train,
)
from training_helpers import F64, applied, each_mode, moved, output, saved, steps

# -- two stages --------------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("order", ["load, then apply", "apply, then load"])
def test_binary_weights_after_real_ones(order: str, mode: str) -> None:
    """ReActNet's way: real weights in the first stage, the second starts from them."""
    first = tiny_net(nn.Conv2d, seed=3)
    train(first, SGD(first.parameters(), lr=0.1), 3)
    kept = saved(first.state_dict())
    bare = tiny_net(IrConv, seed=4)
    bare.load_state_dict(kept)
    expected = output(bare)
    net = tiny_net(IrConv, seed=4)
    if order == "load, then apply":
        net.load_state_dict(kept)
        hbnn_plugin.apply(net, mode=mode)
    else:
        hbnn_plugin.apply(net, mode=mode).load_state_dict(kept)
    torch.testing.assert_close(output(net), expected, rtol=1e-4, atol=1e-5)
    assert hbnn_plugin.flip_ratio(net).total == 0
    reference = hbnn_plugin.apply(bare.train(), mode=mode)
    for model in (net.train(), reference):
        train(model, SGD(model.parameters(), lr=0.5, momentum=0.9), 3)
    for key, value in state(reference).items():
        torch.testing.assert_close(state(net)[key], value, rtol=1e-4, atol=1e-6)
    assert steps(net) == [3, 3] and hbnn_plugin.flip_ratio(net).total > 0


@each_mode
def test_points_go_on_in_a_second_stage_with_another_host(mode: str) -> None:
    """Such as binary activations in the first stage and another binary weight in the second: the keys are the same."""
    first = applied(IrConv, mode=mode)
    train(first, SGD(first.parameters(), lr=0.5), 3)
    net = applied(RecuConv, seed=4, mode=mode)
    net.load_state_dict(saved(first.state_dict()))
    assert all(torch.equal(p, points(first)[name]) and p.any() for name, p in points(net).items())
    assert torch.equal(net.conv1.weight, first.conv1.weight)
    before = points(net)
    train(net, SGD(net.parameters(), lr=0.05), 2)
    assert steps(net) == [5, 5] and moved(net, before) == list(BINARY_LAYERS)


# -- distillation ------------------------------------------------------------------------------------------------------


class Distilled(nn.Module):
    """A student and its teacher, of the same classes, in one module."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ours, theirs = self.student(x), self.teacher(x)
        return F.cross_entropy(ours, y) + F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction="batchmean")


def distil(both: Distilled, of: Callable[[Distilled], Any], count: int = 3) -> None:
    optimizer = SGD(of(both), lr=0.3, momentum=0.9, weight_decay=1e-2)
    for seed in range(count):
        optimizer.zero_grad()
        both(*batch(seed, F64)).backward()
        optimizer.step()


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: tiny_net(SmoothConv, 3, F64),
    "applied": lambda: smooth("parametrize", 3),
    "applied in place": lambda: smooth("inplace", 3),
    "fused": lambda: hbnn_plugin.fuse(smooth("inplace", 3)),
}


@each_mode
@pytest.mark.parametrize("held", [lambda both: both.student.parameters(), lambda both: both.parameters()])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_teacher_is_untouched_and_the_student_trains_the_same_in_both_modes(
    teacher: str, held: Callable[[Distilled], Any], mode: str
) -> None:
    """Also where the optimizer is given the teacher's frozen parameters."""
    both, reference = (Distilled(smooth(m), TEACHERS[teacher]()) for m in (mode, "parametrize"))
    before, classes = state(both.teacher), [type(m) for m in both.teacher.modules()]
    objects = [id(p) for p in both.teacher.parameters()]
    for one in (both, reference):
        distil(one, held)
    assert same_state(state(both.teacher), before)
    assert [type(m) for m in both.teacher.modules()] == classes
    assert [id(p) for p in both.teacher.parameters()] == objects
    assert all(p.grad is None for p in both.teacher.parameters())
    assert steps(both.student) == [3, 3]
    assert agree(both.student, reference.student)


@each_mode
def test_a_predicate_leaves_the_teacher_out(mode: str) -> None:
    both = Distilled(tiny_net(IrConv), tiny_net(IrConv, 3))
    before = state(both.teacher)
    hbnn_plugin.apply(both, where=by_name(r"^student\.conv"), mode=mode)
    assert list(clusters(both)) == [f"student.{name}" for name in BINARY_LAYERS]
    for seed in range(2):
        both(*batch(seed)).backward()
        SGD(both.parameters(), lr=0.3).step()
    assert same_state(state(both.teacher), before)
    assert list(hbnn_plugin.flip_ratio(both)) == [f"student.{name}" for name in BINARY_LAYERS]
    assert hbnn_plugin.flip_ratio(both).total > 0


@each_mode
def test_a_copy_of_the_student_that_averages_it_teaches(mode: str) -> None:
    """Mean teacher: an applied copy that no optimizer holds, updated by hand."""
    student = smooth(mode)
    both = Distilled(student, copy.deepcopy(student))
    optimizer = SGD(student.parameters(), lr=0.3)
    for seed in range(3):
        optimizer.zero_grad()
        both(*batch(seed, F64)).backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(both.teacher.parameters(), student.parameters()):
                mine.lerp_(theirs, 0.5)
    assert steps(both.teacher) == [0, 0] and steps(student) == [3, 3]
    assert not any(p.any() for p in points(both.teacher).values())
    assert not torch.equal(both.teacher.get_submodule("conv1").weight, student.conv1.weight)
