"""apply at the moment when a script builds its optimizer or wraps its model, in this process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim import SGD, Adam

from hbnn_plugin.cluster import find
from hbnn_plugin.interception import Interception
from hbnn_plugin.selection import by_name
from tiny_hosts import IrConv, TinyNet, clusters, points, tiny_net, train


@pytest.fixture
def watch() -> Iterator[Interception]:
    said: list[str] = []
    taken = Interception({}, said.append)
    before = (torch.optim.Optimizer.__init__, DataParallel.__init__, torch.save)
    taken.start()
    yield taken
    taken.stop()
    assert (torch.optim.Optimizer.__init__, DataParallel.__init__, torch.save) == before
    assert len(said) == len(taken.models)  # a plan for each


def test_the_first_optimizer_brings_the_cluster(watch: Interception) -> None:
    net = tiny_net(IrConv)
    weight = net.conv1.weight
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    assert list(clusters(net)) == ["conv1", "conv2"]
    assert find(net.conv1)["weight"].parameter is weight
    assert any(p is weight for group in optimizer.param_groups for p in group["params"])
    train(net, optimizer, 2)
    assert all(bool(p.any()) for p in points(net).values())


def test_a_rebuilt_optimizer_changes_nothing_more(watch: Interception) -> None:
    net = tiny_net(IrConv)
    SGD(net.parameters(), lr=0.1)
    first = clusters(net)
    Adam(net.parameters())
    assert clusters(net) == first
    assert watch.models == [net]


@pytest.mark.parametrize("form", ["groups", "groups of generators", "named", "keyword"])
def test_every_way_to_hand_over_parameters(watch: Interception, form: str) -> None:
    net = tiny_net(IrConv)
    if form == "groups":
        SGD([{"params": list(net.conv1.parameters())}, {"params": net.conv2.weight, "lr": 0.2}], lr=0.1)
    elif form == "groups of generators":
        optimizer = SGD([{"params": net.parameters()}], lr=0.1)
        assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))
    elif form == "named":
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
            return  # torch itself takes no names before
        SGD(net.named_parameters(), lr=0.1)
    else:
        SGD(params=net.parameters(), lr=0.1)
    assert list(clusters(net)) == ["conv1", "conv2"]


def test_only_what_trains_is_taken(watch: Interception) -> None:
    teacher, student, other = tiny_net(IrConv), tiny_net(IrConv, 1), nn.Linear(3, 3)
    SGD(other.parameters(), lr=0.1)
    average = copy.deepcopy(student)
    SGD(student.parameters(), lr=0.1)
    assert watch.models == [student]
    assert not clusters(teacher)
    assert not clusters(average)


def test_a_wrapper_comes_first(watch: Interception) -> None:
    net = tiny_net(IrConv)
    wrapped = DataParallel(net)
    assert list(clusters(net)) == ["conv1", "conv2"]
    SGD(wrapped.parameters(), lr=0.1)
    assert watch.models == [net]


def test_the_outermost_module_gives_the_names() -> None:
    class Task(nn.Module):
        def __init__(self, backbone: TinyNet) -> None:
            super().__init__()
            self.backbone = backbone

    task = Task(tiny_net(IrConv))
    taken = Interception({"where": by_name(r"^backbone\.conv2$")}, lambda _: None)
    taken.start()
    try:
        SGD(task.backbone.conv2.parameters(), lr=0.1)
    finally:
        taken.stop()
    assert taken.models == [task]
    assert list(clusters(task)) == ["backbone.conv2"]


def test_what_was_saved_and_copied_is_known(watch: Interception, tmp_path: Path) -> None:
    (tmp_path / "old.pth").write_bytes(b"")
    watch._started = (tmp_path / "old.pth").stat().st_mtime + 1e-3
    torch.save({"a": torch.zeros(1)}, tmp_path / "last.pth")
    (tmp_path / "best.pth").write_bytes((tmp_path / "last.pth").read_bytes())
    (tmp_path / "log.txt").write_text("")
    assert [path.name for path in watch.saved()] == ["best.pth", "last.pth"]
