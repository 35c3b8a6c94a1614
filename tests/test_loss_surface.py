"""The loss around a network in filter-normalised random directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from images import Images
from reproduction.loss_surface import axis, loss_surface


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()


def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(20) % 10, (0.5,) * 3, (0.25,) * 3)


def test_the_middle_is_the_network_and_it_stays_as_it_was() -> None:
    model, data = network(), images()
    before = [p.clone() for p in model.parameters()]
    rows: list[int] = []
    surface = loss_surface(model, data, 3, 1.0, row_done=lambda: rows.append(1))
    batch, labels = next(data.batches(20))
    assert abs(surface[1][1] - F.cross_entropy(model(batch), labels).item()) < 1e-6
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert len(rows) == 3
    assert min(min(row) for row in surface) > 0
    assert axis(3, 1.0) == [-1.0, 0.0, 1.0]


def test_a_network_of_other_scale_and_equal_function_has_the_same_surface() -> None:
    """Why directions are normalised by filter: ReLU lets a factor move from one layer into the next."""
    model, data = network(), images()
    surface = torch.tensor(loss_surface(model, data, 3, 0.5))
    with torch.no_grad():
        model[0].weight.mul_(7)
        model[3].weight.div_(7)
    torch.testing.assert_close(torch.tensor(loss_surface(model, data, 3, 0.5)), surface, rtol=1e-4, atol=1e-5)


def test_scales_a_channel_stay() -> None:
    seen: set[tuple[float, ...]] = set()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            seen.add(tuple(self.scale.flatten().tolist()))
            return x * self.scale

    model = network()
    model.insert(1, Scaled())
    loss_surface(model, images(), 3, 0.5)
    assert len(seen) == 1


def test_other_directions_by_other_seeds() -> None:
    model, data = network(), images()
    first, again, other = (torch.tensor(loss_surface(model, data, 3, 0.5, seed)) for seed in (0, 0, 7))
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], other[0])
