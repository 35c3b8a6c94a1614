"""In which precision things are computed."""

from __future__ import annotations

import torch

__all__ = ["scalar_dtype", "working_dtype"]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 or better: in half precision a point at the margin has no digits left for its distance to the edge."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def scalar_dtype(device: torch.device) -> torch.dtype:
    """float64 for what is one number a point, but on Apple's GPUs and some of Intel's, which have none."""
    lacking = device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64)
    return torch.float32 if lacking else torch.float64
