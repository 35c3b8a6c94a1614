"""Corners that a review found: ties across the selection, old-style parametrizations, antipodes, overflow, casts."""

from __future__ import annotations

import copy
import re
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hbnn_plugin
from hbnn_plugin import exp_map
from hbnn_plugin.cluster.epc import find
from tiny_hosts import IrConv, ScaledConv, TinyNet, tiny_net


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: torch.Tensor | float = 0.01) -> None:
    for epc in (epc for module in model.modules() for epc in find(module).values()):
        epc.parameter.grad = torch.zeros_like(epc.parameter) + gradient
    optimizer.step()


@pytest.mark.parametrize("look", [hbnn_plugin.flip_ratio, hbnn_plugin.cluster_report])
def test_looking_between_forward_and_backward_is_harmless(look: object) -> None:
    model = hbnn_plugin.apply(tiny_net())
    loss = model(torch.randn(4, 3, 6, 6)).square().sum()
    look(model)  # type: ignore[operator]
    loss.backward()


class Pair(nn.Module):
    """Two layers with one weight."""

    def __init__(self, second: type = IrConv) -> None:
        super().__init__()
        self.a = IrConv(3, 3, 3, padding=1)
        self.b = second(3, 3, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_a_weight_tied_to_an_unselected_layer_takes_in_place_mode() -> None:
    model = Pair(nn.Conv2d)
    before = copy.deepcopy(model.state_dict())
    tie = r"a has its weight tied to b\.weight, which is not selected"
    with pytest.raises(ValueError, match=f"{tie}: select that too, or apply with mode='inplace'"):
        hbnn_plugin.apply(model, mode="parametrize")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plan = hbnn_plugin.plan(model)
    assert plan.mode == "inplace" and re.fullmatch(tie, plan.reason)
    hbnn_plugin.apply(model)
    assert model.a.weight is model.b.weight


def test_applying_to_the_other_end_of_a_tie_is_refused() -> None:
    model = Pair()
    assert hbnn_plugin.plan(model, where=hbnn_plugin.by_name("^b$")).mode == "inplace"
    hbnn_plugin.apply(model.a)
    with pytest.raises(ValueError, match="b: its weight is tied to IrConv, which apply was called on before"):
        hbnn_plugin.apply(model, where=hbnn_plugin.by_name("^b$"))


def test_fusing_one_end_of_a_tie_is_refused() -> None:
    model = hbnn_plugin.apply(Pair())
    with pytest.raises(ValueError, match="tied to a layer outside"):
        hbnn_plugin.fuse(model.a)
    hbnn_plugin.fuse(model)
    assert model.a.weight is model.b.weight


def test_old_style_parametrizations_are_refused() -> None:
    model = tiny_net()
    nn.utils.spectral_norm(model.conv1)
    with pytest.raises(ValueError, match=r"conv1 .*parametrized by spectral_norm or prune"):
        hbnn_plugin.apply(model)


def test_a_gradient_whose_square_overflows_leaves_the_points_finite() -> None:
    for options in ({}, {"space": "sphere"}, {"rule": "riemannian"}):
        model = hbnn_plugin.apply(tiny_net(), **options)  # type: ignore[arg-type]
        one_step(model, torch.optim.SGD(model.parameters(), lr=1e-25), 1e20)
        for layer in (model.conv1, model.conv2):
            assert bool(find(layer)["weight"].point.isfinite().all())


def test_float32_holds_near_the_edge_against_the_latent() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(8, 500, generator=generator)
    for reach, tolerance in ((0.9, 1e-5), (0.99, 1e-4), (0.999, 1e-3)):
        p = p / p.norm(dim=1, keepdim=True) * reach / 0.05**0.5
        v = -0.02 * p + 1e-4 * torch.randn(8, 500, generator=generator)
        exact = exp_map(p.double(), v.double(), 0.05)
        error = (exp_map(p, v, 0.05).double() - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(error.max()) < tolerance, reach


def test_the_antipode_of_a_point_on_the_sphere_reads_back() -> None:
    model = hbnn_plugin.apply(tiny_net(), space="sphere")
    for angle in (3.0, 3.14, 3.1415, torch.pi):
        p = find(model.conv1)["weight"].point
        tangent = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        tangent -= (tangent * p).sum((1, 2, 3), keepdim=True) * p
        tangent /= tangent.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        target = torch.cos(torch.tensor(angle)) * p + torch.sin(torch.tensor(angle)) * tangent
        model.conv1.weight = target
        assert torch.allclose(model.conv1.weight, target, atol=5e-4)
        assert float(find(model.conv1)["weight"].parameter.detach().flatten(1).norm(dim=1).max()) < 3.2


def test_a_zero_filter_has_no_place_on_the_sphere_wherever_it_comes_from() -> None:
    model = hbnn_plugin.apply(tiny_net(), space="sphere")
    weight = model.conv1.weight.detach().clone()
    weight[2] = 0
    with pytest.raises(ValueError, match=r"conv1: the weight is zero at 1 point\(s\)"):
        model.conv1.weight = weight
    plain = tiny_net()
    with torch.no_grad():
        plain.conv1.weight[2] = 0
    with pytest.raises(ValueError, match="conv1: the weight is zero"):
        model.load_state_dict(plain.state_dict())


def test_a_plain_checkpoint_with_nan_is_refused_before_anything_is_loaded() -> None:
    model, plain = hbnn_plugin.apply(tiny_net()), tiny_net(seed=1)
    with torch.no_grad():
        plain.conv2.weight[0, 0, 0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="conv2: its weight in the checkpoint holds non-finite"):
        model.load_state_dict(plain.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_maximize_turns_the_points_too() -> None:
    moved = []
    for maximize in (False, True):
        model = hbnn_plugin.apply(tiny_net())
        one_step(model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize))
        moved.append(find(model.conv1)["weight"].point)
    assert torch.allclose(moved[0], -moved[1], atol=1e-7)


@pytest.mark.parametrize("rule", ["spectral", "riemannian"])
def test_points_decay_under_maximize_too(rule: Any) -> None:
    model = hbnn_plugin.apply(tiny_net(), rule=rule, start=0.5, point_lr=1.0, point_momentum=0.0, point_decay=0.5)
    before = find(model.conv1)["weight"].point.norm()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(model.parameters(), lr=0.25, maximize=True).step()
    assert 0.5 * before < find(model.conv1)["weight"].point.norm() < 0.95 * before


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RAdam]
)
def test_points_keep_pace_under_every_optimizer_that_normalizes(optimizer_class: type[torch.optim.Optimizer]) -> None:
    for scale in (1e-4, 1.0):
        model = hbnn_plugin.apply(tiny_net(), rule="mobius")
        one_step(model, optimizer_class(model.parameters(), lr=1e-3), scale)  # type: ignore[call-arg]
        rms = find(model.conv1)["weight"].point.square().mean().sqrt()
        assert 5e-4 < float(rms) < 2e-2, (scale, rms)


