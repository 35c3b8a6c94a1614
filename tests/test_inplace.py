"""In-place mode: the host keeps weight, class and keys, edits them, saves and copies them."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam

import hbnn_plugin
from hbnn_plugin.cluster.inplace import edited
from hbnn_plugin.geometry.ball import MARGIN
from inplace_nets import mapped, smooth
from tiny_hosts import (
    HardBinaryConv,
    IrConv,
    RecuConv,
    SmoothConv,
    clusters,
    latents,
    loss_of,
    points,
    same_state,
    state,
    tiny_net,
    train,
)
from training_helpers import F64, applied, output, saved

each_conv = pytest.mark.parametrize("conv", [IrConv, RecuConv, HardBinaryConv], ids=lambda c: c.__name__)


# -- what the host does to its weight ----------------------------------------------------------------------------------


def test_an_edit_is_honoured_where_it_was_made_and_only_there() -> None:
    net = smooth(radius=0.05)
    optimizer = SGD(net.parameters(), lr=0.3)
    train(net, optimizer, 2)
    before, weight = latents(net)["conv1"], net.conv1.weight
    edited = weight.detach()[1].clamp(-0.05, 0.05)
    weight.data[1] = edited
    loss_of(net).backward()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert mapped(net)
    assert torch.allclose(weight[1], edited, rtol=1e-12)
    others = [0, 2, 3, 4]
    assert torch.equal(latents(net)["conv1"][others], before[others])
    assert not torch.equal(latents(net)["conv1"][1], before[1])


EDITS = {
    "mirrored": lambda w: w.flip(-1),
    "rolled": lambda w: w.roll(1, dims=1),
    "negated": lambda w: -w,
    "two values swapped": lambda w: torch.where(w == w.max(), w.min(), torch.where(w == w.min(), w.max(), w)),
    "one value moved by a thousandth": lambda w: torch.where(w == w.max(), 1.001 * w, w),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_whatever_the_edit_is_it_is_honoured(edit: str, dtype: torch.dtype) -> None:
    """Also one that keeps sums and norms."""
    net = hbnn_plugin.apply(tiny_net(SmoothConv, dtype=dtype), mode="inplace", radius=0.5)
    optimizer = SGD(net.parameters(), lr=0.3)
    train(net, optimizer, 2)
    weight = net.conv1.weight
    weight.data.copy_(EDITS[edit](weight.data))
    edited = weight.detach().clone()
    loss_of(net).backward()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.allclose(weight, edited, rtol=1e-9 if dtype == F64 else 1e-4, atol=1e-6 if dtype != F64 else 0)


def test_an_edit_out_of_the_ball_keeps_its_direction_and_warns_once() -> None:
    net = smooth(radius=0.05)
    optimizer = SGD(net.parameters(), lr=0.0)
    for seed in range(2):
        loss_of(net, seed).backward()
        net.conv1.weight.data[1] *= 1e3
        direction = net.conv1.weight.detach()[1] / net.conv1.weight.detach()[1].norm()
        if seed == 0:
            with pytest.warns(
                UserWarning, match=r"the host moved its weight out of the ball in conv1 \(1 of 5 points\)"
            ):
                optimizer.step()
        else:
            optimizer.step()
        weight = net.conv1.weight.detach()[1]
        assert weight.norm() == pytest.approx((1 - MARGIN) * 0.05**-0.5, rel=1e-6)
        assert torch.allclose(weight / weight.norm(), direction, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_small_edit_of_every_filter_counts_and_a_rounding_does_not(dtype: torch.dtype) -> None:
    net = applied(SmoothConv, dtype=dtype, mode="inplace")
    (epc, _) = clusters(net).values()
    mapped = epc.weight_of(epc.latent)
    assert not edited(mapped * (1 + torch.finfo(dtype).eps / 2), mapped, epc.dims).any()
    centred = mapped + 3 * torch.finfo(dtype).eps * mapped.abs().amax(epc.dims, keepdim=True)
    if dtype == torch.float32:  # there coordinates are summed in other orders, with roundings of their own
        centred = centred + 1e-5 * mapped.abs().amax(epc.dims, keepdim=True)
    assert edited(centred, mapped, epc.dims).all()


@pytest.mark.parametrize("conv", [IrConv, HardBinaryConv], ids=lambda c: c.__name__)
def test_looking_between_forward_and_backward_disturbs_nothing(conv: Any) -> None:
    gradients = []
    for look in (False, True):
        net = applied(conv, mode="inplace")
        loss = loss_of(net)
        if look:
            hbnn_plugin.cluster_report(net)
            hbnn_plugin.flip_ratio(net)
        loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert same_state(*gradients)


def test_a_weight_that_was_pruned_away_is_reported_and_troubles_nobody_else() -> None:
    net, other = applied(mode="inplace"), tiny_net()
    prune.random_unstructured(net.conv1, "weight", 0.3)
    loss_of(other).backward()
    with pytest.warns(UserWarning, match=r"conv1: the layer has no Parameter 'weight' any more.*fuse before"):
        SGD(other.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"conv1: the layer has no Parameter 'weight'"):
        hbnn_plugin.fuse(net)


def test_a_nan_in_the_weight_is_not_hidden() -> None:
    net = smooth()
    loss_of(net).backward()
    net.conv1.weight.data[1, 0, 0, 0] = torch.nan
    SGD(net.parameters(), lr=0.1).step()
    assert net.conv1.weight[1].isnan().any()
    assert net.conv1.weight[[0, 2, 3, 4]].isfinite().all()


def test_a_parameter_that_the_host_replaces_is_honoured() -> None:
    bare = tiny_net(SmoothConv, dtype=F64)
    ours = smooth(radius=1e-12, rule="fixed")
    curved = smooth()
    for net in (bare, ours, curved):
        train(net, SGD(net.parameters(), lr=0.3, momentum=0.9), 2)
        net.conv1.weight = nn.Parameter(tiny_net(SmoothConv, seed=3, dtype=F64).conv1.weight.detach().clone())
        start = net.conv1.weight.detach().clone()
        train(net, SGD(net.parameters(), lr=0.3, momentum=0.9), 2)
        assert not torch.equal(net.conv1.weight, start)
    hbnn_plugin.fuse(ours)
    for key, value in bare.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], value, rtol=1e-9, atol=1e-11), key
    assert clusters(curved)["conv1"].parameter is curved.conv1.weight
    assert mapped(curved)


# -- checkpoints and copies --------------------------------------------------------------------------------------------


@each_conv
def test_the_host_keeps_its_weights_keys_and_classes(conv: Any) -> None:
    net = tiny_net(conv)
    keys, names = list(net.state_dict()), [name for name, _ in net.named_parameters()]
    classes, objects = [type(m) for m in net.modules()], [id(p) for p in net.parameters()]
    hbnn_plugin.apply(net, mode="inplace")
    assert [key for key in net.state_dict() if "_epc." not in key] == keys
    assert [name for name, _ in net.named_parameters()] == names and [id(p) for p in net.parameters()] == objects
    assert [type(m) for m in net.modules() if type(m) in classes] == classes
    train(net, SGD(net.parameters(), lr=0.5), 2)
    before, hooks = output(net), [len(m._load_state_dict_pre_hooks) for m in tiny_net(conv).modules()]
    hbnn_plugin.fuse(net)
    assert list(net.state_dict()) == keys and [id(p) for p in net.parameters()] == objects
    assert [type(m) for m in net.modules()] == classes
    assert [len(m._load_state_dict_pre_hooks) for m in net.modules()] == hooks
    assert torch.equal(output(net), before)
    alone = copy.deepcopy(net)
    train(net, SGD(net.parameters(), lr=0.5), 2)
    train(alone, SGD(alone.parameters(), lr=0.5), 2)
    assert same_state(state(net), state(alone))


@each_conv
@pytest.mark.parametrize("optimizer_class", [SGD, Adam])
def test_training_resumes_to_the_bit(conv: Any, optimizer_class: Any) -> None:
    options = {"lr": 0.02, **({"momentum": 0.9} if optimizer_class is SGD else {})}
    net = applied(conv, mode="inplace")
    optimizer = optimizer_class(net.parameters(), **options)
    train(net, optimizer, 2)
    kept, kept_optimizer = saved(net.state_dict()), saved(optimizer.state_dict())
    train(net, optimizer, 3, first=2)
    again = applied(conv, seed=7, mode="inplace")
    another = optimizer_class(again.parameters(), **options)
    again.load_state_dict(kept)
    another.load_state_dict(kept_optimizer)
    assert same_state(state(again), kept)
    train(again, another, 3, first=2)
    assert same_state(state(again), state(net))
    assert not same_state(state(again), kept)


@each_conv
def test_plain_checkpoints_load_both_ways(conv: Any) -> None:
    plain = tiny_net(conv, seed=4)
    kept = saved(plain.state_dict())
    net = applied(conv, mode="inplace")
    train(net, SGD(net.parameters(), lr=0.5), 2)
    net.load_state_dict(kept)  # strictly
    assert list(kept) == list(plain.state_dict())
    torch.testing.assert_close(output(net), output(plain), rtol=1e-5, atol=1e-6)  # mapped there and back
    fresh = hbnn_plugin.apply(tiny_net(conv, seed=4).eval(), mode="inplace")
    assert all(torch.equal(v, latents(fresh)[name]) for name, v in latents(net).items())
    assert not any(p.any() for p in points(net).values())
    net.train()
    train(net, SGD(net.parameters(), lr=0.5), 2)
    back = tiny_net(conv, seed=5)
    back.load_state_dict(hbnn_plugin.plain_state_dict(saved(net.state_dict())))
    assert torch.equal(output(back), output(net))


@pytest.mark.parametrize("way", ["deepcopy", "file"])
def test_a_copy_of_the_whole_model_trains_on_by_itself(way: str) -> None:
    net = applied(IrConv, mode="inplace")
    train(net, SGD(net.parameters(), lr=0.5), 1)
    if way == "deepcopy":
        other = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    before = state(net)
    train(other, SGD(other.parameters(), lr=0.5), 2)
    assert same_state(state(net), before)
    assert mapped(other) and not torch.equal(points(other)["conv1"], points(net)["conv1"])
    train(net, SGD(net.parameters(), lr=0.5), 2)
    assert same_state(state(net), state(other))


def test_a_model_that_was_saved_whole_trains_on_in_a_process_that_never_calls_apply(tmp_path: Path) -> None:
    net = applied(IrConv, mode="inplace")
    torch.save(net, tmp_path / "whole.pt")
    script = (
        "import sys, torch; from tiny_hosts import train\n"
        "net = torch.load(sys.argv[1], weights_only=False)\n"
        "train(net, torch.optim.SGD(net.parameters(), lr=0.5), 2); torch.save(net.state_dict(), sys.argv[2])\n"
    )
    root = Path(hbnn_plugin.__file__).parents[1]
    paths = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]\n"
    command = [sys.executable, "-c", paths + script, str(tmp_path / "whole.pt"), str(tmp_path / "trained.pt")]
    subprocess.run(command, check=True)
    train(net, SGD(net.parameters(), lr=0.5), 2)
    there = torch.load(tmp_path / "trained.pt", weights_only=True)
    for key, value in net.state_dict().items():
        assert torch.allclose(there[key].double(), value.double(), rtol=1e-4, atol=1e-6), key
