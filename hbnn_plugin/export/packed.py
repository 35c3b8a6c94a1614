"""Packed files: binary layers as one bit a weight and one scale a filter, everything else as it is."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..host.convolved import convolved_weight, small_input
from ..host.selection import Predicate, Selected, own_class, select
from .capture import binary_weights, cluster_settings, plain_copy, unwrapped
from .container import PackedLayer, read, write
from .inference import hold, is_held, release
from .packing import no_values, pack, ties, unpack

__all__ = ["load_packed", "save_packed"]

M = TypeVar("M", bound=nn.Module)


def save_packed(model: nn.Module, path: str | os.PathLike[str], where: Predicate | None = None) -> None:
    """Write the model into one safetensors file, binary layers as one bit a weight. The model stays as it is.

    What each binary layer convolves with in evaluation mode is captured by running it. Beside the bits the file has
    its scale (one number a filter, or one for the layer where all are equal), and every other parameter and buffer of
    the plain model: latents and points are left out. Tied tensors are stored once. The file appears whole or not at
    all.

    Args:
        model: applied, in either mode, fused, or never applied; on any device.
        path: of the file; conventionally it ends in ``.safetensors``.
        where: predicate ``(module, qualified_name) -> bool`` that names the binary layers; for the default see
            :func:`hbnn_plugin.export.capture.binary_weights`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no binary layer; a layer is not binary; its output depends on its latent weight otherwise
            than through what it convolves with; the state_dict holds something other than tensors. Every such layer is
            named, and no file is written.
        ImportError: safetensors is not installed.
    """
    plain, settings = plain_copy(model), cluster_settings(model)
    binary = binary_weights(plain, where, also=settings)
    if not binary:
        raise ValueError(
            f"{type(model).__name__} has no binary layer: none convolves with ±scale in evaluation mode; name layers "
            "with where=..., or binarize a model with hbnn_plugin.apply(model, binarize=...)"
        )
    contents = pack(plain, binary, settings)
    layers = [seen.layer for seen in binary.values()]
    before = [_output(layer) for layer in layers]
    _fill(plain, unpack(contents), layers)
    wrong = [layer.label for layer, output in zip(layers, before) if not _close(_output(layer), output)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: with its binary weight alone the layer's output is another one. Its forward uses the "
            "latent weight otherwise too, such as for a scale behind the convolution, and that would be lost: let it "
            "scale the weight that it convolves with"
        )
    write(contents, Path(path))


def load_packed(path: str | os.PathLike[str], model: M) -> M:
    """Load a file of :func:`save_packed` into a plain model of the same architecture, for inference; return the model.

    Nothing in the file is executed. Each binary layer from now on convolves, in its own forward, with ±scale from the
    file, whatever that forward would make of its weight. Its weight Parameter holds ±scale and takes no gradient. The
    model is put into evaluation mode; in training mode a binary layer raises RuntimeError, since the file holds no
    latent weights. ``state_dict``, ``copy.deepcopy``, ``torch.export`` and ``torch.compile`` work as before, and
    :func:`save_packed` writes the same bits again. (Not DataParallel on several GPUs: its replicas would look at the
    first one's weights.)

    Args:
        path: of the file.
        model: plain, as the host's code builds it (of a ``binarize``d model: fused); another packed file may have been
            loaded into it before.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the file is damaged, or something else, or does not fit the model (every difference is listed). The
            model stays as it was.
        OSError: the file cannot be read.
        ImportError: safetensors is not installed.
    """
    inner = unwrapped(model)
    applied = cluster_settings(inner)
    if applied:
        raise ValueError(
            f"a packed file is loaded into a plain model, and hbnn_plugin.apply was called on {', '.join(applied)}: "
            "load it into a new model, or into hbnn_plugin.fuse(model)"
        )
    contents = read(Path(path))
    try:
        state = unpack(contents)
    except Exception as error:  # a file with the right checksum that save_packed did not write
        raise ValueError(f"{path} contradicts itself: {type(error).__name__}: {error}") from error
    layers = {name: layer for name, _, layer in select(inner, lambda _, name: name in contents.layers)}
    differences = [*_state_differences(inner, state)]
    for name, packed in contents.layers.items():
        label = name or type(inner).__name__
        differences += (f"{label}: {text}" for text in _layer_differences(packed, layers.get(name)))
    if differences:
        raise ValueError(
            f"{path} does not fit {type(inner).__name__}, which stays as it was:\n  " + "\n  ".join(differences)
        )
    _fill(inner, state, [layer for layer in layers.values() if layer is not None])
    model.eval()
    return model


def _state_differences(model: nn.Module, theirs: Mapping[str, Tensor]) -> Iterator[str]:
    ours = model.state_dict(keep_vars=True)
    yield from (f"{key}: in the model, not in the file" for key in ours if key not in theirs)
    yield from (f"{key}: in the file, not in the model" for key in theirs if key not in ours)
    for key, value in ours.items():
        if no_values(value):
            yield f"{key}: the model has no values there yet; initialize it first, on a real device"
        elif key in theirs and _kind(theirs[key]) != _kind(value):
            yield f"{key}: {_kind(theirs[key])} in the file, {_kind(value)} in the model"
    for key, tied in ties(ours).items():
        if key in theirs and tied in theirs and not torch.equal(theirs[key], theirs[tied]):
            yield f"{key}: the same tensor as {tied} in the model, another in the file"


def _layer_differences(theirs: PackedLayer, ours: Selected | None) -> Iterator[str]:
    if ours is None:
        yield "a binary layer in the file; the model has no such layer with a weight"
        return
    module, cls = ours.module, own_class(ours.module).__name__
    if cls != theirs.cls:
        hint = "; fuse(apply(model, binarize='1/1')) has such layers" if theirs.cls == "SignConv2d" else ""
        yield f"{theirs.cls} in the file, {cls} in the model{hint}"
    if (theirs.shape, theirs.unit_dims) != (ours.shape, ours.unit_dims):
        yield f"a weight of logical shape {theirs.shape} in the file, {ours.shape} in the model"
    elif no_values(ours.weight):
        return
    elif "forward" in vars(module) and not is_held(module):
        yield "something has put another forward on this instance; load the file before that"
    elif convolved_weight(module, ours.shape, ours.weight, evaluating=True) is None:
        yield "on a small input the model's layer runs no convolution or linear map with a weight of this size"


def _fill(model: nn.Module, state: Mapping[str, Tensor], layers: list[Selected]) -> None:
    """Load a state that is known to fit, and let the layers, and no others, convolve with their weight as it is."""
    ours = model.state_dict(keep_vars=True)
    before = {key: value.detach().clone() for key, value in ours.items()}
    loaded = OrderedDict(state)
    loaded._metadata = ours._metadata  # type: ignore[attr-defined]  # the versions that modules load by
    try:
        model.load_state_dict(loaded)
    except Exception:  # a hook of the model's own
        with torch.no_grad():
            for key, value in ours.items():
                value.copy_(before[key])
        raise
    for module in model.modules():
        release(module)
    for layer in layers:
        hold(layer)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


@torch.no_grad()
def _output(layer: Selected) -> Any:
    """What the layer makes of a small input."""
    weight = layer.weight
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed GPUs that have no part in this
        if weight.is_cuda:
            with torch.cuda.device(weight.device):
                torch.cuda.manual_seed(0)
        return layer.module.forward(small_input(layer.module, layer.shape, weight))


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    tolerance = torch.finfo(other.dtype).eps ** 0.5
    size = float(other.nan_to_num().abs().max())
    return torch.allclose(one, other, rtol=0, atol=tolerance * size, equal_nan=True)
