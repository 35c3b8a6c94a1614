"""A training loop with moving points that shares no code with the plugin: geoopt's manifolds and torch's autograd."""

from __future__ import annotations

import geoopt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.999), 1e-8
SPECTRAL_DECAY = 0.02


def newton_schulz(matrix: Tensor) -> Tensor:
    """Muon's orthogonalization as it is usually written: five steps on the whole matrix."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def spectral_step(
    manifold: geoopt.Manifold, point: Tensor, step: Tensor, momentum: Tensor, eta: float, scale: float
) -> Tensor:
    """Decay in the ball, then the step; the momentum as it is at the new point."""
    if isinstance(manifold, geoopt.PoincareBall):
        kept = torch.tensor(1 - eta * SPECTRAL_DECAY, dtype=torch.float64)
        point.copy_(manifold.mobius_add(manifold.mobius_scalar_mul(kept, point), step))
        return momentum
    at = scale * point
    new = manifold.expmap(at, manifold.proju(at, scale * step))
    point.copy_(new / scale)
    return manifold.proju(new, momentum)


def train_with_geoopt(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    space: str,
    per: str,
    rule: str,
    radius: float,
    point_momentum: float,
    lr: float,
    point_lr: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """SGD (momentum .9, decay 5e-4, cosine) on latents and the rest, the named rule on points; latents and points."""
    names = ("conv1.weight", "conv2.weight")
    weights = dict(model.named_parameters())
    root = radius**0.5
    if space == "ball":
        manifold = geoopt.PoincareBallExact(c=torch.tensor(radius, dtype=torch.float64))
    else:
        manifold = geoopt.SphereExact()  # of radius 1: points and steps are scaled by root
    points, latents = [], []
    for name in names:
        weight = weights[name].detach()
        weight = weight.reshape(len(weight) if per == "filter" else 1, -1)
        if space == "ball":
            point = torch.zeros_like(weight)
            latent = manifold.logmap(point, weight)
        else:
            point = weight / weight.norm(dim=1, keepdim=True) / root
            latent = torch.zeros_like(weight)
        points.append(point.requires_grad_())
        latents.append(latent.requires_grad_())

    def exp(point: Tensor, latent: Tensor) -> Tensor:
        if space == "ball":
            return manifold.expmap(point, latent)
        tangent = root * manifold.proju(root * point, latent)
        squared = (tangent * tangent).sum(1, keepdim=True)
        angle = torch.where(squared > 0, squared, 1e-30).sqrt()
        return (torch.cos(angle) * root * point + torch.sin(angle) / angle * tangent) / root

    rest = [p for n, p in model.named_parameters() if n not in names]
    optimizer = torch.optim.SGD([*latents, *rest], lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(images))
    momenta = [torch.zeros_like(p) for p in points]
    squares = [torch.zeros(p.shape[0], 1, dtype=p.dtype) for p in points]
    for step, (x, y) in enumerate(zip(images, labels, strict=True), start=1):
        mapped = {n: exp(p, v).reshape(weights[n].shape) for n, p, v in zip(names, points, latents, strict=True)}
        optimizer.zero_grad()
        for point in points:
            point.grad = None
        F.cross_entropy(torch.func.functional_call(model, mapped, (x,)), y).backward()
        eta = optimizer.param_groups[0]["lr"] ** (0.75 if rule == "spectral" else 1) * point_lr
        optimizer.step()
        scheduler.step()
        if rule == "fixed":
            continue
        scale = 1.0 if space == "ball" else root
        for i, point in enumerate(points):
            with torch.no_grad():
                at = point * scale
                rgrad = manifold.egrad2rgrad(at, point.grad)
                if rule == "riemannian-adam":
                    momenta[i] = BETAS[0] * momenta[i] + (1 - BETAS[0]) * rgrad
                    norm = manifold.inner(at, rgrad, keepdim=True)
                    squares[i] = BETAS[1] * squares[i] + (1 - BETAS[1]) * norm
                    denominator = (squares[i] / (1 - BETAS[1] ** step)).sqrt() + EPS
                    direction = momenta[i] / (1 - BETAS[0] ** step) / denominator
                elif rule == "mobius" and space == "ball":
                    momenta[i] = point_momentum * momenta[i] + point.grad
                    backward = manifold.mobius_scalar_mul(torch.tensor(-eta, dtype=torch.float64), momenta[i])
                    point.copy_(manifold.mobius_add(point, backward))
                    continue
                elif rule == "spectral":
                    gradient = point.grad if space == "ball" else rgrad
                    momenta[i] = point_momentum * momenta[i] + gradient
                    ahead = (gradient + point_momentum * momenta[i]).reshape(len(weights[names[i]]), -1)
                    step_back = -eta * newton_schulz(ahead).reshape(point.shape)
                    momenta[i] = spectral_step(manifold, point, step_back, momenta[i], eta, scale)
                    continue
                else:
                    momenta[i] = point_momentum * momenta[i] + rgrad
                    direction = momenta[i]
                new, momenta[i] = manifold.retr_transp(at, -eta * scale * direction, momenta[i])
                point.copy_(new / scale)
    return [v.detach() for v in latents], [p.detach() for p in points]
