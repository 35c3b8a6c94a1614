"""Latents of which FSDP gave each rank a shard. Points are whole on every rank, and move there alike."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["is_sharded", "sharded_like", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a torch.distributed DTensor."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its shards: a point needs its whole filter."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, in shards as ``like`` is."""
    if not is_sharded(like):
        return tensor
    try:  # here, since not every torch is built with it
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415
    except ImportError:  # torch < 2.5
        from torch.distributed._tensor import distribute_tensor  # type: ignore[attr-defined]  # noqa: PLC0415
    shared: Tensor = distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return shared
