"""A network as an ONNX file for any runtime: binary weights of ±1, each layer's scales behind it."""

from __future__ import annotations

import contextlib
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .agreement import Agreement, agreement
from .files import beside
from .folding import Folded, fold
from .graphs import add_constant, constants, convolutions, operands, signs_and_scales

__all__ = ["to_onnx"]


def to_onnx(
    model: nn.Module, example_input: Tensor, path: str | os.PathLike[str], *, tolerance: float | None = 0.1
) -> Agreement:
    """Write a trained network as an ONNX file, and check it in onnxruntime. The model stays as it is.

    What the host's forward makes of its latent weights is worked out: a binary layer's initializer holds the ±1 that it
    convolves with, and a product with its scales follows. The batch may be of any size, unless the model's own code
    turns it into a constant, such as in ``x.view(x.size(0), -1)``; then it is the example's. The file appears whole and
    checked, or not at all.

    Args:
        model: applied, in either mode, fused, or never applied; of float32.
        example_input: its one argument.
        path: of the file; conventionally it ends in ``.onnx``.
        tolerance: how far logits may be from torch's on the example, as a share of the largest; None checks nothing.

    Returns:
        How onnxruntime's output agrees with torch's on the example.

    Raises:
        ValueError: no convolution of the model has binary weights; the model cannot be traced
            (:func:`hbnn_plugin.export.folding.fold`); on the example onnxruntime's top-1 is not torch's, or a logit is
            further from it than the tolerance.
        ImportError: onnx, onnxscript or onnxruntime is not installed, or torch is too old.
    """
    runtime = _onnxruntime()
    folded = fold(model, example_input)
    if not _split_scales(folded.graph):
        raise ValueError(f"no convolution of {type(model).__name__} has binary weights in evaluation mode")
    file = torch.onnx.export(_program(folded), dynamo=True, verbose=False)
    assert file is not None
    with beside(Path(path)) as temporary:
        file.save(temporary)
        session = runtime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: folded.example.numpy()})
        result = agreement(torch.from_numpy(output), folded.output)
        result.require(tolerance, "onnxruntime")
    return result


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401, PLC0415
        import onnxruntime  # noqa: PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError("to_onnx needs onnx, onnxscript and onnxruntime: pip install 'hbnn-plugin[onnx]'") from error
    if inspect.signature(torch.onnx.export).parameters["args"].default is inspect.Parameter.empty:
        raise ImportError(
            f"to_onnx exports a torch.export program, which torch {torch.__version__} cannot: upgrade torch"
        )
    return onnxruntime


def _split_scales(module: fx.GraphModule) -> int:
    """Make each weight of ±scale ±1, and put a product with the scales behind its convolution; return how many."""
    known, call = constants(module), module.graph.call_function
    count = 0
    for conv in list(convolutions(module.graph)):
        data, filters, bias, *rest = operands(conv)
        binary = signs_and_scales(known[filters]) if filters in known else None
        if binary is None or "transpose" in str(conv.target):
            continue
        count += 1
        column = [-1, *[1] * (binary.signs.ndim - 2)]
        with module.graph.inserting_before(conv):
            signs = add_constant(module, f"{filters.name}_signs", binary.signs)
            scales = add_constant(module, f"{filters.name}_scales", binary.scales.view(column))
            result = call(conv.target, (data, signs, None, *rest), conv.kwargs)  # type: ignore[arg-type]
            result = call(torch.ops.aten.mul.Tensor, (result, scales))
            if bias is not None:
                result = call(torch.ops.aten.add.Tensor, (result, call(torch.ops.aten.view.default, (bias, column))))
        conv.replace_all_uses_with(result)
        module.graph.erase_node(conv)
    module.recompile()
    return count


def _program(folded: Folded) -> ExportedProgram:
    """With a batch of any size, if the graph allows it."""
    several = torch.cat([folded.example] * 2)  # torch takes a size of 1 for a constant
    with contextlib.suppress(Exception):  # whatever torch raises where a size was taken for a number
        program = torch.export.export(folded.graph, (several,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        if program.module()(several).shape[0] == 2 * len(folded.output):
            return program
    return torch.export.export(folded.graph, (folded.example,))
