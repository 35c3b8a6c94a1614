"""Out of training: packed files of one bit a binary weight, and other runtimes. Each needs its own optional package."""

from .agreement import Agreement
from .onnx_file import to_onnx
from .openvino_model import XnorModel, to_openvino
from .packed import load_packed, save_packed

__all__ = ["Agreement", "XnorModel", "load_packed", "save_packed", "to_onnx", "to_openvino"]
