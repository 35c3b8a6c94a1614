"""apply and plan: what they take, what they refuse, and what they leave as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import SGD

import hbnn_plugin
from hbnn_plugin import by_class, by_name
from tiny_hosts import (
    BINARY_LAYERS,
    HOSTS,
    HardBinaryConv,
    HostConv,
    IrConv,
    RecuConv,
    ScaledConv,
    SimanConv,
    SimanZeroOneConv,
    TinyNet,
    batch,
    binary_bits,
    clusters,
    loss_of,
    same_state,
    state,
    ste_sign,
    tiny_net,
    train,
)


def layers_of(model: nn.Module, **options: Any) -> list[str]:
    return [layer.name for layer in hbnn_plugin.plan(model, **options).layers]


# -- selection --------


class LibraryConv(nn.Conv2d):
    """As timm's StdConv2d or torchvision's Conv2dNormActivation would look to the predicate."""


class OwnOfLibrary(LibraryConv):
    """A host's own class on top of it."""


class OwnLinear(nn.Linear):
    pass


class Scale(nn.Module):
    """Has a two-dimensional parameter, but convolves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table.mean()


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(LibraryConv, "__module__", "timm.layers.std_conv")
    inner = nn.Sequential(nn.Conv2d(2, 2, 1), IrConv(2, 2, 3), nn.BatchNorm2d(2))
    return nn.ModuleDict(
        {
            "plain": nn.Conv2d(2, 2, 3),
            "library": LibraryConv(2, 2, 3),
            "own": OwnOfLibrary(2, 2, 3),
            "hard": HardBinaryConv(2, 2),
            "inner": inner,
            "linear": OwnLinear(2, 2),
            "scale": Scale(),
            "transposed": nn.ConvTranspose2d(2, 2, 2),
            "embedding": nn.Embedding(3, 2),
        }
    )


def test_the_default_takes_convolutions_of_the_hosts_own_classes(zoo: nn.Module) -> None:
    assert layers_of(zoo) == ["own", "hard", "inner.1"]


def test_the_default_finds_layers_that_are_parametrized_already(zoo: nn.Module) -> None:
    register_parametrization(zoo["plain"], "weight", nn.Identity())
    assert layers_of(zoo) == ["own", "hard", "inner.1"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (by_name("inner"), ["inner.0", "inner.1"]),
        (by_name(r"^inner\.1$", "hard"), ["hard", "inner.1"]),
        (by_name("linear"), ["linear"]),
        (by_class(nn.Conv2d), ["plain", "library", "own", "inner.0", "inner.1"]),
        (by_class(HardBinaryConv, OwnLinear), ["hard", "linear"]),
        (lambda module, name: name.startswith("inner") and isinstance(module, IrConv), ["inner.1"]),
    ],
)
def test_predicates(zoo: nn.Module, where: Any, expected: list[str]) -> None:
    assert layers_of(zoo, where=where) == expected


@pytest.mark.parametrize(
    "options", [{}, {"space": "sphere", "per": "layer"}, {"binarize": "1/1", "where": by_name("stem")}]
)
def test_plan_prints_what_apply_would_do_and_changes_nothing(options: dict[str, Any]) -> None:
    net = tiny_net()
    before, classes, rng = state(net), [type(m) for m in net.modules()], torch.get_rng_state()
    hooks = [len(m._load_state_dict_pre_hooks) for m in net.modules()]
    made = hbnn_plugin.plan(net, **options)
    text = repr(made)
    names = ["stem"] if "binarize" in options else list(BINARY_LAYERS)
    assert [layer.name for layer in made.layers] == names
    assert len(made) == len(names)
    for layer in made.layers:
        row = next(line for line in text.splitlines() if line.startswith(layer.name))
        assert "×".join(map(str, layer.weight.shape)) in row
        assert row.split()[-1] == ("1" if options.get("per") == "layer" else str(layer.weight.shape[0]))
    assert same_state(state(net), before)
    assert [type(m) for m in net.modules()] == classes
    assert [len(m._load_state_dict_pre_hooks) for m in net.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), rng)


def test_apply_on_parts_one_after_the_other() -> None:
    net = tiny_net()
    hbnn_plugin.apply(net, where=by_name("conv1"), radius=0.2)
    hbnn_plugin.apply(net, where=by_name("conv2"), space="sphere")
    assert {n: epc.settings.space for n, epc in clusters(net).items()} == {"conv1": "ball", "conv2": "sphere"}
    train(net, SGD(net.parameters(), lr=0.1), 2)
    assert [int(epc.steps) for epc in clusters(net).values()] == [2, 2]
    assert [type(m) for m in hbnn_plugin.fuse(net).modules()] == [type(m) for m in tiny_net().modules()]


# -- bad input --------


def with_weight(weight: Tensor, **options: Any) -> TinyNet:
    net = tiny_net()
    net.conv2.weight = nn.Parameter(weight, **options)
    return net


def nan_net() -> TinyNet:
    net = tiny_net()
    net.conv1.weight.data[1, 2, 0, 0] = torch.nan
    net.conv2.weight.data[0, 0] = torch.inf
    return net


def meta_net() -> TinyNet:
    return tiny_net().to("meta")


def applied() -> TinyNet:
    return hbnn_plugin.apply(tiny_net())


def parametrized() -> TinyNet:
    net = tiny_net()
    nn.utils.parametrizations.weight_norm(net.conv2)
    return net


def zero_filter() -> TinyNet:
    net = tiny_net()
    net.conv2.weight.data[3] = 0
    return net


BAD = {
    "no binary convolution": (
        lambda: tiny_net(nn.Conv2d),
        {},
        ValueError,
        [r"TinyNet", r"3 Conv2d", r"by_name", r"binarize"],
    ),
    "nothing with weights": (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, ["no module with parameters"]),
    "not a module": (lambda: tiny_net().state_dict(), {}, TypeError, ["torch.nn.Module", "Dict"]),
    **{
        f"radius {value}": (tiny_net, {"radius": value}, ValueError, ["radius", str(value)])
        for value in (0, -1.0, float("nan"), float("inf"))
    },
    "radius no number": (tiny_net, {"radius": "0.1"}, TypeError, ["radius", "0.1"]),
    "space": (tiny_net, {"space": "torus"}, ValueError, ["space", "torus", "'ball', 'sphere'"]),
    "per": (tiny_net, {"per": "channel"}, ValueError, ["per", "channel", "'layer', 'filter'"]),
    "rule": (tiny_net, {"rule": "sgd"}, ValueError, ["rule", "sgd", "'mobius', 'riemannian'"]),
    "order": (tiny_net, {"order": "both"}, ValueError, ["order", "both", "'simultaneous', 'alternating'"]),
    "binarize": (tiny_net, {"binarize": "2/2"}, ValueError, ["binarize", "2/2", "'1/1'", "'1/32'"]),
    "start": (tiny_net, {"start": 1.5}, ValueError, ["start", "1.5"]),
    "start on the sphere": (tiny_net, {"space": "sphere", "start": 0.0}, ValueError, ["start", "sphere"]),
    "point_lr": (tiny_net, {"point_lr": -1.0}, ValueError, ["point_lr", "-1.0"]),
    "point_lr no number": (tiny_net, {"point_lr": None}, TypeError, ["point_lr", "None"]),
    "point_momentum": (tiny_net, {"point_momentum": 1.0}, ValueError, ["point_momentum", "below 1"]),
    "point_decay on the sphere": (
        tiny_net,
        {"space": "sphere", "point_decay": 0.1},
        ValueError,
        ["point_decay", "sphere"],
    ),
    "relative outside": (tiny_net, {"relative": True, "radius": 1.0}, ValueError, ["relative", "below 1", "1.0"]),
    "predicate that takes nothing": (
        tiny_net,
        {"where": by_name("layer9")},
        ValueError,
        [r"by_name\('layer9'\)", "2 IrConv"],
    ),
    "no weight": (
        tiny_net,
        {"where": by_class(nn.BatchNorm2d)},
        ValueError,
        [r"bn1 \(BatchNorm2d\)", r"bn2 .*no single weight of two dimensions"],
    ),
    "no parameters": (
        lambda: nn.Sequential(nn.ReLU()),
        {"where": by_class(nn.ReLU)},
        ValueError,
        [r"0 \(ReLU\)", "no parameter itself"],
    ),
    "integer": (
        lambda: with_weight(torch.ones(6, 5, 3, 3, dtype=torch.int8), requires_grad=False),
        {},
        ValueError,
        ["conv2", "int8", "floating"],
    ),
    "complex": (
        lambda: with_weight(torch.ones(6, 5, 3, 3, dtype=torch.cfloat)),
        {},
        ValueError,
        ["conv2", "complex64", "floating"],
    ),
    "empty": (
        lambda: with_weight(torch.ones(0, 5, 3, 3)),
        {},
        ValueError,
        ["conv2", r"empty \(shape \(0, 5, 3, 3\)\)"],
    ),
    "meta": (meta_net, {}, ValueError, ["conv1", "conv2", "meta device; materialize"]),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 3)),
        {"where": by_name("0")},
        ValueError,
        ["0 ", "not initialized", "run the lazy"],
    ),
    "NaN": (nan_net, {}, ValueError, [r"conv1 .* 1 non-finite", r"conv2 .* 9 non-finite", "re-initialize"]),
    "zero on the sphere": (zero_filter, {"space": "sphere"}, ValueError, ["conv2", "1 of its filters are zero"]),
    "applied before": (applied, {}, ValueError, ["conv1", "conv2", "called on it before", r"fuse\(model\)"]),
    "parametrized": (parametrized, {}, ValueError, ["conv2", "already parametrized by _WeightNorm", "remove"]),
    "DataParallel": (lambda: DataParallel(tiny_net()), {}, ValueError, ["DataParallel", "apply first, wrap"]),
    "DataParallel inside": (
        lambda: nn.Sequential(DataParallel(tiny_net())),
        {},
        ValueError,
        ["0 is wrapped in DataParallel"],
    ),
}


@pytest.mark.parametrize("function", [hbnn_plugin.plan, hbnn_plugin.apply])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_changes(case: str, function: Callable[..., Any]) -> None:
    build, options, error, fragments = BAD[case]
    model = build()
    modules = [] if isinstance(model, dict) else list(model.modules())
    classes = [type(m) for m in modules]
    before = state(model) if modules and case not in ("meta", "lazy") else {}
    with pytest.raises(error) as caught:
        function(model, **options)
    assert type(caught.value) is error
    for fragment in fragments:
        caught.match(f"(?s){fragment}")
    assert len(str(caught.value)) < 700
    if modules:
        assert list(model.modules()) == modules
        assert [type(m) for m in modules] == classes
        if before:
            assert same_state(state(model), before)


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_is_refused_around_and_works_afterwards() -> None:
    wrapped = DistributedDataParallel(tiny_net())
    with pytest.raises(ValueError, match=r"the model is wrapped in DistributedDataParallel.*apply first, wrap"):
        hbnn_plugin.apply(wrapped)
    assert not clusters(wrapped)
    reference, net = applied(), applied()
    parallel = DistributedDataParallel(net)
    train(reference, SGD(reference.parameters(), lr=0.1), 2)
    train(parallel, SGD(parallel.parameters(), lr=0.1), 2)
    assert same_state(state(net), state(reference))
    assert hbnn_plugin.flip_ratio(parallel).total == hbnn_plugin.flip_ratio(reference).total


@pytest.mark.parametrize("function", [hbnn_plugin.fuse, hbnn_plugin.flip_ratio, hbnn_plugin.cluster_report])
def test_a_model_that_was_never_applied_is_named(function: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"TinyNet has no exponential parametrization: call hbnn_plugin.apply\(model\) first"
    ):
        function(tiny_net())
    with pytest.raises(ValueError, match="TinyNet has no exponential parametrization"):
        function(hbnn_plugin.fuse(applied()))


# -- the weight right after apply --------


def scaled_to(net: nn.Module, norm: float) -> Any:
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (HostConv, HardBinaryConv)):
                w = next(p for p in layer.parameters() if p.ndim > 1)
                w.mul_(norm / w.norm())
    return net


OPTIONS = [
    {"space": space, "per": per, "relative": relative, **start}
    for space, per, relative in itertools.product(("ball", "sphere"), ("filter", "layer"), (False, True))
    for start in ([{}, {"start": 0.7}, {"start": 1.0}] if space == "ball" else [{}])
]


@pytest.mark.parametrize("norm", [0.1, 32.0])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("host", [*HOSTS, SimanZeroOneConv], ids=lambda h: h.__name__)
@pytest.mark.filterwarnings("ignore:.*start at the edge of the ball")
def test_binary_weights_are_what_they_were_right_after_apply(host: Any, options: dict[str, Any], norm: float) -> None:
    net = scaled_to(tiny_net(host), norm).eval()
    bits = list(binary_bits(net))
    weights = [next(p for p in layer.parameters() if p.ndim > 1).detach().clone() for layer in (net.conv1, net.conv2)]
    hbnn_plugin.apply(net, **options)
    assert len(bits) == 2
    for before, after in zip(bits, binary_bits(net)):
        assert torch.equal(before, after)
    for weight, epc in zip(weights, clusters(net).values()):
        now = epc(epc.latent).detach()
        assert F.cosine_similarity(now.flatten(), weight.flatten(), dim=0) > 0.98
        inside = options["space"] == "ball" and (norm == 0.1 or options["relative"])
        if inside or (options["space"] == "sphere" and options["relative"]):
            torch.testing.assert_close(now, weight, rtol=2e-4, atol=2e-6 * norm)


def test_weights_outside_the_ball_are_reported_with_the_mend() -> None:
    with pytest.warns(
        UserWarning, match=r"^2 point\(s\) of conv1, conv2 start at the edge.*4.47.*relative=True"
    ) as caught:
        hbnn_plugin.apply(scaled_to(tiny_net(), 32.0), per="layer")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    net = tiny_net()
    net.conv1.weight.data *= 100
    with pytest.warns(UserWarning, match=r"^5 point\(s\) of conv1 start at the edge"):
        hbnn_plugin.apply(net)


@pytest.mark.parametrize("per", ["filter", "layer"])
def test_relative_keeps_the_output_itself_of_a_pretrained_host(per: str) -> None:
    net = scaled_to(tiny_net(ScaledConv), 32.0)
    train(net, SGD(net.parameters(), lr=0.1), 2)
    net.eval()
    x, _ = batch(9, n=4)
    before = net(x)
    with pytest.warns(UserWarning, match="start at the edge"):
        shrunk = hbnn_plugin.apply(copy.deepcopy(net), per=per, radius=1.0)
    assert not torch.allclose(shrunk(x), before, rtol=1e-2)
    hbnn_plugin.apply(net, per=per, relative=True)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if not o["relative"]], ids=lambda o: "-".join(map(str, o.values()))
)
@pytest.mark.parametrize("trained", [False, True])
def test_an_assigned_weight_reads_back(options: dict[str, Any], trained: bool) -> None:
    net = hbnn_plugin.apply(scaled_to(tiny_net(), 1.0), **options)
    optimizer = SGD(net.parameters(), lr=0.1)
    if trained:
        train(net, optimizer, 2)
    latent = clusters(net)["conv1"].latent
    w = torch.randn(net.conv1.weight.shape)
    filters = (slice(None),) if options["per"] == "layer" else range(5)
    for f in filters:
        w[f] *= 0.4 / w[f].norm()
    if options["space"] == "ball":
        net.conv1.weight = w
        torch.testing.assert_close(net.conv1.weight.detach(), w, rtol=1e-4, atol=1e-6)
    else:
        for f in filters:
            w[f] /= w[f].norm()
        net.conv1.weight = w  # on the sphere
        torch.testing.assert_close(net.conv1.weight.detach(), w, rtol=1e-3, atol=1e-4)
    far = w * 50
    with pytest.warns(
        UserWarning, match=r"conv1: the assigned weight does not lie .* for \d of \d point.*direction is kept"
    ):
        net.conv1.weight = far
    for f in filters:
        assert F.cosine_similarity(net.conv1.weight[f].flatten(), far[f].flatten(), dim=0) > 1 - 1e-5
    assert clusters(net)["conv1"].latent is latent
    with pytest.raises(ValueError, match="conv1: the weight holds 1 non-finite"):
        net.conv1.weight = w.where(torch.arange(w.numel()).reshape(w.shape) != 7, torch.nan)
    with pytest.raises(ValueError, match=r"conv1: expected a weight of shape \(5, 4, 3, 3\), got \(2, 2\)"):
        net.conv1.weight = torch.ones(2, 2)


def test_messages_name_a_model_that_is_itself_the_layer() -> None:
    with pytest.warns(UserWarning, match=r"^1 point\(s\) of IrConv start"):
        hbnn_plugin.apply(scaled_to(IrConv(2, 1, 3), 10.0))
    layer = hbnn_plugin.apply(IrConv(2, 1, 3))
    with pytest.warns(UserWarning, match="^IrConv: the assigned weight"):
        layer.weight = torch.full((1, 2, 3, 3), 10.0)


# -- ties, shapes, dtypes --------


def tied_net(host: type[HostConv]) -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), host(4, 4, 3, padding=1), host(4, 4, 3, padding=1, bias=False), host(4, 4, 3, padding=1)
    )
    net[2].weight = net[1].weight
    return nn.Sequential(net, nn.Flatten(), nn.LazyLinear(4))


@pytest.mark.parametrize("host", [IrConv, RecuConv, SimanConv])
def test_tied_weights_share_their_point_train_and_fuse(host: type[HostConv]) -> None:
    net = tied_net(host)
    net(batch()[0])
    before = net(batch()[0])
    hbnn_plugin.apply(net)
    a, b, other = (net[0][i] for i in (1, 2, 3))
    assert torch.equal(net(batch()[0]), before)
    assert a.parametrizations.weight is b.parametrizations.weight
    assert a.parametrizations.weight is not other.parametrizations.weight
    parameter = a.parametrizations.weight.original
    optimizer = SGD(net.parameters(), lr=1e-3)
    for seed in range(2):
        optimizer.zero_grad()
        x, y = batch(seed)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert torch.equal(a.weight, b.weight)
    assert int(a.parametrizations.weight[0].steps) == 2
    assert all(epc.point.flatten(1).any(1).all() for epc in clusters(net).values())
    assert len(hbnn_plugin.flip_ratio(net)) == 3
    x = batch(5)[0]
    trained = net(x)
    plain = tied_net(host)
    plain(x)
    plain.load_state_dict(hbnn_plugin.plain_state_dict(net.state_dict()))
    assert torch.equal(plain(x), trained)
    twin = hbnn_plugin.fuse(copy.deepcopy(net))
    assert torch.equal(twin(x), trained)
    hbnn_plugin.fuse(net)
    assert a.weight is b.weight is parameter
    assert type(a) is type(b) is host
    assert torch.equal(net(x), trained)


class SignLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.detach().abs().mean(1, keepdim=True) * ste_sign(self.weight), self.bias)


class SignConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(
            x, self.weight.detach().abs().mean((1, 2), keepdim=True) * ste_sign(self.weight), self.bias
        )


class SignConv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, ste_sign(self.weight), self.bias)


class SignTransposed(nn.ConvTranspose2d):
    """Scaled for each output channel."""

    def forward(self, x: Tensor) -> Tensor:
        by_group = self.weight.unflatten(0, (self.groups, -1))
        scale = by_group.detach().abs().mean((1, 3, 4), keepdim=True)
        w = (scale * ste_sign(by_group)).flatten(0, 1)
        return F.conv_transpose2d(x, w, self.bias, self.stride, self.padding, 0, self.groups)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: SignLinear(6, 4), (2, 6), 4),
    "1-D": (lambda: SignConv1d(4, 6, 3), (2, 4, 7), 6),
    "1-D dilated": (lambda: SignConv1d(4, 6, 3, dilation=2), (2, 4, 9), 6),
    "3-D": (lambda: SignConv3d(2, 3, 2), (2, 2, 4, 4, 4), 3),
    "grouped": (lambda: ScaledConv(4, 6, 3, groups=2), (2, 4, 5, 5), 6),
    "depthwise": (lambda: ScaledConv(4, 4, 3, groups=4), (2, 4, 5, 5), 4),
    "pointwise": (lambda: ScaledConv(4, 6, 1), (2, 4, 5, 5), 6),
    "reflected": (lambda: ScaledConv(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5), 6),
    "flat": (lambda: HardBinaryConv(4, 6), (2, 4, 5, 5), 6),
    "transposed": (lambda: SignTransposed(4, 6, 3), (2, 4, 5, 5), 6),
    "transposed, grouped": (lambda: SignTransposed(4, 6, 3, groups=2), (2, 4, 5, 5), 6),
}


@pytest.mark.parametrize(
    "options", [{}, {"relative": True, "rule": "riemannian"}, {"space": "sphere"}], ids=["ball", "relative", "sphere"]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_has_a_point_for_each_output_unit(kind: str, options: dict[str, Any]) -> None:
    build, shape, units = LAYERS[kind]
    torch.manual_seed(0)
    layer = build()
    x = torch.rand(shape) + 0.5
    weight = next(p for p in layer.parameters() if p.ndim > 1)
    w = weight.detach().clone()
    expected = []
    for unit in range(units):
        y = layer(x)
        y = y[:, unit] if y.ndim == 2 else y.movedim(1, 0)[unit]
        (used,) = torch.autograd.grad(y.sum(), weight)
        expected.append(w[used != 0].norm())
    assert sum(e.square() for e in expected) == pytest.approx(float(w.square().sum()), rel=1e-5)
    before, keys, cls = layer(x), list(layer.state_dict()), type(layer)
    hbnn_plugin.apply(layer, where=by_class(cls), **options)
    (epc,) = clusters(layer).values()
    assert epc.points == units
    if epc.scale is not None:
        torch.testing.assert_close(epc.scale.flatten(), torch.stack(expected))
        torch.testing.assert_close(layer(x), before)
    optimizer = SGD(layer.parameters(), lr=0.1)
    start = epc.point.clone()
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) * torch.linspace(-1, 1, before.numel()).reshape(before.shape)).sum().backward()
        optimizer.step()
    assert not torch.equal(epc.point, start)
    assert epc.point.isfinite().all()
    trained = layer(x)
    hbnn_plugin.fuse(layer)
    assert torch.equal(layer(x), trained)
    assert list(layer.state_dict()) == keys
    assert type(layer) is cls
    assert next(p for p in layer.parameters() if p.ndim > 1) is weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_points_are_float32_or_better(dtype: torch.dtype) -> None:
    net = hbnn_plugin.apply(tiny_net(dtype=dtype))
    assert {epc.point.dtype for epc in clusters(net).values()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    train(net, SGD(net.parameters(), lr=0.1), 2)
    assert all(epc.point.any() for epc in clusters(net).values())
    assert net.conv1.weight.dtype == dtype
    assert loss_of(net).isfinite()
