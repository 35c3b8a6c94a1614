"""apply at the moment when a script builds its optimizer or wraps its model, in this process."""

from __future__ import annotations

import copy
import gc
import io
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim import SGD, Adam

import hbnn_plugin
from hbnn_plugin.cluster.epc import find
from hbnn_plugin.cluster.inplace import InPlace
from hbnn_plugin.host.selection import by_name
from hbnn_plugin.launcher import interception
from hbnn_plugin.launcher.interception import Interception
from tiny_hosts import IrConv, TinyNet, clusters, points, tiny_net, train
from torch_version import TORCH
from training_helpers import each_mode


@pytest.fixture
def watch() -> Iterator[Interception]:
    said: list[str] = []
    taken = Interception({}, said.append)
    before = originals()
    taken.start()
    yield taken
    taken.stop()
    assert originals() == before
    assert len(said) == len(taken.models)  # a plan for each


def originals() -> list[object]:
    kept: list[object] = [torch.optim.Optimizer.__init__, DataParallel.__init__, torch.save]
    kept += [nn.Module.load_state_dict, torch.multiprocessing.spawn]
    return [*kept, fsdp().fully_shard, torch.distributed.fsdp.FullyShardedDataParallel.__init__]


def fsdp() -> Any:
    """Where this torch has fully_shard."""
    if hasattr(torch.distributed.fsdp, "fully_shard"):
        return torch.distributed.fsdp
    from torch.distributed._composable import fsdp  # noqa: PLC0415  # torch < 2.6

    return fsdp


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


def test_a_script_that_applies_by_itself_is_watched_too() -> None:
    said: list[str] = []
    watch = Interception({}, said.append)
    watch.start()
    try:
        net = hbnn_plugin.apply(nn.Sequential(IrConv(3, 4, 3, bias=False), nn.Flatten()), mode="parametrize")
        SGD(net.parameters(), lr=0.1)
    finally:
        watch.stop()
    assert (watch.applied, watch.models, said) == (True, [net], [])


@pytest.mark.parametrize("form", ["groups", "groups of generators", "named", "keyword"])
def test_every_way_to_hand_over_parameters(watch: Interception, form: str) -> None:
    net = tiny_net(IrConv)
    if form == "groups":
        SGD([{"params": list(net.conv1.parameters())}, {"params": net.conv2.weight, "lr": 0.2}], lr=0.1)
    elif form == "groups of generators":
        optimizer = SGD([{"params": net.parameters()}], lr=0.1)
        assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))
    elif form == "named":
        if TORCH < (2, 6):
            pytest.skip("torch itself takes no names before")
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


def test_a_script_that_resumes_may_load_before_it_builds_its_optimizer(watch: Interception) -> None:
    first = tiny_net()
    train(first, SGD(first.parameters(), lr=0.1), 2)
    saved = first.state_dict()
    resumed, plain = tiny_net(seed=1), tiny_net(seed=1)
    resumed.load_state_dict(saved)
    optimizer = SGD(resumed.parameters(), lr=0.1)
    assert watch.models == [first, resumed]
    assert all(torch.equal(now, points(first)[name]) for name, now in points(resumed).items())
    train(resumed, optimizer, 1)
    plain.load_state_dict(tiny_net().state_dict())  # one that is no applied model's
    assert not clusters(plain)


def test_what_a_part_loads_is_applied_to_the_whole(watch: Interception) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = tiny_net(), IrConv(3, 3, 1)

    saved = hbnn_plugin.apply(tiny_net()).state_dict()
    net = Two()
    net.backbone.load_state_dict(saved)
    assert list(clusters(net)) == ["backbone.conv1", "backbone.conv2", "head"]
    SGD(net.parameters(), lr=0.1)
    assert watch.models == [net]


def test_a_frozen_teacher_in_a_wrapper_stays_as_it_is(watch: Interception) -> None:
    teacher = tiny_net().requires_grad_(False)
    DataParallel(teacher)
    assert not clusters(teacher) and not watch.applied


