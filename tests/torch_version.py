"""Tests of what torch itself can do only since some version."""

from __future__ import annotations

import pytest
import torch

__all__ = ["TORCH", "since"]

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def since(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Skip where torch is older, for want of what."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"{what}: torch >= {major}.{minor}")
