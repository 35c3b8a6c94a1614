"""In in-place mode: latents into the hosts' weights as an optimizer's step begins, and out as it ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..geometry.joint_maps import exp_maps, pull_back
from ..geometry.looking import recorded
from ..host.sharding import sharded_like, whole
from .inplace import InPlace

__all__ = ["enter", "leave"]

T = TypeVar("T")


@torch.no_grad()
def enter(clusters: Sequence[InPlace]) -> None:
    """Put the latents and their gradients into the hosts' weights."""
    clusters = [epc for epc in clusters if not epc.swapped]
    for epc in clusters:
        epc.check_shape()
    _honour_edits(clusters)
    moving = [(epc, grad) for epc in clusters if (grad := epc.parameter.grad) is not None]
    maps = [epc.map_of(epc.latent) for epc, _ in moving]
    gradients = [epc.logical(whole(grad)).to(of.latent.dtype) for (epc, grad), of in zip(moving, maps)]
    pulled = pull_back(maps, gradients)
    try:
        for (epc, upstream), latent_grad in zip(moving, pulled):
            epc.upstream, epc.unmapped = upstream, True
            epc.parameter.grad = sharded_like(latent_grad.reshape(epc.latent.shape).to(upstream.dtype), upstream)
        for epc in clusters:
            epc.unmapped = True
            epc.parameter.copy_(sharded_like(epc.latent, epc.parameter))
            epc.swapped, epc.unmapped = True, False
    except BaseException:
        leave(clusters)
        raise


def leave(clusters: Sequence[InPlace]) -> None:
    """Take the latents out of the hosts' weights, and write the mapped weights there.

    An interrupt, or memory that runs out, leaves no weight half-way: what remained to be done is done then, or at the
    latest as the next step begins.
    """
    try:
        _leave(clusters)
    except BaseException:
        for epc in clusters:
            _leave([epc])
        raise


@torch.no_grad()
def _leave(clusters: Sequence[InPlace]) -> None:
    for epc in clusters:
        if epc.swapped:
            epc.latent.copy_(whole(epc.parameter))
            epc.unmapped, epc.swapped = True, False
    clusters = [epc for epc in clusters if epc.unmapped]
    if not clusters:
        return
    _give_gradients_back(clusters)
    maps = [epc.map_of(epc.latent) for epc in clusters]
    memory = [epc.memory(of) for epc, of in zip(clusters, maps)]
    exp_maps(maps, memory)
    for epc, mapped in zip(clusters, memory):
        weight = epc.parameter
        if mapped.data_ptr() != weight.data_ptr():
            weight.copy_(sharded_like(mapped.reshape(epc.latent.shape).to(weight.dtype), weight))
        epc.written, epc.unmapped = epc.fingerprint(), False


def _give_gradients_back(clusters: Sequence[InPlace]) -> None:
    """Put the gradients of the hosts' weights where those of the latents are."""
    left = [(epc, epc.upstream, grad) for epc in clusters if (grad := epc.parameter.grad) is not None]
    stepped = [(epc, upstream, grad) for epc, upstream, grad in left if upstream is not None]
    for _, upstream, _ in _chosen(stepped, [~whole(grad).any() for *_, grad in stepped]):
        upstream.zero_()  # as the step has cleared its own
    for epc, upstream, _ in stepped:
        epc.parameter.grad = upstream
    for epc in clusters:
        epc.upstream = None


def _honour_edits(clusters: Sequence[InPlace]) -> None:
    """Take what the hosts did to their weights into the latents, through the inverse map, and only where they did."""
    left = [(epc, epc.written) for epc in clusters if epc.written is not None]
    untouched = {epc for epc, _ in _chosen(left, [(written == epc.fingerprint()).all() for epc, written in left])}
    edits = [(epc, epc.edits()) for epc in clusters if epc not in untouched]
    honoured = [(epc, epc.honour(where)) for epc, where in _chosen(edits, [where.any() for _, where in edits])]
    to_warn = [(epc, outside) for epc, outside in honoured if epc.may_warn]
    lost = _chosen(to_warn, [outside.any() for _, outside in to_warn])
    if lost:
        where = ", ".join(f"{epc.name} ({int(outside.sum())} of {epc.point_count} points)" for epc, outside in lost)
        warnings.warn(
            f"the host moved its weight out of the ball in {where}; its direction is kept and its length is not. A "
            "smaller radius, or apply(..., relative=True), would keep both.",
            stacklevel=2,
        )
        for epc, _ in lost:
            epc.may_warn = False


def _chosen(items: Sequence[T], flags: Iterable[Tensor]) -> list[T]:
    """The items whose flag, one bool each, is True; where looking at values means waiting, one wait for all."""
    flags = list(flags)
    if flags and recorded():
        raise RuntimeError(
            "in-place mode looks at values in the optimizer's step, which a CUDA graph cannot record: let it record "
            "forward and backward alone, or apply with mode='parametrize'"
        )
    values = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return [item for item, value in zip(items, values, strict=True) if value]
