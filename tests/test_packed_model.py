"""What a model from a packed file is: for inference, in all of torch's tools."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hbnn_plugin.export import load_packed, save_packed
from packed_files import close
from tiny_hosts import batch, tiny_net
from torch_version import since
from training_helpers import output, trained


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[nn.Module, Tensor]:
    net = trained()
    save_packed(net, tmp_path / "file")
    return load_packed(tmp_path / "file", tiny_net(seed=3)), output(net)


def test_it_cannot_be_trained(loaded: tuple[nn.Module, Tensor]) -> None:
    net, expected = loaded
    with pytest.raises(RuntimeError, match=r"conv1: it was loaded from a packed file.*model.eval\(\)"):
        net.train()(batch()[0])
    assert not net.conv1.weight.requires_grad and net.stem.weight.requires_grad
    assert close(output(net), expected)


def exported(net: nn.Module) -> nn.Module:
    return torch.export.export(net, (batch(9)[0],), strict=False).module()  # type: ignore[no-any-return]


def compiled(net: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(net, backend="eager", fullgraph=True)  # type: ignore[return-value]


def pickled(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "tool",
    [
        exported,
        pytest.param(compiled, marks=since(2, 6, "compiling through a TorchFunctionMode")),
        pickled,
        copy.deepcopy,
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchs_tools(tool: Callable[[nn.Module], nn.Module], loaded: tuple[nn.Module, Tensor]) -> None:
    net, expected = loaded
    with torch.no_grad():
        assert close(tool(net)(batch(9)[0]), expected)


def test_a_copy_is_independent_and_a_state_dict_carries_over(loaded: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    net, expected = loaded
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.neg_()
    assert close(output(net), expected)
    assert not close(output(other), expected)
    other.load_state_dict(net.state_dict())
    assert close(output(other), expected)
