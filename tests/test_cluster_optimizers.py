"""ClusterSGD, ClusterAdam and ClusterAdamW: optimizers that step the points themselves."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as lrs

import hbnn_plugin
from hbnn_plugin.cluster.epc import find
from tiny_hosts import loss_of, points, same_state, state, tiny_net, train
from training_helpers import applied, closure_of, moved, one_step, steps

CLUSTER_OPTIMIZERS = {
    "sgd": (hbnn_plugin.ClusterSGD, SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adam": (hbnn_plugin.ClusterAdam, Adam, {"lr": 0.01}),
    "adamw": (hbnn_plugin.ClusterAdamW, AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
each_cluster_optimizer = pytest.mark.parametrize("name", CLUSTER_OPTIMIZERS)


@each_cluster_optimizer
@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("rule", ["mobius", "riemannian", "riemannian-adam", "spectral"])
def test_cluster_optimizers_are_automatic_stepping_to_the_bit(name: str, rule: str, order: str) -> None:
    own, plain, options = CLUSTER_OPTIMIZERS[name]
    one, other, third = (applied(rule=rule, order=order) for _ in range(3))
    train(one, plain(one.parameters(), **options), 3)
    train(other, own(other.parameters(), **options), 3)
    optimizer = own(third.parameters(), **options)
    for seed in range(3):
        optimizer.step(closure_of(third, optimizer, seed))
    assert same_state(state(one), state(other))
    assert same_state(state(one), state(third))
    assert steps(third) == [3, 3]


@each_cluster_optimizer
def test_point_lr_stays_when_a_plain_optimizers_state_is_loaded(name: str) -> None:
    own, plain, options = CLUSTER_OPTIMIZERS[name]
    net = applied()
    optimizer = own(net.parameters(), point_lr=2.0, **options)
    optimizer.load_state_dict(plain(net.parameters(), **options).state_dict())
    assert [group["point_lr"] for group in optimizer.param_groups] == [2.0]


@each_cluster_optimizer
def test_cluster_optimizers_resume_from_their_state_dict(name: str) -> None:
    own, _, options = CLUSTER_OPTIMIZERS[name]
    one = applied()
    optimizer = own(one.parameters(), point_lr=2.0, **options)
    train(one, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = applied(seed=1)
    again = own(other.parameters(), **options)
    other.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    for net, o in ((one, optimizer), (other, again)):
        train(net, o, 2, first=2)
    assert same_state(state(one), state(other))


@each_cluster_optimizer
def test_cluster_optimizers_copy_and_pickle(name: str) -> None:
    own, _, options = CLUSTER_OPTIMIZERS[name]
    net = applied()
    optimizer = own(net.parameters(), point_lr=2.0, **options)
    train(net, optimizer, 1)
    net_copy, optimizer_copy = copy.deepcopy((net, optimizer))
    before = state(net)
    train(net_copy, optimizer_copy, 2, first=1)
    assert same_state(state(net), before)
    train(net, optimizer, 2, first=1)
    assert same_state(state(net), state(net_copy))
    unpickled = pickle.loads(pickle.dumps(optimizer))
    assert type(unpickled) is own
    assert unpickled.param_groups[0]["point_lr"] == 2.0
    assert unpickled.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    unpickled.step()


@each_cluster_optimizer
def test_cluster_optimizers_take_schedules_point_lr_and_grad_scaler(name: str) -> None:
    own, plain, options = CLUSTER_OPTIMIZERS[name]
    one, other = applied(point_lr=3.0), applied()
    pairs = [(one, plain(one.parameters(), **options)), (other, own(other.parameters(), point_lr=3.0, **options))]
    for net, optimizer in pairs:
        scheduler = lrs.ExponentialLR(optimizer, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for seed in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, seed)).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    without_settings = [{k: v for k, v in state(n).items() if "_extra_state" not in k} for n in (one, other)]
    assert same_state(*without_settings)
    assert all(p.any() for p in points(other).values())


@each_cluster_optimizer
def test_hooks_on_a_cluster_optimizer_run_once_a_step(name: str) -> None:
    own, plain, options = CLUSTER_OPTIMIZERS[name]
    net = applied()
    plain(net.parameters(), **options)  # torch puts hooks on a class's step when it is first constructed
    optimizer = own(net.parameters(), **options)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(net, optimizer, 2)
    assert calls == ["before", "after"] * 2


@each_cluster_optimizer
def test_point_lr_of_a_cluster_optimizer_holds_for_groups_added_later(name: str) -> None:
    own, _, options = CLUSTER_OPTIMIZERS[name]
    net = applied()
    optimizer = own(net.conv1.parameters(), point_lr=0.0, **options)
    optimizer.add_param_group({"params": list(net.conv2.parameters())})
    before = points(net)
    train(net, optimizer, 2)
    assert moved(net, before) == []


@each_cluster_optimizer
def test_a_cluster_optimizer_needs_an_applied_model(name: str) -> None:
    own, _, options = CLUSTER_OPTIMIZERS[name]
    with pytest.raises(ValueError, match=r"Cluster.* holds no latent weight.*apply\(model\) first"):
        own(tiny_net().parameters(), **options)
    with pytest.raises(ValueError, match="holds no latent weight"):
        own(applied().fc.parameters(), **options)


def test_cluster_optimizers_step_the_points_themselves_and_take_fixed_ones() -> None:
    model = hbnn_plugin.apply(tiny_net(), rule="fixed")
    optimizer = hbnn_plugin.ClusterSGD(model.parameters(), lr=0.1)
    one_step(model, optimizer)
    assert int(find(model.conv1)["weight"].steps) == 0
    with pytest.raises(ValueError, match="point_lr must be a finite number"):
        hbnn_plugin.ClusterSGD(model.parameters(), lr=0.1, point_lr=float("nan"))
