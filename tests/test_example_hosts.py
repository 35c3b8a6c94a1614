"""Every host against its formulas, written once more in scalars: those of IR-Net, ReCU and SiMaN in scalar_hosts.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hbnn_plugin
from hosts import HOSTS, binary_layers, binaryconnect, get_host, mdtanh, plain, siman
from hosts.common import BinaryConv
from hosts.networks import ResNet, resnet8
from scalar_hosts import SCALAR_HOSTS, Row, libra_exponent, product, s, transposed

NAMES = ("plain", "binaryconnect", "mdtanh")
BINARY_LAYERS = [f"stages.{i}.0.conv{j}" for i in range(3) for j in (1, 2)]

each_host = pytest.mark.parametrize("name", NAMES)
two_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

# Quarters are exact in float32, and 0 and ±1, where estimators turn, are among them.
quarters = st.integers(-8, 8).map(lambda n: n / 4)
INPUTS = 3
filters = st.lists(st.lists(quarters, min_size=INPUTS, max_size=INPUTS), min_size=2, max_size=2)
inputs = st.lists(quarters, min_size=INPUTS, max_size=INPUTS)
upstream = st.lists(quarters, min_size=2, max_size=2)

# Two channels of 2 × 2: the mean of eight quarters is exact as well, so ties are ties in any order of summation.
blocks = st.lists(quarters, min_size=8, max_size=8).filter(lambda row: len(set(row)) > 1)
# No number at the mean, which group_norm may round to either side of zero, where the sign turns.
samples = blocks.filter(lambda row: math.fsum(row) / 8 not in row)


def two(rows: st.SearchStrategy[Row]) -> st.SearchStrategy[list[Row]]:
    return st.lists(rows, min_size=2, max_size=2)


def passes(x: float) -> float:
    return 1.0 if abs(x) <= 1 else 0.0


def pointwise(
    layer: BinaryConv, w: list[list[float]], x: list[float], r: list[float]
) -> tuple[list[float], list[list[float]], list[float]]:
    """Output y of a 1 × 1 convolution of one pixel, and the gradients of Σ r·y to weight and input."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w)[:, :, None, None])
    pixel = torch.tensor(x).view(1, -1, 1, 1).requires_grad_()
    y = layer(pixel).flatten()
    (y * torch.tensor(r)).sum().backward()
    assert layer.weight.grad is not None and pixel.grad is not None
    return y.tolist(), layer.weight.grad.flatten(1).tolist(), pixel.grad.flatten().tolist()


def close(found: list[float], expected: Iterator[float]) -> None:
    assert found == pytest.approx(list(expected), rel=1e-5, abs=1e-6)


def near(found: Tensor | None, expected: list[Row]) -> None:
    """As `close`, for what is float64."""
    assert found is not None
    torch.testing.assert_close(
        found.detach().flatten(1), torch.tensor(expected, dtype=torch.double), rtol=1e-9, atol=1e-9
    )


# -- forward and pseudo-gradient --------


@given(filters, inputs, upstream)
def test_plain(w: list[list[float]], x: list[float], r: list[float]) -> None:
    y, dw, dx = pointwise(plain.BinaryConv2d(INPUTS, 2, 1), w, x, r)
    alpha = [sum(abs(v) for v in row) / INPUTS for row in w]
    close(y, (a * sum(s(v) * s(xi) for v, xi in zip(row, x)) for a, row in zip(alpha, w)))
    for found, row, a, ro in zip(dw, w, alpha, r):
        close(found, (ro * s(xi) * a * passes(v) for v, xi in zip(row, x)))
    close(dx, (passes(x[i]) * sum(ro * a * s(row[i]) for ro, a, row in zip(r, alpha, w)) for i in range(INPUTS)))


@given(filters, inputs, upstream)
def test_binaryconnect(w: list[list[float]], x: list[float], r: list[float]) -> None:
    y, dw, dx = pointwise(binaryconnect.BinaryConv2d(INPUTS, 2, 1), w, x, r)
    close(y, (sum(s(v) * xi for v, xi in zip(row, x)) for row in w))
    for found, row, ro in zip(dw, w, r):
        close(found, (ro * xi * passes(v) for v, xi in zip(row, x)))
    close(dx, (sum(ro * s(row[i]) for ro, row in zip(r, w)) for i in range(INPUTS)))