def test_casting_the_model_to_half_precision_leaves_the_points_in_float32() -> None:
    for cast in (nn.Module.bfloat16, nn.Module.half):
        model = hbnn_plugin.apply(tiny_net())
        one_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        point = find(model.conv1)["weight"].point.clone()
        cast(model)
        epc = find(model.conv1)["weight"]
        assert epc.parameter.dtype in (torch.bfloat16, torch.float16)
        assert torch.equal(epc.point, point)
        one_step(model, torch.optim.SGD(model.parameters(), lr=1e3))
        assert float(epc.reach().max()) < 1


def test_the_warning_of_an_assignment_points_at_it() -> None:
    model = hbnn_plugin.apply(tiny_net())
    with pytest.warns(UserWarning, match="conv1: the assigned weight") as caught:
        model.conv1.weight = 100 * torch.ones(5, 4, 3, 3)
    assert caught[0].filename == __file__


def test_huge_weights_keep_their_direction() -> None:
    model = tiny_net()
    direction = model.conv1.weight.detach().clone()
    with torch.no_grad():
        model.conv1.weight.mul_(1e22)
    with pytest.warns(UserWarning, match="start at the edge"):
        hbnn_plugin.apply(model)
    mapped = model.conv1.weight.detach()
    assert torch.equal(mapped > 0, direction > 0)
    assert torch.nn.functional.cosine_similarity(mapped.flatten(1), direction.flatten(1)).min() > 0.9999


