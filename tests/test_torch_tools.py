"""torch's own tools on an applied model: compile, functional_call, vmap, export, autocast, deepcopy."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import hbnn_plugin
from hbnn_plugin.cluster import find
from tiny_hosts import IrConv, ScaledConv, SmoothConv, TinyNet


def applied(conv_class: type = IrConv, **options: object) -> TinyNet:
    torch.manual_seed(0)
    return hbnn_plugin.apply(TinyNet(conv_class), **options)  # type: ignore[arg-type]


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 6, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)


@pytest.mark.parametrize("options", [{}, {"per": "layer", "relative": True}, {"space": "sphere"}])
def test_a_compiled_model_trains_as_the_eager_one_in_one_graph(options: dict[str, object]) -> None:
    x, y = batch()
    results = []
    for compiled in (False, True):
        model = applied(ScaledConv, **options)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(run(x), y).backward()
            optimizer.step()
        results.append({k: v for k, v in model.state_dict().items() if v.is_floating_point()})
    for key, value in results[0].items():
        assert torch.allclose(value, results[1][key], rtol=1e-4, atol=1e-5), key
    moved = find(model.conv1)["weight"]
    assert int(moved.steps) == 2


@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_functional_call_and_vmap_over_an_ensemble_of_latents() -> None:
    model = applied(SmoothConv).eval()
    x, _ = batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers()}
    assert torch.equal(torch.func.functional_call(model, {**parameters, **buffers}, (x,)), model(x))
    shifted = {name: torch.stack([p, 1.1 * p, p + 0.01]) for name, p in parameters.items()}

    def forward(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, {**parameters, **buffers}, (x,))

    ensemble = torch.func.vmap(forward)(shifted)
    for i in range(3):
        assert torch.allclose(ensemble[i], forward({n: p[i] for n, p in shifted.items()}), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_per_sample_gradients_of_latents() -> None:
    model = applied(SmoothConv).eval()
    x, y = batch(4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(each[name].mean(0), parameter.grad, rtol=1e-3, atol=1e-6), name


def test_a_fused_model_exports() -> None:
    model = applied().eval()
    hbnn_plugin.fuse(model)
    x, _ = batch()
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-5)


def test_an_applied_model_exports() -> None:
    model = applied(ScaledConv).eval()
    x, _ = batch()
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-5)


def test_autocast_leaves_the_map_in_float32() -> None:
    model = applied()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.conv1.weight, applied().conv1.weight)
        assert model.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_points_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = hbnn_plugin.apply(TinyNet(IrConv).to(dtype))
    epc = find(model.conv1)["weight"]
    assert model.conv1.weight.dtype == dtype
    assert epc.point.dtype == torch.float32
    latent = epc.parameter
    latent.grad = torch.full_like(latent, 0.01)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert float(epc.point.abs().max()) > 0
    assert bool(epc.point.isfinite().all())


def test_moving_to_another_dtype_keeps_training() -> None:
    model = applied(ScaledConv).double()
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    F.cross_entropy(model(x.double()), y).backward()
    optimizer.step()
    assert find(model.conv1)["weight"].point.dtype == torch.float64
    assert int(find(model.conv1)["weight"].steps) == 1


def test_channels_last_changes_nothing() -> None:
    x, y = batch()
    points = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = applied(ScaledConv).to(memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        points.append(find(model.conv2)["weight"].point)
    assert torch.allclose(points[0], points[1], atol=1e-6)


def test_a_deepcopy_shares_nothing() -> None:
    model = applied(ScaledConv)
    other = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = batch()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    F.cross_entropy(other(x), y).backward()
    optimizer.step()
    assert float(find(other.conv1)["weight"].point.abs().max()) > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