@given(filters, inputs, upstream, st.floats(0, 1), st.booleans())
def test_mdtanh(w: list[list[float]], x: list[float], r: list[float], progress: float, training: bool) -> None:
    layer = mdtanh.BinaryConv2d(INPUTS, 2, 1).train(training)
    mdtanh.set_progress(layer, progress)
    beta = math.exp(progress * math.log(10_000))
    primal = [[math.tanh(beta * v) if training else s(v) for v in row] for row in w]
    y, dw, dx = pointwise(layer, w, x, r)
    close(y, (sum(p * xi for p, xi in zip(row, x)) for row in primal))
    for found, ro in zip(dw, r):
        close(found, (ro * xi for xi in x))  # the identity, however far tanh saturates
    close(dx, (sum(ro * row[i] for ro, row in zip(r, primal)) for i in range(INPUTS)))


@pytest.mark.parametrize("name", sorted(SCALAR_HOSTS))
@settings(deadline=None)
@given(two(blocks), two(samples), two(upstream), upstream, st.sampled_from([0, 0.25, 0.5, 0.75, 1]), st.booleans())
def test_irnet_recu_and_siman(
    name: str, w: list[Row], x: list[Row], r: list[Row], scale: Row, progress: float, training: bool
) -> None:
    """Two filters, since ReCU and SiMaN clip by layer, and two samples, since they standardize each by itself."""
    host = SCALAR_HOSTS[name]
    # A half would be rounded up or down by the last bit.
    assume(name != "irnet" or all(abs(libra_exponent(row) % 1 - 0.5) > 1e-9 for row in w))
    layer = HOSTS[name].conv(2, 2, 2).double().train(training)
    HOSTS[name].set_progress(layer, progress)
    assert isinstance(layer, BinaryConv)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w).view(2, 2, 2, 2))
        if host.learns_scale:
            layer.scale.copy_(torch.tensor(scale).view(2, 1, 1))
    images = torch.tensor(x, dtype=torch.double).view(2, 2, 2, 2).requires_grad_()
    y = layer(images)
    y.flatten(1).mul(torch.tensor(r)).sum().backward()

    binary_w, binary_x = host.weight(w, progress), host.activation(x, progress, training)
    c = scale if host.learns_scale else [1.0, 1.0]
    sums = product(binary_x.values, transposed(binary_w.values))
    g = [[ro * co for ro, co in zip(row, c)] for row in r]  # of Σ r·y to these sums
    near(layer.binary_weight(), binary_w.values)
    near(y, [[co * total for co, total in zip(c, row)] for row in sums])
    near(layer.weight.grad, binary_w.pull(product(transposed(g), binary_x.values)))
    near(images.grad, binary_x.pull(product(g, binary_w.values)))
    if host.learns_scale:
        near(layer.scale.grad, [[sum(r[i][o] * sums[i][o] for i in (0, 1))] for o in (0, 1)])


