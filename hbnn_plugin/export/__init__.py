"""Out of training: packed files of one bit a binary weight, and other runtimes. Each needs its own optional package."""

from .onnx_file import to_onnx
from .packed import load_packed, save_packed
from .xnor import to_openvino

__all__ = ["load_packed", "save_packed", "to_onnx", "to_openvino"]