def test_models_are_let_go_unless_a_report_wants_them() -> None:
    taken = Interception({}, lambda _: None, keep=False)
    taken.start()
    net = tiny_net()
    SGD(net.parameters(), lr=0.1)
    taken.stop()
    model = weakref.ref(net)
    assert taken.applied and clusters(net)
    del net
    gc.collect()
    assert model() is None


def test_a_wrapper_comes_first(watch: Interception) -> None:
    net = tiny_net(IrConv)
    wrapped = DataParallel(net)
    assert list(clusters(net)) == ["conv1", "conv2"]
    SGD(wrapped.parameters(), lr=0.1)
    assert watch.models == [net]


def test_of_a_model_that_is_sharded_over_ranks_there_is_no_report_of_flips(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interception, "_ranks", lambda: 2)
    said: list[str] = []
    taken = Interception({}, said.append)
    taken.start()
    try:
        net = tiny_net(IrConv)
        fsdp().fully_shard(net)
        SGD(net.parameters(), lr=0.1)
    finally:
        taken.stop()
    assert taken.applied and not taken.models
    assert "call hbnn_plugin.flip_ratio(model) in the script, on every rank" in said[1] and len(said) == 2


@each_mode
def test_apply_comes_before_the_first_part_is_sharded(watch: Interception, one_rank: None, mode: str) -> None:
    watch.options = {"mode": mode}
    net, plain = tiny_net(IrConv), nn.Sequential(nn.Linear(3, 3))
    together = [[net.conv1, net.bn1]] if TORCH >= (2, 5) else [net.conv1]
    parts = [plain, net.stem, *together, net.conv2, net]
    for part in parts:  # the first of them have nothing binary in them
        fsdp().fully_shard(part)
    assert watch.models == [net]
    assert [isinstance(epc, InPlace) for epc in clusters(net).values()] == [mode == "inplace"] * 2
    if TORCH >= (2, 5):  # before, nothing sharded runs without a GPU
        train(net, SGD(net.parameters(), lr=0.1), 2)
        assert all(bool(p.any()) for p in points(net).values())


def test_fsdp_of_old_is_refused_and_leaves_other_models_alone(watch: Interception, one_rank: None) -> None:
    net = tiny_net(IrConv)
    with pytest.raises(ValueError, match=r"flattens the weights of TinyNet.*fully_shard"):
        torch.distributed.fsdp.FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    assert not clusters(net)
    torch.distributed.fsdp.FullyShardedDataParallel(
        nn.Linear(3, 3),
        device_id=torch.device("cpu"),
        sharding_strategy=torch.distributed.fsdp.ShardingStrategy.NO_SHARD,
    )
    assert watch.models == []


def test_a_model_is_binarized_and_its_optimizer_holds_the_same_weights(watch: Interception) -> None:
    watch.options = {"binarize": "1/1"}
    net, other = tiny_net(nn.Conv2d), nn.Sequential(nn.Conv2d(2, 2, 3))  # nothing in this one
    SGD(other.parameters(), lr=0.1)
    optimizer = SGD(net.parameters(), lr=0.1)
    assert watch.models == [net]
    train(net, optimizer, 2)
    assert len(points(net)) == 2 and all(bool(p.any()) for p in points(net).values())


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
    os.utime(tmp_path / "old.pth", (0, 0))
    torch.save({"a": torch.zeros(1)}, tmp_path / "last.pth")
    (tmp_path / "best.pth").write_bytes((tmp_path / "last.pth").read_bytes())
    (tmp_path / "log.txt").write_text("")
    assert [path.name for path in watch.saved()] == ["best.pth", "last.pth"]
    torch.save({"a": torch.zeros(1)}, tmp_path / "latest")  # no suffix is a kind of its own
    with (tmp_path / "open.pt").open("wb") as file:
        torch.save({"a": torch.zeros(1)}, file)
    torch.save({"a": torch.zeros(1)}, io.BytesIO())
    assert [path.name for path in watch.saved()] == ["best.pth", "last.pth", "latest", "open.pt"]