@pytest.mark.parametrize("name", sorted(HOSTS))
@two_modes
def test_binary_weight_is_what_forward_convolves_with(name: str, training: bool) -> None:
    """With stride, padding and bias; what is padded is zero, also behind the sign of a 1/1 host."""
    torch.manual_seed(0)
    layer = HOSTS[name].conv(3, 4, 3, stride=2, padding=1, bias=True).train(training)
    assert isinstance(layer, BinaryConv) and layer.bias is not None
    x = torch.randn(2, 3, 7, 7)
    seen = x - x.mean((1, 2, 3), keepdim=True) if name == "siman" else x
    if name not in ("binaryconnect", "mdtanh"):
        seen = torch.where(seen >= 0, 1.0, -1.0)
    expected = F.conv2d(F.pad(seen, (1, 1, 1, 1)), layer.binary_weight(), layer.bias, stride=2)
    assert torch.allclose(layer(x), expected * getattr(layer, "scale", 1), atol=1e-5)
    if name in NAMES:
        assert torch.equal(layer.binary_weight() > 0, layer.weight > 0)  # what FlipMeter compares


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_a_layer_compiles_in_one_graph_to_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    layer, x, upstream = HOSTS[name].conv(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    HOSTS[name].set_progress(layer, 0.5)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        pixels = x.clone().requires_grad_()
        y = run(pixels)
        results.append((y, *torch.autograd.grad(y, [pixels, *layer.parameters()], upstream)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# -- schedules --------


@pytest.mark.parametrize("name", ["plain", "binaryconnect"])
def test_hosts_without_a_schedule_keep_their_state(name: str) -> None:
    net = resnet8(HOSTS[name].conv, width=4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    HOSTS[name].set_progress(net, 0.7)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "arch", "buffer", "values"),
    [
        ("irnet", "resnet8", "t", (1e-3, 1e-1, 10)),
        ("irnet", "resnet8", "k", (1e3, 10, 1)),
        ("irnet", "vgg_small", "t", (0.1, 1, 10)),
        ("irnet", "vgg_small", "k", (10, 1, 1)),
        ("recu", "resnet8", "tau", (0.85, 0.85 + 0.14 / (math.sqrt(math.e) + 1), 0.99)),
        ("siman", "resnet8", "percent", (15, 7.5, 0)),
    ],
)
def test_schedules(name: str, arch: str, buffer: str, values: tuple[float, float, float]) -> None:
    host = get_host(name, arch)
    net = resnet8(host.conv, width=4)
    for progress, value in zip((0, 0.5, 1), values):
        host.set_progress(net, progress)
        found = [float(layer.get_buffer(buffer)) for _, layer in binary_layers(net)]
        assert found == pytest.approx([value] * len(BINARY_LAYERS))


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_a_layer_begins_where_its_schedule_does(name: str) -> None:
    layer = HOSTS[name].conv(3, 4, 3)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    HOSTS[name].set_progress(layer, 0)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[key])


def test_mdtanh_goes_from_the_latent_weight_to_its_sign() -> None:
    torch.manual_seed(0)
    net = resnet8(mdtanh.BinaryConv2d, width=4)
    shares = []
    for progress, beta in ((0.0, 1.0), (0.25, 10.0), (0.5, 100.0), (1.0, 10_000.0)):
        mdtanh.set_progress(net, progress)
        layers = [layer for _, layer in binary_layers(net)]
        assert [float(layer.get_buffer("beta")) for layer in layers] == pytest.approx([beta] * len(BINARY_LAYERS))
        weights = torch.cat([layer.binary_weight().flatten() for layer in layers])
        shares.append(float((weights.abs() > 0.99).float().mean()))
    assert shares == sorted(shares)
    assert shares[0] < 0.01
    assert shares[-1] > 0.99


def test_siman_scales_start_at_the_mean_magnitude_of_the_weights_that_the_network_drew() -> None:
    for _, layer in binary_layers(resnet8(siman.BinaryConv2d)):
        torch.testing.assert_close(layer.scale.flatten(), layer.weight.abs().mean((1, 2, 3)))


def test_mdtanh_keeps_beta_in_checkpoints() -> None:
    net = resnet8(mdtanh.BinaryConv2d, width=4)
    mdtanh.set_progress(net, 0.5)
    copy = resnet8(mdtanh.BinaryConv2d, width=4)
    copy.load_state_dict(net.state_dict())
    for (_, old), (_, new) in zip(binary_layers(net), binary_layers(copy)):
        assert float(new.get_buffer("beta")) == pytest.approx(100)
        assert torch.equal(old.binary_weight(), new.binary_weight())


# -- in a network, with HBNN --------


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 3, 8, 8, dtype=torch.double, generator=generator), torch.randint(
        0, 10, (32,), generator=generator
    )


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Steps on one batch; the loss before each."""
    images, labels = batch()
    net.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def network(name: str) -> ResNet:
    """Halfway through its schedule; in float64, where no activation is so close to zero that rounding turns it."""
    torch.manual_seed(0)
    net = resnet8(HOSTS[name].conv, width=8).double()
    HOSTS[name].set_progress(net, 0.5)
    return net


@two_modes
@each_host
def test_apply_and_fuse_keep_outputs(name: str, training: bool) -> None:
    net = network(name)
    images, _ = batch()
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 2)  # a BatchNorm that does nothing leaves zeros to the sign
    bare = net.train(training)(images)
    hbnn_plugin.apply(net)  # warnings are errors here
    assert [n for n, m in net.named_modules() if hasattr(m, "parametrizations")] == BINARY_LAYERS
    assert torch.allclose(net(images), bare)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 2)
    assert all(layer.reach > 0 for layer in hbnn_plugin.cluster_report(net).values())
    trained = net.train(training)(images)
    assert not torch.allclose(trained, bare)
    hbnn_plugin.fuse(net)
    assert {type(layer) for _, layer in binary_layers(net)} == {HOSTS[name].conv}
    assert torch.allclose(net(images), trained)


@each_host
def test_latent_weights_alone_reduce_the_loss(name: str) -> None:
    net = network(name)
    latent = [layer.weight for _, layer in binary_layers(net)]
    losses = train(net, torch.optim.SGD(latent, lr=0.1, momentum=0.9), 40)
    assert losses[-1] < 0.5 * losses[0]