def test_models_can_be_copied_while_others_train() -> None:
    model, other = hbnn_plugin.apply(tiny_net(), rule="mobius"), hbnn_plugin.apply(tiny_net())
    stop, failures = threading.Event(), []

    def copying() -> None:
        try:
            while not stop.is_set():
                copy.deepcopy(other)
        except Exception as error:  # handed to the main thread
            failures.append(error)

    thread = threading.Thread(target=copying)
    thread.start()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(30):
        one_step(model, optimizer)
    stop.set()
    thread.join()
    assert not failures
    assert int(find(model.conv1)["weight"].steps) == 30


def test_an_optimizer_without_a_learning_rate_is_told_so() -> None:
    class NoRate(torch.optim.Optimizer):
        def __init__(self, params: object) -> None:
            super().__init__(params, {})  # type: ignore[arg-type]

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            pass

    model = hbnn_plugin.apply(tiny_net())
    with pytest.raises(RuntimeError, match=r"conv[12]: its weight's parameter group has no learning rate 'lr'"):
        one_step(model, NoRate(model.parameters()))


def test_options_that_would_be_ignored_are_refused() -> None:
    for options, message in (
        ({"rule": "riemannian-adam", "point_momentum": 0.9}, "momentum of its own"),
        ({"relative": "no"}, "relative must be True or False"),
        ({"where": "conv"}, "where must be callable"),
        ({"where": nn.Conv2d}, r"by_class\(Conv2d\), not the class"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            hbnn_plugin.apply(tiny_net(), **options)  # type: ignore[arg-type]


def test_a_decay_beyond_one_stops_at_the_origin() -> None:
    model = hbnn_plugin.apply(tiny_net(), point_decay=50.0)
    epc = find(model.conv1)["weight"]
    epc.point.fill_(0.1)
    one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.0)
    assert float(epc.point.abs().max()) == 0


def test_cluster_optimizers_step_the_points_themselves_and_take_fixed_ones() -> None:
    model = hbnn_plugin.apply(tiny_net(), rule="fixed")
    optimizer = hbnn_plugin.ClusterSGD(model.parameters(), lr=0.1)
    one_step(model, optimizer)
    assert int(find(model.conv1)["weight"].steps) == 0
    with pytest.raises(ValueError, match="point_lr must be a finite number"):
        hbnn_plugin.ClusterSGD(model.parameters(), lr=0.1, point_lr=float("nan"))


def test_broadcasting_and_half_precision_of_the_public_maps() -> None:
    p, v = torch.full((1, 4), 0.2), torch.randn(5, 4)
    assert torch.allclose(exp_map(p, v, 0.05), exp_map(p.expand(5, 4), v, 0.05))
    x = torch.full((1, 2), 3.14, dtype=torch.bfloat16)
    assert hbnn_plugin.mobius_add(x, -x, 0.05).abs().max() < 1e-5
    for f in (lambda t: hbnn_plugin.mobius_add(t, 0.1 * t, 0.05), lambda t: hbnn_plugin.mobius_scale(1.5, t, 0.05)):
        assert torch.equal(f(x), f(x.float()).to(torch.bfloat16))


def test_relus_of_a_real_valued_classifier_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(),
        nn.Linear(8, 2),
    )  # fmt: skip
    hbnn_plugin.apply(model, binarize="1/1")
    assert [type(m).__name__ for m in model if "Conv" not in type(m).__name__] == [
        "Hardtanh", "Hardtanh", "Flatten", "Linear", "ReLU", "Linear",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="binarized already"):
        hbnn_plugin.apply(model, binarize="1/1")
    hbnn_plugin.fuse(model)
    with pytest.raises(ValueError, match="found no binary convolution"):
        hbnn_plugin.apply(model)


class Rewriting(ScaledConv):
    """Writes its clipped weight back in every forward."""

    def binary_weight(self) -> torch.Tensor:
        self.weight.data = self.weight.data.clamp(-0.01, 0.01)
        return super().binary_weight()


def test_looking_at_a_host_that_rewrites_its_weight_changes_nothing() -> None:
    torch.manual_seed(0)
    model = TinyNet(Rewriting)
    before = model.conv1.weight.detach().clone()
    hbnn_plugin.apply(model)
    assert torch.allclose(model.conv1.weight, before, atol=1e-6)
    assert hbnn_plugin.flip_ratio(model).total == 0
    assert F.cosine_similarity(model.conv1.weight.flatten(1), before.flatten(1)).min() > 0.9999
